"""Task data from the Hugging Face hub through `datasets`: what is asked and kept, and the faults a hub may show."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import Fault, FaultServer

from nanochat import download
from nanochat.common import UserError
from tasks import hub as task_hub
from tasks.gsm8k import GSM8K
from tasks.hub import COMMITS, HUB
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, find_words

ROOT = Path(__file__).parent.parent
REPO, CONFIG = HUB["gsm8k"]
COMMIT = COMMITS[REPO]
FILES = f"/datasets/{REPO}/resolve/main"  # the server takes every commit for main
TRAIN = f"{FILES}/main/train-00000-of-00001.parquet"
TEST = f"{FILES}/main/test-00000-of-00001.parquet"
README = b"""---
configs:
- config_name: main
  data_files: [{split: train, path: main/train-*}, {split: test, path: main/test-*}]
---
"""


def parquet_bytes(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, compression="none")
    return file.getvalue()


def problems(split, count=100):
    return [{"question": f"{split} {i} ½", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(count)]


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def hub(base_dir, tmp_path, monkeypatch):
    """A hub that has gsm8k. The two libraries read the environment when they are imported: here they are told."""
    import datasets
    from huggingface_hub import constants

    files = {f"{FILES}/README.md": README}
    files |= {TRAIN: parquet_bytes(problems("train")), TEST: parquet_bytes(problems("test"))}
    with FaultServer(files, hub=True) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", server.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + template)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(task_hub, "retry", partial(download.retry, sleep=lambda seconds: None))
        yield server


# -----------------------------------------------------------------------------
# What is asked for, and what is kept


def test_a_data_set_is_downloaded_once_at_its_commit_and_then_read_from_the_disk(hub, base_dir):
    first, second = GSM8K(), GSM8K()
    num_requests = len(hub.requests)
    third = GSM8K(split="test")  # came with the first
    assert [c["messages"][0]["content"] for c in first] == [row["question"] for row in problems("train")]
    assert [c["messages"][0]["content"] for c in third] == [row["question"] for row in problems("test")]
    assert list(first) == list(second) and len(hub.requests) == num_requests
    assert len(hub.gets(TRAIN)) == len(hub.gets(TEST)) == 1
    assert sorted(path.name for path in (base_dir / "datasets" / REPO / COMMIT).iterdir()) == [CONFIG, f"{CONFIG}.lock"]


def test_a_bad_row_of_the_hub_is_named(hub):
    hub.files[TRAIN] = parquet_bytes([{"question": "q", "answer": "#### 1"}, {"question": "q", "answer": None}])
    with pytest.raises(UserError, match=f"data set {REPO}, split train, row 1, field answer: got None, need str"):
        GSM8K()[1]


def test_with_a_mirror_nothing_is_asked(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    for task in (GSM8K, SmolTalk, SimpleSpelling):
        with pytest.raises(UserError, match="the mirror NANOCHAT_DATA_DIR="):
            task()
    assert hub.requests == []


def test_a_mirror_has_the_same_rows(hub, tmp_path, monkeypatch):
    from_hub = list(GSM8K())
    (tmp_path / "mirror" / "tasks").mkdir(parents=True)
    (tmp_path / "mirror" / "tasks" / "gsm8k_train.parquet").write_bytes(hub.files[TRAIN])
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "mirror"))
    task = GSM8K()
    assert list(task) == from_hub and type(task.rows.dataset).__name__ == "Dataset"


def test_every_data_set_is_pinned_to_a_commit():
    for repo, config in HUB.values():
        commit = COMMITS[repo]
        assert len(commit) == 40 and int(commit, 16) and repo.count("/") == 1 and config


def test_the_word_list_is_downloaded_once(hub, base_dir):
    hub.files["/words.txt"] = b"apple\nbanana\ncherry\n"
    paths = [find_words(f"{hub.url}/words.txt") for _ in range(2)]
    assert paths == [base_dir / "words_alpha.txt"] * 2 and paths[0].read_bytes() == hub.files["/words.txt"]
    assert len(hub.requests) == 1


# -----------------------------------------------------------------------------
# Faults


@pytest.mark.parametrize("fault", [Fault(status=503), Fault(status=429, headers={"Retry-After": "1"}), Fault(cut=500),
                                   Fault(stall=500), Fault(flip=True)], ids=str)
def test_a_fault_that_passes_is_overcome(hub, fault):
    hub.faults[TRAIN] = [fault]
    assert [c["messages"][0]["content"] for c in GSM8K()] == [row["question"] for row in problems("train")]


def test_wrong_bytes_inside_a_readable_file_are_seen_by_the_hash(hub, base_dir):
    assert hub.files[TRAIN].count(b"train 7 ") == 1
    wrong = Fault(swap=(b"train 7 ", b"train 8 "))
    hub.faults[TRAIN] = [wrong]
    assert [c["messages"][0]["content"] for c in GSM8K()] == [row["question"] for row in problems("train")]
    shutil.rmtree(base_dir)
    hub.faults[TRAIN] = repeat(wrong)
    shutil.rmtree(base_dir.parent / "hf")
    with pytest.raises(UserError, match="damaged: the sha256 of main/train-00000-of-00001.parquet is not"):
        GSM8K()


@pytest.mark.parametrize("fault, reason", [(Fault(status=503), "HTTP 503"), (Fault(status=404), "not found"),
                                           (Fault(status=403), "no access"), (Fault(flip=True), "damaged")], ids=str)
def test_a_fault_that_stays_names_the_data_set_and_the_cures(hub, base_dir, fault, reason):
    hub.faults[TRAIN] = repeat(fault)
    with pytest.raises(UserError, match=f"data set {REPO}: .*{reason}") as error:
        GSM8K()
    assert "hint: " in str(error.value) and "export NANOCHAT_DATA_DIR=" in str(error.value)
    assert "HF_" in str(error.value)
    assert not (base_dir / "datasets" / REPO / COMMIT / CONFIG).exists()  # the next run would take it for the whole


def test_a_data_set_that_has_vanished_is_named(hub):
    hub.files.clear()
    with pytest.raises(UserError, match=f"{REPO}.*not found"):
        GSM8K()


def test_a_hub_that_never_answers_is_given_up(hub, monkeypatch):
    monkeypatch.setattr(download, "HUB_TIMEOUT_S", 0.2)
    hub.head_faults[f"{FILES}/README.md"] = repeat(Fault(stall=0))
    started = time.monotonic()
    with pytest.raises(UserError, match=f"data set {REPO}: gave up after .*timed out"):
        GSM8K()
    assert time.monotonic() - started < 20


def test_an_unreachable_hub_is_an_error_and_not_a_wait(hub, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")  # nobody listens there any more
    with pytest.raises(UserError, match=f"data set {REPO}: gave up after .*refused"):
        GSM8K()


@pytest.mark.slow  # two processes that import datasets
def test_a_killed_download_is_not_taken_for_the_whole_and_goes_on(hub, base_dir, tmp_path):
    """Also that the libraries read HF_ENDPOINT themselves."""
    hub.faults[TEST] = [Fault(stall=100)]
    code = "from tasks.gsm8k import GSM8K; print(len(GSM8K()))"
    env = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not hub.gets(TEST):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (base_dir / "datasets" / REPO / COMMIT / CONFIG).exists()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == json.dumps(100), done.stderr
    assert len(hub.gets(TRAIN)) == 1  # was whole before the kill
