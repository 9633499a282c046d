#!/usr/bin/env python3
"""Baseline of `cloze-worker bench-checkpoint`: PyTorch DCP loads a state (weights and two moments, float32) into the tensors that were
saved, and into new ones, as a process that resumes has them. One JSON line per round.   dcp_load.py FOLDER --params N --rounds R
"""

import argparse
import json
import os
import shutil
import time

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

TENSORS_PER_GROUP = 64
GROUPS = ("weight", "exp_avg", "exp_avg_sq")


def seconds_to_load(state, folder):
    started = time.perf_counter()
    dcp.load(state, checkpoint_id=folder)
    return time.perf_counter() - started


def seconds_to_load_anew(length, folder):
    started = time.perf_counter()
    state = {f"{group}.{index}": torch.empty(length) for group in GROUPS for index in range(TENSORS_PER_GROUP)}
    dcp.load(state, checkpoint_id=folder)
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--params", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29633")
    dist.init_process_group("gloo", rank=0, world_size=1)
    length = arguments.params // TENSORS_PER_GROUP
    state = {f"{group}.{index}": torch.randn(length) for group in GROUPS for index in range(TENSORS_PER_GROUP)}
    for number in range(arguments.rounds):
        folder = os.path.join(arguments.folder, f"round-{number}")
        started = time.perf_counter()
        dcp.save(state, checkpoint_id=folder)
        os.sync()
        saved_s = time.perf_counter() - started
        line = {
            "tool": "dcp",
            "gb": len(GROUPS) * TENSORS_PER_GROUP * length * 4 / 1e9,
            "saved_s": saved_s,
            "load_s": seconds_to_load(state, folder),
            "load_anew_s": seconds_to_load_anew(length, folder),
        }
        print(json.dumps(line), flush=True)
        shutil.rmtree(folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
