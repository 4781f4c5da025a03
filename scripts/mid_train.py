"""
Midtraining: teach a base model the chat format, tool use and multiple choice, as more pretraining
on conversations.

    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
    python -m scripts.mid_train --num_iterations=20 --total_batch_size=2048 --eval_tokens=2048  (a CPU)

Conversations are packed into full rows like documents, and every token is a target, the user's too.
The run is one pass over the mixture (or num_iterations steps): its tokens are counted beforehand,
so progress and end are known.

A tiny model does not learn multiple choice that way; it needs lessons (--lesson_rows): the letters
of easy questions alone first, one question a row, at small rates; then ever harder ones beside the
other conversations, where each row counts the same, or the one letter of an answer would drown in
their hundreds of words. See dev/LOG.md.
"""

from functools import partial

import torch

from nanochat.checkpoint_manager import stage_managers
from nanochat.common import IGNORE, ceil_div, compiles, print0, run_script
from nanochat.configurator import (
    Count,
    CountOrOff,
    Fraction,
    NonNegative,
    Positive,
    get_settings,
    override_from_cli,
)
from nanochat.dataloader import (
    conversation_documents,
    conversation_rows,
    count_used,
    eval_batches,
    even_weights,
    packed_conversations,
    rendered_conversations,
    shift,
)
from nanochat.distributed import all_reduce_sum, rank_slice
from nanochat.horizon import align_batch_size, choose_device_batch_size, shuffled_indices
from nanochat.loss_eval import evaluate_bpb
from nanochat.packing import pack_documents
from nanochat.run_keeper import RunKeeper, attempt, is_due
from nanochat.stage import open_stage
from nanochat.tokenizer import get_token_bytes
from nanochat.training import accumulate_gradients, lr_multiplier, optimizer_step, set_rates
from tasks.common import TaskSequence
from tasks.mixtures import mid_mixture
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                    # wandb run name; dummy = log to metrics.jsonl only
device_type: str = ""                 # cuda, mps or cpu; empty = detect
seed: int = 42                        # of the data order
# Model
model_tag: str | None = None          # its tag, and the result's; None = the one saved last
model_step: int | None = None         # its step; None = the last
# Data: your own conversations, and how often the mixture holds each part
data: str | None = None               # file of conversations to add, tasks/customjson.py
identity_epochs: Count = 2            # how often the mixture repeats the identity conversations
spelling_size: Count = 200000         # SimpleSpelling words
spellingbee_size: Count = 80000       # SpellingBee questions
# Lessons, for a tiny model: one conversation a row, all of the same weight, the multiple choice in
# its file's order
lesson_rows: CountOrOff = -1          # conversations per step; -1 = no lessons, packed rows
question_steps: Count = 0             # first steps with nothing but multiple choice
question_lr_frac: NonNegative = 0.2   # learning rates in those steps, as a fraction
question_share: Fraction = 0.55       # part of multiple choice in the steps after them
# Horizon
num_iterations: CountOrOff = -1       # optimizer steps; -1 = one pass over the mixture
# Optimization
device_batch_size: CountOrOff = -1    # rows per micro-batch; -1 = as many as should fit
total_batch_size: Positive = 524288   # tokens per optimizer step over all ranks
embedding_lr: NonNegative = 0.2       # Adam, token embedding; scaled by 1 / sqrt(width / 768)
unembedding_lr: NonNegative = 0.004   # Adam, output head; scaled likewise
value_lr: NonNegative = 0.1           # Adam, value embeddings; scaled likewise
matrix_lr: NonNegative = 0.02         # Muon, all matrices of the blocks
init_lr_frac: NonNegative = 1.0       # all learning rates start at this fraction
warmdown_ratio: Fraction = 0.2        # last part of the run, in which the learning rate falls to 0
# Evaluation and checkpoints
eval_every: CountOrOff = 150          # steps between validation losses; -1 = at the end only
eval_tokens: CountOrOff = 2097152     # tokens of held-out conversations to score; -1 = all
save_every: CountOrOff = 500          # steps between checkpoints, besides those at evaluations
keep_last: CountOrOff = 2             # newest checkpoints to keep; -1 = all
resume_from_step: int = -1            # step to go on from; -2 = the latest, -1 = new run
auto_resume: bool = False             # go on from the latest checkpoint, if there is one
verify: bool = True                   # compare checkpoints with their checksums when they are read
compile: bool | None = None           # torch.compile on a GPU; None = if Triton is there

