"""
Serving models to many at once: a thread per device that decodes for everybody.

A `Lane` is one model with its rows. Choices (answers to be written) wait, are read in chunks between the steps of the
others, decode together, and leave when they end or when their call is cancelled. A `DecodeThread` runs the lanes of
one device and hands out events, so that an event loop never waits for a model. The web side is service.py.
"""

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from nanochat.common import compiles
from nanochat.engine import Decoder, Row
from nanochat.inference import compile_decoding
from nanochat.streaming import TextStream, split_at_stop

log = logging.getLogger(__name__)
BLOCKS = {"python_start": "python", "python_end": "text", "output_start": "python_output", "output_end": "text"}


class QueueFull(Exception):
    """No choice is taken: as many wait as may wait, or the thread is to end."""


@dataclass(eq=False)
class Call:
    """What one caller asked for: `queue` is where its events go, `cancelled` frees its rows within a step."""
    queue: Any = None
    cancelled: bool = False


@dataclass
class Event:
    """Something that happened to a choice: more text, its end, or an error."""
    index: int                        # of the choice within its call
    text: str = ""
    kind: str = "text"                # 'text'; 'python', 'python_output': a tool call; 'prompt': its scores
    scores: list = field(default_factory=list)  # [(token id, entry of top_logprobs)] of the tokens that this text is of
    num_tokens: int = 0               # generated so far
    finish_reason: str | None = None
    error: str | None = None


# -----------------------------------------------------------------------------
# One answer


@dataclass(eq=False)
class Choice(Row):
    """A row that turns its tokens into events. Stop strings end it; the text then ends before them."""
    tokenizer: Any = None
    call: Call | None = None
    index: int = 0
    stops: tuple[str, ...] = ()
    prompt_scores: list | None = None  # a list: what the model thought of the prompt is wanted as well

    def __post_init__(self):
        super().__post_init__()
        self.kind, self.held, self.held_scores = "text", "", []  # held_scores: [(start of the token in held, score)]
        self.stream = TextStream(self.tokenizer)
        names = BLOCKS if self.tool is not None else {}  # without tools all is text
        self.blocks = {self.tokenizer.encode_special(f"<|{name}|>"): names[name] for name in names}

    def feed(self):
        """The events of the newest token; sets finish_reason where it completes a stop string."""
        token, events = self.tokens[-1], []
        if self.num_top is not None and self.mask[-1]:  # what a tool forces, the model did not choose
            self.held_scores.append((len(self.held), (token, self.logprobs[-1])))
        if token in self.blocks:  # a block of a tool call opens or closes
            events += self._emit(self.held + self.stream.flush(), "")
            self.kind = self.blocks[token]
        else:
            self.held += self.stream.feed(token)
        if self.finish_reason:
            self.held += self.stream.flush()
        ready, held, found = split_at_stop(self.held, self.stops) if self.kind == "text" else (self.held, "", False)
        if found:
            self.finish_reason = "stop"
        elif self.finish_reason:
            ready, held = self.held, ""
        events += self._emit(ready, held, whole=bool(self.finish_reason) and not found)
        if self.finish_reason:
            events.append(Event(self.index, num_tokens=len(self.tokens), finish_reason=self.finish_reason))
        return events

    def _emit(self, ready, held, whole=True):
        """The event that shows `ready`, with the scores of the tokens that begin in it (whole: of all tokens)."""
        scores = [score for start, score in self.held_scores if start < len(ready) or whole]
        self.held_scores = [] if whole else [(start - len(ready), score) for start, score in self.held_scores
                                             if start >= len(ready)]
        self.held = held
        if not (ready or (whole and scores)):
            return []
        return [Event(self.index, ready, self.kind, scores, len(self.tokens))]


# -----------------------------------------------------------------------------
# One model


