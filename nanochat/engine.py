"""
Generation: a KV cache, tool use and batching. The model and the tokenizer are passed in.

One core serves everything: a `Decoder` holds a number of rows in one cache and advances all of them by a token per
step. Rows come and go between steps, and each has its own sampling settings, random numbers, tool state and end.
`Engine.generate` and `Engine.generate_batch` run it to the end for evaluations, RL and the command line; a server
feeds it as requests arrive. A row's text does not depend on its neighbours, but for rounding: several rows are
multiplied in another order than one, which in 16 bits can change a sampled token, and rarely even the likeliest one.

Shapes: B rows, T new tokens, S cached positions, H heads, D head size, L layers, V vocabulary.
"""

import codecs
import random
from bisect import bisect_left
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from nanochat.cuda_graphs import WARM_UP, CudaRecorder, StepGraphs
from nanochat.precision import get_autocast_ctx, get_precision_dtype
from nanochat.sampling import Sampling, sample_rows, top_logprobs

# -----------------------------------------------------------------------------
# KV cache


class KVCache:
    """
    Keys and values of up to `num_rows` rows, each with its own length: two tensors (L, B, H_kv, S, D), allocated once
    in the compute dtype. They grow by doubling up to max_length and refuse to go further.
    """

    fixed = False  # unlike graphs.FixedCache

    def __init__(self, config, num_rows, max_length, device, dtype, length=256):
        shape = (config.n_layer, num_rows, config.n_kv_head, min(length, max_length), config.n_embd // config.n_head)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.lengths = [0] * num_rows  # tokens stored per row
        self.num_active = num_rows     # rows 0 .. num_active - 1 take part in a forward pass

    def begin(self, T):
        """
        Make room for T more tokens in every active row. Returns (positions (B, T), a function per layer: see `_store`).
        """
        lengths = self.lengths[: self.num_active]
        self.reserve(max(lengths) + T)
        device = self.k.device
        starts = torch.tensor(lengths, device=device)
        positions = starts[:, None] + torch.arange(T, device=device)
        return positions, [partial(self._store, layer, lengths, positions) for layer in range(self.k.size(0))]

    def _store(self, layer, lengths, positions, k, v):
        """
        Store k, v (B, H, T, D) of a layer. Returns (k, v, last): views (B, H, S, D) of all positions so far, and the
        positions (B, T) up to which the new tokens may look, or None where plain causal attention says the same.
        """
        B, T = positions.shape
        even, end = min(lengths) == max(lengths), max(lengths) + T
        for cache, new in ((self.k[layer], k), (self.v[layer], v)):
            if even:
                cache[:B, :, lengths[0]: end] = new
            else:  # every row at its own place: index (B, T) pairs, which puts them in front of the heads
                cache[torch.arange(B, device=new.device)[:, None], :, positions] = new.transpose(1, 2).to(cache.dtype)
        if layer == self.k.size(0) - 1:
            self.lengths[:B] = [length + T for length in lengths]
        plain = even and (lengths[0] == 0 or (T == 1 and not k.is_cuda))  # on a GPU, a single token has its own kernel
        return self.k[layer, :B, :, :end], self.v[layer, :B, :, :end], None if plain else positions

    @torch.inference_mode()  # as the forward pass, in which the cache may have grown: its tensors allow no other mode
    def copy_row(self, target, source_cache, source):
        """Overwrite row `target` with row `source` of a cache of the same model (this one, perhaps)."""
        length = source_cache.lengths[source]
        self.reserve(length)
        for mine, theirs in ((self.k, source_cache.k), (self.v, source_cache.v)):
            mine[:, target, :, :length] = theirs[:, source, :, :length]
        self.lengths[target] = length

    def reserve(self, length):
        if length > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens per row, {length} needed")
        capacity = self.k.size(3)
        if length <= capacity:
            return
        capacity = min(self.max_length, max(length, 2 * capacity))
        grown = []
        for old in (self.k, self.v):
            grown.append(old.new_zeros(*old.shape[:3], capacity, old.shape[4]))
            grown[-1][:, :, :, : old.size(3)] = old
        self.k, self.v = grown  # both or, when memory runs out, none


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


def split_at_stop(text, stops):
    """
    (ready, held, found): the part of a growing text that is surely before any stop string, the tail that may be the
    start of one, and whether one has been found.

    >>> split_at_stop("one two thr", ["three"])
    ('one two ', 'thr', False)
    """
    places = [place for place in map(text.find, stops) if place >= 0]
    if places:
        return text[: min(places)], "", True
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held], text[len(text) - held:], False


