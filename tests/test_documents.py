"""The rows of one file, format by format: what is read, what is refused and how the refusal names the place."""

import base64
import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nanochat.common import UserError
from nanochat.documents import _check_groups, count_rows, file_format, open_parquet, read_lines, read_rows

AWKWARD = ["plain", "  two\n\nparagraphs\n", "<|endoftext|> inside", "x" * 50_000,
           "naïve 你好 🙂 e\u0301", "\u2028\x00\x85 controls"]

# Two rows of a column `text` of the type JSON, 'one "é"' and null, as COPY of DuckDB 2.0.1 wrote them
DUCKDB_JSON = (
    "UEFSMRUAFWoVOiwVBBUAFQYVBgAANRghAAAAQQEAdgEAPAwAAAAib25lIFwiw6lcIiIVAhksNQAYDWR1Y2tkYl9zY2hlbWEVAgAVDCUCGAR0ZX"
    "h0JSZMzAAAABYEGRwZHCYAHBUMGRUAGRgEdGV4dBUCFgQWjAEWXCYIPBgMIm9uZSBcIsOpXCIiGAwib25lIFwiw6lcIiIWAigMIm9uZSBcIsOp"
    "XCIiGAwib25lIFwiw6lcIiIREQAZHBUAFQAVAgAAABaMARYEJggWXAAoKER1Y2tEQiB2ZXJzaW9uIHYyLjAuMSAoYnVpbGQgOGQ3ODExNGU5MC"
    "kZHBwAAADMAAAAUEFSMQ=="
)


def write_parquet(path, texts, row_group_size=1024, column_type=None):
    pq.write_table(pa.table({"text": pa.array(texts, column_type)}), path, row_group_size=row_group_size)
    return path


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    return path


def jsonl(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def texts_of(path):
    return [text for _, text, _ in read_rows(path, 0, count_rows(path))]


def problems_of(path):
    """{row: what is wrong with it}, of the rows that hold no text."""
    return {row: problem for row, _, problem in read_rows(path, 0, count_rows(path)) if problem}


@pytest.mark.parametrize("name, kind", [("a.parquet", "parquet"), ("a.b.TXT", "txt"), ("a.jsonl.zst", "jsonl"),
                                        ("a.txt.gz", "txt"), ("a.parquet.gz", None), ("README.md", None),
                                        ("txt", None), ("a.txt.part", None)])
def test_the_name_tells_the_format(tmp_path, name, kind):
    assert file_format(tmp_path / name) == kind


# -----------------------------------------------------------------------------
# What is read


@pytest.mark.parametrize("column_type", [
    pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()),
    pa.dictionary(pa.uint32(), pa.large_string())], ids=str)
def test_parquet_gives_back_its_texts(tmp_path, column_type):
    assert texts_of(write_parquet(tmp_path / "a.parquet", AWKWARD, 2, column_type)) == AWKWARD


@pytest.mark.skipif(not hasattr(pa, "json_"), reason="this pyarrow cannot write a column of JSON")
def test_a_column_of_json_holds_json_strings(tmp_path):
    """As DuckDB writes its type JSON."""
    values = [json.dumps(text) for text in AWKWARD] + [None, "null", '{"a": 1}', "7"]
    path = write_parquet(tmp_path / "a.parquet", pa.array(values, pa.string()).cast(pa.json_()))
    assert texts_of(path) == AWKWARD + [""] * 4
    assert [problem.split("field ")[1] for problem in problems_of(path).values()] == [
        "text is missing or null, needed: a string", "text is missing or null, needed: a string",
        "text is of type dict, needed: a string", "text is of type int, needed: a string"]


def test_a_column_of_json_is_read_as_duckdb_writes_it(tmp_path):
    path = write(tmp_path / "a.parquet", base64.b64decode(DUCKDB_JSON))
    assert texts_of(path) == ['one "é"', ""] and list(problems_of(path)) == [1]


def test_another_column_or_field_can_be_read(tmp_path):
    pq.write_table(pa.table({"text": ["x", "y"], "content": ["a", None]}), tmp_path / "a.parquet")
    write(tmp_path / "a.jsonl", '{"text": "x", "content": "a"}\n{"text": "y"}\n')
    for name in ("a.parquet", "a.jsonl"):
        path = tmp_path / name
        assert [text for _, text, _ in read_rows(path, 0, count_rows(path, "content"), "content")] == ["a", ""]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.ZstdCompressor().compress], ids=["", "gz", "zst"])
