"""Choices, lanes and decode threads, without the web: who is served, in which order, and what they are told."""

import threading

import pytest
import torch

from nanochat.engine import Engine
from nanochat.sampling import Sampling
from nanochat.serving import Call, Choice, DecodeThread, Event, Lane, QueueFull
from nanochat.streaming import ToolState, split_at_stop
from tests.servers import tiny_engine, wait_for


@pytest.fixture
def engine(tokenizer):
    return tiny_engine(tokenizer)


def make_choice(tokenizer, prompt=(1, 2, 3), max_tokens=8, stop_tokens=(), tools=True, **more):
    tool = ToolState(tokenizer) if tools else None
    return Choice(list(prompt), Sampling(0), max_tokens, frozenset(stop_tokens), tool, tokenizer=tokenizer,
                  call=Call(), **more)


def tell(choice, tokens):
    """Feed tokens as if a model had said them, until the choice ends."""
    events = []
    for token in tokens:
        choice.advance(token, room=100)
        choice.logprobs.append((-1.0, []))
        events += choice.feed()
        if choice.finish_reason:
            break
    return events


def run(lane, choices, max_turns=1000):
    """All events of the choices, decoded to their end."""
    lane.waiting.extend(choices)
    events = []
    for _ in range(max_turns):
        if not lane.busy:
            break
        lane.turn(events)
        lane.forward()
    return events


def texts(events, choices):
    return ["".join(event.text for call, event in events if call is choice.call) for choice in choices]


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
    choice = make_choice(tokenizer, max_tokens=1000, stops=(stop,))
    events = tell(choice, tokenizer.encode(text))
    assert "".join(event.text for event in events) == text[: text.index(stop)]
    assert choice.finish_reason == events[-1].finish_reason == "stop"


def test_held_back_text_is_told_when_it_was_no_stop_string(tokenizer):
    choice = make_choice(tokenizer, max_tokens=1000, stops=("the sea!",))
    ids = tokenizer.encode("in the sea is")
    assert "".join(event.text for event in tell(choice, ids)) == "in the sea is"


def test_text_comes_in_whole_characters(tokenizer):
    events = tell(make_choice(tokenizer, max_tokens=1000), tokenizer.encode("né 漢字 🙂 ok"))
    assert "".join(event.text for event in events) == "né 漢字 🙂 ok"
    assert not any("\ufffd" in event.text for event in events)


def test_scores_come_with_the_text_of_their_tokens(tokenizer):
    ids = tokenizer.encode("sea 漢 (STOP here")
    choice = make_choice(tokenizer, max_tokens=1000, stops=("STOP",), num_top=0)
    events = tell(choice, ids)
    told = [token for event in events for token, _ in event.scores]
    assert tokenizer.decode(told) == "".join(event.text for event in events) == "sea 漢 ("


def test_a_tool_call_is_told_as_blocks(tokenizer):
    call = [tokenizer.encode_special("<|python_start|>"), *tokenizer.encode("2+3"),
            tokenizer.encode_special("<|python_end|>")]
    choice = make_choice(tokenizer, max_tokens=1000, stops=("+",))  # stop strings are about the answer's own text
    num_forced = 2 + len(tokenizer.encode("5"))
    events = tell(choice, [*tokenizer.encode("so "), *call, *[0] * num_forced, *tokenizer.encode("five")])
    told = {}
    for event in events:
        told[event.kind] = told.get(event.kind, "") + event.text
    assert told == {"text": "so five", "python": "2+3", "python_output": "5"}


# -- a lane


def test_greedy_text_in_a_crowd_equals_the_text_alone_for_50_mixed_prompts(engine, tokenizer, story):
    prompts = [tokenizer.encode(story[7 * i: 7 * i + 1 + (i * 13) % 90], prepend="<|bos|>") for i in range(50)]
    choices = [make_choice(tokenizer, prompt, 3 + i % 17, engine.stop_tokens) for i, prompt in enumerate(prompts)]
    run(Lane(engine, num_rows=8, chunk=16), choices)
    for choice in choices:
        alone = [column[0] for column, _ in engine.generate(choice.prompt, max_tokens=choice.max_tokens, temperature=0)]
        assert choice.tokens == alone


