"""
The documents in one file. A row is one document, in every format:

    .parquet    a row of the column `text`: strings in any form, or JSON strings
    .jsonl      a line, an object with a string `text`; a blank line is a row without text
    .txt        the text up to a line `<|endoftext|>`; in a file without any such line, the text up
                to the first blank line after 4,000 characters, or up to the first line end after
                8,000

Another column or field than `text` can be named. .jsonl and .txt may be compressed (.gz, .zst). All
readers stream: memory holds one document, or one batch of parquet rows. A row that holds no text is
given with its problem: a message that names the file, the line (from 1) or row (from 0), and the
field. A file that cannot be read, or has no such field, raises a UserError, as does a document that
needs more memory than there is.
"""

import codecs
import io
import json
import os
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError, usable_memory
from nanochat.progress import show_progress

SEPARATOR = b"<|endoftext|>"
CUT_CHARS = 4000  # of a .txt: cut at a blank line after this many, at any line after twice as many
BATCH_ROWS = 256  # parquet rows decoded at a time
MEMORY_FACTOR = 20  # bytes of memory for each byte of a long document, until it is rows (measured)

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


def count_rows(path: Path, field: str = "text") -> int:
    """
    The number of rows in the file. A text file is read through to count them. UserError if no row
    has the field.
    """
    kind = file_format(path)
    if kind == "parquet":
        with open_parquet(path, field) as file:
            _check_groups(path, file, field, max_document_bytes())
            return file.metadata.num_rows
    if kind == "jsonl":
        return _count_jsonl(path, field)
    documents = show_progress(_cut_text(path), f"counting {path.name}", "documents")
    return sum(1 for _ in documents)


def read_rows(path: Path, start: int, stop: int, field: str = "text"):
    """
    Yield (row, text, problem) for the rows [start, stop) of the file. The problem of a row without
    text is a str, else None.
    """
    kind = file_format(path)
    if kind == "parquet":
        yield from _read_parquet(path, start, stop, field)
    elif kind == "jsonl":
        for row, line in islice(enumerate(read_lines(path)), start, stop):
            yield row, *_attempt(_jsonl_text, line, f"{path}:{row + 1}", field)
    else:
        for row, document in islice(enumerate(_cut_text(path)), start, stop):
            yield row, *document


class BadRowError(Exception):
    """A row that holds no text."""


def _attempt(read, *arguments):
    """(text, None) as `read` gives it, or ("", problem)."""
    try:
        return read(*arguments), None
    except BadRowError as error:
        return "", str(error)


# -----------------------------------------------------------------------------
# parquet


def open_parquet(path: Path, field: str | None = "text") -> pq.ParquetFile:
    """
    Open the file, read its footer and check its text column, if `field` names one. UserError if it
    is not a whole shard.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)  # if there are checksums
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: not a readable parquet file ({_first_line(error)})",
            "delete it; python -m nanochat.dataset downloads a missing shard again",
        ) from error
    if field is None:
        return file

    # the type of each column
    types = {column.name: column.type for column in file.schema_arrow}
    if field not in types or not (_is_string(types[field]) or field in _json_columns(file)):
        file.close()
        raise UserError(
            f"{path}: field {field} is {types.get(field, 'missing')}, needed: a string column",
            f"its columns are: {', '.join(types)}; --text_field=NAME reads another than {field}",
        )
    return file


def iter_parquet(path: Path) -> Iterator[dict]:
    """Yield each row of the file as a dict. A column of JSON, as DuckDB writes it, is parsed."""
    with open_parquet(path, field=None) as file:
        json_columns = _json_columns(file) & set(file.schema_arrow.names)
        for group in range(file.num_row_groups):
            for batch in _read_batches(path, file, group):
                for row in batch.to_pylist():
                    for name in json_columns:
                        row[name] = _parse_value(row[name], f"{path}: column {name}")
                    yield row


def _parse_value(text, where):
    """The value of a column of JSON in one row; None for null."""
    try:
        return None if text is None else _parse_json(text, where, "JSON")
    except BadRowError as error:
        raise UserError(str(error), "mend or delete that row") from error


def _is_string(column_type):
    # a dictionary holds each different string once
    if pa.types.is_dictionary(column_type):
        column_type = column_type.value_type
    is_view = pa.types.is_string_view(column_type)
    return is_view or pa.types.is_string(column_type) or pa.types.is_large_string(column_type)


def _json_columns(file):
    """
    The names of the columns that parquet marks as JSON. pyarrow reads them as strings, as bytes or
    as a type of their own, depending on its version.
    """
    columns = [file.schema.column(i) for i in range(len(file.schema))]
    return {column.path for column in columns if column.logical_type.type == "JSON"}


def _check_groups(path, file, field, max_bytes):
    """UserError if the rows of a group are, on average, too long for this machine."""
    names = [file.schema.column(i).path for i in range(len(file.schema))]
    column = names.index(field)
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        num_bytes = metadata.column(column).total_uncompressed_size
        if num_bytes > max_bytes * max(1, metadata.num_rows):  # some writers leave empty groups
            raise _too_long(path, f"row group {group}", max_bytes)


def _read_parquet(path, start, stop, field):
    with open_parquet(path, field) as file:
        is_json = field in _json_columns(file)
        group_stop = 0  # rows in the groups so far
        for group in range(file.num_row_groups):
            row = group_stop
            group_stop += file.metadata.row_group(group).num_rows
            # groups outside [start, stop) are not decoded
            if row >= stop:
                return
            if group_stop <= start:
                continue
            for batch in _read_batches(path, file, group, [field]):
                for value in batch.column(field):
                    if start <= row < stop:
                        where = f"{path}: row {row}"
                        yield row, *_attempt(_parquet_text, value, where, field, is_json)
                    row += 1


def _read_batches(path, file, group, columns=None):
    """Yield the record batches of a row group."""
    try:
        # one group at a time: of several, pyarrow would read all ahead into memory
        yield from file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise UserError(
            f"{path}: damaged in row group {group} ({_first_line(error)})",
            "delete it and download it again",
        ) from error


def _parquet_text(value, where, field, is_json):
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        raise _not_utf8(where, f"field {field}", error) from error
    if is_json and text is not None:
        text = _parse_json(text, where, "a JSON string")
    return _check_text(text, where, field)


# -----------------------------------------------------------------------------
# jsonl


def _count_jsonl(path, field):
    num_rows = 0
    found = False  # has any row the field?
    other_fields = None  # of the first row
    for line in show_progress(read_lines(path), f"counting {path.name}", "rows"):
        num_rows += 1
        if found or not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        found = isinstance(record, dict) and field in record
        if other_fields is None and isinstance(record, dict):
            other_fields = ", ".join(record)
    if other_fields and not found:
        raise UserError(
            f"{path}: no row has a field {field}",
            f"its first row has: {other_fields}; --text_field=NAME reads another than {field}",
        )
    return num_rows


def _jsonl_text(line, where, field):
    # a blank line is a row, so that line numbers and rows agree
    if not line.strip():
        return ""
    record = _parse_json(line, where, f'one object a line, {{"{field}": "..."}}')
    # a list or a number has no field at all
    text = record.get(field) if isinstance(record, dict) else None
    return _check_text(text, where, field)


def _parse_json(text, where, needed):
    """The value in a str or in bytes of UTF-8."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, "the row", error) from error
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"{where}: not JSON ({error}), needed: {needed}") from error


