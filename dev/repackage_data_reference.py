"""
How a corpus becomes shards: the recipe of the text that pretraining reads, to be run again.

    python -m dev.repackage_data_reference --data='/raw/*.jsonl.zst' --out=/shards

Reads documents (parquet, jsonl or txt, as --data takes them), shuffles them in a window, and writes
`shard_%05d.parquet` with one string column `text`, zstd, row groups of 1,024 documents and page
checksums: small enough to hold one in memory, large enough to compress. A shard ends after about
250 million characters, 100 MB on disk for English. The last shard is kept small and apart from the
others: it is the validation set.

The shuffle is by windows because a corpus is larger than memory: a buffer of shuffle_docs documents
is filled, and each new document takes the place of a random one, which is written. A corpus sorted
by source needs a large window.
"""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, print0, run_script
from nanochat.configurator import override_from_cli
from nanochat.dataset import iter_texts
from nanochat.progress import show_progress

data: str | None = None          # file, folder or glob to read; None = the default corpus
out: str = ""                    # folder to write
seed: int = 42                   # of the shuffle
shard_chars: int = 250_000_000   # characters per shard
row_group_docs: int = 1024       # documents per row group
shuffle_docs: int = 1_000_000    # documents in the shuffling window
val_docs: int = 10_000           # documents of the last shard


def shuffled(texts, window, rng):
    """Texts in an order that is random within a window of documents."""
    buffer = []
    for text in texts:
        if len(buffer) < window:
            buffer.append(text)
            continue
        place = rng.randrange(window)
        yield buffer[place]
        buffer[place] = text
    rng.shuffle(buffer)
    yield from buffer


class ShardWriter:
    """Writes shards one after another, each under a temporary name until it is whole."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.index = 0      # of the shard
        self.chars = 0      # in the shard
        self.docs = []      # of the next row group
        self.writer = None  # of the shard, once its first row group is full

    @property
    def path(self):
        return self.folder / f"shard_{self.index:05d}.parquet"

    def write(self, text):
        self.docs.append(text)
        self.chars += len(text)
        if len(self.docs) == row_group_docs:
            self._flush()
        if self.chars >= shard_chars:
            self.close()

    def _flush(self):
        table = pa.table({"text": pa.array(self.docs, type=pa.string())})
        if self.writer is None:
            self.writer = pq.ParquetWriter(
                self.path.with_suffix(".tmp"),
                table.schema,
                compression="zstd",
                write_page_checksum=True,
            )
        self.writer.write_table(table)
        self.docs = []

    def close(self):
        """Finish the shard that is open, if any."""
        if self.docs:
            self._flush()
        if self.writer is not None:
            self.writer.close()
            self.path.with_suffix(".tmp").replace(self.path)
            print0(f"wrote {self.path} | characters: {self.chars:,}")
            self.index += 1
            self.chars = 0
            self.writer = None


def main():
    if not out:
        raise UserError("--out is empty: it needs a folder to write to", "--out=/shards")
    if list(Path(out).glob("shard_*.parquet")):
        raise UserError(f"--out={out} holds shards already", "choose an empty folder")
    rng = random.Random(seed)
    writer = ShardWriter(out)
    held_out = []  # the first documents of the shuffle
    for split in ("train", "val"):  # all documents of the source, also those that it holds out
        texts = show_progress(iter_texts(data, split), f"reading {split}", "documents")
        for text in shuffled(texts, shuffle_docs, rng):
            if len(held_out) < val_docs:
                held_out.append(text)
            else:
                writer.write(text)
    writer.close()
    for text in held_out:
        writer.write(text)
    writer.close()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