class Lane:
    """
    One model and those who talk to it. A turn reads about `chunk` tokens of waiting prompts (fewer than twice as many),
    so that a long prompt does not stall the others, and gives every row a token. Needs no thread of its own.
    """

    def __init__(self, engine, num_rows, chunk):
        self.engine, self.num_rows, self.chunk = engine, num_rows, chunk
        # on a GPU all memory at once: a cache that grows must have its steps recorded again, while everybody waits
        length = engine.model.config.sequence_len if engine.model.device.type == "cuda" else 256
        self.decoder = Decoder(engine.model, num_rows, length=length)
        self.waiting = deque()  # choices, in order of arrival
        self.reading = None     # the prefill of waiting[0] under way
        self.num_alone = 0      # so many of those that wait are read one by one, after reading them together failed

    def prepare(self):
        """What a GPU needs seconds for at first, before anybody waits for it. Returns the lane."""
        if compiles(self.engine.model.device):
            compile_decoding(self.engine.model)
            self.decoder.warm_up()
        return self

    @property
    def busy(self):
        return bool(self.waiting or self.decoder.rows)

    def turn(self, events):
        """Let rows go and come, and choose everybody's next token: adds (call, Event) pairs to `events`."""
        self._drop_cancelled()
        budget = self.chunk
        while budget > 0 and self.waiting and self.decoder.num_free:
            short = self._short_prompts(budget)
            budget -= self._read_short(short, events) if len(short) > 1 else self._read(events)
        for choice, _, _ in self.decoder.pick():
            try:
                events += [(choice.call, event) for event in choice.feed()]
            except Exception as error:  # one choice that cannot be told must not end the others
                self._fail([choice], error, events)
                choice.finish_reason = "error"
            if choice.finish_reason and choice in self.decoder.rows:  # by a stop string, which the decoder cannot see
                self.decoder.release(choice)

    def forward(self):
        """The logits for the next turn: the long part of a step, after this one's events are on their way."""
        self.decoder.forward()

    def fail(self, error, events):
        """A step went wrong: nobody can tell whose fault it was, so all rows end; those waiting are served after it."""
        self._fail(self.decoder.rows, error, events)
        self.decoder.reset()  # allocates nothing, for memory may be what ran out
        self.reading = None

    def end(self, reason, events):
        """End everything, saying why."""
        events += [(choice.call, Event(choice.index, error=reason)) for choice in [*self.decoder.rows, *self.waiting]]
        self.decoder.rows.clear()
        self.waiting.clear()

    def _drop_cancelled(self):
        for choice in [row for row in self.decoder.rows if row.call.cancelled]:
            self.decoder.release(choice)
        if self.waiting and self.waiting[0].call.cancelled:
            self.reading = None
        if any(choice.call.cancelled for choice in self.waiting):
            self.waiting = deque(choice for choice in self.waiting if not choice.call.cancelled)

    def _short_prompts(self, budget):
        """Those of the first waiting choices that can be read in one go: filled up to one length, within the budget."""
        short, longest = [], 0
        if self.reading is None and not self.num_alone:
            for choice in islice(self.waiting, min(self.decoder.num_free, self.decoder.SHORT_PROMPTS)):
                longest = max(longest, len(choice.prompt))
                if choice.prompt_scores is not None or (len(short) + 1) * longest > budget:
                    break
                short.append(choice)
        return short

    def _read_short(self, short, events):
        """Read these prompts at once, and let their choices start. Returns tokens read."""
        try:
            logits = self.decoder.prefill_short([choice.prompt for choice in short])
        except Exception:  # the trouble of one of them: it will show which
            self.num_alone = len(short)
            return 0
        for i, choice in enumerate(short):
            self.waiting.popleft()
            self._start(choice, logits[i], events, i)
        return sum(len(choice.prompt) for choice in short)

    def _read(self, events):
        """Read a chunk of the first waiting prompt, and let the choice start after the last. Returns tokens read."""
        choice, num_read = self.waiting[0], 0
        try:
            if self.reading is None:
                if choice.prompt_scores:
                    choice.prompt_scores.clear()  # a second attempt
                self.reading = self.decoder.prefill(choice.prompt, self.chunk, choice.prompt_scores,
                                                    choice.num_top or 1)
            num_read, logits = next(self.reading)
            if logits is None:
                return num_read
            self._start(choice, logits, events)
        except Exception as error:  # this prompt's own trouble
            self._fail([choice], error, events)
        self.waiting.popleft()
        self.reading, self.num_alone = None, max(0, self.num_alone - 1)
        return num_read

    def _start(self, choice, logits, events, short=None):
        if choice.prompt_scores is not None:
            scores = [(choice.prompt[0], None), *zip(choice.prompt[1:], choice.prompt_scores, strict=True)]
            events.append((choice.call, Event(choice.index, kind="prompt", scores=scores)))
        if choice.max_tokens:
            self.decoder.admit(choice, logits, short)
        else:  # only the scores were wanted
            events.append((choice.call, Event(choice.index, finish_reason="length")))

    def _fail(self, choices, error, events):
        log.error("generation failed", exc_info=error)
        reason = f"generation failed ({type(error).__name__}); the server's log has the details"
        events += [(choice.call, Event(choice.index, error=reason)) for choice in choices]


