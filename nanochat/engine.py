"""
Generation: rows of tokens that are decoded together in one KV cache. The model and the tokenizer
are passed in.

One core serves everything: a `Decoder` advances all of its rows by a token per step. Rows come and
go between steps, and each has its own sampling settings, random numbers, tool state and end.
`Engine.generate` and `generate_batch` run it to the end for evaluations, RL and the command line; a
server feeds it as requests arrive.

Batching does not change a row's text except through floating-point rounding: several rows are
multiplied in another order than one, which in 16 bits can change a sampled token, and rarely even
the likeliest one.

Shapes: B rows, T new tokens, V vocabulary.
"""

import random
from bisect import bisect_left
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from nanochat.common import UserError
from nanochat.cuda_graphs import WARM_UP, CudaRecorder, StepGraphs
from nanochat.kv_cache import KVCache
from nanochat.precision import get_autocast_ctx, get_precision_dtype
from nanochat.sampling import Sampling, sample_rows, top_logprobs
from nanochat.streaming import ToolState

# -----------------------------------------------------------------------------
# Rows


@dataclass(eq=False)
class Row:
    """
    One sequence being generated. `tokens` and `mask` hold the generated part: mask 0 = forced by a
    tool.
    """
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

    def draw(self):
        """A uniform number in [0, 1) for the next token. A forced token takes none."""
        return 0.0 if self.forced else self.random.random()

    def advance(self, token, room):
        """
        Take the sampled token, or the one that is forced; `room` is how many more the cache can
        hold.
        """
        is_sampled = not self.forced
        if not is_sampled:
            token = self.forced.popleft()
        self.tokens.append(token)
        self.mask.append(int(is_sampled))
        if is_sampled and token in self.stop_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens or room <= 0:
            self.finish_reason = "length"
        elif is_sampled and self.tool is not None:
            self.forced.extend(self.tool.feed(token))


# -----------------------------------------------------------------------------
# The decoder


