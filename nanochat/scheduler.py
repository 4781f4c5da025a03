"""
Continuous batching: requests for a model are decoded together.

A `Request` waits in the queue of its model. Its prompt is read in chunks between the decoding
steps of the others (chunked prefill). Then its row joins the batch, until it ends, fails or is
cancelled. A `Scheduler` does this for one model, without a thread: batcher.py has that.

Clients share the rows evenly. If all rows are taken and a client with fewer of them waits, the
client with the most rows gives one back. Its request waits again; later its prompt and the tokens
it has so far are read once more, and it goes on where it was (preemption by recomputing).

Batching by the step is from Orca (Yu et al., OSDI 2022), reading prompts in chunks from Sarathi
(arXiv 2308.16369), preemption by recomputing from vLLM (arXiv 2309.06180).
"""

import codecs
import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nanochat.common import compiles
from nanochat.conversation import PART_AFTER
from nanochat.decoder import Decoder, Row
from nanochat.fair_queue import FairQueue
from nanochat.inference import compile_decoding, matmul_sizes
from nanochat.streaming import TextStream, split_at_stop

log = logging.getLogger(__name__)


class RequestFailed(Exception):
    """Why a request ended without a whole answer."""


class ShuttingDown(RequestFailed):
    """The time that requests had after the server was told to stop is over."""


@dataclass
class Event:
    """Something that happened to a request: more text, its end, or an error."""
    request: "Request"
    text: str = ""
    kind: str = "text"                # 'text', 'python', 'python_output'; 'prompt' is its echo
    # [(token id, entry of top_logprobs, start of the token in the whole text)]
    logprobs: list = field(default_factory=list)
    finish_reason: str | None = None  # 'stop' or 'length'
    error: RequestFailed | None = None


# -----------------------------------------------------------------------------
# One request: from tokens to events


@dataclass(eq=False)
class Request:
    """
    One prompt and its completion. The decoder appends tokens to `row`, and `new_events` turns each
    token into events. Text that may be the beginning of a stop string is held back.
    """
    row: Row                     # prompt, sampling parameters, limits, and the tokens so far
    tokenizer: Any
    index: int = 0               # of the completion, in a response with several
    stops: tuple[str, ...] = ()  # strings that end the text, which then ends before them
    echo: str | None = None      # text of the prompt, to be sent before the completion
    client: str = ""             # who asks; clients take turns
    queue: Any = None            # where the events go: the asyncio.Queue of a response
    cancelled: bool = False      # set by the event loop; the row is freed within a step

    def __post_init__(self):
        self.text_stream = TextStream(self.tokenizer)
        self.kind = "text"         # of the block that the newest token belongs to
        self.held = ""             # text not sent yet
        self.num_sent = 0          # characters sent so far
        self.held_logprobs = []    # as Event.logprobs
        self.alone = False         # whether its prompt is read alone, since it failed with others
        self.prompt_logprobs = []  # entries of top_logprobs for all prompt tokens but the first
        self.held_events = []      # of an answer that may be a call: see ChatResponse

        # without tools there are no blocks, only text
        self.block_kinds = {}
        if self.row.tool is not None:
            for name, kind in PART_AFTER.items():
                self.block_kinds[self.tokenizer.encode_special(name)] = kind

    @property
    def may_be_call(self):
        """Whether the answer, as far as it is known, may be a call of a client's function."""
        constraint = self.row.constraint
        return constraint is not None and constraint.active and bool(constraint.functions)

    def read_call(self, text):
        """(name, arguments) if a whole answer is a call of a client's function, else None."""
        return self.row.constraint.read_call(text) if self.may_be_call else None

    @property
    def ids(self):
        """What has to be read before the next token: the prompt, and the tokens so far."""
        return self.row.prompt + self.row.tokens

    @property
    def needs_echo(self):
        """Whether the prompt is still to be sent."""
        return self.echo is not None and not self.row.tokens

    @property
    def scores_prompt(self):
        """Whether the log-probabilities of the prompt are needed."""
        return self.needs_echo and self.row.num_top is not None

    def echo_event(self):
        """The prompt as an event. Its first token has no log-probability."""
        self.num_sent = len(self.echo)
        event = Event(self, self.echo, "prompt")
        if self.row.num_top is not None:
            # the echo of a text lacks its <|bos|>, which therefore begins before 0
            prompt = self.row.prompt
            start = len(self.echo) - len(self.tokenizer.decode(prompt))
            utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
            for token, entry in zip(prompt, [None, *self.prompt_logprobs], strict=True):
                event.logprobs.append((token, entry, max(0, start)))
                start += len(utf8.decode(self.tokenizer.decode_bytes([token])))
        return event

    def new_events(self):
        """The events of the row's newest token. Sets row.finish_reason at a stop string."""
        row = self.row
        token = row.tokens[-1]
        events = []

        # tokens that a tool forces (mask 0) were not chosen by the model
        if row.num_top is not None and row.mask[-1]:
            start = self.num_sent + len(self.held)
            self.held_logprobs.append((token, row.logprobs[-1], start))

        # a block begins or ends: text that is held belongs to the block before
        if token in self.block_kinds:
            events += self._release_all()
            self.kind = self.block_kinds[token]
        else:
            self.held += self.text_stream.feed(token)

        # stop strings count in the answer's own text, not in tool calls
        stops = self.stops if self.kind == "text" else ()
        ready, _, found = split_at_stop(self.held, stops)
        events += self._release(len(ready))
        if found:
            row.finish_reason = "stop"
        elif row.finish_reason:
            events += self._release_all()

        if row.finish_reason:
            events.append(Event(self, finish_reason=row.finish_reason))
        return events

    def _release(self, num_chars):
        """[the event with num_chars of the held text and the tokens that begin there], or []."""
        # held_logprobs is in order of the starts
        end = self.num_sent + num_chars
        logprobs = [entry for entry in self.held_logprobs if entry[2] < end]
        self.held_logprobs = self.held_logprobs[len(logprobs):]

        text = self.held[:num_chars]
        self.held = self.held[num_chars:]
        self.num_sent += len(text)
        return [Event(self, text, self.kind, logprobs)] if text or logprobs else []

    def _release_all(self):
        # an unfinished character becomes U+FFFD
        self.held += self.text_stream.flush()
        # + 1: tokens without text, such as the end token, begin where the text ends
        return self._release(len(self.held) + 1)