# Settings that a resumed run cannot change
FIXED = ("seed", "lesson_rows", "question_steps", "question_share")

# -----------------------------------------------------------------------------
# The rows of a step, in one of two ways. `next(step)` gives this rank's (inputs, targets,
# weights or None), and the step's number of targets and of tokens over all ranks; `state()` says
# where in the data that was.


class PackedRows:
    """The conversations of the mixture, packed into rows."""

    def __init__(self, stage):
        max_seq_len = stage.model.config.sequence_len
        self.mixture = mid_mixture(identity_epochs, spelling_size, spellingbee_size, data)
        self.batch_tokens = align_batch_size(total_batch_size, max_seq_len)
        self.num_rows = self.batch_tokens // max_seq_len
        self.my_rows = rank_slice(self.num_rows, stage.rank, stage.world_size)
        self.iterations = num_iterations
        if num_iterations <= 0:
            num_tokens = count_tokens(self.mixture, stage)
            self.iterations = max(1, num_tokens // self.batch_tokens)
        state = stage.state.get("loader")
        self.loader = packed_conversations(self.mixture, stage.tokenizer, max_seq_len, seed, state)

    def next(self, step):
        inputs, targets = shift(self.loader.next_rows(self.num_rows))
        num_targets = max(1, int((targets != IGNORE).sum()))  # without turns of weight 0
        mine = (inputs[self.my_rows], targets[self.my_rows], None)
        return mine, num_targets, self.batch_tokens

    def state(self):
        return self.loader.state()

    def close(self):
        self.loader.close()


def count_tokens(mixture, stage):
    """
    Tokens of one pass over the mixture, counted by rendering it; ranks share the work. Collective.
    """
    mine = range(stage.rank, len(mixture), stage.world_size)
    count = sum(len(ids) for _, ids in rendered_conversations(mixture, mine, stage.tokenizer))
    return int(all_reduce_sum(torch.tensor(count, device=stage.device)))


class Lessons:
    """
    Conversations one a row, each of the same weight; see `lesson_indices`. The step alone says
    which.
    """

    def __init__(self, stage):
        questions = MMLU("auxiliary_train")
        others = mid_mixture(
            identity_epochs, spelling_size, spellingbee_size, data, questions=False)
        self.mixture = TaskSequence([questions, others])
        self.sizes = (len(questions), len(others))
        self.tokenizer = stage.tokenizer
        self.max_seq_len = stage.model.config.sequence_len
        self.num_rows = lesson_rows
        # dealt out, for the rows are sorted by length
        self.my_rows = slice(stage.rank, None, stage.world_size)
        self.steps_per_epoch = count_lessons(len(questions))
        self.iterations = num_iterations if num_iterations > 0 else self.steps_per_epoch
        self.step = stage.step

    def next(self, step):
        self.step = step
        indices = lesson_indices(step, *self.sizes)
        inputs, targets, _ = conversation_rows(
            self.mixture, indices, self.tokenizer, self.max_seq_len)
        weights = even_weights(targets)
        mine = (inputs[self.my_rows], targets[self.my_rows], weights[self.my_rows])
        return mine, 1, count_used(targets)  # the weights have a sum of 1

    def state(self):
        return {"epoch": self.step // self.steps_per_epoch, "step": self.step}

    def close(self):
        pass


def lesson_indices(step, num_questions, num_others):
    """
    Which lessons step `step` has, as places in the questions and, behind them, in the others. The
    questions come in their own order, in the toy world from easy to hard; the others are part of
    one shuffled pass after another.
    """
    mixed = max(0, step - question_steps)  # steps before this one that had both
    few = lesson_rows if step < question_steps else round(lesson_rows * question_share)
    first = min(step, question_steps) * lesson_rows + mixed * few
    rest = lesson_rows - few
    others = shuffled_indices(range(mixed * rest, (mixed + 1) * rest), num_others, seed)
    questions = [place % num_questions for place in range(first, first + few)]
    return questions + [num_questions + index for index in others]


def count_lessons(num_questions):
    """Steps of one pass over the questions."""
    left = max(0, num_questions - question_steps * lesson_rows)
    return question_steps + max(1, left // max(1, round(lesson_rows * question_share)))


# -----------------------------------------------------------------------------


def main():  # noqa: PLR0915
    # Device, ranks, the base model, or this stage's own checkpoint to resume
    settings = get_settings(globals())
    manager, base_manager = stage_managers(
        "mid", "base", model_tag, resume_from_step, auto_resume)
    stage = open_stage(settings, manager, base_manager, FIXED, {"tokens": 0, "val_bpb": None})
    model = stage.model
    progress = stage.progress
    token_bytes = get_token_bytes(stage.device, stage.tokenizer)
    packed = lesson_rows <= 0
    if packed and compiles(stage.device, compile):  # lessons come in too many lengths
        model.compile()

    # Data and horizon: the mixture, and held-out conversations
    rows = PackedRows(stage) if packed else Lessons(stage)
    iterations = rows.iterations
    most_rows = ceil_div(rows.num_rows, stage.world_size)
    device_rows = choose_device_batch_size(device_batch_size, model.config, stage.device, most_rows)
    print0(f"mixture: {len(rows.mixture):,} conversations | batch: {rows.num_rows} rows, "
           f"{device_rows} at a time on each of {stage.world_size} ranks | steps: {iterations:,}")
    val_documents = conversation_documents(SmolTalk("test"), stage.tokenizer, epochs=1)
    bos = stage.tokenizer.get_bos_token_id()
    val_rows = pack_documents(val_documents, bos, model.config.sequence_len, eval_tokens)
    my_val_rows = val_rows[stage.rank::stage.world_size]

    # Optimizers
    optimizers = model.setup_optimizers(
        embedding_lr, unembedding_lr, matrix_lr, compile=compile, value_lr=value_lr)
    scaler = stage.load_optimizers(optimizers)

    # Loop: save, evaluate, train
    keeper = RunKeeper(stage, iterations, f"{len(rows.mixture):,} conversations")
    step = stage.step
    while True:
        last = step == iterations
        eval_due = last or is_due(step, eval_every)

        # Save first: whatever fails later, the steps so far are on disk
        keeper.save_if_due(step, eval_due, loader=rows.state())
        if keeper.stopping:
            break

        # Evaluate: bits per byte of held-out conversations
        if eval_due:
            batches = eval_batches(my_val_rows, device_rows, stage.device)
            val_bpb = attempt("the evaluation", partial(evaluate_bpb, model, batches, token_bytes))
            if val_bpb is not None:
                progress["val_bpb"] = val_bpb
                keeper.log_evaluation(step, {"val/bpb": val_bpb})
        if last:
            break

        # Train: one optimizer step on this step's rows
        keeper.start_step()
        lr_factor = init_lr_frac * lr_multiplier(step, iterations, 0, warmdown_ratio)
        if step < question_steps and not packed:
            lr_factor *= question_lr_frac
        set_rates(optimizers, lr_factor)
        (inputs, targets, weights), num_targets, num_tokens = rows.next(step)
        loss, device_rows = accumulate_gradients(
            model, inputs, targets, num_targets, device_rows, weights, scaler)
        loss = keeper.check_finite(loss, step, f"the mixture, {rows.state()}")
        grad_norm = optimizer_step(model, optimizers, scaler)

        # Log
        step += 1
        progress["tokens"] += num_tokens
        epoch = rows.state()["epoch"]
        keeper.finish_step(step, loss, num_tokens, lr_factor, grad_norm, epoch=epoch)

    # Report and cleanup
    rows.close()
    keeper.finish("Midtraining", {
        "metrics": {"bpb of conversations": progress["val_bpb"]},
        "conversations": len(rows.mixture),
        "steps": step,
        "tokens": progress["tokens"],
    })


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
