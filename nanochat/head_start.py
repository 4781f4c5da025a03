"""
A head start for pretraining, from counts of which token follows which.

The blocks of a new model add nothing yet. So the model is an embedding, a norm and a head: a table
of rank C that gives the next token from one token. This table can be counted over tens of millions
of tokens in seconds. Training learns it slowly, from a few examples at a time, and the noise of
rare tokens keeps its learning rates low. So embedding and head are fitted to the counts first. Each
step draws tokens at random. The target of a token is the distribution of all its followers.

This sets initial values and nothing else. Measurements are in dev/LOG.md.

Shapes: V vocabulary, N different pairs of neighbours, R tokens of a step.
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
from nanochat.progress import show_progress
from nanochat.training import lr_multiplier, set_rates

MIN_RUN_TOKENS = 2**20  # a shorter run would not win back the time that counting takes
MAX_OCCURRENCES = 256   # of a token in the run, on average; beyond, training alone learns as much
MAX_TOKENS = 2**25      # tokens counted
MIN_CONTEXTS = 1024     # a step draws a sixteenth of the vocabulary, within these bounds
MAX_CONTEXTS = 4096
CHUNK_LOGITS = 2**22    # logits made at once: 16 MB of float32 stays near a CPU's caches
HEAD_LR = 0.008         # Adam's learning rates, scaled with the width as in training
EMBEDDING_LR = 0.3
STEPS = 160
LOSS_SCALE = 1024       # keeps gradients in float16's range; Adam's steps do not depend on it


def choose_head_start(asked, run_tokens, vocab_size):
    """
    Whether a new run begins with a head start: as asked, or if that is None, where a run of
    run_tokens gains by it (measured in dev/LOG.md).
    """
    if asked is not None:
        return asked
    return MIN_RUN_TOKENS <= run_tokens < MAX_OCCURRENCES * vocab_size


@dataclass(frozen=True)
class Followers:
    """
    How often each token follows each other one. With s = slice(starts[a], starts[a + 1]), token a
    is followed by the tokens next_ids[s], each of them counts[s] times. totals[a] is their sum.
    """
    starts: np.ndarray    # (V + 1,) int64
    next_ids: np.ndarray  # (N,) int64
    counts: np.ndarray    # (N,) int64
    totals: np.ndarray    # (V,) int64

    def shares(self, contexts):
        """The distribution of the next token after each of `contexts` (R,), as (R, V) float32."""
        shape = (len(contexts), len(self.totals))
        table = np.zeros(shape, dtype=np.float32)
        for row, context in enumerate(contexts):
            start = self.starts[context]
            end = self.starts[context + 1]
            next_ids = self.next_ids[start:end]
            counts = self.counts[start:end]
            table[row, next_ids] = counts / self.totals[context]
        return table


def count_followers(documents, bos, vocab_size, max_tokens=MAX_TOKENS):
    """
    Count the pairs of neighbours in the first max_tokens tokens of `documents`. These are pairs
    (position, ids), and `bos` goes in front of each.
    """
    # One long array
    pieces = []
    num_tokens = 0
    for _, ids in show_progress(documents, "head start: counting", "documents"):
        pieces += [np.array([bos]), ids]
        num_tokens += 1 + len(ids)
        if num_tokens >= max_tokens:
            break
    # A pair of neighbours becomes one number below: 32 bits hold it up to a vocabulary of 2^16
    dtype = np.uint32 if vocab_size**2 <= 2**32 else np.int64
    tokens = np.concatenate(pieces, dtype=dtype, casting="unsafe")[:max_tokens]
    del pieces  # these arrays are large
    if len(tokens) < 3:
        raise UserError(
            "the data holds no text",
            "check --data, or run: python -m nanochat.dataset -n 8",
        )

    # Each pair of neighbours as one number, so that equal pairs can be counted
    pairs = tokens[:-1] * vocab_size
    pairs += tokens[1:]
    del tokens
    pairs, counts = np.unique(pairs, return_counts=True)

    # The different pairs in order of the first token
    firsts, next_ids = np.divmod(pairs, vocab_size)
    totals = np.bincount(firsts, weights=counts, minlength=vocab_size).astype(np.int64)
    all_ids = np.arange(vocab_size + 1)
    starts = np.searchsorted(firsts, all_ids)
    return Followers(starts, next_ids, counts, totals)


def fit_followers(model, followers, seed, steps=STEPS):
    """
    Fit embedding and head of a new model to the counts. A token is drawn with a probability
    proportional to the square root of its frequency, so that rare ones occur. Its loss is weighted
    by the same square root, so on average it counts as often as in the text. Ranks share a step.
    """
    # Two groups with learning rates of their own
    head = {
        "named_params": [("head", model.lm_head.weight)],
        "lr": HEAD_LR * model.adam_scale,
    }
    embedding = {
        "named_params": [("embedding", model.transformer.wte.weight)],
        "lr": EMBEDDING_LR * model.adam_scale,
    }
    optimizer = DistAdamW([head, embedding])

    # Tokens of a step: only those that occur can be drawn
    roots = np.sqrt(followers.totals)  # (V,)
    num_contexts = np.clip(len(roots) // 16, MIN_CONTEXTS, MAX_CONTEXTS)
    num_contexts = min(num_contexts, np.count_nonzero(roots))
    mine = rank_slice(num_contexts, rank(), world_size())
    rng = np.random.default_rng(seed)

    for step in range(1, steps + 1):
        # Every rank draws the same tokens and takes its share
        contexts = rng.choice(
            len(roots),
            num_contexts,
            replace=False,
            p=roots / roots.sum(),
        )
        weights = roots[contexts]
        weights /= weights.sum()
        loss = add_gradients(model, followers, contexts[mine], weights[mine])

        # One step of Adam, at rates that fall to 0 in the second half
        lr_factor = lr_multiplier(
            step - 1,
            steps,
            warmup_iters=0,
            warmdown_ratio=0.5,
        )
        set_rates([optimizer], lr_factor)
        optimizer.step()
        model.zero_grad(set_to_none=True)

        if step % 40 == 0:
            total = all_reduce_sum(loss).item()
            print0(f"head start: {step:03d}/{steps} | loss: {total:.5f} nats a token")


def add_gradients(model, followers, contexts, weights):
    """
    Add the gradient of the loss of `contexts` (R,), weighted by `weights` (R,), times LOSS_SCALE.
    Returns the loss, a tensor.
    """
    vocab_size = model.config.vocab_size
    total = torch.zeros((), device=model.device)
    chunk = max(1, CHUNK_LOGITS // vocab_size)
    for start in range(0, len(contexts), chunk):
        # A chunk of r tokens
        rows = slice(start, start + chunk)
        chunk_ids = contexts[rows]
        chunk_weights = weights[rows].astype(np.float32)
        ids = to_device(chunk_ids, model.device)  # (r,)
        shares = to_device(followers.shares(chunk_ids), model.device)  # (r, V)
        row_weights = to_device(chunk_weights, model.device)  # (r,)

        with get_autocast_ctx(model.device):
            x = norm(model.embed(ids))  # (r, C): blocks that add nothing are left out
            logits = model.logits(x)    # (r, V)
        losses = F.cross_entropy(logits, shares, reduction="none")
        loss = (losses * row_weights).sum()
        (LOSS_SCALE * loss).backward()
        total += loss.detach()
    return total


def start_from_counts(model, tokenizer, spans, seed):
    """Count followers in the first documents of `spans` and fit a new model. Returns seconds."""
    start = time.perf_counter()
    documents = token_documents(tokenizer, spans, seed, epochs=1)
    followers = count_followers(
        documents,
        tokenizer.get_bos_token_id(),
        tokenizer.get_vocab_size(),
    )
    print0(f"head start: {followers.totals.sum():,} tokens, "
           f"{len(followers.counts):,} different pairs of neighbours")
    fit_followers(model, followers, seed)
    seconds = time.perf_counter() - start
    print0(f"head start: {seconds:.1f}s")
    return seconds
