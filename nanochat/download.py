"""
Files from the network that can be trusted: `download_file` brings one URL to one path, whole or not at all.

The bytes go to `<name>.part`; only when size and hash agree are they renamed into place. A broken connection resumes by
Range, in the same process or, after a kill, in the next one: `<name>.part.id` says of which version of the file the
part is. The Hugging Face hub states the sha256 of every large file, which is then checked too; elsewhere it is the ETag
or the date, sent back as If-Range.

HTTP is left to `requests` (here anyway, with tiktoken): unlike urllib it brings its own certificates and drops the
token when a redirect leaves the host. huggingface_hub is not used: after a kill it starts over, and it checks the size
only (2.4.0). Left out: the hub's Xet protocol, and servers that keep a client waiting with a byte a minute.
"""

import errno
import hashlib
import logging
import os
import random
import re
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import requests
from filelock import FileLock

from nanochat.common import UserError

CHUNK_BYTES = 1 << 16   # at most this much is lost when a connection breaks
MAX_BACKOFF_S = 60      # longest wait of our own between two tries
MAX_ASKED_WAIT_S = 300  # longest Retry-After that is honoured: the hub counts requests in windows of 5 minutes

log = logging.getLogger(__name__)


class Wanted(NamedTuple):
    """What makes a file good: see `download_file`."""
    size: int | None
    sha256: str | None
    check: Callable[[Path], object] | None


class DiskFullError(UserError):
    """No room for the file: the one failure after which other downloads are pointless too."""


class _TryAgain(Exception):
    """A try failed in a way that may pass; `wait_s` is what the server asked for, or None."""

    def __init__(self, reason, wait_s=None):
        super().__init__(reason)
        self.wait_s = wait_s


# -----------------------------------------------------------------------------
# The hub


def hub_endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_url(repo_id: str, filename: str, revision: str = "main", repo_type: str = "dataset") -> str:
    """hub_url("gpt2", "vocab.json", repo_type="model") -> "https://huggingface.co/gpt2/resolve/main/vocab.json" """
    prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[repo_type]
    return f"{hub_endpoint()}/{prefix}{repo_id}/resolve/{quote(revision, safe='')}/{quote(filename)}"


def _is_hub(url):
    return urlsplit(url)[:2] == urlsplit(hub_endpoint())[:2]  # scheme and host:port


def _hub_auth(url):
    """$HF_TOKEN as a requests `auth`, for the hub alone; requests drops it when a redirect leaves the host."""
    token = os.environ.get("HF_TOKEN")

    def set_bearer(request):
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    return set_bearer if token and _is_hub(url) else None


# -----------------------------------------------------------------------------
# The download


def download_file(url: str, path: str | Path, *, size: int | None = None, sha256: str | None = None,
                  check: Callable[[Path], object] | None = None, retries: int = 6, timeout: float = 30.0,
                  progress: Callable[[int, int | None], object] | None = None,
                  sleep: Callable[[float], object] = time.sleep) -> Path:
    """
    Bring `url` to `path` and return the path; at once when a good file is there already. `size` (bytes), `sha256`
    (hex) and `check(path)` (raises ValueError) say what good means, beside what the server promises. `retries` counts
    tries in a row that brought no new byte; `timeout` is seconds without a byte. `progress(done, total)` gets bytes;
    what it or `sleep` raises ends the download and leaves the part for the next one. Failure is a UserError.
    Processes that want the same file take turns by a lock, so that one of them downloads it. A host that states no
    hash is believed, when nothing else is given: its whole answer of the length it names is then the file.
    """
    path, wanted = Path(path), Wanted(size, sha256, check)
    if _fault(path, *wanted) is None:
        return path
    lock = path.with_name(path.name + ".part.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with hold_lock(lock):
            if _fault(path, *wanted) is not None:  # nobody finished it while we waited
                _fetch(url, path, wanted, retries, timeout, progress or (lambda done, total: None), sleep)
    except OSError as error:
        raise _disk_error(error, path) from error
    with suppress(OSError):  # Windows: another process may have it open
        lock.unlink()
    return path


def hold_lock(lock):
    """A context in which no other process holds the lock of this file."""
    try:
        return FileLock(lock).acquire()
    except NotImplementedError:  # some cluster file systems have no locks: go on without
        return nullcontext()


def _fetch(url, path, wanted, retries, timeout, progress, sleep):
    """Try until the part is whole, then rename it to `path`."""
    part = path.with_name(path.name + ".part")
    failures, furthest = 0, _size(part)
    while True:
        try:
            _try_once(url, part, wanted, timeout, progress)
            break
        except _TryAgain as problem:
            reached = _size(part)
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)  # never falls, so a server that goes in circles is given up in the end
            if failures > retries:
                raise UserError(f"{path.name}: gave up on {url} after {failures} tries in vain: {problem}",
                                f"the same command {f'goes on from byte {reached}' if reached else 'tries again'}; "
                                "behind a firewall set HTTPS_PROXY, or HF_ENDPOINT to a mirror of the hub") from None
            own_wait = min(2.0 ** (failures - 1), MAX_BACKOFF_S) * random.uniform(0.75, 1.0)  # workers spread out
            wait_s = own_wait if problem.wait_s is None else problem.wait_s
            log.warning("%s: %s; trying again in %.0f s from byte %d", path.name, problem, wait_s, reached)
            sleep(wait_s)
    os.replace(part, path)
    _id_file(part).unlink(missing_ok=True)


