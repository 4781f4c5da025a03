"""
Pretrain a base model on raw text.

    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20      (one node of 8 GPUs)
    python -m scripts.base_train --depth=12                                           (one GPU)
    python -m scripts.base_train --depth=4 --max_seq_len=512 --num_iterations=1000    (a CPU)

Smallest run, to see that it works:

    python -m scripts.base_train --depth=4 --max_seq_len=512 --device_batch_size=1 --eval_tokens=512 \
        --total_batch_size=512 --num_iterations=20

A step's rows depend on the seed and the step alone: any number of processes and any micro-batch give the same run,
and `--resume_from_step` goes on with exactly the losses of an unbroken one.
"""

import time
from functools import partial

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
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
from nanochat.dataloader import describe_position, eval_batches, eval_rows, shift, training_rows
from nanochat.dataset import describe_spans, get_spans
from nanochat.distributed import rank_slice
from nanochat.engine import Engine, complete_prompts
from nanochat.fp8 import use_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.head_start import pays, start_from_counts
from nanochat.loss_eval import evaluate_bpb
from nanochat.precision import describe_precision, get_precision, get_precision_dtype
from nanochat.report import get_report
from nanochat.tokenizer import get_token_bytes, get_tokenizer
from nanochat.training import (
    Ema,
    RunKeeper,
    accumulate_gradients,
    attempt,
    check_finite,
    check_settings,
    choose_device_batch_size,
    derive_horizon,
    lr_multiplier,
    make_scaler,
    optimizer_step,
    resume_step,
    set_rates,
    step_line,
)

# -----------------------------------------------------------------------------
# Settings
run: str = "dummy"                       # wandb run name; dummy = log to metrics.jsonl only
device_type: str = ""                    # cuda, mps or cpu; empty = detect
seed: int = 42                           # of initialisation and data order
# Data
data: str | None = None                  # file, folder or glob of .parquet, .jsonl, .txt; None = the default corpus
crop: bool = False                       # one row of each long document per epoch: for a short run on long documents
# Model
depth: int = 20                          # layers; width = 64 * depth and everything else follows
max_seq_len: int = 2048                  # context length T in tokens
head_dim: int = 128                      # size of an attention head; a tiny model wants more and smaller ones
value_embeds: bool = False               # a table of values a layer: learns more from little text, but no export_hf
head_start: bool | None = None           # count what follows what first (nanochat/head_start.py); None = where it pays
# Horizon: the first that is > 0 decides
num_iterations: int = -1                 # optimizer steps
target_flops: float = -1.0               # total training FLOPs
target_param_data_ratio: float = 20.0    # training tokens per parameter (Chinchilla: 20)
# Optimization
device_batch_size: int = -1              # rows per micro-batch; -1 = what the device's memory holds
total_batch_size: int = -1               # tokens per optimizer step over all ranks; -1 = derived from the horizon
embedding_lr: float | None = None        # Adam, embedding, x 1 / sqrt(width / 768); None = 0.3, 0.01 after a head start
unembedding_lr: float | None = None      # Adam, output head, scaled likewise; None = 0.004, 0.0003 after a head start
value_lr: float = 0.1                    # Adam, value embeddings, scaled likewise
matrix_lr: float = 0.02                  # Muon, all matrices of the blocks
weight_decay: float = 0.2                # Muon, at depth 12; scaled by 1 / width^2, falls linearly to 0
warmup_iters: int = 10                   # steps of linear learning rate warmup
warmdown_ratio: float = 0.5              # last part of the run in which the learning rate falls linearly
final_lr_frac: float = 0.0               # learning rate at the end, as a fraction
# Evaluation, samples, checkpoints
eval_every: int = 250                    # steps between validation losses; -1 = at the end only
eval_tokens: int = 10485760              # tokens of the fixed validation set to score; -1 = all of it
sample_every: int = 2000                 # steps between samples; -1 = at the end only
save_every: int = 1000                   # steps between checkpoints (one is also saved before every evaluation)
keep_last: int = 2                       # newest checkpoints to keep; -1 = all
resume_from_step: int = -1               # step to go on from; -2 = the latest checkpoint, -1 = start anew
model_tag: str | None = None             # folder of the checkpoints; None = d<depth>
compile: bool | None = None              # torch.compile on a GPU; None = if Triton is there

