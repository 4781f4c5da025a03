"""
One checkpoint on disk:

    step_001000/
        model.safetensors      parameters, float32, by name
        optimizer.safetensors  optimizer state by parameter name (only in training)
        tokenizer/             the tokenizer that the model was trained with
        meta.json              format version, model config, tokenizer hash, training state, sizes

It is written into `.tmp_step_...`, every file and folder is fsynced, and one rename makes it
visible. meta.json states the size of every other file, so a truncated copy is recognised without
reading it. Nothing is pickled. FORMAT_VERSION grows when the layout changes; `upgrade` keeps older
checkpoints loading.
"""

import itertools
import json
import os
import shutil
from dataclasses import asdict

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.common import UserError

FORMAT_VERSION = 1

# -----------------------------------------------------------------------------
# Write


def write_checkpoint(folder, step, model, optimizer_state, tokenizer, meta):
    """
    Write a whole checkpoint or none. optimizer_state: {name: tensor}, may be empty. tokenizer: may
    be None. Raises OSError.
    """
    # What runs left behind that were killed while they saved
    for unfinished in folder.parent.glob(".tmp_step_*"):
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
            rename_aside(folder)
        tmp.rename(folder)
        _fsync(folder.parent)
    except OSError:
        shutil.rmtree(tmp, ignore_errors=True)
        raise


def _write_files(folder, step, model, optimizer_state, tokenizer, meta):
    """The files of a checkpoint."""
    # torch.compile puts a prefix in front of all names
    weights = {}
    for name, p in model.state_dict().items():
        name = name.removeprefix("_orig_mod.")
        weights[name] = p.detach().cpu().contiguous()
    _save_tensors(weights, folder / "model.safetensors")
    # Only in training, and only where the tokenizer was passed
    if optimizer_state:
        _save_tensors(optimizer_state, folder / "optimizer.safetensors")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
        meta = {**meta, "tokenizer_hash": tokenizer.hash()}

    # meta.json comes last: the sizes in it tell a complete checkpoint from a truncated one
    sizes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    meta = {
        "format_version": FORMAT_VERSION,
        "step": step,
        "model_config": asdict(model.config),
        **meta,
        "files": sizes,  # name -> bytes
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def _save_tensors(tensors, path):
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        raise OSError(str(error)) from error


def _fsync(path):
    """Force a file's or folder's content to disk."""
    # On Windows folders cannot be opened, and need not be; files must be open for writing
    if path.is_dir() and os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename_aside(folder):
    """Rename a folder to the first free <name>.old<n>; returns its new path."""
    # .old1, .old2, ...: the highest number is the newest
    for n in itertools.count(1):
        aside = folder.with_name(f"{folder.name}.old{n}")
        if not aside.exists():
            return folder.rename(aside)


# -----------------------------------------------------------------------------
# Read


def read_meta(folder):
    """The content of meta.json, or None if it is missing or lacks what every checkpoint has."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Other keys are the stages' own
    match meta:
        case {"format_version": int(), "model_config": dict(), "files": dict()}:
            return meta
    return None


def is_complete(folder):
    """Whether all files that meta.json lists are there, with their sizes."""
    # without meta.json, which is written last, it is not complete
    meta = read_meta(folder)
    if meta is None:
        return False
    try:
        return all((folder / name).stat().st_size == size for name, size in meta["files"].items())
    except OSError:  # missing, perhaps just now: a run deletes its oldest checkpoints
        return False


def upgrade(meta, folder):
    """
    Bring the meta data of an older format up to the current one. UserError if it cannot be read.
    """
    if meta["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{folder} has checkpoint format {meta['format_version']}, this nanochat reads up to "
            f"{FORMAT_VERSION}",
            "update nanochat: git pull && uv sync",
        )
    if meta["model_config"].pop("pair_embeds", 0):
        raise UserError(
            f"{folder} needs pair embeddings (pair_embeds), which this nanochat no longer has",
            "load another model, or use the nanochat that trained this one",
        )
    return meta


def load_tensors(path, device):
    """{name: tensor} of a file, on the device."""
    try:
        return load_file(path, device=str(device))
    except SafetensorError as error:
        hint = "load another step, or resume from it"
        raise UserError(f"{path} is damaged: {error}", hint) from error
