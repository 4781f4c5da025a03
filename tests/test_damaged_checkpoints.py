"""A damaged checkpoint: found when it is read, named, and the step before it offered with a command that works."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from nanochat import checkpoint_manager
from nanochat.checkpoint_folders import find_checkpoint_dir
from nanochat.checkpoint_manager import CheckpointManager, load_checkpoint, stage_managers
from nanochat.common import UserError
from nanochat.stage import choose_step
from scripts import chat_cli
from tests.stages import STAGES, curve, run_stage
from tests.tiny import tiny_model

CPU = torch.device("cpu")
FILES = ["meta.json", "model.safetensors", "optimizer.safetensors", "tokenizer/tokenizer.tiktoken",
         "tokenizer/tokenizer_meta.json"]


@pytest.fixture
def manager(tmp_path, monkeypatch, tokenizer):
    """Steps 10 and 20 of a model with everything in them."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    manager = CheckpointManager(tmp_path / "base_checkpoints" / "d2")
    model = tiny_model(vocab_size=tokenizer.get_vocab_size())
    for step in (10, 20):
        manager.save(step, model, model.setup_optimizers(), tokenizer, {"settings": {"depth": 2}})
    return manager


def flip_a_bit(path, position=0.7):
    """Damage of the kind that a disk or a cable does; the size stays."""
    data = bytearray(path.read_bytes())
    data[int(position * len(data))] ^= 1
    path.write_bytes(data)


def change_a_digit(path):
    """A flipped bit that leaves meta.json a JSON file: another value of some number."""
    text = path.read_text()
    path.write_text(text.replace('"depth": 2', '"depth": 3'))


def resume(manager, step=None):
    """All that a training run reads of a checkpoint."""
    step, _ = manager.load_meta(step)
    manager.load_tokenizer(step)
    model = manager.load_model(CPU, step)
    manager.load_optimizers(model.setup_optimizers(), step)
    return step


@pytest.mark.parametrize("name", FILES)
def test_a_changed_bit_is_named_and_the_offered_command_leads_to_the_step_before(name, manager):
    path = manager.checkpoint_dir / "step_000020" / name
    change_a_digit(path) if name == "meta.json" else flip_a_bit(path)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} is damaged: its checksum differs") as error:
        resume(manager)
    command = re.search(r"hint: (mv .*)", str(error.value))[1]
    assert "then step 10 is the last one" in command
    subprocess.run(command, shell=True, check=True)
    assert resume(manager) == 10


@pytest.mark.parametrize("name", FILES[:2])
def test_a_file_of_another_step_is_not_taken_for_this_one(name, manager, tokenizer):
    """Copied back by hand, for example; sizes and the file's own checksum are right."""
    other = tiny_model(vocab_size=tokenizer.get_vocab_size(), seed=9)
    manager.save(30, other, other.setup_optimizers(), tokenizer, {"settings": {"depth": 2}})
    folder = manager.checkpoint_dir / "step_000030"
    shutil.copy(manager.checkpoint_dir / "step_000020" / name, folder / name)
    with pytest.raises(UserError, match=f"{re.escape(str(folder / name))} is .*\nhint: mv .*then step 20"):
        resume(manager, 30)


@pytest.mark.parametrize("position", [0.001, 0.2, 0.5, 0.999])
def test_serving_finds_damaged_weights_wherever_they_are(position, manager):
    flip_a_bit(manager.checkpoint_dir / "step_000020" / "model.safetensors", position)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        load_checkpoint("base", CPU)


def test_the_impatient_and_those_without_checksums_load_unchecked(manager):
    path = manager.checkpoint_dir / "step_000020" / "model.safetensors"
    flip_a_bit(path)
    load_checkpoint("base", CPU, verify=False)
    # as written before there were checksums
    meta_path = path.with_name("meta.json")
    meta = json.loads(meta_path.read_text())
    meta_path.write_text(json.dumps({k: v for k, v in meta.items() if not k.startswith("checksum")}))
    load_checkpoint("base", CPU)


