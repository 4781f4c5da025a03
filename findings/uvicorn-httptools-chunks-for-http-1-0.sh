#!/usr/bin/env bash
# uvicorn: with httptools, a client of HTTP/1.0 gets chunk sizes inside a streamed body
#
# Expected: chunks exist since HTTP/1.1. A client that says HTTP/1.0 gets a streamed body as it is, and
#   the end of the connection ends it: both of uvicorn's parsers do the same.
# Happens:  h11 does so. httptools, which is used whenever it is installed (`uvicorn[standard]`), answers
#   "transfer-encoding: chunked" to a client that cannot read it, so the sizes stand in the text.
#   ab and older scripts say HTTP/1.0, and so did nginx as a proxy by default for long.
#
# Versions: uvicorn 0.54.0, httptools 0.9.0, h11 0.16.0, starlette 1.10.0, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   h11       b'data: one\n\ndata: two\n\n'
#   httptools b'b\r\ndata: one\n\n\r\nb\r\ndata: two\n\n\r\n0\r\n\r\n'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python uvicorn==0.54.0 httptools==0.9.0 h11==0.16.0 starlette==1.10.0
cat > try.py <<'PYTHON'
import socket
import sys
import threading
import time

import uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route


async def events():
    yield "data: one\n\n"
    yield "data: two\n\n"


async def stream(request):
    return StreamingResponse(events(), media_type="text/event-stream")


def ask(port):
    """The body of an answer to a client of HTTP/1.0."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n")
        answer = b""
        while received := client.recv(65536):
            answer += received
    return answer.split(b"\r\n\r\n", 1)[1]


seen = {}
for parser in ("h11", "httptools"):
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(Starlette(routes=[Route("/", stream)]), http=parser, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    seen[parser] = ask(listener.getsockname()[1])
    server.should_exit = True
    thread.join(20)
    print(f"{parser:<9} {seen[parser]}")

plain = b"data: one\n\ndata: two\n\n"
chunked = b"b\r\ndata: one\n\n\r\nb\r\ndata: two\n\n\r\n0\r\n\r\n"
sys.exit(seen != {"h11": plain, "httptools": chunked})
PYTHON
venv/bin/python try.py
