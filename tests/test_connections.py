"""What a connection may take of the server without a whole request: bytes, time, and the end of a shutdown."""

import asyncio
import contextlib
import json
import logging
import socket
import time

import httpx
import pytest
from starlette.requests import Request as HTTPRequest

from nanochat.gate import LARGE_BODY_BYTES, MAX_COMMAS, MAX_HEAD_BYTES, BodyRequest
from tests.servers import HELLO, running_server, tiny_service, wait_for

REQUEST_S = 0.6  # of an impatient server, instead of 20 s


@pytest.fixture(scope="module")
def impatient(tokenizer):
    """(address, service) of a server with little patience, whose answers end by length alone."""
    service = tiny_service(tokenizer, sequence_len=16384, endless=True)
    with running_server(service, request_s=REQUEST_S) as (address, _):
        yield address, service


@pytest.fixture(scope="module")
def address(tokenizer):
    """Of a server with the usual limits."""
    with running_server(tiny_service(tokenizer)) as (address, _):
        yield address


def connect(address, data=b""):
    host, port = address.removeprefix("http://").split(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    sock.sendall(data)
    return sock


def read_to_end(sock):
    """All that comes until the server hangs up. A TimeoutError if it does not within 20 s."""
    received = b""
    with sock, contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(2**16):
            received += piece
    return received


def post(fields, *headers, path="/v1/chat/completions"):
    body = json.dumps(fields).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json",
             f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


# -- time


@pytest.mark.parametrize("sent, status", [
    (b"", b""),                                 # nothing was asked, so nothing is answered
    (b"GET /health HT", b"408"),
    (b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n", b"408"),
    (post(HELLO)[:-10], b"408"),
], ids=["silent", "half a line", "half a head", "half a body"])
def test_a_connection_without_a_whole_request_is_closed(impatient, sent, status):
    address, _ = impatient
    begin = time.monotonic()
    socks = [connect(address, sent) for _ in range(20)]
    for sock in socks:
        received = read_to_end(sock)
        assert received.split(b" ")[1:2] == [status] * bool(status)
    assert time.monotonic() - begin > REQUEST_S
    if status:
        head, body = received.split(b"\r\n\r\n")
        assert b"\r\nconnection: close" in head and "did not come in whole" in json.loads(body)["error"]["message"]


def test_a_byte_now_and_then_does_not_keep_a_connection(impatient):
    address, _ = impatient
    sock = connect(address)
    begin = time.monotonic()
    with sock, pytest.raises(OSError):
        for byte in post(HELLO):
            sock.sendall(bytes([byte]))
            time.sleep(0.1)
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("after", [b"", b"\r\n", b"GET /hea", post(HELLO)[:-10]], ids=["", "crlf", "head", "body"])
def test_an_answer_may_take_longer_whatever_is_sent_after_its_request(impatient, after):
    """Some clients end a body by an empty line, others send their next request before the answer."""
    address, service = impatient
    with connect(address, post({**HELLO, "max_tokens": 16000, "stream": True}) + after) as sock:
        end = time.monotonic() + 4 * REQUEST_S
        while time.monotonic() < end:
            assert sock.recv(2**16)
        assert service.num_running() == 1
    assert wait_for(lambda: not service.num_running(), 30)


def test_a_kept_connection_serves_one_request_after_another(impatient):
    """Between two requests another limit counts, IDLE_S."""
    address, _ = impatient
    with httpx.Client(base_url=address) as client:
        for _ in range(3):
            assert client.get("/health").status_code == 200
            time.sleep(1.5 * REQUEST_S)


# -- bytes


def test_a_long_head_is_a_431(address):
    for num_bytes, status in [(MAX_HEAD_BYTES - 1000, 200), (MAX_HEAD_BYTES + 1000, 431)]:
        response = httpx.get(f"{address}/health", headers={"X-Long": "x" * num_bytes})
        assert response.status_code == status
    assert "longer than" in response.json()["error"]["message"]
    assert httpx.get(f"{address}/health?{'x' * MAX_HEAD_BYTES}").status_code == 431


def test_a_head_without_an_end_is_not_collected(address):
    with connect(address, b"GET /health HTTP/1.1\r\nX-Long: ") as sock:
        num_sent = 0
        with contextlib.suppress(OSError):
            while num_sent < 2**26:
                num_sent += sock.send(b"x" * 1000)
        # what is sent after the end lies in the system's buffers
        assert num_sent < 2**24


def test_a_large_body_is_parsed_off_the_event_loop():
    async def parse(body):
        """(the parsed body, whether the event loop went on meanwhile)"""
        async def receive():
            return {"type": "http.request", "body": body}

        request = BodyRequest({"type": "http", "headers": []}, receive)
        await request.body()
        others = asyncio.create_task(asyncio.sleep(0))
        return await request.json(), others.done()

    small, large = {"prompt": "x"}, {"prompt": "x" * LARGE_BODY_BYTES}
    assert asyncio.run(parse(json.dumps(small).encode())) == (small, False)
    assert asyncio.run(parse(json.dumps(large).encode())) == (large, True)
    assert issubclass(BodyRequest, HTTPRequest)


def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(address):
    for num in (MAX_COMMAS, MAX_COMMAS + 2):
        response = httpx.post(f"{address}/v1/completions", json={"prompt": [1] * num})
        message = response.json()["error"]["message"]
        assert (response.status_code, "commas" in message) == ((400, False) if num == MAX_COMMAS else (413, True))


# -- shutdown


def test_a_shutdown_does_not_wait_for_requests_that_are_not_whole(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    with running_server(tiny_service(tokenizer), grace_s=15) as (address, uvicorn_server):
        half = [b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n", post(HELLO)[:-10]]
        socks = [connect(address, data) for data in half * 5]
        assert wait_for(lambda: len(uvicorn_server.server_state.connections) == len(socks))
        begin = time.monotonic()
    assert time.monotonic() - begin < 15
    assert not any(record.exc_info for record in caplog.records)
    for sock in socks:
        read_to_end(sock)


def test_a_shutdown_cuts_off_a_client_that_does_not_read_its_answer(tokenizer, caplog):
    caplog.set_level(logging.INFO)
    with running_server(tiny_service(tokenizer), grace_s=1) as (address, uvicorn_server):
        # an answer larger than the buffers of the system
        sock = connect(address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(post({"prompt": "a " * 50_000}, path="/tokenize") * 4)
        assert wait_for(lambda: uvicorn_server.server_state.total_requests or uvicorn_server.server_state.tasks)
        time.sleep(1)
        begin = time.monotonic()
    assert time.monotonic() - begin < 15
    assert not any(record.exc_info for record in caplog.records)
    sock.close()
