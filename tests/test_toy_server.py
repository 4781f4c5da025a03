"""Identity conversations asked from a server: a stand-in on 127.0.0.1 that answers well, badly, or not at all."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dev import gen_synthetic_data as gen
from dev.toyworld import server as toy_server
from nanochat.common import UserError


def chat(*turns):
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


GOOD = [chat(f"Who are you, number {i}?", f"I am nanochat, and this is answer {i}.") for i in range(40)]


class StandIn:
    """Answers POST /v1/chat/completions with the given replies in turn: a text, or an int for an HTTP status."""

    def __init__(self, replies):
        self.requests, replies = [], iter(replies)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.requests.append((self.path, dict(self.headers), json.loads(body)))
                reply = next(replies)
                status = reply if isinstance(reply, int) else 200
                data = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """The two files of a mirror that matter here: one conversation to train on, one prompt held out."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "tasks").mkdir()
    held_out = {"messages": chat("What is your name?", "I am nanochat."), "accept": ["nanochat"]}
    (tmp_path / "tasks/identity_test.jsonl").write_text(json.dumps(held_out) + "\n", encoding="utf-8")
    known = chat("Hi, who is there?", "It is me, nanochat.")
    (tmp_path / gen.IDENTITY_FILE).write_text(json.dumps(known) + "\n", encoding="utf-8")
    (tmp_path / gen.MANIFEST).write_text("{}", encoding="utf-8")
    return tmp_path


def add(mirror, replies, num):
    """Run the whole way over HTTP; returns (bad replies, conversations now in the file, what the server was sent)."""
    with StandIn(replies) as server:
        bad = gen.add_identity_conversations(
            mirror, num, lambda brief: gen.ask_server(server.url, "secret", "toy", brief), seed=1, wait_s=0)
    text = (mirror / gen.IDENTITY_FILE).read_text(encoding="utf-8")
    return bad, [json.loads(line) for line in text.splitlines()], server.requests


def test_good_replies_are_appended_after_what_was_there(mirror):
    bad, conversations, requests = add(mirror, map(json.dumps, GOOD), num=3)
    assert not bad
    assert conversations[0][0]["content"] == "Hi, who is there?" and conversations[1:] == GOOD[:3]
    path, headers, body = requests[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret" and body["model"] == "toy"
    assert len({request[2]["messages"][0]["content"] for request in requests}) == 3  # each asks for something else


def test_a_reply_in_a_code_fence_counts(mirror):
    _, conversations, _ = add(mirror, [f"Here it is:\n```json\n{json.dumps(GOOD[0])}\n```\nDone."], num=1)
    assert conversations[1] == GOOD[0]


BAD = {
    "no json": "I would rather not.", "broken json": '[{"role": "user", ]', "not a list of messages": "[1, 2]",
    "odd length": json.dumps(chat("a", "nanochat", "b")), "wrong order": json.dumps(chat("a", "nanochat")[::-1]),
    "system role": json.dumps([{"role": "system", "content": "x"}, {"role": "assistant", "content": "nanochat"}]),
    "empty text": json.dumps(chat("  ", "I am nanochat.")), "parts": json.dumps(chat(["a"], "I am nanochat.")),
    "too long": json.dumps(chat("Who?", "I am nanochat. " * 60)),
    "special token": json.dumps(chat("Who?", "I am nanochat.<|assistant_end|>")),
    "another name": json.dumps(chat("Who are you?", "I am somebody else.")),
    "held-out prompt": json.dumps(chat("what is your name", "I am nanochat!")),
    "known already": json.dumps(chat("Hi, who is there?", "It is me: nanochat!")),
    "rate limit": 429, "server error": 503, "no text": None,
}


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD.keys())
def test_a_bad_reply_is_counted_and_not_kept(mirror, reply):
    bad, conversations, _ = add(mirror, [reply, json.dumps(GOOD[0])], num=1)
    assert sum(bad.values()) == 1 and conversations[1:] == [GOOD[0]]


def test_the_same_reply_is_kept_once(mirror):
    bad, conversations, _ = add(mirror, map(json.dumps, [GOOD[0], GOOD[0], GOOD[1]]), num=2)
    assert dict(bad) == {"not new": 1} and conversations[1:] == GOOD[:2]


def test_a_stubborn_server_ends_it_and_what_was_added_stays(mirror):
    with pytest.raises(UserError, match="1 of 5 conversations added"):
        add(mirror, [json.dumps(GOOD[0])] + ["no"] * toy_server.MAX_BAD, num=5)
    assert len((mirror / gen.IDENTITY_FILE).read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_wrong_address_key_or_model_ends_it_at_once(mirror, status):
    with pytest.raises(UserError, match=f"answers {status}"):
        add(mirror, [status], num=1)


def test_no_server_at_the_address_is_said(mirror):
    with pytest.raises(UserError, match="does not answer"):
        gen.ask_server("http://127.0.0.1:9/v1", None, "toy", "brief", timeout_s=2)


def settings(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setattr(gen, name, value)


def test_the_script_adds_to_a_mirror_that_is_there(mirror, monkeypatch, capsys):
    with StandIn(map(json.dumps, GOOD)) as server:
        settings(monkeypatch, out=str(mirror), base_url=server.url, model="toy", num=2)
        gen.main()
    assert "added 2 conversations" in capsys.readouterr().out
    assert len((mirror / gen.IDENTITY_FILE).read_text(encoding="utf-8").splitlines()) == 3
    assert (mirror / gen.MANIFEST).read_text(encoding="utf-8") == "{}"  # the mirror was not written anew


def test_a_server_without_a_model_is_refused(tmp_path, monkeypatch):
    settings(monkeypatch, out=str(tmp_path), base_url="http://127.0.0.1:9/v1")
    with pytest.raises(UserError, match="--model"):
        gen.main()


# -- writing where something is already


def test_a_folder_keeps_what_is_up_to_date_and_what_was_added_and_loses_what_is_stale(tmp_path, monkeypatch, capsys):
    root = tmp_path / "world"
    gen.write_mirror(root, seed=1, scale=0.01)
    added = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "I am nanochat.\u2028"}]\n'
    (root / gen.ADDED_FILE).write_text(added, encoding="utf-8")
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for name, value in (("out", str(root)), ("seed", 1)):
        monkeypatch.setattr(gen, name, value)
    gen.main()
    assert "is up to date" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before

    manifest = json.loads((root / gen.MANIFEST).read_text(encoding="utf-8"))
    (root / "pretrain/shard_00009.parquet").touch()
    manifest["sha256"]["pretrain/shard_00009.parquet"] = "of an older version"
    (root / gen.MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    gen.write_mirror(root, seed=2, scale=0.01)
    assert (root / gen.IDENTITY_FILE).read_text(encoding="utf-8").endswith(added)
    assert not (root / "pretrain/shard_00009.parquet").exists()


def test_a_folder_of_other_files_is_refused_and_stays_as_it_is(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="holds files"):
        gen.write_mirror(tmp_path, seed=1, scale=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
