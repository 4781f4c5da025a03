"""
The corpus on disk: which documents are for training and which for validation, the one walk over them, and the download
of the default corpus (`python -m nanochat.dataset -n 8`).

Where documents come from, first match:
  1. `--data=PATH`: a file, a folder (searched through) or a glob of .parquet, .jsonl, .txt; see documents.py
  2. $NANOCHAT_DATA_DIR/pretrain/shard_*.parquet: the local mirror; the network is not touched
  3. <base_dir>/base_data: shards of the shuffled ClimbMix 400B (6,543 of about 100 MB each), of which the last is
     always downloaded and always the validation set

What is held out is fixed by two rules, however many processes read:
  - when all files are called shard_*.parquet and there are two or more, the last by path is for validation;
  - otherwise the last 5% of all documents, in the order of the paths: at least 1, at most 2,000.
"""

import glob
import logging
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nanochat.common import UserError, get_base_dir, get_data_dir, print0, run_script
from nanochat.configurator import ArgumentParser
from nanochat.documents import count_rows, file_format, open_parquet, read_rows
from nanochat.download import DiskFullError, download_file, hub_url

REPO_ID = "karpathy/climbmix-400b-shuffle"
NUM_SHARDS = 6543          # shard_00000 ... shard_06542
SHARD_BYTES = 100_000_000  # about; until a size is known, the progress bar guesses by it
VAL_FRAC = 0.05
MAX_VAL_DOCS = 2000

log = logging.getLogger(__name__)


# -----------------------------------------------------------------------------
# Which files, which rows


@dataclass(frozen=True)
class Span:
    """Rows [start, stop) of one file."""
    path: Path
    start: int
    stop: int


def get_spans(data: str | None, split: str) -> list[Span]:
    """The documents of `split` ("train" or "val") in file order; `data` is the user's --data. Text files are read
    through once to count them; parquet files state their rows."""
    if split not in ("train", "val"):
        raise ValueError(f"split is {split!r}, needed: 'train' or 'val'")
    paths = _find_files(data)
    counts = [count_rows(path) for path in paths]
    total = sum(counts)
    if len(paths) > 1 and all(path.match("shard_*.parquet") for path in paths):
        num_train = total - counts[-1]
    else:
        num_train = total - min(max(1, int(VAL_FRAC * total)), MAX_VAL_DOCS)
    lo, hi = (0, num_train) if split == "train" else (num_train, total)
    if total == 1:  # a page of text: enough to try things on
        print0(f"note: {paths[0].parent} holds one document, so the {split} split is all of it")
        lo, hi = 0, 1
    spans, offset = [], 0  # offset: documents before this file
    for path, count in zip(paths, counts, strict=True):
        start, stop = max(lo - offset, 0), min(hi - offset, count)
        if start < stop:
            spans.append(Span(path, start, stop))
        offset += count
    if not spans:
        raise UserError(f"{paths[0].parent}: {total} documents in {len(paths)} files leave none for {split}",
                        "needed: 2 documents or more, some in the last shard and some in the others")
    return spans


def describe_spans(spans):
    """The documents of the spans in a few words that change when the files do, so that a resumed run can tell."""
    listing = " ".join(f"{span.path.name}:{span.start}-{span.stop}" for span in spans)
    num_docs = sum(span.stop - span.start for span in spans)
    return f"{num_docs:,} documents in {len(spans)} files, crc32 {zlib.crc32(listing.encode()):08x}"


def _find_files(data):
    """The files of the corpus, sorted by path; a UserError with the cure when there are none."""
    if data is not None:
        pattern = os.path.expanduser(data)
        matches = [pattern] if os.path.exists(pattern) else glob.glob(pattern, recursive=True)
        files = [file for match in map(Path, matches) for file in (match.rglob("*") if match.is_dir() else [match])]
        files = sorted({file for file in files if file_format(file) and file.is_file()})
        if not files:
            raise UserError(f"--data={data} {'holds no text file' if matches else 'does not exist'}",
                            "needed: a file, a folder or a quoted glob of .parquet, .jsonl, .txt (the latter two also "
                            ".gz, .zst), for example --data=notes.txt")
        return files
    mirror = get_data_dir()
    folder = base_data_dir() if mirror is None else mirror / "pretrain"
    files = sorted(folder.glob("shard_*.parquet"))
    val_name = shard_name(NUM_SHARDS - 1)
    if mirror is None and (len(files) < 2 or files[-1].name != val_name):
        raise UserError(f"{folder} has {len(files)} shards, needed: some for training, and {val_name} for validation",
                        "run python -m nanochat.dataset -n 8, or give your own text by --data=PATH, or a local mirror "
                        "by NANOCHAT_DATA_DIR")
    if not files:
        raise UserError(f"NANOCHAT_DATA_DIR={mirror} has no pretrain/shard_*.parquet",
                        "put shards there; or give your own text by --data=PATH; or unset it and run "
                        "python -m nanochat.dataset -n 8")
    return files


