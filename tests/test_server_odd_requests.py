"""
Hand-made requests, more than 1,500: every field with values that it is not made for, and bytes that are hardly HTTP.
None ends in a 5xx, every refusal is one clear line, and the server goes on.
"""

import contextlib
import socket
from urllib.parse import urlsplit

import httpx
import pytest

from tests.servers import running_server, tiny_service

# -----------------------------------------------------------------------------
# Odd values, as JSON; some of them only Python's parser takes for JSON

VALUES = [
    "null", "true", '""', '" "', '"x"', r'"\u0000"', r'"\ud800"', '"' + "x" * 2000 + '"', '"12"',
    "-1", "0", "7", "1.5", "1e999", "-1e-320", "NaN", "Infinity", str(2**31), str(2**63), "1" * 5000,
    "[]", "[[]]", "[null]", "[7]", '["x", "x"]', "[" * 900 + "]" * 900, "{}", '{"7": 1}', '{"type": "x"}',
    r'{"\ud800": 1}', '{"type": "text", "text": 1}', "{",
]
MESSAGE = '{"role": "user", "content": "the light"}'
# route -> (a good request, fields that get the odd values; "messages.0.role" is inside)
ROUTES = {
    "/v1/chat/completions": (
        {"messages": f"[{MESSAGE}]", "max_tokens": "2"},
        ["model", "messages", "stream", "stream_options", "n", "seed", "stop", "max_tokens", "max_completion_tokens",
         "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
         "logit_bias", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "grammar", "user"],
    ),
    "/v1/completions": (
        {"prompt": '"the light"', "max_tokens": "2"},
        ["prompt", "max_tokens", "echo", "logprobs", "stop", "truncate_prompt_tokens", "suffix", "messages"],
    ),
    "/v1/responses": (
        {"input": '"the light"', "max_output_tokens": "2"},
        ["input", "instructions", "text", "max_output_tokens", "truncation", "previous_response_id", "stream"],
    ),
    "/tokenize": ({"prompt": '"the light"'}, ["prompt", "messages", "model"]),
}
MESSAGE_FIELDS = ["role", "content", "tool_calls", "function_call"]


def odd_bodies():
    """[(route, body)] as text."""
    bodies = []
    for route, (fields, names) in ROUTES.items():
        for name in names:
            for value in VALUES:
                changed = {**fields, name: value}
                bodies.append((route, object_text(changed)))
    # inside a message, and in the place of everything
    for name in MESSAGE_FIELDS:
        for value in VALUES:
            message = object_text({"role": '"user"', "content": '"x"', name: value})
            bodies.append(("/v1/chat/completions", '{"messages": [' + message + "]}"))
    bodies += [("/v1/chat/completions", value) for value in ["", *VALUES]]
    return bodies


def object_text(fields):
    return "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items()) + "}"


BODIES = odd_bodies()
EVERY_20TH = BODIES[::19]  # 19 and the number of values have no common factor: every value comes up


@pytest.fixture(scope="module")
def address(tokenizer):
    with running_server(tiny_service(tokenizer, sequence_len=64, max_tokens=4)) as (address, _):
        yield address


