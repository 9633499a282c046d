#!/usr/bin/env python3
"""How long a training loop in PyTorch is held up by a checkpoint, and how much slower the steps beside it are.

The model is a stack of transformer layers with AdamW, so that a step computes, and changes the whole state, as a training step does.
For each way to save: some steps, a checkpoint, and steps until it is stored. One JSON line each. For the same figures of Cloze train
with `checkpoint.every_steps` and read `checkpoint_saved` and `step` in events.jsonl.

    checkpoint_beside_training.py FOLDER --layers 14 --tokens 256 --steps 6
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

HIDDEN, HEADS, FEED_FORWARD = 768, 12, 3072

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder")
parser.add_argument("--layers", type=int, default=14)
parser.add_argument("--tokens", type=int, default=256)
parser.add_argument("--steps", type=int, default=6, help="steps before each checkpoint, and at least as many after it")
parser.add_argument("--threads", type=int, default=2)
arguments = parser.parse_args()

torch.set_num_threads(arguments.threads)
dist.init_process_group("gloo", rank=0, world_size=1)
layer = torch.nn.TransformerEncoderLayer(HIDDEN, HEADS, FEED_FORWARD, dropout=0.0, batch_first=True)
model = torch.nn.TransformerEncoder(layer, arguments.layers, enable_nested_tensor=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
batch = torch.randn(1, arguments.tokens, HIDDEN)


def step():
    started = time.perf_counter()
    optimizer.zero_grad()
    model(batch).square().mean().backward()
    optimizer.step()
    return time.perf_counter() - started


def state():
    moments = {f"{index}.{name}": value for index, values in optimizer.state_dict()["state"].items() for name, value in values.items()}
    return {"model": model.state_dict(), "moments": moments}


def measure(tool, save):
    """`save` returns something that tells whether the checkpoint is stored, or None where it is when the call returns."""
    place = os.path.join(arguments.folder, tool.replace(" ", "-"))
    os.makedirs(place)
    before = [step() for _ in range(arguments.steps)]
    started = time.perf_counter()
    pending = save(place)
    blocked = time.perf_counter() - started
    beside, after = [], []
    while len(beside) + len(after) < arguments.steps or (pending and not pending.done()):
        is_beside = bool(pending) and not pending.done()
        (beside if is_beside else after).append(step())
    stored = time.perf_counter() - started if pending else blocked
    if pending:
        pending.result()
    usual = statistics.median(before)
    print(json.dumps(dict(tool=tool, parameters=sum(p.numel() for p in model.parameters()), step_s=round(usual, 3),
                          blocked_s=round(blocked, 3), stored_within_s=round(stored, 3), steps_beside=len(beside),
                          slower_beside=round(statistics.median(beside) / usual, 3) if beside else None,
                          first_step_after=round((beside + after)[0] / usual, 3))), flush=True)
    shutil.rmtree(place)


def torch_save(place):
    path = os.path.join(place, "state.pt")
    torch.save(state(), path)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


step()
measure("torch.save", torch_save)
measure("dcp", lambda place: dcp.save(state(), checkpoint_id=os.path.join(place, "c")) and None)
# The first one starts threads and pins memory.
dcp.async_save(state(), checkpoint_id=os.path.join(arguments.folder, "warm-up")).result()
shutil.rmtree(os.path.join(arguments.folder, "warm-up"))
measure("dcp async", lambda place: dcp.async_save(state(), checkpoint_id=os.path.join(place, "c")))
dist.destroy_process_group()
