"""
Bits per byte: the loss that can be compared between tokenizers.

A model with a larger vocabulary has a higher loss per token because each token says more. Summing nats over the
tokens and dividing by the bytes that they stand for takes the tokenizer out. Special tokens stand for no bytes and
count neither way.
"""

import math

import torch

from nanochat.common import all_reduce_sum
from nanochat.precision import get_autocast_ctx


def evaluate_bpb(model, batches, token_bytes):
    """
    Bits per byte of `model` on `batches`, an iterable of (x, y), each int64 (B, T), y < 0 where ignored.
    token_bytes: int tensor (V,), bytes of each token, 0 for special ones.

    Collective: every rank brings its own batches (perhaps none) and gets the same number. An error on one rank, out
    of memory for example, becomes a RuntimeError on all of them, after the collective, so that no rank waits for ever.
    Raises ValueError when there is not one byte to score.
    """
    was_training, failure = model.training, None
    model.eval()
    try:
        sums = _sum_nats_and_bytes(model, batches, token_bytes)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        sums, failure = torch.full((2,), math.nan, dtype=torch.float64), error
    model.train(was_training)
    nats, num_bytes = all_reduce_sum(sums.cuda() if token_bytes.is_cuda else sums).tolist()
    if math.isnan(num_bytes):
        raise RuntimeError(f"the evaluation failed: {failure or 'on another rank'}") from failure
    if num_bytes == 0:
        raise ValueError("the validation rows hold no text to score; need at least one token with bytes")
    return nats / (math.log(2) * num_bytes)


@torch.no_grad()
def _sum_nats_and_bytes(model, batches, token_bytes):
    """This rank's (nats, bytes), in float64: adding millions of terms must not depend on how they were split."""
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in batches:
        with get_autocast_ctx(x.device):
            nats = model(x, y, loss_reduction="none")
        num_bytes = torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
        nats = (nats * (num_bytes > 0)).cpu().double()
        sums += torch.stack([nats.sum(), num_bytes.sum().cpu().double()])
    return sums
