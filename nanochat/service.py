"""
Models by name, and the path of a request: from its fields to the queue of a batcher, and from the
events of the batcher to a stream or a JSON document.

A `Service` lives on one event loop and has one `Batcher` thread per device. Nothing here waits for
a model: tokenizing happens in worker threads, generation in the batchers.
"""

import asyncio
import gc
import time
from functools import partial

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from nanochat.api import error_body, overflow_error
from nanochat.api_responses import ResponsesResponse
from nanochat.batcher import Batcher, QueueFull
from nanochat.chat_response import ChatResponse, TextResponse, sse
from nanochat.constraint import describe_functions, get_constraints
from nanochat.decoder import PromptTooLong, Row
from nanochat.engine import fit_conversation
from nanochat.sampling import Sampling
from nanochat.scheduler import Event, Request, RequestFailed, ShuttingDown
from nanochat.streaming import ToolState

PING_S = 15   # seconds between comments on all streams
GRACE_S = 20  # seconds that open streams may go on once the server is told to stop
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class ClientLeft(RequestFailed):
    """The client has closed the connection before its answer."""


# HTTP status of an answer that failed; others are the server's fault, 500.
# 499 is nginx's status for a client that has left: nobody reads it, but it is counted
FAILURE_STATUS = {ClientLeft: 499, ShuttingDown: 503}


def failure_status(error):
    return FAILURE_STATUS.get(type(error), 500)


# -----------------------------------------------------------------------------
# The models and their threads


