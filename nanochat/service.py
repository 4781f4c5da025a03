"""
The web side of serving: models by name, from a request to choices, and from their events to a response.

A `Service` belongs to one event loop and feeds the decode threads, one a device. Nothing here waits for a model: what
takes time happens in a decode thread (generation) or in a worker thread (tokenizing).
"""

import asyncio
import gc
import json
import secrets
import time
from contextlib import aclosing
from functools import partial

import prometheus_client
from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse

from nanochat.engine import fit_conversation
from nanochat.protocol import ChatReply, TextReply, error_body
from nanochat.sampling import Sampling
from nanochat.serving import Call, Choice, DecodeThread, Event, QueueFull
from nanochat.streaming import ToolState

PING_S = 15   # a comment on streams every so often, so that no proxy takes them for dead
GONE = "The client has gone"
GRACE_S = 20  # open streams may finish for so long when the server is told to stop

# -----------------------------------------------------------------------------
# The models, and the way to them


class Service:
    """
    Models by name, one decode thread per device. `load(i)` makes the {name: Lane} of device i, in its thread. Lives
    on one event loop, from `start` to `stop`.
    """

    def __init__(self, load, names, num_devices=1, max_waiting=256, temperature=0.8, top_k=50, max_tokens=512):
        self.names = names
        self.defaults = {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}
        self.threads = [DecodeThread(partial(load, i), self._deliver, max_waiting) for i in range(num_devices)]
        self.started_at, self.stopping, self.on_failure = time.time(), False, lambda: None
        self.registry = registry = prometheus_client.CollectorRegistry()
        counter, gauge, histogram = (partial(kind, registry=registry) for kind in (
            prometheus_client.Counter, prometheus_client.Gauge, prometheus_client.Histogram))
        self.requests = counter("nanochat_requests_total", "Responses", ["path", "code"])
        self.prompt_tokens = counter("nanochat_prompt_tokens_total", "Tokens of prompts")
        self.generated_tokens = counter("nanochat_generation_tokens_total", "Tokens generated")
        seconds = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30]
        self.first_token_s = histogram("nanochat_time_to_first_token_seconds", "From request to text", buckets=seconds)
        self.gap_s = histogram("nanochat_inter_token_seconds", "Between pieces of text", buckets=seconds)
        gauge("nanochat_running", "Rows being generated").set_function(lambda: self.count("num_running"))
        gauge("nanochat_waiting", "Choices that wait for a row").set_function(lambda: self.count("num_waiting"))
        gauge("nanochat_rows", "Rows of the KV caches").set_function(
            lambda: sum(lane.num_rows for thread in self.threads for lane in thread.lanes.values()))

    def count(self, what):
        return sum(getattr(thread, what) for thread in self.threads)

    # -- life

    def start(self):
        self.loop = asyncio.get_running_loop()
        for thread in self.threads:
            thread.start()
        self._watcher = self.loop.create_task(self._watch_loading())

    async def _watch_loading(self):
        for thread in self.threads:
            await asyncio.to_thread(thread.loaded.wait)
        gc.collect()
        gc.freeze()  # what is left stays; to search it for garbage would stop all streams for 0.1 s, again and again
        if self.error is not None:
            self.on_failure()
        elif not self.stopping:
            print(f"ready: {', '.join(self.names)}", flush=True)

    @property
    def error(self):
        return next((thread.error for thread in self.threads if thread.error is not None), None)

    @property
    def trouble(self):
        """Why nothing can be served just now, or None."""
        if self.stopping:
            return "Shutting down"
        if self.error is not None:
            return "The model could not be loaded"
        return None if all(thread.loaded.is_set() for thread in self.threads) else "Loading model"

    def stop(self, grace_s=GRACE_S):
        """Take nothing new; what is under way may finish within grace_s."""
        self.stopping = True
        for thread in self.threads:
            thread.stop(grace_s)

    async def join(self):
        for thread in self.threads:
            await asyncio.to_thread(thread.join)

    # -- requests

    def find_name(self, model):
        """The name of a model asked for by its name, its stage, or not at all."""
        name = model or self.names[0]
        if name not in self.names:
            name = next((n for n in self.names if n.split("-")[0] == model), None)
        if name is None:
            message = f"The model {model!r} is not served here; there is: {', '.join(self.names)}"
            raise HTTPException(404, {"message": message, "param": "model", "code": "model_not_found"})
        return name

    def resolve(self, model):
        """(name of a model, its lane on the first device)."""
        if self.trouble:
            raise HTTPException(503, self.trouble, {"Retry-After": "5"})
        name = self.find_name(model)
        return name, self.threads[0].lanes[name]

    def _deliver(self, events):
        """Called by a decode thread: one wake-up of the event loop for all events of a step."""
        if events and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_put_all, events)

    async def follow(self, name, choices, call):
        """
        Submit choices and yield lists of their events until all have ended. The first list is empty: it says that
        the queue took them. Closing the generator frees their rows. An empty list later on is a sign of life.
        """
        last, num_tokens, num_open, call.queue = time.monotonic(), {}, len(choices), asyncio.Queue()
        try:
            min(self.threads, key=lambda t: t.num_running + t.num_waiting).submit(name, choices)
        except QueueFull:
            if self.trouble:  # it began while the request was read
                raise HTTPException(503, self.trouble, {"Retry-After": "5"}) from None
            raise HTTPException(429, "Too many requests are waiting", {"Retry-After": "2"}) from None
        self.prompt_tokens.inc(sum(len(choice.prompt) for choice in choices))
        beat = asyncio.create_task(_beat(call.queue))
        try:
            yield []
            while num_open:
                events = [await call.queue.get()]
                while not call.queue.empty():
                    events.append(call.queue.get_nowait())
                events = [event for event in events if event is not None]
                if any(event.text for event in events):
                    now = time.monotonic()
                    (self.gap_s if num_tokens else self.first_token_s).observe(now - last)
                    last = now
                for event in events:
                    num_tokens[event.index] = max(event.num_tokens, num_tokens.get(event.index, 0))
                    num_open -= bool(event.finish_reason or event.error)
                yield events
        finally:
            beat.cancel()
            call.cancelled = True
            self.generated_tokens.inc(sum(num_tokens.values()))


