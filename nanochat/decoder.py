"""
The decoder: rows of tokens that are decoded together in one KV cache, without a tokenizer.

A `Decoder` advances all of its rows by one token per step. Rows come and go between steps, and each
row has its own sampling settings, random numbers, tool state and end. engine.py runs a decoder
until all rows have ended; for a server, scheduler.py adds rows as requests arrive.

Batching changes a row's text only through rounding. Several rows are multiplied in another order
than one row; in 16 bits that can change a sampled token, and rarely even the likeliest one. What
was read before changes nothing: a prompt is always read in the same blocks (see `prefill`).

Shapes: B rows, T new tokens, V vocabulary.
"""

import contextlib
import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from nanochat.common import one_thread
from nanochat.cuda_graphs import WARM_UP, CudaRecorder, StepGraphs
from nanochat.kv_cache import KVCache
from nanochat.precision import get_autocast_ctx, get_precision_dtype
from nanochat.sampling import Sampling, penalize, sample_rows, top_logprobs
from nanochat.streaming import ToolState


class PromptTooLong(ValueError):
    """A prompt that does not fit in the context."""


# -----------------------------------------------------------------------------
# Rows


@dataclass(eq=False)
class Row:
    """One sequence being generated. `tokens` and `mask` hold the generated part."""
    prompt: list[int]
    sampling: Sampling
    max_tokens: int              # generated ones, at most
    stop_tokens: frozenset[int]  # the row ends with one of these
    tool: ToolState | None = None
    num_top: int | None = None   # record log-probabilities, also of the num_top likeliest tokens
    constraint: Any = None       # what may come next: see constraint.Constraint; None = anything
    tokens: list[int] = field(default_factory=list)
    mask: list[int] = field(default_factory=list)  # for each token: 1 = sampled, 0 = forced
    logprobs: list = field(default_factory=list)   # entries of `top_logprobs`, if num_top is set
    forced: deque = field(default_factory=deque)   # tokens to come that a tool forces
    finish_reason: str | None = None  # 'stop': by a stop token; 'length': no room for more

    def __post_init__(self):
        self.random = random.Random(f"{self.sampling.seed}")

    @property
    def is_adjusted(self):
        """Whether its logits are changed before a token is drawn."""
        return self.constraint is not None or self.sampling.has_penalties

    def draw(self):
        """A uniform number in [0, 1) for the next token. A forced token needs none."""
        return 0.0 if self.forced else self.random.random()

    def advance(self, token, room):
        """
        Append the sampled token, or the next forced one. `room`: tokens the cache can still take.
        """
        is_sampled = not self.forced
        if not is_sampled:
            token = self.forced.popleft()
        self.tokens.append(token)
        self.mask.append(int(is_sampled))

        if is_sampled and self.constraint is not None:
            self.constraint.feed(token)

        # Only sampled tokens can end the row or call a tool
        if is_sampled and token in self.stop_tokens:
            is_whole = self.constraint is None or self.constraint.complete
            self.finish_reason = "stop" if is_whole else "length"
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
    first rows of the cache.
    """

    # Tokens of a prompt per forward pass: small enough that most of a chat's last prompt is in whole
    # blocks, large enough that a block takes little longer per token than a whole prompt
    CPU_BLOCK = 64
    GPU_BLOCK = 256
    SHORT_PROMPTS = 16  # prompts that `prefill_short` reads at once, at most

    # On a CPU, fewer multiplications than these take one thread, for some 8 ms. Two threads save up
    # to a third of that, but beside a busy core a small step of theirs takes five times as long, and
    # a server is a busy core itself (dev/log/2026-11-30-quiet-machine.md)
    ONE_THREAD_WORK = 2**29
    READING_WORK = 16  # reading a weight takes as long as multiplying it by so many tokens

    def __init__(self, model, num_rows, length=256, block=None):
        """
        length: positions of the cache at first. It grows by doubling, which copies it. block:
        tokens of a prompt per forward pass; None = as above.
        """
        device_block = self.GPU_BLOCK if model.device.type == "cuda" else self.CPU_BLOCK
        self.block = block or device_block
        self.model = model
        self.token_work = model.num_matrix_params()  # multiplications for a token
        self.num_rows = num_rows
        # the rotary table may end before the context
        self.max_length = min(model.config.sequence_len, model.cos.size(2))
        self.dtype = get_precision_dtype(model.device.type)
        self.cache = self._new_cache(num_rows, length)
        self.staging = self._new_cache(1)  # `prefill` reads prompts into it
        self.staged = []                   # tokens that `staging` holds
        self.short_staging = None          # `prefill_short` reads prompts into it
        self.logits = torch.zeros(num_rows, model.config.vocab_size, device=model.device)
        self.rows = []                     # row i is in slot i of the cache and of the logits

        # A model in training is not recorded: that would record autocast's copies of its weights
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
        """On a GPU, compile and record the steps for all numbers of rows, before anybody waits."""
        # Steps are recorded for powers of two: see cuda_graphs.py
        size = 1
        while self.graphs.record and size < 2 * self.num_rows:
            logits = self.read_prompt([0])
            while len(self.rows) < min(size, self.num_rows):
                row = Row([0], Sampling(0.0), self.max_length, frozenset())
                self.admit(row, logits)
            for _ in range(WARM_UP + 1):
                self.step()
            size *= 2
        self.reset()

    def reset(self):
        """Remove all rows. The memory is kept."""
        self.rows = []
        self.staged = []
        self.cache.lengths = [0] * self.num_rows

    def shrink(self):
        """
        Give back the memory of caches that have grown. There must be no rows. The prompt that was
        read last is kept, since a chat's next one begins with it.
        """
        # what has grown was not recorded: on a GPU the scheduler's cache has its full size at once
        self.cache.shrink()
        self.short_staging = None

    @property
    def num_free(self):
        return self.num_rows - len(self.rows)

    # -- prompts

    def check_prompt(self, prompt):
        most = self.max_length - 1
        if len(prompt) > most:
            raise PromptTooLong(
                f"a prompt of {len(prompt)} tokens does not fit: need 1 to {most}"
            )
        if not prompt:
            raise ValueError("an empty prompt has nothing to go on from: need 1 token or more")

    def prefill(self, prompt, scores=None, num_top=1):
        """
        Read a prompt into the staging cache. A generator: for each block it yields (tokens read,
        None), with the last one (tokens read, logits (V,)).

        The staging cache still holds the prompt before. If both start with the same blocks, as the
        turns of a chat do, those are not read again. Blocks begin at multiples of `block`: a block
        that is kept was computed in a forward pass of the same shape, so it has the same bits. A
        list `scores` gets the `top_logprobs` of every prompt token but the first.
        """
        # Where to begin: scores need the logits of the whole prompt
        self.check_prompt(prompt)
        start = 0
        if scores is None:
            start = self._num_staged(prompt)
        self.staged = prompt[:start]
        self.staging.lengths = [start]

        while start < len(prompt):
            end = min(start + self.block, len(prompt))
            ids = prompt[start:end]
            logits = self._forward([ids], self.staging, last_only=scores is None)
            logits = logits[0]  # (T, V), or (1, V) of the last token
            self.staged = prompt[:end]
            if scores is not None:
                targets = prompt[start + 1: end + 1]  # the last token of the prompt has none
                scores += top_logprobs(logits[: len(targets)], targets, num_top)
            is_last = end == len(prompt)
            yield len(ids), logits[-1] if is_last else None
            start = end

    def read_prompt(self, prompt):
        """Read a whole prompt into the staging cache. Returns the logits (V,) after it."""
        *_, (_, logits) = self.prefill(prompt)  # of the last block
        return logits

    def _num_staged(self, prompt):
        """
        How many first tokens of the prompt the staging cache holds already, in whole blocks; never
        the last one.
        """
        # the last token is always read, since the next one needs its logits
        num_same = 0
        for old, new in zip(self.staged, prompt[:-1], strict=False):
            if old != new:
                break
            num_same += 1
        return num_same - num_same % self.block

    @torch.inference_mode()
    def prefill_short(self, prompts):
        """
        Read several short prompts at once, into a cache of their own. Returns logits (V,) for each.
        """
        if self.short_staging is None:
            self.short_staging = self._new_cache(self.SHORT_PROMPTS)
        self.short_staging.num_active = len(prompts)
        self.short_staging.lengths = [0] * self.SHORT_PROMPTS

        # Pad at the end, where a causal model does not look
        lengths = [len(prompt) for prompt in prompts]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = torch.tensor(prompt)

        # The logits at each prompt's last token
        rows = torch.arange(len(prompts))
        ends = torch.tensor(lengths) - 1
        with get_autocast_ctx(self.model.device), self._threads(ids.numel()):
            x = self.model.trunk(ids.to(self.model.device), self.short_staging)  # (B, T, C)
            logits = self.model.logits(x[rows, ends])                            # (B, V)
        self.short_staging.lengths[: len(prompts)] = lengths  # without the padding
        return list(logits)

    def admit(self, row, logits, short=None):
        """
        Let a row start from the prompt in the staging cache. short: from this one of
        `prefill_short`'s prompts instead.
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
        """The first half of a step: choose the tokens. Returns as `step` does."""
        rows = list(self.rows)
        if not rows:
            return []

        # A token for every row. The cache has more slots than there are rows
        logits = self.logits[: len(rows)]  # (B, V)
        samplings = [row.sampling for row in rows]
        draws = [row.draw() for row in rows]
        with self._threads(len(rows)):
            adjusted = self._adjust(rows, logits)
            tokens = sample_rows(adjusted, samplings, draws).tolist()
        for row, token, length in zip(rows, tokens, self.cache.lengths, strict=False):
            row.advance(token, self.max_length - 1 - length)
        self._record_logprobs(rows, logits)
        for row in rows:
            if row.finish_reason:
                self.release(row)
        return [(row, row.tokens[-1], row.mask[-1]) for row in rows]

    def _adjust(self, rows, logits):
        """The logits (B, V) after penalties, biases and constraints; may overwrite them."""
        places = [i for i, row in enumerate(rows) if row.is_adjusted]
        # those before stay, if log-probabilities are recorded: these are of the model itself
        if places and any(row.num_top is not None for row in rows):
            logits = logits.clone()
        for i in places:
            row = rows[i]
            if row.sampling.has_penalties:
                penalize(logits[i], row.sampling, row.prompt, row.tokens)
            if row.constraint is not None:
                row.constraint.ban(logits[i])
        return logits

    def _record_logprobs(self, rows, logits):
        """
        Record the log-probabilities of the newest tokens, for rows with num_top. logits (B, V).
        """
        places = [i for i, row in enumerate(rows) if row.num_top is not None]
        if not places:
            return
        scored = [rows[i] for i in places]
        num_top = max(row.num_top for row in scored)
        newest = [row.tokens[-1] for row in scored]
        entries = top_logprobs(logits[places], newest, num_top)
        # Computed for the most that a row asks for
        for row, (logprob, top) in zip(scored, entries, strict=True):
            row.logprobs.append((logprob, top[: row.num_top]))

    @torch.inference_mode()
    def forward(self):
        """The second half of a step: compute the logits after these tokens."""
        if not self.rows:
            return
        self.cache.num_active = len(self.rows)
        tokens = [row.tokens[-1] for row in self.rows]
        logits = self.graphs.step(tokens)
        if logits is None:  # not recorded
            ids = [[token] for token in tokens]
            logits = self._forward(ids, self.cache)[:, -1]
        self.logits[: len(self.rows)] = logits

    def release(self, row):
        """Remove a row. The last row moves into its slot."""
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
        ids = torch.tensor(ids, device=self.model.device)
        with self._threads(ids.numel()):
            return self._run(ids, cache, last_only)

    def _run(self, ids, cache, last_only=True):
        # also called by StepGraphs, which records it
        with get_autocast_ctx(self.model.device):
            return self.model(ids, kv_cache=cache, last_only=last_only)

    def _threads(self, num_tokens):
        """For a forward pass of so many tokens: one thread if that is little work, else all."""
        work = (self.READING_WORK + num_tokens) * self.token_work
        is_small = work < self.ONE_THREAD_WORK
        if is_small and self.model.device.type == "cpu":
            return one_thread()
        return contextlib.nullcontext()