class Service:
    """
    Models by name, on one or more devices. `load(i)` returns {name: Scheduler} for device i; the
    thread of that device calls it. temperature, top_k and max_tokens are for requests that leave
    them out.
    """

    def __init__(self, load, names, num_devices=1, max_waiting=512,
                 temperature=0.8, top_k=50, max_tokens=512, ping_s=PING_S):
        self.names = names  # the first is the default
        self.about = {}     # {name: what the page wants to know of the model}
        self.defaults = {"temperature": temperature, "top_k": top_k, "max_tokens": max_tokens}
        self.ping_s = ping_s
        self.batchers = []              # one for each device
        for i in range(num_devices):
            self.batchers.append(Batcher(partial(load, i), self._deliver, max_waiting))
        self.open_responses = set()     # submitted and not released
        self.started_at = time.time()
        self.loaded = False             # True: all models are loaded, or have failed
        self.stopping = False
        self.error = None               # why a model could not be loaded
        self.on_failure = lambda: None  # called when a model cannot be loaded
        self._add_metrics()

    def _add_metrics(self):
        # a registry of its own, since a process may have several services
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        latency = partial(Histogram, registry=self.registry, buckets=LATENCY_BUCKETS_S)

        self.responses = counter("nanochat_requests_total", "Responses", ["path", "code"])
        self.prompt_tokens = counter("nanochat_prompt_tokens_total", "Tokens of prompts")
        self.generated_tokens = counter("nanochat_generation_tokens_total", "Tokens generated")
        self.first_token_s = latency("nanochat_time_to_first_token_seconds", "From request to text")
        self.gap_s = latency("nanochat_inter_token_seconds", "Between pieces of text")
        # gauges are read when somebody asks for /metrics
        gauge("nanochat_running", "Rows being generated").set_function(self.num_running)
        gauge("nanochat_waiting", "Requests that wait for a row").set_function(self.num_waiting)
        gauge("nanochat_rows", "Rows of the KV caches").set_function(self.num_rows)

    def num_running(self):
        return sum(batcher.num_running for batcher in self.batchers)

    def num_waiting(self):
        return sum(batcher.num_waiting for batcher in self.batchers)

    def num_rows(self):
        return sum(batcher.num_rows for batcher in self.batchers)

    # -- start and stop

    def start(self):
        # models load in the batchers' threads; meanwhile requests are refused by `trouble`
        self.loop = asyncio.get_running_loop()
        for batcher in self.batchers:
            batcher.start()
        self._tasks = [
            asyncio.create_task(self._watch_loading()),
            asyncio.create_task(self._ping()),
        ]

    async def _watch_loading(self):
        for batcher in self.batchers:
            await asyncio.to_thread(batcher.loaded.wait)
            self.error = self.error or batcher.error

        # models stay in memory: collecting garbage among their objects would take 0.1 s each time
        gc.collect()
        gc.freeze()
        self.loaded = True
        if self.error:
            self.on_failure()
        elif not self.stopping:
            print(f"ready: {', '.join(self.names)}", flush=True)

    async def _ping(self):
        # None: send a comment, so that no proxy takes the stream for dead
        while True:
            await asyncio.sleep(self.ping_s)
            for response in self.open_responses:
                response.queue.put_nowait(None)

    @property
    def trouble(self):
        """Why nothing can be served now, or None."""
        if self.stopping:
            return "Shutting down"
        if self.error:
            return "The model could not be loaded"
        return None if self.loaded else "Loading model"

    def check_ready(self):
        if self.trouble:
            raise HTTPException(503, self.trouble, {"Retry-After": "5"})

    def stop(self, grace_s=GRACE_S):
        """Accept nothing new; requests that were accepted may finish within grace_s."""
        self.stopping = True
        for batcher in self.batchers:
            batcher.stop(grace_s)

    async def join(self):
        for task in self._tasks:
            task.cancel()
        for batcher in self.batchers:
            await asyncio.to_thread(batcher.join)

    # -- requests

    def find_name(self, wanted):
        """The name of a model, given by name, by stage ('sft'), or not at all (the first one)."""
        for name in self.names:
            if not wanted or wanted in (name, name.split("-")[0]):
                return name
        # detail as a dict: the fields of OpenAI's error
        message = f"The model {wanted!r} is not served here; there is: {', '.join(self.names)}"
        raise HTTPException(404, {"message": message, "param": "model", "code": "model_not_found"})

    def find_model(self, wanted):
        """(name, its scheduler on the first device)."""
        self.check_ready()
        name = self.find_name(wanted)
        return name, self.batchers[0].schedulers[name]

    def submit(self, response):
        """Queue the requests of a response, all or none, at one device. Raises HTTPException."""
        # every device has all models: take the one with the fewest requests
        batcher = min(self.batchers, key=lambda batcher: batcher.num_running + batcher.num_waiting)
        num_choices = len(response.requests)
        if num_choices > batcher.most_at_once:
            most = batcher.most_at_once
            message = (f"The request is for {num_choices} completions, but of one client at most {most} "
                       "can wait here: ask for fewer prompts at a time, or a smaller n")
            raise HTTPException(400, message)
        try:
            batcher.submit(response.model, response.requests)
        except QueueFull as error:
            self.check_ready()  # the server may have been told to stop meanwhile
            message = "Too many completions are waiting, or too many of yours"
            raise HTTPException(429, message, {"Retry-After": "2"}) from error
        self.open_responses.add(response)
        self.prompt_tokens.inc(response.prompt_tokens)

    def release(self, response):
        """Free the rows of a response that has ended, or whose client has left."""
        # no effect on requests that have ended
        for request in response.requests:
            request.cancelled = True
        self.open_responses.discard(response)
        self.generated_tokens.inc(response.completion_tokens())

    def _deliver(self, events):
        """Called by a batcher with all events of a step, which wake the event loop only once."""
        # the loop is closed where a test or a crash did not wait for the threads
        if events and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(_put_all, events)

    async def events(self, response):
        """
        Yield lists of a response's events until all of its requests have finished. After an error
        the caller stops. An empty list means that the server is alive.
        """
        num_open = len(response.requests)
        latency = self.first_token_s
        last = time.monotonic()
        while num_open:
            # everything that has arrived: for a slow client several steps become one write
            events = [await response.queue.get()]
            while not response.queue.empty():
                events.append(response.queue.get_nowait())
            events = [event for event in events if event is not None]

            num_open -= sum(event.finish_reason is not None for event in events)
            # latencies are between pieces of text, not between events
            if any(event.text for event in events):
                now = time.monotonic()
                latency.observe(now - last)
                latency = self.gap_s
                last = now
            yield events


