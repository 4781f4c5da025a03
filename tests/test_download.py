"""Downloads against a server that misbehaves: a file is whole and right, or it is not there and the user knows why."""

import errno
import hashlib
import logging
import os
import random
import subprocess
import sys
import threading
import time
from itertools import repeat
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants
from loopback import Fault, FaultServer

from nanochat.common import UserError, run_script
from nanochat.dataset import main
from nanochat.download import (
    MAX_WAIT_S,
    NUM_SHARDS,
    NUM_TRIES,
    REPO_ID,
    DiskError,
    download_shards,
    download_url,
    fetch_shard,
    shard_name,
)

ROOT = Path(__file__).parent.parent
DATA = random.Random(0).randbytes(300_000)
SHA256 = hashlib.sha256(DATA).hexdigest()
F = "/f.bin"
VAL = shard_name(NUM_SHARDS - 1)


def no_wait(seconds):
    pass


@pytest.fixture(autouse=True)
def own_world(monkeypatch, tmp_path):
    """An empty base directory, no mirror, no proxy, no token, short timeouts."""
    for name in ("NANOCHAT_DATA_DIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)


# -----------------------------------------------------------------------------
# A single file of any host


@pytest.fixture
def server():
    with FaultServer({F: DATA}) as server:
        yield server


def fetch(server, tmp_path, **options):
    """Download F into tmp_path without waiting; returns (path, the waits that were asked for)."""
    waits = []
    path = download_url(server.url + F, tmp_path / "f.bin", **{"sleep": waits.append, "timeout": 5, **options})
    return path, waits


def names(folder):
    """The files in a folder, without locks."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".lock")


def test_a_plain_download_leaves_only_the_file(server, tmp_path):
    path, waits = fetch(server, tmp_path)
    assert path.read_bytes() == DATA and names(tmp_path) == ["f.bin"] and waits == []


def test_a_whole_file_is_not_asked_for_again(server, tmp_path):
    fetch(server, tmp_path, sha256=SHA256)
    fetch(server, tmp_path, sha256=SHA256)
    assert len(server.requests) == 1


@pytest.mark.parametrize("fault", [Fault(cut=150_000), Fault(stall=150_000), Fault(stall=0), Fault(status=500),
                                   Fault(status=503), Fault(headers={"Content-Length": "300100"})], ids=str)
def test_a_fault_that_passes_is_overcome(server, tmp_path, fault):
    server.faults[F] = [fault, fault]
    path, waits = fetch(server, tmp_path, timeout=0.3)
    assert path.read_bytes() == DATA and len(waits) == 2


@pytest.mark.parametrize("fault, words", [
    (Fault(cut=100_000), "(closed|ChunkedEncodingError|ConnectionError)"), (Fault(stall=0), "timed out"),
    (Fault(status=503), "HTTP 503"), (Fault(status=500), "HTTP 500")], ids=["cut", "stall", "503", "500"])
def test_a_fault_that_stays_is_given_up_with_the_cause(server, tmp_path, fault, words):
    server.faults[F] = repeat(fault)
    with pytest.raises(UserError, match=f"f.bin: gave up after {NUM_TRIES} tries: .*{words}(.*\n)+hint: run the same"):
        fetch(server, tmp_path, timeout=0.3)
    assert "f.bin" not in names(tmp_path)


def test_wrong_bytes_of_the_right_number_are_seen_by_the_hash(server, tmp_path):
    server.faults[F] = [Fault(flip=True)]
    assert fetch(server, tmp_path, sha256=SHA256)[0].read_bytes() == DATA
    (tmp_path / "f.bin").unlink()
    server.faults[F] = repeat(Fault(flip=True))
    with pytest.raises(UserError, match="damaged: sha256"):
        fetch(server, tmp_path, sha256=SHA256)
    assert names(tmp_path) == []


def test_it_is_said_when_the_bytes_cannot_be_checked(server, tmp_path, caplog):
    fetch(server, tmp_path / "checked", sha256=SHA256)
    assert caplog.text == ""
    fetch(server, tmp_path)
    assert "its bytes are unverified" in caplog.text


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_honoured_up_to_a_bound(server, tmp_path, status):
    server.faults[F] = [Fault(status=status, headers={"Retry-After": after}) for after in ("7", "99999")]
    assert fetch(server, tmp_path)[1] == [7, MAX_WAIT_S]


def test_without_retry_after_the_waits_double(server, tmp_path):
    server.faults[F] = [*repeat(Fault(status=503), 3), Fault(status=503, headers={"Retry-After": "soon"})]
    assert fetch(server, tmp_path)[1] == [1, 2, 4, 8]


def test_a_missing_file_ends_at_once_with_its_name_and_a_cure(server, tmp_path):
    del server.files[F]
    with pytest.raises(UserError, match="f.bin: not found .*404.*\nhint: .*set HF_ENDPOINT"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1


def test_no_access_asks_for_a_token(server, tmp_path):
    server.faults[F] = [Fault(status=401)]
    with pytest.raises(UserError, match="no access.*\nhint: .*set HF_TOKEN"):
        fetch(server, tmp_path)


def test_no_server_is_an_error_and_not_a_wait(tmp_path):
    with pytest.raises(UserError, match="gave up after .*refused"):
        download_url("http://127.0.0.1:9/f.bin", tmp_path / "f.bin", sleep=no_wait)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a file on a full disk")
def test_a_full_disk_is_one_line(server, tmp_path):
    os.symlink("/dev/full", tmp_path / "f.bin.part")
    with pytest.raises(DiskError, match="f.bin: No space left on device\nhint: make room"):
        fetch(server, tmp_path)
    assert "f.bin" not in names(tmp_path)


def test_what_a_killed_process_left_is_not_taken_for_the_file(server, tmp_path):
    (tmp_path / "f.bin.part").write_bytes(DATA[:1000])
    assert fetch(server, tmp_path)[0].read_bytes() == DATA
    assert server.ranges(F) == [None]


def test_two_that_want_the_same_file_make_one_download(server, tmp_path):
    server.faults[F] = [Fault(pace_s=0.03)]
    threads = [threading.Thread(target=fetch, args=(server, tmp_path)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "f.bin").read_bytes() == DATA and len(server.requests) == 1


def test_the_token_of_the_hub_is_not_sent_to_other_hosts(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(server, tmp_path)
    assert "Authorization" not in server.gets(F)[0]


def test_a_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", server.url)
    path = download_url("http://far.invalid" + F, tmp_path / "f.bin", timeout=5)
    assert path.read_bytes() == DATA and server.gets(F)[0]["Host"] == "far.invalid"


# -----------------------------------------------------------------------------
# The shards of the hub


@pytest.fixture
def hub(monkeypatch):
    """Shards 0 to 2 and the validation shard, about 300 KB each, where the hub has them."""
    rng = random.Random(0)
    files = {}
    for name in [*map(shard_name, range(3)), VAL]:
        texts = [rng.randbytes(1000).hex() for _ in range(250)]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table({"text": texts}), sink)
        files[address(name)] = sink.getvalue().to_pybytes()
    with FaultServer(files, hub=True) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def address(name):
    return f"/datasets/{REPO_ID}/resolve/main/{name}"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "base" / "base_data"


def test_shards_arrive_whole_and_only_once(hub, folder):
    download_shards(2, workers=2)
    num_requests = len(hub.requests)
    download_shards(2, workers=2)
    assert names(folder) == [shard_name(0), shard_name(1), VAL] and len(hub.requests) == num_requests
    assert all((folder / name).read_bytes() == hub.files[address(name)] for name in names(folder))
    assert not (folder / "incoming").exists()


@pytest.mark.parametrize("fault", [
    Fault(cut=200_000), Fault(stall=200_000), Fault(flip=True), Fault(status=503), Fault(status=500),
    Fault(status=429, headers={"Retry-After": "1"}), Fault(headers={"Content-Length": "1000"}),
    Fault(cut=200_000, ranges=False)], ids=str)
def test_a_fault_of_a_shard_that_passes_is_overcome(hub, folder, fault):
    hub.faults[address(VAL)] = [fault]
    download_shards(1, workers=2, sleep=no_wait)
    assert (folder / VAL).read_bytes() == hub.files[address(VAL)]


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_of_the_hub_is_honoured(hub, status):
    waits = []
    hub.head_faults[address(VAL)] = [Fault(status=status, headers={"Retry-After": "7"})]
    download_shards(1, workers=1, sleep=waits.append)
    assert waits == [7]


@pytest.mark.parametrize("fault, words", [
    (Fault(flip=True), "damaged: sha256"), (Fault(status=503), "HTTP 503"), (Fault(status=404), "not found"),
    (Fault(status=403), "no access")], ids=["flip", "503", "404", "403"])
def test_a_fault_of_a_shard_that_stays_names_the_shard(hub, folder, caplog, fault, words):
    hub.faults[address(shard_name(0))] = repeat(fault)
    with pytest.raises(UserError, match=f"1 of 2 shards are missing: {shard_name(0)}\nhint: .*nanochat.dataset -n 1"):
        download_shards(1, sleep=no_wait)
    assert words in caplog.text and names(folder) == [VAL]


def test_a_mirror_that_states_no_sha256_costs_one_warning(hub, folder, caplog):
    for name in (VAL, shard_name(0)):
        hub.head_faults[address(name)] = repeat(Fault(headers={"X-Linked-Etag": '"0123456789abcdef"'}))
    download_shards(1, sleep=no_wait)
    assert names(folder) == [shard_name(0), VAL]
    assert caplog.text.count("states no sha256, so the content of 2 shards is not verified") == 1
    (folder / shard_name(0)).unlink()
    hub.head_faults.clear()
    caplog.clear()
    download_shards(1, sleep=no_wait)
    assert "not verified" not in caplog.text


def test_a_hub_that_does_not_answer_is_given_up(hub, folder, caplog):
    logging.getLogger("huggingface_hub").setLevel("ERROR")
    hub.head_faults[address(VAL)] = repeat(Fault(status=502))
    with pytest.raises(UserError, match=f"1 of 2 shards are missing: {VAL}"):
        download_shards(1, sleep=no_wait)
    assert f"gave up after {NUM_TRIES} tries" in caplog.text and names(folder) == [shard_name(0)]


def test_an_unreachable_hub_is_given_up(hub, folder, monkeypatch, caplog):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="2 of 2 shards are missing"):
        download_shards(1, sleep=no_wait)
    assert "ConnectError" in caplog.text and names(folder) == []


def test_a_shard_that_is_no_parquet_is_not_kept(hub, folder, caplog):
    hub.files[address(shard_name(0))] = b"<html>an error page with status 200</html>"
    with pytest.raises(UserError, match=f"1 of 2 shards are missing: {shard_name(0)}"):
        download_shards(1, sleep=no_wait)
    assert "not a readable parquet file" in caplog.text and names(folder) == [VAL]


def test_a_full_disk_ends_the_whole_download(hub):
    asked = []

    def fetch(name, folder, staging):
        asked.append(name)
        if name != VAL:
            time.sleep(60)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    started = time.monotonic()
    with pytest.raises(DiskError, match="No space left on device"):
        download_shards(3, workers=1, fetch=fetch)  # also ends without waiting for those on their way
    assert len(asked) <= 2 and time.monotonic() - started < 30


def test_an_error_of_the_disk_is_not_tried_again(hub, tmp_path):
    (tmp_path / "staging").write_text("a file where a folder is needed")
    with pytest.raises(DiskError, match="hint: .* set NANOCHAT_BASE_DIR"):
        fetch_shard(VAL, tmp_path, tmp_path / "staging")


def test_the_token_goes_to_the_hub_and_not_beyond_a_redirect(hub, server, monkeypatch, folder):
    monkeypatch.setenv("HF_TOKEN", "secret")
    data = hub.files[address(VAL)]
    server.files[F] = data
    elsewhere = server.url.replace("127.0.0.1", "localhost") + F
    headers = {"Location": elsewhere, "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
               "X-Linked-Size": str(len(data)), "X-Repo-Commit": "c" * 40}
    hub.head_faults[address(VAL)] = [Fault(status=302, headers=headers)] * 2
    download_shards(1)
    assert (folder / VAL).read_bytes() == data and "Authorization" not in server.gets(F)[0]
    assert {headers.get("authorization") for _, _, headers in hub.requests} <= {"Bearer secret", None}
    assert any("secret" in str(headers) for _, _, headers in hub.requests)


def test_the_command_goes_on_after_a_kill(hub, folder, capsys):
    hub.faults[address(VAL)] = [Fault(pace_s=0.5)]
    command = [sys.executable, "-m", "nanochat.dataset", "-n", "1", "-w", "2"]
    process = subprocess.Popen(command, cwd=ROOT)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (hub.gets(address(VAL)) and (folder / shard_name(0)).exists()):
        time.sleep(0.01)
    process.kill()  # SIGKILL
    process.wait()
    assert names(folder) == [shard_name(0)]  # the other one has no final name
    main(["-n", "1", "-w", "1"])  # another process
    assert "1 training shards and the validation shard are ready" in capsys.readouterr().out
    assert len(hub.gets(address(shard_name(0)))) == 1 and names(folder) == [shard_name(0), VAL]
    assert (folder / VAL).read_bytes() == hub.files[address(VAL)]


def test_the_command_fails_by_name_when_a_shard_is_missing(hub, folder, capsys):
    del hub.files[address(shard_name(1))]
    with pytest.raises(SystemExit) as end:
        run_script(lambda: main(["-n", "3", "-w", "2"]))
    assert end.value.code == 2 and f"error: 1 of 4 shards are missing: {shard_name(1)}" in capsys.readouterr().err
    assert names(folder) == sorted([shard_name(0), shard_name(2), VAL])


@pytest.mark.parametrize("args", [["-n", "0"], ["-n", "6543"], ["-n", "1", "-w", "0"]])
def test_a_wrong_number_of_shards_is_refused(args):
    with pytest.raises(UserError, match="needed: 1 to 6542 shards"):
        main(args)


def test_the_command_with_a_mirror_downloads_nothing(hub, tmp_path, monkeypatch, capsys):
    (tmp_path / "mirror" / "pretrain").mkdir(parents=True)
    (tmp_path / "mirror" / "pretrain" / "shard_00000.parquet").touch()
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "mirror"))
    main(["-n", "1"])
    assert "1 shards are there, nothing is downloaded" in capsys.readouterr().out and hub.requests == []
