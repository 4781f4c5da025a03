"""
The documents of one file: how a .parquet, .jsonl or .txt (the latter two also .gz, .zst) divides into rows of text.

parquet   a row of the string column `text`
jsonl     a line, an object with a string `text`; an empty line is a row without text
txt       lines `<|endoftext|>` separate documents; without any, the text is cut at the first blank line after 4,000
          characters, or else the first line end after 8,000 (a line of over 8,000 bytes counts as several)

Every reader streams: memory stays flat whatever the size of the file. A bad row is a UserError that names the file, the
line (from 1) or row (from 0), and the field; nothing is skipped in silence.
"""

import codecs
import io
import json
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError

SEPARATOR = b"<|endoftext|>"
CUT_CHARS = 4000                # of a txt without separators: at a blank line after this many, at any line after twice
MAX_LINE_BYTES = 2 * CUT_CHARS  # a txt without line ends is read in pieces of this size
BATCH_ROWS = 256                # parquet rows decoded at a time


def file_format(path: Path) -> str | None:
    """'parquet', 'jsonl', 'txt', or None for a file that is not ours: notes.txt.gz -> 'txt', README.md -> None"""
    name = path.name.lower()
    stem = name.removesuffix(".gz").removesuffix(".zst")
    kind = stem.rpartition(".")[2]
    known = kind in ("jsonl", "txt") or (kind == "parquet" and stem == name)  # parquet compresses its own columns
    return kind if known and stem != kind else None


def count_rows(path: Path) -> int:
    """How many rows `read_rows` walks over; a text file is read through for it."""
    if file_format(path) == "parquet":
        with open_parquet(path) as file:
            return file.metadata.num_rows
    return sum(1 for _ in (_read_lines(path) if file_format(path) == "jsonl" else _cut_text(path)))


def read_rows(path: Path, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """(row, text) for the rows [start, stop) of the file; the text of an empty row is ''."""
    readers = {"parquet": _read_parquet, "jsonl": _read_jsonl, "txt": _read_txt}
    return readers[file_format(path)](path, start, stop)


# -----------------------------------------------------------------------------
# parquet


def open_parquet(path: Path) -> pq.ParquetFile:
    """The file, its footer read and its `text` column seen, else a UserError: so this also checks a download."""
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)  # where the writer put checksums
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})",
                        "delete it; python -m nanochat.dataset downloads a missing shard again") from error
    types = {field.name: field.type for field in file.schema_arrow}
    if "text" not in types or not (pa.types.is_string(types["text"]) or pa.types.is_large_string(types["text"])):
        file.close()
        raise UserError(f"{path}: field text is {types.get('text', 'missing')}, needed: a string column",
                        f"its columns are: {', '.join(types)}")
    return file


def _read_parquet(path, start, stop):
    with open_parquet(path) as file:
        group_start = 0
        for group in range(file.num_row_groups):
            row, group_start = group_start, group_start + file.metadata.row_group(group).num_rows
            if row >= stop or group_start <= start:
                continue
            try:  # a group at a time: asked for several, pyarrow reads all of them ahead into memory
                for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=["text"]):
                    for i in range(max(start - row, 0), min(stop - row, len(batch))):
                        yield row + i, _check_text(batch.column(0)[i].as_py, f"{path}: row {row + i}")
                    row += len(batch)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path}: damaged in row group {group} ({_first_line(error)})",
                                "delete it and download it again") from error


# -----------------------------------------------------------------------------
# jsonl


def _read_jsonl(path, start, stop):
    for row, line in enumerate(_read_lines(path)):
        if row >= stop:
            return
        if row >= start:
            where = f"{path}:{row + 1}"
            yield row, _check_text(partial(_parse_line, line, where), where) if line.strip() else ""


def _parse_line(line, where):
    line = line.decode("utf-8")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})", 'needed: one object a line, {"text": "..."}') from error
    return record.get("text") if isinstance(record, dict) else None


# -----------------------------------------------------------------------------
# txt


def _read_txt(path, start, stop):
    for row, text in enumerate(_cut_text(path)):
        if row >= stop:
            return
        if row >= start:
            yield row, text


def _cut_text(path):
    """The documents of a .txt, as the module docstring describes. Each pass finds the cuts anew: nothing is kept."""
    separated = any(line.strip() == SEPARATOR for line in _read_lines(path, MAX_LINE_BYTES))
    decoder = codecs.getincrementaldecoder("utf-8")()  # incremental: a piece of a long line may end inside a character
    pieces, num_chars, line_number = [], 0, 1
    for line in chain(_read_lines(path, MAX_LINE_BYTES), [b""]):  # b"" marks the end
        try:
            piece = decoder.decode(line, final=not line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{line_number}: the text is not valid UTF-8 ({error.reason})",
                            "re-encode the file as UTF-8") from error
        line_number += line.endswith(b"\n")
        content = line.strip()
        if not (separated and content == SEPARATOR):
            pieces.append(piece)
            num_chars += len(piece)
            enough = not separated and num_chars >= (2 * CUT_CHARS if content else CUT_CHARS)
            if line and not enough:
                continue
        text = "".join(pieces).replace("\r\n", "\n").strip("\n")
        pieces, num_chars = [], 0
        if text.strip():
            yield text


# -----------------------------------------------------------------------------
# Shared by the formats


def _read_lines(path, max_bytes=-1):
    """The lines of a file as bytes, decompressed, without a byte order mark; a line over max_bytes in pieces."""
    try:  # pyarrow, because it reads every frame of a .zst or .gz, and notices one that is cut short
        codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
        with io.BufferedReader(pa.input_stream(str(path), compression=codec), 1 << 20) as file:
            line = file.readline(max_bytes).removeprefix(codecs.BOM_UTF8)
            while line:
                yield line
                line = file.readline(max_bytes)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_first_line(error)})",
                        "mend the file, or leave it out of --data") from error


def _check_text(get_value, where):
    """The value that get_value() gives, seen to be a string that UTF-8 can hold."""
    try:
        value = get_value()
        if isinstance(value, str):
            value.encode("utf-8")  # JSON can spell half a surrogate pair
            return value
    except UnicodeError as error:
        raise UserError(f"{where}: field text is not valid UTF-8 ({error.reason})",
                        "mend or delete that row") from error
    found = "missing or null" if value is None else f"of type {type(value).__name__}"
    raise UserError(f"{where}: field text is {found}, needed: a string", "mend or delete that row")


def _first_line(error):
    return str(error).split("\n")[0]
