"""Which documents are for training and which are held out, and the walk over them."""

import json
import os
import random
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.common import UserError
from nanochat.dataset import (
    Span,
    describe_skipped,
    describe_spans,
    get_both_spans,
    get_spans,
    iter_texts,
    read_documents,
)
from nanochat.download import NUM_SHARDS
from nanochat.download import shard_name as name_of

VAL = name_of(NUM_SHARDS - 1)
MIRROR = os.environ.get("NANOCHAT_DATA_DIR")  # read before a test clears it


@pytest.fixture(autouse=True)
def own_world(monkeypatch, tmp_path):
    """An empty base directory, and no mirror."""
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))


def write_shard(path, texts, row_group_size=1024):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": pa.array(texts, pa.string())}), path, row_group_size=row_group_size)
    return path.read_bytes()


def documents(data, split):
    return list(iter_texts(None if data is None else str(data), split))


# -----------------------------------------------------------------------------
# Training and held-out documents


def test_the_last_shard_by_name_is_for_validation(tmp_path):
    for i in range(3):
        write_shard(tmp_path / f"shard_{i:05d}.parquet", [f"{i}a", f"{i}b"])
    assert documents(tmp_path, "train") == ["0a", "0b", "1a", "1b"] and documents(tmp_path, "val") == ["2a", "2b"]


@pytest.mark.parametrize("num, num_val", [(2, 1), (3, 1), (59, 2), (1000, 50), (50_000, 2000)])
def test_of_other_files_the_last_documents_are_held_out(tmp_path, num, num_val):
    write_shard(tmp_path / "a.parquet", [str(i) for i in range(num)])
    assert documents(tmp_path / "a.parquet", "val") == [str(i) for i in range(num - num_val, num)]
    assert documents(tmp_path / "a.parquet", "train") == [str(i) for i in range(num - num_val)]


def test_the_held_out_part_may_span_several_files(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:02d}.txt").write_text(f"story {i}", encoding="utf-8")
    assert documents(tmp_path, "val") == [f"story {i}" for i in range(95, 100)]
    assert len(documents(tmp_path, "train")) == 95


def test_the_files_are_counted_once_for_both_splits(tmp_path, monkeypatch):
    for i in range(100):
        (tmp_path / f"{i:02d}.txt").write_text(f"story {i}", encoding="utf-8")
    counted = []
    monkeypatch.setattr(dataset, "count_rows", lambda path, field: counted.append(path) or 1)
    train, val = get_both_spans(str(tmp_path))
    assert counted == sorted(tmp_path.iterdir())
    assert [train, val] == [get_spans(str(tmp_path), split) for split in ("train", "val")]


def test_strict_reads_both_splits(tmp_path):
    for name, texts in (("a.parquet", ["a", "b"]), ("b.parquet", ["c", ""])):
        write_shard(tmp_path / name, texts)
    assert len(get_spans(str(tmp_path), "train", strict=True)) == 2
    with pytest.raises(UserError, match="row 1: field text is empty"):
        get_both_spans(str(tmp_path), strict=True)


def test_a_single_shard_is_divided(tmp_path):
    write_shard(tmp_path / "shard_00000.parquet", ["a", "b", "c"])
    assert (documents(tmp_path, "train"), documents(tmp_path, "val")) == (["a", "b"], ["c"])


def test_a_text_file_of_one_megabyte_trains(tmp_path):
    rng = random.Random(0)
    text = "\n\n".join(" ".join(rng.choices(["sun", "rain", "wind", "snow"], k=100)) for _ in range(2200))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    train, val = documents(tmp_path / "book.txt", "train"), documents(tmp_path / "book.txt", "val")
    assert len(text) > 900_000 and "\n\n".join(train + val) == text and len(train) > 200 and len(val) > 10


@pytest.mark.parametrize("num_files, num_groups, size", [*product((1, 2, 3), repeat=3)])
def test_every_document_is_given_once(tmp_path, num_files, num_groups, size):
    texts = [f"{i}" for i in range(num_files * num_groups * size)]
    for i in range(num_files):
        write_shard(tmp_path / f"part{i}.parquet", texts[i * num_groups * size:(i + 1) * num_groups * size], size)
    if len(texts) == 1:  # too little to hold something out
        assert documents(tmp_path, "train") == documents(tmp_path, "val") == texts
    else:
        assert documents(tmp_path, "train") + documents(tmp_path, "val") == texts


@pytest.mark.parametrize("num_shards, num_groups, size", [*product((2, 3), (1, 2, 3), (1, 2, 3))])
def test_every_document_of_the_shards_is_given_once(tmp_path, num_shards, num_groups, size):
    texts = [f"{i}" for i in range(num_shards * num_groups * size)]
    for i in range(num_shards):
        write_shard(tmp_path / name_of(i), texts[i * num_groups * size:(i + 1) * num_groups * size], size)
    assert documents(tmp_path, "train") + documents(tmp_path, "val") == texts
    assert len(documents(tmp_path, "val")) == num_groups * size


def test_reading_goes_on_from_any_row(tmp_path):
    write_shard(tmp_path / "a.parquet", [f"{i}" for i in range(20)], row_group_size=3)
    span = Span(tmp_path / "a.parquet", 5, 18)
    whole = list(read_documents(span))
    assert whole == [(i, f"{5 + i}") for i in range(13)]
    assert all(list(read_documents(span, row)) == whole[row:] for row in range(14))


