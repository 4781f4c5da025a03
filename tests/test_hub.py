"""Reading the Hugging Face hub: the faults it may show, on loopback, and the same rows as the package `datasets`."""

import hashlib
import importlib.util
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import Fault, FaultServer

from nanochat.common import UserError
from tasks.gsm8k import GSM8K
from tasks.hub import HUB, fetch_split, load_rows
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, find_words

REPO, COMMIT, *_ = HUB["gsm8k"]
TRAIN = f"/datasets/{REPO}/resolve/{COMMIT}/main/train-00000-of-00001.parquet"
FAST = {"timeout": 0.3, "retries": 1, "sleep": lambda seconds: None}


def parquet_bytes(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def problems(split, count=100):
    return [{"question": f"{split} {i} ½", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(count)]


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def hub(base_dir, monkeypatch):
    """A hub that has the training split of gsm8k."""
    with FaultServer({TRAIN: parquet_bytes(problems("train"))}, hub=True) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def paths_asked(server):
    return [path for path, _ in server.requests]


# -----------------------------------------------------------------------------
# What is asked for, and what is kept


def test_a_split_is_read_once_and_kept_under_its_commit(hub, base_dir):
    first, second = GSM8K(), GSM8K()
    assert [c["messages"][0]["content"] for c in first] == [row["question"] for row in problems("train")]
    assert list(first) == list(second)
    assert paths_asked(hub) == [TRAIN]
    assert (base_dir / "hub" / REPO / COMMIT / "main/train-00000-of-00001.parquet").is_file()


def test_a_split_of_several_files_is_read_in_order(hub):
    repo, commit, folder, _ = HUB["smoltalk"]
    for i in range(4):
        chat = [{"role": "user", "content": str(i)}, {"role": "assistant", "content": "Yes"}]
        name = f"/datasets/{repo}/resolve/{commit}/{folder}/train-{i:05d}-of-00004.parquet"
        hub.files[name] = parquet_bytes([{"messages": chat}])
    assert [c["messages"][0]["content"] for c in SmolTalk()] == ["0", "1", "2", "3"]


def test_with_a_mirror_nothing_is_asked(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    for task in (GSM8K, SmolTalk, SimpleSpelling):
        with pytest.raises(UserError, match="the mirror NANOCHAT_DATA_DIR="):
            task()
    assert paths_asked(hub) == []


def test_every_split_is_pinned_to_a_commit():
    for repo, commit, _, splits in HUB.values():
        assert len(commit) == 40 and int(commit, 16) and repo.count("/") == 1 and splits


def test_the_word_list_is_downloaded_once(hub, base_dir):
    hub.files["/words.txt"] = b"apple\nbanana\ncherry\n"
    paths = [find_words(f"{hub.url}/words.txt") for _ in range(2)]
    assert paths == [base_dir / "words_alpha.txt"] * 2 and paths[0].read_bytes() == hub.files["/words.txt"]
    assert paths_asked(hub) == ["/words.txt"]


# -----------------------------------------------------------------------------
# Faults


def read_train(base_dir):
    return pq.read_table(*fetch_split("gsm8k", "train", base_dir, **FAST)).to_pylist()


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429, headers={"Retry-After": "1"}), Fault(cut=500),
                                   Fault(stall=500), Fault(stall=0), Fault(flip=True)], ids=str)
def test_a_fault_that_passes_is_overcome(hub, base_dir, fault):
    hub.faults[TRAIN] = [fault]
    assert read_train(base_dir) == problems("train")
    assert len(hub.requests) == 2


@pytest.mark.parametrize("fault, reason", [(Fault(status=503), "HTTP 503"), (Fault(stall=0), "no byte for 0.3 s"),
                                           (Fault(status=404), "not found"), (Fault(status=403), "no access")], ids=str)
def test_a_fault_that_stays_names_the_data_set_and_the_cures(hub, base_dir, fault, reason):
    hub.faults[TRAIN] = [fault] * 9
    started = time.monotonic()
    with pytest.raises(UserError, match=f"data set {REPO}, split train: .*{reason}") as error:
        read_train(base_dir)
    assert time.monotonic() - started < 5
    assert "hint: " in str(error.value) and "export NANOCHAT_DATA_DIR=" in str(error.value)
    assert "HF_" in str(error.value)
    assert not list((base_dir / "hub").rglob("*.parquet"))  # nothing that the next run would take for the whole


def test_a_split_that_has_vanished_is_named(hub):
    with pytest.raises(UserError, match=f"data set {REPO}, split test: .* not found at .*/{COMMIT}/main/test-"):
        GSM8K(split="test")


def test_an_unreachable_hub_is_an_error_and_not_a_wait(base_dir, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")  # nobody listens there any more
    with pytest.raises(UserError, match=f"data set {REPO}, split train: .*gave up"):
        read_train(base_dir)


# -----------------------------------------------------------------------------
# The reference: what the package `datasets` reads from the same hub


class ApiHandler(BaseHTTPRequestHandler):
    """As much of the hub's API as `datasets` asks for one repository, whose {name: bytes} are the server's files."""
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        path = self.path.partition("?")[0]
        if path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/"):
            return self.answer_file(path.split(COMMIT + "/")[1])
        if path == f"/api/datasets/{REPO}/revision/{COMMIT}":
            siblings = [{"rfilename": name} for name in self.server.files]
            return self.answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings, "tags": []}).encode())
        if path.startswith(f"/api/datasets/{REPO}/tree/{COMMIT}"):
            return self.answer(200, json.dumps(self.list_folder(path.split(COMMIT)[1].strip("/"))).encode())
        return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_GET = do_HEAD

    def answer_file(self, name):
        body = self.server.files.get(name)
        if body is None:
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.answer(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(body).hexdigest()}"'})

    def list_folder(self, folder):
        inside = [name for name in self.server.files if not folder or name.startswith(folder + "/")]
        here = [name for name in inside if name.count("/") == (folder.count("/") + 1 if folder else 0)]
        folders = {name.split("/")[0] for name in inside if not folder and "/" in name}
        return ([{"type": "file", "path": name, "size": len(self.server.files[name]), "oid": "1" * 40} for name in here]
                + [{"type": "directory", "path": name, "size": 0, "oid": "0" * 40} for name in folders])

    def answer(self, status, body, headers=None):
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


README = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]
---
"""

LOAD = f"""
import datasets, json
print(json.dumps(datasets.load_dataset({REPO!r}, "main", split="test", revision={COMMIT!r}).to_list()))
"""


@pytest.mark.slow  # importing datasets takes seconds
@pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="the package datasets is not installed")
def test_the_rows_are_those_that_datasets_reads(base_dir, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), ApiHandler)
    server.files = {"README.md": README} | {f"main/{split}-00000-of-00001.parquet": parquet_bytes(problems(split))
                                            for split in ("train", "test")}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    try:  # in a process of its own, because huggingface_hub reads HF_ENDPOINT when it is imported
        result = subprocess.run([sys.executable, "-c", LOAD], capture_output=True, text=True, timeout=120, cwd=base_dir,
                                env=os.environ | {"HF_HOME": str(base_dir / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1"})
        assert result.returncode == 0, result.stderr
        ours = load_rows("gsm8k", "test", {"question": str, "answer": str})
    finally:
        server.shutdown()
        server.server_close()
    assert [ours[i] for i in range(len(ours))] == json.loads(result.stdout.splitlines()[-1]) == problems("test")
