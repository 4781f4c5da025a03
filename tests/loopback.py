"""
A file server on 127.0.0.1 that misbehaves on request, for the tests of downloads.

    with FaultServer({"/a.bin": data}) as server:
        server.faults["/a.bin"] = [Fault(cut=1000), Fault(status=503)]  # one per GET, in order; then it behaves
        download_url(server.url + "/a.bin", path)
        server.gets("/a.bin")                                          # headers of each GET
        server.requests                                                # [(method, path, headers), ...]

With `hub=True` it is the Hugging Face hub, as far as huggingface_hub and datasets ask it: files lie at
`/datasets/<repository>/resolve/main/<name>`, any commit is the same as main, HEAD and GET state the commit and the
sha256, and /api/datasets/ lists the files.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

COMMIT = "c" * 40  # of main


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer; the default is nothing."""
    status: int | None = None    # answer with this status and no file
    headers: dict = field(default_factory=dict)  # added to the answer, or put in the place of its own
    cut: int | None = None       # close the connection after this many bytes of the body
    stall: int | None = None     # send this many bytes of the body, then nothing more
    flip: bool = False           # the same number of bytes, the last of them wrong
    swap: tuple = (b"", b"")     # the same number of bytes, the first replaced by the second
    ranges: bool = True          # False: ignore Range, answer 200 and all of it
    pace_s: float = 0.0          # wait this long after every 64 KiB


class FaultServer:
    def __init__(self, files: dict[str, bytes], hub: bool = False):
        self.files = files
        self.hub = hub
        self.faults: dict[str, Iterable[Fault]] = {}       # of GET
        self.head_faults: dict[str, Iterable[Fault]] = {}  # of HEAD
        self.requests: list[tuple[str, str, dict]] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer._answer(self)

            do_HEAD = do_GET
            do_POST = do_GET

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()  # wakes the stalled
        self._server.shutdown()
        self._server.server_close()

    def gets(self, path):
        """The headers of each GET of `path`."""
        return [headers for method, asked, headers in self.requests if (method, asked) == ("GET", path)]

    def ranges(self, path):
        """The Range header of each GET of `path`, None where there was none."""
        return [headers.get("Range") for headers in self.gets(path)]

    def _next_fault(self, method, path):
        faults = self.head_faults if method == "HEAD" else self.faults
        with self._lock:
            rest = iter(faults.get(path, ()))
            faults[path] = rest
            return next(rest, Fault())

    def _answer(self, handler):
        handler.close_connection = True
        length = int(handler.headers.get("Content-Length", 0))
        posted = handler.rfile.read(length)
        path = urlsplit(handler.path).path  # a proxy is asked for the whole URL
        commit = COMMIT
        if self.hub:
            asked = re.search("/([0-9a-f]{40})(?=/|$)", path)
            commit = asked[1] if asked else COMMIT
            path = path.replace(commit, "main")
        with self._lock:
            self.requests.append((handler.command, path, dict(handler.headers)))
        fault = self._next_fault(handler.command, path)
        if fault.status is not None:
            return self._send(handler, fault.status, {"Content-Length": "0"} | fault.headers, b"", fault)
        if self.hub and path.startswith("/api/datasets/"):
            return self._answer_api(handler, path, commit, posted, fault)
        self._answer_file(handler, path, commit, fault)

    def _answer_file(self, handler, path, commit, fault):
        data = self.files.get(path)
        if data is None:
            missing = {"Content-Length": "0", "X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            return self._send(handler, 404, missing, b"", fault)
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if self.hub:
            headers["X-Repo-Commit"] = commit
            headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            headers["X-Linked-Size"] = str(len(data))
        status = 200
        start = 0
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        if asked and fault.ranges:
            status = 206
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        body = data[start:]
        body = body.replace(*fault.swap)
        if fault.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self._send(handler, status, headers | {"Content-Length": str(len(body))} | fault.headers, body, fault)

    def _answer_api(self, handler, path, commit, posted, fault):
        """/api/datasets/<owner>/<name>/{revision,tree,paths-info}/main[/folder]"""
        owner, name, action, _, *folders = path.removeprefix("/api/datasets/").split("/")
        prefix = f"/datasets/{owner}/{name}/resolve/main/"
        names = [file.removeprefix(prefix) for file in self.files if file.startswith(prefix)]
        folder = "".join(f"{part}/" for part in folders)
        if action == "revision":
            answer = {"id": f"{owner}/{name}", "sha": commit, "tags": [], "siblings": [{"rfilename": n} for n in names]}
        elif action == "paths-info":
            fields = json.loads(posted) if posted[:1] == b"{" else parse_qs(posted.decode())
            answer = [self._entry(prefix, n) for n in names if n in fields["paths"]]
        elif "recursive=true" in handler.path.lower():
            answer = [self._entry(prefix, n) for n in names]
        else:
            inside = [n for n in names if n.startswith(folder)]
            answer = [self._entry(prefix, n) for n in inside if "/" not in n.removeprefix(folder)]
            below = {n.removeprefix(folder).split("/")[0] for n in inside if "/" in n.removeprefix(folder)}
            answer += [{"type": "directory", "path": folder + n, "size": 0, "oid": "0" * 40} for n in sorted(below)]
        body = json.dumps(answer).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._send(handler, 200, headers, body, fault)

    def _entry(self, prefix, name):
        data = self.files[prefix + name]
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(data), "oid": "1" * 40, "lfs": lfs}

    def _send(self, handler, status, headers, body, fault):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("Connection", "close")
        if fault.stall == 0:  # not even a header
            self.closing.wait(60)
            return
        handler.end_headers()
        if handler.command == "HEAD":
            return
        limits = [n for n in (fault.cut, fault.stall, len(body)) if n is not None]
        limit = min(limits)
        try:
            for i in range(0, limit, 1 << 16):
                handler.wfile.write(body[i:min(i + (1 << 16), limit)])
                time.sleep(fault.pace_s)
            if fault.stall is not None:
                self.closing.wait(60)
        except OSError:  # the client hung up
            pass