class Decoder:
    """
    Up to num_rows rows in one KV cache. `prefill` reads a prompt, `admit` lets a row start from it,
    `step` gives every row its next token, `release` frees a row. The active rows are always the
    first ones of the cache.
    """

    PREFILL_CHUNK = 512  # tokens of a prompt per forward pass
    SHORT_PROMPTS = 16   # prompts that `prefill_short` reads at once, at most

    def __init__(self, model, num_rows, max_length=None, length=256):
        """length: positions to begin with. The cache grows by doubling, which copies it."""
        self.model = model
        self.num_rows = num_rows
        self.max_length = min(max_length or model.config.sequence_len, model.cos.size(2))
        self.dtype = get_precision_dtype(model.device.type)
        self.cache = self._new_cache(num_rows, length)
        self.staging = self._new_cache(1)  # where `prefill` reads a prompt
        self.staged = []                   # the tokens that `staging` holds
        self.short_staging = None          # where `prefill_short` reads prompts
        self.logits = torch.zeros(num_rows, model.config.vocab_size, device=model.device)
        self.rows = []
        # Samples of a model in training are not recorded: autocast's copies of its float32 weights
        # would be, too
        record = None
        if model.device.type == "cuda" and model.lm_head.weight.dtype == self.dtype:
            record = CudaRecorder(model.device)
        self.graphs = StepGraphs(self._run, self.cache, record)

    def _new_cache(self, num_rows, length=256):
        return KVCache(
            self.model.config,
            num_rows,
            self.max_length,
            self.model.device,
            self.dtype,
            length,
        )

    def warm_up(self):
        """
        On a GPU, take and record the steps of every number of rows, which compiles them, before
        anybody waits.
        """
        size = 1
        while self.graphs.record and size < 2 * self.num_rows:
            ((_, logits),) = self.prefill([0])
            while len(self.rows) < min(size, self.num_rows):
                row = Row([0], Sampling(0.0), self.max_length, frozenset())
                self.admit(row, logits)
            for _ in range(WARM_UP + 1):
                self.step()
            size *= 2
        self.reset()

    def reset(self):
        """Give up all rows. The memory is kept."""
        self.rows = []
        self.staged = []
        self.cache.lengths = [0] * self.num_rows

    @property
    def num_free(self):
        return self.num_rows - len(self.rows)

    # -- prompts

    def check_prompt(self, prompt):
        if not 0 < len(prompt) < self.max_length:
            raise ValueError(f"a prompt of {len(prompt)} tokens does not fit: need 1 to {self.max_length - 1}")

    def prefill(self, prompt, chunk=None, scores=None, num_top=1):
        """
        Read a prompt into the staging cache: a generator that yields, chunk by chunk, (tokens read,
        None), and with the last one the logits (V,). The beginning that a prompt shares with the
        one before it, as the turns of a chat do, is not read again. A list `scores` gets the
        `top_logprobs` of every prompt token but the first.
        """
        self.check_prompt(prompt)
        start = 0 if scores is not None else self._num_staged(prompt)
        self.staged = prompt[:start]
        self.staging.lengths = [start]
        while start < len(prompt):
            end = min(start + (chunk or self.PREFILL_CHUNK), len(prompt))
            ids = prompt[start:end]
            logits = self._forward([ids], self.staging, last_only=scores is None)[0]  # (1 or T, V)
            self.staged = prompt[:end]
            if scores is not None:
                targets = prompt[start + 1: end + 1]  # the last token of the prompt has none
                scores += top_logprobs(logits[: len(targets)], targets, num_top)
            is_last = end == len(prompt)
            yield len(ids), logits[-1] if is_last else None
            start = end

    def _num_staged(self, prompt):
        """
        Tokens at the start of the prompt that the staging cache holds already; never its last one.
        """
        num_same = 0
        for old, new in zip(self.staged, prompt[:-1], strict=False):
            if old != new:
                break
            num_same += 1
        return num_same

    @torch.inference_mode()
    def prefill_short(self, prompts):
        """
        Read several short prompts at once into a cache of their own. Returns [logits (V,)], one for
        each.
        """
        if self.short_staging is None:
            self.short_staging = self._new_cache(self.SHORT_PROMPTS)
        self.short_staging.num_active = len(prompts)
        self.short_staging.lengths = [0] * self.SHORT_PROMPTS

        # Pad at the end, where a causal model does not look, and take the logits at each prompt's
        # last token
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)
        rows = torch.arange(len(prompts))
        ends = torch.tensor(lengths) - 1
        with get_autocast_ctx(self.model.device):
            x = self.model.trunk(ids.to(self.model.device), self.short_staging)
            logits = self.model.logits(x[rows, ends])
        self.short_staging.lengths[: len(prompts)] = lengths  # the padding lies behind the end
        return list(logits)

    def admit(self, row, logits, short=None):
        """
        Let a row start from the prompt in the staging cache, or from number `short` of
        `prefill_short`'s prompts.
        """
        slot = len(self.rows)
        if short is None:
            self.cache.copy_row(slot, self.staging, 0)
        else:
            self.cache.copy_row(slot, self.short_staging, short)
        self.logits[slot] = logits
        self.rows.append(row)

    # -- steps

    def step(self):
        """One token for every row. Returns [(row, token, mask)]; finished rows are released."""
        emitted = self.pick()
        self.forward()
        return emitted

    def pick(self):
        """The first half of a step: choose the tokens."""
        rows = list(self.rows)
        if not rows:
            return []
        logits = self.logits[: len(rows)]
        draws = [row.draw() for row in rows]
        tokens = sample_rows(logits, [row.sampling for row in rows], draws).tolist()
        for row, token, length in zip(rows, tokens, self.cache.lengths, strict=False):
            row.advance(token, self.max_length - 1 - length)
        self._record_logprobs(rows, logits)
        for row in rows:
            if row.finish_reason:
                self.release(row)
        return [(row, row.tokens[-1], row.mask[-1]) for row in rows]

    def _record_logprobs(self, rows, logits):
        """
        Note what the model thought of the newest tokens, for the rows that ask for it. logits (B,
        V).
        """
        places = [i for i, row in enumerate(rows) if row.num_top is not None]
        if not places:
            return
        scored = [rows[i] for i in places]
        num_top = max(row.num_top for row in scored)
        newest = [row.tokens[-1] for row in scored]
        entries = top_logprobs(logits[places], newest, num_top)
        for row, (logprob, top) in zip(scored, entries, strict=True):
            row.logprobs.append((logprob, top[: row.num_top]))

    @torch.inference_mode()
    def forward(self):
        """The second half: the logits after these tokens."""
        if not self.rows:
            return
        self.cache.num_active = len(self.rows)
        tokens = [row.tokens[-1] for row in self.rows]
        logits = self.graphs.step(tokens)
        if logits is None:
            logits = self._forward([[token] for token in tokens], self.cache)[:, -1]
        self.logits[: len(self.rows)] = logits

    def release(self, row):
        """Free a row's place; the last row moves into it."""
        slot = self.rows.index(row)
        last = self.rows.pop()
        last_slot = len(self.rows)
        if row is not last:
            self.cache.copy_row(slot, self.cache, last_slot)
            self.logits[slot] = self.logits[last_slot]
            self.rows[slot] = last
        self.cache.lengths[last_slot] = 0

    @torch.inference_mode()
    def _forward(self, ids, cache, last_only=True):
        """ids: B lists of T tokens -> logits (B, T, V), or (B, 1, V) of the last position."""
        return self._run(torch.tensor(ids, device=self.model.device), cache, last_only)

    def _run(self, ids, cache, last_only=True):
        with get_autocast_ctx(self.model.device):
            return self.model(ids, kv_cache=cache, last_only=last_only)


# -----------------------------------------------------------------------------
# The engine


