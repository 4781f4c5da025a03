"""
Generation: a KV cache, sampling, tool use and batching. The model and the tokenizer are passed in.

One core serves everything: a `Decoder` holds a number of rows in one cache and advances all of them by a token per
step. Rows come and go between steps, and each has its own sampling settings, random numbers, tool state and end.
`Engine.generate` and `Engine.generate_batch` run it to the end for evaluations, RL and the command line; a server
feeds it as requests arrive. A row's text does not depend on its neighbours.

Shapes: B rows, T new tokens, S cached positions, H heads, D head size, L layers, V vocabulary.
"""

import codecs
import random
from collections import deque
from dataclasses import dataclass, field

import torch

from nanochat.execution import use_calculator
from nanochat.precision import get_autocast_ctx, get_precision_dtype

# -----------------------------------------------------------------------------
# KV cache


class KVCache:
    """
    Keys and values of up to `num_rows` rows, each with its own length: two tensors (L, B, H_kv, S, D), allocated once
    in the compute dtype. They grow by doubling up to max_length and refuse to go further.
    """

    def __init__(self, config, num_rows, max_length, device, dtype, length=256):
        shape = (config.n_layer, num_rows, config.n_kv_head, min(length, max_length), config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.lengths = [0] * num_rows  # tokens stored per row
        self.num_active = num_rows     # rows 0 .. num_active - 1 take part in a forward pass
        self._new = None               # (T, lengths, positions) of the forward pass under way

    def begin(self, T):
        """
        Make room for T more tokens in every active row. Returns (positions (B, T), mask): mask is a boolean
        (B, 1, T, S), True where a query may look, or None where plain causal attention says the same.
        """
        lengths = self.lengths[: self.num_active]
        self._reserve(max(lengths) + T)
        device = self.k.device
        starts = torch.tensor(lengths, device=device)
        positions = starts[:, None] + torch.arange(T, device=device)
        self._new = (T, lengths, positions)
        even = min(lengths) == max(lengths)
        if even and (T == 1 or lengths[0] == 0):
            return positions, None
        keys = torch.arange(max(lengths) + T, device=device)
        return positions, (keys <= positions[:, :, None])[:, None]

    def update(self, layer, k, v):
        """Store k, v (B, H, T, D) of a layer; returns views (B, H, S, D) of all positions so far."""
        T, lengths, positions = self._new
        B, end = len(lengths), max(lengths) + T
        for cache, new in ((self.k[layer], k), (self.v[layer], v)):
            if min(lengths) == max(lengths):
                cache[:B, :, lengths[0]: end] = new
            else:  # every row at its own place: index (B, T) pairs, which puts them in front of the heads
                cache[torch.arange(B, device=new.device)[:, None], :, positions] = new.transpose(1, 2).to(cache.dtype)
        if layer == self.k.size(0) - 1:
            self.lengths[:B] = [length + T for length in lengths]
        return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end]

    def copy_row(self, target, source_cache, source):
        """Overwrite row `target` with row `source` of a cache of the same model (this one, perhaps)."""
        length = source_cache.lengths[source]
        self._reserve(length)
        for mine, theirs in ((self.k, source_cache.k), (self.v, source_cache.v)):
            mine[:, target, :, :length] = theirs[:, source, :, :length]
        self.lengths[target] = length

    def _reserve(self, length):
        if length > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens per row, {length} needed")
        capacity = self.k.size(3)
        if length <= capacity:
            return
        capacity = min(self.max_length, max(length, 2 * capacity))
        for name in ("k", "v"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
            new[:, :, :, : old.size(3)] = old
            setattr(self, name, new)


# -----------------------------------------------------------------------------
# Sampling


@dataclass
class Sampling:
    """How a row picks its tokens. None switches a filter off; temperature 0 takes the most likely token."""
    temperature: float = 1.0
    top_k: int | None = None     # keep the k most likely tokens (0 = off)
    top_p: float | None = None   # keep the most likely ones that together reach this probability
    min_p: float | None = None   # keep those at least this fraction as likely as the most likely
    seed: int | str = 42         # of the row's own random numbers

    def __post_init__(self):
        checks = {"temperature": self.temperature >= 0, "top_k": (self.top_k or 0) >= 0,
                  "top_p": self.top_p is None or 0 < self.top_p <= 1,
                  "min_p": self.min_p is None or 0 <= self.min_p <= 1}
        for name, ok in checks.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: need temperature >= 0, top_k >= 0, 0 < top_p <= 1, "
                                 "0 <= min_p <= 1")

    @property
    def filters(self):
        return bool(self.top_k) or self.top_p not in (None, 1.0) or bool(self.min_p)


