"""
Continuous batching: requests for a model are decoded together, by one thread per device.

A `Request` waits in the queue of its model. Its prompt is read in chunks between the decoding
steps of the others (chunked prefill). Then its row joins the batch, until it ends, fails or is
cancelled. A `Scheduler` does this for one model. A `Batcher` is the thread of one device: it steps
the schedulers of all models there, so that an event loop never waits for a model. HTTP is in
service.py.

Batching by the step is from Orca (Yu et al., OSDI 2022), reading prompts in chunks from Sarathi
(arXiv 2308.16369).
"""

import codecs
import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from nanochat.common import compiles
from nanochat.conversation import PART_AFTER
from nanochat.decoder import Decoder, Row
from nanochat.inference import compile_decoding
from nanochat.streaming import TextStream, split_at_stop

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """Requests are refused: too many are waiting, or the server is stopping."""


@dataclass
class Event:
    """Something that happened to a request: more text, its end, or an error."""
    request: "Request"
    text: str = ""
    kind: str = "text"                # 'text', 'python', 'python_output'; 'prompt' is its echo
    # [(token id, entry of top_logprobs, start of the token in the whole text)]
    logprobs: list = field(default_factory=list)
    finish_reason: str | None = None  # 'stop' or 'length'
    error: str | None = None


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
    queue: Any = None            # where the events go: the asyncio.Queue of a response
    cancelled: bool = False      # set by the event loop; the row is freed within a step

    def __post_init__(self):
        self.text_stream = TextStream(self.tokenizer)
        self.kind = "text"         # of the block that the newest token belongs to
        self.held = ""             # text not sent yet
        self.num_sent = 0          # characters sent so far
        self.held_logprobs = []    # as Event.logprobs
        self.prefill = None        # the generator that reads the prompt, if it is read alone
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
    def scores_prompt(self):
        """Whether the log-probabilities of the prompt are needed."""
        return self.echo is not None and self.row.num_top is not None

    def echo_event(self):
        """The prompt as an event. Its first token has no log-probability."""
        self.num_sent = len(self.echo)
        event = Event(self, self.echo, "prompt")
        if self.scores_prompt:
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

        self.waiting = deque()  # requests in order of arrival
        self.running = {}       # row -> request, those in the batch
        self.events = []        # since the last take_events

    def warm_up(self):
        """On a GPU, compile and record the steps, which takes seconds. Returns the scheduler."""
        if compiles(self.engine.model.device):
            compile_decoding(self.engine.model)
            self.decoder.warm_up()
        return self

    @property
    def busy(self):
        return bool(self.waiting or self.running)

    def take_events(self):
        events = self.events
        self.events = []
        return events

    # -- a step

    def admit(self):
        """Read waiting prompts while rows are free, and let their rows join the batch."""
        self.waiting = deque(request for request in self.waiting if not request.cancelled)
        budget = self.chunk
        while budget > 0 and self.waiting and self.decoder.num_free:
            short = self._find_short_prompts(budget)
            if len(short) > 1:
                budget -= self._prefill_together(short)
            else:
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
        for request in self.waiting:
            request.prefill = None  # begins anew

    def end_all(self, reason):
        """End all requests with an error."""
        self._send_error([*self.running.values(), *self.waiting], reason)
        self.running.clear()
        self.waiting.clear()

    # -- parts of a step

    def _find_short_prompts(self, budget):
        """The first waiting requests whose prompts, padded to one length, fit in the budget."""
        short = []
        longest = 0
        most = min(self.decoder.num_free, self.decoder.SHORT_PROMPTS)
        for request in islice(self.waiting, most):
            longest = max(longest, len(request.row.prompt))
            fits = (len(short) + 1) * longest <= budget
            # read alone: a prompt that has begun, that failed with others, or that is scored
            if request.prefill or request.scores_prompt or not fits:
                break
            short.append(request)
        return short

    def _prefill_together(self, requests):
        """Read the first waiting prompts in one forward pass. Returns the number of tokens read."""
        prompts = [request.row.prompt for request in requests]
        try:
            logits = self.decoder.prefill_short(prompts)
        except Exception:  # reading them one by one will show which one is the reason
            for request in requests:
                request.prefill = self._start_prefill(request)
            return 0

        for i, request in enumerate(requests):
            self.waiting.popleft()
            self._join_batch(request, logits[i], i)
        return sum(map(len, prompts))

    def _prefill_block(self):
        """
        Read a block of the first waiting prompt. After the last block its row joins the batch.
        Returns the number of tokens read.
        """
        request = self.waiting[0]
        num_read = 0
        try:
            request.prefill = request.prefill or self._start_prefill(request)
            num_read, logits = next(request.prefill)
            if logits is None:
                return num_read
            self._join_batch(request, logits)
        except Exception as error:  # this prompt cannot be read; the others can
            self._fail([request], error)
        self.waiting.popleft()
        return num_read

    def _start_prefill(self, request):
        """A generator that reads the prompt of a request: see Decoder.prefill."""
        request.prompt_logprobs = []
        scores = request.prompt_logprobs if request.scores_prompt else None
        row = request.row
        return self.decoder.prefill(row.prompt, scores, row.num_top or 1)

    def _join_batch(self, request, logits, short=None):
        """Start decoding after a prompt (short: its number in prefill_short). Sends the echo."""
        row = request.row
        try:
            if request.echo is not None:
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
        reason = f"generation failed ({type(error).__name__}); the server's log has the details"
        self._send_error(requests, reason)

    def _send_error(self, requests, reason):
        self.events.extend(Event(request, error=reason) for request in requests)


