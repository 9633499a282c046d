#!/usr/bin/env python3
"""Baseline of the steps beside a checkpoint: trains a ModernBERT of the base size on the CPU with AdamW and stores weights and moments by
PyTorch's DCP async every few steps. One JSON line: step times with and without a save under way, and how long the loop was blocked.

dcp_async_steps.py FOLDER [--steps 20] [--every 6] [--examples 16] [--length 24]
"""
import argparse
import json
import os
import shutil
import statistics
import time

os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
os.environ.setdefault("MASTER_PORT", "29633")
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from transformers import ModernBertConfig, ModernBertForMaskedLM


def train(model, optimizer, tokens):
    started = time.perf_counter()
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def state_of(model, optimizer):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--length", type=int, default=24)
    arguments = parser.parse_args()
    dist.init_process_group("gloo", rank=0, world_size=1)
    model = ModernBertForMaskedLM(ModernBertConfig(vocab_size=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1,
                                                   sep_token_id=2, attn_implementation="sdpa"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(3, 2048, (arguments.examples, arguments.length))
    future, blocked, alone, beside = None, [], [], []
    for step in range(1, arguments.steps + 1):
        is_saving = future is not None and not future.done()
        (beside if is_saving else alone).append(train(model, optimizer, tokens))
        if step % arguments.every == 0:
            started = time.perf_counter()
            if future is not None:
                future.result()
            future = dcp.async_save(state_of(model, optimizer), checkpoint_id=f"{arguments.folder}/{step}")
            blocked.append(round(time.perf_counter() - started, 3))
    future.result()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(json.dumps({
        "tool": "dcp.async_save", "parameters": parameters, "blocked_s": blocked, "step_alone_s": round(statistics.median(alone[1:]), 3),
        "steps_beside_s": [round(seconds, 3) for seconds in beside],
    }))
    dist.destroy_process_group()
    shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
