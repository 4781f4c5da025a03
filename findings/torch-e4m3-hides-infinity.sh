#!/usr/bin/env bash
# torch: infinity becomes 448 in float8_e4m3fn
#
# Expected: a conversion to float8_e4m3fn gives NaN for what is too large, since the format has no infinity.
#   ml_dtypes (JAX, numpy) does so, and torch's other three 8-bit formats give infinity or NaN.
# Happens:  torch gives the largest number, 448, for everything above it, infinity included; of all bad
#   values only NaN stays. Whoever looks for overflow behind the conversion finds none, and the same file
#   of weights differs between tools.
#
# Versions: torch 2.15.0 (the package of PyPI, on a CPU), ml_dtypes 0.6.0, numpy 2.4.6, Python 3.11.
#   Seen: 2026-11-30.
# Needs: bash, uv, 6 GB of disk for torch.
#
# Output seen: as in as_seen.txt below
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python torch==2.15.0 ml_dtypes==0.6.0 numpy==2.4.6
cat > try.py <<'PYTHON'
import ml_dtypes
import numpy as np
import torch

values = [464.0, 465.0, 1e6, float("inf"), float("-inf"), float("nan")]


def show(name, found):
    print(f"{name:<26}", *(f"{value:>8g}" for value in found))


show("float32", values)
for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"):
    by_torch = torch.tensor(values).to(getattr(torch, name)).float().tolist()
    by_ml_dtypes = np.array(values, np.float32).astype(getattr(ml_dtypes, name)).astype(np.float32)
    show(f"{name:<15} torch", by_torch)
    show(f"{name:<15} ml_dtypes", by_ml_dtypes)
PYTHON
OMP_NUM_THREADS=1 venv/bin/python -W ignore try.py | tee seen.txt
cat > as_seen.txt <<'TEXT'
float32                         464      465    1e+06      inf     -inf      nan
float8_e4m3fn   torch           448      448      448      448     -448      nan
float8_e4m3fn   ml_dtypes       448      nan      nan      nan      nan      nan
float8_e5m2     torch           448      448      inf      inf     -inf      nan
float8_e5m2     ml_dtypes       448      448      inf      inf     -inf      nan
float8_e4m3fnuz torch           nan      nan      nan      nan      nan      nan
float8_e4m3fnuz ml_dtypes       nan      nan      nan      nan      nan      nan
float8_e5m2fnuz torch           448      448      nan      nan      nan      nan
float8_e5m2fnuz ml_dtypes       448      448      nan      nan      nan      nan
TEXT
cmp seen.txt as_seen.txt
