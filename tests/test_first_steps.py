"""What somebody types who has just cloned the project, and the line that answers where it cannot work yet."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENTRY_FILES = ["nanochat/__init__.py", "scripts/__init__.py"]  # what an old Python reads first


def start(command, base_dir, path=os.environ["PATH"], cwd=ROOT):
    """Run a shell command with an empty base directory: (exit status, lines on stderr)."""
    env = {"PATH": str(path), "HOME": str(base_dir), "NANOCHAT_BASE_DIR": str(base_dir), "PYTHONPATH": str(ROOT),
           "OMP_NUM_THREADS": "1"}
    shell = [shutil.which("bash"), "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=cwd, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr.splitlines()


def test_a_python_without_the_packages_says_how_to_get_them(tmp_path):
    # -S: without site-packages
    status, (error, hint) = start(f"{sys.executable} -S -m scripts.chat_cli", tmp_path)
    assert status == 2 and error == f"error: torch is not installed for {sys.executable}"
    assert hint.startswith("hint: source .venv/bin/activate")


def test_an_old_python_is_told_which_one_is_needed(tmp_path):
    code = "import sys; sys.version_info = (3, 9, 18); import scripts.chat_cli"
    status, (error, _) = start(f"{sys.executable} -c '{code}'", tmp_path)
    assert status == 2 and error.endswith("is too old: 3.10 or newer is needed")


@pytest.mark.parametrize("name", ENTRY_FILES)
def test_an_old_python_can_read_the_file_that_tells_it(name):
    ast.parse((ROOT / name).read_text(encoding="utf-8"), feature_version=(3, 7))


@pytest.mark.parametrize("command", ["-m scripts.chat_web", "scripts/chat_cli.py"])
def test_without_any_model_the_first_command_to_run_is_named(command, tmp_path):
    status, (error, hint) = start(f"{sys.executable} {command}", tmp_path)
    assert status == 2 and error.startswith("error: no sft checkpoint in ")
    assert hint.startswith("hint: bash dev/runcpu.sh")


@pytest.mark.parametrize("script", ["base_train", "chat_cli"])
def test_help_may_be_cut_by_head(script, tmp_path):
    status, lines = start(f"{sys.executable} -m scripts.{script} --help | true", tmp_path)
    assert lines == [] and status in (0, 120, 141)  # 141: SIGPIPE, as of any other program


def test_without_a_c_compiler_the_set_up_names_the_package(tmp_path):
    for name in ("uv", "mkdir"):
        (tmp_path / name).symlink_to(shutil.which("true"))
    status, (error, hint) = start("source dev/setup.sh cpu", tmp_path, path=tmp_path)
    assert status == 2 and error == "error: no C compiler (cc) is installed" and "build-essential" in hint
