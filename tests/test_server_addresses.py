"""By which names and paths the server is called, and in which version of HTTP."""

import json
import socket

import pytest
from starlette.testclient import TestClient

from scripts.chat_web import LOCAL_HOSTS, create_app, parse_args
from tests.servers import HELLO, URL, chat, running_server, tiny_service, wait_for


@pytest.fixture(scope="module")
def client(tokenizer):
    service = tiny_service(tokenizer)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        yield client


# -- host names


@pytest.mark.parametrize("host", ["host.docker.internal", "host.docker.internal:8000", "evil.example", "[::2]:80"])
def test_a_strange_host_is_refused_with_the_cure(client, host):
    response = client.get("/v1/models", headers={"Host": host})
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "host_not_allowed"
    assert f"--allow_host={host.removesuffix(':8000').removesuffix(':80')}" in error["message"]
    assert "NANOCHAT_API_KEY" in error["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:8000", "[::1]:8000", "[::1]"])
def test_local_names_are_answered(client, host):
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_host_is_allowed_by_its_flag_or_by_a_key(tokenizer):
    hosts = (*LOCAL_HOSTS, *parse_args(["--allow_host", "host.docker.internal"]).allow_host)
    headers = {"Host": "host.docker.internal:8000", "Authorization": "Bearer sesame"}
    for settings in ({"hosts": hosts}, {"api_keys": ["sesame"]}):
        with TestClient(create_app(tiny_service(tokenizer), **settings), base_url=URL) as client:
            assert client.get("/v1/models", headers=headers).status_code == 200


# -- paths


@pytest.mark.parametrize("path", ["/chat/completions", "/v1/embeddings", "/api/chat", "/v1/messages"])
def test_an_unknown_path_is_a_404_that_says_what_there_is(client, path):
    response = client.post(path, json=HELLO)
    message = response.json()["error"]["message"]
    assert response.status_code == 404 and path in message
    for known in ("POST /v1/chat/completions", "POST /v1/responses", "POST /v1/completions", "GET /v1/models",
                  "POST /tokenize", "GET /health"):
        assert known in message


def test_a_wrong_method_is_told_the_right_one(client):
    response = client.get("/v1/chat/completions")
    assert response.status_code == 405 and "/v1/chat/completions takes POST, not GET" in response.text


def test_an_unknown_model_is_a_404_that_says_which_there_are(client):
    response = chat(client, model="gpt-9")
    assert response.status_code == 404 and "there is: sft-tiny" in response.json()["error"]["message"]


# -- HTTP/1.0


def exchange(address, version, body, host=True):
    """(head, body) of the response to a POST of raw bytes; the connection is read to its end."""
    name, port = address.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = [f"POST /v1/chat/completions HTTP/{version}", "Content-Type: application/json",
            f"Content-Length: {len(data)}", "Connection: close", *([f"Host: {name}"] if host else []), "", ""]
    with socket.create_connection((name, int(port)), timeout=30) as connection:
        connection.sendall("\r\n".join(head).encode() + data)
        received = b""
        while part := connection.recv(65536):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    return head.decode().lower(), body.decode()


@pytest.mark.parametrize("host", [True, False])
def test_an_http_1_0_client_gets_a_plain_body(tokenizer, host):
    service = tiny_service(tokenizer)
    with running_server(service) as (address, _):
        assert wait_for(lambda: service.trouble is None)
        head, stream = exchange(address, "1.0", {**HELLO, "stream": True}, host)
        assert "transfer-encoding" not in head and "connection: close" in head and "200" in head
        lines = [line for line in stream.split("\n\n") if line]
        assert all(line.startswith(("data: ", ":")) for line in lines) and lines[-1] == "data: [DONE]"
        head, whole = exchange(address, "1.0", HELLO, host)
        assert f"content-length: {len(whole.encode())}" in head and json.loads(whole)["choices"]
        head, _ = exchange(address, "1.1", {**HELLO, "stream": True})
        assert "transfer-encoding: chunked" in head
