"""
Pretrain a base model on raw text.

    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20     (8 GPUs)
    python -m scripts.base_train --depth=12                                          (one GPU)
    python -m scripts.base_train --data=my_texts/ --minutes=20                       (any machine)
    python -m scripts.base_train --depth=4 --max_seq_len=512 --num_iterations=1000   (a CPU)

Smallest run, to see that it works:

    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=1 \
        --eval_tokens=512 --total_batch_size=512 --num_iterations=20

A step's rows depend on the seed and the step alone, for any number of processes and any
micro-batch. With as many processes as before, `--resume_from_step` goes on with exactly the losses
of an unbroken run. With another number rounding parts the two, as any last bit that differs does:
see dev/log/2026-11-30-interrupted.md.

With `--minutes` the size of the model and the batch follow from the time and the speed of the
machine, and the run ends on time with a learning rate of 0: time_limit.py. Evaluations, checkpoints
and samples are part of the time.
"""

import time
from functools import partial

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError, ceil_div, compiles, print0, run_script
from nanochat.configurator import (
    Count,
    CountOrOff,
    Fraction,
    NonNegative,
    NonNegativeOrOff,
    Positive,
    get_settings,
    override_from_cli,
)
from nanochat.dataloader import describe_position, eval_batches, eval_rows, shift, training_rows
from nanochat.dataset import describe_skipped, describe_spans, get_both_spans, total_rows
from nanochat.distributed import from_rank0, rank_slice
from nanochat.engine import Engine, complete_prompts
from nanochat.fp8 import use_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.head_start import choose_head_start, start_from_counts
from nanochat.horizon import check_warmup, choose_device_batch_size, derive_horizon
from nanochat.loss_eval import evaluate_bpb
from nanochat.precision import get_precision
from nanochat.run_keeper import RunKeeper, attempt, is_due
from nanochat.stage import open_stage
from nanochat.time_limit import (
    MIN_TIMED,
    TimeLimit,
    choose_crop,
    choose_evaluations,
    choose_sizes,
)
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.trackers import Tracker
from nanochat.training import accumulate_gradients, lr_multiplier, optimizer_step, set_rates

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                    # name of the run; dummy = log to metrics.jsonl only
tracker: Tracker = "wandb"            # where a run with a name is also logged: trackers.py
device_type: str = ""                 # cuda, mps or cpu; empty = detect
seed: int = 42                        # of initialisation and data order
# Data
data: str | None = None               # file, folder or glob of text; None = the default corpus
text_field: str = "text"              # column or field of the text, in .parquet and .jsonl
strict: bool = False                  # refuse rows without text before the run; False = skip them
crop: bool | None = None              # one row of each long document per epoch; None = False or by --minutes
# Model
depth: Positive | None = None         # layers; width = 64 * depth; None = 20 or by --minutes
max_seq_len: Positive | None = None   # context length T in tokens; None = 2048 or by --minutes
head_dim: Positive = 128              # size of an attention head
value_embeds: bool = False            # a table of values per layer: for little text
head_start: bool | None = None        # fit bigram counts first; None = in short runs: head_start.py
# Horizon: one of these four decides
minutes: NonNegative | None = None    # time of the whole run, evaluations included: time_limit.py
num_iterations: CountOrOff = -1       # optimizer steps; decides if it is > 0
target_flops: NonNegativeOrOff = -1.0  # total FLOPs; decides if > 0 and num_iterations is not
target_param_data_ratio: NonNegativeOrOff = 20.0  # tokens per parameter; decides otherwise
# Optimization: Adam for the embeddings and the output head, Muon for the matrices of the blocks
device_batch_size: CountOrOff = -1    # rows per micro-batch; -1 = as many as should fit
total_batch_size: CountOrOff = -1     # tokens per step over all ranks; -1 = derived
embedding_lr: NonNegative | None = None  # None = 0.3, after a head start 0.01; x sqrt(768 / width)
unembedding_lr: NonNegative | None = None  # None = 0.004, after a head start 0.0003; likewise
value_lr: NonNegative = 0.1           # of the value embeddings; scaled likewise
matrix_lr: NonNegative = 0.02         # of Muon
weight_decay: NonNegative = 0.2       # of Muon; x (12 / depth)^2, falls linearly to 0
warmup_iters: Count = 10              # steps of linear learning rate warmup
warmdown_ratio: Fraction = 0.5        # last part of the run, in which the learning rate falls
final_lr_frac: Fraction = 0.0         # learning rate at the end, as a fraction
# Evaluation, samples, checkpoints
eval_every: CountOrOff | None = None  # steps between validation losses; -1 = at the end; None = 250 or by --minutes
eval_tokens: CountOrOff | None = None  # of the validation set to score; -1 = all; None = 10485760 or by --minutes
sample_every: CountOrOff = 2000       # steps between samples; -1 = at the end only
save_every: CountOrOff = 1000         # steps between checkpoints, besides those at evaluations
keep_last: CountOrOff = 2             # newest checkpoints to keep; -1 = all
resume_from_step: int = -1            # step to go on from; -2 = the latest, -1 = new run
auto_resume: bool = False             # go on from the latest checkpoint, if there is one
verify: bool = True                   # compare checkpoints with their checksums when they are read
model_tag: str | None = None          # folder of the checkpoints; None = d<depth> or minutes<N>
compile: bool | None = None           # torch.compile on a GPU; None = if Triton is there

