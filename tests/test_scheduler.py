"""Requests, schedulers and batchers, without the web: who is served, in which order, and which events come."""

import threading

import pytest
import torch

from nanochat.batcher import Batcher, QueueFull
from nanochat.decoder import Row
from nanochat.engine import Engine
from nanochat.inference import matmul_sizes, prepare
from nanochat.sampling import Sampling
from nanochat.scheduler import Request, Scheduler, ShuttingDown
from nanochat.streaming import ToolState, split_at_stop
from tests.servers import tiny_engine, wait_for


@pytest.fixture
def engine(tokenizer):
    return tiny_engine(tokenizer)


def make_request(tokenizer, prompt=(1, 2, 3), max_tokens=8, stop_tokens=(), tools=True, num_top=None, **more):
    tool = ToolState(tokenizer) if tools else None
    row = Row(list(prompt), Sampling(0), max_tokens, frozenset(stop_tokens), tool, num_top)
    return Request(row, tokenizer, **more)


def feed(request, tokens):
    """The events of tokens as if a model had chosen them, until the request ends."""
    events = []
    for token in tokens:
        request.row.advance(token, room=100)
        request.row.logprobs.append((-1.0, []))
        events += request.new_events()
        if request.row.finish_reason:
            break
    return events


def step(scheduler):
    """All of a step; its events."""
    scheduler.admit()
    scheduler.pick()
    scheduler.forward()
    return scheduler.take_events()


def run(scheduler, requests, max_steps=1000):
    """All events of the requests, decoded to their end."""
    scheduler.waiting.extend(requests)
    events = []
    for _ in range(max_steps):
        if not scheduler.busy:
            break
        events += step(scheduler)
    return events