def test_a_cancelled_call_frees_its_row_within_a_turn(engine, tokenizer):
    lane = Lane(engine, num_rows=2, chunk=64)
    gone, stays = (make_choice(tokenizer, max_tokens=60) for _ in range(2))
    lane.waiting.extend([gone, stays])
    lane.turn([])
    lane.forward()
    assert lane.decoder.rows == [gone, stays]
    gone.call.cancelled = True
    lane.turn([])
    assert lane.decoder.rows == [stays] and len(stays.tokens) == 2


def test_a_cancelled_call_leaves_the_queue_even_while_its_prompt_is_read(engine, tokenizer):
    lane, choice = Lane(engine, num_rows=1, chunk=4), make_choice(tokenizer, range(40))
    lane.waiting.append(choice)
    lane.turn([])
    choice.call.cancelled = True
    lane.turn([])
    assert not lane.busy
    other = make_choice(tokenizer, [9, 8, 7], max_tokens=3)
    run(lane, [other])
    assert other.tokens == [c[0] for c, _ in engine.generate([9, 8, 7], max_tokens=3, temperature=0)]


def test_a_long_prompt_does_not_stall_the_others(engine, tokenizer):
    lane = Lane(engine, 4, chunk=8)
    quick, long = make_choice(tokenizer, max_tokens=60), make_choice(tokenizer, [5] * 80)
    lane.waiting.append(quick)
    lane.turn([])
    lane.forward()
    lane.waiting.append(long)
    for turn in range(1, 10):
        lane.turn([])
        lane.forward()
        assert len(quick.tokens) == 1 + turn  # a token a turn
    assert not long.tokens


def test_what_two_turns_share_is_read_once(engine, tokenizer):
    decoder = Lane(engine, 1, chunk=16).decoder
    first, second = list(range(30)), [*range(30), 40, 41, 42]
    def num_read(prompt):
        return sum(num for num, _ in decoder.prefill(prompt))

    assert num_read(first) == 30
    assert num_read(second) == 3
    assert num_read(second) == 1  # something must be read, to have logits
    assert num_read([7, 8]) == 2


@torch.no_grad()
def test_scores_of_a_prompt_equal_the_full_forward(engine):
    prompt, scores = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], []
    for _ in Lane(engine, 1, 16).decoder.prefill(prompt, chunk=4, scores=scores, num_top=2):
        pass
    reference = torch.log_softmax(engine.model(torch.tensor([prompt]))[0], dim=-1)
    assert len(scores) == len(prompt) - 1
    for position, (logprob, top) in enumerate(scores):
        assert logprob == pytest.approx(float(reference[position, prompt[position + 1]]), abs=1e-5)
        assert [token for token, _ in top] == reference[position].topk(2).indices.tolist()


def test_a_prompt_that_cannot_be_read_fails_alone(engine, tokenizer):
    bad = make_choice(tokenizer, [1, 10**6, 2])  # no such token: the embedding refuses it
    good = [make_choice(tokenizer, [1, 2], max_tokens=4) for _ in range(2)]
    events = run(Lane(engine, 2, 16), [good[0], bad, good[1]])
    errors = [call for call, event in events if event.error]
    assert errors == [bad.call] and all(len(choice.tokens) == 4 for choice in good)


def test_short_prompts_are_read_together_and_answered_as_if_alone(engine, tokenizer):
    prompts = [[5], [7, 8, 9], [1, 2], [3] * 6, [4] * 30]
    alone = [make_choice(tokenizer, prompt, max_tokens=6) for prompt in prompts]
    for choice in alone:
        run(Lane(engine, 1, 16), [choice])
    together = [make_choice(tokenizer, prompt, max_tokens=6) for prompt in prompts]
    lane, shapes = Lane(engine, 5, 16), []
    trunk = engine.model.trunk
    engine.model.trunk = lambda ids, *rest: shapes.append(ids.shape) or trunk(ids, *rest)
    run(lane, together)
    assert [choice.tokens for choice in together] == [choice.tokens for choice in alone]
    assert (3, 3) in shapes and (1, 30) not in shapes  # within 16 tokens a turn; the long one in pieces