def test_chat_cli_loads_damaged_weights_only_if_asked_to(manager, monkeypatch, capsys):
    flip_a_bit(manager.checkpoint_dir / "step_000020" / "model.safetensors")
    monkeypatch.setattr("sys.argv", ["chat_cli", "-i", "base", "-p", "the", "-n", "1"])
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        chat_cli.main()
    monkeypatch.setattr("sys.argv", [*sys.argv, "--verify=false"])
    chat_cli.main()
    assert capsys.readouterr().out.startswith("the")


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def empty(path):
    path.write_bytes(b"")


def remove(path):
    path.unlink()


DAMAGES = [cut, empty, remove]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_cut_or_missing_file_is_named_and_the_step_before_is_taken(name, damage, manager, capsys):
    path = manager.checkpoint_dir / "step_000020" / name
    damage(path)
    assert resume(manager) == 10
    warning = capsys.readouterr().out
    assert warning.startswith(f"warning: {path} is ") and warning.endswith("; step 10 is taken\n")
    with pytest.raises(UserError, match=f"no whole checkpoint of step 20 .*: {re.escape(str(path))} is .*\nhint: .*10"):
        resume(manager, 20)


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_only_checkpoint_lacks_a_file(damage, manager):
    """It is not said that there is none, and a run that resumes by itself does not begin anew."""
    shutil.rmtree(manager.checkpoint_dir / "step_000010")
    path = manager.checkpoint_dir / "step_000020" / "model.safetensors"
    damage(path)
    needed = f"no whole checkpoint in .*: {re.escape(str(path))} is .*\nhint: restore the file"
    with pytest.raises(UserError, match=needed):
        load_checkpoint("base", CPU)
    with pytest.raises(UserError, match=needed):
        load_checkpoint("base", CPU, "d2")
    with pytest.raises(UserError, match=needed):
        choose_step(manager, -1, True, CPU)


def test_another_model_is_not_taken_without_a_word(manager, tokenizer, capsys):
    other = CheckpointManager(manager.checkpoint_dir.with_name("d3"))
    path = other.save(5, tiny_model(), tokenizer=tokenizer) / "model.safetensors"
    cut(path)
    assert find_checkpoint_dir("base") == manager.checkpoint_dir
    assert f"warning: {path} is damaged" in capsys.readouterr().out


def test_what_a_new_run_finds_damaged_is_moved_aside_too(manager):
    cut(manager.checkpoint_dir / "step_000020" / "model.safetensors")
    assert [folder.name for folder in manager.move_aside_after(10)] == ["step_000020.old1"]
    shutil.rmtree(manager.checkpoint_dir / "step_000010")
    (manager.checkpoint_dir / "step_000020.old1").rename(manager.checkpoint_dir / "step_000020")
    assert manager.move_aside().name == "d2.old1"


def test_a_damaged_version_number_is_no_newer_release(manager):
    path = manager.checkpoint_dir / "step_000020" / "meta.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(UserError, match="meta.json is damaged: its checksum differs"):
        manager.load_meta()


def test_the_only_checkpoint_is_damaged(manager):
    shutil.rmtree(manager.checkpoint_dir / "step_000010")
    flip_a_bit(manager.checkpoint_dir / "step_000020" / "model.safetensors")
    with pytest.raises(UserError, match="there is no step before it"):
        manager.load_model(CPU)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(value, manager, tokenizer):
    model = manager.load_model(CPU)
    model.lm_head.weight.data[3, 0] = value
    manager.save(30, model, tokenizer=tokenizer)
    with pytest.raises(UserError, match="step 30: parameter lm_head.weight is not finite\nhint: mv .*step 20"):
        load_checkpoint("base", CPU)


def test_weights_whose_sum_overflows_are_finite(manager, tokenizer):
    model = manager.load_model(CPU)
    model.lm_head.weight.data[:] = 1e38
    manager.save(30, model, tokenizer=tokenizer)
    load_checkpoint("base", CPU)


# -- the newest one


