"""
The documents in one file. A row is one document, in every format:

    .parquet    a row of the string column `text`
    .jsonl      a line, an object with a string `text`; a blank line is a row with the empty text
    .txt        the text up to a line `<|endoftext|>`; in a file without any such line, the text up
                to the first blank line after 4,000 characters, or up to the first line end after
                8,000

.jsonl and .txt may be compressed (.gz, .zst). All readers stream: memory holds one document, or one
batch of parquet rows. A bad row raises a UserError that names the file, the line (from 1) or row
(from 0), and the field.
"""

import codecs
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError

SEPARATOR = b"<|endoftext|>"
CUT_CHARS = 4000  # of a .txt: cut at a blank line after this many, at any line after twice as many
BATCH_ROWS = 256  # parquet rows decoded at a time

# -----------------------------------------------------------------------------
# Any format


def file_format(path: Path) -> str | None:
    """The format by the name: notes.txt.gz -> 'txt', a.parquet -> 'parquet', README.md -> None."""
    # notes.v2.TXT.gz -> .v2, .txt, .gz
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".parquet"]:  # compresses its own columns, so there is no .parquet.gz
        return "parquet"
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    if suffixes and suffixes[-1] in (".jsonl", ".txt"):
        return suffixes[-1][1:]
    return None


def count_rows(path: Path) -> int:
    """The number of rows in the file. A text file is read through to count them."""
    kind = file_format(path)
    if kind == "parquet":
        with open_parquet(path) as file:
            return file.metadata.num_rows
    rows = _read_lines(path) if kind == "jsonl" else _cut_text(path)
    return sum(1 for _ in rows)


def read_rows(path: Path, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """Yield (row, text) for the rows [start, stop) of the file."""
    kind = file_format(path)
    if kind == "parquet":
        return _read_parquet(path, start, stop)
    if kind == "jsonl":
        return _read_jsonl(path, start, stop)
    return islice(enumerate(_cut_text(path)), start, stop)


# -----------------------------------------------------------------------------
# parquet


def open_parquet(path: Path) -> pq.ParquetFile:
    """
    Open the file, read its footer and check its `text` column. UserError if it is not a whole
    shard.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)  # if there are checksums
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({_first_line(error)})",
            "delete it; python -m nanochat.dataset downloads a missing shard again",
        ) from error

    # the type of each column
    types = {field.name: field.type for field in file.schema_arrow}
    if types.get("text") not in (pa.string(), pa.large_string()):
        file.close()
        raise UserError(
            f"{path}: field text is {types.get('text', 'missing')}, needed: a string column",
            f"its columns are: {', '.join(types)}",
        )
    return file


def _read_parquet(path, start, stop):
    with open_parquet(path) as file:
        group_stop = 0  # rows in the groups so far
        for group in range(file.num_row_groups):
            group_start = group_stop
            group_stop += file.metadata.row_group(group).num_rows
            # groups outside [start, stop) are not decoded
            if group_start >= stop:
                return
            if group_stop > start:
                yield from _read_row_group(path, file, group, group_start, start, stop)


def _read_row_group(path, file, group, row, start, stop):
    """The rows of one group that lie in [start, stop); `row` is the number of its first row."""
    try:
        # one group at a time: of several, pyarrow would read all ahead into memory
        for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=["text"]):
            for value in batch.column("text"):
                if start <= row < stop:
                    yield row, _parquet_text(value, f"{path}: row {row}")
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: damaged in row group {group} ({_first_line(error)})",
            "delete it and download it again",
        ) from error


def _parquet_text(value, where):
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, "field text", error) from error
    return _check_text(text, where)


# -----------------------------------------------------------------------------
# jsonl


def _read_jsonl(path, start, stop):
    for row, line in islice(enumerate(_read_lines(path)), start, stop):
        yield row, _jsonl_text(line, f"{path}:{row + 1}")


def _jsonl_text(line, where):
    # a blank line is a row, so that line numbers and rows agree
    if not line.strip():
        return ""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, "field text", error) from error
    except (ValueError, RecursionError) as error:
        hint = 'needed: one object a line, {"text": "..."}'
        raise UserError(f"{where}: not JSON ({error})", hint) from error
    # a list or a number has no field at all
    text = record.get("text") if isinstance(record, dict) else None
    return _check_text(text, where)


# -----------------------------------------------------------------------------
# txt


def _cut_text(path):
    """
    Yield the documents of a .txt. The cuts depend on the file alone, so all passes find the same
    rows.
    """
    has_separators = any(line.strip() == SEPARATOR for line in _read_lines(path))
    lines = []     # of the document that is being read
    num_chars = 0
    for number, line in enumerate(_read_lines(path), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}:{number}", "the text", error) from error

        # a separator is no text
        is_separator = has_separators and line.strip() == SEPARATOR
        if not is_separator:
            lines.append(text)
            num_chars += len(text)

        # does the document end here?
        if has_separators:
            is_end = is_separator
        else:
            is_blank = not line.strip()
            is_end = num_chars >= (CUT_CHARS if is_blank else 2 * CUT_CHARS)
        if is_end:
            yield from _join_lines(lines)
            lines = []
            num_chars = 0
    yield from _join_lines(lines)  # what is left at the end of the file


def _join_lines(lines):
    """Yield the lines as one text without blank lines around it, or nothing if there is no text."""
    text = "".join(lines).replace("\r\n", "\n").strip("\n")
    if text.strip():
        yield text


# -----------------------------------------------------------------------------
# Shared by the formats


def _read_lines(path):
    """Yield the lines of a file as bytes, decompressed, without a byte order mark."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        # pyarrow reads all frames of a .gz or .zst, and raises if the last one is cut short
        with io.BufferedReader(pa.input_stream(str(path), compression=codec), 1 << 20) as file:
            # Windows editors begin a file with a byte order mark
            line = file.readline().removeprefix(codecs.BOM_UTF8)
            while line:
                yield line
                line = file.readline()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({_first_line(error)})",
            "mend the file, or leave it out of --data",
        ) from error


def _check_text(value, where):
    """Return the value of a `text` field. UserError unless it is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        found = "missing or null" if value is None else f"of type {type(value).__name__}"
        hint = "mend or delete that row"
        raise UserError(f"{where}: field text is {found}, needed: a string", hint)
    try:
        value.encode("utf-8")  # JSON can spell half of a surrogate pair
    except UnicodeEncodeError as error:
        raise _not_utf8(where, "field text", error) from error
    return value


def _not_utf8(where, field, error):
    hint = "mend or delete that row"
    return UserError(f"{where}: {field} is not valid UTF-8 ({error.reason})", hint)


def _first_line(error):
    return str(error).split("\n")[0]
