"""
One checkpoint on disk:

    step_001000/
        model.safetensors      parameters, float32, by name
        optimizer.safetensors  optimizer state by parameter name (only in training)
        tokenizer/             the tokenizer that the model was trained with
        meta.json              format version, model config, tokenizer hash, training state, when it
                               was saved, size and checksum of every file

It is written into `.tmp_step_...`, every file and folder is fsynced, and one rename makes it
visible. meta.json states the size of every other file, so a truncated copy is recognised without
reading it. It also states their checksums, which are compared when a file is read, and its own.
Nothing is pickled. FORMAT_VERSION grows when the layout changes; `upgrade` keeps older checkpoints
loading. Those from before there were checksums have none, and load unchecked.

The checksum is xxh3 with 128 bits: it finds what disks, memory and copies damage, not what somebody
forges. It takes 0.07 s/GB on one core of an AMD EPYC, BLAKE3 0.23 s/GB (dev/LOG.md).
"""

import itertools
import json
import os
import shutil
import time

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanochat.common import UserError, ceil_div
from nanochat.progress import show_progress

FORMAT_VERSION = 1
CHUNK_BYTES = 1 << 20  # read at a time for a checksum

# -----------------------------------------------------------------------------
# Checksums


def file_checksum(path):
    """xxh3, 128 bits, of a file, in hex. Raises OSError."""
    digest = xxhash.xxh3_128()
    num_chunks = ceil_div(path.stat().st_size, CHUNK_BYTES)
    with open(path, "rb") as file:
        chunks = iter(lambda: file.read(CHUNK_BYTES), b"")
        for chunk in show_progress(chunks, f"checksum of {path.name}", "MiB", total=num_chunks):
            digest.update(chunk)
    return digest.hexdigest()


def meta_checksum(meta):
    """Of the content of meta.json without its own checksum."""
    rest = {name: value for name, value in meta.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(rest).encode())


def is_file_intact(folder, meta, name):
    """Whether a file of a checkpoint has the checksum in meta. True if that has none: it is old."""
    if name == "meta.json":
        return meta.get("checksum") in (None, meta_checksum(meta))
    expected = meta.get("checksums", {}).get(name)
    return expected in (None, file_checksum(folder / name))


# -----------------------------------------------------------------------------
# Write


def write_checkpoint(folder, weights, optimizer_state, tokenizer, meta):
    """
    Write a whole checkpoint or none. weights, optimizer_state: {name: tensor on the CPU}, the
    latter may be empty. tokenizer: may be None. meta: its further meta data, for JSON. Raises
    OSError.
    """
    # What runs left behind that were killed while they saved
    for unfinished in folder.parent.glob(".tmp_step_*"):
        shutil.rmtree(unfinished, ignore_errors=True)

    # Everything is on disk before the rename makes it visible
    tmp = folder.with_name(f".tmp_{folder.name}")
    try:
        tmp.mkdir(parents=True)
        _write_files(tmp, weights, optimizer_state, tokenizer, meta)
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


def _write_files(folder, weights, optimizer_state, tokenizer, meta):
    """The files of a checkpoint."""
    _save_tensors(weights, folder / "model.safetensors")
    # Only in training, and only where the tokenizer was passed
    if optimizer_state:
        _save_tensors(optimizer_state, folder / "optimizer.safetensors")
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer")
        meta = {**meta, "tokenizer_hash": tokenizer.hash()}

    # meta.json comes last: the sizes in it tell a complete checkpoint from a truncated one
    sizes = {}
    checksums = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            sizes[name] = path.stat().st_size
            checksums[name] = file_checksum(path)
    meta = {
        "format_version": FORMAT_VERSION,
        "saved_at": time.time(),  # seconds since 1970
        **meta,
        "files": sizes,           # name -> bytes
        "checksums": checksums,   # name -> xxh3 in hex
    }
    meta["checksum"] = meta_checksum(meta)
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
    return find_fault(folder) is None


def find_fault(folder):
    """
    What a checkpoint lacks, as a text that names the file; None if it is complete. Looks at the
    sizes alone: `is_file_intact` reads the files.
    """
    # without meta.json, which is written last, it is not complete
    meta = read_meta(folder)
    if meta is None:
        return f"{folder / 'meta.json'} is missing or damaged"
    for name, size in meta["files"].items():
        path = folder / name
        try:
            found = path.stat().st_size
        except OSError:  # missing, perhaps just now: a run deletes its oldest checkpoints
            return f"{path} is missing"
        if found != size:
            return f"{path} is damaged: {found:,} bytes, {size:,} were saved"
    return None


def check_version(meta, folder):
    """UserError for a format newer than this release."""
    if meta["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{folder} has checkpoint format {meta['format_version']}, this nanochat reads up to "
            f"{FORMAT_VERSION}",
            "update nanochat: git pull && uv sync",
        )


def upgrade(meta, folder):
    """
    Bring the meta data of an older format up to the current one. UserError if it cannot be read.
    """
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
