"""What the web server refuses, with which status, and what it keeps to itself."""

import json
import logging
import threading

import httpx
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from nanochat.api import ChatRequest, CompletionRequest
from nanochat.common import UserError
from nanochat.scheduler import RequestFailed, ShuttingDown
from nanochat.service import ClientLeft, Service, failure_status
from scripts.chat_web import create_app, find_models, is_loopback, main, parse_args
from tests.servers import HELLO, MODEL, URL, chat, running_server, tiny_service, wait_for


@pytest.fixture(scope="module")
def client(tokenizer):
    service = tiny_service(tokenizer)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        yield client


# -- refusals


@pytest.mark.parametrize("fields, hint", [
    ({"temperature": -1}, "temperature"), ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"),
    ({"n": 0}, "n"), ({"max_tokens": 0}, "max_tokens"), ({"stop": ["a", ""]}, "stop.1: "),
    ({"stop": ["a"] * 5}, "stop: Input should be a valid string, or: List should have at most 4 items"),
    ({"messages": []}, "messages"), ({"messages": [{"role": "user"}]}, "messages.0: content is missing"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": None}]}, "no message has a content"),
    ({"messages": [{"role": "user", "content": "word " * 500}]}, "the newest message takes"),
    ({"presence_penalty": 3}, "presence_penalty"), ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"functions": [{"name": "add"}]}, "functions is not supported: use tools"), ({"seed": 2**70}, "seed"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
     "messages.0.content.0.type: Input should be 'text'"),
])
def test_a_wrong_field_is_a_400_that_names_it(client, fields, hint):
    response = chat(client, **fields)
    error = response.json()["error"]
    assert response.status_code == 400 and hint in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}


def test_the_schema_and_probes_by_head_are_as_clients_expect(client):
    responses = client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses) == {"200", "4XX"}  # 422, FastAPI's own, is never sent
    assert all(client.head(path).status_code == 200 for path in ("/", "/health", "/ready"))


def test_what_other_clients_send_by_default_is_accepted(client):
    fields = {"presence_penalty": 0, "frequency_penalty": 0, "user": "x", "top_k": 5, "min_p": 0.1, "stop": None,
              "max_tokens": None, "max_completion_tokens": 3, "response_format": {"type": "text"}, "tools": [],
              "messages": [{"role": "developer", "content": "short"},
                           {"role": "user", "content": [{"type": "text", "text": "hi"}]}]}
    assert chat(client, **fields).json()["usage"]["completion_tokens"] <= 3


@pytest.mark.parametrize("prompt", [[], [[]], [10**6], [[1], [512]], [-1], list(range(128)), ["a", 1], None])
def test_a_prompt_that_cannot_be_is_a_400(client, prompt):
    response = client.post("/v1/completions", json={"prompt": prompt})
    assert response.status_code == 400 and "error" in response.json()


@pytest.mark.parametrize("kind, body", [
    (CompletionRequest, {"prompt": [-1] * 9999}), (CompletionRequest, {"prompt": [[-1] * 99] * 100}),
    (ChatRequest, {"messages": [{"role": "user", "content": [{"type": "x", "text": 1}] * 99}] * 99})])
def test_the_first_of_many_mistakes_is_enough(kind, body):
    """To list 400,000 of them took 15 s, in which nobody else was served."""
    with pytest.raises(ValidationError) as caught:
        kind(**body)
    assert caught.value.error_count() <= 4  # one for each form that the field may have


def test_refusals_have_openai_s_shape_and_the_right_status(client):
    unknown = chat(client, model="gpt-9")
    assert unknown.status_code == 404 and unknown.json()["error"]["param"] == "model"
    assert client.get("/v1/models/gpt-9").status_code == 404
    assert client.get(f"/v1/models/{MODEL.split('-')[0]}").json()["id"] == MODEL
    assert client.get("/nothing").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/chat/completions").status_code == 405
    bad_json = client.post("/v1/chat/completions", content=b"{bad", headers={"content-type": "application/json"})
    assert bad_json.status_code == 400 and "not JSON" in bad_json.json()["error"]["message"]
    unmarked = client.post("/v1/chat/completions", content=json.dumps(HELLO).encode())
    assert unmarked.status_code == 415 and "Content-Type: application/json" in unmarked.json()["error"]["message"]
    long = [{"role": role, "content": "x" * 50_000} for role in ("user", "assistant", "user")]
    tokens = client.post("/tokenize", json={"messages": long})
    assert tokens.status_code == 400 and "100000 characters" in tokens.json()["error"]["message"]


def test_a_body_that_is_too_large_is_a_413_with_a_length_or_without(client):
    body = b'{"messages": "' + b"x" * (5 * 2**20) + b'"}'
    headers = {"content-type": "application/json"}
    for content in (body, iter([body[: 2**22], body[2**22:]])):  # the iterator is sent without a length
        response = client.post("/v1/chat/completions", content=content, headers=headers)
        assert response.status_code == 413 and response.json()["error"]["message"]


def test_a_client_that_hangs_up_is_no_failure_of_the_server(tokenizer):
    service = tiny_service(tokenizer, sequence_len=4096, endless=True)
    with running_server(service) as (address, _):
        assert wait_for(lambda: service.trouble is None)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json={"prompt": "a", "max_tokens": 4000}, timeout=0.5)
        assert wait_for(lambda: 'code="499",path="/v1/completions"' in httpx.get(f"{address}/metrics").text)
        assert wait_for(lambda: service.num_running() == 0)
        assert 'code="5' not in httpx.get(f"{address}/metrics").text


