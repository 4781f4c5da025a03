"""The server of `scripts.watch`: what it answers, to whom, and that it only reads."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from nanochat.common import UserError
from scripts.watch import create_app, parse_args
from tests.test_log_reader import append, step_line

ROOT = Path(__file__).parent.parent
URL = "http://127.0.0.1:8001"


@pytest.fixture
def runs_dir(tmp_path):
    """A base directory with two runs."""
    for name in ("base_checkpoints/d4", "chatsft_checkpoints/my run+2"):
        (tmp_path / name).mkdir(parents=True)
        append(tmp_path / name / "metrics.jsonl", *[step_line(step, 5.0 / step) for step in range(1, 6)])
    (tmp_path / "base_checkpoints" / "d4" / "run.json").write_text('{"state": "finished", "iterations": 5}')
    return tmp_path


@pytest.fixture
def client(runs_dir):
    with TestClient(create_app(runs_dir), base_url=URL) as client:
        yield client


def test_the_runs_are_listed_with_how_they_are(client):
    runs = client.get("/runs").json()["runs"]
    assert runs.keys() == {"base/d4", "sft/my run+2"}
    assert runs["base/d4"]["state"] == "finished" and runs["base/d4"]["step"] == 5
    assert runs["sft/my run+2"]["state"] == "unknown"


def test_curves_are_sent_once_and_then_only_what_is_new(client, runs_dir):
    first = client.get("/curves/base/d4").json()
    assert first["columns"]["train/loss"]["last"] == [None, 5.0, 2.5, 5 / 3, 1.25, 1.0] and first["fraction"] == 1
    append(runs_dir / "base_checkpoints" / "d4" / "metrics.jsonl", step_line(6, 0.5))
    new = client.get("/curves/base/d4", params={"generation": first["generation"], "start": 5}).json()
    assert new["columns"]["train/loss"]["last"] == [1.0, 0.5] and new["start"] == 5
    assert client.get("/curves/sft/my%20run%2B2").json()["columns"]["step"]["last"][-1] == 5


def test_a_run_that_appears_later_is_listed_and_one_that_is_gone_is_not(client, runs_dir):
    folder = runs_dir / "base_checkpoints" / "d4"
    folder.rename(folder.with_name("d4.old1"))
    assert client.get("/runs").json()["runs"].keys() == {"base/d4.old1", "sft/my run+2"}
    assert client.get("/curves/base/d4").status_code == 404
    assert client.get("/curves/base/d4.old1").json()["columns"]["step"]["last"][-1] == 5


@pytest.mark.parametrize("path", ["/curves/base/none", "/curves/base/..", "/curves/base/..%2f..%2fetc", "/curves/base",
                                  "/curves/base_checkpoints/d4", "/watch.html", "/curves/base/d4/metrics.jsonl",
                                  "/curves//etc/passwd", "/%2e%2e/run.json"])
def test_other_paths_are_not_found(client, path):
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("query", ["generation=x", "start=-1", "start=1.5", "start=", "generation=" + "9" * 30,
                                   "start=%C2%B2"])
def test_a_number_that_is_none_is_refused(client, query):
    assert client.get(f"/curves/base/d4?{query}").status_code == 400


@pytest.mark.parametrize("path", ["/", "/runs", "/curves/base/d4"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_only_reading_is_allowed(client, method, path):
    assert client.request(method, path).status_code == 405


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", "0.0.0.0:8001", ""])
@pytest.mark.parametrize("path", ["/", "/runs", "/curves/base/d4"])
def test_another_name_than_this_machines_is_refused(client, host, path):
    assert client.get(path, headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("host", ["localhost", "localhost:8001", "127.0.0.1:9"])
def test_names_of_this_machine_are_answered(client, host):
    assert client.get("/runs", headers={"Host": host}).status_code == 200


def test_the_page_may_load_nothing_but_itself(client):
    response = client.get("/")
    nonce = re.search("'nonce-(.+?)'", response.headers["content-security-policy"])[1]
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert f'<script nonce="{nonce}">' in response.text and "__NONCE__" not in response.text
    other = client.get("/")
    assert nonce not in other.text and response.headers["cache-control"] == "no-store"
    addresses = set(re.findall(r"https?://[^\s\"'%)]+", response.text))
    assert addresses == {"http://www.w3.org/2000/svg"} and "innerHTML" not in response.text
    assert client.head("/").status_code == 200


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}


def test_nothing_is_written(client, runs_dir):
    before = snapshot(runs_dir)
    for path in ("/", "/runs", "/curves/base/d4", "/curves/sft/my%20run%2B2"):
        client.get(path)
    assert snapshot(runs_dir) == before


def test_it_does_without_torch(tmp_path):
    code = "import sys, scripts.watch; print(sorted({'torch', 'fastapi', 'numpy'} & sys.modules.keys()))"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(UserError, match="need 0 to 65535"):
        parse_args([f"--port={port}"])


def test_a_base_directory_without_runs_has_none(tmp_path):
    with TestClient(create_app(tmp_path), base_url=URL) as client:
        assert client.get("/runs").json()["runs"] == {}


def test_errors_of_ranks_are_told(client, runs_dir):
    (runs_dir / "base_checkpoints" / "d4" / "error_rank10.txt").write_text("E: ten")
    (runs_dir / "base_checkpoints" / "d4" / "error_rank2.txt").write_text("E: two")
    (runs_dir / "base_checkpoints" / "d4" / "error_rank2.txt.77.tmp").write_text("half")
    assert json.dumps(client.get("/runs").json()["runs"]["base/d4"]["errors"]) == '{"2": "E: two", "10": "E: ten"}'
