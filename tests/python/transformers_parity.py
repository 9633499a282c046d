"""Compares `cloze forward` with Hugging Face transformers on the same random weights: logits, loss, gradients and a 20-step AdamW curve.

  transformers_parity.py CLOZE_BINARY WORK_FOLDER [--device cuda [--bfloat16]]      prints one JSON line with the largest differences
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import ModernBertConfig, ModernBertForMaskedLM

STEPS, LEARNING_RATE = 20, 1e-3
binary, folder = sys.argv[1], Path(sys.argv[2])
extra = sys.argv[3:]
torch.manual_seed(0)
torch.set_num_threads(2)

config = ModernBertConfig(vocab_size=512, hidden_size=96, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4, local_attention=32,
                          max_position_embeddings=512, pad_token_id=0, attn_implementation="eager")
reference = ModernBertForMaskedLM(config).float()
with torch.no_grad():  # larger weights than a fresh model's, so that differences show
    for name, parameter in reference.named_parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.08 + (1.0 if "norm" in name else 0.0))
reference.save_pretrained(folder / "model", max_shard_size="200KB")

# Documents shorter and longer than the window and than a block of the windowed attention.
lengths = [7, 1, 40, 300, 129, 64, 17, 33]
rng = np.random.default_rng(0)
ids = rng.integers(1, 512, sum(lengths)).astype(np.int32)
labels = np.where(rng.random(len(ids)) < 0.2, rng.integers(0, 512, len(ids)), -100).astype(np.int32)
save_file({"input_ids": ids, "lengths": np.array(lengths, np.int32), "labels": labels}, folder / "input.safetensors")
subprocess.run([binary, "forward", "--model", folder / "model", "--input", folder / "input.safetensors", "--output", folder / "output.safetensors",
                "--gradients", "--steps", str(STEPS), "--learning-rate", str(LEARNING_RATE), *extra], check=True,
               env=dict(os.environ, CLOZE_TORCH=os.path.dirname(torch.__file__)))  # a GPU run opens the CUDA half of this PyTorch
ours = load_file(folder / "output.safetensors")

longest = max(lengths)
x = torch.zeros((len(lengths), longest), dtype=torch.long)
y = torch.full((len(lengths), longest), -100)
mask = torch.zeros((len(lengths), longest), dtype=torch.long)
start = 0
for row, length in enumerate(lengths):
    x[row, :length] = torch.from_numpy(ids[start:start + length].astype(np.int64))
    y[row, :length] = torch.from_numpy(labels[start:start + length].astype(np.int64))
    mask[row, :length] = 1
    start += length

result = reference(input_ids=x, attention_mask=mask, labels=y)
logits = torch.cat([result.logits[row, :length] for row, length in enumerate(lengths)]).detach().numpy()
result.loss.backward()
gradient_difference = 0.0
for name, parameter in reference.named_parameters():
    if parameter.grad is None or name == "decoder.weight":
        continue
    theirs = parameter.grad.numpy()
    gradient_difference = max(gradient_difference, float(np.linalg.norm(ours["gradient." + name] - theirs) / np.linalg.norm(theirs)))

decayed = [p for n, p in reference.named_parameters() if p.dim() > 1]
plain = [p for n, p in reference.named_parameters() if p.dim() == 1]
optimizer = torch.optim.AdamW([dict(params=decayed, weight_decay=0.01), dict(params=plain, weight_decay=0.0)], lr=LEARNING_RATE)
curve = []
for _ in range(STEPS):
    optimizer.zero_grad()
    loss = reference(input_ids=x, attention_mask=mask, labels=y).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
    optimizer.step()
    curve.append(loss.item())
curve = np.array(curve)
print(json.dumps(dict(
    logits_max_abs=float(np.abs(ours["logits"] - logits).max()),
    loss_abs=abs(float(ours["loss"]) - result.loss.item()),
    gradient_relative=gradient_difference,
    curve_relative=float((np.abs(ours["losses"] - curve) / curve).max()),
    curve=[round(float(curve[0]), 4), round(float(curve[-1]), 4)],
)))
