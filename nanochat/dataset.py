"""
The corpus on disk: which documents are for training, which for validation, and reading them. Also
the command that downloads the default corpus: python -m nanochat.dataset -n 8

Documents come from the first of these that is set:
  1. `--data=PATH`: a file, a folder (with its subfolders) or a glob of .parquet, .jsonl, .txt; see
     documents.py. In a folder, hidden files and folders are left out
  2. $NANOCHAT_DATA_DIR/pretrain/shard_*.parquet: the local mirror; nothing is downloaded
  3. <base_dir>/base_data: shards of the shuffled ClimbMix 400B (6,543 of about 100 MB each). The
     last one is always downloaded, and is always the validation set

Two rules say which documents are held out for validation, for any number of processes:
  - if all files are called shard_*.parquet and there are two or more: those of the last file by
    path;
  - otherwise the last 5% of all documents, in the order of the paths: at least 1, at most 2,000.

A row that holds no text (null, empty, broken) is a document for these rules. It is skipped, counted
and named at the end of the run. `--strict` reads all rows first, and stops at the first such row.
"""

import glob
import logging
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from nanochat.common import UserError, get_data_dir, print0, run_script
from nanochat.configurator import ArgumentParser
from nanochat.documents import count_rows, file_format, read_rows
from nanochat.download import NUM_SHARDS, REPO_ID, base_data_dir, download_shards, shard_name
from nanochat.progress import show_progress

VAL_FRAC = 0.05      # of all documents, held out if there is no validation shard
MAX_VAL_DOCS = 2000  # enough for an estimate; the rest is for training
MAX_NAMED = 5        # of the files with skipped rows

# -----------------------------------------------------------------------------
# Which files, which rows


class Skipped:
    """
    Counts the rows of a span that hold no text. A row counts once, though it is met in every epoch.
    """

    def __init__(self):
        self.count = 0
        self.first = None   # the problem of the first one
        self.last_row = -1  # up to which rows are counted

    def add(self, row, problem):
        if row > self.last_row:
            self.last_row = row
            self.count += 1
            self.first = self.first or problem


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one file, whose texts are in the column or field `text_field`."""
    path: Path
    start: int
    stop: int
    text_field: str = "text"
    skipped: Skipped = field(default_factory=Skipped, compare=False)


def get_both_spans(
    data: str | None,
    text_field: str = "text",
    strict: bool = False,
) -> tuple[list[Span], list[Span]]:
    """
    The documents for training and those for validation, each in file order. `data` is the user's
    --data. The rows are counted once: text files are read through for it, parquet files state the
    number. strict: read all rows, and raise a UserError at the first that holds no text.
    """
    paths, counts = count_documents(data, text_field)
    train = _choose_spans(paths, counts, "train", text_field)
    val = _choose_spans(paths, counts, "val", text_field)
    if strict:
        check_rows(train + val)
    return train, val


def get_spans(
    data: str | None,
    split: str,
    text_field: str = "text",
    strict: bool = False,
) -> list[Span]:
    """As get_both_spans, but those of `split` ("train" or "val") alone."""
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, needed: 'train' or 'val'")
    paths, counts = count_documents(data, text_field, quiet=split != "train")
    spans = _choose_spans(paths, counts, split, text_field)
    if strict:
        check_rows(spans)
    return spans


def count_documents(data, text_field, quiet=False):
    """(the files of the corpus, how many documents each has). quiet: as in find_files."""
    paths = find_files(data, quiet)
    files = show_progress(paths, "counting documents", "files")
    return paths, [count_rows(path, text_field) for path in files]


def _choose_spans(paths, counts, split, text_field):
    """The spans of one split, of files with so many documents. UserError if there are none."""
    # how many documents are held out: the two rules above
    total = sum(counts)
    if len(paths) > 1 and all(path.match("shard_*.parquet") for path in paths):
        num_val = counts[-1]
    else:
        num_val = min(max(1, int(VAL_FRAC * total)), MAX_VAL_DOCS)
    if total == 1:  # a page of text: enough to try things on
        print0(f"note: {paths[0].parent} holds one document, so the {split} split is all of it")
        num_val = 0
        split = "train"

    # counted over all files, train is [0, total - num_val) and val the rest
    first = 0 if split == "train" else total - num_val
    last = total - num_val if split == "train" else total

    # the part of that range in each file
    spans = []
    offset = 0  # number of documents before this file
    for path, count in zip(paths, counts, strict=True):
        start = max(first - offset, 0)
        stop = min(last - offset, count)
        if start < stop:
            spans.append(Span(path, start, stop, text_field))
        offset += count
    if not spans:
        raise UserError(
            f"{paths[0].parent}: {total} documents in {len(paths)} files leave none for {split}",
            "needed: 2 documents or more, some in the last shard and some in the others",
        )
    return spans


def check_rows(spans):
    """Read every row of the spans. UserError at the first that holds no text."""
    num_rows = sum(span.stop - span.start for span in spans)
    parts = (read_rows(span.path, span.start, span.stop, span.text_field) for span in spans)
    rows = chain.from_iterable(parts)
    for _, _, problem in show_progress(rows, "checking rows", "rows", total=num_rows):
        if problem:
            raise UserError(problem, "mend or delete that row, or leave out --strict to skip it")


def describe_spans(spans):
    """A short text that changes when the files of the spans do: a resumed run compares it."""
    # names and rows, not paths: the folder may have moved
    # the field only where it is not the usual one: runs of earlier versions have none
    listing = " ".join(f"{span.path.name}:{span.start}-{span.stop}" for span in spans)
    if spans[0].text_field != "text":
        listing += f" {spans[0].text_field}"
    num_docs = sum(span.stop - span.start for span in spans)
    return f"{num_docs:,} documents in {len(spans)} files, crc32 {zlib.crc32(listing.encode()):08x}"


def describe_skipped(spans):
    """How many rows without text were met so far, and the first of each file; or 'none'."""
    with_some = [span.skipped for span in spans if span.skipped.count]
    if not with_some:
        return "none"
    count = sum(skipped.count for skipped in with_some)
    named = "; ".join(skipped.first for skipped in with_some[:MAX_NAMED])
    return f"{count:,} skipped, first in each file: {named}"


def find_files(data, quiet=False):
    """
    The files of the corpus, sorted by path. UserError with a remedy if there are none. A note says
    how many hidden ones are left out, unless quiet.
    """
    if data is not None:
        files, hidden = _find_own_files(data)
        if hidden and not quiet:
            print0(f"note: {len(hidden)} hidden files are left out, such as {min(hidden)}")
        return files
    # shards: of the mirror, else the downloaded ones
    mirror = get_data_dir()
    folder = base_data_dir() if mirror is None else mirror / "pretrain"
    files = sorted(folder.glob("shard_*.parquet"))
    if mirror is not None and not files:
        raise UserError(
            f"NANOCHAT_DATA_DIR={mirror} has no pretrain/shard_*.parquet",
            "put shards there; or give your own text by --data=PATH; or unset it and run "
            "python -m nanochat.dataset -n 8",
        )
    # without the last shard this run would hold out other documents than all other runs
    val_name = shard_name(NUM_SHARDS - 1)
    if mirror is None and (len(files) < 2 or files[-1].name != val_name):
        raise UserError(
            f"{folder} has {len(files)} shards, needed: some for training, and {val_name} for "
            "validation",
            "run python -m nanochat.dataset -n 8, or give your own text by --data=PATH, or a local "
            "mirror by NANOCHAT_DATA_DIR",
        )
    return files


def _find_own_files(data):
    """(files, hidden files) of the user's --data."""
    # a name that exists is no pattern, even if it has a * in it
    pattern = os.path.expanduser(data)
    matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)

    # folders are searched through; other files in them, such as README.md, are left out
    files = set()
    hidden = set()
    for match in map(Path, matches):
        candidates = match.rglob("*") if match.is_dir() else [match]
        for path in candidates:
            if file_format(path) is None or not path.is_file():
                continue
            # such as copies that notebooks keep, or the ._ files of a Mac
            is_hidden = any(name.startswith(".") for name in path.relative_to(match).parts)
            group = hidden if is_hidden else files
            group.add(path)

    # nothing there, or nothing to read there?
    if not files:
        problem = "holds no text file" if matches else "does not exist"
        raise UserError(
            f"--data={data} {problem}",
            "needed: a file, a folder or a quoted glob of .parquet, .jsonl, .txt (the latter two "
            "also .gz, .zst), for example --data=notes.txt",
        )
    return sorted(files), hidden  # by path: the order decides what is held out