class Engine:
    """Generation with a model and its tokenizer; tool calls are evaluated on the way."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.stop_tokens = frozenset((
            tokenizer.encode_special("<|assistant_end|>"),
            tokenizer.get_bos_token_id(),
        ))
        self._idle = None  # the last call's decoder, for the next one: on a GPU its steps are recorded already

    def make_row(self, prompt, sampling, max_tokens=None, stop_tokens=None):
        """A row with tool use; max_tokens None = as many as the context holds."""
        if max_tokens is None:
            max_tokens = self.model.config.sequence_len
        if max_tokens < 1:
            raise UserError(f"max_tokens={max_tokens}: need 1 or more, or None for as many as the context holds")
        if stop_tokens is None:
            stop_tokens = self.stop_tokens
        tool = ToolState(self.tokenizer)
        return Row(list(prompt), sampling, max_tokens, frozenset(stop_tokens), tool)

    @contextmanager
    def _decoder(self, rows, num_rows):
        """
        A decoder for num_rows of the rows at once, which nobody else uses until the context ends.
        """
        decoder = self._idle
        self._idle = None
        if decoder is None or decoder.num_rows < num_rows:
            decoder = None  # frees its memory first
            longest = max((len(row.prompt) + row.max_tokens for row in rows), default=1)
            decoder = Decoder(self.model, num_rows, length=min(1024, longest))  # longer rows let it grow
        decoder.reset()  # forgets the last prompt too: training may have changed the model since
        try:
            yield decoder
        finally:
            self._idle = decoder

    def generate(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42, **filters):
        """
        Sample num_samples continuations of a prompt (list of ids) at once. Yields, token by token,
        (token_column, token_masks), lists of num_samples: mask 1 = sampled, 0 = forced by a tool,
        or padding after a row has ended. A row ends with <|assistant_end|> or <|bos|>, which is
        yielded. filters: top_p, min_p.
        """
        rows = []
        for i in range(num_samples):
            sampling = Sampling(temperature, top_k, seed=f"{seed}:{i}", **filters)
            rows.append(self.make_row(tokens, sampling, max_tokens))
        padding = (self.tokenizer.get_bos_token_id(), 0)
        with self._decoder(rows, num_samples) as decoder:
            *_, (_, logits) = decoder.prefill(list(tokens))
            for row in rows:
                decoder.admit(row, logits)
            while decoder.rows:
                emitted = {}
                for row, token, mask in decoder.step():
                    emitted[id(row)] = (token, mask)
                column = [emitted.get(id(row), padding) for row in rows]
                yield [token for token, _ in column], [mask for _, mask in column]

    def generate_batch(self, tokens, num_samples=1, **settings):
        """
        (sequences, masks) of num_samples whole continuations, prompt included (mask 0), the ending
        token left out.
        """
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
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
        Run any number of rows (see make_row) to their end, num_rows of them at a time, the next one
        starting when one ends. Yields each row when it has ended. Equal prompts that stand next to
        each other are read once.
        """
        waiting = deque(rows)
        num_rows = max(1, min(num_rows, len(rows)))
        prompt = None
        logits = None  # after the prompt
        with self._decoder(rows, num_rows) as decoder:
            while waiting or decoder.rows:
                while waiting and len(decoder.rows) < num_rows:
                    row = waiting.popleft()
                    if row.prompt != prompt:
                        *_, (_, logits) = decoder.prefill(row.prompt)
                        prompt = row.prompt
                    decoder.admit(row, logits)
                for row, _, _ in decoder.step():
                    if row.finish_reason:
                        yield row


# -----------------------------------------------------------------------------
# Prompts


def fit_conversation(tokenizer, messages, max_prompt):
    """
    (prompt ids, number of messages left out) for {role, content} messages: while the prompt is
    longer than max_prompt tokens, its oldest exchange goes, never the system message or the newest
    question.
    """
    num_system = int(messages[0]["role"] == "system")
    system = messages[:num_system]
    turns = messages[num_system:]

    def render(start):
        return tokenizer.render_for_completion({"messages": system + turns[start:]})

    ids = render(0)  # also refuses an invalid conversation
    if len(ids) <= max_prompt:
        return ids, 0
    newest = (len(turns) - 1) // 2 * 2  # exchanges begin at even places
    starts = range(0, newest, 2)
    start = 2 * bisect_left(starts, True, key=lambda start: len(render(start)) <= max_prompt)
    ids = render(start)
    if len(ids) > max_prompt:
        raise ValueError(f"the newest message takes {len(ids)} tokens with the system message; {max_prompt} fit")
    return ids, start


# Prompts for reading a base model's progress by eye; the same in every run
PROMPTS = [
    "The capital of France is",
    "The chemical symbol of gold is",
    "The opposite of hot is",
    "If yesterday was Friday, then tomorrow will be",
    "My favorite color is",
    "Once upon a time",
]


def complete_prompts(engine, max_tokens=32):
    """[{prompt, text}]: greedy completions of those PROMPTS that fit in the context."""
    samples = []
    for prompt in PROMPTS:
        tokens = engine.tokenizer(prompt, prepend="<|bos|>")
        if len(tokens) >= engine.model.config.sequence_len:
            continue
        (sequence,), _ = engine.generate_batch(tokens, max_tokens=max_tokens, temperature=0)
        samples.append({"prompt": prompt, "text": engine.tokenizer.decode(sequence[1:])})
    return samples
