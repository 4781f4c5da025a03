"""From checkpoints on disk to a server: models by name, two devices, and what the command refuses before it starts."""

import re
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError, run_script
from nanochat.engine import PROMPTS, Engine
from nanochat.service import Service
from scripts.chat_web import create_app, find_models, load_schedulers, main, parse_args
from tests.servers import HELLO, URL, chat, wait_for
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent
SAVED = {("base", "d2", 1): 0, ("sft", "d2", 5): 1, ("sft", "d2", 9): 2, ("rl", "d2", 1): 3}  # -> seed of the weights


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for (stage, tag, step), seed in SAVED.items():
            model = tiny_model(tokenizer.get_vocab_size(), 128, seed=seed)
            meta = {} if stage == "rl" else {"examples": ["Who are you?"]}
            CheckpointManager(get_checkpoint_dir(stage, tag)).save(step, model, tokenizer=tokenizer, meta=meta)
    return folder


@pytest.fixture(autouse=True)
def environment(base_dir, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base_dir))
    monkeypatch.delenv("NANOCHAT_API_KEY", raising=False)


def completion(post, model):
    """What a model makes of a prompt, greedily."""
    body = {"model": model, "prompt": "the light", "max_tokens": 12, "temperature": 0}
    return post("/v1/completions", json=body).json()["choices"][0]["text"]


def expected(tokenizer, seed):
    model = tiny_model(tokenizer.get_vocab_size(), 128, seed=seed).eval()
    prompt = tokenizer.encode("the light", prepend="<|bos|>")
    (ids,), _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=12, temperature=0)
    return tokenizer.decode(ids[len(prompt):])


def test_the_command_serves_each_model_by_its_name_until_a_signal(tokenizer):
    flags = ["--models", "sft:d2,base:d2,sft:d2:5", "-p", "0", "--rows", "2", "--device_type", "cpu"]
    command = [sys.executable, "-m", "scripts.chat_web", *flags]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            head, ready = process.stdout.readline(), process.stdout.readline()
            names = ["sft-d2", "base-d2", "sft-d2-5"]
            assert head.endswith(f"loading: {', '.join(names)}\n") and ready == f"ready: {', '.join(names)}\n"
            with httpx.Client(base_url=re.match(r"http://127\.0\.0\.1:\d+", head)[0]) as client:
                cards = client.get("/v1/models").json()["data"]
                assert [card["id"] for card in cards] == names
                assert [card["nanochat"]["stage"] for card in cards] == ["sft", "base", "sft"]
                assert [card["nanochat"]["examples"] for card in cards] == [["Who are you?"], PROMPTS, ["Who are you?"]]
                answers = {name: completion(client.post, name) for name in [*names, "base", None]}
                assert chat(client, model="sft-d2").json()["model"] == "sft-d2"
                assert chat(client, model="sft-d3").status_code == 404
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)
        finally:
            process.kill()
    newest, base, oldest = (expected(tokenizer, SAVED[key]) for key in
                            (("sft", "d2", 9), ("base", "d2", 1), ("sft", "d2", 5)))
    assert len({newest, base, oldest}) == 3
    assert answers == {"sft-d2": newest, None: newest, "base-d2": base, "base": base, "sft-d2-5": oldest}


def test_the_newest_step_or_the_one_that_is_asked_for():
    newest = {"stage": "sft", "tag": "d2", "step": 9, "examples": ["Who are you?"]}
    base = {"stage": "base", "tag": "d2", "step": 1, "examples": PROMPTS}  # texts to go on with, not questions
    assert find_models(parse_args([])) == {"sft-d2": newest}
    assert find_models(parse_args(["-i", "base", "-g", "d2", "-s", "1"])) == {"base-d2": base}
    assert find_models(parse_args(["-i", "rl"]))["rl-d2"]["examples"] == []  # it was saved without any
    with pytest.raises(UserError, match="step 0"):
        find_models(parse_args(["-s", "0"]))


def test_two_devices_share_the_requests():
    models = find_models(parse_args(["--models", "base:d2,sft:d2"]))
    service = Service(partial(load_schedulers, models, "cpu", 1), list(models), num_devices=2)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        for batcher in service.batchers:
            batcher.schedulers["base-d2"].engine.stop_tokens = frozenset()
        long = {"model": "base", "prompt": [1], "max_tokens": 120, "temperature": 0}
        texts, seen = [None] * 4, set()

        def ask(i):
            texts[i] = client.post("/v1/completions", json=long).json()["choices"][0]["text"]

        asking = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
        for thread in asking:
            thread.start()
        while any(thread.is_alive() for thread in asking):
            seen |= {i for i, batcher in enumerate(service.batchers) if batcher.num_running}
            time.sleep(0.005)
        assert seen == {0, 1} and len(set(texts)) == 1
        assert [list(batcher.schedulers) for batcher in service.batchers] == [["base-d2", "sft-d2"]] * 2
        assert "nanochat_rows 4.0" in client.get("/metrics").text
        assert client.post("/v1/chat/completions", json={**HELLO, "model": "sft-d2"}).status_code == 200


# -- refusals of the command: error:, hint:, exit code 2


@pytest.fixture
def refused(monkeypatch, capsys):
    """The two lines with which the command ends."""
    def run(*flags):
        monkeypatch.setattr("sys.argv", ["chat_web", "--device_type", "cpu", *flags])
        with pytest.raises(SystemExit) as end:
            run_script(main)
        error, hint = capsys.readouterr().err.splitlines()
        assert end.value.code == 2 and error.startswith("error: ") and hint.startswith("hint: ")
        return error, hint
    return run


@pytest.mark.parametrize("flags, error, hint", [
    (["-p", "70000"], "--port=70000: need 0 to 65535", "--port=8000"),
    (["-p", "-1"], "--port=-1: need 0 to 65535", "--port=8000"),
    (["--host", "192.0.2.1", "--api_key", "x"], "cannot listen on --host=192.0.2.1", "--host=127.0.0.1"),
    (["--host", "a" * 70, "--api_key", "x"], "cannot listen on --host=aaa", "--host=127.0.0.1"),
    (["-t", "-1"], "--temperature=-1.0: need 0 to 10", "--temperature=0.8"),
    (["-t", "nan"], "--temperature=nan: need 0 to 10", "--temperature=0.8"),
    (["-k", "-1"], "--top_k=-1: need 0 or more", "--top_k=50"),
    (["-m", "0"], "--max_tokens=0: need 1 or more", "--max_tokens=512"),
    (["--max_waiting", "0"], "--max_waiting=0: need 1 or more", "--max_waiting=512"),
    (["--rows", "0"], "--rows=0: need 1 or more", "--rows=1"),
    (["-n", "0"], "--num_gpus=0: need 1 or more", "--num_gpus=1"),
    (["-s", "-1"], "--step=-1: need 0 or more", "--step=0"),
    (["--models", "sft:d7"], "d7", ""),
])
def test_a_setting_out_of_range_or_a_wrong_address_is_refused(refused, flags, error, hint):
    told = refused(*flags)
    assert error in told[0] and hint in told[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_port_that_is_taken_is_refused_with_another_one(refused, host):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        error, hint = refused("--host", host, "-p", str(port))
    assert f"--host={host} --port={port}: Address already in use" in error
    assert hint == f"hint: python -m scripts.chat_web -p {port + 1 if port < 65535 else 8001}"