# -----------------------------------------------------------------------------
# One device


class Batcher(threading.Thread):
    """
    The thread that decodes for all models of one device. It calls `load()`, which returns {name:
    Scheduler}, and `deliver(events)` with lists of events. Any thread may call `submit` and `stop`.
    """

    def __init__(self, load, deliver, max_waiting):
        super().__init__(name="batcher", daemon=True)
        self.load = load
        self.deliver = deliver
        self.max_waiting = max_waiting
        self.schedulers = {}
        self.inbox = []       # [(model name, request)] that no scheduler has yet
        self.loaded = threading.Event()
        self.error = None     # why loading failed
        self.deadline = None  # set by `stop`: work goes on until then
        self._changed = threading.Condition()

    @property
    def num_running(self):
        return sum(len(scheduler.running) for scheduler in self.schedulers.values())

    @property
    def num_waiting(self):
        in_queues = sum(len(scheduler.waiting) for scheduler in self.schedulers.values())
        return len(self.inbox) + in_queues

    @property
    def num_rows(self):
        return sum(scheduler.num_rows for scheduler in self.schedulers.values())

    def submit(self, name, requests):
        """Queue requests for a model, all or none. Raises QueueFull."""
        with self._changed:
            if self.deadline is not None or self.num_waiting >= self.max_waiting:
                raise QueueFull
            self.inbox.extend((name, request) for request in requests)
            self._changed.notify()

    def stop(self, grace_s):
        """
        Go on for at most grace_s seconds with the requests there are, then end. Does not wait.
        """
        with self._changed:
            self.deadline = time.monotonic() + grace_s
            self._changed.notify()

    def run(self):
        try:
            self.schedulers = self.load()
        except Exception as error:  # reported by those who wait for `loaded`
            self.error = error
        self.loaded.set()

        while self._wait_for_work():
            for scheduler in self.schedulers.values():
                if scheduler.busy:
                    self._step(scheduler)

        for scheduler in self.schedulers.values():
            scheduler.end_all("the server is shutting down")
            self.deliver(scheduler.take_events())

    @property
    def _busy(self):
        return any(scheduler.busy for scheduler in self.schedulers.values())

    def _wait_for_work(self):
        """Sleep until there is work, and give it to the schedulers. False: it is time to end."""
        with self._changed:
            # `submit` and `stop` wake this thread up
            while not self.inbox and not self._busy and self.deadline is None:
                self._changed.wait()
            for name, request in self.inbox:
                self.schedulers[name].waiting.append(request)
            self.inbox.clear()

        # after `stop` work goes on while there is some and time is left
        if self.deadline is None:
            return True
        return self._busy and time.monotonic() < self.deadline

    def _step(self, scheduler):
        try:
            scheduler.admit()
            scheduler.pick()
            # clients get this step's text while the model computes the next logits
            self.deliver(scheduler.take_events())
            scheduler.forward()
        except Exception as error:  # out of memory, for example
            scheduler.fail_batch(error)
            self.deliver(scheduler.take_events())
