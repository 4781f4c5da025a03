"""
Checkpoints of all stages: found, saved and loaded. Only complete ones are seen, and a damaged or
wrong one is an error. The files of one checkpoint are in checkpoint_files.py.

    <base>/<stage folder>/<tag>/step_001000/

Saving never overwrites. A folder that is in the way, of an earlier run or of a damaged step, is
renamed to the first free <name>.old<n>. Lists of models and steps leave such folders out. A renamed
model can be loaded by its name (--model_tag=d20.old1).
"""

import re
import shutil
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from nanochat.checkpoint_files import (
    is_complete,
    load_tensors,
    read_meta,
    rename_aside,
    upgrade,
    write_checkpoint,
)
from nanochat.common import UserError, get_base_dir, print0
from nanochat.distributed import FailedElsewhere, barrier, rank, run_together
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import prepare
from nanochat.precision import precision_note, settle_precision
from nanochat.tokenizer import get_tokenizer

# stage -> folder below the base directory
STAGE_DIRS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}
# stage -> script that trains it
STAGE_SCRIPTS = {
    "base": "base_train",
    "mid": "mid_train",
    "sft": "chat_sft",
    "rl": "chat_rl",
}


# -----------------------------------------------------------------------------
# Where checkpoints are


def get_checkpoint_dir(stage, model_tag):
    """The folder of a model's steps: <base>/<stage folder>/<tag>. A tag is a name, never a path."""
    if not re.fullmatch(r"\w[\w .+-]*", model_tag):
        raise UserError(
            f"--model_tag={model_tag!r} is no name: use letters, digits and _ . + -",
            "--model_tag=d20",
        )
    return get_base_dir() / STAGE_DIRS[stage] / model_tag


def find_checkpoint_dir(stage, model_tag=None):
    """
    The checkpoint_dir of a stage. Without a tag: that of the model saved last, with a complete
    checkpoint.
    """
    # A stage comes from a user's flag
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
    """Managers of a stage's models with a complete checkpoint: those moved aside, or all others."""
    managers = []
    for folder in checkpoints_dir.glob("*"):
        is_aside = re.search(r"\.old\d+$", folder.name) is not None
        manager = CheckpointManager(folder)
        if is_aside == moved_aside and manager.steps():
            managers.append(manager)
    return managers


def _training_hint(stage):
    return f"train one: python -m scripts.{STAGE_SCRIPTS[stage]}"


