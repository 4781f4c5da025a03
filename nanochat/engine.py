"""
Generation with a model and a tokenizer: for evaluations, RL and the command line. An `Engine` runs
a `Decoder` (decoder.py) until all of its rows have ended.

Also what surrounds it: fitting a conversation into the context, and prompts for reading a model's
progress.
"""

from bisect import bisect_left
from collections import deque
from contextlib import contextmanager
from itertools import takewhile

from nanochat.common import UserError
from nanochat.conversation import SYSTEM_ROLES, question_starts
from nanochat.decoder import Decoder, PromptTooLong, Row
from nanochat.sampling import Sampling
from nanochat.streaming import ToolState

# -----------------------------------------------------------------------------
# The engine


class Engine:
    """Generation with a model and its tokenizer. Tool calls are evaluated on the way."""

    def __init__(self, model, tokenizer):
        self.model = model
        self.tokenizer = tokenizer
        self.stop_tokens = frozenset((
            tokenizer.encode_special("<|assistant_end|>"),
            tokenizer.get_bos_token_id(),
        ))
        # The decoder of the last call, for the next one: on a GPU its steps are recorded already
        self._idle = None

    def make_row(self, prompt, sampling, max_tokens=None, stop_tokens=None):
        """A row with tools. max_tokens None: as many as the context holds."""
        # the cache ends the row anyway where the context is full
        if max_tokens is None:
            max_tokens = self.model.config.sequence_len
        if max_tokens < 1:
            raise UserError(
                f"max_tokens={max_tokens}: need 1 or more, or None for as many as the context holds"
            )
        if stop_tokens is None:
            stop_tokens = self.stop_tokens
        tool = ToolState(self.tokenizer)
        return Row(list(prompt), sampling, max_tokens, frozenset(stop_tokens), tool)

    @contextmanager
    def _decoder(self, rows, num_rows):
        """A decoder for num_rows rows at once, which nobody else uses until the context ends."""
        decoder = self._idle
        self._idle = None
        if decoder is None or decoder.num_rows < num_rows:
            decoder = None  # frees its memory first
            # Long enough for most rows; longer ones let it grow
            lengths = [len(row.prompt) + row.max_tokens for row in rows]
            longest = max(lengths, default=1)
            decoder = Decoder(self.model, num_rows, length=min(1024, longest))

        # Forgets the last prompt too: training may have changed the model since
        decoder.reset()
        try:
            yield decoder
        finally:
            self._idle = decoder

    def generate(
        self,
        tokens,
        num_samples=1,
        max_tokens=None,
        temperature=1.0,
        top_k=None,
        seed=42,
        **filters,
    ):
        """
        Sample num_samples continuations of a prompt (list of ids) at once. Yields, for each step,
        (token_column, token_masks), two lists of num_samples. Mask 1 is a sampled token; 0 is
        forced by a tool, or padding after the row's end. A row ends with <|assistant_end|> or
        <|bos|>, which is yielded. filters: top_p, min_p.
        """
        # Each row has a seed of its own
        rows = []
        for i in range(num_samples):
            sampling = Sampling(temperature, top_k, seed=f"{seed}:{i}", **filters)
            rows.append(self.make_row(tokens, sampling, max_tokens))

        padding = (self.tokenizer.get_bos_token_id(), 0)
        with self._decoder(rows, num_samples) as decoder:
            logits = decoder.read_prompt(list(tokens))
            for row in rows:
                decoder.admit(row, logits)
            while decoder.rows:
                emitted = {}
                for row, token, mask in decoder.step():
                    emitted[id(row)] = (token, mask)
                # In the order of the samples
                column = [emitted.get(id(row), padding) for row in rows]
                yield [token for token, _ in column], [mask for _, mask in column]

    def generate_batch(self, tokens, num_samples=1, **settings):
        """
        (sequences, masks) of num_samples whole continuations, each with its prompt (mask 0) and
        without the token that ended it.
        """
        # Every sequence starts with the prompt
        sequences = [list(tokens) for _ in range(num_samples)]
        masks = [[0] * len(tokens) for _ in range(num_samples)]
        done = [False] * num_samples
        # Padding after a row's end has mask 0, so `done` is remembered
        for column, column_masks in self.generate(tokens, num_samples, **settings):
            for i, (token, mask) in enumerate(zip(column, column_masks, strict=True)):
                done[i] = done[i] or (mask == 1 and token in self.stop_tokens)
                if not done[i]:
                    sequences[i].append(token)
                    masks[i].append(mask)
        return sequences, masks

    def generate_rows(self, rows, num_rows=32):
        """
        Run any number of rows (see make_row) to their end, num_rows of them at a time: when one
        ends, the next one starts. Yields each row when it has ended. Equal prompts next to each
        other are read once.

        A row with its seed gives the same tokens again, also after other rows and on another number
        of threads. Beside other rows its sums may be rounded differently than alone. Where two
        tokens are about equally likely, its text may then differ (dev/log/2026-11-30-split.md).
        """
        waiting = deque(rows)
        num_rows = max(1, min(num_rows, len(rows)))
        prompt = None
        logits = None  # after the prompt
        with self._decoder(rows, num_rows) as decoder:
            while waiting or decoder.rows:
                # Fill the free slots
                while waiting and len(decoder.rows) < num_rows:
                    row = waiting.popleft()
                    # its keys and values stay in the staging cache
                    if row.prompt != prompt:
                        logits = decoder.read_prompt(row.prompt)
                        prompt = row.prompt
                    decoder.admit(row, logits)
                for row, _, _ in decoder.step():
                    if row.finish_reason:
                        yield row