# -----------------------------------------------------------------------------
# The walk


def read_documents(span: Span, row: int = 0) -> Iterator[tuple[int, str]]:
    """
    Yield (row within the span, text) for the documents from `row` on. Rows without text are
    skipped, but counted as rows, so that other rows keep their numbers.
    """
    rows = read_rows(span.path, span.start + row, span.stop, span.text_field)
    for file_row, text, problem in rows:
        if text:
            yield file_row - span.start, text  # the file counts from its own first row
        elif problem:
            span.skipped.add(file_row, problem)
        del text  # a long one is not kept while the next is read


def read_texts(spans: list[Span]) -> Iterator[str]:
    """Yield every document of the spans once. Raises a UserError if there is none."""
    num_texts = 0
    for span in spans:
        for _, text in read_documents(span):
            num_texts += 1
            yield text
    if num_texts == 0:
        raise no_documents(spans)


def iter_texts(data: str | None, split: str, text_field: str = "text") -> Iterator[str]:
    """Yield every document of `split` once, in file order. UserError if there is none."""
    yield from read_texts(get_spans(data, split, text_field))


def no_documents(spans):
    """The UserError for spans in which every row is without text."""
    skipped = describe_skipped(spans)
    return UserError(
        f"{spans[0].path.parent}: the data holds no documents; rows without text: {skipped}",
        "needed: text in at least one row of --data; or run: python -m nanochat.dataset -n 8",
    )


# -----------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None):
    description = f"Download shards of {REPO_ID}."
    parser = ArgumentParser(prog="python -m nanochat.dataset", description=description)
    num_help = "training shards of 100 MB; -1 = all"
    parser.add_argument("-n", type=int, required=True, metavar="SHARDS", help=num_help)
    workers_help = "downloads at a time (default 8)"
    parser.add_argument("-w", type=int, default=8, metavar="WORKERS", help=workers_help)
    args = parser.parse_args(argv)

    # the last shard is not for training
    num_train = NUM_SHARDS - 1 if args.n == -1 else args.n
    if not 1 <= num_train < NUM_SHARDS or args.w < 1:
        raise UserError(
            f"-n {args.n} -w {args.w}, needed: 1 to {NUM_SHARDS - 1} shards (-1 = all), 1 or more "
            "workers",
            "for example: python -m nanochat.dataset -n 8 -w 8",
        )

    # with a mirror nothing is downloaded
    if get_data_dir() is not None:
        num_files = len(find_files(None))
        print(f"NANOCHAT_DATA_DIR is set: {num_files} shards are there, nothing is downloaded")
        return

    logging.basicConfig(format="%(message)s")  # tries that failed and shards that did not come
    download_shards(num_train, args.w)
    print(f"{base_data_dir()}: {num_train} training shards and the validation shard are ready")


if __name__ == "__main__":
    run_script(main)
