"""Schedules against closed forms; places; how a script ends."""

import os
import subprocess
import sys

import pytest
import torch

from nanochat import common
from nanochat.common import (
    UserError,
    choose_num_threads,
    compute_init,
    get_base_dir,
    get_data_dir,
    one_thread,
    run_script,
    usable_cores,
    usable_memory,
)
from nanochat.training import Ema, lr_multiplier

CPU = torch.device("cpu")


@pytest.mark.parametrize("step, expected", [(0, 0.1), (4, 0.5), (9, 1.0), (50, 1.0), (60, 1.0), (80, 0.5), (100, 0.0)])
def test_learning_rate_rises_holds_and_falls(step, expected):
    assert lr_multiplier(step, 100, warmup_iters=10, warmdown_ratio=0.4) == pytest.approx(expected)


def test_learning_rate_falls_to_the_final_fraction():
    assert lr_multiplier(100, 100, 0, 0.5, final_frac=0.1) == pytest.approx(0.1)
    assert lr_multiplier(75, 100, 0, 0.5, final_frac=0.1) == pytest.approx(0.55)


def test_ema_has_no_start_up_bias():
    ema = Ema(0.9)
    assert ema.value is None and ema.update(3.0) == pytest.approx(3.0)
    assert ema.update(5.0) == pytest.approx((0.9 * 3 + 5) / 1.9)


@pytest.mark.parametrize("error, code, line", [
    (UserError("a", "b"), 2, "error: a\nhint: b\n"),
    (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\nhint: "),
    (KeyboardInterrupt(), 130, "")])
def test_how_a_script_ends_on_an_error(error, code, line, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == code and capsys.readouterr().err.startswith(line)


def test_output_that_nobody_reads_on_ends_quietly():
    program = "from nanochat.common import run_script; run_script(lambda: [print('line') for _ in range(100_000)])"
    result = subprocess.run(f"{sys.executable} -c \"{program}\" | head -1", shell=True, capture_output=True, text=True)
    assert result.stdout == "line\n" and result.stderr == ""


def test_a_base_dir_that_is_a_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be a folder"):
        get_base_dir()


def test_a_negative_seed_is_refused():
    with pytest.raises(UserError, match="--seed=-1: need 0 or more"):
        compute_init("cpu", -1)


def test_base_dir_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "a" / "b"))
    assert get_base_dir() == tmp_path / "a" / "b" and get_base_dir().is_dir()


def test_a_data_dir_that_is_no_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="nowhere is not a folder"):
        get_data_dir()


@pytest.fixture
def cgroups(tmp_path):
    """(folder of control groups, file that says which one this process is in: a/b)."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    membership = tmp_path / "cgroup"
    membership.write_text("1:cpu:/\n0::/a/b\n", encoding="utf-8")
    return tmp_path, membership


@pytest.mark.parametrize("quotas, expected", [
    ({}, 64), ({"a/b": "max 100000"}, 64), ({"a/b": "200000 100000"}, 2), ({"a": "150000 100000"}, 2),
    ({"a": "800000 100000", "a/b": "10000 100000"}, 1)])
def test_a_quota_of_the_group_or_of_one_above_it_bounds_the_cores(quotas, expected, cgroups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    for group, quota in quotas.items():
        (cgroups[0] / group / "cpu.max").write_text(quota + "\n", encoding="utf-8")
    assert usable_cores(*cgroups) == expected


@pytest.mark.parametrize("limits, expected", [({"a/b": "max"}, None), ({"a": "5000", "a/b": "max"}, 5000),
                                              ({"a": "5000", "a/b": "4000"}, 4000)])
def test_the_limit_of_the_group_or_of_one_above_it_bounds_the_memory(limits, expected, cgroups, tmp_path):
    whole = usable_memory(tmp_path / "none", tmp_path / "none")
    assert whole > 2**28
    for group, limit in limits.items():
        (cgroups[0] / group / "memory.max").write_text(limit + "\n", encoding="utf-8")
    assert usable_memory(*cgroups) == (expected or whole)


def test_affinity_bounds_the_cores(cgroups, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert usable_cores(*cgroups) == 2


@pytest.mark.parametrize("ranks, omp, expected", [
    ("1", None, 4), ("1", "3", 32), ("2", "1", 4), ("2", None, 4), ("16", "1", 1), ("2", "3", 32)])
def test_threads_are_the_users_or_a_share_of_the_cores(ranks, omp, expected, monkeypatch):
    """On 8 cores, of which torch would take 32 (its reading of OMP_NUM_THREADS) or 4."""
    monkeypatch.setattr(common, "usable_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if omp:
        monkeypatch.setenv("OMP_NUM_THREADS", omp)
    assert choose_num_threads(4 if omp is None else 32) == expected


def test_one_thread_ends_with_the_block(monkeypatch):
    numbers = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: numbers[-1])
    monkeypatch.setattr(torch, "set_num_threads", numbers.append)
    with pytest.raises(KeyError), one_thread():
        raise KeyError
    assert numbers == [2, 1, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch brings another OpenMP")
@pytest.mark.parametrize("module", ["scripts.base_loss", "nanochat.report", "tasks.gsm8k"])
@pytest.mark.parametrize("users, expected", [({}, "10000"), ({"GOMP_SPINCOUNT": "77"}, "77")])
def test_openmp_reads_how_its_threads_wait_in_every_entry_point(module, users, expected):
    """OpenMP itself prints what it has read. The module comes first, as in python -m."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    env |= {"OMP_DISPLAY_ENV": "verbose", **users}
    done = subprocess.run([sys.executable, "-c", f"import {module}"], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"GOMP_SPINCOUNT = '{expected}'" in done.stderr


def test_a_policy_of_the_users_is_left_alone():
    program = "import os, nanochat; print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('KMP_BLOCKTIME'))"
    env = {"PATH": os.environ["PATH"], "OMP_WAIT_POLICY": "active", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == "None None\n"


@pytest.mark.parametrize("main", [lambda: torch.empty(2**55), lambda: [0] * 2**60])
def test_memory_that_runs_out_is_one_line(main, capsys):
    with pytest.raises(SystemExit):
        run_script(main)
    told = capsys.readouterr().err
    assert "error: out of memory" in told and "--depth" in told


def test_an_error_of_our_own_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="inconsistent"):
        run_script(lambda: torch.ones(2) @ torch.ones(3))


def test_run_script_prints_a_users_mistake_without_traceback(capsys):
    def main():
        raise UserError("--depth=0 is too small", "--depth=4")
    with pytest.raises(SystemExit) as exit_info:
        run_script(main)
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "error: --depth=0 is too small\nhint: --depth=4\n"