def test_a_model_with_packed_weights_warms_up(tokenizer, monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRECISION", "bfloat16")
    engine = tiny_engine(tokenizer)
    prepare(engine.model)
    if not matmul_sizes(engine.model, 1):
        pytest.skip("needs a CPU that multiplies bfloat16")
    scheduler = Scheduler(engine, 4, chunk=256).warm_up()
    assert scheduler.decoder.staged and not scheduler.busy


def tokens_of(requests):
    return [request.row.tokens for request in requests]


# -- stop strings, and text as it comes


@pytest.mark.parametrize("text, stops, expected", [
    ("one two", [], ("one two", "", False)),
    ("one two thr", ["three"], ("one two ", "thr", False)),
    ("one two three four", ["three"], ("one two ", "", True)),
    ("a b c", ["c", "b"], ("a ", "", True)),           # the earliest place counts
    ("\n", ["\n\n"], ("", "\n", False)),
    ("xaa", ["aab", "ab"], ("x", "aa", False)),        # the longest possible beginning is held back
])
def test_split_at_stop(text, stops, expected):
    assert split_at_stop(text, stops) == expected


@pytest.mark.parametrize("stop", ["sun was", " su", "low", "n", "T"])
def test_text_ends_before_a_stop_string_that_spans_tokens(tokenizer, stop):
    text = "The light of the sun was low and the sea was dark"
    request = make_request(tokenizer, max_tokens=1000, stops=(stop,))
    events = feed(request, tokenizer.encode(text))
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert request.row.finish_reason == events[-1].finish_reason == "stop"


def test_held_back_text_is_sent_when_it_was_no_stop_string(tokenizer):
    request = make_request(tokenizer, max_tokens=1000, stops=("the sea!",))
    ids = tokenizer.encode("in the sea is")
    assert "".join(event.text for event in feed(request, ids)) == "in the sea is"


def test_text_comes_in_whole_characters(tokenizer):
    events = feed(make_request(tokenizer, max_tokens=1000), tokenizer.encode("né 漢字 🙂 ok"))
    assert "".join(event.text for event in events) == "né 漢字 🙂 ok"
    assert not any("\ufffd" in event.text for event in events)


def test_logprobs_come_with_the_text_of_their_tokens(tokenizer):
    ids = tokenizer.encode("sea 漢 (STOP here")
    request = make_request(tokenizer, max_tokens=1000, stops=("STOP",), num_top=0)
    events = feed(request, ids)
    entries = [entry for event in events for entry in event.logprobs]
    text = "".join(event.text for event in events)
    assert tokenizer.decode([token for token, _, _ in entries]) == text == "sea 漢 ("
    for token, _, start in entries:  # the first token of a character begins where the character does
        raw = tokenizer.decode_bytes([token])
        assert text[start:].encode().startswith(raw) or not raw.isascii()


def test_a_tool_call_comes_in_blocks(tokenizer):
    call = [tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("2+3"),
            tokenizer.encode_special("<|python_end|>")]
    request = make_request(tokenizer, max_tokens=1000, stops=("+",))  # stop strings are about the answer's own text
    num_forced = 2 + len(tokenizer.encode("5"))
    events = feed(request, [*tokenizer.encode("so "), *call, *[0] * num_forced, *tokenizer.encode("five")])
    texts = {}
    for event in events:
        texts[event.kind] = texts.get(event.kind, "") + event.text
    assert texts == {"text": "so five", "python": "2+3", "python_output": "5"}


# -- a scheduler


def test_greedy_text_in_a_crowd_equals_the_text_alone_for_50_mixed_prompts(engine, tokenizer, story):
    prompts = [tokenizer.encode(story[7 * i: 7 * i + 1 + (i * 13) % 90], prepend="<|bos|>") for i in range(50)]
    requests = [make_request(tokenizer, prompt, 3 + i % 17, engine.stop_tokens) for i, prompt in enumerate(prompts)]
    run(Scheduler(engine, num_rows=8, chunk=16), requests)
    for request in requests:
        row = request.row
        alone = [column[0] for column, _ in engine.generate(row.prompt, max_tokens=row.max_tokens, temperature=0)]
        assert row.tokens == alone


def test_a_cancelled_request_frees_its_row_within_a_step(engine, tokenizer):
    scheduler = Scheduler(engine, num_rows=2, chunk=64)
    gone, stays = (make_request(tokenizer, max_tokens=60) for _ in range(2))
    scheduler.waiting.extend([gone, stays])
    step(scheduler)
    assert scheduler.decoder.rows == [gone.row, stays.row]
    gone.cancelled = True
    step(scheduler)
    assert scheduler.decoder.rows == [stays.row] and len(stays.row.tokens) == 2
    assert list(scheduler.running.values()) == [stays]


def test_a_cancelled_request_leaves_the_queue_even_while_its_prompt_is_read(engine, tokenizer):
    scheduler = Scheduler(engine, num_rows=1, chunk=4)
    request = make_request(tokenizer, range(40))
    scheduler.waiting.append(request)
    step(scheduler)
    request.cancelled = True
    step(scheduler)
    assert not scheduler.busy
    other = make_request(tokenizer, [9, 8, 7], max_tokens=3)
    run(scheduler, [other])
    assert other.row.tokens == [c[0] for c, _ in engine.generate([9, 8, 7], max_tokens=3, temperature=0)]


def test_a_long_prompt_does_not_stall_the_others(engine, tokenizer):
    scheduler = Scheduler(engine, 4, chunk=8)
    quick, long = make_request(tokenizer, max_tokens=60), make_request(tokenizer, [5] * 80)
    scheduler.waiting.append(quick)
    step(scheduler)
    scheduler.waiting.append(long)
    for num_steps in range(1, 10):
        step(scheduler)
        assert len(quick.row.tokens) == 1 + num_steps  # a token a step
    assert not long.row.tokens


def test_the_common_blocks_of_two_prompts_are_read_once(engine, tokenizer):
    decoder = Scheduler(engine, 1, chunk=8).decoder
    first, second = list(range(30)), [*range(30), 40, 41, 42]

    def num_read(prompt):
        return sum(num for num, _ in decoder.prefill(prompt))

    assert num_read(first) == 30
    assert num_read(second) == 33 - 24  # three blocks of 8 are whole
    assert num_read(second) == 33 - 32
    assert num_read(list(range(16))) == 8  # something must be read, to have logits
    assert num_read([7, 8]) == 2


@torch.no_grad()
def test_logprobs_of_a_prompt_equal_the_full_forward(engine):
    prompt, scores = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], []
    for _ in Scheduler(engine, 1, chunk=4).decoder.prefill(prompt, scores, num_top=2):
        pass
    reference = torch.log_softmax(engine.model(torch.tensor([prompt]))[0], dim=-1)
    assert len(scores) == len(prompt) - 1
    for position, (logprob, top) in enumerate(scores):
        assert logprob == pytest.approx(float(reference[position, prompt[position + 1]]), abs=1e-5)
        assert [token for token, _ in top] == reference[position].topk(2).indices.tolist()


def test_a_prompt_that_cannot_be_read_fails_alone(engine, tokenizer):
    bad = make_request(tokenizer, [1, 10**6, 2])  # no such token: the embedding refuses it
    good = [make_request(tokenizer, [1, 2], max_tokens=4) for _ in range(2)]
    events = run(Scheduler(engine, 2, 16), [good[0], bad, good[1]])
    assert [event.request for event in events if event.error] == [bad]
    assert all(len(tokens) == 4 for tokens in tokens_of(good))


@pytest.mark.parametrize("prompt", [[1, 2], [5] * 40])  # read together with the others, or in chunks
def test_a_row_that_cannot_join_the_batch_fails_alone(engine, tokenizer, prompt):
    scheduler = Scheduler(engine, 4, 16)
    bad, *good = (make_request(tokenizer, prompt, max_tokens=4) for _ in range(3))
    admit = scheduler.decoder.admit

    def fail_for_one(row, *rest):
        if row is bad.row:
            raise RuntimeError("out of memory")
        admit(row, *rest)

    scheduler.decoder.admit = fail_for_one
    events = run(scheduler, [good[0], bad, good[1]])
    assert [event.request for event in events if event.error] == [bad]
    assert all(len(tokens) == 4 for tokens in tokens_of(good))


