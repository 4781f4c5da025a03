"""
Midtraining: teach a base model the chat format, tool use and multiple choice, as more pretraining on conversations.

    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
    python -m scripts.mid_train --num_iterations=20 --total_batch_size=2048 --eval_tokens=2048      (a CPU, to try)

Conversations are packed into full rows like documents, and every token is a target, the user's too. The run is
one pass over the mixture (or num_iterations steps): its tokens are counted beforehand, so progress and end are known.

A tiny model does not learn multiple choice that way; it needs lessons (--lesson_rows): the letters of easy questions
alone first, one question a row, at small rates; then ever harder ones beside the other conversations, where each row
counts the same, or the one letter of an answer would drown in their hundreds of words. See dev/LOG.md.
"""

import time
from functools import partial

import numpy as np
import torch

from nanochat.checkpoint_manager import stage_managers
from nanochat.common import (
    ceil_div,
    compiles,
    compute_cleanup,
    compute_init,
    get_peak_flops,
    peak_memory_bytes,
    print0,
    run_script,
    synchronize,
)
from nanochat.configurator import get_settings, override_from_cli
from nanochat.dataloader import (
    conversation_documents,
    conversation_rows,
    count_used,
    eval_batches,
    even_weights,
    pack_documents,
    packed_conversations,
    rendered_conversations,
    shift,
)
from nanochat.distributed import all_reduce_sum, rank_slice
from nanochat.loss_eval import evaluate_bpb
from nanochat.precision import describe_precision, get_precision_dtype
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes
from nanochat.training import (
    Ema,
    RunKeeper,
    accumulate_gradients,
    align_batch_size,
    attempt,
    check_finite,
    check_settings,
    choose_device_batch_size,
    lr_multiplier,
    make_scaler,
    optimizer_step,
    resume_step,
    set_rates,
    step_line,
)
from tasks.common import TaskSequence
from tasks.mixtures import mid_mixture
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                   # wandb run name; dummy = log to metrics.jsonl only
device_type: str = ""                # cuda, mps or cpu; empty = detect
seed: int = 42                       # of the data order
# Model
model_tag: str | None = None         # base model to start from, and tag of the result; None = the one saved last
model_step: int | None = None        # its step; None = the last
# Data: your own conversations, and how often the mixture holds each part
data: str | None = None              # JSONL file whose conversations join the mixture (see tasks/customjson.py)
identity_epochs: int = 2             # how often the mixture repeats the identity conversations
spelling_size: int = 200000          # SimpleSpelling words
spellingbee_size: int = 80000        # SpellingBee questions
# Lessons, for a tiny model: one conversation a row, all of the same weight, the multiple choice in its file's order
lesson_rows: int = -1                # conversations per optimizer step over all ranks; -1 = no lessons, packed rows
question_steps: int = 0              # first steps with nothing but multiple choice
question_lr_frac: float = 0.2        # learning rates in those steps, as a fraction of the later ones
question_share: float = 0.55         # part of multiple choice in the steps after them
# Horizon
num_iterations: int = -1             # optimizer steps; -1 = one pass over the mixture
# Optimization
device_batch_size: int = -1          # rows per micro-batch, more if they are short; -1 = what the memory holds
total_batch_size: int = 524288       # tokens per optimizer step over all ranks
embedding_lr: float = 0.2            # Adam, token embedding; scaled by 1 / sqrt(width / 768)
unembedding_lr: float = 0.004        # Adam, output head; scaled likewise
matrix_lr: float = 0.02              # Muon, all matrices of the blocks
init_lr_frac: float = 1.0            # all learning rates start at this fraction
warmdown_ratio: float = 0.2          # last part of the run in which the learning rate falls to 0
# Evaluation and checkpoints
eval_every: int = 150                # steps between validation losses; -1 = at the end only
eval_tokens: int = 2097152           # tokens of held-out conversations to score; -1 = all
save_every: int = 500                # steps between checkpoints (one is also saved before every evaluation)
keep_last: int = 2                   # newest checkpoints to keep; -1 = all
resume_from_step: int = -1           # step to go on from; -2 = the latest checkpoint, -1 = start anew
compile: bool | None = None          # torch.compile on a GPU; None = if Triton is there

FIXED = ("seed", "lesson_rows", "question_steps", "question_share")  # settings that a resumed run cannot change

# -----------------------------------------------------------------------------


def count_tokens(mixture, tokenizer, ddp_rank, ddp_world_size, device):
    """Tokens of one pass over the mixture, counted by rendering it; ranks share the work. Collective."""
    mine = range(ddp_rank, len(mixture), ddp_world_size)
    count = sum(len(ids) for _, ids in rendered_conversations(mixture, mine, tokenizer))
    return int(all_reduce_sum(torch.tensor(count, device=device)))