def base_data_dir() -> Path:
    return get_base_dir() / "base_data"


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


# -----------------------------------------------------------------------------
# The walk


def read_documents(span: Span, row: int = 0) -> Iterator[tuple[int, str]]:
    """(row within the span, text) for the documents from `row` on. Empty texts are skipped and counted as rows, so a
    row stays what it is; how many there were is logged."""
    num_empty = 0
    for file_row, text in read_rows(span.path, span.start + row, span.stop):
        if text:
            yield file_row - span.start, text
        num_empty += not text
    if num_empty:
        log.info("%s: %d empty texts skipped", span.path, num_empty)


def iter_texts(data: str | None, split: str) -> Iterator[str]:
    """Every document of `split` once, in file order; a UserError when all are empty."""
    spans, num_texts = get_spans(data, split), 0
    for span in spans:
        for _, text in read_documents(span):
            num_texts += 1
            yield text
    if num_texts == 0:
        raise UserError(f"{spans[0].path.parent}: every document for {split} is empty", "needed: text in at least one")


# -----------------------------------------------------------------------------
# Downloading the default corpus


class _Stopped(Exception):
    """Raised inside a download when the whole command is to end."""


def download_shards(num_train: int, workers: int = 8, **options) -> None:
    """Shards 0 ... num_train - 1 and the validation shard into base_data, `workers` at a time; whole ones stay as they
    are. A UserError names the shards that did not come. `options` (retries, timeout) go to `download_file`."""
    names = [shard_name(index) for index in (NUM_SHARDS - 1, *range(num_train))]
    stop, lock, seen = threading.Event(), threading.Lock(), {}  # seen: name -> (bytes here, size of the shard)
    bar = tqdm(total=SHARD_BYTES * len(names), desc=f"{len(names)} shards", unit="B", unit_scale=True,
               mininterval=0.2 if sys.stderr.isatty() else 20)

    def show(name, done, total):
        if stop.is_set():
            raise _Stopped
        with lock:
            done_before, total_before = seen.get(name, (0, SHARD_BYTES))
            seen[name] = done, total or total_before
            bar.total += seen[name][1] - total_before
            bar.update(done - done_before)

    def pause(seconds):
        if stop.wait(seconds):
            raise _Stopped

    def fetch(name):
        path = base_data_dir() / name
        download_file(hub_url(REPO_ID, name), path, check=lambda part: open_parquet(part).close(),
                      progress=partial(show, name), **{"sleep": pause, **options})
        show(name, path.stat().st_size, path.stat().st_size)

    failures = {}
    with logging_redirect_tqdm(), bar, ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(fetch, name): name for name in names}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, UserError) and not isinstance(error, DiskFullError):
                    failures[futures[future]] = error
                    log.warning("%s", error)
                elif error is not None:
                    raise error
        finally:  # also on Ctrl-C: the parts stay, and the next run goes on from them
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
    if failures:
        raise UserError(f"{len(failures)} of {len(names)} shards are missing: {', '.join(sorted(failures))}",
                        f"python -m nanochat.dataset -n {num_train} tries them again and keeps the rest")


def main(argv: list[str] | None = None):
    parser = ArgumentParser(prog="python -m nanochat.dataset", description=f"Download shards of {REPO_ID}.")
    parser.add_argument("-n", type=int, required=True, metavar="SHARDS", help="training shards of 100 MB; -1 = all")
    parser.add_argument("-w", type=int, default=8, metavar="WORKERS", help="downloads at a time (default 8)")
    args = parser.parse_args(argv)
    num_train = NUM_SHARDS - 1 if args.n == -1 else args.n
    if not 1 <= num_train < NUM_SHARDS or args.w < 1:
        raise UserError(f"-n {args.n} -w {args.w}, needed: 1 to {NUM_SHARDS - 1} shards (-1 = all), 1 or more workers",
                        "for example: python -m nanochat.dataset -n 8 -w 8")
    if get_data_dir() is not None:
        print(f"NANOCHAT_DATA_DIR is set: {len(_find_files(None))} shards are there, nothing is downloaded")
        return
    logging.basicConfig(format="%(message)s")
    download_shards(num_train, args.w)
    print(f"{base_data_dir()}: {num_train} training shards and the validation shard are ready")


if __name__ == "__main__":
    run_script(main)
