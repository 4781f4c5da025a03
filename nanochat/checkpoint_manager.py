"""
Checkpoints: written so that only whole ones are ever seen, read so that a wrong one is refused in words.

    <base>/base_checkpoints/d20/step_001000/
        model.safetensors      parameters, float32, by name
        optimizer.safetensors  full optimizer state by parameter name, for any number of ranks (training only)
        tokenizer/             the tokenizer the model was trained with
        meta.json              format version, model config, tokenizer hash, training state, sizes of the other files

A checkpoint is written into `.tmp_step_...`, every file and folder is fsynced, and one rename makes it visible;
meta.json names the size of every other file, so a truncated copy is recognised without reading it. Nothing is
pickled. FORMAT_VERSION grows when the layout changes; `_upgrade` keeps older checkpoints loading.
"""

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

from nanochat.common import UserError, get_base_dir, get_dist_info, print0
from nanochat.distributed import FailedElsewhere, barrier, run_together
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import prepare
from nanochat.precision import precision_note
from nanochat.tokenizer import get_tokenizer

FORMAT_VERSION = 1
STAGE_DIRS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints",
              "rl": "chatrl_checkpoints"}
MOVED_ASIDE = r"\.old\d+$"  # how the names end that `_rename_aside` gives
STAGE_SCRIPTS = {"base": "base_train", "mid": "mid_train", "sft": "chat_sft", "rl": "chat_rl"}


# -----------------------------------------------------------------------------
# Where checkpoints are


def get_checkpoint_dir(stage, model_tag):
    """The folder that holds the steps of one model: <base>/<stage folder>/<tag>. A tag is a name, never a path."""
    if not re.fullmatch(r"\w[\w .+-]*", model_tag):
        raise UserError(f"--model_tag={model_tag!r} is no name: use letters, digits and _ . + -", "--model_tag=d20")
    return get_base_dir() / STAGE_DIRS[stage] / model_tag


def find_checkpoint_dir(stage, model_tag=None):
    """The checkpoint_dir of a stage; without a tag, the most recently saved model that has a whole checkpoint."""
    if stage not in STAGE_DIRS:
        raise UserError(f"stage {stage!r} is unknown", f"use one of {', '.join(STAGE_DIRS)}")
    if model_tag is not None:
        return get_checkpoint_dir(stage, model_tag)
    checkpoints_dir = get_base_dir() / STAGE_DIRS[stage]
    candidates = [d for d in checkpoints_dir.glob("*")
                  if CheckpointManager(d).steps() and not re.search(MOVED_ASIDE, d.name)]
    if not candidates:
        raise UserError(f"no {stage} checkpoint in {checkpoints_dir}",
                        f"train one: python -m scripts.{STAGE_SCRIPTS[stage]}")
    def saved_at(folder):
        return (folder / _step_name(CheckpointManager(folder).last_step()) / "meta.json").stat().st_mtime

    return max(candidates, key=saved_at)


def stage_managers(stage, source, model_tag, resume_from_step):
    """
    (manager of a stage's own checkpoints, that of the stage it starts from), under one tag: the given one, else that of
    the model saved last, of this stage where it is resumed.
    """
    tag = find_checkpoint_dir(source if resume_from_step == -1 else stage, model_tag).name
    return tuple(CheckpointManager(get_checkpoint_dir(name, tag)) for name in (stage, source))


