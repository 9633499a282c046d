"""Opens an exported folder with Hugging Face transformers and compares its logits with those of `cloze forward`.

  open_export.py CLOZE_BINARY MODEL_FOLDER WORK_FOLDER      prints one JSON line
"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

binary, folder, work = sys.argv[1], sys.argv[2], Path(sys.argv[3])
torch.set_num_threads(2)
model = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)

texts = ["Read this review. The food was excellent.\nAnswer: [unused0] [MASK]", "Compute the number nine.\nAnswer: [unused0] [MASK]", "[MASK]"]
encoded = [tokenizer(text)["input_ids"] for text in texts]
save_file({"input_ids": np.array([i for ids in encoded for i in ids], np.int32), "lengths": np.array([len(ids) for ids in encoded], np.int32)},
          work / "input.safetensors")
subprocess.run([binary, "forward", "--model", folder, "--input", work / "input.safetensors", "--output", work / "output.safetensors"], check=True)
ours = load_file(work / "output.safetensors")["logits"]
with torch.no_grad():
    theirs = np.concatenate([model(input_ids=torch.tensor([ids])).logits[0].numpy() for ids in encoded])
print(json.dumps(dict(
    model=type(model).__name__,
    mask_token=tokenizer.mask_token,
    masks_found=sum(ids.count(tokenizer.mask_token_id) for ids in encoded),
    first_ids=encoded[0],
    logits_max_abs=float(np.abs(ours - theirs).max()),
    logits_spread=float(theirs.std()),
)))
