"""Downloads against a server that misbehaves: a file is whole and right, or it is not there and the user knows why."""

import hashlib
import os
import random
import threading
from itertools import repeat
from pathlib import Path

import pytest
from loopback import Fault, FaultServer

from nanochat.common import UserError
from nanochat.download import MAX_ASKED_WAIT_S, DiskFullError, download_file, hub_url

DATA = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
F = "/f.bin"


@pytest.fixture(autouse=True)
def no_proxy_no_token(monkeypatch):
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server():
    with FaultServer({F: DATA}) as server:
        yield server


@pytest.fixture
def hub(monkeypatch):
    """A server that is the Hugging Face hub: it states the sha256 of what it serves."""
    with FaultServer({F: DATA}, hub=True) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def fetch(server, tmp_path, **options):
    """Download F into tmp_path without waiting; returns (path, the waits that were asked for)."""
    waits = []
    return download_file(server.url + F, tmp_path / "f.bin", **{"sleep": waits.append, "timeout": 5, **options}), waits


def names(tmp_path):
    return sorted(path.name for path in tmp_path.iterdir())


# -----------------------------------------------------------------------------
# The file arrives


def test_a_plain_download_leaves_only_the_file(server, tmp_path):
    path, waits = fetch(server, tmp_path)
    assert path.read_bytes() == DATA and names(tmp_path) == ["f.bin"] and waits == []


def test_a_whole_file_is_not_asked_for_again(server, tmp_path):
    fetch(server, tmp_path, sha256=SHA256)
    fetch(server, tmp_path, sha256=SHA256)
    assert len(server.requests) == 1


def test_a_wrong_file_in_the_place_is_replaced(server, tmp_path):
    (tmp_path / "f.bin").write_bytes(b"old")
    path, _ = fetch(server, tmp_path, size=len(DATA))
    assert path.read_bytes() == DATA


def test_a_broken_connection_goes_on_by_range(server, tmp_path):
    server.faults[F] = [Fault(cut=200_000), Fault(cut=70_000)]
    path, waits = fetch(server, tmp_path)
    first, second, third = server.ranges(F)
    assert path.read_bytes() == DATA and len(waits) == 2
    assert first is None and second == "bytes=196608-" and third == "bytes=262144-"  # 3 and 4 chunks of 64 KiB


def test_tries_that_bring_new_bytes_are_not_counted(server, tmp_path):
    server.faults[F] = repeat(Fault(cut=70_000), 4)  # 4 breaks in a row, each a chunk further
    path, _ = fetch(server, tmp_path, retries=1)
    assert path.read_bytes() == DATA


def test_a_stalled_connection_times_out_and_goes_on(server, tmp_path):
    server.faults[F] = [Fault(stall=150_000)]
    path, _ = fetch(server, tmp_path, timeout=0.3)
    assert path.read_bytes() == DATA and server.ranges(F)[1] == "bytes=131072-"


def test_a_server_without_ranges_starts_over(server, tmp_path):
    server.faults[F] = [Fault(cut=150_000), Fault(ranges=False)]
    path, _ = fetch(server, tmp_path)
    assert path.read_bytes() == DATA


def test_a_range_from_the_wrong_place_is_not_appended(server, tmp_path):
    server.faults[F] = [Fault(cut=150_000), Fault(shift=100)]
    path, _ = fetch(server, tmp_path)
    assert path.read_bytes() == DATA and server.ranges(F) == [None, "bytes=131072-", None]


def test_a_part_of_a_file_that_has_changed_is_dropped(server, tmp_path):
    server.faults[F] = repeat(Fault(cut=150_000))
    with pytest.raises(UserError):
        fetch(server, tmp_path, retries=0)
    server.files[F], server.faults[F] = DATA[::-1], []
    assert fetch(server, tmp_path)[0].read_bytes() == DATA[::-1]


