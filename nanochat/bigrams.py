"""
A head start for pretraining: which token follows which.

The blocks of a new model add nothing yet, so it is an embedding, two norms and a head: a table, of rank C, of the next
token given one. What this table should say can be counted over tens of millions of tokens in seconds. Training would
learn it from a few examples at a time, at rates that the noise of rare tokens sets, and that takes most of a short run.
So embedding and head are fitted to the counts first. Each step draws contexts at random and shows for each of them
*all* that followed it anywhere, as one soft target: no noise but the draw, and rows of a single token.

With pair embeddings the same is done for the most frequent pairs of tokens, of which the model then keeps a list. Most
followers of a pair were seen a few times only, so these counts are smoothed. And what was fitted to them stays as it
is: rows that went on learning, from the very text that was counted, gained next to nothing and took time and memory.

What it brings, and where: dev/LOG.md.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from nanochat.adamw import DistAdamW
from nanochat.common import Ema, UserError, all_reduce_sum, lr_multiplier, print0, rank, rank_slice, world_size
from nanochat.dataloader import to_device, token_documents
from nanochat.gpt import LOGIT_CAP, NO_PAIR, HeadLoss, chunk_loss_and_grad_eager, norm
from nanochat.precision import get_autocast_ctx
from nanochat.training import set_rates

MIN_RUN_TOKENS = 2**20  # of a run for which counting and fitting pays
OFTEN = 256             # average occurrences per token beyond which training alone learns as much
MAX_TOKENS = 2**25      # counted
CONTEXTS = 1024, 4096   # a step: a sixteenth of all, but no fewer and no more than these
HEAD_LR, EMBEDDING_LR = 0.008, 0.3  # Adam, scaled with the width
DISCOUNT = 0.5          # of the count of each follower of a pair
DRAWS = 16              # occurrences of the pair's second token, in a step, that stand for the rest
STEPS = 160
LOSS_SCALE = 1024       # 16 bits want a gradient near 1, and Adam looks at no scale
REPORTS = 4             # lines of progress


def pays(run_tokens, vocab_size):
    """Whether a run of so many training tokens gains by a head start, as far as it was measured (dev/LOG.md)."""
    return MIN_RUN_TOKENS <= run_tokens < OFTEN * vocab_size


@dataclass(frozen=True)
class Followers:
    """
    How often which token follows which context. Context c < V is token c, the others are pairs of tokens, where c < V
    is any other occurrence of the token. The followers of a context and their counts are next_ids[s] and counts[s] with
    s = slice(starts[c], starts[c + 1]); totals[c] is the sum of these counts.
    """
    pairs: np.ndarray     # (P,) int64, ascending: a * V + b where b follows a
    starts: np.ndarray    # (V + P + 1,) int64
    next_ids: np.ndarray  # (N,) int64
    counts: np.ndarray    # (N,) int64
    totals: np.ndarray    # (V + P,) int64
    after: np.ndarray     # what follows each occurrence of token 0 anywhere, then of token 1, ...; empty without pairs
    firsts: np.ndarray    # (V + 1,) int64: where in `after` those of each token begin

    def tokens(self, contexts):
        """(token, the one before it or -1) of contexts, (R,) each."""
        vocab_size = len(self.totals) - len(self.pairs)
        pairs = np.concatenate((np.arange(-vocab_size, 0), self.pairs))[contexts]  # a token without one before it
        before, tokens = np.divmod(pairs, vocab_size)
        return tokens, before

    def soft_targets(self, contexts, draws):
        """
        What should follow the contexts (R,): (row, next token, share of the row), (N,) each; the shares of a row sum to
        1, and a token may occur in it twice. Absolute discounting (Ney et al. 1994): each follower of a pair counts
        DISCOUNT less than it was seen, and that goes to what follows its second token anywhere: to as many occurrences
        as a row of `draws` has, (R, D) uniform in [0, 1).
        """
        lengths, totals = self.starts[contexts + 1] - self.starts[contexts], self.totals[contexts]
        rows = np.repeat(np.arange(len(contexts)), lengths)
        offsets = self.starts[contexts] - (np.cumsum(lengths) - lengths)  # from a place here to its follower
        seen = np.arange(len(rows)) + offsets[rows]

        tokens, before = self.tokens(contexts)
        discount, pairs, times = DISCOUNT * (before >= 0), np.flatnonzero(before >= 0), draws.shape[1]
        shares, rest = (self.counts[seen] - discount[rows]) / totals[rows], discount * lengths / totals / times
        first, end = self.firsts[tokens[pairs, None]], self.firsts[tokens[pairs, None] + 1]
        drawn = self.after[first + (draws[pairs] * (end - first)).astype(np.int64)]
        return (np.append(rows, np.repeat(pairs, times)), np.append(self.next_ids[seen], drawn),
                np.append(shares, np.repeat(rest[pairs], times)).astype(np.float32))


def count_runs(numbers):
    """(different numbers, ascending; how often each occurs). Sorts `numbers` in place."""
    numbers.sort()
    firsts = np.concatenate(([0], 1 + np.flatnonzero(numbers[1:] != numbers[:-1])))
    return numbers[firsts], np.diff(firsts, append=len(numbers))


def count_followers(documents, bos, vocab_size, num_pairs=0, max_tokens=MAX_TOKENS):
    """
    What follows each token, and each of the num_pairs most frequent pairs, in the first max_tokens tokens of documents,
    (position, ids) each, which <|bos|> parts.
    """
    pieces, total = [], 0
    for _, ids in documents:
        pieces += [np.array([bos], dtype=ids.dtype), ids]
        total += 1 + len(ids)
        if total >= max_tokens:
            break
    tokens = np.concatenate(pieces)[:max_tokens]
    del pieces
    if len(tokens) < 3:  # a pair, and what follows it
        raise UserError("the data holds no text", "check --data, or run: python -m nanochat.dataset -n 8")
    contexts = tokens[:-1].astype(np.int64)
    pairs, after, firsts = np.full(num_pairs, NO_PAIR), tokens[:0], np.zeros(vocab_size + 1, dtype=np.int64)
    if num_pairs:
        neighbours = contexts[:-1] * vocab_size + contexts[1:]  # a pair as one number
        found, counts = count_runs(neighbours.copy())
        most = found[np.argsort(-counts, kind="stable")[:num_pairs]]
        pairs[: len(most)] = np.sort(most)
        places = torch.searchsorted(*map(torch.from_numpy, (pairs, neighbours))).numpy()  # on all cores
        listed = np.append(pairs, NO_PAIR)[places] == neighbours
        contexts[1:][listed] = vocab_size + places[listed]
        del neighbours, places, listed
        after = tokens[1:][np.argsort(tokens[:-1], kind="stable")]
        firsts = np.append(0, np.cumsum(np.bincount(tokens[:-1], minlength=vocab_size)))
    totals = np.bincount(contexts, minlength=vocab_size + num_pairs)
    contexts *= vocab_size
    contexts += tokens[1:]
    found, counts = count_runs(contexts)
    contexts, next_ids = np.divmod(found, vocab_size)
    starts = np.searchsorted(contexts, np.arange(len(totals) + 1))
    return Followers(pairs, starts, next_ids, counts, totals, after, firsts)


def fit_followers(model, followers, seed, steps=STEPS):
    """
    Fit the embeddings and the head of a new model to the counts. Contexts are drawn by the square root of their
    frequency, so that rare ones are seen, and weighted by it, so that each counts as often as it occurs. Ranks share a
    step's contexts.
    """
    tables = [("embedding", model.transformer.wte.weight)]
    if model.pairs is not None:
        tables.append(("pair_embeds", model.pair_embeds.requires_grad_()))
    optimizer = DistAdamW([dict(named_params=[("head", model.lm_head.weight)], lr=HEAD_LR * model.adam_scale),
                           dict(named_params=tables, lr=EMBEDDING_LR * model.adam_scale)])
    roots = np.sqrt(followers.totals)
    num_contexts = min(np.clip(len(roots) // 16, *CONTEXTS), np.count_nonzero(roots))
    rng, smooth_loss = np.random.default_rng(seed), Ema()
    for step in range(steps):
        contexts = rng.choice(len(roots), num_contexts, replace=False, p=roots / roots.sum())
        weights = roots[contexts] / roots[contexts].sum()
        mine = rank_slice(num_contexts, rank(), world_size())
        draws = rng.random((num_contexts, DRAWS), dtype=np.float32)
        loss = _add_gradients(model, followers, contexts[mine], weights[mine], draws[mine])
        set_rates([optimizer], lr_multiplier(step, steps, warmup_iters=0, warmdown_ratio=0.5))
        optimizer.step()
        optimizer.zero_grad()
        smooth_loss.update(all_reduce_sum(loss).item())
        if (step + 1) % (steps // min(steps, REPORTS)) == 0:
            print0(f"head start: {step + 1:03d}/{steps} | loss: {smooth_loss.value:.5f} nats a token")
    if model.pairs is not None:
        model.pair_embeds.requires_grad_(False)


def _add_gradients(model, followers, contexts, weights, draws):
    """Add the gradient of the weighted losses of contexts (R,), times LOSS_SCALE; returns their sum as a tensor."""
    rows, next_ids, shares = followers.soft_targets(contexts, draws)
    _, firsts = np.unique(rows, return_index=True)
    targets = next_ids[firsts]  # the loss takes one target a row, and what the shares differ from that
    shares[firsts] -= 1  # which is what its gradient lacks
    tokens, before, targets, rows, next_ids, shares, weights = (to_device(array, model.device) for array in (
        *followers.tokens(contexts), targets, rows, next_ids, shares, np.float32(LOSS_SCALE * weights)))

    def losses_and_grad(logits, targets, weights):  # (R,) and (R, V): see chunk_loss_and_grad
        t = torch.tanh(logits[rows, next_ids].float() / LOGIT_CAP)
        losses, grad = chunk_loss_and_grad_eager(logits, targets, weights)
        share = weights[rows] * shares
        losses.index_add_(0, rows, share * t, alpha=-LOGIT_CAP)
        places = rows * grad.size(1) + next_ids
        grad.view(-1).index_add_(0, places, (share * (1 - t * t)).to(grad.dtype), alpha=-1)
        return losses, grad

    with get_autocast_ctx(model.device):  # what the trunk does, but for blocks that add nothing
        x = norm(model.embed(tokens, before))
    weight = model.lm_head.weight[: model.config.vocab_size]
    # in one chunk, since the followers are numbered over all rows
    loss = HeadLoss.apply(x, weight, targets, weights, CONTEXTS[1], losses_and_grad, slice(None))
    loss.backward()
    return loss.detach() / LOSS_SCALE


def start_from_counts(model, tokenizer, spans, seed):
    """Count in the first documents of `spans` what follows what, fit a new model to it; returns the seconds."""
    start = time.perf_counter()
    documents, num_pairs = token_documents(tokenizer, spans, seed, epochs=1), model.config.pair_embeds
    followers = count_followers(documents, tokenizer.get_bos_token_id(), tokenizer.get_vocab_size(), num_pairs)
    print0(f"head start: {followers.totals.sum():,} tokens, {len(followers.counts):,} different ones after "
           f"{np.count_nonzero(followers.totals):,} contexts")
    if num_pairs:
        model.pairs.copy_(torch.from_numpy(followers.pairs))
    fit_followers(model, followers, seed)
    seconds = time.perf_counter() - start
    print0(f"head start: {seconds:.1f}s")
    return seconds