def test_a_full_queue_is_a_429_that_says_when_to_come_back(tokenizer):
    service = tiny_service(tokenizer, num_rows=1, max_waiting=6)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        first = threading.Thread(target=client.post, args=("/v1/completions",),
                                 kwargs={"json": {"prompt": [[1]] * 3, "max_tokens": 100}})
        first.start()
        assert wait_for(lambda: service.num_waiting())
        refused = chat(client, n=3)
        first.join()
    assert not service.open_responses
    assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_until_the_model_is_there_it_says_loading(tokenizer):
    loading, loaded = threading.Event(), tiny_service(tokenizer).batchers[0].load
    service = Service(lambda i: loading.wait() and loaded(), [MODEL])
    with TestClient(create_app(service), base_url=URL) as client:
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        answer = chat(client)
        assert answer.status_code == 503 and answer.json()["error"]["message"] == "Loading model"
        assert client.get("/v1/models").json()["data"][0]["id"] == MODEL
        loading.set()
        assert wait_for(lambda: client.get("/ready").status_code == 200)
        assert chat(client).status_code == 200
        service.stop()
        assert client.get("/ready").status_code == chat(client).status_code == 503


def test_a_model_that_cannot_be_loaded_ends_the_server(tokenizer):
    failed = threading.Event()
    service = Service(lambda i: (_ for _ in ()).throw(UserError("no such file")), [MODEL])
    service.on_failure = failed.set
    with TestClient(create_app(service), base_url=URL) as client:
        assert failed.wait(10) and isinstance(service.error, UserError)
        assert client.get("/ready").status_code == 503


# -- safe by default


def test_a_key_is_asked_of_all_but_the_page_and_the_probes(tokenizer):
    service = tiny_service(tokenizer)
    with TestClient(create_app(service, api_keys=["sésame"]), base_url="http://example.org") as client:
        assert wait_for(lambda: service.trouble is None)
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert client.get(path).status_code == 401
            assert client.get(path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        refused = chat(client)
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        assert client.get("/health").status_code == client.get("/ready").status_code == 200
        right = {"Authorization": "Bearer sésame".encode()}
        assert client.get("/metrics", headers=right).status_code == 200


def test_other_machines_need_a_key(monkeypatch):
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    monkeypatch.setattr("sys.argv", ["chat_web", "--host", "0.0.0.0"])
    with pytest.raises(UserError, match="needs a key"):
        main()
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True, True, True, False, False]


def test_without_a_key_only_local_names_are_answered(client):
    assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/health", headers={"Host": "localhost:9999"}).status_code == 200


def test_cors_is_off_and_can_be_opened_for_one_origin(client, tokenizer):
    headers = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in client.options("/v1/models", headers=headers).headers
    with TestClient(create_app(tiny_service(tokenizer), cors_origin=["https://a.example"]), base_url=URL) as opened:
        allowed = opened.options("/v1/models", headers=headers).headers["access-control-allow-origin"]
        assert allowed == "https://a.example"
        headers["Origin"] = "https://b.example"
        assert "access-control-allow-origin" not in opened.options("/v1/models", headers=headers).headers


def test_the_page_may_load_nothing_from_elsewhere(client):
    first, second = client.get("/"), client.get("/")
    policy = first.headers["content-security-policy"]
    nonce = policy.split("'nonce-")[1].split("'")[0]
    assert policy.startswith("default-src 'none'; script-src 'nonce-") and "unsafe" not in policy
    assert nonce in first.text and "__NONCE__" not in first.text and nonce not in second.text


def test_chat_text_is_not_logged(client, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    chat(client, messages=[{"role": "user", "content": "xyzzy secret"}])
    chat(client, messages=[{"role": "user", "content": "xyzzy secret " * 300}])
    output = capfd.readouterr()
    assert "xyzzy" not in caplog.text + output.out + output.err


def test_models_are_named_by_stage_and_tag(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match="no sft checkpoint"):
        find_models(parse_args([]))
    with pytest.raises(UserError, match="stage:tag"):
        find_models(parse_args(["--models", "base:d4:x"]))


@pytest.mark.parametrize("key", ["", " ", ",", "\t\n"])
def test_a_blank_key_is_no_key(monkeypatch, key):
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)
    with pytest.raises(UserError, match="a blank key is no key"):
        parse_args(["--host", "0.0.0.0", "--api_key", key])
    with pytest.raises(UserError, match="a blank key is no key"):
        parse_args(["--api_key", key])  # somebody meant to have one
    monkeypatch.setenv("NANOCHAT_API_KEY", key)
    if key:
        with pytest.raises(UserError, match="a blank key is no key"):
            parse_args([])
    else:  # an empty variable is the same as none
        assert parse_args([]).api_keys == []


def test_several_keys_are_separated_by_commas_and_stripped(monkeypatch):
    monkeypatch.setenv("NANOCHAT_API_KEY", " one,two , ,")
    assert parse_args([]).api_keys == ["one", "two"]
    assert parse_args(["--api_key", "three\n"]).api_keys == ["three"]


def test_how_an_answer_failed_is_told_by_the_type_of_the_error():
    errors = [ClientLeft("x"), ShuttingDown("x"), RequestFailed("the client has left")]
    assert [failure_status(error) for error in errors] == [499, 503, 500]