def test_jsonl_gives_back_its_texts(tmp_path, pack):
    suffix = {bytes: "", gzip.compress: ".gz"}.get(pack, ".zst")
    assert texts_of(write(tmp_path / f"a.jsonl{suffix}", pack(jsonl(AWKWARD).encode()))) == AWKWARD


def test_all_frames_of_a_compressed_file_are_read(tmp_path):
    frame = zstandard.ZstdCompressor().compress(jsonl(AWKWARD).encode())
    assert texts_of(write(tmp_path / "a.jsonl.zst", frame + frame)) == AWKWARD + AWKWARD
    assert texts_of(write(tmp_path / "A.JSONL.ZST", frame)) == AWKWARD


def test_jsonl_takes_what_editors_leave(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "a", "id": 1}\r\n\r\n{"text": "b"}')
    assert texts_of(path) == ["a", "", "b"]  # the empty line is a row without text


@pytest.mark.parametrize("start, stop", [(0, 0), (0, 10), (3, 7), (9, 10), (4, 4)])
def test_any_range_of_rows_can_be_read(tmp_path, start, stop):
    texts = [f"{i}" for i in range(10)]
    for path in (write_parquet(tmp_path / "a.parquet", texts, row_group_size=3),
                 write(tmp_path / "a.jsonl", jsonl(texts)),
                 write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(texts))):
        assert list(read_rows(path, start, stop)) == [(i, texts[i], None) for i in range(start, stop)]


def test_txt_is_separated_by_its_marker_lines(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\n<|endoftext|>\n\n<|endoftext|>\r\n  three <|endoftext|> inside\n")
    assert texts_of(path) == ["one\n\ntwo", "  three <|endoftext|> inside"]


def test_txt_without_markers_is_cut_at_blank_lines(tmp_path):
    paragraphs = [f"{i}: " + "word " * 250 for i in range(40)]  # about 1,250 characters each
    texts = texts_of(write(tmp_path / "a.txt", "\n\n".join(paragraphs)))
    assert "\n\n".join(texts) == "\n\n".join(paragraphs)
    assert all(4000 <= len(text) < 5300 for text in texts[:-1])


def test_txt_without_blank_lines_is_cut_at_line_ends(tmp_path):
    lines = [f"{i:04d} " + "w" * 95 for i in range(500)]
    texts = texts_of(write(tmp_path / "a.txt", "\n".join(lines)))
    assert "\n".join(texts) == "\n".join(lines) and all(8000 <= len(text) < 8200 for text in texts[:-1])


def test_txt_in_one_line_is_one_document(tmp_path):
    text = "你好🙂a" * 20_000
    assert texts_of(write(tmp_path / "a.txt", text)) == [text]


def test_an_empty_txt_has_no_rows(tmp_path):
    assert texts_of(write(tmp_path / "a.txt", "\n \n\n")) == []


def test_memory_stays_flat_over_a_parquet_file(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [os.urandom(4000).hex() for _ in range(3000)], row_group_size=50)
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() for _ in read_rows(path, 0, 3000)) - before
    assert path.stat().st_size > 12e6 and peak < 6e6  # 24 MB of text, 0.4 MB a row group, a few read ahead


def test_a_document_that_does_not_fit_in_memory_is_named(tmp_path):
    path = write(tmp_path / "a.txt", "short\n" + "x" * 2000)
    with pytest.raises(UserError, match="a.txt: line 2 has a document of more than 1,000 bytes.*\nhint: .* fold -s"):
        list(read_lines(path, max_bytes=1000))
    assert [len(line) for line in read_lines(path, max_bytes=2000)] == [6, 2000]
    path = write_parquet(tmp_path / "a.parquet", [os.urandom(500).hex() for _ in range(9)])
    with open_parquet(path) as file:
        _check_groups(path, file, "text", max_bytes=2000)
        with pytest.raises(UserError, match="a.parquet: row group 0 has .*\nhint: cut it into several rows"):
            _check_groups(path, file, "text", max_bytes=900)
    assert count_rows(write_parquet(tmp_path / "empty.parquet", [], column_type=pa.string())) == 0  # bytes, no rows


