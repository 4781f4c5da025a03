"""
From logits to tokens: penalties, temperature, top-k, top-p and min-p, for a batch in which each row
has its own settings and random numbers. Also the log-probabilities of chosen tokens.

Shapes: B rows, V vocabulary, K likeliest tokens.
"""

from dataclasses import dataclass, field

import torch

from nanochat.common import UserError

COLDEST = 1e-5     # below this temperature logits / temperature may overflow: take the likeliest
FIRST_LOOK = 1024  # number of likeliest tokens that top-p and min-p look at first
TOPK_BLOCK = 32    # columns of a block in `_topk`
BELOW_ONE = 1 - 2**-24  # the largest float32 below 1


@dataclass
class Sampling:
    """How a row picks its tokens. None switches a filter off; temperature 0 takes the likeliest."""
    temperature: float = 1.0
    top_k: int | None = None     # keep the k most likely tokens (0 = off)
    top_p: float | None = None   # keep the most likely ones that together reach this probability
    min_p: float | None = None   # keep those at least this fraction as likely as the most likely
    seed: int | str = 42         # of the row's own random numbers

    # See `penalize`
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)  # token id -> added to its logit

    def __post_init__(self):
        self._need("temperature", self.temperature >= 0, "0 or more")
        if self.top_k is not None:
            self._need("top_k", self.top_k >= 0, "0 or more")
        if self.top_p is not None:
            self._need("top_p", 0 < self.top_p <= 1, "more than 0, at most 1")
        if self.min_p is not None:
            self._need("min_p", 0 <= self.min_p <= 1, "0 to 1")
        self._need("repetition_penalty", self.repetition_penalty > 0, "more than 0")

    def _need(self, name, ok, need):
        if not ok:
            value = getattr(self, name)
            hint = f"leave {name} out for its default"
            raise UserError(f"{name}={value}: need {need}", hint)

    @property
    def has_filters(self):
        # 0, and 1 for top_p, switch a filter off as None does
        has_top_p = self.top_p not in (None, 1.0)
        return bool(self.top_k) or has_top_p or bool(self.min_p)

    @property
    def has_penalties(self):
        has_penalty = bool(self.presence_penalty or self.frequency_penalty)
        return has_penalty or self.repetition_penalty != 1 or bool(self.logit_bias)


