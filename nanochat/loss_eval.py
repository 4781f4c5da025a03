"""
Two losses on held-out text, and the windows in which whole documents are scored.

Bits per byte can be compared between tokenizers: a model with a larger vocabulary has a higher loss
per token because each token holds more text. So the losses are summed over the tokens and divided
by the bytes of their text. Special tokens have no text: neither their loss nor their bytes count.

The loss per target token is for SFT, whose targets are the assistant's tokens, special ones
included.
"""

import math

import numpy as np
import torch

from nanochat.common import IGNORE, UserError
from nanochat.distributed import all_reduce_sum, run_together
from nanochat.precision import get_autocast_ctx
from nanochat.progress import progress


def evaluate_bpb(model, batches, token_bytes):
    """
    Bits per byte of `model` on `batches`: an iterable of (x, y), each int64 (B, T), with y < 0
    where there is no target. token_bytes: int tensor (V,), bytes of each token, 0 for special ones.
    Collective; raises as `_nats_per_unit` does.
    """
    def num_bytes(y):
        text_bytes = token_bytes[y.clamp(min=0)]  # (B, T)
        return torch.where(y >= 0, text_bytes, 0)

    # one bit is log(2) nats
    return _nats_per_unit(model, batches, num_bytes) / math.log(2)


def evaluate_loss(model, batches):
    """
    Mean loss in nats over the targets y >= 0 of `batches`. Collective; raises as `_nats_per_unit`
    does.
    """
    # each target is one unit
    return _nats_per_unit(model, batches, lambda y: (y >= 0).long())


def _nats_per_unit(model, batches, units):
    """
    Sum of the losses in nats / sum of units(y). units(y) counts the units (bytes, tokens) of each
    target; the loss of a target with 0 units is left out.

    Collective: every rank brings its own batches (perhaps none) and gets the same result. An error
    on one rank, out of memory for example, becomes an error on all. Raises UserError when there is
    nothing to score.
    """
    # Evaluation mode for the time of the loop, also when it fails
    was_training = model.training
    model.eval()
    try:
        sums = run_together(lambda: _sum_nats_and_units(model, batches, units), model.device)
    finally:
        model.train(was_training)

    # The sums of all ranks
    if model.device.type == "cuda":
        sums = sums.cuda()  # NCCL reduces tensors on GPUs only
    nats, total = all_reduce_sum(sums).tolist()
    if total == 0:
        raise UserError("the rows hold nothing to score; need at least one target token",
                        "score more rows: --eval_tokens=-1, in SFT --eval_examples=-1, takes all")
    return nats / total


@torch.no_grad()
def _sum_nats_and_units(model, batches, units):
    """This rank's (nats, units) as a tensor (2,), float64."""
    # In float64 the result does not depend on the size of the batches
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in batches:
        with get_autocast_ctx(x.device):
            nats = model(x, y, loss_reduction="none")  # (B, T)
        counts = units(y)  # (B, T)
        # On the CPU, since MPS has no float64
        sums[0] += (nats * (counts > 0)).cpu().double().sum()
        sums[1] += counts.sum().cpu()
    return sums


# -----------------------------------------------------------------------------
# Whole documents


def document_windows(ids, bos, sequence_len):
    """
    [(inputs, targets)], int64 arrays of up to sequence_len tokens: windows that score every token
    of a document, int array (N,), exactly once. The first one starts with <|bos|>. The others start
    with tokens of the window before, which are context alone, so their targets are IGNORE: one
    token, or in the last window as many as have room.

    lm-evaluation-harness cuts documents in this way, for what it calls bits_per_byte.
    """
    stream = np.concatenate(([bos], ids)).astype(np.int64)  # (N + 1,)
    windows = []
    for start in range(0, len(ids), sequence_len):
        # The tokens start + 1 ... stop of the stream are scored
        stop = min(start + sequence_len, len(ids))
        first = max(0, stop - sequence_len)
        inputs = stream[first:stop]
        targets = stream[first + 1 : stop + 1].copy()
        targets[: start - first] = IGNORE
        windows.append((inputs, targets))
    return windows


def window_batches(windows, device_batch_size, device):
    """
    Yield (inputs, targets), int64 (B, T) on the device, of windows with at most T tokens. Shorter
    ones are padded at the end, where causal attention does not look.
    """
    # By length: then a batch needs little padding
    windows = sorted(windows, key=lambda window: len(window[0]))
    starts = range(0, len(windows), device_batch_size)
    for first in progress(starts, "evaluating", "batches"):
        batch = windows[first : first + device_batch_size]
        T = len(batch[-1][0])
        inputs = np.zeros((len(batch), T), dtype=np.int64)
        targets = np.full((len(batch), T), IGNORE)
        for row, (window_inputs, window_targets) in enumerate(batch):
            inputs[row, : len(window_inputs)] = window_inputs
            targets[row, : len(window_targets)] = window_targets
        yield torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)
