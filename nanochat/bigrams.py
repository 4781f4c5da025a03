"""
A head start for pretraining: which token follows which.

The blocks of a new model add nothing yet, so it is an embedding, two norms and a head: a table, of rank C, of the next
token given one. What this table should say can be counted over tens of millions of tokens in seconds. Training would
learn it from a few examples at a time, at rates that the noise of rare tokens sets, and that takes most of a short run.
So embedding and head are fitted to the counts first. Each step draws contexts at random and shows for each of them
*all* that followed it anywhere, as one soft target: no noise but the draw, and rows of a single token.

What it brings, and where: dev/LOG.md.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.common import Ema, UserError, all_reduce_sum, lr_multiplier, print0, rank, rank_slice, world_size
from nanochat.dataloader import to_device, token_documents
from nanochat.gpt import LOGIT_CAP, HeadLoss, chunk_loss_and_grad_eager, norm
from nanochat.precision import active_dtype, get_autocast_ctx
from nanochat.training import set_rates

MIN_RUN_TOKENS = 2**20  # of a run for which counting and fitting pays
OFTEN = 256             # average occurrences per token beyond which training alone learns as much
MAX_TOKENS = 2**25      # counted
CONTEXTS = 1024         # a step
STEPS = 160
REPORTS = 4             # lines of progress


def pays(run_tokens, vocab_size):
    """Whether a run of so many training tokens gains by a head start, as far as it was measured (dev/LOG.md)."""
    return MIN_RUN_TOKENS <= run_tokens < OFTEN * vocab_size


@dataclass(frozen=True)
class Pairs:
    """
    How often which token follows which. The followers of token a and their counts are next_ids[s] and counts[s] with
    s = slice(starts[a], starts[a + 1]); totals[a] is the sum of these counts.
    """
    starts: np.ndarray    # (V + 1,) int64
    next_ids: np.ndarray  # (pairs,) int64
    counts: np.ndarray    # (pairs,) int64
    totals: np.ndarray    # (V,) int64

    def soft_targets(self, contexts):
        """For contexts (R,): (row, next token, its share of the row's followers) of every pair, (N,) each."""
        lengths = self.starts[contexts + 1] - self.starts[contexts]
        rows = np.repeat(np.arange(len(contexts)), lengths)
        firsts = self.starts[contexts] - (np.cumsum(lengths) - lengths)  # offset from a place here to its pair
        pairs = np.arange(len(rows)) + firsts[rows]
        return rows, self.next_ids[pairs], (self.counts[pairs] / self.totals[contexts][rows]).astype(np.float32)


def count_pairs(documents, bos, vocab_size, max_tokens=MAX_TOKENS):
    """Pairs of neighbouring tokens in documents, (position, ids) each, which <|bos|> parts, up to max_tokens tokens."""
    pieces, total = [], 0
    for _, ids in documents:
        pieces += [np.array([bos], dtype=ids.dtype), ids]
        total += 1 + len(ids)
        if total >= max_tokens:
            break
    tokens = np.concatenate(pieces)[:max_tokens]
    del pieces
    if len(tokens) < 2:
        raise UserError("the data holds no text", "check --data, or run: python -m nanochat.dataset -n 8")
    keys = tokens[:-1].astype(np.int64)  # a pair as one number
    keys *= vocab_size
    keys += tokens[1:]
    keys.sort()
    firsts = np.concatenate(([0], 1 + np.flatnonzero(keys[1:] != keys[:-1])))
    contexts, next_ids = np.divmod(keys[firsts], vocab_size)
    starts = np.searchsorted(contexts, np.arange(vocab_size + 1))
    return Pairs(starts, next_ids, np.diff(firsts, append=len(keys)), np.bincount(tokens[:-1], minlength=vocab_size))


def fit_pairs(model, pairs, seed, steps=STEPS):
    """
    Fit the embedding and the head of a new model to the counts. Contexts are drawn by the square root of their
    frequency, so that rare ones are seen, and weighted by it, so that each counts as often as it occurs. Ranks share a
    step's contexts.
    """
    optimizer = model.setup_optimizers()[0]
    del optimizer.param_groups[2:]  # value embeddings, which the blocks would use
    roots = np.sqrt(pairs.totals)
    num_contexts = min(CONTEXTS, np.count_nonzero(roots))
    rng, smooth_loss = np.random.default_rng(seed), Ema()
    for step in range(steps):
        contexts = rng.choice(len(roots), num_contexts, replace=False, p=roots / roots.sum())
        weights = roots[contexts] / roots[contexts].sum()
        mine = rank_slice(num_contexts, rank(), world_size())
        loss = _add_gradients(model, pairs, contexts[mine], weights[mine])
        set_rates([optimizer], lr_multiplier(step, steps, warmup_iters=0, warmdown_ratio=0.5))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        smooth_loss.update(all_reduce_sum(loss).item())
        if (step + 1) % (steps // min(steps, REPORTS)) == 0:
            print0(f"head start: {step + 1:03d}/{steps} | loss: {smooth_loss.value:.5f} nats per pair")


def _add_gradients(model, pairs, contexts, weights):
    """
    Add the gradient of the weighted losses of contexts (R,), times CONTEXTS, since 16 bits want a number near 1 and
    Adam looks at no scale; returns the sum of the losses as a tensor.
    """
    rows, next_ids, shares = pairs.soft_targets(contexts)
    _, firsts = np.unique(rows, return_index=True)
    targets = next_ids[firsts]  # the loss takes one target a row, and what the shares differ from that
    shares[firsts] -= 1  # which is what its gradient lacks
    contexts, targets, rows, next_ids, shares, weights = (to_device(array, model.device) for array in (
        contexts, targets, rows, next_ids, shares, np.float32(CONTEXTS * weights)))

    def losses_and_grad(logits, targets, weights):  # (R,) and (R, V): see chunk_loss_and_grad
        t = torch.tanh(logits[rows, next_ids].float() / LOGIT_CAP)
        losses, grad = chunk_loss_and_grad_eager(logits, targets, weights)
        share = weights[rows] * shares
        losses.index_add_(0, rows, share * t, alpha=-LOGIT_CAP)
        grad[rows, next_ids] -= (share * (1 - t * t)).to(grad.dtype)
        return losses, grad

    with get_autocast_ctx(model.device):  # what the trunk does, but for blocks that add nothing
        x = model.transformer.wte(contexts)
        x = norm(norm(x.to(active_dtype(x))))
    weight = model.lm_head.weight[: model.config.vocab_size]
    # in one chunk, since the pairs are numbered over all rows
    loss = HeadLoss.apply(x, weight, targets, weights, CONTEXTS, losses_and_grad, slice(None))
    loss.backward()
    return loss.detach() / CONTEXTS


def start_from_pairs(model, tokenizer, spans, seed):
    """Count the pairs of tokens in the first documents of `spans` and fit a new model to them; returns the seconds."""
    start = time.perf_counter()
    documents = token_documents(tokenizer, spans, seed, epochs=1)
    pairs = count_pairs(documents, tokenizer.get_bos_token_id(), tokenizer.get_vocab_size())
    print0(f"head start: {pairs.totals.sum():,} pairs of tokens, {len(pairs.counts):,} different ones")
    fit_pairs(model, pairs, seed)
    seconds = time.perf_counter() - start
    print0(f"head start: {seconds:.1f}s")
    return seconds