# What None stands for in a new run without --minutes. These five get their values in main's dict
# `settings`, and are read there; the others are read as globals
DEFAULTS = {
    "crop": False,
    "depth": 20,
    "max_seq_len": 2048,
    "eval_every": 250,
    "eval_tokens": 10485760,
}
GUESSED_DEPTH = 4  # for the speed of the device, before --minutes has chosen one

# Settings that a resumed run cannot change
FIXED = ("seed", "crop", "depth", "max_seq_len", "head_dim", "value_embeds")

# Default learning rates of embedding and output head. A head start has already fitted both: rates
# as high as the usual ones would undo it
DEFAULT_LRS = {"embedding_lr": 0.3, "unembedding_lr": 0.004}
HEAD_START_LRS = {"embedding_lr": 0.01, "unembedding_lr": 0.0003}

# -----------------------------------------------------------------------------


def muon_momentum(step):
    """
    Rises from 0.85 to 0.95 over the first 300 steps: early gradients change direction too fast to
    be averaged over many steps.
    """
    return 0.85 + 0.10 * min(step / 300, 1)


def check_horizon():
    """Refuse two settings that both say how long the run is."""
    if minutes is None:
        return
    for name, value in (("num_iterations", num_iterations), ("target_flops", target_flops)):
        if value > 0:
            raise UserError(f"--minutes={minutes:g} and --{name}={value:g} contradict each other",
                            "leave one of them out")


def choose_tag():
    """The folder of the checkpoints, which a resumed run must find before it knows its depth."""
    if model_tag is not None:
        return model_tag
    if minutes is not None and depth is None:
        return f"minutes{minutes:g}"
    return f"d{depth or DEFAULTS['depth']}"


def fill_in(settings, values):
    """Give settings that are None their value of `values`."""
    for name, value in values.items():
        if settings[name] is None:
            settings[name] = value


def choose_horizon(stage, flops):
    """
    (optimizer steps, tokens per step, the setting that decided). flops: what a new run can compute
    in its --minutes.
    """
    if minutes is None:
        return derive_horizon(
            num_iterations, target_flops, target_param_data_ratio, total_batch_size, stage.model)

    # A resumed run has the steps that it decided on last
    if stage.state:
        if "batch_tokens" not in stage.state:  # saved by an earlier version
            raise UserError(f"step {stage.step} does not say the batch of its run, which --minutes needs",
                            "resume with --num_iterations instead")
        return stage.state["iterations"], stage.state["batch_tokens"], "--minutes"

    # A new run begins with a guess, of enough steps to find a better number
    iterations, batch_tokens, _ = derive_horizon(-1, flops, -1, total_batch_size, stage.model)
    return max(2 * MIN_TIMED, iterations), batch_tokens, "--minutes"


