"""
The parts of a training step: the learning rate's schedule, gradient accumulation, loss scaling, the
optimizer step. The loops are in the scripts; stage.py begins them, run_keeper.py saves and logs.
"""

import gc
import math

import numpy as np
import torch

from nanochat.common import IGNORE, UserError, ceil_div
from nanochat.dataloader import to_device
from nanochat.distributed import all_reduce_sum
from nanochat.precision import get_autocast_ctx, get_precision_dtype

# -----------------------------------------------------------------------------
# Schedule, averages


def lr_multiplier(step, num_iterations, warmup_iters, warmdown_ratio, final_frac=0.0):
    """
    The factor on every learning rate at `step` (0-based): linear warmup over warmup_iters steps,
    then 1, then a linear fall over the last warmdown_ratio of the run. At step = num_iterations it
    reaches final_frac.
    """
    # warmup, constant
    warmdown_iters = round(warmdown_ratio * num_iterations)
    if step < warmup_iters:
        return (step + 1) / warmup_iters
    if step <= num_iterations - warmdown_iters:
        return 1.0

    # warmdown
    progress = max(0.0, (num_iterations - step) / warmdown_iters)  # 1 -> 0
    return progress + (1 - progress) * final_frac


def set_rates(optimizers, lr_factor, **values):
    """
    Set every group's lr to its initial lr x lr_factor. `values` (momentum, weight_decay) go only to
    Muon's groups.
    """
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_factor
            if "momentum" in group:  # Muon's
                group.update(values)


def get_rates(optimizers):
    """{"lr/<name of a group>": its learning rate}. Muon has one group for each shape, all alike."""
    rates = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rates[f"lr/{group['name']}"] = group["lr"]
    return rates


class Ema:
    """Exponential moving average without start-up bias. `value` is None before the first update."""

    def __init__(self, decay=0.9, total=0.0, weight=0.0):
        self.decay = decay
        self.total = total
        self.weight = weight

    def update(self, x):
        self.total = self.decay * self.total + (1 - self.decay) * x
        self.weight = self.decay * self.weight + (1 - self.decay)
        return self.value

    def state(self):
        """Three numbers; `Ema(*state)` goes on from them."""
        return [self.decay, self.total, self.weight]

    @property
    def value(self):
        return self.total / self.weight if self.weight else None


# -----------------------------------------------------------------------------
# Gradient accumulation

NO_SCALING = torch.amp.GradScaler("cpu", enabled=False)  # hands losses and steps through


def make_scaler(device, saved=None):
    """
    The loss scaler that float16 needs, from the state `saved` if given. In other precisions it does
    nothing.
    """
    enabled = get_precision_dtype(device.type) == torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=enabled)
    if saved:
        scaler.load_state_dict(saved)
    return scaler


def accumulate_gradients(
        model, inputs, targets, num_targets, device_batch_size, weights=None, scaler=NO_SCALING):
    """
    Add the gradient of this step's loss over this rank's rows. These are arrays (R, T) of inputs
    and targets (IGNORE = no loss), and perhaps weights for the losses of the targets.

    The loss is the sum divided by num_targets, the number of targets of all ranks. So any split of
    a step into ranks and micro-batches gives the same gradient, but for rounding: sums of floats
    depend on their order. Returns (this rank's part of the loss as a tensor, device_batch_size).

    If a micro-batch does not fit the GPU's memory, half its size is tried, and returned for the
    next steps.
    """
    arrays = [inputs, targets] if weights is None else [inputs, targets, weights]
    while True:
        try:
            loss = add_gradients(model, arrays, num_targets, device_batch_size, scaler)
            return loss, device_batch_size
        except torch.OutOfMemoryError:
            if device_batch_size == 1:
                raise UserError("out of memory with one row at a time",
                                "use a smaller --depth or --max_seq_len") from None
        # After the except block, since the exception keeps the tensors of the failed try alive.
        # Gradients are sums: starting again with smaller parts gives the same, but for rounding
        device_batch_size //= 2
        print("out of memory: trying again with "
              f"--device_batch_size={device_batch_size} (same but for rounding)", flush=True)
        model.zero_grad(set_to_none=True)
        gc.collect()
        torch.cuda.empty_cache()


