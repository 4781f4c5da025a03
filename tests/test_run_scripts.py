"""The shell scripts: valid, and their commands, printed by DRY_RUN=1, name modules and settings that exist."""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest

from nanochat.configurator import get_settings

ROOT = Path(__file__).parent.parent
SCRIPTS = ["speedrun.sh", "run1000.sh", "steprun.sh", "dev/runcpu.sh", "dev/setup.sh", "dev/test.sh", ".ci/run"]
RUNS = [["speedrun.sh"], ["run1000.sh"], ["steprun.sh", "all"], ["dev/runcpu.sh"]]


def dry_run(*command, **env):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT")}
    env = kept | {"DRY_RUN": "1"} | env
    done = subprocess.run(["bash", *command], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[0])
def test_every_command_names_a_module_and_settings_that_exist(run):
    commands = [line for line in dry_run(*run) if re.match(r"(env \S+ )?(python|torchrun) ", line)]
    assert len(commands) > 5
    for command in commands:
        module = importlib.import_module(re.search(r"-m (\S+)", command).group(1))
        settings = get_settings(vars(module))
        for name in re.findall(r" --(\w+)=", command.partition(" -- ")[2] if "torchrun" in command else command):
            assert name in settings or not settings, f"{command}: no setting {name}"


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


def test_the_users_environment_is_kept():
    lines = dry_run("dev/runcpu.sh", NANOCHAT_BASE_DIR="/tmp/mine")
    assert any("--out=/tmp/mine/toy_world" in line for line in lines)
    assert not any("gen_synthetic_data" in line for line in dry_run("dev/runcpu.sh", NANOCHAT_DATA_DIR="/tmp/mirror"))
    assert any("--depth=12" in line for line in dry_run("speedrun.sh", DEPTH="12"))


def test_steprun_without_arguments_prints_help_and_a_wrong_step_is_named():
    assert any("base_model" in line for line in dry_run("steprun.sh"))
    done = subprocess.run(["bash", "steprun.sh", "nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "unknown step 'nonsense'" in done.stderr
