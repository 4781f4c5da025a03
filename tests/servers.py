"""What the tests of the server share: a service with a tiny model, in process or behind a real socket."""

import contextlib
import threading
import time

import torch

from nanochat.connections import Server
from nanochat.engine import Engine
from nanochat.scheduler import Scheduler
from nanochat.service import Service
from nanochat.web import listen
from scripts.chat_web import create_app
from tests.tiny import tiny_model

MODEL = "sft-tiny"
URL = "http://127.0.0.1"
QUESTION = {"role": "user", "content": "What is 2+3?"}
TOOL_ANSWER = [{"type": "text", "text": "Let me add them: "}, {"type": "python", "text": "2+3"},
               {"type": "python_output", "text": "5"}, {"type": "text", "text": "It is **five**."}]
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
    return Service(lambda i: {MODEL: Scheduler(engine, num_rows, chunk)}, [MODEL], **settings)


def tool_script(tokenizer):
    """The ids of TOOL_ANSWER to QUESTION, as a model is trained to write them."""
    ids, _ = tokenizer.render_conversation({"messages": [QUESTION, {"role": "assistant", "content": TOOL_ANSWER}]})
    return ids[len(tokenizer.render_for_completion({"messages": [QUESTION]})):]


class Scripted:
    """Stands in for a model, for one conversation at a time: every answer is the same list of ids. Before place `hold`
    of it the batcher waits for `release`."""

    def __init__(self, script, tokenizer, sequence_len=256, hold=None):
        model = tiny_model(tokenizer.get_vocab_size(), sequence_len)
        self.script, self.config, self.device, self.cos = script, model.config, model.device, model.cos
        self.num_matrix_params = model.num_matrix_params
        self.start, self.place = tokenizer.encode_special("<|assistant_start|>"), 0
        self.hold, self.release, self.read = hold, threading.Event(), []  # read: all ids that it was given

    def __call__(self, ids, kv_cache, last_only):
        kv_cache.begin(ids.size(1))
        kv_cache.lengths[0] += ids.size(1)
        self.read += ids[0].tolist()
        self.place = 0 if ids[0, -1] == self.start else self.place + 1
        if self.place == self.hold:
            self.release.wait(30)
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[0, 0, self.script[min(self.place, len(self.script) - 1)]] = 50.0  # certain
        return logits


@contextlib.contextmanager
def running_server(service, grace_s=1, request_s=20, **app_settings):
    """A real server on a free port of 127.0.0.1, in a thread: yields (its address, the uvicorn server)."""
    app = create_app(service, **app_settings)
    with listen("127.0.0.1", 0) as sock:
        server = Server(app, service, grace_s, request_s, log_level="error")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not (server.started and service.trouble is None):
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
