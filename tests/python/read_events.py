"""Reads one scalar of a folder of event files with TensorBoard itself.

  read_events.py FOLDER TAG      prints one JSON line with steps and values in the reader's order
"""
import json
import sys

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

folder, tag = sys.argv[1:]
events = EventAccumulator(folder, size_guidance={"scalars": 0})  # 0 keeps all values instead of a sample
events.Reload()
scalars = events.Scalars(tag)
print(json.dumps(dict(steps=[scalar.step for scalar in scalars], values=[scalar.value for scalar in scalars])))
