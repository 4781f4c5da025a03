"""
From logits to tokens: temperature, top-k, top-p and min-p, for a batch whose rows each have their own settings and
their own random numbers; and what the model thought of a token.

Shapes: B rows, V vocabulary.
"""

from dataclasses import dataclass

import torch

from nanochat.common import UserError

COLDEST = 1e-5  # a temperature below this takes the most likely token, before logits / temperature overflows


@dataclass
class Sampling:
    """How a row picks its tokens. None switches a filter off; temperature 0 takes the most likely token."""
    temperature: float = 1.0
    top_k: int | None = None     # keep the k most likely tokens (0 = off)
    top_p: float | None = None   # keep the most likely ones that together reach this probability
    min_p: float | None = None   # keep those at least this fraction as likely as the most likely
    seed: int | str = 42         # of the row's own random numbers

    def __post_init__(self):
        checks = {"temperature": (self.temperature >= 0, "0 or more"), "top_k": ((self.top_k or 0) >= 0, "0 or more"),
                  "top_p": (self.top_p is None or 0 < self.top_p <= 1, "more than 0, at most 1"),
                  "min_p": (self.min_p is None or 0 <= self.min_p <= 1, "0 to 1")}
        for name, (ok, need) in checks.items():
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
    groups = {}  # rows that are drawn in the same way, together: 64 rows cost little more than one
    for i, s in enumerate(samplings):
        draw = _take_best if s.temperature < COLDEST else _draw_filtered if s.has_filters else _draw
        groups.setdefault(draw, []).append(i)
    ids = torch.empty(len(samplings), dtype=torch.long, device=logits.device)
    for draw, index in groups.items():
        part = logits if len(index) == len(samplings) else logits[index]
        ids[index] = draw(part, [samplings[i] for i in index], [u[i] for i in index])
    return ids


def _take_best(logits, samplings, u):
    return logits.argmax(dim=-1)


def _draw(logits, samplings, u):
    p = torch.softmax(logits / _column([s.temperature for s in samplings], logits), dim=-1)
    return _quantile(p, u, p.size(1) - 1)


def _draw_filtered(logits, samplings, u, limit=1024):
    """Looks at the top_k likeliest tokens; without it at the first `limit`, and at all where those do not suffice."""
    V, temperature = logits.size(1), _column([s.temperature for s in samplings], logits)
    top_k = _column([min(s.top_k or V, V) for s in samplings], logits)
    K = min(V, max(s.top_k or limit for s in samplings))
    values, order = _largest(logits, K)  # (B, K), descending
    values = (values / temperature).masked_fill(torch.arange(K, device=logits.device) >= top_k, -torch.inf)
    # probabilities among the top_k, or among all
    total = values.logsumexp(1, keepdim=True)
    if not all(s.top_k for s in samplings):
        total = torch.where(top_k < V, total, (logits / temperature).logsumexp(1, keepdim=True))
    p = (values - total).exp()
    # drop what lies wholly beyond top_p, and what is below min_p of the likeliest, which always stays
    keep = (p.cumsum(1) - p) < _column([s.top_p or 1.0 for s in samplings], logits)
    keep &= p >= p[:, :1] * _column([s.min_p or 0.0 for s in samplings], logits)
    keep[:, 0] = True  # also where top_p is 0 in float32
    if K < V and bool((keep[:, -1:] & (top_k > K)).any()):
        return _draw_filtered(logits, samplings, u, V)
    p = p * keep
    return order.gather(1, _quantile(p, u, p.count_nonzero(1) - 1)[:, None])[:, 0]


def _largest(logits, K, block=32):
    """
    logits.topk(K), twice as fast on a CPU where K is small: the K largest are in the K blocks with the largest maxima.
    Of equal ones at the end it may take others.
    """
    B, V = logits.shape
    whole = V // block * block
    if 4 * K * block > V:
        return logits.topk(K)
    blocks = logits[:, :whole].reshape(B, -1, block)
    best = blocks.amax(dim=2).topk(K, sorted=False).indices  # (B, K)
    ids = (best[:, :, None] * block + torch.arange(block, device=logits.device)).flatten(1)
    ids = torch.cat((ids, torch.arange(whole, V, device=logits.device).expand(B, -1)), dim=1)
    values, places = logits.gather(1, ids).topk(K)
    return values, ids.gather(1, places)


def _column(values, like):
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _quantile(p, u, last):
    """Index (B,) where the running sum of p (B, N) passes the fraction u of its total; never beyond `last`."""
    cumulative = p.cumsum_(dim=-1)  # in place: p has served
    # right=True and u below 1 in float32: no entry of probability 0, not even when u meets a boundary exactly
    goal = _column(u, p).clamp(max=1 - 2**-24) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, goal, right=True)[:, 0].clamp(max=last)


def top_logprobs(logits, tokens, num_top):
    """
    What the model itself, at temperature 1 and unfiltered, thought of N tokens, from the logits (N, V) before each:
    [(log-probability, [(id, log-probability) of the num_top likeliest])].
    """
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (x.tolist() for x in logprobs.topk(min(num_top, logprobs.size(1))))
    return [(p, list(zip(*top, strict=True))) for p, *top in zip(chosen, ids, values, strict=True)]
