"""
Checkpoints: saved so that only complete ones are ever seen, loaded so that a damaged or wrong one
is an error.

    <base>/base_checkpoints/d20/step_001000/
        model.safetensors      parameters, float32, by name
        optimizer.safetensors  full optimizer state by parameter name, for any number of ranks
        (training only)
        tokenizer/             the tokenizer the model was trained with
        meta.json              format version, model config, tokenizer hash, training state, sizes of the other files

A checkpoint is written into `.tmp_step_...`, every file and folder is fsynced, and one rename makes
it visible. meta.json states the size of every other file, so a truncated copy is recognised without
reading it. Nothing is pickled. FORMAT_VERSION grows when the layout changes; `_upgrade` keeps older
checkpoints loading.

Saving never overwrites: a folder that is in the way, of an earlier run or of a damaged step, is
renamed to the first free <name>.old<n>. Such folders are left out where models and steps are
listed; a model's can be loaded by its name (--model_tag=d20.old1).
"""

import itertools
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.common import UserError, get_base_dir, print0
from nanochat.distributed import FailedElsewhere, barrier, rank, run_together
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import prepare
from nanochat.precision import precision_note
from nanochat.tokenizer import get_tokenizer

FORMAT_VERSION = 1
# stage -> folder below the base directory, and the script that trains it
STAGE_DIRS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
STAGE_SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}


# -----------------------------------------------------------------------------
# Where checkpoints are


def get_checkpoint_dir(stage, model_tag):
    """
    The folder that holds the steps of one model: <base>/<stage folder>/<tag>. A tag is a name,
    never a path.
    """
    if not re.fullmatch(r"\w[\w .+-]*", model_tag):
        raise UserError(f"--model_tag={model_tag!r} is no name: use letters, digits and _ . + -", "--model_tag=d20")
    return get_base_dir() / STAGE_DIRS[stage] / model_tag


def find_checkpoint_dir(stage, model_tag=None):
    """
    The checkpoint_dir of a stage; without a tag, the most recently saved model that has a complete
    checkpoint.
    """
    if stage not in STAGE_DIRS:
        raise UserError(f"stage {stage!r} is unknown", f"use one of {', '.join(STAGE_DIRS)}")
    if model_tag is not None:
        return get_checkpoint_dir(stage, model_tag)

    # No tag: the model saved last
    checkpoints_dir = get_base_dir() / STAGE_DIRS[stage]
    managers = _find_models(checkpoints_dir, moved_aside=False)
    if not managers:
        raise UserError(f"no {stage} checkpoint in {checkpoints_dir}", _training_hint(stage))
    newest = max(managers, key=CheckpointManager.last_saved_at)
    return newest.checkpoint_dir


def _find_models(checkpoints_dir, moved_aside):
    """
    Managers of the models of a stage that have a complete checkpoint: either those that were moved
    aside, or the others.
    """
    folders = [d for d in checkpoints_dir.glob("*") if bool(re.search(r"\.old\d+$", d.name)) == moved_aside]
    managers = [CheckpointManager(folder) for folder in folders]
    return [manager for manager in managers if manager.steps()]


def _training_hint(stage):
    return f"train one: python -m scripts.{STAGE_SCRIPTS[stage]}"


def stage_managers(stage, source, model_tag, resume_from_step):
    """
    (manager of a stage's own checkpoints, manager of the stage it starts from), both under one tag.
    Without model_tag it is the tag of the model saved last: in this stage if a run is resumed, else
    in the source stage.
    """
    tag_stage = source if resume_from_step == -1 else stage
    tag = find_checkpoint_dir(tag_stage, model_tag).name
    return CheckpointManager(get_checkpoint_dir(stage, tag)), CheckpointManager(get_checkpoint_dir(source, tag))


# -----------------------------------------------------------------------------
# One folder of checkpoints


