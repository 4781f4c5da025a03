"""
Downloads: shards of the default corpus from the Hugging Face hub, single files from other hosts.

A file is checked first, and then gets its final name by a rename. So a file with its final name is
whole and is not downloaded again. A killed process leaves no file that could be taken for a whole
one.

The hub: by huggingface_hub, which knows the hub's protocols and continues after a broken
connection. It checks only the size (2.4.0). So the sha256 that the hub states for a large file is
compared here. Where a mirror states none, a warning says that the content is not verified: for the
shards of the default corpus no list of sums is known that could be pinned.

Other hosts: by `requests`. After a broken connection it starts over: these files have a few
megabytes.

Proxies are honoured, and on the hub HF_ENDPOINT (a mirror) and HF_TOKEN. huggingface_hub reads
HF_HUB_DOWNLOAD_TIMEOUT (seconds without a byte, default 10) when it is imported, hence the late
imports here.
"""

import hashlib
import logging
import os
import re
import shutil
import time
from contextlib import contextmanager
from multiprocessing import TimeoutError as StillRunning
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from nanochat.common import UserError, get_base_dir
from nanochat.documents import open_parquet
from nanochat.locks import hold_lock
from nanochat.progress import show_progress

REPO_ID = "karpathy/climbmix-400b-shuffle"
NUM_SHARDS = 6543          # shard_00000 ... shard_06542
SHARD_BYTES = 100_000_000  # about: the progress bar's estimate for a shard

NUM_TRIES = 5
TIMEOUT_S = 30         # without a byte, of a host other than the hub
HUB_TIMEOUT_S = 10     # for the hub's facts about a file
MAX_WAIT_S = 300       # longest Retry-After that is honoured: the hub counts in 5-minute windows
CHUNK_BYTES = 1 << 20  # read from a connection or a file at a time

log = logging.getLogger(__name__)

# -----------------------------------------------------------------------------
# Errors and retries


class DiskError(UserError):
    """The disk refused the file. Other downloads would fail as well, so they are not tried."""

    def __init__(self, error: OSError, path):
        super().__init__(
            f"{path}: {error.strerror}",
            "make room, or set NANOCHAT_BASE_DIR to a folder on a larger disk that you may write "
            "to",
        )


class TryAgain(Exception):
    """
    A try failed for a reason that may pass. wait_s: how long the server asks to wait, or None.
    """

    def __init__(self, reason, wait_s=None):
        super().__init__(reason)
        self.wait_s = wait_s  # seconds


def retry(attempt, name: str, sleep=time.sleep):
    """
    Call attempt() until it does not raise TryAgain, at most NUM_TRIES times, and return its result.
    The waits between tries double, unless the server says how long to wait.
    """
    for number in range(NUM_TRIES):
        try:
            return attempt()
        except TryAgain as error:
            problem = error  # Python forgets `error` after this block
        if number < NUM_TRIES - 1:
            wait_s = 2**number if problem.wait_s is None else problem.wait_s
            log.warning("%s: %s; trying again in %d s", name, problem, wait_s)
            sleep(wait_s)
    raise UserError(
        f"{name}: gave up after {NUM_TRIES} tries: {problem}",
        "run the same command again later; behind a firewall set HTTPS_PROXY, or for files of the "
        "hub HF_ENDPOINT to a mirror of it",
    ) from problem


def status_error(name, status, headers):
    """The exception for an HTTP status other than success."""
    # request timeout, too many requests, trouble of the server: may pass
    if status in (408, 429) or status >= 500:
        retry_after = headers.get("Retry-After", "")  # seconds; a date is ignored
        wait_s = min(int(retry_after), MAX_WAIT_S) if retry_after.isdigit() else None
        return TryAgain(f"HTTP {status}", wait_s)
    # other errors would come again
    if status in (401, 403):
        hint = "if it is on the Hugging Face hub, set HF_TOKEN to a token that may read it"
        return UserError(f"{name}: no access (HTTP {status})", hint)
    hint = "if it is on the Hugging Face hub, set HF_ENDPOINT to a mirror that has it"
    return UserError(f"{name}: not found (HTTP {status})", hint)


# -----------------------------------------------------------------------------
# Files


