"""
Where the rows of the tasks come from: the local mirror $NANOCHAT_DATA_DIR if it is set (and then nothing touches the
network), else the Hugging Face hub, read once and kept in the base directory under hub/<repository>/<commit>/. A mirror
holds the hub's own columns in

    tasks/{gsm8k,humaneval,mmlu,arc_easy,arc_challenge}_<split>.parquet
    chat/train_*.parquet, chat/test.parquet    (messages: list of {role, content})

The hub's parquet files are downloaded by nanochat/download.py and not with the package `datasets`. That one cannot be
told when to give up: measured with datasets 5.2.0 and huggingface_hub 2.4.0, a server that never answers holds it for
over six minutes (its second try waits 60 seconds six times, whatever HF_HUB_ETAG_TIMEOUT says), while a connection that
drops at the first request is not tried again at all. tests/test_hub.py checks that both read the same rows.
"""

from bisect import bisect_right
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, get_base_dir, get_data_dir, print0
from nanochat.download import DiskFullError, download_file, hub_url

# name: (repository on the hub, commit, folder, {split: number of files}). Pinned, so two runs read the same rows
HUB = {
    "gsm8k": ("openai/gsm8k", "e53f048856ff4f594e959d75785d2c2d37b678ee", "main", {"train": 1, "test": 1}),
    "mmlu": ("cais/mmlu", "c30699e8356da336a370243923dbaf21066bb9fe", "all",
             {"auxiliary_train": 1, "dev": 1, "validation": 1, "test": 1}),
    "arc_easy": ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", "ARC-Easy",
                 {"train": 1, "validation": 1, "test": 1}),
    "arc_challenge": ("allenai/ai2_arc", "210d026faf9955653af8916fad021475a3f00453", "ARC-Challenge",
                      {"train": 1, "validation": 1, "test": 1}),
    "humaneval": ("openai/openai_humaneval", "7dce6050a7d6d172f3cc5c32aa97f52fa1a2e544", "openai_humaneval",
                  {"test": 1}),
    "smoltalk": ("HuggingFaceTB/smol-smoltalk", "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc", "data",
                 {"train": 4, "test": 1}),
}


class Rows:
    """The rows of parquet files as dicts, made when asked for (35 us each). columns: the type each value must have."""

    def __init__(self, paths: list[Path], columns: dict[str, type]):
        self.paths, self.columns = paths, columns
        tables = [read_table(path, columns) for path in paths]
        self.ends = list(accumulate(table.num_rows for table in tables))  # file f holds rows [ends[f-1], ends[f])
        self.table = pa.concat_tables(tables, promote_options="permissive")

    def __len__(self):
        return self.table.num_rows

    def __getitem__(self, index):
        row = self.table.slice(index, 1).to_pylist()[0]
        for field, kind in self.columns.items():
            if not isinstance(row[field], kind):
                raise UserError(f"{self.where(index)}, field {field}: got {row[field]!r}, need {kind.__name__}")
        return row

    def where(self, index):
        """Names a row in a message: its file, and its number there, counted from 0."""
        f = bisect_right(self.ends, index)
        return f"{self.paths[f]}, row {index - (self.ends[f - 1] if f else 0)}"


def read_table(path, columns):
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a whole parquet file: {error}", f"rm '{path}' and get it again") from error
    missing = [column for column in columns if column not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; it has {', '.join(table.column_names)}")
    return table.select(list(columns))


def load_rows(name: str, split: str, columns: dict[str, type]) -> Rows:
    """The rows of one split of a data set of HUB: from the mirror, else from the hub."""
    mirror = get_data_dir()
    if mirror is None:
        return Rows(fetch_split(name, split, get_base_dir()), columns)
    chat = f"chat/{split}_*.parquet" if split == "train" else f"chat/{split}.parquet"
    pattern = chat if name == "smoltalk" else f"tasks/{name}_{split}.parquet"
    paths = sorted(mirror.glob(pattern))
    if not paths:
        raise UserError(f"the mirror NANOCHAT_DATA_DIR={mirror} has no {pattern}",
                        "add that file, or `unset NANOCHAT_DATA_DIR` to read the Hugging Face hub")
    return Rows(paths, columns)


def fetch_split(name: str, split: str, base_dir: Path, **options) -> list[Path]:
    """Download what is missing of a split; its files. options: of download_file (timeout, retries, sleep)."""
    repo, commit, folder, num_files = HUB[name]
    count = num_files[split]
    paths = []
    for i in range(count):
        filename = f"{folder}/{split}-{i:05d}-of-{count:05d}.parquet"
        path = base_dir / "hub" / repo / commit / filename
        if not path.exists():
            print0(f"downloading {filename} of {repo}")
        try:
            paths.append(download_file(hub_url(repo, filename, commit), path, **options))
        except DiskFullError:
            raise
        except UserError as error:
            reason, _, hint = str(error).partition("\nhint: ")
            raise UserError(f"data set {repo}, split {split}: {reason}",
                            f"{hint}; or `export NANOCHAT_DATA_DIR=/path/to/a/mirror` with the file") from error
    return paths
