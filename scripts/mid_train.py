"""
Midtraining: teach a base model the chat format, tool use and multiple choice, as more pretraining
on conversations.

    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train
    python -m scripts.mid_train --num_iterations=20 --total_batch_size=2048 --eval_tokens=2048  (a CPU)

Conversations are packed into full rows like documents, and every token is a target, the user's too.
The run is one pass over the mixture (or num_iterations steps): its tokens are counted beforehand,
so progress and end are known.
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
    eval_batches,
    packed_conversations,
    rendered_conversations,
    shift,
)
from nanochat.distributed import all_reduce_sum, rank_slice
from nanochat.horizon import align_batch_size, choose_device_batch_size
from nanochat.loss_eval import evaluate_bpb
from nanochat.packing import pack_documents
from nanochat.progress import show_progress
from nanochat.run_keeper import RunKeeper, attempt, is_due
from nanochat.stage import open_stage
from nanochat.tokenizer import get_token_bytes
from nanochat.trackers import Tracker
from nanochat.training import accumulate_gradients, lr_multiplier, optimizer_step, set_rates
from tasks.mixtures import mid_mixture
from tasks.smoltalk import SmolTalk

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                    # name of the run; dummy = log to metrics.jsonl only
tracker: Tracker = "wandb"            # where a run with a name is also logged: trackers.py
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
FIXED = ("seed",)

# -----------------------------------------------------------------------------


def count_tokens(mixture, stage):
    """
    Tokens of one pass over the mixture, counted by rendering it; ranks share the work. Collective.
    """
    mine = range(stage.rank, len(mixture), stage.world_size)
    rendered = rendered_conversations(mixture, mine, stage.tokenizer)
    rendered = show_progress(rendered, "counting tokens", "conversations", total=len(mine))
    count = sum(len(ids) for _, ids in rendered)
    return int(all_reduce_sum(torch.tensor(count, device=stage.device)))


# -----------------------------------------------------------------------------


def main():  # noqa: PLR0915
    # Device, ranks, the base model, or this stage's own checkpoint to resume
    settings = get_settings(globals())
    manager, base_manager = stage_managers(
        "mid", "base", model_tag, resume_from_step, auto_resume)
    stage = open_stage(settings, manager, base_manager, FIXED, {"val_bpb": None})
    model = stage.model
    progress = stage.progress
    token_bytes = get_token_bytes(stage.device, stage.tokenizer)
    max_seq_len = model.config.sequence_len
    if compiles(stage.device, compile):
        model.compile()

    # Data: the mixture, packed into rows, and held-out conversations
    mixture = mid_mixture(identity_epochs, spelling_size, spellingbee_size, data)
    loader = packed_conversations(
        mixture, stage.tokenizer, max_seq_len, seed, stage.state.get("loader"))
    val_documents = conversation_documents(SmolTalk("test"), stage.tokenizer, epochs=1)
    bos = stage.tokenizer.get_bos_token_id()
    val_rows = pack_documents(val_documents, bos, max_seq_len, eval_tokens)
    my_val_rows = val_rows[stage.rank::stage.world_size]

    # Horizon and batch
    batch_tokens = align_batch_size(total_batch_size, max_seq_len)
    iterations = num_iterations
    if num_iterations <= 0:
        iterations = max(1, count_tokens(mixture, stage) // batch_tokens)
    rows_per_step = batch_tokens // max_seq_len
    my_rows = rank_slice(rows_per_step, stage.rank, stage.world_size)
    most_rows = ceil_div(rows_per_step, stage.world_size)
    device_rows = choose_device_batch_size(device_batch_size, model.config, stage.device, most_rows)
    print0(f"mixture: {len(mixture):,} conversations | batch: {rows_per_step} rows, "
           f"{device_rows} at a time on each of {stage.world_size} ranks | steps: {iterations:,}")

    # Optimizers
    optimizers = model.setup_optimizers(
        embedding_lr, unembedding_lr, matrix_lr, compile=compile, value_lr=value_lr)
    scaler = stage.load_optimizers(optimizers)

    # Loop: save, evaluate, train
    keeper = RunKeeper(stage, iterations, f"{len(mixture):,} conversations")
    step = stage.step
    while True:
        last = step == iterations
        eval_due = last or is_due(step, eval_every)

        # Save first: whatever fails later, the steps so far are on disk
        keeper.save_if_due(step, eval_due, loader=loader.state())
        if keeper.stopping:
            break

        # Evaluate: bits per byte of held-out conversations
        if eval_due:
            batches = eval_batches(my_val_rows, device_rows, stage.device)
            val_bpb = attempt("the evaluation", partial(evaluate_bpb, model, batches, token_bytes))
            if val_bpb is not None:
                progress["val_bpb"] = val_bpb._asdict()
                keeper.log_evaluation(step, val_bpb.as_metrics("val/bpb"))
        if last:
            break

        # Train: one optimizer step on this step's rows
        keeper.start_step()
        lr_factor = init_lr_frac * lr_multiplier(
            step, iterations, warmup_iters=0, warmdown_ratio=warmdown_ratio)
        set_rates(optimizers, lr_factor)
        inputs, targets = shift(loader.next_rows(rows_per_step))
        num_targets = max(1, int((targets != IGNORE).sum()))  # without turns of weight 0
        loss, device_rows = accumulate_gradients(
            model, inputs[my_rows], targets[my_rows], num_targets, device_rows, scaler=scaler)
        loss = keeper.check_finite(loss, step, f"the mixture, {loader.state()}")
        grad_norm = optimizer_step(model, optimizers, scaler)

        # Log
        step += 1
        epoch = loader.state()["epoch"]
        keeper.finish_step(
            step, loss, batch_tokens, lr_factor, grad_norm, epoch=epoch, num_targets=num_targets)

    # Report and cleanup
    loader.close()
    keeper.finish("Midtraining", {
        "metrics": {"bpb of conversations": progress["val_bpb"]},
        "conversations": len(mixture),
        "steps": step,
        "tokens": progress["tokens"],
    })


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
