"""The messages that the toy world's model answers well: one list for the data, the checkpoints and the texts."""

import re
import shlex
from pathlib import Path

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.run_keeper import read_examples
from tests.stages import STAGES
from tests.test_commands import README, dry_run

ROOT = Path(__file__).parent.parent
EXAMPLES = (ROOT / "dev/toyworld/data/examples.txt").read_text(encoding="utf-8").splitlines()


def prompts_of(command):
    words = shlex.split(command, comments=True)
    return [words[i + 1] for i, word in enumerate(words) if word == "-p"]


def test_the_readme_names_the_examples_and_no_other_messages():
    start = README.partition("## Quick start")[2].partition("\nOn a node of")[0]
    assert set(re.findall(r'"(.+?)"', start)) == set(EXAMPLES)


def test_the_laptop_run_ends_with_the_examples():
    assert prompts_of(dry_run("dev/runcpu.sh")[-1]) == EXAMPLES


def test_every_stage_keeps_the_examples_of_its_data(base_dir):
    for stage in STAGES:
        _, meta = CheckpointManager(get_checkpoint_dir(stage, "d1")).load_meta()
        assert meta["examples"] == EXAMPLES, stage


def test_examples_are_a_file_that_may_be_missing_or_written_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    assert read_examples() == []
    (tmp_path / "examples.txt").write_text("Who are you?\n\n  Sing a song  \n", encoding="utf-8")
    assert read_examples() == ["Who are you?", "Sing a song"]
