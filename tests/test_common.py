"""Schedules against closed forms; places; how a script ends."""

import subprocess
import sys

import pytest
import torch

from nanochat.common import UserError, compute_init, get_base_dir, get_data_dir, run_script
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
