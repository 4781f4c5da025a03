#!/usr/bin/env bash
# numpy, ml_dtypes: the mean of 1,000 ones in bfloat16 is 0.256
#
# Expected: the mean of weights that safetensors gives to numpy from a bfloat16 file (its type is ml_dtypes', as
#   JAX's is) is right to bfloat16's two or three digits: sums are taken in float32, as numpy does for the
#   mean of float16, or in pairs.
# Happens:  numpy adds one value after the other in bfloat16, where 256 + 1 is 256 again. `sum`, `mean`, `var` and
#   `cumsum` lose everything after that, without a warning. `dot` and `dtype=np.float32` are right.
#
# Versions: ml_dtypes 0.6.0, numpy 2.4.6, safetensors 0.8.0, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   bfloat16:                  sum 256, mean 0.255859
#   the same, dtype=float32:   sum 1000, mean 1
#   the same, dot:             1000
#   float16:                   sum 1000, mean 1
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python ml_dtypes==0.6.0 numpy==2.4.6 safetensors==0.8.0
cat > try.py <<'PYTHON'
import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

save_file({"weight": np.ones(1000, ml_dtypes.bfloat16)}, "model.safetensors")
with safe_open("model.safetensors", "np") as file:
    ones = file.get_tensor("weight")
print(f"bfloat16:                  sum {float(ones.sum()):g}, mean {float(ones.mean()):g}")
print(f"the same, dtype=float32:   sum {ones.sum(dtype=np.float32):g}, mean {ones.mean(dtype=np.float32):g}")
print(f"the same, dot:             {float(np.dot(ones, ones)):g}")
half = ones.astype(np.float16)
print(f"float16:                   sum {half.sum():g}, mean {half.mean():g}")
PYTHON
venv/bin/python try.py | tee seen.txt
cat > as_seen.txt <<'TEXT'
bfloat16:                  sum 256, mean 0.255859
the same, dtype=float32:   sum 1000, mean 1
the same, dot:             1000
float16:                   sum 1000, mean 1
TEXT
cmp seen.txt as_seen.txt
