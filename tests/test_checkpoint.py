"""Checkpoints: only whole ones are seen, none fails to load, and what is saved is what comes back."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from nanochat import locks
from nanochat.checkpoint_files import FORMAT_VERSION, meta_checksum
from nanochat.checkpoint_manager import CheckpointManager, find_checkpoint_dir, load_checkpoint
from nanochat.common import UserError
from nanochat.stage import resume_step
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture
def manager(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    return CheckpointManager(tmp_path / "base_checkpoints" / "d2")


@pytest.fixture
def saved(manager, tokenizer):
    """Steps 10 and 20, everything in them."""
    model = tiny_model(vocab_size=tokenizer.get_vocab_size())
    optimizers = model.setup_optimizers()
    for step in (10, 20):
        manager.save(step, model, optimizers, tokenizer, {"settings": {"depth": 2}})
    return model


def test_the_documented_pattern(manager):
    model = tiny_model()
    manager.save_model(model, 5)
    loaded = manager.load_model(CPU, 5)
    assert loaded.config == model.config
    x = torch.randint(0, 100, (1, 8))
    assert torch.equal(model(x), loaded(x))
    assert all(p.requires_grad for p in loaded.parameters())


def test_load_checkpoint_brings_model_tokenizer_and_meta(manager, saved, tokenizer):
    model, loaded_tokenizer, meta = load_checkpoint("base", CPU)
    assert meta["step"] == 20 and meta["settings"] == {"depth": 2} and not model.training
    assert loaded_tokenizer.hash() == tokenizer.hash()


@pytest.mark.parametrize("tag", ["d2_big", "my model", "v1.5", "a_b-c"])
def test_any_tag_resolves(tag, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    CheckpointManager(find_checkpoint_dir("base", tag)).save_model(tiny_model(), 1)
    assert find_checkpoint_dir("base").name == tag


def edit_meta(manager, change):
    """change(meta) in the meta data of step 20, as its writer would have done it: with a checksum that fits."""
    path = manager.checkpoint_dir / "step_000020" / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta | {"checksum": meta_checksum(meta)}))


def files_of(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_a_file_that_is_truncated_or_missing_makes_the_checkpoint_invisible(manager, saved):
    folder = manager.checkpoint_dir / "step_000020"
    names = files_of(folder)
    assert {"meta.json", "model.safetensors", "optimizer.safetensors"} <= set(names)
    for name in names:
        path, data = folder / name, (folder / name).read_bytes()
        for damaged in (data[: len(data) // 2], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            assert manager.last_step() == 10, name
            manager.load_model(CPU)
            path.write_bytes(data)
    assert manager.last_step() == 20


@pytest.mark.parametrize("change", [{"files": []}, {"model_config": None}, {"format_version": "one"}])
def test_meta_data_that_is_none_makes_the_checkpoint_invisible(manager, saved, change):
    path = manager.checkpoint_dir / "step_000020" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert manager.steps() == [10]


def test_a_config_of_another_release_is_one_line(manager, saved):
    edit_meta(manager, lambda meta: meta["model_config"].update(experts=8))
    with pytest.raises(UserError, match="model_config does not fit.*experts"):
        manager.load_model(CPU, 20)


def test_a_wrapped_compiled_model_is_saved_under_its_plain_names(manager):
    model = tiny_model()
    manager.save_model(torch.compile(model), 1)
    assert manager.load_model(CPU, 1).state_dict().keys() == model.state_dict().keys()


def test_damage_that_keeps_the_size_is_one_line(manager, saved):
    path = manager.checkpoint_dir / "step_000020" / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(UserError, match="model.safetensors is damaged"):
        manager.load_model(CPU, 20)


def test_a_write_that_never_finished_is_not_seen(manager, saved):
    shutil.copytree(manager.checkpoint_dir / "step_000020", manager.checkpoint_dir / ".tmp_step_000030")
    assert manager.steps() == [10, 20]


def test_keep_last_prunes_the_oldest(manager):
    model = tiny_model()
    for step in range(5):
        manager.save(step, model, keep_last=2)
    assert manager.steps() == [3, 4]


def test_another_runs_later_steps_do_not_count(manager):
    model = tiny_model()
    for step in (90, 100, 1, 2, 3):
        manager.save(step, model, keep_last=2)
    assert manager.steps() == [2, 3, 90, 100]


def test_an_old_checkpoint_that_cannot_be_removed_costs_a_warning(manager, tmp_path, capsys):
    model = tiny_model()
    manager.save(1, model).rename(tmp_path / "elsewhere")
    (manager.checkpoint_dir / "step_000001").symlink_to(tmp_path / "elsewhere")  # rmtree refuses links
    manager.save(2, model, keep_last=1)
    assert manager.steps() == [1, 2] and "step 1 could not be removed" in capsys.readouterr().out


def test_what_killed_saves_left_behind_goes_with_the_next_one(manager):
    left = manager.checkpoint_dir / ".tmp_step_000007"
    left.mkdir(parents=True)
    manager.save(8, tiny_model())
    assert not left.exists()


def test_saving_a_step_again_replaces_it(manager):
    model = tiny_model()
    manager.save_model(model, 1)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    manager.save_model(model, 1)
    assert torch.equal(manager.load_model(CPU, 1).lm_head.weight, model.lm_head.weight)
    assert sorted(p.name for p in manager.checkpoint_dir.iterdir()) == ["step_000001", "step_000001.old1"]
    assert manager.steps() == [1]


@pytest.mark.parametrize("tag", ["/tmp/elsewhere", "..", ".", "a/b", ""])
def test_a_tag_that_is_a_path_is_refused(manager, tag):
    with pytest.raises(UserError, match="is no name"):
        find_checkpoint_dir("base", tag)


def test_going_back_moves_the_abandoned_future_aside(manager):
    model = tiny_model()
    for step in (50, 100):
        manager.save(step, model)
    manager.move_aside_after(50)
    manager.save(75, model, keep_last=1)
    assert manager.steps() == [75] and (manager.checkpoint_dir / "step_000100.old1").is_dir()


def test_weights_are_loaded_in_the_compute_dtype_and_the_rotary_table_in_float32(manager, saved, monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRECISION", "bfloat16")
    model, _, _ = load_checkpoint("base", CPU)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.cos.dtype == model.sin.dtype == torch.float32


def test_a_new_run_moves_the_old_one_aside(manager):
    manager.save_model(tiny_model(), 1)
    moved = manager.move_aside()
    assert CheckpointManager(moved).steps() == [1] and manager.steps() == []
    assert manager.move_aside() is None
    with pytest.raises(UserError, match=f"those of the run before it are in {moved}"):
        manager.load_meta()


def test_a_second_run_is_refused_while_the_first_one_lives(manager):
    manager.claim(CPU)
    hold = f"""