# -----------------------------------------------------------------------------
# One model: its waiting queue and its batch


class Scheduler:
    """
    The queue and the batch of one model. A step is `admit` (prompts are read, rows join the batch),
    `pick` (every row gets a token), and `forward` (the logits of the next tokens). Events collect
    in `events`. Needs no thread.

    `admit` reads about `chunk` tokens, and always fewer than twice as many, so that long prompts do
    not delay the batch.
    """

    def __init__(self, engine, num_rows, chunk):
        self.engine = engine
        self.num_rows = num_rows
        self.chunk = chunk

        # on a GPU the whole cache at once: if it grew, its steps would have to be recorded again,
        # and all requests would wait
        model = engine.model
        length = model.config.sequence_len if model.device.type == "cuda" else 256
        self.decoder = Decoder(model, num_rows, length=length)
        self.decoder.block = min(chunk, self.decoder.block)

        self.waiting = FairQueue()
        self.reading = None  # the request whose prompt is being read in chunks
        self.prefill = None  # the generator that reads it
        self.running = {}    # row -> request, those in the batch
        self.events = []     # since the last take_events

    def warm_up(self, matmul_sizes=matmul_sizes):
        """
        Do before anybody waits what takes seconds: on a GPU compile and record the steps, on a CPU
        let oneDNN make its code for all numbers of tokens. Returns the scheduler. matmul_sizes: see
        inference.py.
        """
        model = self.engine.model
        if compiles(model.device):
            compile_decoding(model)
            self.decoder.warm_up()

        longest = min(self.chunk, self.decoder.max_length - 1)
        for num_tokens in matmul_sizes(model, longest):
            prompt = [0] * min(num_tokens, longest)
            if num_tokens > self.decoder.block:  # as many as several short prompts have
                self.decoder.prefill_short([prompt])
                continue
            # with scores all tokens go through the last matmul too
            for _ in self.decoder.prefill(prompt, scores=[]):
                pass
        return self

    @property
    def busy(self):
        return bool(self.waiting or self.running or self.reading)

    def num_waiting(self):
        """Requests without a row by client, a Counter."""
        counts = self.waiting.num_by_client()
        if self.reading:
            counts[self.reading.client] += 1
        return counts

    def take_events(self):
        events = self.events
        self.events = []
        return events

    # -- a step

    def admit(self):
        """Read waiting prompts while there are rows for them, and let their rows join the batch."""
        self.waiting.drop_cancelled()
        if self.reading and self.reading.cancelled:
            self._stop_reading()

        budget = self.chunk
        while budget > 0 and self._has_row():
            short = [] if self.reading else self._take_short_prompts()
            if len(short) > 1:
                budget -= self._prefill_together(short)
            else:
                self.reading = self.reading or short[0]
                budget -= self._prefill_block()

    def pick(self):
        """Choose the next token of every row."""
        for row, _, _ in self.decoder.pick():
            request = self.running[row]
            try:
                self.events += request.new_events()
            except Exception as error:  # the other rows go on
                self._fail([request], error)
                row.finish_reason = "error"

            if row.finish_reason or request.cancelled:
                del self.running[row]
                # the decoder sees neither stop strings nor cancellations
                if row in self.decoder.rows:
                    self.decoder.release(row)

    def forward(self):
        """Compute the logits of the next tokens: the long part of a step."""
        self.decoder.forward()

    def fail_batch(self, error):
        """
        End all rows after a failed step, since any of them may be the reason. Waiting requests
        stay.
        """
        self._fail(self.running.values(), error)
        self.running.clear()
        self.decoder.reset()  # allocates nothing, since memory may be what ran out
        self.prefill = None   # begins anew

    def end_all(self, reason):
        """End all requests with an error, a RequestFailed."""
        requests = [*self.running.values(), *self.waiting]
        if self.reading:
            requests.append(self.reading)
        self._send_error(requests, reason)
        self.running.clear()
        self.waiting.clear()
        self._stop_reading()

    def shrink(self):
        """Give back the memory of caches that have grown. There must be no rows."""
        self.decoder.shrink()

    # -- parts of a step

    def _has_row(self):
        """Whether there is a request to be read, and a row for it. Others may have to give one."""
        if self.reading:
            return True  # a row has been free since the reading began
        if not self.waiting:
            return False
        return bool(self.decoder.num_free) or self._preempt()

    def _rows_by_client(self):
        return Counter(request.client for request in self.running.values())

    def _preempt(self):
        """
        Free a row of the client that has the most, if the next request's client has at least two
        fewer. So both get closer, and a row never goes back and forth. Returns whether it did.
        """
        num_rows = self._rows_by_client()
        newcomer = self.waiting.peek(num_rows).client
        client, most = num_rows.most_common(1)[0]
        if most - num_rows[newcomer] < 2:
            return False

        # the one that costs the least to be read again
        requests = [request for request in self.running.values() if request.client == client]
        shortest = min(requests, key=lambda request: len(request.ids))
        del self.running[shortest.row]
        self.decoder.release(shortest.row)
        self.waiting.put_back(shortest)
        return True

    def _take_short_prompts(self):
        """
        The next waiting requests, at least one, whose prompts fit in a chunk when padded to one
        length. They leave the queue. It is a whole chunk, however much this step has read already:
        the rest of one holds one or two prompts, and reading those takes half as long as a chunk.
        """
        num_rows = self._rows_by_client()
        most = min(self.decoder.num_free, self.decoder.SHORT_PROMPTS)
        taken = []
        longest = 0
        while self.waiting and len(taken) < most:
            request = self.waiting.peek(num_rows)
            longest = max(longest, len(request.ids))
            fits = (len(taken) + 1) * longest <= self.chunk
            # read alone: a prompt that failed with others, or that is scored
            is_alone = request.alone or request.scores_prompt or not fits
            if taken and is_alone:
                break
            taken.append(self.waiting.pop(num_rows))
            num_rows[request.client] += 1
            if is_alone:
                break
        return taken

    def _prefill_together(self, requests):
        """Read several prompts in one forward pass. Returns the number of tokens read."""
        prompts = [request.ids for request in requests]
        try:
            logits = self.decoder.prefill_short(prompts)
        except Exception:  # reading them one by one will show which one is the reason
            for request in reversed(requests):
                request.alone = True
                self.waiting.put_back(request)
            return 0

        for i, request in enumerate(requests):
            self._join_batch(request, logits[i], i)
        return sum(map(len, prompts))

    def _prefill_block(self):
        """
        Read a block of one prompt. After the last block its row joins the batch. Returns the number
        of tokens read.
        """
        request = self.reading
        num_read = 0
        try:
            self.prefill = self.prefill or self._start_prefill(request)
            num_read, logits = next(self.prefill)
            if logits is None:
                return num_read
            self._join_batch(request, logits)
        except Exception as error:  # this prompt cannot be read; the others can
            self._fail([request], error)
        self._stop_reading()
        return num_read

    def _stop_reading(self):
        self.reading = None
        self.prefill = None

    def _start_prefill(self, request):
        """A generator that reads the prompt of a request: see Decoder.prefill."""
        request.prompt_logprobs = []
        scores = request.prompt_logprobs if request.scores_prompt else None
        return self.decoder.prefill(request.ids, scores, request.row.num_top or 1)

    def _join_batch(self, request, logits, short=None):
        """Start decoding after a prompt (short: its number in prefill_short). Sends the echo."""
        row = request.row
        try:
            if request.needs_echo:
                self.events.append(request.echo_event())
            if row.max_tokens:
                self.decoder.admit(row, logits, short)
                self.running[row] = request
            else:  # the request is for the echo alone
                self.events.append(Event(request, finish_reason="length"))
        except Exception as error:  # no memory for a longer cache, for example
            self._fail([request], error)

    def _fail(self, requests, error):
        log.error("generation failed", exc_info=error)
        name = type(error).__name__
        reason = RequestFailed(f"generation failed ({name}); the server's log has the details")
        self._send_error(requests, reason)

    def _send_error(self, requests, reason):
        self.events.extend(Event(request, error=reason) for request in requests)
