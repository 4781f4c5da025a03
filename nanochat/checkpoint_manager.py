"""
Checkpoints of all stages: saved and loaded. Only complete ones are seen, and a damaged or wrong one
is an error. checkpoint_files.py has the files of one checkpoint, checkpoint_folders.py where they
are.

    <base>/<stage folder>/<tag>/step_001000/

Saving never overwrites. A folder that is in the way, of an earlier run or of a damaged step, is
renamed to the first free <name>.old<n>. Lists of models and steps leave such folders out. A renamed
model can be loaded by its name (--model_tag=d20.old1).

A training run saves in the background (`start_saving`): its loop stops while the state is copied,
and a thread of rank 0 writes the copy.
"""

import json
import shlex
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from filelock import Timeout

from nanochat.background_writer import BackgroundWriter
from nanochat.checkpoint_files import (
    check_version,
    is_complete,
    is_file_intact,
    load_tensors,
    read_meta,
    rename_aside,
    upgrade,
    write_checkpoint,
)
from nanochat.checkpoint_folders import (
    STAGE_DIRS,  # noqa: F401, scripts take all that concerns checkpoints from here
    complete_steps,
    damaged_error,
    find_checkpoint_dir,
    get_checkpoint_dir,
    last_fault,
    missing_error,
    step_faults,
    step_folder,
)
from nanochat.common import UserError, is_finite, print0
from nanochat.distributed import barrier, gather_objects, rank, run_together
from nanochat.gpt import GPT, GPTConfig
from nanochat.inference import prepare
from nanochat.locks import hold_lock
from nanochat.precision import precision_note, settle_precision
from nanochat.tokenizer import get_tokenizer

# How long other machines may take to see a new folder on a network's file system: NFS caches names
# for up to 60 s
VISIBLE_WAIT_S = 90


