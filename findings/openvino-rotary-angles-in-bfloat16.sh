#!/usr/bin/env bash
# openvino: on a CPU that has bfloat16, the angles of a rotary embedding are computed in it by default
#
# Expected: where a position times a frequency is the argument of a cosine, the product stays in float32,
#   also if the weights' products are taken in bfloat16. torch's autocast and transformers see to it.
# Happens:  written as an element-wise product it stays in float32; written as a matrix product, as
#   transformers writes it, it is taken in bfloat16, which has 8 bits: from position 512 on the angle is
#   off by up to 2 radians, and the cosine is any number. A converted model of transformers with a context
#   of 256 showed it: the logits moved the more, the longer the text. INFERENCE_PRECISION_HINT=f32 cures it.
#
# Versions: openvino 2026.4.1, numpy 2.4.6, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv, a CPU with bfloat16 (avx512_bf16 or amx_bf16).
#
# Output seen (largest error of a cosine, of positions below):
#   product   64: default 0.000, f32 0.000   256: default 0.000, f32 0.000   1024: default 0.000, f32 0.000
#   matmul    64: default 0.105, f32 0.000   256: default 0.532, f32 0.000   1024: default 1.995, f32 0.000
set -euo pipefail
grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo || { echo "this CPU has no bfloat16"; exit 0; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python openvino==2026.4.1 numpy==2.4.6
cat > try.py <<'PYTHON'
import sys

import numpy as np
import openvino
from openvino import opset13 as ops

core = openvino.Core()
frequencies = (10000.0 ** (-np.arange(0, 64, 2) / 64)).astype(np.float32)


def cosines(kind):
    """A model from positions (1, T) to the cosines of a rotary embedding (1, T, 32)."""
    positions = ops.parameter([-1, -1], openvino.Type.i64)
    column = ops.unsqueeze(ops.convert(positions, openvino.Type.f32), ops.constant(2))
    row = ops.constant(frequencies.reshape(1, 1, -1))
    angles = ops.multiply(column, row) if kind == "product" else ops.matmul(column, row, False, False)
    return openvino.Model([ops.result(ops.cos(angles))], [positions], kind)


def error(kind, length, settings):
    positions = np.arange(length)[None]
    seen = core.compile_model(cosines(kind), "CPU", settings)(positions)[0]
    return float(np.abs(seen - np.cos(positions[..., None] * frequencies)).max())


as_seen = True
for kind in ("product", "matmul"):
    figures = []
    for length in (64, 256, 1024):
        default = error(kind, length, {})
        exact = error(kind, length, {"INFERENCE_PRECISION_HINT": "f32"})
        figures.append(f"{length:>4}: default {default:.3f}, f32 {exact:.3f}")
        as_seen &= exact < 0.001 and (default > 0.05) == (kind == "matmul")
    print(f"{kind:<9}", "   ".join(figures).strip())
sys.exit(not as_seen)
PYTHON
venv/bin/python try.py
