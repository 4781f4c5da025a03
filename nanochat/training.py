"""
What the training scripts share, as functions: derived settings, one gradient accumulation, one optimizer step, the
stop signal, and the log of metrics. The loops themselves stay in the scripts.
"""

import contextlib
import gc
import json
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch

from nanochat.common import IGNORE, UserError, get_dist_info, print0, write_text
from nanochat.dataloader import to_device
from nanochat.distributed import all_reduce_sum
from nanochat.precision import get_autocast_ctx, get_precision_dtype

# -----------------------------------------------------------------------------
# Derived settings

MIN_STEPS = 700  # a run of few tokens takes smaller batches rather than fewer steps than about this (dev/LOG.md)


# The settings of all scripts by what they may be: (least, most, whether -1 may stand for none, all or derived)
RANGES = {
    (1, math.inf, False): "depth max_seq_len head_dim num_epochs examples_per_step max_new_tokens rollout_rows "
                          "eval_samples batch_tokens max_chars",
    (1, math.inf, True): "num_iterations total_batch_size device_batch_size lesson_rows eval_every eval_tokens "
                         "eval_examples sample_every save_every keep_last max_per_task doc_cap",
    (2, math.inf, False): "num_samples",  # the answers to a question are compared with each other
    (265, 2**31, False): "vocab_size",  # at least the bytes and the special tokens
    (1, 2**31, False): "buffer_size",
    (0, math.inf, True): "target_flops target_param_data_ratio",
    (0, math.inf, False): "embedding_lr unembedding_lr value_lr matrix_lr weight_decay warmup_iters init_lr_frac "
                          "question_lr_frac question_steps identity_epochs smoltalk_size spelling_size "
                          "spellingbee_size chain_size pair_embeds top_k temperature",
    (0, 1, False): "warmdown_ratio final_lr_frac question_share",
}


def check_settings(settings, needed=()):
    """A number that cannot be is refused, and named, before anything is done. -1 is none for those that are needed."""
    for (low, high, minus_one), names in RANGES.items():
        for name in names.split():
            value, may_be_minus_one = settings.get(name), minus_one and name not in needed
            if value is None or low <= value <= high or (may_be_minus_one and value == -1):
                continue
            need = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise UserError(f"--{name}={value}: need {need}{', or -1' if may_be_minus_one else ''}",
                            f"leave --{name} out for its default")


def derive_batch_size(num_tokens):
    """
    Tokens per optimizer step for a run of num_tokens: proportional to num_tokens^0.383 (arXiv 2505.13738), passing
    through 524,288 tokens at d20's horizon of 20 x 561M tokens; a power of two.
    """
    return round_batch(2**19 * (num_tokens / (20 * 561e6)) ** 0.383)


def round_batch(tokens):
    """The nearest power of two (by ratio), at least 2,048: there the optimizer is a quarter of a CPU's step already."""
    return 2 ** max(11, round(math.log2(max(tokens, 1))))


def align_batch_size(batch_tokens, sequence_len):
    """The batch in whole rows; a size that is no multiple is rounded to the nearest one, with a note."""
    aligned = max(1, round(batch_tokens / sequence_len)) * sequence_len
    if aligned != batch_tokens:
        print0(f"note: a batch of {batch_tokens} tokens is not a multiple of {sequence_len}, using {aligned}")
    return aligned


def derive_horizon(num_iterations, target_flops, target_param_data_ratio, total_batch_size, model):
    """
    (optimizer steps, tokens per step, the setting that decided). The first of the three horizons that is > 0 decides;
    total_batch_size <= 0 is derived from it: see derive_batch_size, and small enough for MIN_STEPS steps.
    """
    if num_iterations > 0:
        tokens, rule = None, "--num_iterations"
    elif target_flops > 0:
        tokens, rule = target_flops / model.estimate_flops(), "--target_flops"
    elif target_param_data_ratio > 0:
        tokens, rule = target_param_data_ratio * model.num_params(), "--target_param_data_ratio"
    else:
        raise UserError("the run has no end: --num_iterations, --target_flops and --target_param_data_ratio are all "
                        "<= 0", "set one, for example --num_iterations=1000")
    batch_tokens = total_batch_size
    if batch_tokens <= 0 and tokens is not None:
        batch_tokens = min(derive_batch_size(tokens), round_batch(tokens / MIN_STEPS))
    elif batch_tokens <= 0:  # the batch makes the horizon, which makes the batch: a few rounds settle it
        batch_tokens = 2**14
        for _ in range(20):
            batch_tokens = derive_batch_size(num_iterations * batch_tokens)
    batch_tokens = align_batch_size(batch_tokens, model.config.sequence_len)
    return (num_iterations if tokens is None else max(1, round(tokens / batch_tokens))), batch_tokens, rule