def check_sha256(path: Path, expected: str):
    """Delete the file and raise TryAgain if its sha256 is not `expected` (hex)."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    found = digest.hexdigest()  # 64 characters, of which the message shows 12
    if found != expected:
        path.unlink()
        raise TryAgain(f"damaged: sha256 {found[:12]}... where {expected[:12]}... belongs")


def move_into_place(temporary: Path, path: Path):
    """Rename a whole file. Its bytes go to the disk first, so this also holds after a power cut."""
    with open(temporary, "r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


# -----------------------------------------------------------------------------
# The hub


def hub_endpoint() -> str:
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return endpoint.rstrip("/")


@contextmanager
def hub_errors(name):
    """
    Turn errors of huggingface_hub and of its HTTP library into TryAgain or a UserError. `name` is
    what was asked for, in messages.
    """
    from huggingface_hub.errors import HTTPError  # of its HTTP library, which changed with versions

    try:
        yield
    except (HTTPError, OSError) as error:
        # the answer of the hub may be the cause of the cause
        response = getattr(error, "response", None)
        while response is None and error.__cause__ is not None:
            error = error.__cause__
            response = getattr(error, "response", None)
        if response is not None:
            raise status_error(name, response.status_code, response.headers) from error

        # an error of the disk has a number, and so do broken connections
        is_network = isinstance(error, (ConnectionError, TimeoutError))
        if getattr(error, "errno", None) and not is_network:
            raise DiskError(error, error.filename or name) from error
        reason = str(error).split("\n")[0]
        raise TryAgain(f"{type(error).__name__} {reason}") from error


def ask_hub(repo_id: str, filename: str, revision: str = "main"):
    """
    The facts that the hub states about a file of a dataset repository: an object with commit_hash,
    size (bytes) and etag, which is the sha256 in hex for a large file. Raises TryAgain or a
    UserError.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    # explicit, since the library's own default is the HF_ENDPOINT at its import
    endpoint = hub_endpoint()
    url = hf_hub_url(repo_id, filename, repo_type="dataset", revision=revision, endpoint=endpoint)
    with hub_errors(url):
        return get_hf_file_metadata(url, timeout=HUB_TIMEOUT_S, endpoint=endpoint)


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def base_data_dir() -> Path:
    """The folder of the downloaded shards."""
    return get_base_dir() / "base_data"


def fetch_shard(name: str, folder: Path, staging: Path) -> bool:
    """
    Download one shard into `staging`, check it, move it to `folder`. Returns whether a sha256 was
    there to compare its content with. Raises TryAgain or a UserError.
    """
    from huggingface_hub import hf_hub_download

    # the commit ties the bytes to the hash, should the repository change in between
    facts = ask_hub(REPO_ID, name)
    with hub_errors(name):
        downloaded = hf_hub_download(
            REPO_ID,
            name,
            repo_type="dataset",
            revision=facts.commit_hash,
            local_dir=staging,
            endpoint=hub_endpoint(),
        )

    # a mirror may state no sha256: then only the parquet footer can be checked
    temporary = Path(downloaded)
    is_verified = re.fullmatch("[0-9a-f]{64}", facts.etag or "") is not None
    if is_verified:
        check_sha256(temporary, facts.etag)
    try:
        open_parquet(temporary).close()
    except UserError as error:
        temporary.unlink()
        raise TryAgain(str(error).split("\n")[0]) from error
    move_into_place(temporary, folder / name)
    return is_verified


