"""
The evaluation bundle of the CORE metric: find or download it, and read its tasks.

    core.yaml             the tasks: name, type, file, number of solved examples, delimiter
    eval_meta_data.csv    the accuracy of guessing, in percent, for each task
    eval_data/*.jsonl     the questions, one a line
"""

import csv
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import yaml

from nanochat.common import UserError, get_base_dir, get_data_dir, get_dist_info
from nanochat.distributed import barrier
from nanochat.download import download_url, hold_lock

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
NUM_TASKS = 22  # of the whole metric

# the fields that a line of each kind of task must have
FIELDS = {
    "multiple_choice": {"query", "choices", "gold"},
    "schema": {"context_options", "continuation", "gold"},
    "language_modeling": {"context", "continuation"},
}


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str         # a key of FIELDS
    rows: list        # of dicts, the lines of the task's file
    num_fewshot: int  # solved examples in front of each question
    delimiter: str    # between context and continuation
    baseline: float   # accuracy of guessing, 0..1


# -----------------------------------------------------------------------------
# Find or download


def get_eval_bundle(fetch=download_url) -> Path:
    """
    The bundle's folder: in the data mirror if there is one, else downloaded once to the base
    directory.
    """
    data_dir = get_data_dir()
    if data_dir is not None:
        return data_dir / "eval_bundle"
    bundle_dir = get_base_dir() / "eval_bundle"

    # one process of each machine downloads and unpacks it
    _, local_rank, _ = get_dist_info()
    if local_rank == 0 and not (bundle_dir / "core.yaml").exists():
        zip_path = fetch(BUNDLE_URL, get_base_dir() / "eval_bundle.zip")
        with hold_lock(bundle_dir.with_suffix(".lock")):  # machines may share the folder
            if not (bundle_dir / "core.yaml").exists():
                _unpack(zip_path, bundle_dir)
    barrier()
    return bundle_dir


def _unpack(zip_path, bundle_dir):
    """
    Unpack next to bundle_dir, then rename, so that a bundle is there only as a whole. The checksums
    inside the zip are checked. `zipfile` itself drops `..` and roots from names, and makes no
    links.
    """
    remedy = f"rm {zip_path}, and it is downloaded again"
    with tempfile.TemporaryDirectory(dir=bundle_dir.parent) as folder:
        try:
            with zipfile.ZipFile(zip_path) as archive:
                archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{zip_path} is damaged: {error}", remedy) from error

        # the zip holds a folder of any name
        found = list(Path(folder).rglob("core.yaml"))
        if len(found) != 1:
            raise UserError(f"{zip_path} holds {len(found)} files core.yaml, needed: one", remedy)
        shutil.rmtree(bundle_dir, ignore_errors=True)  # without core.yaml: not a whole one
        os.replace(found[0].parent, bundle_dir)


# -----------------------------------------------------------------------------
# Read


def load_tasks(bundle_dir) -> list[CoreTask]:
    """
    All tasks of the bundle with their questions. UserError with the name of a wrong or missing
    file.
    """
    # the two files that describe the tasks
    bundle_dir = Path(bundle_dir)
    for name in ("core.yaml", "eval_meta_data.csv"):
        if not (bundle_dir / name).is_file():
            raise UserError(
                f"no evaluation bundle: {bundle_dir / name} is missing",
                f"put the contents of {BUNDLE_URL} there, or unset NANOCHAT_DATA_DIR to download "
                "it",
            )
    # how the user gets a good copy, for the hints below
    remedy = f"restore it from {BUNDLE_URL}"
    if get_data_dir() is None:
        remedy = f"rm -r {bundle_dir} {bundle_dir}.zip, and it is downloaded again"

    # LookupError, TypeError, ValueError: a value is missing or of another type
    try:
        with open(bundle_dir / "eval_meta_data.csv", encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            baselines = {row["Eval Task"]: float(row["Random baseline"]) for row in rows}
        config = yaml.safe_load((bundle_dir / "core.yaml").read_text("utf-8"))
        tasks = [_read_task(entry, baselines, bundle_dir, remedy) for entry in config["icl_tasks"]]
    except UserError:  # a ValueError too, but with a better message
        raise
    except (ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"core.yaml or eval_meta_data.csv in {bundle_dir} is damaged: "
            f"{type(error).__name__}: {reason}",
            remedy,
        ) from error
    if not tasks:
        raise UserError(f"{bundle_dir / 'core.yaml'} lists no task", remedy)
    return tasks


def _read_task(entry, baselines, bundle_dir, remedy):
    """A task from its entry in core.yaml."""
    label = entry["label"]
    kind = entry["icl_task_type"]
    rows = _read_rows(bundle_dir / "eval_data" / entry["dataset_uri"], FIELDS[kind], remedy)
    return CoreTask(
        label,
        kind,
        rows,
        num_fewshot=int(entry["num_fewshot"][0]),
        delimiter=entry.get("continuation_delimiter", " "),
        baseline=baselines[label] / 100,  # the file has percent
    )


def _read_rows(path, fields, remedy):
    if not path.is_file():
        raise UserError(f"{path} of the evaluation bundle is missing", remedy)
    rows = []
    lines = path.read_text("utf-8").split("\n")  # not splitlines(), which also splits at U+2028
    for number, line in enumerate(lines, start=1):
        if line.strip():
            rows.append(_parse_row(line, fields, f"{path}:{number}", remedy))
    if not rows:
        raise UserError(f"{path} of the evaluation bundle is empty", remedy)
    return rows


def _parse_row(line, fields, where, remedy):
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    # JSON, but maybe a list or a number
    if not isinstance(row, dict):
        raise UserError(f"{where} is not a JSON object: {line[:80]!r}", remedy)
    # other fields are allowed
    missing = sorted(fields - row.keys())
    if missing:
        raise UserError(f"{where} has no field {missing}", remedy)
    return row