def choose_device_batch_size(asked, config, device, max_rows):
    """
    Rows per micro-batch to start with: as asked, or if that is <= 0 a power of two that should fit the device's free
    memory. A guess is enough, since `accumulate_gradients` halves it when it does not fit, and the split never changes
    the result.
    """
    if asked > 0:
        return asked
    bytes_per_number = get_precision_dtype(device.type).itemsize
    # kept for the backward pass: 34 bytes in 16 bits, so 17 numbers, per token, layer and channel (arXiv 2205.05198,
    # eq. 1, without attention scores); twice that, since code that is not compiled keeps its intermediate results too
    bytes_per_row = 2 * 17 * bytes_per_number * config.sequence_len * config.n_layer * config.n_embd
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] - 16 * 12 * config.n_layer * config.n_embd**2  # gradients, optimizer
        rows = int(0.9 * free / bytes_per_row)
    else:  # more than about 8,192 tokens at once brings a CPU nothing
        rows = min(_free_memory_bytes() // (2 * bytes_per_row), max(1, 8192 // config.sequence_len))
    return 2 ** int(math.log2(max(1, min(rows, max_rows))))


def _free_memory_bytes():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 * 2**30  # where the system does not tell


# -----------------------------------------------------------------------------
# Schedule, averages


def lr_multiplier(step, num_iterations, warmup_iters, warmdown_ratio, final_frac=0.0):
    """
    The factor on every learning rate at `step` (0-based): linear warmup over warmup_iters steps, constant 1,
    then a linear fall over the last warmdown_ratio of the run, to final_frac at step = num_iterations.
    """
    warmdown_iters = round(warmdown_ratio * num_iterations)
    if step < warmup_iters:
        return (step + 1) / warmup_iters
    if step <= num_iterations - warmdown_iters:
        return 1.0
    progress = max(0.0, (num_iterations - step) / warmdown_iters)  # 1 -> 0
    return progress + (1 - progress) * final_frac


class Ema:
    """Exponential moving average without the start-up bias; `value` is None before the first update."""

    def __init__(self, decay=0.9, total=0.0, weight=0.0):
        self.decay, self.total, self.weight = decay, total, weight

    def update(self, x):
        self.total = self.decay * self.total + (1 - self.decay) * x
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.value

    def state(self):
        """What `Ema(*state)` goes on from."""
        return [self.decay, self.total, self.weight]

    @property
    def value(self):
        return self.total / self.weight if self.weight else None


# -----------------------------------------------------------------------------
# One step


def accumulate_gradients(model, inputs, targets, num_targets, device_batch_size, weights=None, scaler=None):
    """
    Add the gradient of this step's loss over this rank's rows: arrays (R, T) of inputs, targets (IGNORE = no loss)
    and perhaps weights on the targets' losses. The loss is their sum divided by num_targets, the step's number over
    all ranks. Returns (this rank's part of the loss as a tensor, device_batch_size).

    A micro-batch that does not fit the GPU's memory is tried again at half the size: gradients are sums, so the
    result is the same, and the smaller size is returned for the next steps.
    """
    arrays = [inputs, targets] if weights is None else [inputs, targets, weights]
    while True:
        try:
            loss = torch.zeros((), device=model.device)
            for rows, T in fit_rows(targets, device_batch_size):
                loss += _loss_and_gradients(model, [array[rows, :T] for array in arrays], num_targets, scaler)
            break
        except torch.OutOfMemoryError:
            if device_batch_size == 1:
                raise UserError("out of memory with one row at a time",
                                "use a smaller --depth or --max_seq_len") from None
        device_batch_size = max(1, device_batch_size // 2)
        print(f"out of memory: trying again with --device_batch_size={device_batch_size} (same result)", flush=True)
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()
    if scaler is not None and len(inputs) == 0:  # it wants a loss and gradients on every rank
        scaler.scale(loss)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    return loss, device_batch_size


def _loss_and_gradients(model, arrays, num_targets, scaler):
    """One micro-batch of `accumulate_gradients`; a function, for nothing of it may live on when memory runs out."""
    x, y, *w = (to_device(array, model.device) for array in arrays)
    with get_autocast_ctx(model.device):
        loss = model(x, y, *w, loss_reduction="sum") / max(num_targets, 1)
    (loss if scaler is None else scaler.scale(loss)).backward()
    return loss.detach()


def used_columns(targets):
    """
    How many columns of each row of (R, T) targets a model has to look at (R,): attention is causal, so those after the
    last target change nothing. Multiples of 32, at most T, for few shapes to occur.
    """
    T = targets.shape[1]
    last = ((targets != IGNORE) * np.arange(T)).max(axis=1, initial=0)
    return np.minimum(T, 32 * (1 + last // 32))


def fit_rows(targets, device_batch_size):
    """
    Micro-batches of (R, T) targets, each as (slice of rows, columns to look at): as many rows at a time as have no more
    positions than device_batch_size rows of T. Where rows are sorted by length, short ones go many at a time and little
    is padding.
    """
    columns, room, start = used_columns(targets), device_batch_size * targets.shape[1], 0
    for end in range(1, len(targets) + 1):
        if end == len(targets) or (end + 1 - start) * columns[start : end + 1].max() > room:
            yield slice(start, end), columns[start:end].max()
            start = end


def set_rates(optimizers, lr_factor, **values):
    """Every group's lr = its initial lr x lr_factor; `values` (momentum, weight_decay) go to Muon's groups only."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
            if "momentum" in group:  # Muon's
                group.update(values)


def optimizer_step(model, optimizers, scaler=None):
    """Reduce gradients, update parameters, clear gradients. Returns the global gradient norm as a float."""
    if scaler is not None:
        _unscale(optimizers, scaler)
    for optimizer in optimizers:
        optimizer.grad_sq = 0.0  # which it stays if the scaler skips the step
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
    if scaler is not None:
        scaler.update()
    model.zero_grad(set_to_none=True)
    grad_sq = sum(optimizer.grad_sq for optimizer in optimizers)
    norm = all_reduce_sum(torch.as_tensor(grad_sq, dtype=torch.float32, device=model.device)).sqrt().item()
    if scaler is None and not math.isfinite(norm):  # the parameters are lost: stop before anything saves them
        raise UserError(f"the gradient's norm is {norm}, with a finite loss; nothing of this step was saved",
                        "resume with --resume_from_step=-2, or start again, with a smaller --matrix_lr")
    return norm


def _unscale(optimizers, scaler):
    """Divide the gradients by the scale; when one overflowed anywhere, every optimizer on every rank skips the step."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    flags = [flag for optimizer in optimizers for flag in scaler._found_inf_per_device(optimizer).values()]
    found = all_reduce_sum(torch.stack(flags).sum())
    for flag in flags:
        flag.copy_(found)


def make_scaler(device, state=None):
    """The loss scaler that float16 needs, as it was in a resumed run's `state`; None for every other precision."""
    if get_precision_dtype(device.type) != torch.float16:
        return None
    scaler = torch.amp.GradScaler(device.type)
    if state is not None and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return scaler


def check_finite(loss, step, place, manager):
    """The loss summed over ranks as a float. One that is not finite ends the run and names the place in the data."""
    loss = all_reduce_sum(loss).item()
    if not math.isfinite(loss):
        last, way_on = _way_back(manager)
        raise UserError(f"the loss at step {step} is {loss}; its rows are from {place}; nothing of this step was "
                        f"saved, {last}", f"{way_on}, or check that part of the data")
    return loss


def _way_back(manager):
    """(where the last checkpoint is, how to go on from it) for a run whose numbers went wrong."""
    saved = manager.last_step()
    if saved is None:
        return "nor is there an earlier checkpoint", "start again with a smaller --matrix_lr"
    return (f"the last good checkpoint is step {saved} in {manager.checkpoint_dir}",
            "resume with --resume_from_step=-2 and a smaller --matrix_lr")


# -----------------------------------------------------------------------------
# Checkpoints of a run


def resume_step(manager, resume_from_step, settings, fixed=()):
    """
    (step, meta) to go on from: (0, None) for a new run (resume_from_step = -1); -2 is the latest whole checkpoint.
    Settings that differ from the saved run's are printed; those in `fixed` are refused, because changing them would
    make it another run.
    """
    if resume_from_step == -1:
        return 0, None
    if resume_from_step < -2:
        raise UserError(f"--resume_from_step={resume_from_step}: need a step, -2 for the latest checkpoint, or -1 for "
                        "a new run", "--resume_from_step=-2")
    step, meta = manager.load_meta(None if resume_from_step == -2 else resume_from_step)
    if "settings" not in meta:
        raise UserError(f"step {step} in {manager.checkpoint_dir} holds a model alone and cannot be resumed",
                        "resume from another step, or start a new run")
    for name, saved in meta["settings"].items():
        if name == "resume_from_step" or settings.get(name) == saved:
            continue
        if name in fixed:
            raise UserError(f"--{name}={settings.get(name)}, but the run that is resumed has {saved}",
                            f"resume with --{name}={saved}, or leave --resume_from_step out for a new run")
        print0(f"note: --{name}={settings.get(name)} now, {saved} in the run that is resumed")
    return step, meta


class RunKeeper:
    """
    What surrounds the loop of a training script: it logs, says when to save, saves, and stops on signals. Made when all
    else is set up, so that a run that cannot start moves nothing. Then
      - a run where another one is still writing is refused;
      - a new run moves an older one's checkpoints aside, a resumed run (`state` is its meta data) those of later steps;
      - a run resumed past its end is refused;
      - a resumed run whose data changed prints a warning; `data` is a line that describes them.
    """

    def __init__(self, manager, settings, iterations, step, state, data, device):
        manager.claim(device)
        wandb_run = _start_wandb(settings)
        if state is None:
            moved = manager.move_aside()
            if moved:
                print0(f"note: the checkpoints of an earlier run are now in {moved}")
        elif step > iterations:
            raise UserError(f"the checkpoint is at step {step}, the run ends at {iterations}",
                            f"--num_iterations={step + 1000} goes on, an earlier --resume_from_step goes back")
        else:
            if state.get("data", data) != data:
                print0(f"warning: the data is not what the run began with ({data} now, {state['data']} then): from "
                       "here on it sees other rows, some perhaps twice")
            for folder in manager.forget_after(step):
                print0(f"note: the checkpoint of a later step is now {folder}")
        self.manager, self.settings, self.iterations, self.data = manager, settings, iterations, data
        self.stopping, self._saved_step = False, -1 if state is None else step
        self._signal = StopSignal(device)
        self._log = MetricsLog(manager.checkpoint_dir / "metrics.jsonl", wandb_run, step)
        self.log = self._log.log

    def save_due(self, step, eval_due):
        """
        Whether to save now: every save_every steps, before every evaluation, at the end, and when a signal asks the
        run to stop, which `stopping` then says. Collective.
        """
        every, last = self.settings["save_every"], step == self.iterations
        self.stopping = self._signal.asked() and not last
        due = last or self.stopping or eval_due or (every > 0 and step % every == 0)
        return due and step > 0 and step != self._saved_step

    def save(self, step, model, optimizers, tokenizer, scaler, **progress):
        """
        Save a checkpoint, with `progress` in its meta data. When writing fails the run goes on with a warning, since
        space may be freed before the next one; but the last save of a run raises, as do parameters that are not
        finite: the step that spoils them has a finite loss. Collective.
        """
        if not all(torch.isfinite(p).all() for p in model.parameters()):
            last, way_on = _way_back(self.manager)
            raise UserError(f"parameters are not finite after step {step}; they were not saved, {last}", way_on)
        meta = {"settings": self.settings, "iterations": self.iterations, "data": self.data,
                "scaler": None if scaler is None else scaler.state_dict(), **progress}
        try:
            self.manager.save(step, model, optimizers, tokenizer, meta, self.settings["keep_last"])
        except UserError as error:
            if self.stopping or step == self.iterations:
                raise
            print(f"warning: {error}", flush=True)
        self._saved_step = step

    def close(self):
        """
        The end of a script. A run that was stopped says how to go on, and exits as if the signal had ended it
        (128 + its number): a shell script with further stages then stops too.
        """
        self._log.close()
        self._signal.restore()
        if self.stopping:
            print0(f"stopped at step {self._saved_step}; go on with --resume_from_step={self._saved_step}"
                   if self._saved_step >= 0 else "stopped before the first step: nothing to save")
            sys.exit(128 + (self._signal.received or signal.SIGTERM))


# -----------------------------------------------------------------------------
# Stopping, and surviving


class StopSignal:
    """
    SIGTERM, SIGINT (Ctrl-C) and SIGHUP (a lost connection) ask the loop to save and end; a second SIGINT interrupts at
    once. `received` is the number of the first one or 0. `asked` says whether a signal came to any rank: collective,
    so that all ranks leave the loop at the same step.
    """

    def __init__(self, device):
        self._device, self.received = device, 0
        numbers = [signal.SIGTERM, signal.SIGINT]
        # nohup ignores SIGHUP, and means it. A background job of a shell script ignores SIGINT; here it stops the run
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}

    def _receive(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def asked(self):
        return bool(all_reduce_sum(torch.tensor(float(self.received > 0), device=self._device)).item())

    def restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def attempt(what, function):
    """function(), or None with a warning when it fails: an evaluation must never cost the run."""
    try:
        return function()
    except Exception as error:  # any failure at all is survivable here, the run is not
        print(f"warning: {what} failed and is skipped: {type(error).__name__}: {error}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None


# -----------------------------------------------------------------------------
# The log


class MetricsLog:
    """
    metrics.jsonl, one JSON object a line, and the same to a run of wandb where one is given. Rank 0 writes. After a
    resume at `step`, what the resumed run does again is dropped, so that nothing stands twice: later steps, and the
    evaluation at that step, which comes after the checkpoint.
    """

    def __init__(self, path, wandb_run=None, step=0):
        self._file, self._wandb = None, wandb_run
        if get_dist_info()[0] != 0:
            return
        self.path = Path(path)
        kept = [line for line in self._lines()
                if step and (line["step"] < step or (line["step"] == step and "train/loss" in line))]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = open(self.path, "a", encoding="utf-8")

    def _lines(self):
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                metrics = json.loads(line)
            except ValueError:
                continue  # the line that a crash cut short
            if isinstance(metrics, dict) and isinstance(metrics.get("step"), int):
                yield metrics

    def log(self, metrics):
        """metrics: {'step': int, name: number, ...}. A full disk costs the line and a warning, not the run."""
        if self._file:
            try:
                self._file.write(json.dumps(metrics) + "\n")
                self._file.flush()
            except OSError as error:
                print(f"warning: {self.path} could not be written: {error}", flush=True)
        if self._wandb:
            self._wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])

    def close(self):
        if self._file:
            with contextlib.suppress(OSError):  # a full disk once more
                self._file.close()
        if self._wandb:
            self._wandb.finish()


def _start_wandb(settings):
    """The run of wandb that --run names, on rank 0; None without a name."""
    if settings["run"] in ("", "dummy") or get_dist_info()[0] != 0:
        return None
    try:
        import wandb
        return wandb.init(project="nanochat", name=settings["run"], config=settings)
    except ImportError as error:
        raise UserError("--run names a wandb run, but wandb is not installed",
                        "uv sync --inexact --extra wandb, or leave --run at 'dummy'") from error
    except Exception as error:  # no login, no network: its errors have no class in common
        raise UserError(f"wandb cannot begin the run --run={settings['run']}: {error}",
                        "wandb login, or WANDB_MODE=offline, or leave --run at 'dummy'") from error


def step_line(step, num_iterations, loss, lr_factor, dt_s, tokens, flops_per_s, peak_flops, eta_s, **more):
    """(metrics for the log, the line for the screen) of one training step, with the same keys in every stage."""
    metrics = {"step": step, "train/loss": loss, "lrm": lr_factor, "dt_ms": 1000 * dt_s, "tok_per_sec": tokens / dt_s,
               "mfu": flops_per_s / peak_flops, **more}
    shown = {"step": f"{step:05d}/{num_iterations:05d} ({100 * step / num_iterations:.1f}%)", "loss": f"{loss:.5f}",
             "lrm": f"{lr_factor:.2f}", "dt": f"{1000 * dt_s:.0f}ms", "tok/s": f"{tokens / dt_s:,.0f}",
             "mfu": f"{100 * metrics['mfu']:.1f}%", "eta": f"{eta_s / 60:.1f}m"}
    return metrics, " | ".join(f"{key}: {value}" for key, value in shown.items())
