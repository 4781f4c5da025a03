"""
A stand-in for scripts/chat_web on 127.0.0.1: it serves the page with the same headers and answers from a script of
canned streams, delays and faults, so that a browser can be tried against what real servers do wrong. Requests are
checked and events written by the server's own nanochat/api.py.

    with PageServer() as server:
        server.script = [Answer(["Hel", "lo"]), Answer(status=429, headers={"Retry-After": "1"})]  # one per request
        server.url, server.requests                              # the address; [(body, headers), ...] of the calls

    python -m tests.page_server                                  # look at the page by hand, without a model
"""

import json
import math
import re
import select
import socket
import threading
import time
import zlib
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from nanochat.api import ChatRequest, CompletionRequest, error_body
from nanochat.chat_response import ChatResponse, TextResponse
from nanochat.scheduler import Event
from scripts.chat_web import page

MAX_CONTEXT = 2048  # tokens


@dataclass
class Answer:
    """One answer to a chat request. A piece is a token of text, or ("python" | "python_output", text)."""
    pieces: list = field(default_factory=list)
    finish: str = "stop"
    pace_s: float = 0.0            # wait this long before each piece
    status: int = 200              # any other: an error in OpenAI's shape and no stream
    headers: dict = field(default_factory=dict)
    message: str = "scripted error"
    code: str | None = None        # of the error
    hold: int | None = None        # after this many pieces, wait until server.release is set or the client goes
    cut: int | None = None         # after this many pieces, close the connection as a killed server does
    error: str | None = None       # after the pieces, an error inside the stream
    slice_bytes: int | None = None  # write the stream in slices of this size, wherever they fall
    dropped: int = 0               # turns that the server says it left out
    prompt_tokens: int = 100


def token_odds(piece):
    """(logprob, top 5 [(token, logprob)]) of a canned token: made from its checksum, so the same in every run."""
    p = max(0.02, 1 - (zlib.crc32(piece.encode()) % 1000 / 1000) ** 3)
    top = [(piece, p)] + [(other, (1 - p) / 2 ** (i + 1)) for i, other in enumerate([" the", " a", ".", "\n"])]
    ranked = sorted(((token, math.log(max(q, 1e-9))) for token, q in top), key=lambda pair: -pair[1])
    return math.log(p), ranked


class Pieces(list):
    """The tokenizer of canned answers: a piece is a token, and its id the place in this list."""

    def encode(self, piece):
        if piece not in self:
            self.append(piece)
        return self.index(piece)

    def decode_bytes(self, ids):
        return "".join(self[i] for i in ids).encode()


def event_of(piece, request, with_logprobs):
    kind, text = piece if isinstance(piece, tuple) else ("text", piece)
    encode = request.tokenizer.encode
    logprob, top = token_odds(text)
    entry = encode(text), (logprob, [(encode(other), q) for other, q in top]), 0
    return Event(request, text, kind, [entry] if with_logprobs and kind != "python_output" else [])


def unescape(stream):
    """The same events with their letters beyond ASCII as they are, so that a slice can end inside one."""
    return re.sub("(?<=data: ){.*", lambda data: json.dumps(json.loads(data[0]), ensure_ascii=False), stream)


