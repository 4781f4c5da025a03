#!/usr/bin/env bash
# The $100 run: a d20 (561M parameters) from raw text to a model that you can talk to, about 4 hours on one node of
# 8 H100s. The figures per stage below are estimates from FLOPs at 45% MFU, not measurements of this code.
#
#   bash speedrun.sh                                          everything
#   WANDB_RUN=speedrun bash speedrun.sh                       log to wandb too
#   screen -L -Logfile speedrun.log -S speedrun bash speedrun.sh     in a session that survives a lost connection
#   DRY_RUN=1 bash speedrun.sh                                print the commands in order
#
# Why d20 at 20 tokens per parameter: by a law through small runs a d26 at 5 has the least loss for the same time, by
# 0.0016 bits per byte, which is less than that law knows (dev/log/2026-11-30-series.md). A smaller model answers faster.
#
# run1000.sh sets other sizes and calls this script. Every stage can be run again alone; all resume with
# --resume_from_step=-2.
set -euo pipefail
cd "$(dirname "$0")"

DEPTH="${DEPTH:-20}"                          # the one dial
DEVICE_BATCH_SIZE="${DEVICE_BATCH_SIZE:--1}"  # rows per GPU and pass; -1 fits itself to the memory
NPROC="${NPROC:-8}"                           # GPUs of this node
NUM_SHARDS="${NUM_SHARDS:-240}"               # pretraining shards of about 100 MB, see stage 2
WANDB_RUN="${WANDB_RUN:-dummy}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

run() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else echo "+ $*"; "$@"; fi; }
ranks() { run torchrun --standalone --nproc_per_node="$NPROC" -m "$@"; }

# 0. Set-up: uv, torch, the rustbpe extension; a new report card. A few minutes.
if [ -z "${DRY_RUN:-}" ]; then source dev/setup.sh gpu; fi
BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
run python -m nanochat.report reset

# 1. Tokenizer. 2 billion characters are plenty for 65,536 tokens: 12 shards hold them, also with long documents cut as
#    tok_train cuts them. About a minute of training. The rest of the text downloads behind it.
if [ -z "${NANOCHAT_DATA_DIR:-}" ]; then run python -m nanochat.dataset -n 12; fi
DOWNLOAD_PID=""
trap '[ -z "$DOWNLOAD_PID" ] || kill "$DOWNLOAD_PID" 2> /dev/null || true' EXIT  # when a stage fails, this ends too
if [ -z "${NANOCHAT_DATA_DIR:-}" ] && [ -z "${DRY_RUN:-}" ]; then
    python -m nanochat.dataset -n "$NUM_SHARDS" & DOWNLOAD_PID=$!
elif [ -z "${NANOCHAT_DATA_DIR:-}" ]; then
    run python -m nanochat.dataset -n "$NUM_SHARDS"
fi
run python -m scripts.tok_train --max_chars=2000000000 --vocab_size=65536
run python -m scripts.tok_eval

# 2. Pretraining, where nearly all of the money goes: 20 tokens per parameter (Chinchilla) are 11.2 billion tokens at
#    d20, at 4.8 characters per token 54 billion characters; a shard holds about 250 million, so 215 are needed and 240
#    downloaded. 6 FLOPs per parameter and token make 4e19 FLOPs: about 3 hours.
if [ -n "$DOWNLOAD_PID" ]; then wait "$DOWNLOAD_PID"; DOWNLOAD_PID=""; fi
ranks scripts.base_train -- --depth="$DEPTH" --device_batch_size="$DEVICE_BATCH_SIZE" --run="$WANDB_RUN"
ranks scripts.base_loss
ranks scripts.base_eval

# 3. Midtraining: the chat format, tool use, multiple choice. About 0.5 billion tokens of conversations: 10 minutes.
#    The identity conversations are made on the spot, from dev/toyworld/persona.json and the size of this model.
if [ -z "${NANOCHAT_DATA_DIR:-}" ] && [ ! -f "$BASE/identity_conversations.jsonl" ]; then
    run python -m dev.gen_synthetic_data --identity_only --depth="$DEPTH" --out="$BASE/identity_conversations.jsonl"
fi
ranks scripts.mid_train -- --run="$WANDB_RUN"
ranks scripts.chat_eval -- -i mid

# 4. Supervised finetuning on about 23,000 good conversations, one a row: 10 minutes.
ranks scripts.chat_sft -- --run="$WANDB_RUN"
ranks scripts.chat_eval -- -i sft

# 5. Reinforcement learning on GSM8K, one pass over its 7,473 questions: about an hour. RL=0 leaves it out.
if [ "${RL:-1}" != 0 ]; then
    ranks scripts.chat_rl -- --run="$WANDB_RUN"
    ranks scripts.chat_eval -- -i rl -a GSM8K
fi

# 6. The report card, with every figure, curve and sample.
run python -m nanochat.report generate

echo "talk to it: python -m scripts.chat_cli, or python -m scripts.chat_web for the page"
