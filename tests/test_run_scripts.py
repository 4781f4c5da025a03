"""The shell scripts: valid bash, stages in order, the user's environment variables respected."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.test_commands import RUNS, dry_run

ROOT = Path(__file__).parent.parent
SCRIPTS = ["speedrun.sh", "run1000.sh", "steprun.sh", "dev/runcpu.sh", "dev/setup.sh", "dev/test.sh",
           "dev/gpu_check.sh", ".ci/run"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_the_stages_come_in_order():
    for run in RUNS:
        names = re.findall(r"-m (?:scripts|nanochat)\.(\w+)", "\n".join(dry_run(*run)))
        order = [name for name in ("tok_train", "base_train", "mid_train", "chat_sft", "chat_rl") if name in names]
        assert [name for name in names if name in order] == order and len(order) == 5
        assert len(names) - 1 - names[::-1].index("report") > names.index("chat_rl")


def test_run1000_is_the_speedrun_with_other_sizes():
    small, large = dry_run("speedrun.sh"), dry_run("run1000.sh")
    assert [re.sub(r"\d+", "N", line) for line in small] == [re.sub(r"\d+", "N", line) for line in large]
    assert any("--depth=32" in line for line in large) and any("-n 800" in line for line in large)


def test_environment_variables_of_the_user_are_respected():
    lines = dry_run("dev/runcpu.sh", NANOCHAT_BASE_DIR="/tmp/mine")
    assert any("--out=/tmp/mine/toy_world" in line for line in lines)
    assert not any("gen_synthetic_data" in line for line in dry_run("dev/runcpu.sh", NANOCHAT_DATA_DIR="/tmp/mirror"))
    assert any("--depth=12" in line for line in dry_run("speedrun.sh", DEPTH="12"))


def test_steprun_without_arguments_prints_help_and_a_wrong_step_is_named():
    assert any("base_model" in line for line in dry_run("steprun.sh"))
    assert dry_run("steprun.sh", "--help") == dry_run("steprun.sh")
    done = subprocess.run(["bash", "steprun.sh", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown step 'nonsense'" in done.stderr


@pytest.mark.parametrize("listed, visible, expected", [
    ("GPU 0: a\n  MIG 1g: b\nGPU 1: a", "", "gpu, processes: 2"), ("GPU 0: a\nGPU 1: a", "1", "gpu, processes: 1"),
    ("", "", "processes: 1")])
def test_steprun_counts_the_visible_gpus(tmp_path, listed, visible, expected):
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\nprintf '{listed}'\n[ -n '{listed}' ]\n", encoding="utf-8")
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    first, *commands = dry_run("steprun.sh", "base_model", PATH=path, CUDA_VISIBLE_DEVICES=visible)
    assert expected in first and ("torchrun" in commands[0]) == ("processes: 2" in expected)