async def _beat(queue):
    """Wake up whoever reads from the queue now and then: cheaper than a time limit on each wait."""
    while True:
        await asyncio.sleep(PING_S)
        queue.put_nowait(None)


def _put_all(events):
    for call, event in events:
        if not call.cancelled:
            call.queue.put_nowait(event)


# -----------------------------------------------------------------------------
# From a request to choices


def make_choices(service, lane, call, request, prompts, max_tokens, seed, tools):
    """The choices of a request: `n` for each of its prompts (lists of ids)."""
    engine, vocab_size = lane.engine, lane.engine.tokenizer.get_vocab_size()
    for prompt in prompts:
        lane.decoder.check_prompt(prompt)
        if max(prompt) >= vocab_size:
            raise ValueError(f"token id {max(prompt)} is not in the vocabulary of {vocab_size}")
    wanted = {name: value if value is not None else service.defaults.get(name) for name, value in (
        (name, getattr(request, name)) for name in ("temperature", "top_k", "top_p", "min_p"))}
    wanted["top_k"] = max(0, wanted["top_k"])
    choices, n = [], request.n or 1
    for index in range(len(prompts) * n):
        sampling = Sampling(**wanted, seed=f"{seed}:{index}")
        scores = [] if getattr(request, "echo", False) and request.num_top() is not None else None
        choices.append(Choice(prompts[index // n], sampling, max_tokens, engine.stop_tokens,
                              ToolState(engine.tokenizer) if tools else None, request.num_top(),
                              tokenizer=engine.tokenizer, call=call, index=index, stops=request.stops(),
                              prompt_scores=scores))
    return choices


def begin_chat(service, request, call, stream, kind=ChatReply):
    """(name, choices, reply) of a chat request. Tokenizes, so it runs in a thread of its own."""
    name, lane = service.resolve(request.model)
    context, tokenizer = lane.decoder.max_length, lane.engine.tokenizer
    max_tokens = request.max_completion_tokens or request.max_tokens or service.defaults["max_tokens"]
    # at least half of the context is for the conversation, however long an answer may become
    messages = [message.as_turn() for message in request.messages]
    prompt, num_dropped = fit_conversation(tokenizer, messages, context - min(max_tokens, context // 2))
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    choices = make_choices(service, lane, call, request, [prompt], max_tokens, seed, tools=True)
    about = {"seed": seed, "max_context": context, "dropped_messages": num_dropped}
    return name, choices, kind(name, tokenizer, len(prompt), about, num_choices=len(choices), stream=stream)


def begin_completion(service, request, call, stream):
    """The same for a completion: text begins with <|bos|>, token ids are taken as they are."""
    name, lane = service.resolve(request.model)
    tokenizer = lane.engine.tokenizer
    prompts = [tokenizer.encode(prompt, prepend="<|bos|>") if isinstance(prompt, str) else list(prompt)
               for prompt in request.prompts()]
    max_tokens = 16 if request.max_tokens is None else request.max_tokens  # OpenAI's default
    seed = secrets.randbelow(2**31) if request.seed is None else request.seed
    choices = make_choices(service, lane, call, request, prompts, max_tokens, seed, tools=False)
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in request.prompts()]
    echoes = {choice.index: texts[choice.index // (request.n or 1)] for choice in choices} if request.echo else {}
    about = {"seed": seed, "max_context": lane.decoder.max_length}
    hidden = len("<|bos|>") if isinstance(request.prompts()[0], str) else 0
    return name, choices, TextReply(name, tokenizer, sum(map(len, prompts)), about, echoes=echoes, hidden=hidden)


async def respond(service, http_request, request, begin, stream=None):
    """Answer a request: a stream of server-sent events, or one JSON document."""
    call, stream = Call(), bool(request.stream if stream is None else stream)
    try:
        name, choices, reply = await asyncio.to_thread(begin, service, request, call, stream)
    except ValueError as error:  # a conversation or a prompt that cannot be
        raise HTTPException(400, str(error)) from error
    events = service.follow(name, choices, call)
    await anext(events)  # in the queue now, or refused
    if not stream:
        return JSONResponse(await whole_response(http_request, call, events, reply))
    include_usage = bool(request.stream_options and request.stream_options.include_usage)
    return StreamingResponse(event_stream(events, reply, include_usage), media_type="text/event-stream",
                             headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


async def event_stream(events, reply, include_usage):
    async with aclosing(events):
        yield reply.opening()
        async for batch in events:
            text = ""
            for event in batch:
                reply.feed(event)
                if event.error:
                    yield f"{text}data: {json.dumps(error_body(event.error, 500))}\n\n"
                    return
                text += reply.chunk(event)
            yield text or ": ping\n\n"
        yield reply.closing(include_usage)


async def whole_response(http_request, call, events, reply):
    async def watch():  # nothing else notices a client that goes away before its answer
        while (await http_request.receive())["type"] != "http.disconnect":
            pass
        call.queue.put_nowait(Event(0, error=GONE))

    watcher = asyncio.create_task(watch())
    try:
        async with aclosing(events):
            async for batch in events:
                for event in batch:
                    reply.feed(event)
                    if event.error:  # 499 is what nginx made of it: nobody reads it, but it is counted
                        raise HTTPException(499 if event.error == GONE else 500, event.error)
    finally:
        watcher.cancel()
    return reply.whole()