def fit_conversation(tokenizer, messages, max_prompt):
    """
    (prompt ids, number of messages left out) for {role, content} messages: while the prompt is longer than max_prompt
    tokens, its oldest exchange goes, never the system message or the newest question.
    """
    num_system = int(messages[0]["role"] == "system")
    head, turns = messages[:num_system], messages[num_system:]

    def render(start):
        return tokenizer.render_for_completion({"messages": head + turns[start:]})

    ids = render(0)  # also refuses what is no conversation
    if len(ids) <= max_prompt:
        return ids, 0
    newest = (len(turns) - 1) // 2 * 2  # exchanges begin at even places
    start = 2 * bisect_left(range(0, newest, 2), True, key=lambda start: len(render(start)) <= max_prompt)
    ids = render(start)
    if len(ids) > max_prompt:
        raise ValueError(f"the newest message takes {len(ids)} tokens with the system message; {max_prompt} fit")
    return ids, start


# -----------------------------------------------------------------------------
# Rows, and the decoder that advances them


@dataclass(eq=False)
class Row:
    """One sequence being generated. `tokens` and `mask` hold what was generated: mask 0 = forced by a tool."""
    prompt: list[int]
    sampling: Sampling
    max_tokens: int
    stop_tokens: frozenset[int]
    tool: ToolState | None = None
    num_top: int | None = None  # if set: record each token's log-probability, and those of the num_top likeliest
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)  # entries of `top_logprobs`, when num_top is set
    forced: deque = field(default_factory=deque)
    finish_reason: str | None = None  # 'stop': a stop token, which is in `tokens`; 'length': out of room

    def __post_init__(self):
        self.random = random.Random(f"{self.sampling.seed}")

    def advance(self, token, room):
        """Take the sampled token, or the one that is forced; `room` is how many more the cache can hold."""
        sampled = int(not self.forced)
        if self.forced:
            token = self.forced.popleft()
        self.tokens.append(token)
        self.mask.append(sampled)
        if sampled and token in self.stop_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens or room <= 0:
            self.finish_reason = "length"
        elif self.tool is not None and sampled:
            self.forced.extend(self.tool.feed(token))