def check_refusal(response, sent):
    """One line, in OpenAI's shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, sent
    message = error["message"]
    assert message and len(message) < 1000 and message.isprintable(), (sent, message)


@pytest.mark.parametrize("bodies", [EVERY_20TH, pytest.param(BODIES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_an_odd_value_is_answered_or_refused_in_one_line(bodies, address):
    assert len(set(BODIES)) == len(BODIES) > 1500
    seen = {200: 0, 400: 0}
    with httpx.Client(base_url=address, timeout=120, headers={"Content-Type": "application/json"}) as client:
        for route, body in bodies:
            sent = f"{route} {body[:300]}"
            response = client.post(route, content=body.encode())
            assert response.status_code in seen or response.status_code == 404, (sent, response.text)
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            if response.status_code != 200:
                check_refusal(response, sent)
            elif "event-stream" in response.headers["content-type"]:
                assert '"error": {' not in response.text, (sent, response.text)
        assert 'code="5' not in client.get("/metrics").text
    print(seen)
    assert min(seen.values()) > 0


# -----------------------------------------------------------------------------
# Odd bytes

HEAD = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
GOOD = '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}'
POST = f"POST /v1/chat/completions HTTP/1.1\r\n{HEAD}"

REQUEST_LINES = [
    "GET / HTTP/1.1", "GET  /health HTTP/1.1", "GET /health", "get /health HTTP/1.1", "GET /health HTTP/1.0",
    "GET /health HTTP/0.9", "GET /health HTTP/2.0", "GET /health HTTP/9.9", "GET /health HTTPS/1.1",
    "HEAD /health HTTP/1.1",
    "BREW /health HTTP/1.1", "OPTIONS * HTTP/1.1", "CONNECT example.org:443 HTTP/1.1", "TRACE /health HTTP/1.1",
    "DELETE /v1/models HTTP/1.1", "PUT / HTTP/1.1", "PATCH /v1/chat/completions HTTP/1.1", "PRI * HTTP/2.0",
    "GET http://127.0.0.1/health HTTP/1.1", "GET http://example.org/ HTTP/1.1", "GET /../../etc/passwd HTTP/1.1",
    "GET /%2e%2e/%00 HTTP/1.1", "GET /%ff%fe HTTP/1.1", "GET /health?%ff=%zz&&& HTTP/1.1",
    "GET /v1/models/%0d%0a HTTP/1.1",
    "GET //health HTTP/1.1", "GET /health/ HTTP/1.1", "GET /health#x HTTP/1.1", "GET /\u00e9 HTTP/1.1",
    "GET \\health HTTP/1.1",
    "GET /v1/models/sft%2Ftiny HTTP/1.1", "GET /v1/models/" + "x" * 3000 + " HTTP/1.1",
]
HEADERS = [
    "Host:", "Host: a b", "Host: 127.0.0.1:99999999", "Host: [::1", "Host: \u00e9", "X: \x01", "X", ": x", "X : x",
    "X: a\r\n b", "Content-Length: -1", "Content-Length: 1e3", "Content-Length: 5, 6",
    "Content-Length: 99999999999999999999",
    "Transfer-Encoding: gzip", "Transfer-Encoding: chunked, chunked", "Expect: 100-continue", "Expect: 200-ok",
    "Upgrade: websocket\r\nConnection: Upgrade", "Upgrade: h2c\r\nConnection: Upgrade", "Authorization: Bearer",
    "Authorization: Bearer \u00e9", "Authorization: Basic x", "Cookie: " + "a=b; " * 500, "Range: bytes=0-1",
    "Accept: nothing/at-all", "Accept-Encoding: x", "Content-Encoding: gzip", "Origin: null", "X-Forwarded-For: \u00e9",
]
CONTENTS = [
    # (headers, body)
    (f"Content-Length: {len(GOOD) - 1}", GOOD), (f"Content-Length: {len(GOOD)}\r\nContent-Length: 3", GOOD),
    (f"Content-Length: {len(GOOD)}", "\ufeff" + GOOD), ("Content-Length: 0", ""), ("Content-Length: 2", "\xff\xfe"),
    ("Transfer-Encoding: chunked", f"{len(GOOD):x}\r\n{GOOD}\r\n0\r\n\r\n"), ("Transfer-Encoding: chunked", "zz\r\nx"),
    ("Transfer-Encoding: chunked", "-5\r\nx\r\n0\r\n\r\n"), ("Transfer-Encoding: chunked", "ffffffffffffffff\r\nx"),
    ("Transfer-Encoding: chunked", f"{len(GOOD):x};a=b\r\n{GOOD}\r\n0\r\nX: y\r\n\r\n"),
    (f"Transfer-Encoding: chunked\r\nContent-Length: {len(GOOD)}", GOOD),
    (f"Content-Length: {len(GOOD)}\r\nContent-Encoding: gzip", GOOD),
]


def odd_requests():
    requests = [f"{line}\r\n{HEAD}\r\n" for line in REQUEST_LINES]
    requests += [f"GET /health HTTP/1.1\r\n{header}\r\nConnection: close\r\n\r\n" for header in HEADERS]
    requests += [f"{POST}{headers}\r\n\r\n{body}" for headers, body in CONTENTS]
    requests += ["\r\n\r\n", "\x00" * 100, "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "GET", "\r\n" * 3000]
    return requests


def ask(address, data):
    """What comes until the server hangs up, or goes silent after we did."""
    parts = urlsplit(address)
    received = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=20) as sock:
        with contextlib.suppress(ConnectionError):
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)  # this is all
            while piece := sock.recv(2**16):
                received += piece
    return received


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_bytes_that_are_hardly_http_are_answered_or_hung_up_on(encoding, address):
    for text in odd_requests():
        received = ask(address, text.encode(encoding, errors="replace"))
        if received:
            status = received.split(None, 2)[1]
            assert received.startswith(b"HTTP/1.") and status[:1] in b"234", (text[:300], received[:300])
    metrics = httpx.get(f"{address}/metrics").text
    assert 'code="5' not in metrics