class PageServer:
    def __init__(self, script=(), port=0):
        self.script: list[Answer] = list(script)
        self.scripts: dict[str, list[Answer]] = {}  # the same for the requests of one model, by its name
        self.default = Answer(["Hello", " there", "."])  # once the scripts are used up
        self.models = {"d4-sft": {"stage": "sft", "examples": []}, "d4-base": {"stage": "base", "examples": []}}
        self.requests: list[tuple[dict, dict]] = []
        self.models_status = 200
        self.api_key: str | None = None                  # None: anybody may ask
        self.release, self.hung_up = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.get(self)

            def do_POST(self):
                outer.post(self)

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def allowed(self, handler):
        return self.api_key is None or handler.headers.get("Authorization") == f"Bearer {self.api_key}"

    def get(self, handler):
        path = handler.path.split("?")[0]
        if path == "/":
            response = page()
            return reply(handler, 200, response.body, response.headers)
        if path == "/v1/models" and not self.allowed(handler):
            return fail(handler, 401, "invalid API key")
        if path == "/v1/models" and self.models_status != 200:
            return fail(handler, self.models_status, "Loading model", {"Retry-After": "1"})
        if path == "/v1/models":
            models = [{"id": name, "object": "model", "max_model_len": MAX_CONTEXT, "nanochat": about}
                      for name, about in self.models.items()]
            return send_json(handler, {"object": "list", "data": models})
        fail(handler, 404, f"no such path: {path}")

    def post(self, handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if not self.allowed(handler):
            return fail(handler, 401, "invalid API key")
        self.requests.append((body, dict(handler.headers)))
        try:
            is_chat = handler.path == "/v1/chat/completions"
            fields = ChatRequest(**body) if is_chat else CompletionRequest(**body)
        except ValueError as error:
            return fail(handler, 400, str(error))
        script = self.scripts.get(body.get("model")) or self.script
        answer = script.pop(0) if script else self.default
        if answer.status != 200:
            return fail(handler, answer.status, answer.message, answer.headers, answer.code)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.end_headers()
        try:
            self.stream(handler, answer, body, fields)
        except OSError:  # the client went away
            self.hung_up.set()

    def stream(self, handler, answer, body, fields):
        def write(text):
            data, size = (unescape(text) if answer.slice_bytes else text).encode(), answer.slice_bytes or 1 << 20
            for i in range(0, len(data), size):
                handler.wfile.write(data[i:i + size])
                handler.wfile.flush()
                if answer.slice_bytes:
                    time.sleep(0.001)  # or the kernel joins the slices again

        about = {"seed": body.get("seed", 1234), "max_context": MAX_CONTEXT, "dropped_messages": answer.dropped}
        row = SimpleNamespace(tokens=[])
        request = SimpleNamespace(index=0, tokenizer=Pieces(), row=row, may_be_call=False)
        kind = ChatResponse if isinstance(fields, ChatRequest) else TextResponse
        response = kind(body.get("model"), [request], answer.prompt_tokens, about)

        write(response.opening())
        for i, piece in enumerate(answer.pieces):
            if i == answer.cut:
                return kill(handler)
            if i == answer.hold and self.wait_for_release(handler):
                return
            time.sleep(answer.pace_s)
            row.tokens.append(i)
            write(response.chunk(event_of(piece, request, fields.logprobs)))
        if answer.error:
            return write(f"data: {json.dumps(error_body(answer.error, 500))}\n\n")
        write(response.chunk(Event(request, finish_reason=answer.finish)))
        write(response.closing(fields.stream_options.include_usage))

    def wait_for_release(self, handler):
        """True when the client hung up first."""
        while not self.release.wait(0.01):
            if select.select([handler.connection], [], [], 0)[0] and not handler.connection.recv(1, socket.MSG_PEEK):
                self.hung_up.set()
                return True
        return False


def kill(handler):
    """End the connection with a reset, in the middle of whatever it was."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    handler.connection.shutdown(socket.SHUT_RDWR)


def reply(handler, status, body, headers):
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(body)


def send_json(handler, data, status=200, headers=None):
    body = json.dumps(data).encode()
    about = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    reply(handler, status, body, about | (headers or {}))


def fail(handler, status, message, headers=None, code=None):
    send_json(handler, error_body(message, status, code=code), status, headers)


def split(text):
    """Into pieces that look like tokens."""
    return re.findall(r"\s?\w{1,5}|\s*[^\w\s]+|\s+", text)


def demo_answer(pace_s=0.0):
    """Markdown of every kind, and a tool call."""
    before, after = "Let me count them.\n\n", """

There are **3** letters *r* in `strawberry`.

### How it was counted

1. Spell the word: s-t-**r**-a-w-b-e-**r**-**r**-y
2. Go through it letter by letter
   - count the ones that match
   - skip the others

```python
def count(word, letter):
    # one pass over the word
    return sum(1 for c in word if c == letter)

print(count("strawberry", "r"))  # 3
```

| word | letter | count |
|:---|:---:|---:|
| strawberry | r | 3 |
| banana | a | 3 |
| bookkeeper | e | 3 |

> A model that sees tokens, not letters, has to learn spelling.

More on [tokenization](https://en.wikipedia.org/wiki/Byte-pair_encoding).
"""
    call = [("python", "'strawberry'.count('r')"), ("python_output", "3")]
    return Answer(split(before) + call + split(after), pace_s=pace_s)


if __name__ == "__main__":
    server = PageServer(port=8000)
    server.default = demo_answer(pace_s=0.02)
    with server:
        print(f"{server.url}  (Ctrl+C ends it)")
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