import sys, torch
from nanochat.checkpoint_manager import CheckpointManager
manager = CheckpointManager({str(manager.checkpoint_dir)!r})
manager.claim(torch.device("cpu"))
print("held", flush=True)
sys.stdin.read()"""
    refused = subprocess.run([sys.executable, "-c", hold], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert "another run is writing to" in refused.stderr and "--model_tag" in refused.stderr and not refused.stdout
    del manager._claim
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another run is writing to"):
            manager.claim(CPU)
        other.kill()
    manager.claim(CPU)  # whatever ends a process ends its claim
    CheckpointManager(manager.checkpoint_dir).claim(CPU)  # the stages of one process follow each other


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available"),
                                   OSError(errno.EOPNOTSUPP, "Operation not supported")])
def test_a_file_system_without_locks_is_written_to_all_the_same(error, manager, monkeypatch):
    def acquire(lock, **kwargs):
        raise error
    monkeypatch.setattr(locks.FileLock, "acquire", acquire)
    manager.claim(CPU)
    monkeypatch.setattr(locks, "NO_LOCKS", ())
    if isinstance(error, OSError):
        with pytest.raises(OSError, match=error.strerror):
            manager.claim(CPU)


def test_a_run_that_resumes_by_itself_waits_for_the_one_before_it(manager):
    manager.checkpoint_dir.parent.mkdir()
    path = manager.checkpoint_dir.with_name(f".{manager.checkpoint_dir.name}.lock")
    first = locks.FileLock(path, thread_local=False)
    first.acquire()
    with pytest.raises(UserError, match="another run is writing to"):
        manager.claim(CPU, wait_s=0.1)
    threading.Timer(0.5, first.release).start()
    manager.claim(CPU, wait_s=60)


def test_another_tokenizer_is_refused(manager, saved, tokenizer, story):
    other = type(tokenizer).train_from_iterator(iter([story[::-1]]), vocab_size=512)
    folder = manager.checkpoint_dir / "step_000020"
    shutil.rmtree(folder / "tokenizer")
    other.save(folder / "tokenizer")
    edit_meta(manager, lambda meta: meta.update(files={"model.safetensors": meta["files"]["model.safetensors"]}))
    with pytest.raises(UserError, match="not the tokenizer this model was trained with"):
        load_checkpoint("base", CPU)


@pytest.mark.parametrize("num_pairs", [0, 5])
def test_only_a_checkpoint_that_uses_the_deleted_pair_embeddings_is_refused(manager, saved, num_pairs):
    edit_meta(manager, lambda meta: meta["model_config"].update(pair_embeds=num_pairs))
    if num_pairs == 0:
        assert manager.load_model(CPU, 20).config == saved.config
        return
    with pytest.raises(UserError, match="needs pair embeddings"):
        manager.load_model(CPU, 20)


def test_a_newer_format_says_update(manager, saved):
    path = manager.checkpoint_dir / "step_000020" / "meta.json"
    meta = json.loads(path.read_text()) | {"format_version": FORMAT_VERSION + 1}
    path.write_text(json.dumps(meta | {"checksum": meta_checksum(meta)}))
    with pytest.raises(UserError, match="git pull"):
        manager.load_meta(20)


@pytest.mark.parametrize("call, message", [
    (lambda m: m.load_model(CPU), "no checkpoint in .*\nhint: train one: python -m scripts.base_train"),
    (lambda m: m.load_model(CPU, 7), "no checkpoint in .*"),
    (lambda m: load_checkpoint("base", CPU), "no base checkpoint.*\n.*scripts.base_train"),
    (lambda m: load_checkpoint("nonsense", CPU), "stage 'nonsense' is unknown"),
])
def test_what_is_not_there_is_said(manager, call, message):
    with pytest.raises(UserError, match=message):
        call(manager)


def test_a_step_or_tag_that_is_not_there_is_answered_with_those_that_are(manager, saved):
    with pytest.raises(UserError, match="no whole checkpoint of step 7 .*\nhint: there are the steps 10, 20"):
        manager.load_model(CPU, 7)
    with pytest.raises(UserError, match="no checkpoint in .*d99\nhint: the base models here are d2"):
        load_checkpoint("base", CPU, model_tag="d99")


def test_a_model_alone_cannot_be_resumed(manager):
    model = tiny_model()
    manager.save_model(model, 1)
    with pytest.raises(UserError, match="cannot be resumed"):
        manager.load_optimizers(model.setup_optimizers(), 1)
    with pytest.raises(UserError, match="step 1 in .* cannot be resumed"):
        resume_step(manager, {"seed": 1, "resume_from_step": -2, "auto_resume": False}, CPU)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_leaves_the_previous_checkpoint_usable(tmp_path):
    model = tiny_model(n_embd=128)
    disk = tmp_path / "disk"
    disk.mkdir()
    size = int(sum(p.numel() for p in model.parameters()) * 4 * 1.5)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("this system does not let us mount a tmpfs")
    try:
        manager = CheckpointManager(disk / "d2")
        manager.save_model(model, 1)
        with pytest.raises(UserError, match="step_000002 could not be written.*\n?.*free disk space"):
            manager.save_model(model, 2)
        assert manager.steps() == [1]
        assert [p.name for p in manager.checkpoint_dir.iterdir()] == ["step_000001"]
        manager.load_model(CPU)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # loaded weights may still be mapped


def test_a_checkpoint_of_the_first_format_loads():
    """tests/golden_checkpoint was written by format 1 and never changes: what users have on disk must go on loading."""
    manager = CheckpointManager(Path(__file__).parent / "golden_checkpoint")
    model, tokenizer = manager.load_model(CPU, 3), manager.load_tokenizer(3)
    manager.load_optimizers(model.setup_optimizers(), 3)
    ids = tokenizer.encode("the fox lives", prepend="<|bos|>")
    assert ids == [271, 116, 257, 263, 111, 120, 264, 270, 268]
    logits = model(torch.tensor([ids]))[0, -1, :5]
    assert logits.tolist() == pytest.approx([0.3063, -1.3572, 1.4623, -0.187, 0.9777], abs=1e-3)