def test_the_model_saved_last_is_the_one_with_the_latest_recorded_time(manager, tmp_path, tokenizer):
    """Whatever copying or touching did to the files."""
    other = CheckpointManager(manager.checkpoint_dir.with_name("d3"))
    other.save(5, tiny_model(), tokenizer=tokenizer)
    long_ago = time.time() - 9999
    os.utime(other.checkpoint_dir / "step_000005" / "meta.json", (long_ago, long_ago))
    assert find_checkpoint_dir("base") == other.checkpoint_dir


def test_without_a_recorded_time_the_files_own_counts(manager, tokenizer):
    for number, tag in enumerate(("d3", "d4")):
        other = CheckpointManager(manager.checkpoint_dir.with_name(tag))
        path = other.save(5, tiny_model(), tokenizer=tokenizer) / "meta.json"
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in meta.items() if k not in ("saved_at", "checksum")}))
        later = time.time() + 100 - number
        os.utime(path, (later, later))
    assert find_checkpoint_dir("base").name == "d3"


# -- a run that resumes by itself


def test_it_takes_the_last_step_that_is_intact_and_names_the_others(manager, capsys):
    assert choose_step(manager, -1, True, CPU) == 20
    flip_a_bit(manager.checkpoint_dir / "step_000020" / "optimizer.safetensors")
    assert choose_step(manager, -1, True, CPU) == 10
    assert "step_000020/optimizer.safetensors is damaged" in capsys.readouterr().out


def test_it_begins_anew_only_where_there_is_no_checkpoint(manager):
    nothing = CheckpointManager(manager.checkpoint_dir.with_name("new"))
    assert choose_step(nothing, -1, True, CPU) is None
    for step in (10, 20):
        flip_a_bit(manager.checkpoint_dir / f"step_0000{step}" / "model.safetensors")
    with pytest.raises(UserError, match="step_000010/model.safetensors is damaged"):
        choose_step(manager, -1, True, CPU)


def test_it_contradicts_a_step_and_needs_a_name(manager):
    with pytest.raises(UserError, match="--auto_resume=True and --resume_from_step=10 contradict"):
        choose_step(manager, 10, True, CPU)
    with pytest.raises(UserError, match="needs a --model_tag.*\nhint: --auto_resume=True --model_tag=d2"):
        stage_managers("mid", "base", None, -1, auto_resume=True)


def test_it_waits_for_a_checkpoint_that_this_machine_does_not_see_yet(manager, monkeypatch):
    folder = manager.checkpoint_dir / "step_000020"
    hidden = folder.rename(folder.with_name("hidden"))
    monkeypatch.setattr(checkpoint_manager, "VISIBLE_WAIT_S", 30)
    threading.Timer(0.5, hidden.rename, [folder]).start()
    manager.wait_until_visible(20)
    assert manager.last_step() == 20


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_begins_resumes_and_ends_by_itself(stage, base_dir, capsys):
    """One command three times: a new run, one that goes on, and one that has nothing left to do."""
    settings = dict(auto_resume=True, model_tag="again")
    for source in list(STAGES)[: list(STAGES).index(stage)]:
        run_stage(source, model_tag="again")
    capsys.readouterr()
    run_stage(stage, **settings)
    unbroken = curve(stage, "again")
    assert "resuming" not in capsys.readouterr().out
    manager = CheckpointManager(checkpoint_manager.get_checkpoint_dir(stage, "again"))
    shutil.rmtree(manager.checkpoint_dir / "step_000004")
    for resumed_from in (2, 4):
        run_stage(stage, **settings)
        assert f"resuming step {resumed_from}" in capsys.readouterr().out
        assert curve(stage, "again") == unbroken
    assert manager.steps() == [2, 4]


def test_a_damaged_last_step_is_trained_again_and_kept_beside(base_dir):
    unbroken = curve("base")
    manager = CheckpointManager(checkpoint_manager.get_checkpoint_dir("base", "d1"))
    flip_a_bit(manager.checkpoint_dir / "step_000004" / "model.safetensors")
    run_stage("base", auto_resume=True)
    assert curve("base") == unbroken
    assert (manager.checkpoint_dir / "step_000004.old1").is_dir()
    resume(manager, 4)
