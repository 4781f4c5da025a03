"""
Supervised finetuning: one conversation a row, and only what the assistant itself says is a target.

    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft
    python -m scripts.chat_sft --num_iterations=20 --examples_per_step=4           (a CPU, to try)

The loss of a step is the sum over its target tokens divided by their number over all ranks, so neither micro-batches
nor ranks weigh a token differently. Conversations longer than the context are cut to it and counted.
"""

import time

import numpy as np

from nanochat.checkpoint_manager import stage_managers
from nanochat.common import (
    IGNORE,
    UserError,
    ceil_div,
    compute_cleanup,
    compute_init,
    get_peak_flops,
    peak_memory_bytes,
    print0,
    run_script,
    synchronize,
)
from nanochat.configurator import get_settings, override_from_cli
from nanochat.dataloader import conversation_rows, count_used, to_device
from nanochat.loss_eval import evaluate_loss
from nanochat.precision import describe_precision, get_precision_dtype
from nanochat.report import get_report
from nanochat.training import (
    Ema,
    RunKeeper,
    accumulate_gradients,
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
from tasks.mixtures import sft_mixture
from tasks.smoltalk import SmolTalk

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                   # wandb run name; dummy = log to metrics.jsonl only
device_type: str = ""                # cuda, mps or cpu; empty = detect
seed: int = 42                       # of the data order
# Model
source: str = "mid"                  # stage to start from: mid or base
model_tag: str | None = None         # its tag, and the result's; None = the one saved last
model_step: int | None = None        # its step; None = the last
# Data: your own conversations, and sizes of the mixture's parts
data: str | None = None              # JSONL file whose conversations join the mixture (see tasks/customjson.py)
smoltalk_size: int = 10000           # SmolTalk conversations
identity_epochs: int = 1             # how often the mixture repeats the identity conversations
spelling_size: int = 300             # SimpleSpelling words
spellingbee_size: int = 300          # SpellingBee questions
chain_size: int = 0                  # conversations that join several of the others, for a model that saw few long ones
# Horizon
num_epochs: int = 1                  # passes over the mixture
num_iterations: int = -1             # optimizer steps; -1 = num_epochs
examples_per_step: int = 32          # conversations per optimizer step over all ranks
# Optimization
device_batch_size: int = -1          # rows per micro-batch, more if they are short; -1 = what the memory holds
embedding_lr: float = 0.2            # Adam, token embedding; scaled by 1 / sqrt(width / 768)
unembedding_lr: float = 0.004        # Adam, output head; scaled likewise
matrix_lr: float = 0.02              # Muon, all matrices of the blocks
init_lr_frac: float = 0.02           # all learning rates start at this fraction and fall linearly to 0
# Evaluation and checkpoints
eval_every: int = 100                # steps between validation losses; -1 = at the end only
eval_examples: int = 256             # held-out conversations to score; -1 = all
save_every: int = 500                # steps between checkpoints (one is also saved before every evaluation)
keep_last: int = 2                   # newest checkpoints to keep; -1 = all
resume_from_step: int = -1           # step to go on from; -2 = the latest checkpoint, -1 = start anew


# -----------------------------------------------------------------------------


def step_indices(step, num_examples):
    """Which conversations step `step` trains on: its part of one shuffled pass after another."""
    first = step * examples_per_step
    end = first + examples_per_step
    if num_iterations <= 0:
        end = min(end, num_epochs * num_examples)  # the last step of the last pass may be short
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(num_examples)
              for epoch in range(first // num_examples, (end - 1) // num_examples + 1)}
    return [int(orders[place // num_examples][place % num_examples]) for place in range(first, end)]


def held_out_loss(model, dataset, tokenizer, ddp_rank, ddp_world_size, device_rows):
    """Mean loss in nats over the assistant's tokens of held-out conversations; ranks share them. Collective."""
    num_examples = len(dataset) if eval_examples < 0 else min(eval_examples, len(dataset))
    indices = range(num_examples)[ddp_rank::ddp_world_size]

    def batches():
        for start in range(0, len(indices), device_rows):
            inputs, targets, _ = conversation_rows(dataset, indices[start: start + device_rows], tokenizer,
                                                   model.config.sequence_len)
            yield to_device(inputs, model.device), to_device(targets, model.device)

    return evaluate_loss(model, batches())


def main():
    # Init: device, ranks, the model to start from, or this stage's own checkpoint to resume
    settings = get_settings(globals())
    check_settings(settings)
    ddp_rank, _, ddp_world_size, device = compute_init(device_type, seed)
    print0(f"device: {device} x {ddp_world_size} | precision: {describe_precision(device.type)}")
    if source not in ("mid", "base"):
        raise UserError(f"--source={source}: need mid or base", "--source=mid")
    manager, source_manager = stage_managers("sft", source, model_tag, resume_from_step)
    step, state = resume_step(manager, resume_from_step, settings, ("seed", "examples_per_step"))
    begin, begin_step = (manager, step) if state else (source_manager, source_manager.load_meta(model_step)[0])
    tokenizer, model = begin.load_tokenizer(begin_step), begin.load_model(device, begin_step)
    max_seq_len, flops_per_token = model.config.sequence_len, model.estimate_flops()

    # Data and horizon
    mixture = sft_mixture(smoltalk_size, identity_epochs, spelling_size, spellingbee_size, chain_size, data)
    held_out = SmolTalk("test")
    iterations = num_iterations if num_iterations > 0 else ceil_div(len(mixture) * num_epochs, examples_per_step)
    most_rows = ceil_div(examples_per_step, ddp_world_size)
    device_rows = choose_device_batch_size(device_batch_size, model.config, device, most_rows)
    print0(f"model: {manager.checkpoint_dir.name}, {'sft' if state else source} step {begin_step} | "
           f"mixture: {len(mixture):,} conversations | {examples_per_step} per step, {device_rows} at a time on each "
           f"of {ddp_world_size} ranks | steps: {iterations:,}")

    # Optimizers
    optimizers = model.setup_optimizers(embedding_lr, unembedding_lr, matrix_lr)
    scaler = make_scaler(device, state)
    if state is not None:
        manager.load_optimizers(optimizers, step)

    # State of the loop
    peak_flops, _ = get_peak_flops(device, get_precision_dtype(device.type))
    progress = (state or {}).get("progress", {"train_s": 0.0, "val_loss": None, "used": 0, "cut": 0, "targets": 0})
    smooth_loss = Ema(*(state or {}).get("smooth_loss", ()))
    keeper = RunKeeper(manager, settings, iterations, step, state, f"{len(mixture):,} conversations", device)

    def evaluate():
        return held_out_loss(model, held_out, tokenizer, ddp_rank, ddp_world_size, device_rows)

    # Loop: save, evaluate, train
    while True:
        last = step == iterations
        eval_due = last or (eval_every > 0 and step % eval_every == 0)
        # Save first: whatever fails later, the steps so far are on disk
        if keeper.save_due(step, eval_due):
            keeper.save(step, model, optimizers, tokenizer, scaler, progress=progress, smooth_loss=smooth_loss.state())
        if keeper.stopping:
            break

        # Evaluate: the loss on held-out conversations
        if eval_due:
            val_loss = attempt("the evaluation", evaluate)
            if val_loss is not None:
                progress["val_loss"] = val_loss
                print0(f"step: {step:05d} | val loss: {val_loss:.6f} | train time: {progress['train_s'] / 60:.2f}m")
                keeper.log({"step": step, "val/loss": val_loss, "train_s": progress["train_s"]})
        if last:
            break

        # Train: one optimizer step on this step's conversations
        synchronize(device)
        start = time.perf_counter()
        lr_factor = init_lr_frac * lr_multiplier(step, iterations, 0, 1.0)
        set_rates(optimizers, lr_factor)
        inputs, targets, num_cut = conversation_rows(mixture, step_indices(step, len(mixture)), tokenizer, max_seq_len)
        num_targets, num_tokens = int((targets != IGNORE).sum()), count_used(targets)
        mine = slice(ddp_rank, None, ddp_world_size)  # dealt out, for the rows are sorted by length
        loss, device_rows = accumulate_gradients(model, inputs[mine], targets[mine], num_targets, device_rows,
                                                 scaler=scaler)
        loss = check_finite(loss, step, f"conversation {step * examples_per_step} and after", manager)
        grad_norm = optimizer_step(model, optimizers, scaler)
        synchronize(device)
        dt_s = time.perf_counter() - start

        # Log
        step += 1
        progress["train_s"] += dt_s
        for name, count in (("used", len(inputs)), ("cut", num_cut), ("targets", num_targets)):
            progress[name] += count
        metrics, line = step_line(
            step, iterations, loss, lr_factor, dt_s, num_tokens,
            flops_per_s=flops_per_token * num_tokens / dt_s / ddp_world_size, peak_flops=peak_flops,
            eta_s=progress["train_s"] / step * (iterations - step), smooth_loss=smooth_loss.update(loss),
            grad_norm=grad_norm, memory_bytes=peak_memory_bytes(device), num_targets=num_targets)
        keeper.log(metrics)
        print0(line)

    # Summary and cleanup
    print0(f"conversations used: {progress['used']:,} | cut to {max_seq_len} tokens: {progress['cut']:,} | "
           f"target tokens: {progress['targets']:,} | train time: {progress['train_s'] / 60:.2f}m")
    get_report().log("Chat SFT", {
        "config": settings, "curves": str(manager.checkpoint_dir / "metrics.jsonl"),
        "metrics": {"loss of conversations": progress["val_loss"]}, "conversations": progress["used"],
        "conversations cut to the context": progress["cut"], "target tokens": progress["targets"], "steps": step,
        "training minutes": progress["train_s"] / 60})
    compute_cleanup()
    keeper.close()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
