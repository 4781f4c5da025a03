#!/usr/bin/env bash
# The pipeline step by step, on whatever this machine is: NVIDIA GPUs, a Mac, or a CPU. Sizes follow the machine.
#
#   bash steprun.sh setup tokenizer base_model         some steps, in the order given
#   bash steprun.sh all                                every step
#   DEPTH=12 bash steprun.sh base_model                another size
#   DRY_RUN=1 bash steprun.sh all                      print the commands
set -euo pipefail
cd "$(dirname "$0")"

STEPS="setup download_dataset tokenizer base_model mid_training sft rl report"

usage() {
    sed -n '2,7p' "$0" | sed 's/^# \{0,1\}//'
    echo "steps: $STEPS all"
}

# What is this machine, and how large a model suits it?
GPUS=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU' || true)
if [ "$GPUS" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then GPUS=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | wc -l); fi
if [ "$GPUS" -gt 0 ]; then
    MACHINE=gpu NPROC="${NPROC:-$GPUS}" EXTRA=gpu
    DEPTH="${DEPTH:-20}" NUM_SHARDS="${NUM_SHARDS:-240}" VOCAB="${VOCAB:-65536}"
    BASE_FLAGS="" CORE_FLAGS="" MID_FLAGS="" SFT_FLAGS="" RL_FLAGS="" EVAL_FLAGS="" TOKENIZER_CHARS=2000000000
elif [ "$(uname -s)" = Darwin ]; then
    MACHINE=mac NPROC=1 EXTRA=cpu
    DEPTH="${DEPTH:-6}" NUM_SHARDS="${NUM_SHARDS:-4}" VOCAB="${VOCAB:-16384}"
else
    MACHINE=cpu NPROC=1 EXTRA=cpu
    DEPTH="${DEPTH:-4}" NUM_SHARDS="${NUM_SHARDS:-2}" VOCAB="${VOCAB:-8192}"
fi
if [ "$MACHINE" != gpu ]; then
    TOKENIZER_CHARS=100000000
    BASE_FLAGS="--max_seq_len=512 --total_batch_size=4096 --num_iterations=1000 --eval_tokens=65536"
    CORE_FLAGS="--max_per_task=20"
    MID_FLAGS="--total_batch_size=4096 --num_iterations=300 --eval_tokens=65536 --spelling_size=2000 --spellingbee_size=2000"
    SFT_FLAGS="--num_iterations=200 --examples_per_step=16"
    RL_FLAGS="--num_iterations=20 --examples_per_step=8 --num_samples=8 --eval_examples=50"
    EVAL_FLAGS="-x 50 -m 128"
fi

WANDB_RUN="${WANDB_RUN:-dummy}"
BASE="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"

run() { if [ -n "${DRY_RUN:-}" ]; then printf '%q ' "$@"; echo; else echo "+ $*"; "$@"; fi; }
stage() {  # a script with its flags, under torchrun where there are several GPUs
    local script="$1"; shift
    if [ "$NPROC" -gt 1 ]; then
        run env OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" torchrun --standalone --nproc_per_node="$NPROC" -m "$script" -- "$@"
    else
        run python -m "$script" "$@"
    fi
}

step_setup() {
    if [ -z "${DRY_RUN:-}" ]; then source dev/setup.sh "$EXTRA"; fi
    run python -m nanochat.report reset
}
DOWNLOADED=""
step_download_dataset() {
    DOWNLOADED=yes
    if [ -n "${NANOCHAT_DATA_DIR:-}" ]; then echo "# NANOCHAT_DATA_DIR is set: nothing to download"; return; fi
    run python -m nanochat.dataset -n "$NUM_SHARDS"
}
# shellcheck disable=SC2086  # the *_FLAGS are lists of words
step_tokenizer() {
    if [ -z "$DOWNLOADED" ]; then step_download_dataset; fi  # downloads what is missing
    run python -m scripts.tok_train --max_chars="$TOKENIZER_CHARS" --vocab_size="$VOCAB"
    run python -m scripts.tok_eval
}
step_base_model() {
    stage scripts.base_train --depth="$DEPTH" --run="$WANDB_RUN" $BASE_FLAGS
    stage scripts.base_loss --eval_tokens=1048576
    stage scripts.base_eval $CORE_FLAGS
}
step_mid_training() {
    if [ -z "${NANOCHAT_DATA_DIR:-}" ] && [ ! -f "$BASE/identity_conversations.jsonl" ]; then  # the model's identity
        run python -m dev.gen_synthetic_data --identity_only --depth="$DEPTH" --vocab_size="$VOCAB" \
            --out="$BASE/identity_conversations.jsonl"
    fi
    stage scripts.mid_train --run="$WANDB_RUN" $MID_FLAGS; stage scripts.chat_eval -i mid $EVAL_FLAGS
}
step_sft() { stage scripts.chat_sft --run="$WANDB_RUN" $SFT_FLAGS; stage scripts.chat_eval -i sft $EVAL_FLAGS; }
step_rl() { stage scripts.chat_rl --run="$WANDB_RUN" $RL_FLAGS; stage scripts.chat_eval -i rl -a GSM8K $EVAL_FLAGS; }
step_report() { run python -m nanochat.report generate; }

case "${1:---help}" in -h | --help) usage; exit 0 ;; esac
if [ "$*" = all ]; then set -- $STEPS; fi
for name in "$@"; do
    case " $STEPS " in
        *" $name "*) ;;
        *)
            echo "error: unknown step '$name'" >&2
            echo "hint: choose from $STEPS, or all of them: bash steprun.sh all" >&2
            exit 2
            ;;
    esac
done
echo "# machine: $MACHINE, processes: $NPROC, depth: $DEPTH"
if [ -z "${DRY_RUN:-}" ] && [ -d .venv ]; then source .venv/bin/activate; fi
for name in "$@"; do "step_$name"; done