def sample_row(logits, sampling, u):
    """
    One token id from logits (V,) by a uniform number u in [0, 1): the u-quantile of the filtered distribution.
    One number per token keeps a row reproducible whatever runs beside it.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    order = None
    if sampling.filters:
        k = min(sampling.top_k or logits.numel(), logits.numel())
        logits, order = logits.topk(k)  # descending
    p = torch.softmax(logits.float() / sampling.temperature, dim=-1)
    if sampling.top_p is not None and order is not None:
        p = p * ((p.cumsum(0) - p) < sampling.top_p)  # drop what lies wholly beyond top_p; the first always stays
    if sampling.min_p and order is not None:
        p = p * (p >= sampling.min_p * p[0])
    cumulative = p.cumsum(0)
    # right=True and the clamp: never a token of probability 0, not even when u meets a boundary exactly
    index = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    index = int(index.clamp(max=int(p.count_nonzero()) - 1 if order is not None else p.numel() - 1))
    return int(order[index]) if order is not None else index


# -----------------------------------------------------------------------------
# Tool use


class ToolState:
    """
    Watches one row's tokens for a python block, evaluates it with the calculator when it closes, and returns the
    tokens to force: output_start, the result, output_end. An expression that gives nothing forces nothing.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        names = ("python_start", "python_end", "output_start", "output_end")
        self.start, self.end, self.output_start, self.output_end = (
            tokenizer.encode_special(f"<|{name}|>") for name in names)
        self.block = None  # ids of the open python block

    def feed(self, token):
        """Take the row's next token; returns the list of token ids to force after it."""
        if token == self.start:
            self.block = []
        elif token == self.end and self.block is not None:
            expression, self.block = self.tokenizer.decode(self.block), None
            result = use_calculator(expression)
            if result is not None:
                return [self.output_start, *self.tokenizer.encode(result), self.output_end]
        elif self.block is not None:
            self.block.append(token)
        return []


class TextStream:
    """Token ids to text as it comes: only whole characters, never a special token. `flush` ends the text."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token):
        return "" if token in self.special else self._utf8.decode(self.tokenizer.decode_bytes([token]))

    def flush(self):
        return self._utf8.decode(b"", final=True)


# -----------------------------------------------------------------------------
# Rows, and the decoder that advances them


@dataclass
class Row:
    """One sequence being generated. `tokens` and `mask` hold what was generated: mask 0 = forced by a tool."""
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_tokens: frozenset[int]
    tool: ToolState | None = None
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    forced: deque = field(default_factory=deque)
    finish_reason: str | None = None  # 'stop': a stop token, which is in `tokens`; 'length': out of room

    def __post_init__(self):
        self.random = random.Random(f"{self.sampling.seed}")

    def advance(self, logits, room):
        """Pick the next token from logits (V,), or take a forced one; `room` is how many more the cache can hold."""
        if self.forced:
            token, sampled = self.forced.popleft(), 0
        else:
            token, sampled = sample_row(logits, self.sampling, self.random.random()), 1
        self.tokens.append(token)
        self.mask.append(sampled)
        if sampled and token in self.stop_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens or room <= 0:
            self.finish_reason = "length"
        elif self.tool is not None and sampled:
            self.forced.extend(self.tool.feed(token))
        return token


class Decoder:
    """
    Up to num_rows rows in one KV cache. `prefill` reads a prompt, `admit` lets rows start from it, `step` gives every
    row its next token, `release` frees a row. The active rows are always the first ones of the cache.
    """

    PREFILL_CHUNK = 512  # tokens of a prompt per forward pass

    def __init__(self, model, num_rows, max_length=None):
        self.model, self.num_rows = model, num_rows
        self.max_length = min(max_length or model.config.sequence_len, model.cos.size(2))
        dtype = get_precision_dtype(model.device.type)
        self.cache = KVCache(model.config, num_rows, self.max_length, model.device, dtype)
        self.staging = KVCache(model.config, 1, self.max_length, model.device, dtype)
        self.logits = torch.zeros(num_rows, model.config.vocab_size, device=model.device)
        self.rows = []

    @property
    def num_free(self):
        return self.num_rows - len(self.rows)

    def prefill(self, prompt):
        """Read a prompt into the staging cache, chunk by chunk: a generator that ends with its logits (V,)."""
        if not 0 < len(prompt) < self.max_length:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit: need 1 to {self.max_length - 1}")
        self.staging.lengths = [0]
        for start in range(0, len(prompt), self.PREFILL_CHUNK):
            logits = self._forward([prompt[start: start + self.PREFILL_CHUNK]], self.staging)
            yield
        return logits[0]

    def admit(self, row, logits):
        """Let a row start from the prompt in the staging cache, whose last logits (V,) are given."""
        slot = len(self.rows)
        self.cache.copy_row(slot, self.staging, 0)
        self.logits[slot] = logits
        self.rows.append(row)

    def step(self):
        """One token for every row. Returns [(row, token, mask)]; finished rows are released."""
        room = [self.max_length - 1 - length for length in self.cache.lengths]
        emitted = [(row, row.advance(self.logits[i], room[i]), row.mask[-1]) for i, row in enumerate(self.rows)]
        for row in [row for row in self.rows if row.finish_reason]:
            self.release(row)
        if self.rows:
            self.cache.num_active = len(self.rows)
            self.logits[: len(self.rows)] = self._forward([[row.tokens[-1]] for row in self.rows], self.cache)
        return emitted

    def release(self, row):
        """Free a row's place; the last row moves into it."""
        slot, last = self.rows.index(row), self.rows.pop()
        if row is not last:
            self.cache.copy_row(slot, self.cache, len(self.rows))
            self.logits[slot] = self.logits[len(self.rows)]
            self.rows[slot] = last
        self.cache.lengths[len(self.rows)] = 0

    @torch.inference_mode()
    def _forward(self, ids, cache):
        """ids: B lists of T tokens -> logits (B, V) of the last position."""
        ids = torch.tensor(ids, device=self.model.device)
        with get_autocast_ctx(self.model.device):
            return self.model(ids, kv_cache=cache, last_only=True)[:, 0]


