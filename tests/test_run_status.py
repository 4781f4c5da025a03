"""How a run is, as its folder tells: run.json, the errors of ranks, the end of its log, its lock."""

import json
import os
import time

import pytest

from nanochat.common import UserError, run_script
from nanochat.locks import hold_lock, is_locked
from nanochat.run_file import RunFile
from nanochat.run_keeper import RunKeeper
from nanochat.run_status import describe_run, find_runs
from tests.stages import small_stage


def write_log(folder, steps, seconds_per_step=2.0, end=None):
    """A log of `steps` steps whose last line was written at `end`, by default now."""
    end = time.time() if end is None else end
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "metrics.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            row = {"step": step, "time": end - (steps - step) * seconds_per_step, "train/loss": 2.0}
            file.write(json.dumps(row) + "\n")
    os.utime(path, (end, end))


def write_run(folder, **facts):
    facts = {"state": "running", "started": 0, "iterations": 100, **facts}
    (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")


def test_the_runs_of_all_stages_and_tags_newest_first(tmp_path):
    for age, name in enumerate(["chatrl_checkpoints/d2", "base_checkpoints/d4.old1", "base_checkpoints/d4"]):
        write_log(tmp_path / name, 1, end=1e9 - age)
    (tmp_path / "base_checkpoints" / "empty").mkdir()
    assert list(find_runs(tmp_path)) == ["rl/d2", "base/d4.old1", "base/d4"]
    assert find_runs(tmp_path)["rl/d2"] == tmp_path / "chatrl_checkpoints" / "d2"


def test_a_running_run_says_how_long_it_will_take(tmp_path):
    write_log(tmp_path, 30)
    write_run(tmp_path)
    status = describe_run(tmp_path)
    assert status["state"] == "running" and status["step"] == 30 and status["iterations"] == 100
    assert status["eta_s"] == pytest.approx(140) and status["errors"] == {}


def test_the_break_before_a_resumed_run_is_no_part_of_its_speed(tmp_path):
    write_log(tmp_path, 30)
    now = time.time()
    write_run(tmp_path, started=now + 1000)
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        for step in (31, 32):
            file.write(json.dumps({"step": step, "time": now + 1000 + step, "train/loss": 1.0}) + "\n")
    assert describe_run(tmp_path)["eta_s"] == pytest.approx(68)


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_a_run_that_has_ended_says_so_itself(tmp_path, state):
    write_log(tmp_path, 3, end=1e9)
    write_run(tmp_path, state=state)
    status = describe_run(tmp_path)
    assert status["state"] == state and status["eta_s"] is None


def test_a_quiet_run_without_its_lock_was_killed(tmp_path):
    folder = tmp_path / "d4"
    write_log(folder, 3, end=time.time() - 60)
    write_run(folder)
    lock = tmp_path / ".d4.lock"
    with hold_lock(lock):
        assert is_locked(lock) and describe_run(folder)["state"] == "running"
    assert not is_locked(lock) and describe_run(folder)["state"] == "killed"
    (folder / "error_rank3.txt").write_text("RuntimeError: out of order\n\nTraceback", encoding="utf-8")
    status = describe_run(folder)
    assert status["state"] == "failed" and status["errors"] == {3: "RuntimeError: out of order\n\nTraceback"}


@pytest.mark.parametrize("text", ["", "[]", "{", "7", '{"state"'])
def test_a_run_without_a_readable_file_is_unknown(tmp_path, text):
    write_log(tmp_path, 3)
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    status = describe_run(tmp_path)
    assert status["state"] == "unknown" and status["step"] == 3 and status["eta_s"] is None


def test_a_log_without_a_whole_line_is_at_step_0(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "tr', encoding="utf-8")
    assert describe_run(tmp_path)["step"] == 0


# -- what a run writes


def read_run(folder):
    return json.loads((folder / "run.json").read_text(encoding="utf-8"))


def test_a_run_writes_where_it_ends_its_command_and_that_it_has_finished(tmp_path):
    keeper = RunKeeper(small_stage(tmp_path, step=3), 10, "")
    facts = read_run(tmp_path)
    assert facts["state"] == "running" and facts["iterations"] == 10 and facts["first_step"] == 3
    assert "python" in facts["command"]
    keeper.close()
    assert read_run(tmp_path) == {**facts, "state": "finished"}


@pytest.mark.parametrize("error, first", [(UserError("no disk", "free some"), "UserError: no disk"),
                                          (KeyError("names"), "KeyError: 'names'")])
def test_a_run_that_fails_leaves_the_error_of_its_rank_until_it_is_started_again(tmp_path, error, first):
    def main():
        RunKeeper(small_stage(tmp_path), 10, "")
        raise error

    with pytest.raises((SystemExit, KeyError)):
        run_script(main)
    text = (tmp_path / "error_rank0.txt").read_text(encoding="utf-8")
    assert text.splitlines()[0] == first and ("Traceback" in text) == isinstance(error, KeyError)
    assert read_run(tmp_path)["state"] == "failed"
    RunKeeper(small_stage(tmp_path), 10, "").close()
    assert not (tmp_path / "error_rank0.txt").exists() and read_run(tmp_path)["state"] == "finished"


def test_another_rank_writes_its_error_and_nothing_else(tmp_path):
    stage = small_stage(tmp_path)
    stage.rank = 3
    RunFile(stage, 10).note_failure(RuntimeError("the peer is gone"))
    assert [path.name for path in tmp_path.iterdir()] == ["error_rank3.txt"]