# -----------------------------------------------------------------------------
# Prompts


def fit_conversation(tokenizer, messages, max_prompt):
    """
    (prompt ids, number of messages left out) for {role, content} messages, of which an assistant's
    last one is continued. While the prompt is longer than max_prompt tokens, the oldest question
    and all that followed it are left out. The system messages at the start and the newest question
    always stay.
    """
    # The system messages at the start, if there are any, then the others
    system = list(takewhile(lambda message: message["role"] in SYSTEM_ROLES, messages))
    rest = messages[len(system) :]

    def render(start):
        conversation = {"messages": system + rest[start:]}
        return tokenizer.render_for_completion(conversation, continue_final_message=True)

    ids = render(0)  # also refuses an invalid conversation
    if len(ids) <= max_prompt:
        return ids, 0

    # The first start whose prompt fits, else the newest question
    starts = sorted({0, *question_starts(rest)})
    place = bisect_left(starts[:-1], True, key=lambda start: len(render(start)) <= max_prompt)
    start = starts[place]
    ids = render(start)
    if len(ids) > max_prompt:
        with_system = " with the system message" if system else ""
        raise PromptTooLong(
            f"the newest message takes {len(ids)} tokens{with_system}; {max_prompt} fit"
        )
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


def complete_prompts(engine):
    """[{prompt, text}]: greedy completions of those PROMPTS that fit in the context."""
    # greedy, so that only the model changes between two looks
    samples = []
    for prompt in PROMPTS:
        tokens = engine.tokenizer(prompt, prepend="<|bos|>")
        if len(tokens) >= engine.model.config.sequence_len:
            continue
        (sequence,), _ = engine.generate_batch(tokens, max_tokens=32, temperature=0)
        text = engine.tokenizer.decode(sequence[1:])  # without <|bos|>
        samples.append({"prompt": prompt, "text": text})
    return samples


def answer_messages(engine, messages, max_tokens):
    """
    [{prompt, text}]: greedy answers to those messages that fit in the context, each one a
    conversation of its own. A text holds the calls of the calculator with their results.
    """
    samples = []
    for message in messages:
        conversation = {"messages": [{"role": "user", "content": message}]}
        tokens = engine.tokenizer.render_for_completion(conversation)
        if len(tokens) >= engine.model.config.sequence_len:
            continue
        (sequence,), _ = engine.generate_batch(tokens, max_tokens=max_tokens, temperature=0)
        text = engine.tokenizer.decode(sequence[len(tokens) :])
        samples.append({"prompt": message, "text": text})
    return samples
