"""The official client against a real server on 127.0.0.1; and what only a real connection shows: leaving, stopping."""

import json
import signal
import socket
import threading

import pytest

from tests.servers import HELLO, MODEL, running_server, tiny_service, wait_for

openai = pytest.importorskip("openai", reason="the openai client is a development dependency")
MESSAGES = HELLO["messages"]


@pytest.fixture(scope="module")
def service(tokenizer):
    return tiny_service(tokenizer, sequence_len=4096, num_rows=2, endless=True)


@pytest.fixture(scope="module")
def address(service):
    with running_server(service) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


# -- the client


def test_models(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_chat_whole_and_streamed(client):
    fields = dict(model=MODEL, messages=MESSAGES, seed=7, max_tokens=20, temperature=1.5)
    whole = client.chat.completions.create(**fields)
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content and chunks[-1].usage == whole.usage
    assert chunks[0].model_extra["nanochat"]["seed"] == whole.model_extra["nanochat"]["seed"] == 7


def test_logprobs_are_understood(client):
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, logprobs=True, top_logprobs=2, max_tokens=5)
    tokens = answer.choices[0].logprobs.content
    assert len(tokens) == 5 and len(tokens[0].top_logprobs) == 2


def test_completions_with_token_ids(client):
    answer = client.completions.create(model=MODEL, prompt=[[1, 2, 3], [4, 5]], max_tokens=3, echo=True, logprobs=1)
    assert [len(choice.logprobs.tokens) for choice in answer.choices] == [6, 5]
    assert answer.usage.prompt_tokens == 5


def test_errors_arrive_as_the_client_s_own(client):
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=-1)
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="gpt-9", messages=MESSAGES)
    with pytest.raises(openai.BadRequestError, match="functions is not supported: use tools"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES, functions=[{"name": "add"}])


def test_a_key_is_required_when_there_is_one(tokenizer):
    with running_server(tiny_service(tokenizer), api_keys=["sesame"]) as (address, _):
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0).models.list()
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="sesame", max_retries=0).models.list().data


def test_many_at_once_get_what_each_gets_alone(client):
    def ask(seed):
        answer = client.completions.create(model=MODEL, prompt=f"word {seed}", seed=seed, max_tokens=12)
        return answer.choices[0].text

    # none of their draws falls within 1e-5 of two tokens' boundary, where rounding decides
    seeds, together = range(10, 18), [None] * 8
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, ask(seeds[i]))) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == [ask(seed) for seed in seeds]


# -- connections


def num_generated(service):
    return service.registry.get_sample_value("nanochat_generation_tokens_total")


def send(address, path, body):
    """A POST over a socket of our own, which can be closed in the middle of the answer."""
    host, port = address.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    connection.sendall(f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                       f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_frees_the_row(service, address, stream):
    before = num_generated(service)
    connection = send(address, "/v1/completions", {"prompt": [1], "max_tokens": 4000, "stream": stream, "seed": 5})
    assert wait_for(lambda: service.num_running() == 1)
    if stream:
        received = b""
        while b"text_completion" not in received:  # head, comment and first event come in one piece or in several
            part = connection.recv(4096)
            assert part, received
            received += part
    connection.close()
    assert wait_for(lambda: service.num_running() == 0)
    assert wait_for(lambda: num_generated(service) > before or not stream)
    assert num_generated(service) - before < 3000  # long before its end


def test_who_leaves_the_queue_is_forgotten(service, address):
    body = {"prompt": [1], "max_tokens": 4000, "stream": True}
    connections = [send(address, "/v1/completions", body) for _ in range(5)]
    assert wait_for(lambda: service.num_running() == 2 and service.num_waiting() == 3)
    for connection in connections:
        connection.close()
    assert wait_for(lambda: service.num_running() == service.num_waiting() == 0)


def test_health_is_quick_while_all_rows_are_busy(service, address, client):
    body = {"prompt": [1], "max_tokens": 4000, "stream": True}
    connections = [send(address, "/v1/completions", body) for _ in range(2)]
    assert wait_for(lambda: service.num_running() == 2)
    assert client.with_options(timeout=1).models.list().data
    for connection in connections:
        connection.close()
    assert wait_for(lambda: service.num_running() == 0)


# -- stopping


def read_all(connection):
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts).decode()


def test_a_signal_lets_open_streams_finish(tokenizer):
    service = tiny_service(tokenizer, sequence_len=1024, endless=True)
    with running_server(service) as (address, server):
        connection = send(address, "/v1/completions", {"prompt": [1], "max_tokens": 200, "stream": True})
        assert wait_for(lambda: service.num_running() == 1)
        server.handle_exit(signal.SIGTERM, None)
        assert service.trouble == "Shutting down"
        text = read_all(connection)
    assert '"finish_reason": "length"' in text and "data: [DONE]" in text


def test_streams_that_take_too_long_are_ended_with_a_word(tokenizer):
    service = tiny_service(tokenizer, sequence_len=4096, endless=True)
    with running_server(service) as (address, server):
        connection = send(address, "/v1/completions", {"prompt": [1], "max_tokens": 4000, "stream": True, "seed": 5})
        assert wait_for(lambda: service.num_running() == 1)
        service.stop(grace_s=0.2)
        server.should_exit = True
        text = read_all(connection)
    assert '"message": "the server is shutting down"' in text and "[DONE]" not in text
