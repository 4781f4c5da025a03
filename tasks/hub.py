"""
Where the rows of the tasks come from: the local mirror $NANOCHAT_DATA_DIR if it is set, else the
Hugging Face hub.

A mirror holds parquet files with the columns that the hub has, and nothing else is read then:

    tasks/{gsm8k,humaneval,mmlu,arc_easy,arc_challenge}_<split>.parquet
    chat/train_*.parquet, chat/test.parquet    (messages: list of {role, content})

From the hub, a data set is downloaded by the library `datasets` at a pinned commit, once: it is
checked, kept in the base directory under datasets/, and later read from there without the network.
`datasets` itself checks only the size of what it downloads; the hashes are checked by
huggingface_hub.
"""

import os
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir, get_data_dir, print0
from nanochat.download import TryAgain, ask_hub, hold_lock, hub_endpoint, hub_errors, retry
from tasks.common import bad_field

# name: (repository, configuration)
HUB = {
    "gsm8k": ("openai/gsm8k", "main"),
    "mmlu": ("cais/mmlu", "all"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval"),
    "smoltalk": ("HuggingFaceTB/smol-smoltalk", "default"),
}

# repository: commit. Pinned, so that all runs read the same rows
COMMITS = {
    "openai/gsm8k": "e53f048856ff4f594e959d75785d2c2d37b678ee",
    "cais/mmlu": "c30699e8356da336a370243923dbaf21066bb9fe",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "openai/openai_humaneval": "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544",
    "HuggingFaceTB/smol-smoltalk": "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
}


class DamagedError(Exception):
    """Downloaded files do not hold what they should."""


class Rows:
    """
    The rows of a `datasets.Dataset` as dicts. columns: name -> type that each value must have.
    sources: (name, number of rows) of each file that the rows come from, so that an error can name
    the file.
    """

    def __init__(self, dataset, columns: dict[str, type], sources: list[tuple[str, int]]):
        self.dataset = dataset
        self.columns = columns
        self.sources = sources

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        row = self.dataset[index]
        for field, kind in self.columns.items():
            if not isinstance(row[field], kind):
                raise bad_field(self.where(index), f"field {field}", row[field], kind.__name__)
        return row

    def where(self, index):
        """Name a row in a message: its file, and its number in that file, from 0."""
        for name, num_rows in self.sources:
            if index < num_rows:
                return f"{name}, row {index}"
            index -= num_rows
        raise IndexError(index)


def load_rows(name: str, split: str, columns: dict[str, type]) -> Rows:
    """The rows of one split of a data set of HUB: from the mirror, else from the hub."""
    mirror = get_data_dir()
    if mirror is None:
        return load_from_hub(name, split, columns)
    return load_from_mirror(mirror, name, split, columns)


def check_columns(source, present, needed):
    for column in needed:
        if column not in present:
            raise UserError(f"{source} has no column {column!r}; it has {', '.join(present)}")


# -----------------------------------------------------------------------------
# The mirror


def load_from_mirror(mirror: Path, name: str, split: str, columns: dict[str, type]) -> Rows:
    from datasets import Dataset  # takes seconds to import

    if name != "smoltalk":
        pattern = f"tasks/{name}_{split}.parquet"
    elif split == "train":
        pattern = "chat/train_*.parquet"
    else:
        pattern = f"chat/{split}.parquet"
    paths = sorted(mirror.glob(pattern))
    if not paths:
        raise UserError(
            f"the mirror NANOCHAT_DATA_DIR={mirror} has no {pattern}",
            "add that file, or `unset NANOCHAT_DATA_DIR` to read the Hugging Face hub",
        )
    tables = [read_table(path, columns) for path in paths]
    table = pa.concat_tables(tables, promote_options="permissive")
    sources = [(str(path), part.num_rows) for path, part in zip(paths, tables, strict=True)]
    return Rows(Dataset(table), columns, sources)


def read_table(path, columns):
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        hint = f"rm '{path}' and get it again"
        raise UserError(f"{path} is not a whole parquet file: {error}", hint) from error
    check_columns(path, table.column_names, columns)
    # the metadata may describe columns that are left out here
    return table.select(list(columns)).replace_schema_metadata()


# -----------------------------------------------------------------------------
# The hub


def load_from_hub(name: str, split: str, columns: dict[str, type]) -> Rows:
    from datasets import load_from_disk  # takes seconds to import

    repo, config = HUB[name]
    commit = COMMITS[repo]
    folder = get_base_dir() / "datasets" / repo / commit / config
    with hold_lock(folder.with_name(f"{config}.lock")):  # one process downloads, the others wait
        if not folder.is_dir():
            fetch(repo, commit, config, folder)
    dataset = load_from_disk(str(folder / split))
    source = f"data set {repo}, split {split}"
    check_columns(source, dataset.column_names, columns)
    return Rows(dataset, columns, [(source, len(dataset))])


def fetch(repo, commit, config, folder):
    """
    Download a data set with all its splits, check it, and save it as `folder`. The folder appears
    only when it is whole.
    """
    print0(f"downloading {config} of {repo}")
    work = folder.with_name(f"{config}.incoming")
    shutil.rmtree(work, ignore_errors=True)  # of a killed process
    damaged = False

    def attempt():
        nonlocal damaged
        # datasets would wait for minutes for a hub that does not answer
        ask_hub(repo, "README.md", commit)
        try:
            return load_checked(repo, commit, config, work / "cache", damaged)
        except DamagedError as error:
            damaged = True
            raise TryAgain(f"damaged: {error}") from error

    try:
        dataset = retry(attempt, f"data set {repo}")
    except UserError as error:
        other_way = "or `export NANOCHAT_DATA_DIR=/path/to/a/mirror` with its files"
        raise UserError(f"{error}; {other_way}") from error
    dataset.save_to_disk(str(work / "whole"))
    os.replace(work / "whole", folder)
    shutil.rmtree(work)


def load_checked(repo, commit, config, cache_dir, force):
    """
    A datasets.DatasetDict of all splits. force: download again even files that are there.
    May raise a DamagedError.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from huggingface_hub import HfApi

    mode = "force_redownload" if force else "reuse_dataset_if_exists"
    with hub_errors(f"data set {repo}"):
        try:
            dataset = load_dataset(
                repo,
                config,
                revision=commit,
                cache_dir=str(cache_dir),
                download_mode=mode,
            )
        except OSError:
            raise
        except (DatasetsError, pa.ArrowException) as error:
            raise DamagedError(str(error)) from error
        hub = HfApi(hub_endpoint())
        report = hub.verify_repo_checksums(repo, repo_type="dataset", revision=commit)
    if report.mismatches:
        path = report.mismatches[0]["path"]
        raise DamagedError(f"the sha256 of {path} is not the one that the hub states")
    return dataset