def penalize(logits, sampling, prompt, tokens):
    """
    Apply a row's biases and penalties to its logits (V,), in place, as vLLM's server does, and in
    its order: logit_bias; repetition_penalty on every token of the prompt or the answer (CTRL,
    arXiv 1909.05858: divides a positive logit, multiplies a negative one); frequency_penalty for
    each time that a token is in the answer, and presence_penalty once, as in OpenAI's API.
    """
    if sampling.logit_bias:
        ids = torch.tensor(list(sampling.logit_bias), device=logits.device)
        logits[ids] += _tensor_like(list(sampling.logit_bias.values()), logits)

    penalty = sampling.repetition_penalty
    if penalty != 1:
        ids = torch.tensor(prompt + tokens, device=logits.device).unique()
        seen = logits[ids]
        logits[ids] = torch.where(seen > 0, seen / penalty, seen * penalty)

    if tokens and (sampling.presence_penalty or sampling.frequency_penalty):
        ids, counts = torch.tensor(tokens, device=logits.device).unique(return_counts=True)
        logits[ids] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def sample_rows(logits, samplings, u):
    """
    One token id per row of logits (B, V), as a tensor (B,). u: a number in [0, 1) for each row. The
    token is the u-quantile of the row's filtered distribution. One number per token makes what is
    drawn independent of the rows beside it, as long as the logits are: see Engine.generate_rows.
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

    # Often all rows are one group, which needs no copy of the logits
    num_rows = len(samplings)
    ids = torch.empty(
        num_rows,
        dtype=torch.long,
        device=logits.device,
    )
    for draw, rows in groups.items():
        group_logits = logits
        if len(rows) < num_rows:
            group_logits = logits[rows]
        group_samplings = [samplings[i] for i in rows]
        group_u = [u[i] for i in rows]
        ids[rows] = draw(group_logits, group_samplings, group_u)
    return ids


def _draw_likeliest(logits, samplings, u):
    return logits.argmax(dim=-1)


def _draw(logits, samplings, u):
    temperature = [sampling.temperature for sampling in samplings]
    temperature = _tensor_like(temperature, logits)
    temperature = temperature[:, None]  # (B, 1)
    p = torch.softmax(logits / temperature, dim=-1)  # (B, V)
    return _quantile(p, u, last=p.size(1) - 1)


def _draw_filtered(logits, samplings, u, limit=FIRST_LOOK):
    """
    Draw from the top_k likeliest tokens. Without top_k, look at the `limit` likeliest first, and at
    all tokens if those are not enough.
    """
    # The settings as columns (B, 1), copied to the device at once
    V = logits.size(1)
    settings = []
    for s in samplings:
        settings.append([
            s.temperature,
            min(s.top_k or V, V),
            s.top_p or 1.0,
            s.min_p or 0.0,
        ])
    settings = _tensor_like(settings, logits)  # (B, 4)
    temperature, top_k, top_p, min_p = settings.split(1, dim=1)

    # The K likeliest, in descending order. Those beyond a row's top_k get probability 0
    K = min(V, max(s.top_k or limit for s in samplings))
    values, order = _topk(logits, K)  # (B, K)
    values = values / temperature
    places = torch.arange(K, device=logits.device)
    beyond = places >= top_k  # (B, K)
    values = values.masked_fill(beyond, -torch.inf)

    # Their probabilities: among the top_k, or among all tokens
    total = values.logsumexp(1, keepdim=True)
    if not all(s.top_k for s in samplings):
        scaled = logits / temperature  # (B, V)
        total_of_all = scaled.logsumexp(1, keepdim=True)
        total = torch.where(top_k < V, total, total_of_all)
    p = (values - total).exp()

    # Drop tokens that lie wholly beyond top_p, or below min_p of the likeliest, which always stays
    likelier = p.cumsum(1) - p  # probability of all likelier tokens
    likeliest = p[:, :1]
    keep = likelier < top_p
    keep &= p >= min_p * likeliest
    keep[:, 0] = True  # also where top_p is 0 in float32

    # A row that keeps even its last token may have to keep tokens beyond the first K
    more_needed = keep[:, -1:] & (top_k > K)
    if K < V and bool(more_needed.any()):
        return _draw_filtered(logits, samplings, u, limit=V)

    # From a place in the order to a token id
    p = p * keep
    last = p.count_nonzero(1) - 1
    places = _quantile(p, u, last)
    return order.gather(1, places[:, None])[:, 0]


def _topk(logits, K):
    """
    logits.topk(K), twice as fast on a CPU where K is small: the K largest are in the K blocks with
    the largest maxima. Where values are equal it may choose other ids.
    """
    B, V = logits.shape
    if 4 * K * TOPK_BLOCK > V:
        return logits.topk(K)

    # The best blocks
    whole = V // TOPK_BLOCK * TOPK_BLOCK  # columns in whole blocks
    blocks = logits[:, :whole].reshape(B, -1, TOPK_BLOCK)
    maxima = blocks.amax(dim=2)  # (B, whole / TOPK_BLOCK)
    best = maxima.topk(K, sorted=False).indices  # (B, K)

    # The ids in these blocks, and the last ids, which are in no whole block
    columns = torch.arange(TOPK_BLOCK, device=logits.device)
    ids = best[:, :, None] * TOPK_BLOCK + columns  # (B, K, TOPK_BLOCK)
    rest = torch.arange(whole, V, device=logits.device)
    rest = rest.expand(B, -1)
    ids = torch.cat((ids.flatten(1), rest), dim=1)

    # The best of them
    candidates = logits.gather(1, ids)
    values, places = candidates.topk(K)
    ids = ids.gather(1, places)
    return values, ids


def _tensor_like(values, like):
    """Numbers as a float32 tensor on the device of `like`."""
    return torch.tensor(
        values,
        dtype=torch.float32,
        device=like.device,
    )


def _quantile(p, u, last):
    """
    The index (B,) at which the running sum of p (B, N) passes the fraction u of its total; at most
    `last`. Overwrites p.
    """
    # With right=True, and u below 1 also in float32, an entry of probability 0 is never taken
    cumulative = p.cumsum_(dim=-1)  # (B, N)
    total = cumulative[:, -1]
    fraction = _tensor_like(u, p)
    fraction = fraction.clamp(max=BELOW_ONE)
    goal = fraction * total
    places = torch.searchsorted(cumulative, goal[:, None], right=True)
    return places[:, 0].clamp(max=last)


def top_logprobs(logits, tokens, num_top):
    """
    Log-probabilities of N tokens, from the logits (N, V) before each of them, at temperature 1 and
    without filters: [(log-probability, [(id, log-probability) of each of the num_top likeliest])].
    """
    logprobs = torch.log_softmax(logits, dim=-1)

    # Of the tokens themselves
    index = torch.tensor(tokens, device=logits.device)
    chosen = logprobs.gather(1, index[:, None])  # (N, 1)
    chosen = chosen[:, 0].tolist()

    # Of the likeliest ones, in Python's lists, which become JSON
    num_top = min(num_top, logprobs.size(1))
    values, ids = logprobs.topk(num_top)  # (N, num_top)
    entries = []
    rows = zip(chosen, ids.tolist(), values.tolist(), strict=True)
    for logprob, row_ids, row_values in rows:
        top = list(zip(row_ids, row_values, strict=True))
        entries.append((logprob, top))
    return entries