class CheckpointManager:
    """
    The checkpoints in one folder.

        manager = CheckpointManager(folder)
        manager.save_model(model, step=100)
        model = manager.load_model(device, step=100)
    """

    def __init__(self, base_dir):
        self.checkpoint_dir = Path(base_dir)

    def steps(self):
        """
        Steps of the complete checkpoints, ascending. Unfinished and truncated ones are left out.
        """
        found = []
        for folder in self.checkpoint_dir.glob("step_*"):
            # The name alone is not enough: step_000100.old1 is one that was moved aside
            match = re.fullmatch(r"step_(\d+)", folder.name)
            if match and _is_complete(folder):
                found.append(int(match[1]))
        return sorted(found)

    def last_step(self):
        """The last step of `steps`, or None."""
        return max(self.steps(), default=None)

    def last_saved_at(self):
        """When the last step was saved (seconds since 1970)."""
        return (self._folder(self.last_step()) / "meta.json").stat().st_mtime

    def _folder(self, step):
        return self.checkpoint_dir / f"step_{step:06d}"

    # -- before a run

    def claim(self, device):
        """
        Take the lock of this folder, for two runs under one tag would mix their checkpoints.
        Another process that holds it is a UserError. The lock ends with this object or its process,
        even a killed one. Collective.
        """
        def lock():
            if rank() > 0:
                return
            # The lock file stands beside the folder, which may be moved aside
            self.checkpoint_dir.parent.mkdir(parents=True, exist_ok=True)
            path = self.checkpoint_dir.with_name(f".{self.checkpoint_dir.name}.lock")
            self._claim = FileLock(path, timeout=0, is_singleton=True)  # one process may claim again
            try:
                self._claim.acquire()
            except Timeout:
                raise UserError(f"another run is writing to {self.checkpoint_dir}", "wait for it to end, or give "
                                "this one a name of its own: --model_tag=NAME") from None
            except NotImplementedError:  # some cluster file systems have no locks: continue without
                pass

        run_together(lock, device)

    def move_aside(self):
        """
        Rename an older run's checkpoints, before a new run starts under the same tag. Returns their
        new folder (on rank 0), or None when there were none. Collective.
        """
        moved = None
        if rank() == 0 and self.steps():
            moved = _rename_aside(self.checkpoint_dir)
        barrier()
        return moved

    def forget_after(self, step):
        """
        Rename the checkpoints of later steps, before a run goes on from `step`: it will save other
        ones there. Returns their new folders (on rank 0). Collective.
        """
        moved = []
        if rank() == 0:
            moved = [_rename_aside(self._folder(later)) for later in self.steps() if later > step]
        barrier()
        return moved

    # -- saving

    def save_model(self, model, step):
        """Save parameters and config alone. Returns the checkpoint's folder."""
        return self.save(step, model)

    def save(self, step, model, optimizers=(), tokenizer=None, meta=None, keep_last=-1):
        """
        Save the state of training. Collective: the optimizers gather their shards, rank 0 writes.
        `meta` is a dict for JSON: settings, loader state, metrics. keep_last > 0: keep only this
        many of the newest checkpoints. A failed write (a full disk) raises UserError on every rank
        and leaves the checkpoints that were there as they were.
        """
        # Gathered on rank 0, by parameter name; the other ranks get nothing
        optimizer_state = {}
        for optimizer in optimizers:
            optimizer_state |= optimizer.full_state()
        folder = self._folder(step)

        # An error of rank 0 reaches all ranks
        def write():
            if rank() == 0:
                self._write(folder, step, model, optimizer_state, tokenizer, meta or {})
                self._prune(keep_last, step)

        try:
            run_together(write, model.device)
        except (OSError, FailedElsewhere) as error:
            raise UserError(f"checkpoint {folder} could not be written: {error}; earlier checkpoints are intact",
                            "free disk space, or set NANOCHAT_BASE_DIR to a larger disk, and resume") from error
        return folder

    def _write(self, folder, step, model, optimizer_state, tokenizer, meta):
        for unfinished in folder.parent.glob(".tmp_step_*"):  # of runs that were killed while they saved
            shutil.rmtree(unfinished, ignore_errors=True)
        # Everything is on disk before the rename makes it visible
        tmp = folder.with_name(f".tmp_{folder.name}")
        try:
            tmp.mkdir(parents=True)
            _write_files(tmp, step, model, optimizer_state, tokenizer, meta)
            for path in sorted(tmp.rglob("*"), reverse=True):
                _fsync(path)
            _fsync(tmp)
            if folder.exists():  # the same step of another run, or a damaged one
                _rename_aside(folder)
            tmp.rename(folder)
            _fsync(folder.parent)
        except OSError:
            shutil.rmtree(tmp, ignore_errors=True)
            raise

    def _prune(self, keep_last, newest):
        """Keep the last keep_last steps up to `newest`. Later ones belong to another run."""
        if keep_last <= 0:
            return
        # Oldest first
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[:-keep_last]:
            try:
                shutil.rmtree(self._folder(step))
            except OSError as error:  # the new one is complete all the same
                print(f"warning: the checkpoint of step {step} could not be removed: {error}", flush=True)

    # -- loading

    def load_meta(self, step=None):
        """(step, meta) of a checkpoint; step None = the latest complete one."""
        if step is None:
            step = self.last_step()
        if step is None or not _is_complete(self._folder(step)):
            raise self._missing(step)
        folder = self._folder(step)
        return step, _upgrade(_read_meta(folder), folder)

    def _missing(self, step):
        """The error that says what is not there, and what is instead."""
        # Another step was asked for
        steps = self.steps()
        if steps:
            return UserError(f"no whole checkpoint of step {step} in {self.checkpoint_dir}",
                             f"there are the steps {', '.join(map(str, steps))}; without a step the last one is "
                             "taken, in training by --resume_from_step=-2")

        # Those of an earlier run, where a new one ended before its first save; the newest has the
        # highest number
        checkpoints_dir = self.checkpoint_dir.parent
        aside = [manager.checkpoint_dir for manager in _find_models(checkpoints_dir, moved_aside=True)
                 if manager.checkpoint_dir.stem == self.checkpoint_dir.name]
        if aside:
            newest = max(aside, key=lambda folder: int(folder.suffix.removeprefix(".old")))
            return UserError(f"no checkpoint in {self.checkpoint_dir}; those of the run before it are in {newest}",
                             f"--model_tag={newest.name} takes them")

        # Other models of this stage
        stages = {folder: stage for stage, folder in STAGE_DIRS.items()}
        stage = stages.get(checkpoints_dir.name, "base")
        tags = sorted(manager.checkpoint_dir.name for manager in _find_models(checkpoints_dir, moved_aside=False))
        hint = f"the {stage} models here are {', '.join(tags)}" if tags else _training_hint(stage)
        return UserError(f"no checkpoint in {self.checkpoint_dir}", hint)

    def load_model(self, device, step=None):
        """The model of a checkpoint, float32, in training mode, on the device."""
        # The model, without memory for its parameters
        step, meta = self.load_meta(step)
        where = f"{self.checkpoint_dir}, step {step}"
        try:
            config = GPTConfig(**meta["model_config"])
        except TypeError as error:  # a field that this release does not know
            raise UserError(f"{where}: its model_config does not fit: {error}",
                            "update nanochat: git pull && uv sync") from error
        with torch.device("meta"):
            model = GPT(config)

        # Every parameter must be there, and no other
        weights = _load_tensors(self._folder(step) / "model.safetensors", device)
        expected = {name: p.shape for name, p in model.state_dict().items()}
        found = {name: p.shape for name, p in weights.items()}
        wrong = expected.items() ^ found.items()
        if wrong:
            name, _ = min(wrong)
            raise UserError(f"{where}: parameter {name} does not fit the config",
                            "this checkpoint was changed after it was saved; load another step")
        # The loaded tensors become the parameters
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(True)
        model.set_rotary(model.config.sequence_len)
        return model

    def load_optimizers(self, optimizers, step):
        """Put the saved state into the optimizers, on whatever number of ranks this is."""
        # save_model writes no such file
        path = self._folder(step) / "optimizer.safetensors"
        if not path.exists():
            raise UserError(f"{path} is missing: this checkpoint holds a model alone and cannot be resumed",
                            "resume from another step, or start a new run")
        tensors = _load_tensors(path, "cpu")
        for optimizer in optimizers:
            optimizer.load_full_state(tensors)

    def load_tokenizer(self, step):
        """
        The tokenizer that travels with a checkpoint; a hash that differs from the saved one is
        refused.
        """
        # Its own files have a hash too; this one says that it is the model's
        _, meta = self.load_meta(step)
        folder = self._folder(step) / "tokenizer"
        tokenizer = get_tokenizer(folder)
        if tokenizer.hash() != meta.get("tokenizer_hash"):
            raise UserError(f"{folder} is not the tokenizer this model was trained with (its hash differs)",
                            "restore the folder from a backup, or load another step")
        return tokenizer