def _put_all(events):
    for event in events:
        event.request.queue.put_nowait(event)


# -----------------------------------------------------------------------------
# From a request's fields to a response that can be submitted. The build functions run in worker
# threads, since tokenizing a long text takes seconds


def with_defaults(body, defaults):
    """The request with the server's values for those of its fields that are None."""
    # other defaults are not flags of the server, but in api.py
    missing = {name: value for name, value in defaults.items() if getattr(body, name) is None}
    return body.model_copy(update=missing)


def make_requests(body, scheduler, prompts, tools, make_constraint=None):
    """
    `n` requests for each prompt: (ids, text to echo or None). make_constraint() gives each its own
    Row.constraint. ValueError if a prompt does not fit.
    """
    engine = scheduler.engine
    check_biases(body, engine.tokenizer)
    # the decoder ends a row where the context is full
    max_tokens = scheduler.decoder.max_length if body.max_tokens == -1 else body.max_tokens
    requests = []
    for prompt, echo in prompts:
        scheduler.decoder.check_prompt(prompt)
        for _ in range(body.n):
            index = len(requests)
            # the first completion is the same for every n
            seed = f"{body.seed}:{index}"
            sampling = Sampling(
                temperature=body.temperature,
                top_k=max(0, body.top_k),
                top_p=body.top_p,
                min_p=body.min_p,
                seed=seed,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=body.logit_bias,
            )
            # only chat models have learned to call tools
            tool = ToolState(engine.tokenizer) if tools else None
            row = Row(prompt, sampling, max_tokens, engine.stop_tokens, tool, body.num_top())
            row.constraint = make_constraint() if make_constraint else None
            requests.append(Request(row, engine.tokenizer, index, body.stops(), echo))
    return requests


def check_biases(body, tokenizer):
    size = tokenizer.get_vocab_size()
    unknown = [token for token in body.logit_bias if token >= size]
    if unknown:
        raise ValueError(f"logit_bias: token id {unknown[0]} is not in the vocabulary of {size}")


def begin_chat(body, scheduler):
    """
    (requests, tokens of the prompt, the `nanochat` field) for a ChatRequest or a ResponsesRequest.
    If the conversation is too long, its oldest turns are left out where the request allows it.
    """
    # at least half of the context is for the conversation, even if max_tokens is larger; three
    # quarters if the answer takes what the conversation leaves
    max_length = scheduler.decoder.max_length
    kept_free = max_length // 4 if body.max_tokens == -1 else min(body.max_tokens, max_length // 2)
    max_prompt = max_length - kept_free

    # the system message and the newest question are always kept
    messages = body.turns()
    functions = body.functions()
    if functions:
        messages.insert(0, {"role": "system", "content": describe_functions(functions)})
    prompt, num_dropped = fit_conversation(scheduler.engine.tokenizer, messages, max_prompt)
    if num_dropped and body.truncation == "disabled":
        raise PromptTooLong(
            f"only {max_prompt} tokens fit beside the answer, and truncation is 'disabled'"
        )

    constraint = choose_constraint(body, functions, scheduler.engine.tokenizer)
    requests = make_requests(body, scheduler, [(prompt, None)], tools=True, make_constraint=constraint)
    about = {"seed": body.seed, "max_context": max_length, "dropped_messages": num_dropped}
    return requests, len(prompt), about


def build_chat(body, model, scheduler):
    """The response to a ChatRequest."""
    return ChatResponse(model, *begin_chat(body, scheduler))


def build_response(body, model, scheduler):
    """The response to a ResponsesRequest."""
    return ResponsesResponse(model, *begin_chat(body, scheduler), body)


