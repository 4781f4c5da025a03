#!/usr/bin/env bash
# safetensors: the same tensors and metadata, saved twice, are two different files
#
# Expected: `save` is a function of its arguments: a checksum of the file tells whether a model is the
#   same, and an export that is made again is equal to the byte. The tensors are sorted by the library.
# Happens:  the entries of `metadata` are written in a random order, another one at each call, so a file
#   with more than one entry nearly always has another checksum. With one entry the bytes are equal.
#   Whoever needs equal bytes keeps to one entry (a JSON text holds the rest).
#
# Versions: safetensors 0.8.0, numpy 2.4.6, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen (the number of the last line but one varies):
#   1 entry:   1 file of 50
#   4 entries: 21 different files of 50
#   what they hold is equal: True
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python safetensors==0.8.0 numpy==2.4.6
cat > try.py <<'PYTHON'
import json
import sys

import numpy as np
from safetensors.numpy import load, save

tensors = {"b": np.arange(6, dtype=np.float32), "a": np.zeros((2, 2), np.float32)}
one = {"format": "pt"}
four = {"format": "pt", "step": "1000", "tag": "d4", "commit": "0a1b2c3"}


def header(data):
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8:8 + size])


same = {save(tensors, metadata=one) for _ in range(50)}
print(f"1 entry:   {len(same)} file of 50")
files = {save(tensors, metadata=four) for _ in range(50)}
print(f"4 entries: {len(files)} different files of 50")

first, *rest = files
equal = all(header(data) == header(first) for data in rest)
for data in rest:
    equal = equal and all(np.array_equal(load(data)[name], tensors[name]) for name in tensors)
print("what they hold is equal:", equal)
sys.exit(not (len(same) == 1 and len(files) > 1 and equal))
PYTHON
venv/bin/python try.py
