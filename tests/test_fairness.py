"""Clients take turns: in the queue, for the rows, and before the server as a whole."""

from collections import Counter

import httpx
import pytest
from starlette.testclient import TestClient

from nanochat.batcher import Batcher, QueueFull
from nanochat.decoder import Row
from nanochat.fair_queue import FairQueue
from nanochat.sampling import Sampling
from nanochat.scheduler import Request, Scheduler
from scripts.chat_web import create_app
from tests.servers import HELLO, URL, running_server, tiny_engine, tiny_service, wait_for

CROWD = {"prompt": ["the light"] * 16, "n": 16, "max_tokens": 100}  # 256 completions


@pytest.fixture
def engine(tokenizer):
    return tiny_engine(tokenizer)


def make_requests(tokenizer, client, num, max_tokens=40, temperature=0.0, prompt=(1, 2, 3), **more):
    requests = []
    for i in range(num):
        row = Row([*prompt, i], Sampling(temperature, seed=i), max_tokens, frozenset(), None, more.get("num_top"))
        requests.append(Request(row, tokenizer, client=client, echo=more.get("echo")))
    return requests


def step(scheduler):
    scheduler.admit()
    scheduler.pick()
    scheduler.forward()
    return scheduler.take_events()


def run(scheduler):
    events = []
    while scheduler.busy:
        events += step(scheduler)
    return events


def running(scheduler):
    """{client: rows}"""
    return dict(Counter(request.client for request in scheduler.running.values()))


# -- the queue


def test_clients_take_turns_and_keep_their_own_order(tokenizer):
    queue = FairQueue()
    queue.extend(make_requests(tokenizer, "many", 4))
    queue.extend(make_requests(tokenizer, "few", 2))
    queue.extend(make_requests(tokenizer, "one", 1))
    order = []
    while queue:
        request = queue.pop(Counter())
        order.append((request.client, request.row.prompt[-1]))
    assert order == [("many", 0), ("few", 0), ("one", 0), ("many", 1), ("few", 1), ("many", 2), ("many", 3)]


def test_who_has_fewer_rows_comes_first(tokenizer):
    queue = FairQueue()
    queue.extend(make_requests(tokenizer, "many", 1))
    queue.extend(make_requests(tokenizer, "few", 1))
    assert queue.peek(Counter(many=3, few=2)).client == "few"
    assert queue.num_by_client() == {"many": 1, "few": 1} and len(queue) == len(list(queue)) == 2


def test_what_is_put_back_comes_before_the_others_of_its_client(tokenizer):
    queue = FairQueue()
    first, second = make_requests(tokenizer, "a", 2)
    queue.extend([first, second])
    assert queue.pop(Counter()) is first
    queue.put_back(first)
    second.cancelled = True
    queue.drop_cancelled()
    assert list(queue) == [first]


# -- the rows


def test_a_newcomer_gets_a_row_within_a_step_though_all_are_taken(engine, tokenizer):
    scheduler = Scheduler(engine, num_rows=4, chunk=64)
    scheduler.waiting.extend(make_requests(tokenizer, "many", 20))
    step(scheduler)
    assert running(scheduler) == {"many": 4}
    scheduler.waiting.extend(make_requests(tokenizer, "new", 3))
    step(scheduler)
    assert running(scheduler) == {"many": 2, "new": 2}  # an even share, not all that it asks for
    scheduler.waiting.extend(make_requests(tokenizer, "newer", 1))
    step(scheduler)
    assert running(scheduler)["newer"] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_answer_that_had_to_wait_in_the_middle_is_the_same(engine, tokenizer, temperature):
    alone = make_requests(tokenizer, "many", 4, temperature=temperature)
    for request in alone:
        scheduler = Scheduler(engine, 1, 64)
        scheduler.waiting.append(request)
        run(scheduler)

    scheduler = Scheduler(engine, 4, 64)
    many = make_requests(tokenizer, "many", 4, temperature=temperature)
    scheduler.waiting.extend(many)
    for _ in range(10):
        step(scheduler)
    scheduler.waiting.extend(make_requests(tokenizer, "new", 2, max_tokens=5))
    step(scheduler)
    assert running(scheduler) == {"many": 2, "new": 2}
    events = run(scheduler)
    assert [request.row.tokens for request in many] == [request.row.tokens for request in alone]
    assert sum(event.finish_reason is not None for event in events) == 6


def test_an_echo_is_sent_once_even_if_its_row_is_given_back(engine, tokenizer):
    scheduler = Scheduler(engine, 2, 64)
    echoed = make_requests(tokenizer, "many", 2, echo="abc", num_top=1)
    scheduler.waiting.extend(echoed)
    events = step(scheduler) + step(scheduler)
    scheduler.waiting.extend(make_requests(tokenizer, "new", 1, max_tokens=4))
    events += run(scheduler)
    assert [event.request for event in events if event.kind == "prompt"] == echoed
    assert all(len(request.row.logprobs) == 40 for request in echoed)