# -----------------------------------------------------------------------------
# Rows without text: the others are read, and the problem names the place


@pytest.mark.parametrize("line, words", [
    (b'{"text": 5}', "a.jsonl:2: field text is of type int, needed: a string"),
    (b'{"text": null}', "a.jsonl:2: field text is missing or null, needed: a string"),
    (b'{"text": ""}', "a.jsonl:2: field text is empty"),
    (b'{"txt": "a"}', "a.jsonl:2: field text is missing or null, needed: a string"),
    (b'"a"', "a.jsonl:2: field text is missing or null, needed: a string"),
    (b'{"text": "a"', "a.jsonl:2: not JSON"),
    (b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl:2: not JSON"),
    (b'{"text": "caf\xe9"}', "a.jsonl:2: the row is not valid UTF-8"),
    (b'{"text": "\\ud800"}', "a.jsonl:2: field text is not valid UTF-8"),
])
def test_a_bad_jsonl_row_is_named(tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "too"}\n')
    assert texts_of(path) == ["fine", "", "too"]
    assert list(problems_of(path)) == [1] and words in problems_of(path)[1]


def test_a_null_and_an_empty_text_in_parquet_are_named_by_row(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["a"] * 700 + [None, "", "b"], row_group_size=300)
    assert texts_of(path)[698:] == ["a", "a", "", "", "b"]
    assert problems_of(path) == {700: f"{path}: row 700: field text is missing or null, needed: a string",
                                 701: f"{path}: row 701: field text is empty"}


def test_bad_utf8_in_parquet_is_named_by_row(tmp_path):
    raw = pa.array([b"fine", b"caf\xe9", b"too"], pa.binary())
    path = write_parquet(tmp_path / "a.parquet", pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2]))
    assert texts_of(path) == ["fine", "", "too"] and "row 1: field text is not valid UTF-8" in problems_of(path)[1]


def test_a_document_with_bad_utf8_in_txt_is_named_by_line(tmp_path):
    path = write(tmp_path / "a.txt", b"fine\n<|endoftext|>\nline 3\ncaf\xe9 au lait\n<|endoftext|>\ntoo\n")
    assert texts_of(path) == ["fine", "", "too"]
    assert problems_of(path) == {1: f"{path}:4: the text is not valid UTF-8 (invalid continuation byte)"}


# -----------------------------------------------------------------------------
# Files that are refused


@pytest.mark.parametrize("table, words", [
    ({"words": ["a"]}, "field text is missing.*\nhint: its columns are: words; --text_field=NAME"),
    ({"text": [1]}, "field text is int64, needed: a string column"),
    ({"text": [b"a"]}, "field text is binary, needed: a string column")])
def test_parquet_without_a_text_column_is_refused(tmp_path, table, words):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=words):
        count_rows(tmp_path / "a.parquet")


def test_jsonl_in_which_no_row_has_the_field_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", '\n{"content": "a", "id": 1}\n{"content": "b"}\n')
    with pytest.raises(UserError, match="no row has a field text\nhint: its first row has: content, id; --text_field"):
        count_rows(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.txt.zst"])
def test_a_file_cut_short_is_refused(tmp_path, name):
    data = jsonl([os.urandom(500).hex() for _ in range(100)]).encode()
    if name == "a.parquet":
        data = write_parquet(tmp_path / name, [data.decode()]).read_bytes()
    else:
        data = gzip.compress(data) if name.endswith("gz") else zstandard.ZstdCompressor().compress(data)
    with pytest.raises(UserError, match=f"{name}: (not a readable|cannot be read)"):
        texts_of(write(tmp_path / name, data[:-20]))


def test_parquet_with_damaged_pages_is_refused(tmp_path):
    table = pa.table({"text": [os.urandom(500).hex() for _ in range(100)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", write_page_checksum=True)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    data[2000] ^= 1
    with pytest.raises(UserError, match="a.parquet: damaged in row group 0"):
        texts_of(write(tmp_path / "a.parquet", bytes(data)))