def _try_once(url, part, wanted, timeout, progress):
    """One request: begin the part or continue it, then see that it is whole. _TryAgain when it is not."""
    offset, identity = _size(part), _read_identity(part)
    headers = {"Accept-Encoding": "identity"}  # Range counts bytes on the wire: they must be the file's own
    if offset and identity:
        headers["Range"] = f"bytes={offset}-"
        if not identity.startswith("sha256:"):
            headers["If-Range"] = identity  # if the file has changed, the answer is 200 and all of it
    try:
        with requests.get(url, headers=headers, auth=_hub_auth(url), stream=True, timeout=timeout) as response:
            _check_status(response, url, part)
            start, total = _read_range(response)
            stated = _read_identity_headers(response, url)
            if response.status_code != 200 and (start, stated or identity) != (offset, identity):
                _discard(part)
                raise _TryAgain("the server does not continue the file that was begun")
            total = _agree_on_size(part, total, wanted.size, _linked(response, "X-Linked-Size"))
            if response.status_code != 416:  # 416: there is nothing beyond what we have
                _write_body(response, part, start, total, stated, progress)
    except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
        if isinstance(error, requests.Timeout) or "timed out" in str(error):
            raise _TryAgain(f"no byte for {timeout:g} s") from error
        cause = error
        while cause.__context__ is not None:  # requests wraps urllib3's, which wraps the one that says it
            cause = cause.__context__
        raise _TryAgain(f"the connection broke{f': {cause}' if isinstance(cause, OSError) else ''}") from error
    except requests.RequestException as error:
        raise UserError(f"{url} cannot be requested: {error}", "check HF_ENDPOINT and the proxy settings") from error
    if total is not None and _size(part) < total:
        raise _TryAgain(f"the connection closed at {_size(part)} of {total} bytes")
    identity = stated or identity or ""
    stated_sha256 = identity.removeprefix("sha256:") if identity.startswith("sha256:") else None
    fault = _fault(part, total, wanted.sha256 or stated_sha256, wanted.check)
    if fault is not None:
        _discard(part)
        raise _TryAgain(fault)


def _write_body(response, part, start, total, identity, progress):
    """Append the body to the part, or begin it anew with its identity beside it; flush it to the disk."""
    done = start
    with open(part, "ab" if start else "wb") as f:
        if not start:
            _id_file(part).write_text(identity or "", encoding="utf-8")
        for chunk in response.iter_content(CHUNK_BYTES):
            f.write(chunk)
            done += len(chunk)
            progress(done, total)
        f.flush()
        os.fsync(f.fileno())


# -----------------------------------------------------------------------------
# What the server says