def load_checkpoint(stage, device, model_tag=None, step=None):
    """
    (model, tokenizer, meta) of a stage ('base', 'mid', 'sft', 'rl') for inference: evaluation mode,
    parameters stored in the compute dtype, so that decoding never casts. Default: the latest step
    of the newest model.
    """
    manager = CheckpointManager(find_checkpoint_dir(stage, model_tag))
    step, meta = manager.load_meta(step)
    note = precision_note(torch.device(device).type)
    if note:
        print0(f"note: {note}")
    model = manager.load_model(device, step)
    return prepare(model), manager.load_tokenizer(step), meta


# -----------------------------------------------------------------------------
# Files


def _rename_aside(folder):
    """Rename a folder to the first free <name>.old<n>; returns its new path."""
    for n in itertools.count(1):
        aside = folder.with_name(f"{folder.name}.old{n}")
        if not aside.exists():
            return folder.rename(aside)


def _write_files(folder, step, model, optimizer_state, tokenizer, meta):
    """The files of a checkpoint, meta.json last, since it states the sizes of the others."""
    weights = {}
    for name, p in model.state_dict().items():
        name = name.removeprefix("_orig_mod.")  # torch.compile puts it in front of all names
        weights[name] = p.detach().cpu().contiguous()
    _save_tensors(weights, folder / "model.safetensors")
    if optimizer_state:
        _save_tensors(optimizer_state, folder / "optimizer.safetensors")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
        meta = {**meta, "tokenizer_hash": tokenizer.hash()}

    # Their sizes tell a complete checkpoint from a truncated one
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    meta = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "model_config": asdict(model.config),
        **meta,
        "files": {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths},
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _read_meta(folder):
    """The content of meta.json, or None where there is none, or not what every checkpoint has."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Other keys are the stages' own
    match meta:
        case {"format_version": int(), "model_config": dict(), "files": dict()}:
            return meta
    return None


def _is_complete(folder):
    """Whether all files are there, with their sizes."""
    meta = _read_meta(folder)
    if meta is None:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in meta["files"].items())
    except OSError:  # missing, perhaps just now: a run deletes its oldest checkpoints
        return False


def _upgrade(meta, folder):
    """
    Bring the meta data of an older format up to the current one. UserError where that cannot be.
    """
    if meta["format_version"] > FORMAT_VERSION:
        raise UserError(f"{folder} has checkpoint format {meta['format_version']}, this nanochat reads up to "
                        f"{FORMAT_VERSION}", "update nanochat: git pull && uv sync")
    if meta["model_config"].pop("pair_embeds", 0):
        raise UserError(f"{folder} needs pair embeddings (pair_embeds), which this nanochat no longer has",
                        "load another model, or use the nanochat that trained this one")
    return meta


def _save_tensors(tensors, path):
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        raise OSError(str(error)) from error


def _load_tensors(path, device):
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}", "load another step, or resume from it") from error


def _fsync(path):
    """
    Force a file's or folder's content to disk. Folders cannot be opened on Windows, which needs no
    such call.
    """
    if path.is_dir() and os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what it may write
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
