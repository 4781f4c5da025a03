"""
A head start for pretraining, from counts of which token follows which.

The blocks of a new model add nothing yet, so the model is an embedding, a norm and a head: a table, of rank C, of the
next token given one. What this table should say can be counted over tens of millions of tokens in seconds, while
training learns it from a few examples at a time, at rates that the noise of rare tokens sets. So embedding and head
are fitted to the counts first. A step draws tokens at random and shows, for each, *all* that followed it anywhere, as
one soft target.

It sets initial values and nothing else. What it brings, and where: dev/LOG.md.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from nanochat.adamw import DistAdamW
from nanochat.common import UserError, print0
from nanochat.dataloader import to_device, token_documents
from nanochat.distributed import all_reduce_sum, rank, rank_slice, world_size
from nanochat.ops import norm
from nanochat.precision import get_autocast_ctx
from nanochat.training import lr_multiplier, set_rates

MIN_RUN_TOKENS = 2**20  # a shorter run would not win back the time that counting takes
OFTEN = 256             # average occurrences per token beyond which training alone learns as much
MAX_TOKENS = 2**25      # tokens counted
MIN_CONTEXTS = 1024     # a step shows a sixteenth of the vocabulary, within these bounds
MAX_CONTEXTS = 4096
CHUNK_LOGITS = 2**22    # logits made at once: 16 MB of float32 stays near a CPU's caches
HEAD_LR = 0.008         # Adam's learning rates, scaled with the width as in training
EMBEDDING_LR = 0.3
STEPS = 160
LOSS_SCALE = 1024       # keeps float16 gradients above its smallest numbers; Adam does not see the scale


def pays(run_tokens, vocab_size):
    """True if a run of so many training tokens gains by a head start, as far as it was measured (dev/LOG.md)."""
    return MIN_RUN_TOKENS <= run_tokens < OFTEN * vocab_size


@dataclass(frozen=True)
class Followers:
    """
    How often which token follows which. Token a is followed by next_ids[s], counts[s] times each, with
    s = slice(starts[a], starts[a + 1]); that is totals[a] times in all.
    """
    starts: np.ndarray    # (V + 1,) int64
    next_ids: np.ndarray  # (N,) int64
    counts: np.ndarray    # (N,) int64
    totals: np.ndarray    # (V,) int64

    def shares(self, contexts):
        """The distribution of the next token after each of `contexts` (R,), as (R, V) float32."""
        table = np.zeros((len(contexts), len(self.totals)), dtype=np.float32)
        for row, context in enumerate(contexts):
            seen = slice(self.starts[context], self.starts[context + 1])
            table[row, self.next_ids[seen]] = self.counts[seen] / self.totals[context]
        return table


def count_followers(documents, bos, vocab_size, max_tokens=MAX_TOKENS):
    """Count over the first max_tokens tokens of `documents`, (position, ids) each, joined by the id `bos`."""
    pieces = []
    num_tokens = 0
    for _, ids in documents:
        pieces += [np.array([bos]), ids]
        num_tokens += 1 + len(ids)
        if num_tokens >= max_tokens:
            break
    tokens = np.concatenate(pieces)[:max_tokens].astype(np.int64)
    if len(tokens) < 3:
        raise UserError("the data holds no text", "check --data, or run: python -m nanochat.dataset -n 8")
    pairs = tokens[:-1] * vocab_size + tokens[1:]  # two neighbours as one number
    pairs, counts = np.unique(pairs, return_counts=True)
    firsts, next_ids = np.divmod(pairs, vocab_size)
    starts = np.searchsorted(firsts, np.arange(vocab_size + 1))
    totals = np.bincount(tokens[:-1], minlength=vocab_size)
    return Followers(starts, next_ids, counts, totals)


def fit_followers(model, followers, seed, steps=STEPS):
    """
    Fit embedding and head of a new model to the counts. Tokens are drawn by the square root of their frequency, so
    that rare ones are seen, and weighted by it too, so that each counts as often as it occurs. Ranks share a step.
    """
    head = {
        "named_params": [("head", model.lm_head.weight)],
        "lr": HEAD_LR * model.adam_scale,
    }
    embedding = {
        "named_params": [("embedding", model.transformer.wte.weight)],
        "lr": EMBEDDING_LR * model.adam_scale,
    }
    optimizer = DistAdamW([head, embedding])
    roots = np.sqrt(followers.totals)
    num_contexts = np.clip(len(roots) // 16, MIN_CONTEXTS, MAX_CONTEXTS)
    num_contexts = min(num_contexts, np.count_nonzero(roots))
    mine = rank_slice(num_contexts, rank(), world_size())
    rng = np.random.default_rng(seed)
    for step in range(steps):
        contexts = rng.choice(len(roots), num_contexts, replace=False, p=roots / roots.sum())
        weights = roots[contexts]
        weights /= weights.sum()
        loss = add_gradients(model, followers, contexts[mine], weights[mine])
        lr_factor = lr_multiplier(step, steps, warmup_iters=0, warmdown_ratio=0.5)
        set_rates([optimizer], lr_factor)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 40 == 0:
            total = all_reduce_sum(loss).item()
            print0(f"head start: {step + 1:03d}/{steps} | loss: {total:.5f} nats a token")


def add_gradients(model, followers, contexts, weights):
    """Add the gradient of the weighted losses of `contexts` (R,), times LOSS_SCALE. Returns the loss, a tensor."""
    vocab_size = model.config.vocab_size
    total = torch.zeros((), device=model.device)
    chunk = max(1, CHUNK_LOGITS // vocab_size)
    for start in range(0, len(contexts), chunk):
        rows = slice(start, start + chunk)
        ids = to_device(contexts[rows], model.device)
        shares = to_device(followers.shares(contexts[rows]), model.device)
        row_weights = to_device(weights[rows].astype(np.float32), model.device)
        with get_autocast_ctx(model.device):
            x = norm(model.embed(ids))  # what a model computes while its blocks add nothing
            logits = model.logits(x)
        losses = F.cross_entropy(logits, shares, reduction="none")
        loss = (losses * row_weights).sum()
        (LOSS_SCALE * loss).backward()
        total += loss.detach()
    return total


def start_from_counts(model, tokenizer, spans, seed):
    """Count in the first documents of `spans` what follows what, and fit a new model to it. Returns the seconds."""
    start = time.perf_counter()
    documents = token_documents(tokenizer, spans, seed, epochs=1)
    followers = count_followers(documents, tokenizer.get_bos_token_id(), tokenizer.get_vocab_size())
    print0(f"head start: {followers.totals.sum():,} tokens, {len(followers.counts):,} different pairs of neighbours")
    fit_followers(model, followers, seed)
    seconds = time.perf_counter() - start
    print0(f"head start: {seconds:.1f}s")
    return seconds