def _step_name(step):
    return f"step_{step:06d}"


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
        """Steps of the whole checkpoints, ascending. Unfinished and truncated ones are not in the list."""
        found = []
        for folder in self.checkpoint_dir.glob("step_*"):
            match = re.fullmatch(r"step_(\d+)", folder.name)
            if match and _is_whole(folder):
                found.append(int(match.group(1)))
        return sorted(found)

    def last_step(self):
        steps = self.steps()
        return steps[-1] if steps else None

    # -- saving

    def claim(self, device):
        """
        Refuse to train where another process does: two runs under one tag would mix their checkpoints. The claim ends
        with this object or its process, however that ends. Collective.
        """
        def lock():
            if get_dist_info()[0] == 0:
                self.checkpoint_dir.parent.mkdir(parents=True, exist_ok=True)
                path = self.checkpoint_dir.with_name(f".{self.checkpoint_dir.name}.lock")
                self._claim = FileLock(path, timeout=0, is_singleton=True)  # one process may claim again
                try:
                    self._claim.acquire()
                except Timeout:
                    raise UserError(f"another run is writing to {self.checkpoint_dir}", "wait for it to end, or give "
                                    "this one a name of its own: --model_tag=NAME") from None
                except NotImplementedError:  # some cluster file systems have no locks: go on without
                    pass

        run_together(lock, device)

    def move_aside(self):
        """
        Make room for a new run under the same tag: an older run's checkpoints are renamed, never mixed with the new
        ones or deleted. Returns their new folder, or None when there were none. Rank 0 moves, all ranks wait.
        """
        moved = None
        if get_dist_info()[0] == 0 and self.steps():
            moved = _rename_aside(self.checkpoint_dir)
        barrier()
        return moved

    def forget_after(self, step):
        """
        Going back to `step` starts another future: checkpoints of later steps are renamed, out of its way. Returns
        their new folders, on rank 0.
        """
        moved = []
        if get_dist_info()[0] == 0:
            moved = [_rename_aside(self.checkpoint_dir / _step_name(later)) for later in self.steps() if later > step]
        barrier()
        return moved

    def save_model(self, model, step):
        """Save parameters and config alone. Returns the checkpoint's folder."""
        return self.save(step, model)

    def save(self, step, model, optimizers=(), tokenizer=None, meta=None, keep_last=-1):
        """
        Save the state of training; collective (the optimizers gather their shards), written by rank 0. `meta` is a
        JSON-able dict: settings, loader state, metrics. keep_last > 0 then keeps only so many newest ones.
        A failed write (a full disk) raises UserError on every rank and leaves the checkpoints that were there as they
        were.
        """
        states = {}
        for optimizer in optimizers:
            states.update(optimizer.full_state())
        folder = self.checkpoint_dir / _step_name(step)

        def write():
            if get_dist_info()[0] == 0:
                self._write(folder, step, model, states, tokenizer, meta or {})
                self._prune(keep_last, step)

        try:
            run_together(write, model.device)
        except (OSError, FailedElsewhere) as error:
            raise UserError(f"checkpoint {folder} could not be written: {error}; earlier checkpoints are intact",
                            "free disk space, or set NANOCHAT_BASE_DIR to a larger disk, and resume") from error
        return folder

    def _write(self, folder, step, model, optimizer_state, tokenizer, meta):
        tmp = folder.with_name(f".tmp_{folder.name}")
        for unfinished in folder.parent.glob(".tmp_step_*"):  # of runs that were killed while they saved
            shutil.rmtree(unfinished, ignore_errors=True)
        try:
            tmp.mkdir(parents=True)
            # a model that torch.compile wrapped has a prefix of its own to every name
            weights = {name.removeprefix("_orig_mod."): p.detach().cpu().contiguous()
                       for name, p in model.state_dict().items()}
            _save_tensors(weights, tmp / "model.safetensors")
            if optimizer_state:
                _save_tensors(optimizer_state, tmp / "optimizer.safetensors")
            if tokenizer is not None:
                tokenizer.save(tmp / "tokenizer")
                meta = {**meta, "tokenizer_hash": tokenizer.hash()}
            files = {p.relative_to(tmp).as_posix(): p.stat().st_size for p in sorted(tmp.rglob("*")) if p.is_file()}
            meta = {"format_version": FORMAT_VERSION, "step": step, "model_config": asdict(model.config), **meta,
                    "files": files}
            (tmp / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            _fsync_tree(tmp)
            if folder.exists():  # the same step of another run, or a damaged one, is not overwritten
                _rename_aside(folder)
            tmp.rename(folder)
            _fsync(folder.parent)
        except OSError:
            shutil.rmtree(tmp, ignore_errors=True)
            raise

    def _prune(self, keep_last, newest):
        """Keep the last keep_last steps up to `newest`; later ones, of another run, are not this one's to remove."""
        if keep_last > 0:
            for step in [step for step in self.steps() if step <= newest][:-keep_last]:
                try:
                    shutil.rmtree(self.checkpoint_dir / _step_name(step))
                except OSError as error:  # the new one is whole all the same
                    print(f"warning: the checkpoint of step {step} could not be removed: {error}", flush=True)

    # -- loading

    def _missing(self, step):
        """The error that says what is not there, and what is instead."""
        stage = next((stage for stage, name in STAGE_DIRS.items() if name == self.checkpoint_dir.parent.name), "base")
        steps = self.steps()
        tags = [d.name for d in self.checkpoint_dir.parent.glob("*")
                if CheckpointManager(d).steps() and not re.search(MOVED_ASIDE, d.name)]
        if steps:
            return UserError(f"no whole checkpoint of step {step} in {self.checkpoint_dir}",
                             f"there are the steps {', '.join(map(str, steps))}; without a step the last one is "
                             "taken, in training by --resume_from_step=-2")
        aside = [d for d in self.checkpoint_dir.parent.glob(f"{self.checkpoint_dir.name}.old*")
                 if re.search(MOVED_ASIDE, d.name) and CheckpointManager(d).steps()]
        if aside:  # a new run ended before its first save
            newest = max(aside, key=lambda folder: int(folder.name.rpartition(".old")[2]))
            return UserError(f"no checkpoint in {self.checkpoint_dir}; those of the run before it are in {newest}",
                             f"--model_tag={newest.name} takes them")
        return UserError(f"no checkpoint in {self.checkpoint_dir}",
                         f"the {stage} models here are {', '.join(sorted(tags))}" if tags else
                         f"train one: python -m scripts.{STAGE_SCRIPTS[stage]}")

    def load_meta(self, step=None):
        """(step, meta) of a checkpoint; step None = the latest whole one."""
        step = self.last_step() if step is None else step
        folder = self.checkpoint_dir / _step_name(step or 0)
        if step is None or not _is_whole(folder):
            raise self._missing(step)
        return step, _upgrade(_read_meta(folder), folder)

    def load_model(self, device, step=None):
        """The model of a checkpoint, float32, in training mode, on the device."""
        step, meta = self.load_meta(step)
        try:
            config = GPTConfig(**meta["model_config"])
        except TypeError as error:  # a field that this release does not know
            raise UserError(f"{self.checkpoint_dir}, step {step}: its model_config does not fit: {error}",
                            "update nanochat: git pull && uv sync") from error
        with torch.device("meta"):
            model = GPT(config)
        weights = _load_tensors(self.checkpoint_dir / _step_name(step) / "model.safetensors", device)
        expected = {name: p.shape for name, p in model.state_dict().items()}
        found = {name: p.shape for name, p in weights.items()}
        if expected != found:
            wrong = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise UserError(f"{self.checkpoint_dir}, step {step}: parameter {wrong[0]} does not fit the config",
                            "this checkpoint was changed after it was saved; load another step")
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(True)
        model.set_rotary(model.config.sequence_len)
        return model

    def load_optimizers(self, optimizers, step):
        """Put the saved state into the optimizers, on whatever number of ranks this is."""
        path = self.checkpoint_dir / _step_name(step) / "optimizer.safetensors"
        if not path.exists():
            raise UserError(f"{path} is missing: this checkpoint holds a model alone and cannot be resumed",
                            "resume from another step, or start a new run")
        tensors = _load_tensors(path, "cpu")
        for optimizer in optimizers:
            optimizer.load_full_state(tensors)

    def load_tokenizer(self, step):
        """The tokenizer that travels with a checkpoint; a hash that differs from the saved one is refused."""
        _, meta = self.load_meta(step)
        folder = self.checkpoint_dir / _step_name(step) / "tokenizer"
        tokenizer = get_tokenizer(folder)
        if tokenizer.hash() != meta.get("tokenizer_hash"):
            raise UserError(f"{folder} is not the tokenizer this model was trained with (its hash differs)",
                            "restore the folder from a backup, or load another step")
        return tokenizer


def load_checkpoint(stage, device, model_tag=None, step=None):
    """
    (model, tokenizer, meta) of a stage ('base', 'mid', 'sft', 'rl') for inference: evaluation mode, parameters
    stored in the compute dtype, so that decoding never casts. Default: the latest step of the newest model.
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
    names = (folder.with_name(f"{folder.name}.old{n}") for n in range(1, 10**6))
    return folder.rename(next(name for name in names if not name.exists()))


def _read_meta(folder):
    """The meta data, or None where there is none, or not all that every checkpoint has."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    kinds = {"format_version": int, "model_config": dict, "files": dict}
    return meta if isinstance(meta, dict) and all(isinstance(meta.get(k), v) for k, v in kinds.items()) else None


def _is_whole(folder):
    meta = _read_meta(folder)
    if meta is None:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in meta["files"].items())
    except OSError:  # missing, perhaps just now: a run deletes its oldest checkpoints
        return False


def _upgrade(meta, folder):
    """Bring the meta data of an older format to the current one."""
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
    """Force a file's or folder's content to disk; folders cannot be opened on Windows, which needs no such call."""
    if os.name == "posix" or path.is_file():
        fd = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)  # Windows flushes only what it may write
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _fsync_tree(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        _fsync(path)
    _fsync(folder)
