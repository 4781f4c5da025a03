"""The commands of the README, of dev/docs and of the run scripts: their files, modules and flags exist."""

import importlib
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.configurator import get_settings, override_from_cli

ROOT = Path(__file__).parent.parent
RUNS = [["speedrun.sh"], ["run1000.sh"], ["steprun.sh", "all"], ["dev/runcpu.sh"]]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "dev" / "docs").glob("*.md")), *sorted((ROOT / "dev").glob("*/README.md"))]


def dry_run(*command, **env):
    """The lines that a script prints under DRY_RUN=1."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("NANOCHAT")}
    env = kept | {"DRY_RUN": "1"} | env
    done = subprocess.run(["bash", *command], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def commands_of(text):
    """The lines of a page's bash blocks, with continued lines joined, and the commands of scripts in its text."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return lines + re.findall(r"`(python -m (?:scripts|nanochat|dev)\.[^`]+)`", text)


def check_command(line):
    """Fails if `line` names a file, module, setting or flag that does not exist. Returns whether it was checked."""
    words = shlex.split(line, comments=True)
    while words and re.match(r"env$|\w+=", words[0]):  # environment variables in front
        words.pop(0)
    if words[:1] == ["bash"]:
        assert (ROOT / words[1]).is_file(), line
    if words[:1] not in (["python"], ["torchrun"]) or "pytest" in words:
        return words[:1] == ["bash"]
    at = words.index("-m") + 1
    module = importlib.import_module(words[at])
    flags = [word for word in words[at + 1:] if word not in ("--", "--help")]
    if get_settings(vars(module)):
        override_from_cli(dict(vars(module)), flags)
    elif hasattr(module, "parse_args"):
        module.parse_args(flags)
    return True


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run[0])
def test_the_commands_of_a_run_script_are_valid(run):
    assert sum(map(check_command, dry_run(*run))) > 5


def test_the_commands_of_the_readme_are_valid():
    assert sum(map(check_command, commands_of(README))) > 20


@pytest.mark.parametrize("path", PAGES[1:], ids=lambda path: str(path.relative_to(ROOT)))
def test_the_commands_of_the_other_pages_are_valid(path):
    for line in commands_of(path.read_text(encoding="utf-8")):
        check_command(line)


@pytest.mark.parametrize("line", ["python -m scripts.base_train --dept=4", "python -m scripts.chat_eval -i base -q",
                                  "python -m scripts.chat_sft --num_epochs=many", "bash nothing.sh"])
def test_an_invalid_command_fails_the_check(line):
    with pytest.raises((SystemExit, AssertionError)):
        check_command(line)


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "scripts").glob("[a-z]*.py")))
def test_every_script_has_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    monkeypatch.delitem(sys.modules, f"scripts.{script}", raising=False)
    with pytest.raises(SystemExit) as done:
        runpy.run_module(f"scripts.{script}", run_name="__main__")
    assert done.value.code == 0 and f"python -m scripts.{script}" in capsys.readouterr().out