def stage_managers(stage, source, model_tag, resume_from_step, auto_resume=False):
    """
    (manager of a stage's own checkpoints, manager of the stage it starts from), both under one tag.
    Without model_tag it is the tag of the model saved last: in this stage if a run is resumed, else
    in the source stage. A run that resumes by itself needs a tag, since by then another model may
    have been saved.
    """
    if auto_resume and model_tag is None:
        tag = find_checkpoint_dir(source).name
        raise UserError(
            "--auto_resume needs a --model_tag: started again, it must find the same run",
            f"--auto_resume=True --model_tag={tag}",
        )
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

    verify: whether files that are read are compared with their checksums.
    """

    def __init__(self, base_dir, verify=True):
        self.checkpoint_dir = Path(base_dir)
        self.verify = verify
        self.save_s = None  # seconds that the last save took to write
        self._writer = BackgroundWriter()

    def steps(self):
        """Steps of the complete checkpoints, ascending."""
        return complete_steps(self.checkpoint_dir)

    def last_step(self):
        """The last step of `steps`, or None."""
        return max(self.steps(), default=None)

    def _folder(self, step):
        return step_folder(self.checkpoint_dir, step)

    # -- before a run

    def claim(self, device, wait_s=0):
        """
        Lock this folder, since two runs under one tag would mix their checkpoints. UserError if
        another process still holds the lock after wait_s seconds. It ends with this object or its
        process, even if that is killed. Collective.
        """
        def lock():
            if rank() > 0:
                return
            # The lock file stands beside the folder, which may be moved aside
            path = self.checkpoint_dir.with_name(f".{self.checkpoint_dir.name}.lock")
            try:
                self._claim = hold_lock(path, wait_s, once_per_process=True)
            except Timeout:
                raise UserError(
                    f"another run is writing to {self.checkpoint_dir}",
                    "wait for it to end, or give this one a name of its own: --model_tag=NAME",
                ) from None

        run_together(lock, device)

    def move_aside(self):
        """
        Rename an older run's checkpoints, before a new run starts under the same tag. Returns their
        new folder (on rank 0), or None if there were none. Collective.
        """
        # The other ranks wait until the folder is free
        moved = None
        if rank() == 0 and step_faults(self.checkpoint_dir):
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
            later_steps = [later for later in step_faults(self.checkpoint_dir) if later > step]
            moved = [rename_aside(self._folder(later)) for later in later_steps]
        barrier()
        return moved

    # -- saving

    def save_model(self, model, step):
        """Save only parameters and config. Returns the checkpoint's folder."""
        return self.save(step, model)

    def save(self, step, model, optimizers=(), tokenizer=None, meta=None, keep_last=-1):
        """Save the state of training, and return when it is on the disk. As the two that follow."""
        folder = self.start_saving(step, model, optimizers, tokenizer, meta, keep_last)
        self.finish_saving(model.device)
        return folder

    def start_saving(self, step, model, optimizers=(), tokenizer=None, meta=None, keep_last=-1):
        """
        Copy the state of training, and begin to write it in a thread of rank 0. Returns the folder
        that the checkpoint will have. If the save before is not done, waits for it. Collective: the
        optimizers gather their shards.

        `meta` is a dict for JSON: settings, loader state, metrics. keep_last > 0: keep only this
        many of the newest checkpoints. The copy takes the memory of the parameters and the
        optimizers' state once more, in rank 0's process; it is kept for the next save.
        """
        self.warn_of_failure(wait=True)
        folder = self._folder(step)
        # Gathered on rank 0, by parameter name; the other ranks get nothing
        optimizer_state = {}
        for optimizer in optimizers:
            optimizer_state |= optimizer.full_state(self._writer.copy)
        if rank() > 0:
            return folder

        # torch.compile puts a prefix in front of all names
        weights = {}
        for name, p in model.state_dict().items():
            name = name.removeprefix("_orig_mod.")
            weights[name] = self._writer.copy(name, p)
        meta = {"step": step, "model_config": asdict(model.config), **(meta or {})}
        meta = json.loads(json.dumps(meta))  # a copy, since the loop changes its counters

        def write():
            start = time.perf_counter()
            try:
                write_checkpoint(folder, weights, optimizer_state, tokenizer, meta)
            except OSError as error:
                raise UserError(
                    f"checkpoint {folder} could not be written: {error}; "
                    "earlier checkpoints are intact",
                    "free disk space, or set NANOCHAT_BASE_DIR to a larger disk, and resume",
                ) from error
            self._prune(keep_last, step)
            self.save_s = time.perf_counter() - start

        self._writer.start(write)
        return folder

    def copied_bytes(self):
        """The memory that the copy takes in this process."""
        return self._writer.copied_bytes()

    def warn_of_failure(self, wait=False):
        """
        Print a warning if the save that was started has failed. Nothing if it is still being
        written, unless wait. Only rank 0 writes, so only rank 0 can warn.
        """
        error = self._writer.failure(wait)
        if error is not None:
            print(f"warning: {error}", flush=True)

    def finish_saving(self, device):
        """
        Wait until the save that was started is on the disk. A failed write (a full disk) is a
        UserError on every rank, and the other checkpoints stay as they were. Collective.
        """
        run_together(self._writer.finish, device)

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

    def find_intact_step(self, device):
        """
        The last step whose files are as they were saved, or None if there is no checkpoint at all.
        Damaged ones after it are named in a warning. Rank 0 looks and tells the others, since
        machines may see a network's folder differently. Collective.
        """
        def find():
            if rank() > 0:
                return []
            steps = self.steps()
            error = None
            if not steps and last_fault(self.checkpoint_dir):
                error = damaged_error(self.checkpoint_dir)
            self._warn_of_incomplete(self.last_step())
            for step in reversed(steps):
                try:
                    self._check_all(step)
                    return [step]
                except UserError as damage:
                    error = damage
                    print(f"warning: {damage}", flush=True)
            # a new run would move all of them aside, and begin again unasked
            if error is not None:
                raise error
            return []

        # the list of rank 0, with one step or none
        found = gather_objects(run_together(find, device))
        return found[0] if found else None

    def _check_all(self, step):
        """UserError if any file of a checkpoint is not as it was saved."""
        meta = read_meta(self._folder(step))
        for name in ["meta.json", *meta["files"]]:
            self._check_file(step, meta, name)

    def wait_until_visible(self, step):
        """Give a network's file system time to show a checkpoint that another machine has saved."""
        end = time.monotonic() + VISIBLE_WAIT_S
        while not is_complete(self._folder(step)) and time.monotonic() < end:
            time.sleep(1)

    def load_meta(self, step=None):
        """(step, meta) of a checkpoint; step None = the latest complete one."""
        if step is None:
            step = self.last_step()
            self._warn_of_incomplete(step)
        if step is None or not is_complete(self._folder(step)):
            raise missing_error(self.checkpoint_dir, step)
        folder = self._folder(step)
        meta = read_meta(folder)
        self._check_file(step, meta, "meta.json")
        check_version(meta, folder)
        return step, upgrade(meta, folder)

    def _warn_of_incomplete(self, step):
        """Warn of damaged checkpoints after `step`, the last complete one, or None."""
        for later, fault in step_faults(self.checkpoint_dir).items():
            if step is not None and later > step:
                print0(f"warning: {fault}; step {step} is taken")

    def _check_file(self, step, meta, name):
        """UserError if a file of a checkpoint is not as it was saved."""
        if not self.verify:
            return
        path = self._folder(step) / name
        # an intact file may have come from another folder
        if name == "meta.json" and meta.get("step", step) != step:
            raise self._damaged(step, f"{path} is that of step {meta['step']}")
        if not is_file_intact(self._folder(step), meta, name):
            raise self._damaged(step, f"{path} is damaged: its checksum differs")

    def _damaged(self, step, message):
        """The error for a damaged checkpoint. It offers the step before it."""
        earlier = [other for other in self.steps() if other < step]
        if not earlier:
            return UserError(message, "there is no step before it: restore the file from a backup, "
                             "or train again")
        # Under another name it is not seen, and whatever takes the latest step takes that one
        folder = shlex.quote(str(self._folder(step)))
        return UserError(message, f"mv {folder} {folder}.damaged  # then step {max(earlier)} is the "
                         "last one, and the same command takes it")

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
        self._check_file(step, meta, "model.safetensors")
        weights = load_tensors(self._folder(step) / "model.safetensors", device)
        expected = {name: p.shape for name, p in model.state_dict().items()}
        found = {name: p.shape for name, p in weights.items()}
        wrong = expected.items() ^ found.items()
        if wrong:
            name, _ = min(wrong)
            raise UserError(f"{where}: parameter {name} does not fit the config",
                            "this checkpoint was changed after it was saved; load another step")
        # A model of NaN answers nonsense, in training and in serving
        for name, p in weights.items():
            if not is_finite(p):
                raise self._damaged(step, f"{where}: parameter {name} is not finite")

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
        _, meta = self.load_meta(step)
        self._check_file(step, meta, path.name)
        tensors = load_tensors(path, "cpu")
        for optimizer in optimizers:
            optimizer.load_full_state(tensors)

    def load_tokenizer(self, step):
        """
        The tokenizer saved with a checkpoint. UserError if its hash is not the one of the model's.
        """
        # The tokenizer's own files have a hash too; this one ties it to the model
        _, meta = self.load_meta(step)
        for name in meta["files"]:
            if name.startswith("tokenizer/"):
                self._check_file(step, meta, name)
        folder = self._folder(step) / "tokenizer"
        tokenizer = get_tokenizer(folder)
        if tokenizer.hash() != meta.get("tokenizer_hash"):
            raise UserError(
                f"{folder} is not the tokenizer this model was trained with (its hash differs)",
                "restore the folder from a backup, or load another step",
            )
        return tokenizer


def load_checkpoint(stage, device, model_tag=None, step=None, verify=True):
    """
    (model, tokenizer, meta) of a stage ('base', 'mid', 'sft', 'rl') for inference: in evaluation
    mode, with parameters in the compute dtype. Default: the latest step of the newest model.
    """
    # A note where the requested precision is not used
    manager = CheckpointManager(find_checkpoint_dir(stage, model_tag), verify)
    step, meta = manager.load_meta(step)
    note = precision_note(torch.device(device).type)
    if note:
        print0(f"note: {note}")
    model = manager.load_model(device, step)
    settle_precision(torch.device(device), model.config.n_embd, decoding=True)
    return prepare(model), manager.load_tokenizer(step), meta
