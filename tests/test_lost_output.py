"""`base_train | tee log`: Ctrl-C reaches both, and tee ends first. The run saves and ends all the same."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import CheckpointManager

ROOT = Path(__file__).parent.parent
WAIT_S = 300  # on a busy machine
pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")


@pytest.fixture
def start(tmp_path, tokenizer, story):
    """Starts a run whose output goes through a pipe: (the shell, the folder of its checkpoints)."""
    tokenizer.save(tmp_path / "tokenizer")
    data = tmp_path / "corpus.jsonl"
    lines = [json.dumps({"text": f"{i} {story}"}) for i in range(30)]
    data.write_text("\n".join(lines), encoding="utf-8")
    flags = ["--depth=1", "--max_seq_len=32", "--total_batch_size=256", "--num_iterations=100000", "--eval_tokens=200",
             "--device_batch_size=2", "--save_every=-1", "--eval_every=-1", "--sample_every=-1", f"--data={data}"]
    started = []

    def start_shell(reader):
        command = shlex.join([sys.executable, "-m", "scripts.base_train", *flags])
        env = {**os.environ, "NANOCHAT_BASE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
        # the status is that of the run, not that of the reader
        shell = subprocess.Popen(["bash", "-c", f"set -o pipefail; {command} 2> errors.txt | {reader}"], cwd=tmp_path,
                                 env={**env, "PYTHONPATH": str(ROOT)}, start_new_session=True)
        started.append(shell)
        return shell, tmp_path / "base_checkpoints" / "d1"

    yield start_shell
    for shell in started:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()


def wait_for_steps(folder, num_steps):
    end = time.monotonic() + WAIT_S
    path = folder / "metrics.jsonl"
    while not path.exists() or path.read_text().count("train/loss") < num_steps:
        assert time.monotonic() < end
        time.sleep(0.05)


def num_logged(folder):
    return (folder / "metrics.jsonl").read_text().count("train/loss")


def test_an_interrupted_run_saves_its_last_step_though_nobody_reads_its_output(start, tmp_path):
    shell, folder = start("tee log.txt > /dev/null")
    wait_for_steps(folder, 3)
    os.killpg(shell.pid, signal.SIGINT)  # as a terminal does at Ctrl-C
    shell.wait(WAIT_S)
    assert CheckpointManager(folder).steps() == [num_logged(folder)]
    assert (tmp_path / "errors.txt").read_text() == ""


def test_a_reader_that_ends_asks_the_run_to_save_and_stop(start, tmp_path):
    shell, folder = start("head -n 12 > log.txt")
    assert shell.wait(WAIT_S) == 128 + signal.SIGPIPE
    assert CheckpointManager(folder).steps() == [num_logged(folder)]
    assert (tmp_path / "errors.txt").read_text() == ""