class Engine:
    """Generation with a model and its tokenizer; tool calls are evaluated on the way."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self.stop_tokens = frozenset((tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()))

    def make_row(self, prompt, sampling, max_tokens=None, stop_tokens=None):
        """A row with tool use; max_tokens None = as many as the context holds."""
        return Row(list(prompt), sampling, max_tokens or self.model.config.sequence_len,
                   self.stop_tokens if stop_tokens is None else frozenset(stop_tokens), ToolState(self.tokenizer))

    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, **filters):
        """
        Sample num_samples continuations of a prompt (list of ids) at once. Yields, token by token,
        (token_column, token_masks), lists of num_samples: mask 1 = sampled, 0 = forced by a tool, or filling after a
        row has ended. A row ends with <|assistant_end|> or <|bos|>, which is yielded.
        """
        rows = [self.make_row(tokens, Sampling(temperature, top_k, seed=f"{seed}:{i}", **filters), max_tokens)
                for i in range(num_samples)]
        decoder = Decoder(self.model, num_samples)
        logits = _exhaust(decoder.prefill(list(tokens)))
        for row in rows:
            decoder.admit(row, logits)
        filler = self.tokenizer.get_bos_token_id()
        while decoder.rows:
            emitted = {id(row): (token, mask) for row, token, mask in decoder.step()}
            column = [emitted.get(id(row), (filler, 0)) for row in rows]
            yield [token for token, _ in column], [mask for _, mask in column]

    def generate_batch(self, tokens, num_samples=1, **settings):
        """
        (sequences, masks) of num_samples whole continuations, prompt included (mask 0), the ending token left out.
        """
        sequences, masks = ([list(tokens) for _ in range(num_samples)], [[0] * len(tokens) for _ in range(num_samples)])
        done = [False] * num_samples
        for column, column_masks in self.generate(tokens, num_samples, **settings):
            for i, (token, mask) in enumerate(zip(column, column_masks, strict=True)):
                done[i] = done[i] or (mask == 1 and token in self.stop_tokens)
                if not done[i]:
                    sequences[i].append(token)
                    masks[i].append(mask)
        return sequences, masks

    def generate_rows(self, rows, num_rows=32):
        """
        Run any number of rows (see make_row) to their end, num_rows of them at a time, the next one starting when
        one ends. Yields each row when it has ended. Prompts that stand next to each other and are equal are read once.
        """
        waiting, decoder = deque(rows), Decoder(self.model, min(num_rows, len(rows)) or 1)
        prompt, logits = None, None
        while waiting or decoder.rows:
            while waiting and decoder.num_free:
                row = waiting.popleft()
                if row.prompt != prompt:
                    prompt, logits = row.prompt, _exhaust(decoder.prefill(row.prompt))
                decoder.admit(row, logits)
            yield from (row for row, _, _ in decoder.step() if row.finish_reason)


def _exhaust(generator):
    """Run a generator to its end and return what it returns."""
    while True:
        try:
            next(generator)
        except StopIteration as end:
            return end.value
