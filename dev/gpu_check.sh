#!/usr/bin/env bash
# One call that does on a GPU machine all that a CPU cannot: the tests, then speed, MFU and memory of training (d12 and
# d20 in bf16, d26 in bf16 and fp8), decoding and serving with a d20, and every stage of the pipeline on the toy world.
# For a machine with torch but no network, carry a wheel of rustbpe (maturin build --release --manifest-path
# rustbpe/Cargo.toml) and of what else is missing there, and name their folder:
#
#   WHEELS=folder bash dev/gpu_check.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -n "${WHEELS:-}" ]; then
    python3 -m pip install --quiet --no-index --no-deps --target /tmp/site "$WHEELS"/*.whl
    export PYTHONPATH="/tmp/site${PYTHONPATH:+:$PYTHONPATH}"
fi
python3 -c "import xdist" 2> /dev/null && workers="-n 8" || workers=
python3 -m pytest tests -q -m "not slow" $workers && tests=0 || tests=$?
bench="python3 -m dev.bench_model --seq=2048 --vocab=65536"
$bench --parts=train --depths=12,20 --rows=64 --micro_rows=16
$bench --parts=train --depths=26 --rows=32 --micro_rows=8
NANOCHAT_PRECISION=fp8 $bench --parts=train --depths=26 --rows=32 --micro_rows=8
$bench --parts=decode --decode_depth=20 --decode_batches=1,8,64,256 --decode_tokens=64
python3 -m dev.bench_serving --depth=20 --vocab_size=65536 --max_seq_len=2048 --rows=256 --clients=1,64,256 --seconds=8

base="$(mktemp -d)"
export NANOCHAT_BASE_DIR="$base" NANOCHAT_DATA_DIR="$base/toy_world"
trap 'rm -rf "$base"' EXIT
python3 -m dev.gen_synthetic_data --out="$NANOCHAT_DATA_DIR"
python3 -m scripts.tok_train --vocab_size=4096
python3 -m scripts.base_train --depth=12 --max_seq_len=512 --total_batch_size=65536 --num_iterations=100 \
    --value_embeds=True
python3 -m scripts.mid_train --num_iterations=50
python3 -m scripts.chat_sft --num_iterations=20
python3 -m scripts.chat_rl --num_iterations=4 --eval_examples=64
python3 -m scripts.chat_eval -i rl -x 64
exit "$tests"
