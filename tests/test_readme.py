"""README and dev/docs: their recipes work when they are followed, their links lead somewhere, their quotes are true."""

import importlib
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import stage
from nanochat.configurator import get_settings, override_from_cli
from tests.test_commands import PAGES, README, ROOT

MAX_LINES = 300
MAX_PICTURE_BYTES = 200_000
PYTHON = [sys.executable, "-m"]

# -----------------------------------------------------------------------------
# Following a recipe


def section(title):
    """The text below a heading of README, up to the next one."""
    return re.split(r"\n##+ ", README.partition(f"# {title}\n")[2])[0]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def copy_of_the_code(folder):
    for name in ("nanochat", "scripts", "tasks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def write_file(folder, block):
    """A block whose first line names the file that it is."""
    name, _, content = block.partition("\n")
    (folder / name.removeprefix("# ")).write_text(content, encoding="utf-8")


def apply_change(folder, block):
    """
    A block whose first line names a file, then lines as in a diff. Lines with ` ` and `-` stand in the file one after
    the other; the lines with `+` come behind them.
    """
    name, *lines = block.splitlines()
    path = folder / name.removeprefix("# ")
    for hunk in re.findall(r"((?:^[ -].*\n)+)((?:^\+.*\n)+)", "\n".join(lines) + "\n", re.MULTILINE):
        before, added = (part.splitlines() for part in hunk)
        old = "\n".join(line[1:] for line in before)
        kept = [line[1:] for line in before if line[0] == " "]
        new = "\n".join(kept + [line[1:] for line in added])
        text = "\n" + path.read_text(encoding="utf-8")
        assert text.count(f"\n{old}\n") == 1, f"{name}: {old}"
        text = text.replace(f"\n{old}\n", f"\n{new}\n")
        path.write_text(text.removeprefix("\n"), encoding="utf-8")


def run(command, folder, monkeypatch):
    """A command in a process of its own, with the code in `folder`. Returns its output."""
    monkeypatch.setenv("PYTHONPATH", str(folder))
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_here(line, *more):
    """A command of README and further arguments, in this process, which saves the seconds that a new one takes."""
    _, _, name, *arguments = shlex.split(line, comments=True)
    script = importlib.import_module(name)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "get_peak_flops", lambda device, dtype, width: (1e12, "not measured"))
        patch.setattr(sys, "argv", [name, *arguments, *more])
        for setting, value in get_settings(vars(script)).items():
            patch.setattr(script, setting, value)  # put back at the end
        if get_settings(vars(script)):
            override_from_cli(vars(script))
        script.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_a_block_changes_the_line_that_it_shows(tmp_path):
    (tmp_path / "a.py").write_text("one\ntwo\nthree\n", encoding="utf-8")
    apply_change(tmp_path, "# a.py\n one\n+one and a half\n-two\n-three\n+2\n+3\n")
    assert (tmp_path / "a.py").read_text(encoding="utf-8") == "one\none and a half\n2\n3\n"
    with pytest.raises(AssertionError, match="a.py: four"):
        apply_change(tmp_path, "# a.py\n-four\n+4\n")


# -----------------------------------------------------------------------------
# The recipes


