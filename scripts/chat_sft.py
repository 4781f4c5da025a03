"""
Supervised finetuning: one conversation a row, and only the assistant's own tokens are targets.

    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
    python -m scripts.chat_sft --num_iterations=20 --examples_per_step=4           (a CPU, to try)

The loss of a step is the sum over its target tokens divided by their number over all ranks, so
neither micro-batches nor ranks weigh a token differently. Conversations longer than the context are
cut to it and counted.
"""

from functools import partial
from typing import Literal

import numpy as np

from nanochat.checkpoint_manager import stage_managers
from nanochat.common import IGNORE, ceil_div, print0, run_script
from nanochat.configurator import (
    Count,
    CountOrOff,
    NonNegative,
    Positive,
    get_settings,
    override_from_cli,
)
from nanochat.dataloader import conversation_rows, to_device
from nanochat.horizon import (
    choose_device_batch_size,
    count_examples,
    shuffled_indices,
    step_places,
)
from nanochat.loss_eval import evaluate_loss
from nanochat.progress import show_progress
from nanochat.run_keeper import RunKeeper, attempt, is_due
from nanochat.stage import open_stage
from nanochat.trackers import Tracker
from nanochat.training import (
    accumulate_gradients,
    count_used,
    lr_multiplier,
    optimizer_step,
    set_rates,
)
from tasks.mixtures import sft_mixture
from tasks.smoltalk import SmolTalk

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                    # name of the run; dummy = log to metrics.jsonl only
tracker: Tracker = "wandb"            # where a run with a name is also logged: trackers.py
device_type: str = ""                 # cuda, mps or cpu; empty = detect
seed: int = 42                        # of the data order
# Model
source: Literal["mid", "base"] = "mid"  # stage to start from
model_tag: str | None = None          # its tag, and the result's; None = the one saved last
model_step: int | None = None         # its step; None = the last
# Data: your own conversations, and sizes of the mixture's parts
data: str | None = None               # file of conversations to add, tasks/customjson.py
smoltalk_size: Count = 10000          # SmolTalk conversations
identity_epochs: Count = 1            # how often the mixture repeats the identity conversations
spelling_size: Count = 300            # SimpleSpelling words
spellingbee_size: Count = 300         # SpellingBee questions
# Horizon
num_epochs: Positive = 1              # passes over the mixture
num_iterations: CountOrOff = -1       # optimizer steps; -1 = num_epochs
examples_per_step: Positive = 32      # conversations per optimizer step over all ranks
# Optimization
device_batch_size: CountOrOff = -1    # rows per micro-batch; -1 = as many as should fit
embedding_lr: NonNegative = 0.2       # Adam, token embedding; scaled by 1 / sqrt(width / 768)
unembedding_lr: NonNegative = 0.004   # Adam, output head; scaled likewise
value_lr: NonNegative = 0.1           # Adam, value embeddings; scaled likewise
matrix_lr: NonNegative = 0.02         # Muon, all matrices of the blocks
init_lr_frac: NonNegative = 0.02      # all learning rates start at this fraction, fall to 0
# Evaluation and checkpoints
eval_every: CountOrOff = 100          # steps between validation losses; -1 = at the end only
eval_examples: CountOrOff = 256       # held-out conversations to score; -1 = all
save_every: CountOrOff = 500          # steps between checkpoints, besides those at evaluations
keep_last: CountOrOff = 2             # newest checkpoints to keep; -1 = all
resume_from_step: int = -1            # step to go on from; -2 = the latest, -1 = new run
auto_resume: bool = False             # go on from the latest checkpoint, if there is one
verify: bool = True                   # compare checkpoints with their checksums when they are read

# Settings that a resumed run cannot change
FIXED = ("seed", "examples_per_step")

# -----------------------------------------------------------------------------


def held_out_batches(dataset, stage, device_rows):
    """
    Yield (inputs, targets, numbers) of this rank's share of the held-out conversations: int64 (B, T)
    on the device, and the number of each row's conversation, int (B, 1).
    """
    num_examples = len(dataset) if eval_examples < 0 else min(eval_examples, len(dataset))
    indices = range(num_examples)[stage.rank::stage.world_size]
    max_len = stage.model.config.sequence_len
    for start in show_progress(range(0, len(indices), device_rows), "evaluating", "batches"):
        batch = indices[start: start + device_rows]
        inputs, targets, _ = conversation_rows(dataset, batch, stage.tokenizer, max_len)
        numbers = np.array(batch)[:, None]
        yield to_device(inputs, stage.device), to_device(targets, stage.device), numbers


