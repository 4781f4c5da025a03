#!/usr/bin/env bash
# One call that does on a GPU machine all that a CPU cannot: the tests, then speed, MFU and memory at d12 and d20 in
# bf16, d26 in bf16 and fp8, and decoding. For a machine with torch but no network, carry a wheel of rustbpe
# (maturin build --release --manifest-path rustbpe/Cargo.toml) and name its folder:
#
#   WHEELS=folder bash dev/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${WHEELS:-}" ]; then
    python3 -m pip install --quiet --no-index --no-deps --target /tmp/site "$WHEELS"/*.whl
    export PYTHONPATH="/tmp/site${PYTHONPATH:+:$PYTHONPATH}"
fi
python3 -m pytest tests/test_gpt.py tests/test_engine.py tests/test_graphs.py tests/test_optimizers.py tests/test_gpu.py -q -m "not slow" && tests=0 || tests=$?
bench="python3 -m dev.bench_model --seq=2048 --vocab=65536 --rows=16"
$bench --parts=train --depths=12,20
$bench --parts=train --depths=26 --rows=8
NANOCHAT_PRECISION=fp8 $bench --parts=train --depths=26 --rows=8
$bench --parts=decode --decode_depth=20 --decode_batches=1,8,64,256 --decode_tokens=64
exit "$tests"