def test_rows_without_text_are_skipped_and_keep_their_row(tmp_path):
    write_shard(tmp_path / "a.parquet", ["a", "", None, "b", ""])
    span = Span(tmp_path / "a.parquet", 0, 4)
    assert list(read_documents(span)) == [(0, "a"), (3, "b")]
    assert describe_skipped([span]) == f"2 skipped, first in each file: {span.path}: row 1: field text is empty"


def test_a_row_without_text_is_counted_once_in_many_epochs(tmp_path):
    write_shard(tmp_path / "a.parquet", ["a", None, "b", None])
    span = Span(tmp_path / "a.parquet", 0, 4)
    for start in (2, 0, 0):
        list(read_documents(span, start))
    assert span.skipped.count == 1  # row 3; row 1 lies before the place from which a resumed run went on
    assert describe_skipped([Span(span.path, 0, 1)]) == "none"


def test_strict_stops_at_the_first_row_without_text(tmp_path):
    write_shard(tmp_path / "a.parquet", ["a", "b"])
    write_shard(tmp_path / "b.parquet", ["a", None, "b", ""])
    with pytest.raises(UserError, match="b.parquet: row 1: field text is missing .*\nhint: mend or delete that row"):
        get_spans(str(tmp_path), "train", strict=True)
    with pytest.raises(UserError, match="b.parquet: row 3: field text is empty"):
        get_spans(str(tmp_path), "val", strict=True)
    assert get_spans(str(tmp_path / "a.parquet"), "train", strict=True)


def test_a_corpus_of_empty_texts_is_an_error(tmp_path):
    write_shard(tmp_path / "a.parquet", ["", None, ""])
    with pytest.raises(UserError, match="holds no documents; rows without text: 2 skipped, .* row 0: field text"):
        documents(tmp_path, "train")


def test_the_text_may_be_in_another_field(tmp_path):
    pq.write_table(pa.table({"text": ["x"] * 3, "content": ["a", "b", "c"]}), tmp_path / "a.parquet")
    assert list(iter_texts(str(tmp_path), "train", "content")) == ["a", "b"]
    described = [describe_spans(get_spans(str(tmp_path), "train", field)) for field in ("text", "content")]
    assert described[0] != described[1]


# -----------------------------------------------------------------------------
# Where the corpus is


def test_data_may_be_a_folder_or_a_glob(tmp_path):
    for name in ("b/deep/two.jsonl", "a/one.jsonl", "a/README.md", "a/half.jsonl.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}), encoding="utf-8")
    both = ["a/one.jsonl", "b/deep/two.jsonl"]
    for data in (tmp_path, tmp_path / "**" / "*.jsonl", tmp_path / "*"):
        assert documents(data, "train") + documents(data, "val") == both


def test_hidden_files_and_folders_are_left_out_and_counted(tmp_path, capsys):
    for name in ("a.txt", "._a.txt", ".ipynb_checkpoints/a-checkpoint.txt", "b/.cache/deep/c.jsonl", ".DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16\x07" if name.startswith("._") else b"one\n<|endoftext|>\ntwo")
    assert documents(tmp_path, "train") + documents(tmp_path, "val") == ["one", "two"]
    hidden = f"note: 3 hidden files are left out, such as {tmp_path / '._a.txt'}\n"
    assert capsys.readouterr().out == hidden
    assert documents(tmp_path / ".ipynb_checkpoints", "train") == ["one"]  # as it was asked for


@pytest.mark.parametrize("name, words", [("nothing.txt", "does not exist"), ("*.txt", "does not exist"),
                                         ("", "holds no text file")])
def test_data_that_is_not_there_is_named(tmp_path, name, words):
    with pytest.raises(UserError, match=f"--data=.* {words}\nhint: needed"):
        get_spans(str(tmp_path / name), "train")


def test_no_corpus_says_the_three_ways_to_one():
    with pytest.raises(UserError, match="python -m nanochat.dataset -n 8.*--data=PATH.*NANOCHAT_DATA_DIR"):
        get_spans(None, "train")


def test_downloaded_shards_without_the_validation_shard_are_refused(tmp_path):
    for i in range(3):
        write_shard(tmp_path / "base" / "base_data" / name_of(i), ["a", "b"])
    with pytest.raises(UserError, match=f"needed: some for training, and {VAL} for validation"):
        get_spans(None, "val")


def test_the_mirror_comes_before_downloads(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    with pytest.raises(UserError, match="has no pretrain/shard_"):
        get_spans(None, "train")
    write_shard(tmp_path / "pretrain" / "shard_00000.parquet", ["a", "b"])
    write_shard(tmp_path / "pretrain" / "shard_00001.parquet", ["c"])
    assert (documents(None, "train"), documents(None, "val")) == (["a", "b"], ["c"])


@pytest.mark.skipif(MIRROR is None, reason="NANOCHAT_DATA_DIR is not set")
def test_the_real_mirror_has_its_documents(monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", MIRROR)
    spans = get_spans(None, "train") + get_spans(None, "val")
    assert sum(1 for span in spans for _ in read_documents(span)) == sum(span.stop - span.start for span in spans) > 1
