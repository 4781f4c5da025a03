"""
How long a run is, how large its batches are, and which examples a step has. All of these follow
from the settings and the model's size.
"""

import math
import os
from functools import lru_cache

import numpy as np
import torch

from nanochat.common import UserError, ceil_div, print0
from nanochat.precision import get_precision_dtype

MIN_STEPS = 700     # a run of few tokens rather takes smaller batches than fewer steps (dev/LOG.md)
MIN_BATCH = 2**12   # tokens; half of it lost 0.06 to 0.08 bits per byte (dev/log/2026-11-30-short-runs.md)
CPU_TOKENS = 4096   # larger micro-batches are slower on a CPU (dev/log/2026-11-30-short-runs.md)

# -----------------------------------------------------------------------------
# Steps and tokens per step


def derive_horizon(num_iterations, target_flops, target_param_data_ratio, total_batch_size, model):
    """
    (optimizer steps, tokens per step, the setting that decided). The first of the three horizons
    that is > 0 decides. If total_batch_size is <= 0 it follows from the run's steps or tokens.
    """
    sequence_len = model.config.sequence_len
    if num_iterations > 0:
        if total_batch_size <= 0:
            total_batch_size = batch_size_of_steps(num_iterations)
        return num_iterations, align_batch_size(total_batch_size, sequence_len), "--num_iterations"

    # The two others give a number of tokens
    if target_flops > 0:
        rule = "--target_flops"
        num_tokens = target_flops / model.estimate_flops()
    elif target_param_data_ratio > 0:
        rule = "--target_param_data_ratio"
        num_tokens = target_param_data_ratio * model.num_params()
    else:
        raise UserError("the run has no end: --num_iterations, --target_flops and "
                        "--target_param_data_ratio are all <= 0",
                        "set one, for example --num_iterations=1000")
    if total_batch_size <= 0:
        total_batch_size = batch_size_of_tokens(num_tokens)
    batch_tokens = align_batch_size(total_batch_size, sequence_len)
    return max(1, round(num_tokens / batch_tokens)), batch_tokens, rule


def check_warmup(warmup_iters, num_iterations):
    """Say so if the learning rate never reaches its full value."""
    if warmup_iters >= num_iterations:
        print0(f"note: the warmup takes {warmup_iters} steps, the run {num_iterations}: the learning "
               f"rate never reaches its full value; for example --warmup_iters={num_iterations // 10}")


def batch_size_law(num_tokens):
    """
    Tokens per optimizer step that suit a run of num_tokens: a power of two, proportional to
    num_tokens^0.383 (arXiv 2505.13738), with 524,288 tokens at d20's horizon of 20 x 561M tokens.
    """
    return round_batch(2**19 * (num_tokens / (20 * 561e6)) ** 0.383)


def batch_size_of_tokens(num_tokens):
    """The batch size of a run of num_tokens: by the law, but small enough for MIN_STEPS steps."""
    return min(batch_size_law(num_tokens), round_batch(num_tokens / MIN_STEPS))


def batch_size_of_steps(num_steps):
    """
    The batch size of a run of num_steps, by the law. That asks for the run's tokens, which follow
    from the batch size: a few rounds find both.
    """
    batch_tokens = 2**14
    for _ in range(20):
        batch_tokens = batch_size_law(num_steps * batch_tokens)
    return batch_tokens


def round_batch(tokens):
    """The nearest power of two (by ratio), at least MIN_BATCH."""
    return max(MIN_BATCH, 2 ** round(math.log2(max(tokens, 1))))


def align_batch_size(batch_tokens, sequence_len):
    """
    The batch in whole rows; a size that is no multiple is rounded to the nearest one, with a note.
    """
    aligned = max(1, round(batch_tokens / sequence_len)) * sequence_len
    if aligned != batch_tokens:
        print0(f"note: a batch of {batch_tokens} tokens is not a multiple of {sequence_len}, "
               f"using {aligned}")
    return aligned


# -----------------------------------------------------------------------------
# Rows per micro-batch


def choose_device_batch_size(asked, config, device, max_rows):
    """
    Rows per micro-batch to start with: as asked, or if that is <= 0 a power of two that should fit
    the device's free memory. A guess is enough: `accumulate_gradients` halves it if it does not
    fit, and the split never changes the result.
    """
    if asked > 0:
        return asked
    # Kept for the backward pass: 34 bytes in 16 bits, so 17 elements, per token, layer and channel
    # (arXiv 2205.05198, eq. 1, without attention scores). Twice that, since code that is not
    # compiled keeps its intermediate results too.
    bytes_per_element = get_precision_dtype(device.type).itemsize
    elements_per_row = 2 * 17 * config.sequence_len * config.n_layer * config.n_embd
    bytes_per_row = elements_per_row * bytes_per_element
    if device.type == "cuda":
        gradients_and_optimizer = 16 * 12 * config.n_layer * config.n_embd**2  # bytes
        free = torch.cuda.mem_get_info(device)[0] - gradients_and_optimizer
        rows = int(0.9 * free / bytes_per_row)
    else:
        fitting = free_memory_bytes() // (2 * bytes_per_row)
        rows = min(fitting, max(1, CPU_TOKENS // config.sequence_len))
    rows = max(1, min(rows, max_rows))
    return 2 ** int(math.log2(rows))


def free_memory_bytes():
    """Free memory of this machine; 4 GiB where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 4 * 2**30


# -----------------------------------------------------------------------------
# Examples of a step: their positions in the run, then their indices


def count_examples(num_iterations, num_epochs, examples_per_step, num_examples):
    """
    (optimizer steps, examples) of a run over a data set: num_iterations steps, or if that is <= 0
    num_epochs passes. The last step may have fewer examples.
    """
    if num_iterations > 0:
        return num_iterations, num_iterations * examples_per_step
    run_examples = num_epochs * num_examples
    return ceil_div(run_examples, examples_per_step), run_examples


def step_places(step, examples_per_step, run_examples):
    """Positions of a step's examples in the run, for `shuffled_indices`."""
    first = step * examples_per_step
    return range(first, min(first + examples_per_step, run_examples))


def shuffled_indices(places, num_examples, seed):
    """
    Positions in an endless sequence of shuffled passes over num_examples -> the indices of the
    examples there. A pass holds every example once, in an order that depends only on the seed and
    on the number of the pass.
    """
    indices = []
    for place in places:
        epoch, place_in_epoch = divmod(place, num_examples)
        indices.append(int(epoch_order(seed, epoch, num_examples)[place_in_epoch]))
    return indices


@lru_cache(maxsize=2)  # a step may end one pass and begin the next
def epoch_order(seed, epoch, num_examples):
    return np.random.default_rng([seed, epoch]).permutation(num_examples)
