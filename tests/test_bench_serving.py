"""The benchmark of the server ends in time, whatever is still open, and counts that."""

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from dev import bench_serving
from tests.servers import running_server, tiny_service

ROOT = Path(__file__).parent.parent


def test_a_measurement_ends_in_time_though_answers_are_open(tokenizer, monkeypatch):
    """One row that decodes, two that wait: the answers are far too long to end."""
    monkeypatch.setattr(bench_serving, "seconds", 2.0)
    monkeypatch.setattr(bench_serving, "max_tokens", 4000)
    service = tiny_service(tokenizer, sequence_len=4096, num_rows=1, endless=True)
    with running_server(service) as (address, _):
        row = asyncio.run(bench_serving.measure(address, None, 3))
    assert row["requests/s"] == 0 and row["tokens/s"] > 0 and row["refused"] == 0
    assert row["first p95 ms"] >= 1500  # at least what those have waited who got nothing


def test_a_refused_client_waits_before_it_asks_again(tokenizer, monkeypatch):
    monkeypatch.setattr(bench_serving, "seconds", 2.0)
    monkeypatch.setattr(bench_serving, "max_tokens", 4000)
    service = tiny_service(tokenizer, sequence_len=4096, num_rows=1, max_waiting=2, endless=True)
    with running_server(service) as (address, _):
        row = asyncio.run(bench_serving.measure(address, None, 6))
    assert 3 <= row["refused"] <= 3 * 5


@pytest.mark.slow
def test_the_smallest_run_prints_a_row_for_each_number_of_clients():
    flags = ["--depth=1", "--vocab_size=512", "--clients=1,4", "--seconds=2", "--churn=20"]
    command = [sys.executable, "-m", "dev.bench_serving", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 5, done.stdout + done.stderr
    assert [line.split("|")[0].strip() for line in lines[1:4]] == ["clients", "1", "4"]
    assert "nanochat_running 0.0" in lines[4]
