"""
Where the checkpoints of all stages are:

    <base>/<stage folder>/<tag>/step_001000/

A folder that was in the way of a save or of a new run was renamed to <name>.old<n>. The lists here
leave such folders out.
"""

import re

from nanochat.checkpoint_files import find_fault, read_meta
from nanochat.common import print0
from nanochat.files import STAGE_DIRS, UserError, get_base_dir

# stage -> script that trains it
STAGE_SCRIPTS = {
    "base": "base_train",
    "mid": "mid_train",
    "sft": "chat_sft",
    "rl": "chat_rl",
}


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
    models = find_models(checkpoints_dir, moved_aside=False)
    damaged = find_damaged_models(checkpoints_dir)
    if not models:
        if damaged:
            raise damaged_error(damaged[0])
        raise UserError(f"no {stage} checkpoint in {checkpoints_dir}", first_model_hint(stage))

    # A model without a whole checkpoint may be the newest
    newest = max(models, key=last_saved_at)
    for folder in damaged:
        print0(f"warning: {last_fault(folder)}; the model {newest.name} is taken")
    return newest


def find_models(checkpoints_dir, moved_aside):
    """
    The folders of a stage's models with a complete checkpoint: those moved aside, or all others.
    """
    models = []
    for folder in checkpoints_dir.glob("*"):
        is_aside = re.search(r"\.old\d+$", folder.name) is not None
        if is_aside == moved_aside and complete_steps(folder):
            models.append(folder)
    return models


def find_damaged_models(checkpoints_dir):
    """The folders of a stage's models that have checkpoints, but no complete one."""
    damaged = []
    for folder in sorted(checkpoints_dir.glob("*")):
        is_aside = re.search(r"\.old\d+$", folder.name) is not None
        faults = step_faults(folder)
        if faults and all(faults.values()) and not is_aside:
            damaged.append(folder)
    return damaged


def training_hint(stage):
    return f"train one: python -m scripts.{STAGE_SCRIPTS[stage]}"


def first_model_hint(stage):
    """What to do where a stage has no model yet."""
    trained = []
    for other, folder in STAGE_DIRS.items():
        if find_models(get_base_dir() / folder, moved_aside=False):
            trained.append(other)
    if not trained:
        script = STAGE_SCRIPTS[stage]
        return f"bash dev/runcpu.sh trains a small model through all stages, python -m scripts.{script} this one"
    return f"{training_hint(stage)}, or take a model of the stage {' or '.join(trained)}"


# -----------------------------------------------------------------------------
# One model's folder


def step_folder(checkpoint_dir, step):
    # six digits: names sort by step
    return checkpoint_dir / f"step_{step:06d}"


def step_faults(checkpoint_dir):
    """{step: its `find_fault`, None for a complete one}, in ascending order."""
    faults = {}
    for folder in sorted(checkpoint_dir.glob("step_*")):
        # The name alone is not enough: step_000100.old1 is one that was moved aside
        match = re.fullmatch(r"step_(\d+)", folder.name)
        if match:
            faults[int(match[1])] = find_fault(folder)
    return faults


def complete_steps(checkpoint_dir):
    """Steps of the complete checkpoints of a model, ascending."""
    # Unfinished and truncated ones are left out
    return sorted(step for step, fault in step_faults(checkpoint_dir).items() if fault is None)


def last_fault(checkpoint_dir):
    """What the last step lacks, or None."""
    faults = step_faults(checkpoint_dir)
    return faults[max(faults)] if faults else None


def last_saved_at(checkpoint_dir):
    """When a model's last step was saved (seconds since 1970), by the clock of who saved it."""
    folder = step_folder(checkpoint_dir, complete_steps(checkpoint_dir)[-1])
    # a file's own time changes when it is copied, so it counts only where none was recorded
    saved_at = read_meta(folder).get("saved_at")
    return saved_at or (folder / "meta.json").stat().st_mtime


def damaged_error(checkpoint_dir):
    """The error for a folder whose checkpoints are all damaged."""
    return UserError(
        f"no whole checkpoint in {checkpoint_dir}: {last_fault(checkpoint_dir)}",
        "restore the file from a backup, or train again",
    )


def missing_error(checkpoint_dir, step):
    """The error for a missing or incomplete checkpoint. It says which ones there are."""
    # Another step was asked for
    steps = complete_steps(checkpoint_dir)
    if steps:
        listing = ", ".join(map(str, steps))
        fault = step_faults(checkpoint_dir).get(step)
        reason = f": {fault}" if fault else ""
        return UserError(
            f"no whole checkpoint of step {step} in {checkpoint_dir}{reason}",
            f"there are the steps {listing}; without a step the last one is taken, in training "
            "by --resume_from_step=-2",
        )

    if last_fault(checkpoint_dir):
        return damaged_error(checkpoint_dir)

    # A run that ended before its first save has moved those of the run before it aside. The newest
    # of these has the highest number
    checkpoints_dir = checkpoint_dir.parent
    aside = []
    for folder in find_models(checkpoints_dir, moved_aside=True):
        if folder.stem == checkpoint_dir.name:
            aside.append(folder)
    if aside:
        newest = max(aside, key=lambda folder: int(folder.suffix.removeprefix(".old")))
        return UserError(
            f"no checkpoint in {checkpoint_dir}; those of the run before it are in {newest}",
            f"--model_tag={newest.name} takes them",
        )

    # Other models of this stage
    stages = {folder: stage for stage, folder in STAGE_DIRS.items()}
    stage = stages.get(checkpoints_dir.name, "base")
    tags = sorted(folder.name for folder in find_models(checkpoints_dir, moved_aside=False))
    hint = training_hint(stage)
    if tags:
        hint = f"the {stage} models here are {', '.join(tags)}"
    return UserError(f"no checkpoint in {checkpoint_dir}", hint)
