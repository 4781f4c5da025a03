"""
Two losses on held-out text.

Bits per byte can be compared between tokenizers: a model with a larger vocabulary has a higher loss per token because
each token says more. Summing nats over the tokens and dividing by the bytes that they stand for takes the tokenizer
out. Special tokens stand for no bytes and count neither way.

The loss per target token serves where the targets are the assistant's tokens, special ones included.
"""

import math

import torch

from nanochat.common import UserError
from nanochat.distributed import all_reduce_sum, run_together
from nanochat.precision import get_autocast_ctx


def evaluate_bpb(model, batches, token_bytes):
    """
    Bits per byte of `model` on `batches`, an iterable of (x, y), each int64 (B, T), y < 0 where ignored.
    token_bytes: int tensor (V,), bytes of each token, 0 for special ones.
    Collective; raises as `_nats_per_unit` does.
    """
    def num_bytes(y):
        return torch.where(y >= 0, token_bytes[y.clamp(min=0)], 0)
    return _nats_per_unit(model, batches, num_bytes) / math.log(2)


def evaluate_loss(model, batches):
    """Mean loss in nats over the targets y >= 0 of `batches`. Collective; raises as `_nats_per_unit` does."""
    return _nats_per_unit(model, batches, lambda y: (y >= 0).long())


def _nats_per_unit(model, batches, units):
    """
    Sum of the losses over the sum of units(y), a count per target; a target of 0 units is left out of both.

    Collective: every rank brings its own batches (perhaps none) and gets the same number. An error on one rank, out
    of memory for example, becomes one on all of them. Raises UserError when there is nothing to score.
    """
    was_training = model.training
    model.eval()
    try:
        sums = run_together(lambda: _sum_nats_and_units(model, batches, units), model.device)
    finally:
        model.train(was_training)
    nats, total = all_reduce_sum(sums.cuda() if model.device.type == "cuda" else sums).tolist()
    if total == 0:
        raise UserError("the rows hold nothing to score; need at least one target token",
                        "score more of it: --eval_tokens=-1, in SFT --eval_examples=-1, takes all")
    return nats / total


@torch.no_grad()
def _sum_nats_and_units(model, batches, units):
    """This rank's (nats, units), in float64: adding millions of terms must not depend on how they were split."""
    sums = torch.zeros(2, dtype=torch.float64)
    for x, y in batches:
        with get_autocast_ctx(x.device):
            nats = model(x, y, loss_reduction="none")
        counts = units(y)
        sums += torch.stack([(nats * (counts > 0)).cpu().double().sum(), counts.sum().cpu().double()])
    return sums