def _check_status(response, url, part):
    """Return on 200, 206 and an answerable 416; _TryAgain on what may pass; UserError on the rest."""
    status, name = response.status_code, part.name.removesuffix(".part")
    if status in (200, 206) or (status == 416 and _size(part)):
        return
    if status in (408, 429) or status >= 500:
        wait_s = None
        with suppress(TypeError, ValueError):  # Retry-After: absent, seconds, or a date
            asked = response.headers.get("Retry-After", "")
            wait_s = int(asked) if asked.isdigit() else parsedate_to_datetime(asked).timestamp() - time.time()
            wait_s = min(max(wait_s, 0), MAX_ASKED_WAIT_S)
        raise _TryAgain(f"HTTP {status} {response.reason}", wait_s)
    if status in (401, 403):
        raise UserError(f"{name}: no access to {url} (HTTP {status})", "set HF_TOKEN to a token that may read it")
    raise UserError(f"{name}: not found at {url} (HTTP {status})",
                    f"set HF_ENDPOINT to a mirror that has it, or put the file at {part.with_name(name)} yourself")


def _linked(response, name):
    """A header of the answer or of a redirect on the way: the hub states facts, its storage sends the bytes."""
    return next((r.headers[name] for r in [*response.history, response] if name in r.headers), None)


def _read_identity_headers(response, url):
    """Which version of the file this is: 'sha256:<hex>', a strong ETag, a date, or None."""
    own = response.headers.get("ETag", "")
    if _is_hub(url):  # others, its own storage behind a redirect too, may hash what they like
        digest = (_linked(response, "X-Linked-Etag") or ("" if response.history else own)).strip('"').lower()
        if re.fullmatch(r"[0-9a-f]{64}", digest):
            return f"sha256:{digest}"
    return own if own.startswith('"') else response.headers.get("Last-Modified")  # W/"..." may differ in bytes


def _read_range(response):
    """(first byte of this body, size of the whole file), each None where it is not said."""
    headers = response.headers
    if response.status_code == 200:
        length = headers.get("Content-Length", "")
        compressed = headers.get("Content-Encoding", "identity") != "identity"  # then the length is not the file's
        return 0, int(length) if length.isdigit() and not compressed else None
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+)", headers.get("Content-Range", "").strip())
    if match is None:
        return None, None
    return int(match[1] or match[2]), int(match[2])  # 416 says `bytes */total`: right for a part of just that size


def _agree_on_size(part, total, *others):
    """The size of the whole file, when all that name one name the same."""
    others = {int(size) for size in others if size is not None}
    if total is not None and others - {total}:
        _discard(part)
        raise _TryAgain(f"the server offers {total} bytes where {min(others - {total})} belong")
    return total if total is not None else next(iter(others), None)


# -----------------------------------------------------------------------------
# What is on the disk


def _fault(path, size, sha256, check):
    """Why the file at `path` is not the wanted one, or None when it is."""
    if not path.is_file():
        return "no such file"
    if size is not None and _size(path) != size:
        return f"{_size(path)} bytes where {size} belong"
    if sha256 is not None:
        digest = hashlib.sha256()
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != sha256.lower():
            return f"damaged: sha256 {digest.hexdigest()[:12]}... where {sha256[:12].lower()}... belongs"
    try:
        if check is not None:
            check(path)
    except ValueError as error:
        return str(error).splitlines()[0]
    return None


def _size(path):
    return path.stat().st_size if path.exists() else 0


def _id_file(part):
    return part.with_name(part.name + ".id")


def _read_identity(part):
    """Which version of the file the part is of, or None: then it cannot be continued."""
    return (_id_file(part).read_text(encoding="utf-8") or None) if _id_file(part).exists() else None


def _discard(part):
    part.unlink(missing_ok=True)
    _id_file(part).unlink(missing_ok=True)


def _disk_error(error, path):
    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return DiskFullError(f"{path}: the disk is full", "make room, or set NANOCHAT_BASE_DIR to a folder on a larger "
                             "disk; the same command goes on where it stopped")
    return UserError(f"{path}: {error.strerror or error}", "set NANOCHAT_BASE_DIR to a folder that you may write to")