# -----------------------------------------------------------------------------
# One device


class DecodeThread(threading.Thread):
    """
    Decodes for all models of one device. `load()` makes {name: Lane} in this thread; `deliver(events)` is called in
    it with lists of (call, Event). `submit` may be called from any thread.
    """

    def __init__(self, load, deliver, max_waiting):
        super().__init__(name="decode", daemon=True)
        self.load, self.deliver, self.max_waiting = load, deliver, max_waiting
        self.lanes, self.inbox = {}, []  # inbox: [(name, choices)] on their way to a lane
        self.loaded, self.error = threading.Event(), None
        self.deadline = None             # set by `stop`: work goes on until then
        self._changed = threading.Condition()

    @property
    def num_running(self):
        return sum(len(lane.decoder.rows) for lane in self.lanes.values())

    @property
    def num_waiting(self):
        return sum(len(lane.waiting) for lane in self.lanes.values()) + sum(len(c) for _, c in list(self.inbox))

    def submit(self, name, choices):
        """
        Queue the choices of a call for a model. A call comes in whole or, when the queue is full or the thread is to
        end, not at all.
        """
        with self._changed:
            if self.deadline is not None or self.num_waiting >= self.max_waiting:
                raise QueueFull
            self.inbox.append((name, choices))
            self._changed.notify()

    def stop(self, grace_s):
        """Finish what is under way for at most grace_s seconds, then end it. Does not wait; `join` does."""
        with self._changed:
            self.deadline = time.monotonic() + grace_s
            self._changed.notify()

    def run(self):
        try:
            self.lanes = self.load()
        except Exception as error:  # told by whoever watches `loaded`
            self.error = error
        self.loaded.set()
        while self._wait_for_work():
            for lane in self.lanes.values():
                if lane.busy:
                    self._turn(lane)
        for lane in self.lanes.values():
            events = []
            lane.end("the server is shutting down", events)
            self.deliver(events)

    def _wait_for_work(self):
        """Sleep until there is work; False when it is time to end."""
        with self._changed:
            while not (self.inbox or self.deadline is not None or any(lane.busy for lane in self.lanes.values())):
                self._changed.wait()
            for name, choices in self.inbox:
                self.lanes[name].waiting.extend(choices)
            self.inbox.clear()
        busy = any(lane.busy for lane in self.lanes.values())
        return self.deadline is None or (busy and time.monotonic() < self.deadline)

    def _turn(self, lane):
        events = []
        try:
            lane.turn(events)
            self.deliver(events)
            events = []
            lane.forward()
        except Exception as error:  # out of memory, say: those who wait are still served
            lane.fail(error, events)
        if events:
            self.deliver(events)