def test_short_prompts_are_read_together_and_answered_as_if_alone(engine, tokenizer):
    prompts = [[5], [7, 8, 9], [1, 2], [3] * 6, [4] * 30]
    alone = [make_request(tokenizer, prompt, max_tokens=6) for prompt in prompts]
    for request in alone:
        run(Scheduler(engine, 1, 16), [request])
    together = [make_request(tokenizer, prompt, max_tokens=6) for prompt in prompts]
    scheduler, shapes = Scheduler(engine, 5, 16), []
    trunk = engine.model.trunk
    engine.model.trunk = lambda ids, *rest: shapes.append(ids.shape) or trunk(ids, *rest)
    run(scheduler, together)
    assert tokens_of(together) == tokens_of(alone)
    assert (3, 3) in shapes and (1, 30) not in shapes  # within 16 tokens a step; the long one in pieces


def test_a_warm_up_leaves_the_scheduler_as_it_was(engine, tokenizer):
    """On every machine: what oneDNN needs where it multiplies bfloat16 is asked of all."""
    asked = []

    def matmul_sizes(model, most):
        asked.append(most)
        return [1, 40, most]

    warm = Scheduler(engine, 4, 100).warm_up(matmul_sizes)
    assert asked == [100] and not warm.busy
    requests = [make_request(tokenizer), make_request(tokenizer)]
    for scheduler, request in zip((warm, Scheduler(engine, 4, 100)), requests, strict=True):
        run(scheduler, [request])
    assert requests[0].row.tokens == requests[1].row.tokens != []


def test_zero_tokens_give_the_prompt_s_logprobs_alone(engine, tokenizer):
    request = make_request(tokenizer, max_tokens=0, num_top=1, echo="abc")
    echo, end = run(Scheduler(engine, 1, 16), [request])
    assert echo.text == "abc" and [token for token, _, _ in echo.logprobs] == request.row.prompt
    assert echo.logprobs[0][1] is None and end.finish_reason == "length"


# -- a batcher


class FailsOnce:
    """A model whose first step with more than one token behind it runs out of memory."""

    def __init__(self, model):
        self.model, self.config, self.device, self.cos = model, model.config, model.device, model.cos
        self.num_matrix_params = model.num_matrix_params
        self.failed = False
        self.trunk = model.trunk
        self.logits = model.logits

    def __call__(self, ids, kv_cache, last_only):
        if ids.shape == (2, 1) and not self.failed:
            self.failed = True
            raise RuntimeError("out of memory")
        return self.model(ids, kv_cache=kv_cache, last_only=last_only)


@pytest.fixture
def batchers():
    started = []

    def start(scheduler, max_waiting=10):
        events, lock = [], threading.Lock()

        def deliver(batch):
            with lock:
                events.extend(batch)

        batcher = Batcher(lambda: {"m": scheduler}, deliver, max_waiting)
        batcher.start()
        batcher.loaded.wait()
        started.append(batcher)
        return batcher, events

    yield start
    for batcher in started:
        batcher.stop(0)
        batcher.join()


def ended(events, requests):
    return {event.request for event in events if event.finish_reason or event.error} >= set(requests)


def test_after_a_failed_step_the_others_are_served(engine, tokenizer, batchers):
    scheduler = Scheduler(Engine(FailsOnce(engine.model), tokenizer), num_rows=2, chunk=64)
    batcher, events = batchers(scheduler)
    requests = [make_request(tokenizer, [1, 2], max_tokens=5) for _ in range(4)]
    batcher.submit("m", requests)
    assert wait_for(lambda: ended(list(events), requests))
    failed = {event.request for event in events if event.error}
    assert [request in failed for request in requests] == [True, True, False, False]


def test_a_full_queue_refuses(engine, tokenizer, batchers):
    batcher, events = batchers(Scheduler(engine, num_rows=1, chunk=64), max_waiting=6)
    requests = [make_request(tokenizer, max_tokens=100) for _ in range(3)]
    batcher.submit("m", requests)
    with pytest.raises(QueueFull):
        batcher.submit("m", [make_request(tokenizer) for _ in range(3)])
    assert wait_for(lambda: ended(list(events), requests))
    batcher.submit("m", [make_request(tokenizer)])


def test_stopping_finishes_what_was_submitted(engine, tokenizer, batchers):
    batcher, events = batchers(Scheduler(engine, num_rows=1, chunk=64))
    requests = [make_request(tokenizer, max_tokens=20) for _ in range(2)]
    batcher.submit("m", requests)
    batcher.stop(grace_s=30)
    batcher.join(30)
    assert not batcher.is_alive()
    with pytest.raises(QueueFull):  # nobody would ever answer it
        batcher.submit("m", [make_request(tokenizer)])
    assert [event.finish_reason for event in events if event.finish_reason] == ["length"] * 2


def test_stopping_without_grace_ends_those_that_wait_with_an_error(engine, tokenizer, batchers):
    batcher, events = batchers(Scheduler(engine, num_rows=1, chunk=64))
    requests = [make_request(tokenizer, max_tokens=120) for _ in range(5)]
    batcher.submit("m", requests)
    batcher.stop(grace_s=0)
    batcher.join(10)
    assert ended(events, requests)
    errors = {event.request: event.error for event in events if event.error}
    assert isinstance(errors[requests[-1]], ShuttingDown)