def test_a_part_of_unknown_origin_is_not_continued(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(b"x" * 1000)
    assert fetch(server, tmp_path)[0].read_bytes() == DATA
    assert server.ranges(F) == [None]


def test_a_part_that_lacks_only_the_rename_is_taken(server, tmp_path):
    def refuse(path):
        raise KeyError  # stands for a kill after the last byte
    with pytest.raises(KeyError):
        fetch(server, tmp_path, check=refuse)
    assert fetch(server, tmp_path)[0].read_bytes() == DATA
    assert server.ranges(F) == [None, "bytes=300000-"]


def test_two_that_want_the_same_file_make_one_download(server, tmp_path):
    server.faults[F] = [Fault(pace_s=0.03)]
    threads = [threading.Thread(target=fetch, args=(server, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f.bin").read_bytes() == DATA and len(server.requests) == 1


# -----------------------------------------------------------------------------
# The server asks to wait


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured(server, tmp_path, status):
    server.faults[F] = [Fault(status=status, headers={"Retry-After": "7"})]
    assert fetch(server, tmp_path)[1] == [7]


def test_retry_after_may_be_a_date_and_is_bounded(server, tmp_path):
    dates = ["Fri, 01 Jan 2100 00:00:00 GMT", "Sat, 01 Jan 2000 00:00:00 GMT"]
    server.faults[F] = [Fault(status=429, headers={"Retry-After": date}) for date in dates]
    assert fetch(server, tmp_path)[1] == [MAX_ASKED_WAIT_S, 0]


def test_without_retry_after_the_waits_double(server, tmp_path):
    server.faults[F] = repeat(Fault(status=503), 4)
    waits = fetch(server, tmp_path)[1]
    assert [round(wait / 2**i, 6) for i, wait in enumerate(waits)] == [pytest.approx(0.875, abs=0.125)] * 4


# -----------------------------------------------------------------------------
# The file does not arrive


@pytest.mark.parametrize("fault, words", [
    (Fault(cut=100_000, ranges=False), "connection"),
    (Fault(headers={"Content-Length": "300100"}), "connection"),  # promises more than it has
    (Fault(status=503), "503"),
    (Fault(status=500), "500"),
], ids=["cut", "promises more", "503", "500"])
def test_what_never_works_is_given_up_with_the_cause(server, tmp_path, fault, words):
    server.faults[F] = repeat(fault)
    with pytest.raises(UserError, match=f"f.bin: gave up on .*{words}.*\nhint: the same command (goes on|tries)"):
        fetch(server, tmp_path, retries=3)
    assert "f.bin" not in names(tmp_path)


def test_a_promise_of_less_than_the_whole_is_seen_by_the_size(server, tmp_path):
    server.faults[F] = repeat(Fault(headers={"Content-Length": "1000"}))
    with pytest.raises(UserError, match="offers 1000 bytes where 300000 belong"):
        fetch(server, tmp_path, size=len(DATA), retries=2)
    assert "f.bin" not in names(tmp_path)


def test_wrong_bytes_of_the_right_number_are_seen_by_the_hash(server, tmp_path):
    server.faults[F] = [Fault(flip=True)]
    assert fetch(server, tmp_path, sha256=SHA256)[0].read_bytes() == DATA
    (tmp_path / "f.bin").unlink()
    server.faults[F] = repeat(Fault(flip=True))
    with pytest.raises(UserError, match="damaged: sha256"):
        fetch(server, tmp_path, sha256=SHA256, retries=2)
    assert "f.bin" not in names(tmp_path) and "f.bin.part" not in names(tmp_path)


def test_a_body_that_the_check_refuses_is_not_renamed(server, tmp_path):
    def check(path):
        raise ValueError("no parquet")
    with pytest.raises(UserError, match="no parquet"):
        fetch(server, tmp_path, check=check, retries=1)
    assert "f.bin" not in names(tmp_path)


def test_a_missing_file_ends_at_once_with_its_name_and_a_cure(server, tmp_path):
    del server.files[F]
    with pytest.raises(UserError, match="f.bin: not found at http.*404.*\nhint: set HF_ENDPOINT"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_no_access_asks_for_a_token(server, tmp_path):
    server.faults[F] = [Fault(status=401)]
    with pytest.raises(UserError, match="no access.*\nhint: set HF_TOKEN"):
        fetch(server, tmp_path)


def test_no_server_is_a_connection_error_in_one_line(tmp_path):
    with pytest.raises(UserError, match="gave up on .* the connection broke: .*refused\nhint"):
        download_file("http://127.0.0.1:9/f.bin", tmp_path / "f.bin", retries=1, sleep=lambda seconds: None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a full disk")
def test_a_full_disk_is_one_line(server, tmp_path):
    os.symlink("/dev/full", tmp_path / "f.bin.part")
    with pytest.raises(DiskFullError, match="f.bin: the disk is full\nhint: make room"):
        fetch(server, tmp_path)
    assert "f.bin" not in names(tmp_path)


# -----------------------------------------------------------------------------
# The hub


def test_hub_url_follows_the_endpoint(monkeypatch):
    assert hub_url("a/b", "x y/z.json") == "https://huggingface.co/datasets/a/b/resolve/main/x%20y/z.json"
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror:8000/hf/")
    assert hub_url("a/b", "z", revision="refs/pr/1", repo_type="model") == "http://mirror:8000/hf/a/b/resolve/refs%2Fpr%2F1/z"


@pytest.mark.parametrize("fault", [Fault(flip=True), Fault(headers={"Content-Length": "1000"})], ids=["flip", "short"])
def test_what_the_hub_states_is_checked(hub, tmp_path, fault):
    hub.faults[F] = [fault]
    path, waits = fetch(hub, tmp_path)
    assert path.read_bytes() == DATA and len(waits) == 1


def test_storage_without_etag_resumes_by_the_sha256_of_the_hub(hub, tmp_path):
    hub.faults[F] = [Fault(cut=200_000, etag=False), Fault(etag=False)]
    path, _ = fetch(hub, tmp_path)
    assert path.read_bytes() == DATA and hub.ranges(F)[1] == "bytes=196608-"


def test_the_token_goes_to_the_hub_and_not_beyond_a_redirect(hub, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    elsewhere = server.url.replace("127.0.0.1", "localhost") + F
    hub.faults[F] = [Fault(status=302, headers={"Location": elsewhere, "X-Linked-Etag": f'"{SHA256}"'})]
    assert fetch(hub, tmp_path)[0].read_bytes() == DATA
    assert hub.requests[0][1]["Authorization"] == "Bearer secret"
    assert len(server.requests) == 1 and "Authorization" not in server.requests[0][1]


def test_the_token_is_not_sent_to_other_hosts(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(server, tmp_path)
    assert "Authorization" not in server.requests[0][1]


def test_a_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    path = download_file("http://far.invalid" + F, tmp_path / "f.bin", timeout=5)
    assert path.read_bytes() == DATA and server.requests[0][1]["Host"] == "far.invalid"