def lesson_indices(step, num_questions, num_others):
    """
    Which lessons step `step` has, as places in the questions and, behind them, in the others. The questions come in
    their own order, in the toy world from easy to hard; the others are part of one shuffled pass after another.
    """
    mixed = max(0, step - question_steps)  # steps before this one that had both
    few = lesson_rows if step < question_steps else round(lesson_rows * question_share)
    first = min(step, question_steps) * lesson_rows + mixed * few
    rest = range(mixed * (lesson_rows - few), (mixed + 1) * (lesson_rows - few))
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_others)
              for epoch in {place // num_others for place in rest}}
    return [*(place % num_questions for place in range(first, first + few)),
            *(num_questions + int(orders[place // num_others][place % num_others]) for place in rest)]


def count_lessons(num_questions):
    """Steps of one pass over the questions."""
    left = max(0, num_questions - question_steps * lesson_rows)
    return question_steps + max(1, left // max(1, round(lesson_rows * question_share)))


# What a step trains on, in one of two ways. `next(step)` gives this rank's (inputs, targets, weights or None), and the
# step's number of targets and of tokens; rates are multiplied by `lr_frac(step)`; `place(step)` is for error messages.


class PackedRows:
    """The conversations of the mixture, packed into rows."""

    def __init__(self, tokenizer, max_seq_len, state, ddp_rank, ddp_world_size, device):
        self.mixture = mid_mixture(identity_epochs, spelling_size, spellingbee_size, data)
        self.batch_tokens = align_batch_size(total_batch_size, max_seq_len)
        self.num_rows, self.iterations = self.batch_tokens // max_seq_len, num_iterations
        self.about = f"batch: {self.batch_tokens:,} tokens = {self.num_rows} rows"
        if num_iterations <= 0:
            num_tokens = count_tokens(self.mixture, tokenizer, ddp_rank, ddp_world_size, device)
            self.iterations = max(1, num_tokens // self.batch_tokens)
            self.about = f"{num_tokens:,} tokens | {self.about}"
        self.loader = packed_conversations(self.mixture, tokenizer, max_seq_len, seed, state and state["loader"])
        self.mine = rank_slice(self.num_rows, ddp_rank, ddp_world_size)

    def next(self, step):
        inputs, targets = shift(self.loader.next_rows(self.num_rows)[self.mine])
        return (inputs, targets, None), self.batch_tokens, self.batch_tokens

    def lr_frac(self, step):
        return 1.0

    def state(self):
        return self.loader.state()

    def place(self, step):
        return f"the mixture, {self.state()}"

    def epoch(self, step):
        return self.loader.state()["epoch"]

    def close(self):
        self.loader.close()


class Lessons:
    """Conversations one a row, each of the same weight; see `lesson_indices`. The step alone says which."""

    def __init__(self, tokenizer, max_seq_len, ddp_rank, ddp_world_size):
        self.tokenizer, self.max_seq_len, self.num_rows = tokenizer, max_seq_len, lesson_rows
        questions = MMLU("auxiliary_train")
        others = mid_mixture(identity_epochs, spelling_size, spellingbee_size, data, questions=False)
        self.mixture, self.sizes = TaskSequence([questions, others]), (len(questions), len(others))
        self.steps_per_epoch = count_lessons(len(questions))
        self.iterations = num_iterations if num_iterations > 0 else self.steps_per_epoch
        self.about = f"batch: {lesson_rows} conversations"
        self.mine = slice(ddp_rank, None, ddp_world_size)  # dealt out, for the rows are sorted by length

    def next(self, step):
        indices = lesson_indices(step, *self.sizes)
        inputs, targets, _ = conversation_rows(self.mixture, indices, self.tokenizer, self.max_seq_len)
        arrays = tuple(array[self.mine] for array in (inputs, targets, even_weights(targets)))
        return arrays, 1, count_used(targets)

    def lr_frac(self, step):
        return question_lr_frac if step < question_steps else 1.0

    def state(self):
        return None

    def place(self, step):
        return f"the lessons of step {step}"

    def epoch(self, step):
        return step // self.steps_per_epoch

    def close(self):
        pass


def main():
    # Init: device, ranks, the base model
    settings, packed = get_settings(globals()), lesson_rows <= 0
    check_settings(settings, needed=("total_batch_size",))
    ddp_rank, _, ddp_world_size, device = compute_init(device_type, seed)
    print0(f"device: {device} x {ddp_world_size} | precision: {describe_precision(device.type)}")
    peak_flops, _ = get_peak_flops(device, get_precision_dtype(device.type))  # before the loader works beside it

    # Model and tokenizer: of the base model, or of this stage's own checkpoint to resume
    manager, base_manager = stage_managers("mid", "base", model_tag, resume_from_step)
    step, state = resume_step(manager, resume_from_step, settings, FIXED)
    begin, begin_step = (manager, step) if state else (base_manager, base_manager.load_meta(model_step)[0])
    tokenizer, model = begin.load_tokenizer(begin_step), begin.load_model(device, begin_step)
    token_bytes = get_token_bytes(device, tokenizer)
    max_seq_len, flops_per_token = model.config.sequence_len, model.estimate_flops()
    if compiles(device, compile) and packed:  # lessons come in too many lengths
        model.compile()
    print0(f"model: {manager.checkpoint_dir.name}, {'mid' if state else 'base'} step {begin_step}, "
           f"{model.num_params():,} parameters")

    # Data: the mixture, and held-out conversations
    if packed:
        batches = PackedRows(tokenizer, max_seq_len, state, ddp_rank, ddp_world_size, device)
    else:
        batches = Lessons(tokenizer, max_seq_len, ddp_rank, ddp_world_size)
    iterations, num_conversations = batches.iterations, len(batches.mixture)
    device_rows = choose_device_batch_size(device_batch_size, model.config, device,
                                           ceil_div(batches.num_rows, ddp_world_size))
    print0(f"mixture: {num_conversations:,} conversations | {batches.about}, {device_rows} at a time on each of "
           f"{ddp_world_size} ranks | steps: {iterations:,}")
    val_rows = pack_documents(conversation_documents(SmolTalk("test"), tokenizer, epochs=1),
                              tokenizer.get_bos_token_id(), max_seq_len, eval_tokens)
    my_val_rows = val_rows[ddp_rank::ddp_world_size]

    # Optimizers
    optimizers = model.setup_optimizers(embedding_lr, unembedding_lr, matrix_lr, compile=compile)
    scaler = make_scaler(device, state)
    if state is not None:
        manager.load_optimizers(optimizers, step)

    # State of the loop
    progress = {"train_s": 0.0, "tokens": 0, "val_bpb": None} | (state or {}).get("progress", {})
    smooth_loss = Ema(*(state or {}).get("smooth_loss", ()))
    keeper = RunKeeper(manager, settings, iterations, step, state, f"{num_conversations:,} conversations", device)

    # Loop: save, evaluate, train
    while True:
        last = step == iterations
        eval_due = last or (eval_every > 0 and step % eval_every == 0)
        # Save first: whatever fails later, the steps so far are on disk
        if keeper.save_due(step, eval_due):
            keeper.save(step, model, optimizers, tokenizer, scaler,
                        loader=batches.state(), progress=progress, smooth_loss=smooth_loss.state())
        if keeper.stopping:
            break

        # Evaluate: bits per byte of held-out conversations
        if eval_due:
            rows = eval_batches(my_val_rows, device_rows, device)
            val_bpb = attempt("the evaluation", partial(evaluate_bpb, model, rows, token_bytes))
            if val_bpb is not None:
                progress["val_bpb"] = val_bpb
                print0(f"step: {step:05d} | val bpb: {val_bpb:.6f} | train time: {progress['train_s'] / 60:.2f}m")
                keeper.log({"step": step, "val/bpb": val_bpb, "train_s": progress["train_s"]})
        if last:
            break

        # Train: one optimizer step on this step's rows
        synchronize(device)
        start = time.perf_counter()
        lr_factor = init_lr_frac * lr_multiplier(step, iterations, 0, warmdown_ratio) * batches.lr_frac(step)
        set_rates(optimizers, lr_factor)
        (inputs, targets, weights), num_targets, step_tokens = batches.next(step)
        loss, device_rows = accumulate_gradients(model, inputs, targets, num_targets, device_rows, weights, scaler)
        loss = check_finite(loss, step, batches.place(step), manager)
        grad_norm = optimizer_step(model, optimizers, scaler)
        synchronize(device)
        dt_s = time.perf_counter() - start

        # Log
        step += 1
        progress["train_s"] += dt_s
        progress["tokens"] += step_tokens
        metrics, line = step_line(
            step, iterations, loss, lr_factor, dt_s, step_tokens,
            flops_per_s=flops_per_token * step_tokens / dt_s / ddp_world_size, peak_flops=peak_flops,
            eta_s=progress["train_s"] / step * (iterations - step), smooth_loss=smooth_loss.update(loss),
            grad_norm=grad_norm, memory_bytes=peak_memory_bytes(device), epoch=batches.epoch(step))
        keeper.log(metrics)
        print0(line)

    # Summary and cleanup
    print0(f"peak memory: {peak_memory_bytes(device) / 2**20:,.0f} MiB | train time: {progress['train_s'] / 60:.2f}m")
    get_report().log("Midtraining", {
        "config": settings, "curves": str(manager.checkpoint_dir / "metrics.jsonl"),
        "metrics": {"bpb of conversations": progress["val_bpb"]}, "conversations": num_conversations, "steps": step,
        "tokens": progress["tokens"], "training minutes": progress["train_s"] / 60})
    batches.close()
    compute_cleanup()
    keeper.close()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