def test_the_recipe_for_your_own_text(tmp_path, monkeypatch, story, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    texts = tmp_path / "my_texts"
    texts.mkdir()
    for i in range(3):
        (texts / f"{i}.txt").write_text(story * 5, encoding="utf-8")

    tok_train, base_train, chat_cli = blocks(section("Train on your own text"), "bash")[0].splitlines()
    run_here(tok_train)
    run_here(base_train, "--minutes=0.2", "--eval_tokens=300", "--total_batch_size=512", "--device_type=cpu")
    capsys.readouterr()
    run_here(chat_cli, "-n", "8", "--device_type", "cpu")
    output = capsys.readouterr().out
    assert output.startswith("Once upon a time") and len(output) > len("Once upon a time\n")


def test_the_recipe_for_your_own_conversations(base_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = section("Train on your own text")
    (line,) = blocks(text, "json")
    Path("chats.jsonl").write_text(line * 10, encoding="utf-8")
    mid_train, chat_sft = blocks(text, "bash")[1].splitlines()
    small = ["--num_iterations=1", "--spelling_size=5", "--spellingbee_size=5", "--device_batch_size=2",
             "--device_type=cpu"]
    run_here(mid_train, *small, "--total_batch_size=128", "--eval_tokens=100")
    run_here(chat_sft, *small, "--examples_per_step=2", "--eval_examples=2", "--smoltalk_size=5")

    # a row that cannot be used shows that the file is read
    Path("chats.jsonl").write_text(line + '[{"role": "assistant"}]\n', encoding="utf-8")
    for command in (mid_train, chat_sft):
        with pytest.raises(ValueError, match="chats.jsonl, line 2"):
            run_here(command, *small)


def test_the_recipe_for_a_task(base_dir, tmp_path, monkeypatch):
    text = section("Add a task")
    code = copy_of_the_code(tmp_path / "code")
    write_file(code, blocks(text, "python")[0])
    apply_change(code, blocks(text, "diff")[0])
    (line,) = blocks(text, "bash")
    command = [*PYTHON, *shlex.split(line)[2:], "-m", "4", "--device_type", "cpu"]
    assert "Capitals" in run(command, code, monkeypatch)
    (path,) = base_dir.glob("chat_eval/sft/*/Capitals.jsonl")
    records = [json.loads(record) for record in path.read_text(encoding="utf-8").splitlines()]
    assert len(records) == 3


LOAD_AND_EXPORT = """
import torch
from nanochat.checkpoint_manager import load_checkpoint
from scripts import export_hf
for tag in ("narrow", "d1"):
    model, _, _ = load_checkpoint("base", torch.device("cpu"), tag)
    print(tag, model.config.mlp_ratio, list(model.transformer.h[0].mlp.c_fc.weight.shape))
export_hf.source, export_hf.model_tag, export_hf.out = "base", "narrow", "exported"
export_hf.main()
"""


def test_the_recipe_for_a_change_of_the_model(base_dir, tmp_path, monkeypatch):
    """A narrow model trains, loads and is exported; one trained before the change still loads."""
    code = copy_of_the_code(tmp_path / "code")
    for block in blocks(section("Change the model"), "diff"):
        apply_change(code, block)
    small = ["--depth=1", "--max_seq_len=64", "--total_batch_size=128", "--device_batch_size=2", "--eval_tokens=100",
             "--num_iterations=1", "--device_type=cpu"]
    run([*PYTHON, "scripts.base_train", "--mlp_ratio=2", "--model_tag=narrow", *small], code, monkeypatch)
    output = run([sys.executable, "-c", LOAD_AND_EXPORT], code, monkeypatch)
    assert output.splitlines()[:2] == ["narrow 2 [128, 64]", "d1 4 [256, 64]"]
    config = json.loads((code / "exported" / "config.json").read_text(encoding="utf-8"))
    assert config["intermediate_size"] == 128 == 2 * config["hidden_size"]


# -----------------------------------------------------------------------------
# What the pages say


def anchor(heading):
    """How GitHub names a heading in links."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for name, _, place in re.findall(r"\]\(([^):#]+)(#([^)]+))?\)", page.read_text(encoding="utf-8")):
        target = page.parent / name
        assert target.exists(), name
        if place:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert place in map(anchor, headings), place


def test_pictures_are_there_and_small():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 2
    assert all((ROOT / name).stat().st_size < MAX_PICTURE_BYTES for name in pictures)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MAX_LINES


def test_the_model_is_quoted_from_the_log():
    log = (ROOT / "dev/log/2026-11-29-laptop-run.md").read_text(encoding="utf-8")
    lines = [line.strip("`") for line in log.splitlines() if line.strip()]
    conversation = blocks(README.partition("## Quick start")[0], "text")[0]
    assert conversation.startswith("> ") and conversation.count("\n> ") > 3
    assert conversation in "\n".join(lines) + "\n"
    limits = " ".join(section("Limits").split())  # a quote may go over the end of a line
    mistakes = re.findall(r'"([^"]+)"', limits)
    assert len(mistakes) == 2 and set(mistakes) <= set(lines)


def test_the_page_of_the_code_names_every_file():
    text = (ROOT / "dev/docs/code.md").read_text(encoding="utf-8")
    modules = [path.name for path in (ROOT / "nanochat").glob("*.py") if path.stem != "__init__"]
    scripts = [path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem != "__init__"]
    missing = [name for name in modules + scripts if f"`{name}`" not in text]
    assert missing == [], "name them in dev/docs/code.md"
    named = set(re.findall(r"`(\w+\.py)`", text))
    assert named <= {*modules, "pictures.py", "base_train.py", "tour.py"}