def download_shards(num_train: int, workers: int = 8, fetch=fetch_shard, sleep=time.sleep) -> None:
    """
    Download shards 0 ... num_train - 1, and the last one, which is for validation, into base_data,
    `workers` at a time. Shards that are there are kept. UserError with the names of the shards that
    could not be downloaded.
    """
    folder = base_data_dir()
    staging = folder / "incoming"
    # the validation shard first: without it none of the others can be used
    names = [shard_name(index) for index in (NUM_SHARDS - 1, *range(num_train))]
    unverified = []

    # runs in a thread, so errors are returned: one shard's failure must not end the others
    def try_shard(name):
        try:
            is_verified = retry(lambda: fetch(name, folder, staging), name, sleep)
            if not is_verified:
                unverified.append(name)
        except UserError as error:
            return name, error
        except OSError as error:
            return name, DiskError(error, name)
        return name, None

    # a second process waits for the lock, and then finds the shards
    failed = []
    with hold_lock(folder / "download.lock"), logging_redirect_tqdm():
        for leftover in staging.rglob("*.incomplete"):  # of a killed process
            leftover.unlink()
        # a file with its final name is whole
        missing = [name for name in names if not (folder / name).is_file()]
        for name, error in run_with_bar(try_shard, missing, workers, folder, staging):
            if isinstance(error, DiskError):
                raise error
            if error is not None:
                log.warning("%s", error)
                failed.append(name)
        # only the library's own notes are left there
        shutil.rmtree(staging, ignore_errors=True)

    if unverified:
        log.warning(
            "%s states no sha256, so the content of %d shards is not verified: a truncated file "
            "was excluded, a changed one not",
            hub_endpoint(),
            len(unverified),
        )
    # the same command downloads only these
    if failed:
        raise UserError(
            f"{len(failed)} of {len(names)} shards are missing: {', '.join(sorted(failed))}",
            f"python -m nanochat.dataset -n {num_train} tries them again and keeps the rest",
        )


def run_with_bar(function, names, workers, folder, staging):
    """
    Yield function(name) for every name, in the order in which the calls end, and show one progress
    bar of the bytes on the disk.
    """
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # of the library: one for each shard
    num_left = len(names)
    total = SHARD_BYTES * num_left
    bar = show_progress(None, f"{num_left} shards", "B", total=total)

    # threads of a ThreadPool are daemons: Ctrl-C need not wait for shards on their way
    with bar, ThreadPool(workers) as pool:
        results = pool.imap_unordered(function, names)
        while num_left:
            # wait for the next shard, but update the bar twice a second
            result = None
            try:
                result = results.next(timeout=0.5)
                num_left -= 1
            except StillRunning:
                pass
            # shards that are there, and those on their way
            sizes = [file_size(folder / name) for name in names]
            sizes += [file_size(path) for path in staging.rglob("*.incomplete")]
            bar.update(sum(sizes) - bar.n)
            if result is not None:
                yield result


def file_size(path):
    """Bytes of a file; 0 if it is missing, for example because it was just renamed."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


# -----------------------------------------------------------------------------
# Other hosts


def download_url(
    url: str,
    path: Path,
    sha256: str | None = None,
    timeout: float = TIMEOUT_S,
    sleep=time.sleep,
) -> Path:
    """
    Download `url` to `path` unless that exists, and return the path. Without a sha256 (hex) only
    the length that the server states is checked, and a warning says so. `timeout` counts seconds
    without a byte. UserError if it fails.
    """
    try:
        with hold_lock(path.with_name(f"{path.name}.lock")):  # one process downloads, others wait
            if not path.is_file():
                retry(lambda: fetch_url(url, path, sha256, timeout), url, sleep)
                if sha256 is None:
                    log.warning("%s: no checksum is known, so its bytes are unverified", path)
    except OSError as error:
        raise DiskError(error, path) from error
    return path


def fetch_url(url, path, sha256, timeout):
    """One try of download_url. Raises TryAgain, a UserError or an OSError."""
    import requests  # takes a tenth of a second, which other hosts alone are worth

    # overwrites the part of an earlier try
    temporary = path.with_name(f"{path.name}.part")
    headers = {"Accept-Encoding": "identity"}  # else Content-Length is not the file's
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
            if response.status_code != 200:
                raise status_error(url, response.status_code, response.headers)
            with open(temporary, "wb") as file:
                chunks = response.iter_content(CHUNK_BYTES)
                for chunk in show_progress(chunks, f"downloading {path.name}", "MiB"):
                    file.write(chunk)
            stated = response.headers.get("Content-Length")
    except requests.RequestException as error:
        raise TryAgain(f"{type(error).__name__} {error}") from error

    # some versions of the library take a connection that ends early for the end of the file
    size = temporary.stat().st_size
    if stated is not None and size != int(stated):
        raise TryAgain(f"the connection closed at {size} of {stated} bytes")
    if sha256 is not None:
        check_sha256(temporary, sha256)
    move_into_place(temporary, path)