# -----------------------------------------------------------------------------
# txt


def _cut_text(path):
    """
    Yield (text, problem) for the documents of a .txt. The cuts depend on the file alone, so all
    passes find the same rows.
    """
    has_separators = any(line.strip() == SEPARATOR for line in read_lines(path))
    lines = []      # of the document that is being read
    num_chars = 0
    problem = None  # the first line of the document that is not UTF-8
    for number, line in enumerate(read_lines(path), start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            problem = problem or str(_not_utf8(f"{path}:{number}", "the text", error))
            text = line.decode("utf-8", errors="replace")

        # a separator is no text
        is_separator = has_separators and line.strip() == SEPARATOR
        if not is_separator:
            lines.append(text)
            num_chars += len(text)
            if num_chars > max_document_bytes():
                raise _too_long(path, f"line {number}", max_document_bytes())

        # does the document end here?
        if has_separators:
            is_end = is_separator
        else:
            is_blank = not line.strip()
            is_end = num_chars >= (CUT_CHARS if is_blank else 2 * CUT_CHARS)
        if is_end:
            yield from _join_lines(lines, problem)
            lines = []
            num_chars = 0
            problem = None
    yield from _join_lines(lines, problem)  # what is left at the end of the file


def _join_lines(lines, problem):
    """Yield the lines as one text without blank lines around it, or nothing if there is no text."""
    text = "".join(lines).replace("\r\n", "\n").strip("\n")
    if problem:
        yield "", problem
    elif text.strip():
        yield text, None


# -----------------------------------------------------------------------------
# Shared by the formats


@cache
def max_document_bytes():
    """Of a document that becomes rows in the memory of this machine, in each of its ranks."""
    return usable_memory() // MEMORY_FACTOR // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _too_long(path, where, max_bytes):
    hint = "cut it into several rows"
    if file_format(path) == "txt":
        hint = f"cut it into lines, for example: fold -s -w {CUT_CHARS} {path.name} > cut.txt"
    return UserError(
        f"{path}: {where} has a document of more than {max_bytes:,} bytes, the most for this memory "
        f"of {usable_memory():,}: one takes {MEMORY_FACTOR} times its size in each rank",
        hint,
    )


def read_lines(path: Path, max_bytes: int | None = None) -> Iterator[bytes]:
    """
    Yield the lines of a file as bytes, decompressed, without a byte order mark. UserError if one
    has more than max_bytes (None: what fits in memory).
    """
    max_bytes = max_bytes or max_document_bytes()
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        # pyarrow reads all frames of a .gz or .zst, and raises if the last one is cut short
        with io.BufferedReader(pa.input_stream(str(path), compression=codec), 1 << 20) as file:
            # Windows editors begin a file with a byte order mark
            line = file.readline(max_bytes + 1).removeprefix(codecs.BOM_UTF8)
            number = 1
            while line:
                if len(line) > max_bytes:
                    raise _too_long(path, f"line {number}", max_bytes)
                yield line
                line = file.readline(max_bytes + 1)
                number += 1
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({_first_line(error)})",
            "mend the file, or leave it out of --data",
        ) from error


def _check_text(value, where, field):
    """Return a text of at least one character that UTF-8 can hold. Else raise a BadRowError."""
    if not isinstance(value, str):
        found = "missing or null" if value is None else f"of type {type(value).__name__}"
        raise BadRowError(f"{where}: field {field} is {found}, needed: a string")
    if not value:
        raise BadRowError(f"{where}: field {field} is empty")
    try:
        value.encode("utf-8")  # JSON can spell half of a surrogate pair
    except UnicodeEncodeError as error:
        raise _not_utf8(where, f"field {field}", error) from error
    return value


def _not_utf8(where, what, error):
    return BadRowError(f"{where}: {what} is not valid UTF-8 ({error.reason})")


def _first_line(error):
    return str(error).split("\n")[0]
