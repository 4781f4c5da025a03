#!/usr/bin/env bash
# Our server against `transformers serve` on the export of the same model: streaming clients, greedy, 64 tokens each
# (no token ends an answer), in turn in one run; takes two minutes. Needs a model in NANOCHAT_BASE_DIR, and a Python that
# has transformers' server (uv pip install "transformers[serving]" accelerate) in THEIR_PYTHON.
#
#   bash dev/compare_serving.sh                          (the newest SFT model; 1, 4, 16 and 64 clients, 10 s each)
#   CLIENTS=16 SECONDS_EACH=5 bash dev/compare_serving.sh --continuous-batching    (a flag of `transformers serve`)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
their_python=${THEIR_PYTHON:-$python}
port=${PORT:-8765}
source=${SOURCE:-sft}

folder=$(mktemp -d)
trap 'rm -rf "$folder"; kill "${server:-}" 2> /dev/null || true' EXIT
"$python" -m scripts.export_hf --source="$source" --dtype="${DTYPE:-bfloat16}" --out="$folder/model"
# without tokens that end an answer, as in the benchmark's own server
"$python" - "$folder/model/generation_config.json" << 'END'
import json, sys
with open(sys.argv[1]) as file:
    config = json.load(file)
config.pop("eos_token_id", None)
with open(sys.argv[1], "w") as file:
    json.dump(config, file)
END

"$their_python" -m transformers.cli.transformers serve "$folder/model" --host 127.0.0.1 --port "$port" "$@" \
    > "$folder/log" 2>&1 &
server=$!
until (: < "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do
    kill -0 "$server" 2> /dev/null || { cat "$folder/log"; exit 1; }
    sleep 1
done
"$python" -m dev.bench_serving --source="$source" --against="http://127.0.0.1:$port" --against_pid="$server" \
    --clients="${CLIENTS:-1,4,16,64}" --seconds="${SECONDS_EACH:-10}" --max_tokens=64 --temperature=0 --churn=0