class Decoder:
    """
    Up to num_rows rows in one KV cache. `prefill` reads a prompt, `admit` lets a row start from it, `step` gives every
    row its next token, `release` frees a row. The active rows are always the first ones of the cache.
    """

    PREFILL_CHUNK = 512  # tokens of a prompt per forward pass
    SHORT_PROMPTS = 16   # prompts that `prefill_short` reads at once, at most

    def __init__(self, model, num_rows, max_length=None, length=256):
        """length: positions to begin with. The caches grow by doubling, which copies them: better said beforehand."""
        self.model, self.num_rows = model, num_rows
        self.max_length = min(max_length or model.config.sequence_len, model.cos.size(2))
        dtype = get_precision_dtype(model.device.type)
        self.cache = KVCache(model.config, num_rows, self.max_length, model.device, dtype, length)
        self.staging = KVCache(model.config, 1, self.max_length, model.device, dtype)
        self.staged = []  # the tokens that `staging` holds
        self.short_staging = None  # the cache of `prefill_short`
        self.logits = torch.zeros(num_rows, model.config.vocab_size, device=model.device)
        self.rows = []
        # not while training samples from float32 weights: autocast's copies of them must not be recorded
        can_record = model.device.type == "cuda" and model.lm_head.weight.dtype == dtype
        self.graphs = StepGraphs(self._run, self.cache, CudaRecorder(model.device) if can_record else None)

    def warm_up(self):
        """On a GPU, take and record the steps of every number of rows, which compiles them, before anybody waits."""
        size = 1
        while self.graphs.record and size < 2 * self.num_rows:
            ((_, logits),) = self.prefill([0])
            while len(self.rows) < min(size, self.num_rows):
                self.admit(Row([0], Sampling(0.0), self.max_length, frozenset()), logits)
            for _ in range(WARM_UP + 1):
                self.step()
            size *= 2
        self.reset()

    def reset(self):
        """Give up all rows. The memory is kept."""
        self.rows, self.staged = [], []
        self.cache.lengths = [0] * self.num_rows

    @property
    def num_free(self):
        return self.num_rows - len(self.rows)

    def check_prompt(self, prompt):
        if not 0 < len(prompt) < self.max_length:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit: need 1 to {self.max_length - 1}")

    def prefill(self, prompt, chunk=None, scores=None, num_top=1):
        """
        Read a prompt into the staging cache: a generator that yields, chunk by chunk, (tokens read, None), and with the
        last one the logits (V,). What the prompt shares with the one before, as turns of a chat do, is not read again.
        A list `scores` gets the `top_logprobs` of every prompt token but the first.
        """
        self.check_prompt(prompt)
        pairs = zip(self.staged, prompt[:-1], strict=False)
        start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(self.staged), len(prompt) - 1))
        start = start if scores is None else 0
        self.staged, self.staging.lengths = prompt[:start], [start]
        while start < len(prompt):
            ids = prompt[start: start + (chunk or self.PREFILL_CHUNK)]
            start += len(ids)
            logits = self._forward([ids], self.staging, last_only=scores is None)[0]  # (1 or T, V)
            self.staged = prompt[:start]
            if scores is not None:
                targets = prompt[start - len(ids) + 1: start + 1]  # the last token of all has none
                scores.extend(top_logprobs(logits[: len(targets)], targets, num_top))
            yield len(ids), logits[-1] if start == len(prompt) else None

    @torch.inference_mode()
    def prefill_short(self, prompts):
        """Read several short prompts at once into a cache of their own. Returns [logits (V,)], one for each."""
        B, T = len(prompts), max(map(len, prompts))
        if self.short_staging is None:
            self.short_staging = KVCache(self.model.config, self.SHORT_PROMPTS, self.max_length, self.model.device,
                                         self.cache.k.dtype)
        self.short_staging.num_active, self.short_staging.lengths = B, [0] * self.SHORT_PROMPTS
        ids = torch.tensor([[*prompt, *[0] * (T - len(prompt))] for prompt in prompts], device=self.model.device)
        ends = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self.model.device)
        logits = self._run(ids, self.short_staging, last_only=ends)[:, 0]
        self.short_staging.lengths[:B] = map(len, prompts)  # what fills up the shape stands behind the end
        return list(logits)

    def admit(self, row, logits, short=None):
        """Let a row start from the prompt in the staging cache, or from number `short` of `prefill_short`'s prompts."""
        slot = len(self.rows)
        self.cache.copy_row(slot, self.staging if short is None else self.short_staging, short or 0)
        self.logits[slot] = logits
        self.rows.append(row)

    def step(self):
        """One token for every row. Returns [(row, token, mask)]; finished rows are released."""
        emitted = self.pick()
        self.forward()
        return emitted

    def pick(self):
        """The first half of a step: choose the tokens."""
        rows, logits = list(self.rows), self.logits[: len(self.rows)]
        draws = [0.0 if row.forced else row.random.random() for row in rows]
        tokens = sample_rows(logits, [row.sampling for row in rows], draws).tolist() if rows else []
        for row, token, length in zip(rows, tokens, self.cache.lengths[: len(rows)], strict=True):
            row.advance(token, self.max_length - 1 - length)
        scored = [i for i, row in enumerate(rows) if row.num_top is not None]
        if scored:
            num_top = max(rows[i].num_top for i in scored)
            entries = top_logprobs(logits[scored], [rows[i].tokens[-1] for i in scored], num_top)
            for i, (logprob, top) in zip(scored, entries, strict=True):
                rows[i].logprobs.append((logprob, top[: rows[i].num_top]))
        for row in rows:
            if row.finish_reason:
                self.release(row)
        return [(row, row.tokens[-1], row.mask[-1]) for row in rows]

    @torch.inference_mode()
    def forward(self):
        """The second half: the logits after these tokens."""
        if self.rows:
            self.cache.num_active = len(self.rows)
            tokens = [row.tokens[-1] for row in self.rows]
            logits = self.graphs.step(tokens)
            if logits is None:
                logits = self._forward([[token] for token in tokens], self.cache)[:, -1]
            self.logits[: len(self.rows)] = logits

    def release(self, row):
        """Free a row's place; the last row moves into it."""
        slot, last = self.rows.index(row), self.rows.pop()
        if row is not last:
            self.cache.copy_row(slot, self.cache, len(self.rows))
            self.logits[slot] = self.logits[len(self.rows)]
            self.rows[slot] = last
        self.cache.lengths[len(self.rows)] = 0

    @torch.inference_mode()
    def _forward(self, ids, cache, last_only=True):
        """ids: B lists of T tokens -> logits (B, T, V), or (B, 1, V) of the last position."""
        return self._run(torch.tensor(ids, device=self.model.device), cache, last_only)

    def _run(self, ids, cache, last_only=True):
        with get_autocast_ctx(self.model.device):
            return self.model(ids, kv_cache=cache, last_only=last_only)