def test_zero_tokens_tell_the_scores_alone(engine, tokenizer):
    choice = make_choice(tokenizer, max_tokens=0, num_top=1, prompt_scores=[])
    (_, scores), (_, end) = run(Lane(engine, 1, 16), [choice])
    assert [token for token, _ in scores.scores] == choice.prompt and scores.scores[0][1] is None
    assert end.finish_reason == "length"


# -- a thread


class FailsOnce:
    """A model whose first step with more than one token behind it runs out of memory."""

    def __init__(self, model):
        self.model, self.config, self.device, self.cos = model, model.config, model.device, model.cos
        self.failed = False
        self.trunk, self.logits = model.trunk, model.logits

    def __call__(self, ids, kv_cache, last_only):
        if ids.shape == (2, 1) and not self.failed:
            self.failed = True
            raise RuntimeError("out of memory")
        return self.model(ids, kv_cache=kv_cache, last_only=last_only)


@pytest.fixture
def threads():
    started = []

    def start(lane, max_waiting=10):
        events, lock = [], threading.Lock()

        def deliver(batch):
            with lock:
                events.extend(batch)

        thread = DecodeThread(lambda: {"m": lane}, deliver, max_waiting)
        thread.start()
        thread.loaded.wait()
        started.append(thread)
        return thread, events

    yield start
    for thread in started:
        thread.stop(0)
        thread.join()


def ended(events, choices):
    calls = {call for call, event in events if event.finish_reason or event.error}
    return calls >= {choice.call for choice in choices}


def test_after_a_failed_step_the_others_are_served(engine, tokenizer, threads):
    lane = Lane(Engine(FailsOnce(engine.model), tokenizer), num_rows=2, chunk=64)
    thread, events = threads(lane)
    choices = [make_choice(tokenizer, [1, 2], max_tokens=5) for _ in range(4)]
    thread.submit("m", choices)
    assert wait_for(lambda: ended(list(events), choices))
    failed = {call for call, event in events if event.error}
    assert [choice.call in failed for choice in choices] == [True, True, False, False]


def test_a_full_queue_refuses(engine, tokenizer, threads):
    thread, events = threads(Lane(engine, num_rows=1, chunk=64), max_waiting=2)
    choices = [make_choice(tokenizer, max_tokens=100) for _ in range(3)]
    thread.submit("m", choices)
    with pytest.raises(QueueFull):
        thread.submit("m", [make_choice(tokenizer)])
    assert wait_for(lambda: ended(list(events), choices))
    thread.submit("m", [make_choice(tokenizer)])


def test_stopping_finishes_what_is_under_way(engine, tokenizer, threads):
    thread, events = threads(Lane(engine, num_rows=1, chunk=64))
    choices = [make_choice(tokenizer, max_tokens=20) for _ in range(2)]
    thread.submit("m", choices)
    thread.stop(grace_s=30)
    thread.join(30)
    assert not thread.is_alive()
    with pytest.raises(QueueFull):  # nobody would ever answer it
        thread.submit("m", [make_choice(tokenizer)])
    assert [event.finish_reason for _, event in events if event.finish_reason] == ["length"] * 2


def test_stopping_without_grace_tells_those_who_wait(engine, tokenizer, threads):
    thread, events = threads(Lane(engine, num_rows=1, chunk=64))
    choices = [make_choice(tokenizer, max_tokens=120) for _ in range(5)]
    thread.submit("m", choices)
    thread.stop(grace_s=0)
    thread.join(10)
    assert ended(events, choices)
    assert (choices[-1].call, Event(0, error="the server is shutting down")) in events
