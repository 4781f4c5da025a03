"""What the tests of the server share: a service with a tiny model, in process or behind a real socket."""

import contextlib
import socket
import threading
import time

import uvicorn

from nanochat.engine import Engine
from nanochat.service import Service
from nanochat.serving import Lane
from scripts.chat_web import Server, create_app
from tests.tiny import tiny_model

MODEL = "sft-tiny"
URL = "http://127.0.0.1"
HELLO = {"messages": [{"role": "user", "content": "the light of the sun"}], "seed": 3, "max_tokens": 8}


def chat(client, **fields):
    """The response to a chat request: HELLO with other fields."""
    return client.post("/v1/chat/completions", json={**HELLO, **fields})


def tiny_engine(tokenizer, sequence_len=128):
    return Engine(tiny_model(tokenizer.get_vocab_size(), sequence_len).eval(), tokenizer)


def tiny_service(tokenizer, sequence_len=128, num_rows=4, chunk=32, endless=False, **settings):
    """endless: no token ends an answer, so that a test decides when it is over."""
    engine = tiny_engine(tokenizer, sequence_len)
    engine.stop_tokens = frozenset() if endless else engine.stop_tokens
    settings = {"max_tokens": 16, **settings}
    return Service(lambda i: {MODEL: Lane(engine, num_rows, chunk)}, [MODEL], **settings)


@contextlib.contextmanager
def running_server(service, **app_settings):
    """A real server on a free port of 127.0.0.1, in a thread: yields (its address, the uvicorn server)."""
    app = create_app(service, **app_settings)
    app.state.service = service
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not (server.started and all(decode.loaded.is_set() for decode in service.threads)):
                time.sleep(0.01)
                assert thread.is_alive()
            yield f"http://127.0.0.1:{sock.getsockname()[1]}", server
        finally:
            server.should_exit = True
            thread.join()


def wait_for(condition, timeout_s=10):
    """True as soon as the condition holds, False when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
