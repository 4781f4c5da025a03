#!/usr/bin/env bash
# The whole pipeline on a laptop's CPU, with no network beyond package installation: a model of two million
# parameters that reads, answers, counts letters and does sums in a small world of its own, in minutes.
#
#   bash dev/runcpu.sh              train on the toy world (written first, half a minute)
#   NANOCHAT_DATA_DIR=/path bash dev/runcpu.sh       train on a local data mirror instead
#   DRY_RUN=1 bash dev/runcpu.sh    print the commands
#
# Afterwards: python -m scripts.chat_cli, or python -m scripts.chat_web and a browser.
set -euo pipefail
cd "$(dirname "$0")/.."

run() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else echo "+ $*"; "$@"; fi; }

WANDB_RUN="${WANDB_RUN:-dummy}"
if [ -z "${DRY_RUN:-}" ]; then source dev/setup.sh cpu; fi
BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"

# 1. The toy world: stories, facts, word problems, questions and small talk from a seed (half a minute). Its place in
#    the pipeline is that of the web text, the tasks and the chats of a real run.
if [ -z "${NANOCHAT_DATA_DIR:-}" ]; then
    run python -m dev.gen_synthetic_data --seed=42 --out="$BASE/toy_world"
    export NANOCHAT_DATA_DIR="$BASE/toy_world"
fi
run python -m nanochat.report reset

# 2. The tokenizer: a small vocabulary keeps the model's head, most of its arithmetic at this size, small, and cuts most
#    words into pieces whose letters can be learned (seconds).
run python -m scripts.tok_train --vocab_size=1024
run python -m scripts.tok_eval

# 3. Pretraining: three layers learn the language of that world, briefly, since its conversations teach more a minute.
#    Small batches: at this size it is the number of steps that teaches. Small batches also make the embedding's gradient
#    noisy, so its rate is lower than a large run's.
run python -m scripts.base_train --depth="${DEPTH:-3}" --head_dim=64 --max_seq_len=256 --total_batch_size=2048 \
    --num_iterations="${BASE_STEPS:-400}" --head_start=False --matrix_lr=0.04 --embedding_lr=0.1 \
    --eval_every=-1 --eval_tokens=32768 --sample_every=-1 --run="$WANDB_RUN"
run python -m scripts.base_loss --eval_tokens=32768

# 4. Midtraining: the chat format, the calculator, spelling, and how a conversation goes.
run python -m scripts.mid_train --total_batch_size=2048 --num_iterations="${MID_STEPS:-900}" --init_lr_frac=0.9 \
    --matrix_lr=0.04 --embedding_lr=0.08 --warmdown_ratio=0.5 --eval_every=-1 --eval_tokens=65536 \
    --identity_epochs=3 --spelling_size=3000 --spellingbee_size=4000 --run="$WANDB_RUN"

# 5. Supervised finetuning, the longest stage: one conversation a row, and only the assistant's words are targets. A small
#    model learns what is asked about twice as fast from these rows as from packed ones (dev/LOG.md).
run python -m scripts.chat_sft --examples_per_step=24 --device_batch_size=4 --num_iterations="${SFT_STEPS:-1500}" \
    --init_lr_frac=0.8 --matrix_lr=0.04 --embedding_lr=0.08 --eval_every=-1 --eval_examples=128 \
    --smoltalk_size=60000 --identity_epochs=3 --spelling_size=3000 --spellingbee_size=4000 --run="$WANDB_RUN"

# 6. Reinforcement learning on word problems: right answers become likelier. Small rates, or it forgets who it is: Muon
#    takes steps of the same length even when the gradient is noise.
run python -m scripts.chat_rl --num_iterations="${RL_STEPS:-50}" --examples_per_step=8 --num_samples=8 \
    --max_new_tokens=80 --eval_every=-1 --eval_examples=200 --init_lr_frac=0.1 --embedding_lr=0.02 \
    --run="$WANDB_RUN"

# 7. Evaluation of every chat stage on held-out questions, and the report card. Strangers comes first: messages as people
#    type them, which the generator of the toy world did not make.
TASKS="Strangers|MMLU|ARC-Easy|GSM8K|SpellingBee"
if [ -f "$NANOCHAT_DATA_DIR/tasks/identity_test.jsonl" ] || [ -n "${DRY_RUN:-}" ]; then TASKS="$TASKS|Identity"; fi
for stage in mid sft rl; do
    run python -m scripts.chat_eval -i "$stage" -a "$TASKS" -x 200 -m 160
done
run python -m nanochat.report generate

# 8. Talk to it: first the messages of dev/toyworld/data/examples.txt, which it should answer rightly.
run python -m scripts.chat_cli -i rl -p "Who are you?" -p "What is 12 + 35?" -p "Tell me a story about a fox" \
    -p "How many a are in banana?"
if [ -t 0 ]; then run python -m scripts.chat_cli -i rl; fi