LEARNED_LRS, COUNTED_LRS = (0.3, 0.004), (0.01, 0.0003)  # embedding and head, without and after a head start
# settings that a resumed run cannot change
FIXED = ("seed", "crop", "depth", "max_seq_len", "head_dim", "value_embeds")

# -----------------------------------------------------------------------------


def muon_momentum(step):
    """Rises from 0.85 to 0.95 over the first 300 steps: early gradients turn too fast to be averaged for long."""
    return 0.85 + 0.10 * min(step / 300, 1)


def main():
    # Init: device, ranks, precision
    settings = get_settings(globals())
    check_settings(settings)
    ddp_rank, _, ddp_world_size, device = compute_init(device_type, seed)
    print0(f"device: {device} x {ddp_world_size} | precision: {describe_precision(device.type, fp8=True)}")

    # The peak that MFU is a fraction of: on a CPU it is measured, so before the loader's thread works beside it
    peak_flops, peak_source = get_peak_flops(device, get_precision_dtype(device.type))
    print0(f"peak of one device: {peak_flops:.3e} FLOP/s ({peak_source})")

    # Model and tokenizer: new, or both from the checkpoint to resume
    manager = CheckpointManager(get_checkpoint_dir("base", model_tag or f"d{depth}"))
    step, state = resume_step(manager, resume_from_step, settings, FIXED)
    if state is None:
        tokenizer = get_tokenizer()
        config = GPTConfig.from_depth(depth, tokenizer.get_vocab_size(), max_seq_len, head_dim,
                                      value_embeds=value_embeds)
        model = GPT.create(config, device)
    else:
        tokenizer, model = manager.load_tokenizer(step), manager.load_model(device, step)
    token_bytes = get_token_bytes(device, tokenizer)
    num_params, flops_per_token = model.num_params(), model.estimate_flops()
    print0(f"model: {model.config} | parameters: {num_params:,} | FLOPs per token: {flops_per_token:.3e}")

    # Horizon and batch: every derived setting is printed
    iterations, batch_tokens, rule = derive_horizon(num_iterations, target_flops, target_param_data_ratio,
                                                    total_batch_size, model)
    rows_per_step = batch_tokens // max_seq_len
    my_rows, most_rows = rank_slice(rows_per_step, ddp_rank, ddp_world_size), ceil_div(rows_per_step, ddp_world_size)
    device_rows = choose_device_batch_size(device_batch_size, model.config, device, most_rows)
    print0(f"batch: {batch_tokens:,} tokens = {rows_per_step} rows of {max_seq_len}, {device_rows} at a time on each "
           f"of {ddp_world_size} ranks | steps: {iterations:,} (from {rule}) | tokens: {iterations * batch_tokens:,} "
           f"({iterations * batch_tokens / num_params:.1f} per parameter)")

    # Head start: the next token given one, from counts
    spans = get_spans(data, "train")
    progress = {"train_s": 0.0, "tokens": 0, "val_bpb": None, "min_val_bpb": None} | (state or {}).get("progress", {})
    if state is None:
        worth_it = pays(iterations * batch_tokens, model.config.vocab_size)
        progress["head_start"] = worth_it if head_start is None else head_start
        if progress["head_start"]:
            progress["train_s"] += start_from_counts(model, tokenizer, spans, seed)
    if get_precision(device.type) == "fp8":
        use_fp8(model)
    if compiles(device, compile):
        model.compile()

    # Optimizers: a table that was counted is spoiled at the rates of one that has to be learned
    decay = weight_decay * (12 / depth) ** 2
    rates = COUNTED_LRS if progress.get("head_start") else LEARNED_LRS
    rates = [rate if lr is None else lr for lr, rate in zip((embedding_lr, unembedding_lr), rates, strict=True)]
    print0(f"learning rates: embedding {rates[0]}, head {rates[1]}, matrices {matrix_lr} | weight decay: {decay:.3g}")
    optimizers = model.setup_optimizers(*rates, matrix_lr, compile=compile, value_lr=value_lr)
    scaler = make_scaler(device, state)
    if state is not None:
        manager.load_optimizers(optimizers, step)

    # Data: training rows from where the checkpoint stopped, and the fixed validation rows
    loader = training_rows(tokenizer, spans, max_seq_len, seed, state and state["loader"], crop)
    val_rows = eval_rows(tokenizer, get_spans(data, "val"), max_seq_len, eval_tokens)
    my_val_rows = val_rows[ddp_rank::ddp_world_size]

    # State of the loop
    smooth_loss = Ema(*(state or {}).get("smooth_loss", ()))
    keeper = RunKeeper(manager, settings, iterations, step, state, describe_spans(spans), device)
    samples, timed_from = [], None

    # Loop: save, evaluate, sample, train
    while True:
        last = step == iterations
        eval_due = last or (eval_every > 0 and step % eval_every == 0)
        # Save first: whatever fails later, the steps so far are on disk
        if keeper.save_due(step, eval_due):
            keeper.save(step, model, optimizers, tokenizer, scaler,
                        loader=loader.state(), progress=progress, smooth_loss=smooth_loss.state())
        if keeper.stopping:
            break

        # Evaluate: bits per byte on the fixed validation rows
        if eval_due:
            batches = eval_batches(my_val_rows, device_rows, device)
            val_bpb = attempt("the evaluation", partial(evaluate_bpb, model, batches, token_bytes))
            if val_bpb is not None:
                progress["val_bpb"] = val_bpb
                progress["min_val_bpb"] = min(val_bpb, progress["min_val_bpb"] or val_bpb)
                print0(f"step: {step:05d} | val bpb: {val_bpb:.6f} | train time: {progress['train_s'] / 60:.2f}m")
                keeper.log({"step": step, "val/bpb": val_bpb, "train_s": progress["train_s"]})

        # Sample, on rank 0
        if ddp_rank == 0 and (last or (sample_every > 0 and step > 0 and step % sample_every == 0)):
            samples = attempt("sampling", lambda: complete_prompts(Engine(model, tokenizer))) or samples
            for sample in samples:
                print0(f"sample: {sample['text']!r}")
        if last:
            break

        # Train: one optimizer step on this step's rows
        synchronize(device)
        start = time.perf_counter()
        lr_factor = lr_multiplier(step, iterations, warmup_iters, warmdown_ratio, final_lr_frac)
        set_rates(optimizers, lr_factor, momentum=muon_momentum(step), weight_decay=decay * (1 - step / iterations))
        inputs, targets = shift(loader.next_rows(rows_per_step)[my_rows])
        loss, device_rows = accumulate_gradients(model, inputs, targets, batch_tokens, device_rows, scaler=scaler)
        loss = check_finite(loss, step, describe_position(loader.state(), spans, seed), manager)
        grad_norm = optimizer_step(model, optimizers, scaler)
        synchronize(device)
        dt_s = time.perf_counter() - start

        # Log
        step += 1
        progress["train_s"] += dt_s
        progress["tokens"] += batch_tokens
        timed_from = timed_from or (step, progress["train_s"])  # the first step compiles: leave it out of the ETA
        steps_timed = step - timed_from[0]
        mean_s = (progress["train_s"] - timed_from[1]) / steps_timed if steps_timed else dt_s
        metrics, line = step_line(
            step, iterations, loss, lr_factor, dt_s, batch_tokens,
            flops_per_s=flops_per_token * batch_tokens / dt_s / ddp_world_size, peak_flops=peak_flops,
            eta_s=mean_s * (iterations - step), smooth_loss=smooth_loss.update(loss), grad_norm=grad_norm,
            memory_bytes=peak_memory_bytes(device), epoch=loader.state()["epoch"], train_s=progress["train_s"])
        keeper.log(metrics)
        print0(line)

    # Summary and cleanup
    print0(f"peak memory: {peak_memory_bytes(device) / 2**20:,.0f} MiB | train time: {progress['train_s'] / 60:.2f}m | "
           f"min val bpb: {progress['min_val_bpb']}")
    get_report().log("Base model training", {
        "config": settings, "curves": str(manager.checkpoint_dir / "metrics.jsonl"), "samples": samples,
        "metrics": {"bpb": progress["val_bpb"]}, "parameters": num_params, "FLOPs per token": flops_per_token,
        "tokens": progress["tokens"], "tokens per step": batch_tokens, "steps": step,
        "head start": progress.get("head_start", False),
        "training FLOPs": flops_per_token * progress["tokens"], "training minutes": progress["train_s"] / 60,
        "minimum validation bpb": progress["min_val_bpb"], "peak memory MiB": peak_memory_bytes(device) / 2**20})
    loader.close()
    compute_cleanup()
    keeper.close()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