class Engine:
    """Generation with a model and its tokenizer; tool calls are evaluated on the way."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model, tokenizer
        self._idle = None  # the last call's decoder, for the next one: on a GPU its steps are recorded already
        self.stop_tokens = frozenset((tokenizer.encode_special("<|assistant_end|>"), tokenizer.get_bos_token_id()))

    def make_row(self, prompt, sampling, max_tokens=None, stop_tokens=None):
        """A row with tool use; max_tokens None = as many as the context holds."""
        if max_tokens is None:
            max_tokens = self.model.config.sequence_len
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: need 1 or more, or None for as many as the context holds")
        return Row(list(prompt), sampling, max_tokens,
                   self.stop_tokens if stop_tokens is None else frozenset(stop_tokens), ToolState(self.tokenizer))

    @contextmanager
    def _decoder(self, rows, num_rows):
        """A decoder for num_rows of the rows at once, which nobody else uses until the context ends."""
        decoder, self._idle = self._idle, None
        if decoder is None or decoder.num_rows < num_rows:
            decoder = None  # frees its memory first
            # positions that the longest may need; no more than 1,024 in advance, to bound the memory
            length = min(1024, max((len(row.prompt) + row.max_tokens for row in rows), default=1))
            decoder = Decoder(self.model, num_rows, length=length)
        decoder.reset()  # and forgets the last prompt: training may have changed the model since
        try:
            yield decoder
        finally:
            self._idle = decoder

    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, **filters):
        """
        Sample num_samples continuations of a prompt (list of ids) at once. Yields, token by token,
        (token_column, token_masks), lists of num_samples: mask 1 = sampled, 0 = forced by a tool, or filling after a
        row has ended. A row ends with <|assistant_end|> or <|bos|>, which is yielded.
        """
        rows = [self.make_row(tokens, Sampling(temperature, top_k, seed=f"{seed}:{i}", **filters), max_tokens)
                for i in range(num_samples)]
        filler = self.tokenizer.get_bos_token_id()
        with self._decoder(rows, num_samples) as decoder:
            *_, (_, logits) = decoder.prefill(list(tokens))
            for row in rows:
                decoder.admit(row, logits)
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
        waiting, num_rows = deque(rows), min(num_rows, len(rows)) or 1
        prompt, logits = None, None
        with self._decoder(rows, num_rows) as decoder:
            while waiting or decoder.rows:
                while waiting and len(decoder.rows) < num_rows:
                    row = waiting.popleft()
                    if row.prompt != prompt:
                        *_, (_, logits) = decoder.prefill(row.prompt)
                        prompt = row.prompt
                    decoder.admit(row, logits)
                yield from (row for row, _, _ in decoder.step() if row.finish_reason)


# What a base model is asked to go on from while it learns, the same in every run, to be read by eye
PROMPTS = ["The capital of France is", "The chemical symbol of gold is", "The opposite of hot is",
           "If yesterday was Friday, then tomorrow will be", "My favorite color is", "Once upon a time"]


def complete_prompts(engine, max_tokens=32):
    """[{prompt, text}]: greedy completions of those PROMPTS that fit in the context."""
    samples = []
    for prompt in PROMPTS:
        tokens = engine.tokenizer(prompt, prepend=engine.tokenizer.get_bos_token_id())
        if len(tokens) >= engine.model.config.sequence_len:
            continue
        (sequence,), _ = engine.generate_batch(tokens, max_tokens=max_tokens, temperature=0)
        samples.append({"prompt": prompt, "text": engine.tokenizer.decode(sequence[1:])})
    return samples