def test_rows_are_not_handed_back_and_forth(engine, tokenizer):
    """To give a row back costs the reading of its tokens: it happens only where it makes shares more even."""
    scheduler = Scheduler(engine, 3, 64)
    scheduler.waiting.extend(make_requests(tokenizer, "a", 9, max_tokens=20))
    scheduler.waiting.extend(make_requests(tokenizer, "b", 9, max_tokens=20))
    num_read = []
    for name in ("prefill_short", "prefill"):
        read = getattr(scheduler.decoder, name)
        setattr(scheduler.decoder, name, lambda *args, read=read: num_read.append(1) or read(*args))
    run(scheduler)
    assert len(num_read) <= 18


def test_a_lone_row_is_never_taken_away(engine, tokenizer):
    scheduler = Scheduler(engine, 1, 64)
    (first,) = make_requests(tokenizer, "a", 1)
    scheduler.waiting.append(first)
    step(scheduler)
    scheduler.waiting.extend(make_requests(tokenizer, "b", 1))
    step(scheduler)
    assert list(scheduler.running.values()) == [first]


# -- places in the queue


def test_one_client_cannot_take_the_last_places(engine, tokenizer):
    batcher = Batcher(dict, lambda events: None, max_waiting=12)  # its thread never starts

    def fill(client):
        num = 0
        while True:
            try:
                batcher.submit("m", make_requests(tokenizer, client, 1))
            except QueueFull:
                return num
            num += 1

    # each leaves as many places free as it has, and one for somebody new
    assert [fill(client) for client in "abcdef"] == [6, 3, 1, 1, 1, 0]
    assert batcher.num_waiting == 12


def test_all_choices_of_a_request_count(engine, tokenizer):
    batcher = Batcher(dict, lambda events: None, max_waiting=12)
    with pytest.raises(QueueFull):
        batcher.submit("m", make_requests(tokenizer, "a", 7))
    batcher.submit("m", make_requests(tokenizer, "a", 6))
    with pytest.raises(QueueFull):
        batcher.submit("m", make_requests(tokenizer, "a", 1))
    batcher.submit("m", make_requests(tokenizer, "b", 3))


# -- the server


def client_at(source, address):
    """A client with an address of its own; all of 127.0.0.0/8 is this machine."""
    return httpx.Client(base_url=address, transport=httpx.HTTPTransport(local_address=source), timeout=60)


def test_a_request_for_more_than_can_wait_is_refused_with_the_number(tokenizer):
    with TestClient(create_app(tiny_service(tokenizer)), base_url=URL) as client:
        assert wait_for(lambda: client.get("/ready").status_code == 200)
        response = client.post("/v1/completions", json={"prompt": ["a"] * 128, "n": 16})
        assert response.status_code == 400 and "2048 completions" in response.json()["error"]["message"]
        assert "at most 256" in response.json()["error"]["message"]
        assert client.post("/v1/chat/completions", json=HELLO).status_code == 200


def test_a_giant_request_beside_ordinary_ones_starves_nobody(tokenizer):
    service = tiny_service(tokenizer, num_rows=8)
    with (running_server(service) as (address, _), client_at("127.0.0.2", address) as greedy,
          greedy.stream("POST", "/v1/completions", json={**CROWD, "stream": True}) as crowd):
        assert crowd.status_code == 200 and wait_for(lambda: service.num_running() == 8)
        for i in range(8):
            with client_at(f"127.0.0.{3 + i % 2}", address) as client:
                assert client.post("/v1/chat/completions", json=HELLO).status_code == 200
        assert service.num_waiting() > 64  # of the crowd
        refused = greedy.post("/v1/completions", json=CROWD)
        assert refused.status_code == 429 and "yours" in refused.json()["error"]["message"]


@pytest.mark.parametrize("keys, expected", [
    (["one", "two"], ["one", "two"]),             # several keys tell clients apart
    (["one"], ["testclient", None]),              # a single one does not
    ([], ["testclient", "testclient"]),
])
def test_a_client_is_known_by_its_key_else_by_its_address(tokenizer, keys, expected):
    service = tiny_service(tokenizer)
    with TestClient(create_app(service, api_keys=keys), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        seen = []
        submit = service.submit
        service.submit = lambda response: seen.append(response.requests[0].client) or submit(response)
        for key in ("one", "two"):
            headers = {"Authorization": f"Bearer {key}"}
            if client.post("/v1/chat/completions", json=HELLO, headers=headers).status_code == 401:
                seen.append(None)
    assert seen == expected