def choose_constraint(body, functions, tokenizer):
    """A function that makes the constraint of an answer to a chat, or None: free text."""
    schema = body.answer_schema()
    if schema is None and not functions:
        return None
    parameters = {function["name"]: function["parameters"] for function in functions}
    # without a schema, an answer that need not be a call is free
    may_answer = body.may_answer_in_text()
    optional = schema is None and may_answer
    if functions and not may_answer:
        schema = None
    return get_constraints(tokenizer).make(schema, parameters, optional)


def build_completion(body, model, scheduler):
    """The response to a CompletionRequest."""
    # a text prompt begins with <|bos|>, token ids are taken as they are
    tokenizer = scheduler.engine.tokenizer
    limit = body.truncate_prompt_tokens
    prompts = []
    for prompt in body.prompts():
        is_text = isinstance(prompt, str)
        ids = tokenizer.encode(prompt) if is_text else prompt
        text = prompt if is_text else tokenizer.decode(ids)  # refuses ids that do not exist
        if limit is not None and len(ids) > limit:
            ids = ids[-limit:]
            text = tokenizer.decode(ids)
        start = [tokenizer.get_bos_token_id()] if is_text else []
        prompts.append((start + ids, text if body.echo else None))

    requests = make_requests(body, scheduler, prompts, tools=False)
    prompt_tokens = sum(len(prompt) for prompt, _ in prompts)
    about = {"seed": body.seed, "max_context": scheduler.decoder.max_length}
    return TextResponse(model, requests, prompt_tokens, about)


# -----------------------------------------------------------------------------
# From events to HTTP


async def respond(service, http_request, body, build):
    """Answer a request: with a stream of server-sent events, or with one JSON document."""
    # all devices have the same models: the first one's scheduler tells the limits
    model, scheduler = service.find_model(body.model)
    body = with_defaults(body, service.defaults)
    try:
        response = await asyncio.to_thread(build, body, model, scheduler)
    except PromptTooLong as error:
        detail = overflow_error(error, scheduler.decoder.max_length, body.prompt_field)
        raise HTTPException(400, detail) from error
    except ValueError as error:  # a conversation without a text, a token that does not exist
        raise HTTPException(400, str(error)) from error

    for request in response.requests:
        request.client = http_request.scope.get("nanochat_client", "")
    # may refuse, so it comes before the status is sent
    service.submit(response)
    if body.stream:
        return EventStream(service, response, body.stream_options.include_usage)
    return await complete(service, http_request, response)


class EventStream(StreamingResponse):
    """Server-sent events. The rows are freed in any case, even if the stream never begins."""

    def __init__(self, service, response, include_usage):
        # X-Accel-Buffering: nginx would collect the text
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        content = stream_events(service, response, include_usage)
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self.release = partial(service.release, response)

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


async def stream_events(service, response, include_usage):
    yield response.opening()
    # one write for all events that arrived together
    async for events in service.events(response):
        text = ""
        for event in events:
            if event.error:
                yield text + sse(error_body(str(event.error), failure_status(event.error)))
                return
            text += response.chunk(event)
        yield text or ": ping\n\n"
    yield response.closing(include_usage)


async def complete(service, http_request, response):
    """The whole response as JSON."""

    async def watch_client():  # nothing else notices that a client leaves before its answer
        while (await http_request.receive())["type"] != "http.disconnect":
            pass
        left = ClientLeft("the client has left")
        response.queue.put_nowait(Event(response.requests[0], error=left))

    # a client that leaves becomes an event, like the end of an answer
    watcher = asyncio.create_task(watch_client())
    collected = []
    try:
        async for events in service.events(response):
            for event in events:
                if event.error:
                    raise HTTPException(failure_status(event.error), str(event.error))
            collected += events
    finally:
        watcher.cancel()
        service.release(response)

    # the log-probabilities of many choices take seconds: nobody else waits for them
    return await asyncio.to_thread(lambda: JSONResponse(response.whole(collected)))