def stage_managers(stage, source, model_tag, resume_from_step):
    """
    (manager of a stage's own checkpoints, manager of the stage it starts from), both under one tag.
    Without model_tag it is the tag of the model saved last: in this stage if a run is resumed, else
    in the source stage.
    """
    # A resumed run has its own checkpoints, perhaps not its source's any more
    tag_stage = source if resume_from_step == -1 else stage
    tag = find_checkpoint_dir(tag_stage, model_tag).name
    own = CheckpointManager(get_checkpoint_dir(stage, tag))
    return own, CheckpointManager(get_checkpoint_dir(source, tag))


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
        """Steps of the complete checkpoints, ascending."""
        # Unfinished and truncated ones are left out
        found = []
        for folder in self.checkpoint_dir.glob("step_*"):
            # The name alone is not enough: step_000100.old1 is one that was moved aside
            match = re.fullmatch(r"step_(\d+)", folder.name)
            if match and is_complete(folder):
                found.append(int(match[1]))
        return sorted(found)

    def last_step(self):
        """The last step of `steps`, or None."""
        return max(self.steps(), default=None)

    def last_saved_at(self):
        """When the last step was saved (seconds since 1970)."""
        return (self._folder(self.last_step()) / "meta.json").stat().st_mtime

    def _folder(self, step):
        # six digits: names sort by step
        return self.checkpoint_dir / f"step_{step:06d}"

    # -- before a run

    def claim(self, device):
        """
        Lock this folder, since two runs under one tag would mix their checkpoints. UserError if
        another process holds the lock. It ends with this object or its process, even if that is
        killed. Collective.
        """
        def lock():
            if rank() > 0:
                return
            # The lock file stands beside the folder, which may be moved aside
            self.checkpoint_dir.parent.mkdir(parents=True, exist_ok=True)
            path = self.checkpoint_dir.with_name(f".{self.checkpoint_dir.name}.lock")
            # one process may claim again
            self._claim = FileLock(path, timeout=0, is_singleton=True)
            try:
                self._claim.acquire()
            except Timeout:
                raise UserError(
                    f"another run is writing to {self.checkpoint_dir}",
                    "wait for it to end, or give this one a name of its own: --model_tag=NAME",
                ) from None
            except NotImplementedError:  # some cluster file systems have no locks: continue without
                pass

        run_together(lock, device)

    def move_aside(self):
        """
        Rename an older run's checkpoints, before a new run starts under the same tag. Returns their
        new folder (on rank 0), or None if there were none. Collective.
        """
        # The other ranks wait until the folder is free
        moved = None
        if rank() == 0 and self.steps():
            moved = rename_aside(self.checkpoint_dir)
        barrier()
        return moved

    def move_aside_after(self, step):
        """
        Rename the checkpoints of later steps, before a run goes on from `step` and saves its own.
        Returns their new folders (on rank 0). Collective.
        """
        # Nothing is deleted
        moved = []
        if rank() == 0:
            moved = [rename_aside(self._folder(later)) for later in self.steps() if later > step]
        barrier()
        return moved

    # -- saving

    def save_model(self, model, step):
        """Save only parameters and config. Returns the checkpoint's folder."""
        return self.save(step, model)

    def save(self, step, model, optimizers=(), tokenizer=None, meta=None, keep_last=-1):
        """
        Save the state of training. Collective: the optimizers gather their shards, rank 0 writes.
        `meta` is a dict for JSON: settings, loader state, metrics. keep_last > 0: keep only this
        many of the newest checkpoints. A failed write (a full disk) is a UserError on every rank,
        and the other checkpoints stay as they were.
        """
        # Gathered on rank 0, by parameter name; the other ranks get nothing
        optimizer_state = {}
        for optimizer in optimizers:
            optimizer_state |= optimizer.full_state()
        folder = self._folder(step)

        # Rank 0 writes; its error reaches all ranks
        def write():
            if rank() == 0:
                write_checkpoint(folder, step, model, optimizer_state, tokenizer, meta or {})
                self._prune(keep_last, step)

        # Errors that are not the disk's pass through
        try:
            run_together(write, model.device)
        except (OSError, FailedElsewhere) as error:
            raise UserError(
                f"checkpoint {folder} could not be written: {error}; "
                "earlier checkpoints are intact",
                "free disk space, or set NANOCHAT_BASE_DIR to a larger disk, and resume",
            ) from error
        return folder

    def _prune(self, keep_last, newest):
        """Keep the last keep_last steps up to `newest`. Later ones belong to another run."""
        if keep_last <= 0:
            return
        # From the oldest on
        steps = [step for step in self.steps() if step <= newest]
        for step in steps[:-keep_last]:
            # a full disk or a lost folder must not end the run
            try:
                shutil.rmtree(self._folder(step))
            except OSError as error:  # the new one is complete anyway
                print(
                    f"warning: the checkpoint of step {step} could not be removed: {error}",
                    flush=True,
                )

    # -- loading

    def load_meta(self, step=None):
        """(step, meta) of a checkpoint; step None = the latest complete one."""
        if step is None:
            step = self.last_step()
        if step is None or not is_complete(self._folder(step)):
            raise self._missing(step)
        folder = self._folder(step)
        return step, upgrade(read_meta(folder), folder)

    def _missing(self, step):
        """The error for a missing checkpoint. It says which ones there are."""
        # Another step was asked for
        steps = self.steps()
        if steps:
            listing = ", ".join(map(str, steps))
            return UserError(
                f"no whole checkpoint of step {step} in {self.checkpoint_dir}",
                f"there are the steps {listing}; without a step the last one is taken, in training "
                "by --resume_from_step=-2",
            )

        # A run that ended before its first save has moved those of the run before it aside. The
        # newest of these has the highest number
        checkpoints_dir = self.checkpoint_dir.parent
        aside = []
        for manager in _find_models(checkpoints_dir, moved_aside=True):
            if manager.checkpoint_dir.stem == self.checkpoint_dir.name:
                aside.append(manager.checkpoint_dir)
        if aside:
            newest = max(aside, key=lambda folder: int(folder.suffix.removeprefix(".old")))
            return UserError(
                f"no checkpoint in {self.checkpoint_dir}; those of the run before it are in "
                f"{newest}",
                f"--model_tag={newest.name} takes them",
            )

        # Other models of this stage
        stages = {folder: stage for stage, folder in STAGE_DIRS.items()}
        stage = stages.get(checkpoints_dir.name, "base")
        managers = _find_models(checkpoints_dir, moved_aside=False)
        tags = sorted(manager.checkpoint_dir.name for manager in managers)
        hint = _training_hint(stage)
        if tags:
            hint = f"the {stage} models here are {', '.join(tags)}"
        return UserError(f"no checkpoint in {self.checkpoint_dir}", hint)

    def load_model(self, device, step=None):
        """The model of a checkpoint, float32, in training mode, on the device."""
        # The model on the meta device, without memory for its parameters
        step, meta = self.load_meta(step)
        where = f"{self.checkpoint_dir}, step {step}"
        try:
            config = GPTConfig(**meta["model_config"])
        except TypeError as error:  # a field that this version does not know
            raise UserError(f"{where}: its model_config does not fit: {error}",
                            "update nanochat: git pull && uv sync") from error
        with torch.device("meta"):
            model = GPT(config)

        # Every parameter must be there, and no other
        weights = load_tensors(self._folder(step) / "model.safetensors", device)
        expected = {name: p.shape for name, p in model.state_dict().items()}
        found = {name: p.shape for name, p in weights.items()}
        wrong = expected.items() ^ found.items()
        if wrong:
            name, _ = min(wrong)
            raise UserError(f"{where}: parameter {name} does not fit the config",
                            "this checkpoint was changed after it was saved; load another step")

        # assign: the loaded tensors themselves become the parameters, without a copy
        model.load_state_dict(weights, assign=True)
        model.requires_grad_(True)
        model.set_rotary(model.config.sequence_len)
        return model

    def load_optimizers(self, optimizers, step):
        """Put the saved state into the optimizers, for any number of ranks."""
        # save_model writes no such file
        path = self._folder(step) / "optimizer.safetensors"
        if not path.exists():
            raise UserError(
                f"{path} is missing: this checkpoint holds a model alone and cannot be resumed",
                "resume from another step, or start a new run",
            )
        tensors = load_tensors(path, "cpu")
        for optimizer in optimizers:
            optimizer.load_full_state(tensors)

    def load_tokenizer(self, step):
        """
        The tokenizer saved with a checkpoint. UserError if its hash is not the one of the model's.
        """
        # The tokenizer's own files have a hash too; this one ties it to the model
        _, meta = self.load_meta(step)
        folder = self._folder(step) / "tokenizer"
        tokenizer = get_tokenizer(folder)
        if tokenizer.hash() != meta.get("tokenizer_hash"):
            raise UserError(
                f"{folder} is not the tokenizer this model was trained with (its hash differs)",
                "restore the folder from a backup, or load another step",
            )
        return tokenizer


def load_checkpoint(stage, device, model_tag=None, step=None):
    """
    (model, tokenizer, meta) of a stage ('base', 'mid', 'sft', 'rl') for inference: in evaluation
    mode, with parameters in the compute dtype. Default: the latest step of the newest model.
    """
    # A note where the requested precision is not used
    manager = CheckpointManager(find_checkpoint_dir(stage, model_tag))
    step, meta = manager.load_meta(step)
    note = precision_note(torch.device(device).type)
    if note:
        print0(f"note: {note}")
    model = manager.load_model(device, step)
    settle_precision(torch.device(device), model.config.n_embd, decoding=True)
    return prepare(model), manager.load_tokenizer(step), meta
