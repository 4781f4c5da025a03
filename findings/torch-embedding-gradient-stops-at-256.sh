#!/usr/bin/env bash
# torch: on a CPU the gradient of a bfloat16 embedding stops at 256
#
# Expected: the gradient of a token that occurs 1,000 times is summed in float32 and rounded once, as
#   index_add_, scatter_add_, sum, matmul and the gradient of RMSNorm do it. A model that is loaded in
#   bfloat16, as most are today, can be finetuned on a CPU.
# Happens:  each occurrence is added in bfloat16. Its 8 bits hold no sum of 256 and 1, so a gradient of ones
#   ends at 256 however often the token occurs, without a word: frequent tokens (space, line end, padding)
#   and rare ones get the same. The bias of LayerNorm and index_put_(accumulate=True) do so too; float16
#   ends at 2,048. With weights in float32, under autocast, nothing is lost.
#
# Versions: torch 2.15.0 (the package of PyPI, on a CPU), Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv, 6 GB of disk for torch.
#
# Output seen (true value: 1,000 and 100,000; bfloat16 rounds the latter to 99,840):
#   embedding               256      256
#   LayerNorm, bias         256      256
#   index_put_              256      256
#   index_add_             1000    99840
#   RMSNorm, weight        1000    99840
#   Linear, bias           1000    99840
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python torch==2.15.0
cat > try.py <<'PYTHON'
import sys

import torch
import torch.nn.functional as F
from torch import nn

WIDTH = 16


def ones(num_rows):
    return torch.ones(num_rows, WIDTH, dtype=torch.bfloat16)


def embedding(num_rows):
    weight = ones(4).requires_grad_()
    token = torch.zeros(num_rows, dtype=torch.long)  # the same token each time
    F.embedding(token, weight).sum().backward()
    return weight.grad


def layer_norm(num_rows):
    layer = nn.LayerNorm(WIDTH, dtype=torch.bfloat16)
    layer(ones(num_rows)).sum().backward()
    return layer.bias.grad


def index_put(num_rows):
    row = torch.zeros(num_rows, dtype=torch.long)
    return torch.zeros(4, WIDTH, dtype=torch.bfloat16).index_put_((row,), ones(num_rows), accumulate=True)


def index_add(num_rows):
    row = torch.zeros(num_rows, dtype=torch.long)
    return torch.zeros(4, WIDTH, dtype=torch.bfloat16).index_add_(0, row, ones(num_rows))


def rms_norm(num_rows):
    layer = nn.RMSNorm(WIDTH, dtype=torch.bfloat16)
    layer(ones(num_rows)).sum().backward()
    return layer.weight.grad


def linear(num_rows):
    layer = nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)
    layer(ones(num_rows)).sum().backward()
    return layer.bias.grad


seen = {}
for name, gradient in (("embedding", embedding), ("LayerNorm, bias", layer_norm), ("index_put_", index_put),
                       ("index_add_", index_add), ("RMSNorm, weight", rms_norm), ("Linear, bias", linear)):
    sums = [int(gradient(num_rows).flatten()[0]) for num_rows in (1000, 100_000)]
    print(f"{name:<18} {sums[0]:>8} {sums[1]:>8}")
    seen[name] = sums
lost = [256, 256]
kept = [1000, 99840]
sys.exit(list(seen.values()) != [lost, lost, lost, kept, kept, kept])
PYTHON
OMP_NUM_THREADS=1 venv/bin/python -W ignore try.py