def choose_lrs(after_head_start):
    """{setting: learning rate} of embedding and output head: as set, else their defaults."""
    lrs = {"embedding_lr": embedding_lr, "unembedding_lr": unembedding_lr}
    fill_in(lrs, HEAD_START_LRS if after_head_start else DEFAULT_LRS)
    return lrs


def main():  # noqa: C901, PLR0912, PLR0915
    # Device, ranks, precision, and the checkpoint to resume, if any
    start = time.monotonic()
    settings = get_settings(globals())
    check_horizon()
    manager = CheckpointManager(get_checkpoint_dir("base", choose_tag()))
    progress = {"val_bpb": None, "min_val_bpb": None, "head_start": False, "spent_s": 0.0}
    # the device's speed is measured on matmuls of the model's width, as far as that is known yet
    guessed_depth = DEFAULTS["depth"] if minutes is None else GUESSED_DEPTH
    stage = open_stage(settings, manager, fixed=FIXED, chosen=tuple(DEFAULTS), progress=progress,
                       fp8=True, width=64 * (depth or guessed_depth))
    device = stage.device
    progress = stage.progress

    # With --minutes: the time that the run has, and the FLOPs that a new one can compute in it
    limit = None
    flops = None
    if minutes is not None:
        limit = TimeLimit(minutes, start - progress["spent_s"])
    if limit and not stage.state:
        flops = from_rank0(partial(limit.guess_flops, stage.peak_flops * stage.world_size))

    # Model and tokenizer: a resumed run has them in its checkpoint
    if not stage.state:
        stage.tokenizer = get_tokenizer()
        vocab_size = stage.tokenizer.get_vocab_size()
        sizes = choose_sizes(flops, vocab_size, depth, max_seq_len) if limit else DEFAULTS
        fill_in(settings, sizes)
        config = GPTConfig.from_depth(
            settings["depth"], vocab_size, settings["max_seq_len"], head_dim, value_embeds=value_embeds)
        stage.model = GPT.create(config, device)
    model = stage.model
    tokenizer = stage.tokenizer
    token_bytes = get_token_bytes(device, tokenizer)
    sequence_len = model.config.sequence_len
    num_params = model.num_params()
    flops_per_token = model.estimate_flops()
    print0(f"model: {model.config} | parameters: {num_params:,} | "
           f"FLOPs per token: {flops_per_token:.3e}")

    # Horizon and batch: every derived setting is printed
    iterations, batch_tokens, rule = choose_horizon(stage, flops)
    check_warmup(warmup_iters, iterations)
    run_tokens = iterations * batch_tokens
    rows_per_step = batch_tokens // sequence_len
    my_rows = rank_slice(rows_per_step, stage.rank, stage.world_size)
    most_rows = ceil_div(rows_per_step, stage.world_size)
    device_rows = choose_device_batch_size(device_batch_size, model.config, device, most_rows)
    print0(f"batch: {batch_tokens:,} tokens = {rows_per_step} rows of {sequence_len}, "
           f"{device_rows} at a time on each of {stage.world_size} ranks | "
           f"steps: {iterations:,} (from {rule}) | "
           f"tokens: {run_tokens:,} ({run_tokens / num_params:.1f} per parameter)")

    # Text for training and for validation
    spans, val_spans = get_both_spans(data, text_field, strict)
    if limit:
        fill_in(settings, choose_evaluations(iterations, batch_tokens))
        fill_in(settings, choose_crop(run_tokens, total_rows(spans), sequence_len))
        print0(f"one row of each long document per epoch (--crop): {settings['crop']}")

    # Head start of a new run: fit embedding and output head to bigram counts
    if not stage.state and choose_head_start(head_start, run_tokens, model.config.vocab_size):
        progress["head_start"] = True
        progress["train_s"] += start_from_counts(model, tokenizer, spans, seed)

    # Acceleration
    if get_precision(device.type) == "fp8":
        use_fp8(model)
    if compiles(device, compile):
        model.compile()

    # Optimizers
    adam_lrs = choose_lrs(progress["head_start"])
    decay = weight_decay * (12 / settings["depth"]) ** 2
    print0(f"learning rates: embedding {adam_lrs['embedding_lr']}, "
           f"head {adam_lrs['unembedding_lr']}, matrices {matrix_lr} | weight decay: {decay:.3g}")
    optimizers = model.setup_optimizers(
        **adam_lrs, matrix_lr=matrix_lr, value_lr=value_lr, compile=compile)
    scaler = stage.load_optimizers(optimizers)

    # Rows: for training from where the checkpoint stopped, for validation always the same
    loader = training_rows(tokenizer, spans, sequence_len, seed, stage.state.get("loader"), settings["crop"])
    val_rows = eval_rows(tokenizer, val_spans, sequence_len, settings["eval_tokens"])
    my_val_rows = val_rows[stage.rank::stage.world_size]

    # Loop: save, evaluate, sample, train
    keeper = RunKeeper(stage, iterations, describe_spans(spans))
    step = stage.step
    samples = []
    while True:
        # With --minutes the number of steps follows from the time left
        if limit and limit.decision_due(step, iterations):
            decide = partial(
                limit.decide, step, batch_tokens, settings["eval_tokens"], settings["eval_every"])
            iterations = from_rank0(decide)
            keeper.iterations = iterations
        last = step == iterations
        eval_due = last or is_due(step, settings["eval_every"])
        sample_due = last or (step > 0 and is_due(step, sample_every))

        # Save first: whatever fails later, the steps so far are on disk
        if limit:
            progress["spent_s"] = limit.spent_s()
        keeper.save_if_due(step, eval_due, loader=loader.state(), batch_tokens=batch_tokens)
        if keeper.stopping:
            break

        # Evaluate: bits per byte on the fixed validation rows
        if eval_due:
            batches = eval_batches(my_val_rows, device_rows, device)
            val_bpb = attempt("the evaluation", partial(evaluate_bpb, model, batches, token_bytes))
            if val_bpb is not None:
                progress["val_bpb"] = val_bpb._asdict()
                progress["min_val_bpb"] = min(val_bpb.value, progress["min_val_bpb"] or val_bpb.value)
                keeper.log_evaluation(step, val_bpb.as_metrics("val/bpb"))

        # Sample, on rank 0
        if sample_due and stage.rank == 0:
            engine = Engine(model, tokenizer)
            samples = attempt("sampling", partial(complete_prompts, engine)) or samples
            keeper.log_samples(step, samples)
        if last:
            break

        # Train: one optimizer step on this step's rows
        keeper.start_step()
        lr_factor = lr_multiplier(step, iterations, warmup_iters, warmdown_ratio, final_lr_frac)
        step_decay = decay * (1 - step / iterations)
        set_rates(optimizers, lr_factor, momentum=muon_momentum(step), weight_decay=step_decay)
        inputs, targets = shift(loader.next_rows(rows_per_step)[my_rows])
        loss, device_rows = accumulate_gradients(
            model, inputs, targets, batch_tokens, device_rows, scaler=scaler)
        loss = keeper.check_finite(loss, step, describe_position(loader.state(), spans, seed))
        grad_norm = optimizer_step(model, optimizers, scaler)

        # Log
        step += 1
        epoch = loader.state()["epoch"]
        step_s = keeper.finish_step(
            step, loss, batch_tokens, lr_factor, grad_norm, epoch=epoch, num_targets=batch_tokens)
        if limit:
            limit.add_step(step_s)

    # Report and cleanup
    loader.close()
    rows_without_text = describe_skipped(spans + val_spans)
    print0(f"rows without text: {rows_without_text}")
    if limit:
        print0(f"time: {limit.spent_s() / 60:.2f} of {minutes:g} minutes")
    keeper.finish("Base model training", {
        "samples": samples,
        "metrics": {"bpb": progress["val_bpb"]},
        "parameters": num_params,
        "FLOPs per token": flops_per_token,
        "tokens": progress["tokens"],
        "tokens per step": batch_tokens,
        "steps": step,
        "head start": progress["head_start"],
        "training FLOPs": flops_per_token * progress["tokens"],
        "rows without text": rows_without_text,
        "minimum validation bpb": progress["min_val_bpb"],
    })


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
