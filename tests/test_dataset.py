"""Which documents are for training and which are held out, the walk over them, and the download of the shards."""

import json
import os
import random
import subprocess
import sys
import time
from itertools import product, repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import Fault, FaultServer

from nanochat.common import UserError, run_script
from nanochat.dataset import NUM_SHARDS, REPO_ID, Span, download_shards, get_spans, iter_texts, main, read_documents
from nanochat.dataset import shard_name as name_of
from nanochat.download import DiskFullError

ROOT = Path(__file__).parent.parent
VAL = name_of(NUM_SHARDS - 1)
MIRROR = os.environ.get("NANOCHAT_DATA_DIR")  # read before a test clears it


@pytest.fixture(autouse=True)
def own_world(monkeypatch, tmp_path):
    """An empty base directory, no mirror, no proxy, no token."""
    for name in ("NANOCHAT_DATA_DIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
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


def test_empty_texts_are_skipped_and_keep_their_row(tmp_path, caplog):
    write_shard(tmp_path / "a.parquet", ["a", "", "", "b", "c"])
    caplog.set_level("INFO")
    assert list(read_documents(Span(tmp_path / "a.parquet", 0, 4))) == [(0, "a"), (3, "b")]
    assert "2 empty texts skipped" in caplog.text


def test_a_corpus_of_empty_texts_is_an_error(tmp_path):
    write_shard(tmp_path / "a.parquet", ["", "", ""])
    with pytest.raises(UserError, match="every document for train is empty"):
        documents(tmp_path, "train")


# -----------------------------------------------------------------------------
# Where the corpus is


def test_data_may_be_a_folder_or_a_glob(tmp_path):
    for name in ("b/deep/two.jsonl", "a/one.jsonl", "a/README.md", "a/half.jsonl.part"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}), encoding="utf-8")
    both = ["a/one.jsonl", "b/deep/two.jsonl"]
    for data in (tmp_path, tmp_path / "**" / "*.jsonl", tmp_path / "*"):
        assert documents(data, "train") + documents(data, "val") == both


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


# -----------------------------------------------------------------------------
# The download of the shards


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Shards 0 to 2 and the validation shard, about 300 KB each, where the hub has them."""
    rng, files = random.Random(0), {}
    for name in [*map(name_of, range(3)), VAL]:
        texts = [rng.randbytes(1000).hex() for _ in range(250)]
        files[address(name)] = write_shard(tmp_path / "source" / name, texts)
    with FaultServer(files, hub=True) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def address(name):
    return f"/datasets/{REPO_ID}/resolve/main/{name}"


def on_disk(tmp_path):
    return sorted(path.name for path in (tmp_path / "base" / "base_data").iterdir())


def test_shards_arrive_whole_and_only_once(hub, tmp_path):
    hub.faults = {address(name_of(0)): [Fault(cut=200_000), Fault(flip=True)], address(VAL): [Fault(status=503)]}
    download_shards(2, workers=2, sleep=lambda seconds: None)
    num_requests = len(hub.requests)
    download_shards(2, workers=2)
    assert on_disk(tmp_path) == [name_of(0), name_of(1), VAL] and len(hub.requests) == num_requests
    folder = tmp_path / "base" / "base_data"
    assert all((folder / name).read_bytes() == hub.files[address(name)] for name in on_disk(tmp_path))


def test_a_shard_that_is_no_parquet_is_not_kept(hub, tmp_path):
    hub.files[address(name_of(0))] = b"<html>an error page with status 200</html>"
    with pytest.raises(UserError, match=f"1 of 2 shards are missing: {name_of(0)}\nhint: .*nanochat.dataset -n 1"):
        download_shards(1, retries=1, sleep=lambda seconds: None)
    assert VAL in on_disk(tmp_path) and name_of(0) not in on_disk(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a full disk")
def test_a_full_disk_ends_the_whole_download(hub, tmp_path):
    (tmp_path / "base" / "base_data").mkdir(parents=True)
    for name in (VAL, name_of(0)):
        os.symlink("/dev/full", tmp_path / "base" / "base_data" / f"{name}.part")
    with pytest.raises(DiskFullError):
        download_shards(3, workers=1)
    assert address(name_of(2)) not in [path for path, _ in hub.requests]


def test_the_command_resumes_after_a_kill(hub, tmp_path, capsys):
    hub.faults[address(VAL)] = [Fault(pace_s=0.5)]
    part = tmp_path / "base" / "base_data" / f"{VAL}.part"
    process = subprocess.Popen([sys.executable, "-m", "nanochat.dataset", "-n", "1", "-w", "1"], cwd=ROOT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (part.exists() and part.stat().st_size >= 1 << 17):
        time.sleep(0.01)
    process.kill()  # SIGKILL
    process.wait()
    assert on_disk(tmp_path) == [f"{VAL}.part", f"{VAL}.part.id", f"{VAL}.part.lock"]
    reached = part.stat().st_size
    main(["-n", "1", "-w", "1"])  # another process
    assert "1 training shards and the validation shard are ready" in capsys.readouterr().out
    assert hub.ranges(address(VAL)) == [None, f"bytes={reached}-"] and reached > 0
    assert on_disk(tmp_path) == [name_of(0), VAL]


def test_the_command_fails_by_name_when_a_shard_is_missing(hub, tmp_path, capsys):
    hub.faults[address(name_of(1))] = repeat(Fault(status=404))
    with pytest.raises(SystemExit) as end:
        run_script(lambda: main(["-n", "3", "-w", "2"]))
    assert end.value.code == 2 and f"error: 1 of 4 shards are missing: {name_of(1)}" in capsys.readouterr().err
    assert on_disk(tmp_path) == sorted([name_of(0), f"{name_of(1)}.part.lock", name_of(2), VAL])


@pytest.mark.parametrize("args", [["-n", "0"], ["-n", "6543"], ["-n", "1", "-w", "0"]])
def test_a_wrong_number_of_shards_is_refused(args):
    with pytest.raises(UserError, match="needed: 1 to 6542 shards"):
        main(args)


def test_the_command_with_a_mirror_downloads_nothing(hub, tmp_path, monkeypatch, capsys):
    write_shard(tmp_path / "mirror" / "pretrain" / "shard_00000.parquet", ["a", "b"])
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "mirror"))
    main(["-n", "1"])
    assert "1 shards are there, nothing is downloaded" in capsys.readouterr().out and hub.requests == []
