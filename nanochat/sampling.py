"""
From logits to tokens: temperature, top-k, top-p and min-p, for a batch whose rows each have their own settings and
their own random numbers; and the log-probabilities of chosen tokens.

Shapes: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch

from nanochat.common import UserError

COLDEST = 1e-5      # a lower temperature takes the most likely token, before logits / temperature overflows
FIRST_LOOK = 1024   # likeliest tokens that top-p and min-p look at first
TOPK_BLOCK = 32     # columns of a block in `_topk`


@dataclass
class Sampling:
    """How a row picks its tokens. None switches a filter off; temperature 0 takes the most likely token."""
    temperature: float = 1.0
    top_k: int | None = None     # keep the k most likely tokens (0 = off)
    top_p: float | None = None   # keep the most likely ones that together reach this probability
    min_p: float | None = None   # keep those at least this fraction as likely as the most likely
    seed: int | str = 42         # of the row's own random numbers

    def __post_init__(self):
        self._need("temperature", self.temperature >= 0, "0 or more")
        if self.top_k is not None:
            self._need("top_k", self.top_k >= 0, "0 or more")
        if self.top_p is not None:
            self._need("top_p", 0 < self.top_p <= 1, "more than 0, at most 1")
        if self.min_p is not None:
            self._need("min_p", 0 <= self.min_p <= 1, "0 to 1")

    def _need(self, name, ok, need):
        if not ok:
            raise UserError(f"{name}={getattr(self, name)}: need {need}", f"leave {name} out for its default")

    @property
    def has_filters(self):
        return bool(self.top_k) or self.top_p not in (None, 1.0) or bool(self.min_p)


def sample_rows(logits, samplings, u):
    """
    One token id per row of logits (B, V), a tensor (B,), by a uniform number u in [0, 1) each: the u-quantile of the
    row's filtered distribution. One number per token keeps a row reproducible whatever runs beside it.
    """
    # Rows that are drawn in the same way go together: 64 rows cost little more than one
    groups = {}
    for i, sampling in enumerate(samplings):
        if sampling.temperature < COLDEST:
            draw = _draw_likeliest
        elif sampling.has_filters:
            draw = _draw_filtered
        else:
            draw = _draw
        groups.setdefault(draw, []).append(i)

    ids = torch.empty(len(samplings), dtype=torch.long, device=logits.device)
    for draw, rows in groups.items():
        group_samplings = [samplings[i] for i in rows]
        group_u = [u[i] for i in rows]
        group_logits = logits if len(rows) == len(samplings) else logits[rows]
        ids[rows] = draw(group_logits, group_samplings, group_u)
    return ids


def _draw_likeliest(logits, samplings, u):
    return logits.argmax(dim=-1)


def _draw(logits, samplings, u):
    temperature = _column([s.temperature for s in samplings], logits)
    p = torch.softmax(logits / temperature, dim=-1)
    return _quantile(p, u, last=p.size(1) - 1)


def _draw_filtered(logits, samplings, u, limit=FIRST_LOOK):
    """Looks at the top_k likeliest tokens; without top_k at the first `limit`, and at all if those do not suffice."""
    V = logits.size(1)
    temperature = _column([s.temperature for s in samplings], logits)
    top_k = _column([min(s.top_k or V, V) for s in samplings], logits)
    top_p = _column([s.top_p or 1.0 for s in samplings], logits)
    min_p = _column([s.min_p or 0.0 for s in samplings], logits)

    # The K likeliest, in descending order, those beyond a row's top_k without any probability
    K = min(V, max(s.top_k or limit for s in samplings))
    values, order = _topk(logits, K)  # (B, K)
    values = values / temperature
    beyond = torch.arange(K, device=logits.device) >= top_k
    values = values.masked_fill(beyond, -torch.inf)

    # Their probabilities: among the top_k, or among all tokens
    total = values.logsumexp(1, keepdim=True)
    if not all(s.top_k for s in samplings):
        total_of_all = (logits / temperature).logsumexp(1, keepdim=True)
        total = torch.where(top_k < V, total, total_of_all)
    p = (values - total).exp()

    # Drop tokens that lie wholly beyond top_p, or below min_p of the likeliest, which always stays
    likelier = p.cumsum(1) - p  # probability of all likelier tokens
    keep = likelier < top_p
    keep &= p >= min_p * p[:, :1]
    keep[:, 0] = True  # also where top_p is 0 in float32
    more_needed = keep[:, -1:] & (top_k > K)
    if K < V and bool(more_needed.any()):
        return _draw_filtered(logits, samplings, u, limit=V)
    p = p * keep
    places = _quantile(p, u, last=p.count_nonzero(1) - 1)
    return order.gather(1, places[:, None])[:, 0]


def _topk(logits, K):
    """
    logits.topk(K), twice as fast on a CPU where K is small: the K largest are in the K blocks with the largest maxima.
    Among equal values at the end it may choose others.
    """
    B, V = logits.shape
    if 4 * K * TOPK_BLOCK > V:
        return logits.topk(K)
    # The best blocks: (B, K)
    whole = V // TOPK_BLOCK * TOPK_BLOCK
    blocks = logits[:, :whole].reshape(B, -1, TOPK_BLOCK)
    maxima = blocks.amax(dim=2)
    best = maxima.topk(K, sorted=False).indices

    # The ids in them, and those at the end that are in no whole block
    columns = torch.arange(TOPK_BLOCK, device=logits.device)
    ids = best[:, :, None] * TOPK_BLOCK + columns
    rest = torch.arange(whole, V, device=logits.device)
    ids = torch.cat((ids.flatten(1), rest.expand(B, -1)), dim=1)
    values, places = logits.gather(1, ids).topk(K)
    return values, ids.gather(1, places)


def _column(values, like):
    """A list of B numbers as (B, 1) float32."""
    column = torch.tensor(values, dtype=torch.float32, device=like.device)
    return column[:, None]


def _quantile(p, u, last):
    """Index (B,) where the running sum of p (B, N) passes the fraction u of its total; at most `last`. Overwrites p."""
    cumulative = p.cumsum_(dim=-1)
    # right=True and u below 1 in float32: no entry of probability 0, not even when u meets a boundary exactly
    fraction = _column(u, p).clamp(max=1 - 2**-24)
    goal = fraction * cumulative[:, -1:]
    places = torch.searchsorted(cumulative, goal, right=True)[:, 0]
    return places.clamp(max=last)


def top_logprobs(logits, tokens, num_top):
    """
    Log-probabilities by the model itself, at temperature 1 and unfiltered, of N tokens, from the logits (N, V) before
    each: [(log-probability, [(id, log-probability) of the num_top likeliest])].
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    index = torch.tensor(tokens, device=logits.device)[:, None]
    chosen = logprobs.gather(1, index)[:, 0].tolist()
    values, ids = logprobs.topk(min(num_top, logprobs.size(1)))
    entries = []
    for logprob, row_ids, row_values in zip(chosen, ids.tolist(), values.tolist(), strict=True):
        entries.append((logprob, list(zip(row_ids, row_values, strict=True))))
    return entries