def main():
    # Device, ranks, the model to start from, or this stage's own checkpoint to resume
    settings = get_settings(globals())
    manager, source_manager = stage_managers(
        "sft", source, model_tag, resume_from_step, auto_resume)
    progress = {"val_loss": None, "used": 0, "cut": 0, "targets": 0}
    stage = open_stage(settings, manager, source_manager, FIXED, progress)
    model = stage.model
    progress = stage.progress
    max_seq_len = model.config.sequence_len

    # Data and horizon
    mixture = sft_mixture(smoltalk_size, identity_epochs, spelling_size, spellingbee_size, data)
    held_out = SmolTalk("test")
    iterations, run_examples = count_examples(
        num_iterations, num_epochs, examples_per_step, len(mixture))
    most_rows = ceil_div(examples_per_step, stage.world_size)
    device_rows = choose_device_batch_size(device_batch_size, model.config, stage.device, most_rows)
    print0(f"mixture: {len(mixture):,} conversations | {examples_per_step} per step, "
           f"{device_rows} at a time on each of {stage.world_size} ranks | steps: {iterations:,}")

    # Optimizers
    optimizers = model.setup_optimizers(embedding_lr, unembedding_lr, matrix_lr, value_lr=value_lr)
    scaler = stage.load_optimizers(optimizers)

    # Loop: save, evaluate, train
    keeper = RunKeeper(stage, iterations, f"{len(mixture):,} conversations")
    step = stage.step
    while True:
        last = step == iterations
        eval_due = last or is_due(step, eval_every)

        # Save first: whatever fails later, the steps so far are on disk
        keeper.save_if_due(step, eval_due)
        if keeper.stopping:
            break

        # Evaluate: the loss on held-out conversations
        if eval_due:
            batches = held_out_batches(held_out, stage, device_rows)
            val_loss = attempt("the evaluation", partial(evaluate_loss, model, batches))
            if val_loss is not None:
                progress["val_loss"] = val_loss
                keeper.log_evaluation(step, {"val/loss": val_loss})
        if last:
            break

        # Train: one optimizer step on this step's conversations
        keeper.start_step()
        lr_factor = init_lr_frac * lr_multiplier(step, iterations, warmup_iters=0, warmdown_ratio=1.0)
        set_rates(optimizers, lr_factor)
        places = step_places(step, examples_per_step, run_examples)
        indices = shuffled_indices(places, len(mixture), seed)
        inputs, targets, num_cut = conversation_rows(mixture, indices, stage.tokenizer, max_seq_len)
        num_targets = int((targets != IGNORE).sum())
        # The rows are sorted by length: taking turns gives each rank short and long ones
        mine = slice(stage.rank, None, stage.world_size)
        loss, device_rows = accumulate_gradients(
            model, inputs[mine], targets[mine], num_targets, device_rows, scaler=scaler)
        loss = keeper.check_finite(loss, step, f"conversation {step * examples_per_step} and after")
        grad_norm = optimizer_step(model, optimizers, scaler)

        # Log
        step += 1
        progress["used"] += len(inputs)
        progress["cut"] += num_cut
        progress["targets"] += num_targets
        epoch = step * examples_per_step // len(mixture)
        keeper.finish_step(
            step, loss, count_used(targets), lr_factor, grad_norm, epoch=epoch,
            num_targets=num_targets)

    # Report and cleanup
    print0(f"conversations used: {progress['used']:,} | "
           f"cut to {max_seq_len} tokens: {progress['cut']:,} | "
           f"target tokens: {progress['targets']:,}")
    keeper.finish("Chat SFT", {
        "metrics": {"loss of conversations": progress["val_loss"]},
        "conversations": progress["used"],
        "conversations cut to the context": progress["cut"],
        "target tokens": progress["targets"],
        "steps": step,
    })


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