def add_gradients(model, arrays, num_targets, device_batch_size, scaler):
    """Forward and backward pass over all rows. Returns the loss, a tensor."""
    # a loss per micro-batch; the sum stays on the device, since .item() would wait for it
    targets = arrays[1]
    total = torch.zeros((), device=model.device)
    for rows, T in micro_batches(targets, device_batch_size):
        micro_batch = [to_device(array[rows, :T], model.device) for array in arrays]
        total += backward(model, micro_batch, num_targets, scaler)

    # The scaler needs a loss and gradients, also on a rank without rows
    if scaler.is_enabled() and len(targets) == 0:
        scaler.scale(total)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    return total


def backward(model, micro_batch, num_targets, scaler):
    """One micro-batch, in a function of its own: when it returns or fails, its graph is freed."""
    # autocast spans the forward pass alone
    x, y, *weights = micro_batch
    with get_autocast_ctx(model.device):
        loss = model(x, y, *weights, loss_reduction="sum") / max(num_targets, 1)
    scaler.scale(loss).backward()
    return loss.detach()


def target_ends(targets):
    """
    (R,): how many columns of each row of (R, T) targets go up to its last target. Attention is
    causal, so the columns after them change nothing.
    """
    places = np.arange(1, 1 + targets.shape[1])
    return ((targets != IGNORE) * places).max(axis=1, initial=0)


def count_used(targets):
    """Tokens of (R, T) that training looks at."""
    return int(target_ends(targets).sum())


def used_columns(targets):
    """
    How many columns of each row of (R, T) targets the model reads, (R,): at least up to the last
    target. Multiples of 32, at most T, so that few shapes occur.
    """
    T = targets.shape[1]
    columns = 32 * ceil_div(target_ends(targets), 32)
    return np.clip(columns, min(32, T), T)


def micro_batches(targets, device_batch_size):
    """
    Yield micro-batches of (R, T) targets, each as (slice of rows, columns to read). A micro-batch
    has at most the positions of device_batch_size rows of T. Where rows are sorted by length, it
    takes many short ones with little padding.
    """
    num_rows, T = targets.shape
    columns = used_columns(targets)
    start = 0
    widest = 0  # columns of the micro-batch so far
    for row in range(num_rows):
        # does this row fit beside those of the micro-batch?
        wider = max(widest, columns[row])
        if row > start and (row + 1 - start) * wider > device_batch_size * T:
            yield slice(start, row), widest
            start = row
            wider = columns[row]
        widest = wider
    if num_rows > 0:
        yield slice(start, num_rows), widest


# -----------------------------------------------------------------------------
# The optimizer step


def optimizer_step(model, optimizers, scaler=NO_SCALING):
    """
    Reduce gradients over ranks, update parameters, clear gradients. Returns the norm of the reduced
    gradient as a float.
    """
    if scaler.is_enabled():
        unscale(optimizers, scaler)
    for optimizer in optimizers:
        optimizer.grad_sq = 0.0  # stays 0 if the scaler skips the step
        scaler.step(optimizer)
    scaler.update()
    model.zero_grad(set_to_none=True)

    # Each rank knows the squares of its shard
    grad_sq = sum(optimizer.grad_sq for optimizer in optimizers)
    grad_sq = torch.as_tensor(grad_sq, dtype=torch.float32, device=model.device)
    norm = all_reduce_sum(grad_sq).sqrt().item()
    if not math.isfinite(norm) and not scaler.is_enabled():
        # the parameters are lost: stop before anything saves them
        raise UserError(
            f"the gradient's norm is {norm}, with a finite loss; nothing of this step was saved",
            "resume with --resume_from_step=-2, or start again, with a smaller --matrix_lr")
    return norm


def unscale(optimizers, scaler):
    """
    Divide the gradients by the scale. If one overflowed anywhere, every optimizer on every rank
    skips the step.
    """
    # Unscaled gradients; a flag per optimizer says whether any of this rank's overflowed
    flags = []
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        flags += scaler._found_inf_per_device(optimizer).values()

    # All flags become the sum: an optimizer with a flag above 0 skips its step
    found = all_reduce_sum(torch.stack(flags).sum())
    for flag in flags:
        flag.copy_(found)
