"""
A file server on 127.0.0.1 that misbehaves on request, for the tests of downloads.

    with FaultServer({"/a.bin": data}) as server:
        server.faults["/a.bin"] = [Fault(cut=1000), Fault(status=503)]  # one per request, in order; then it behaves
        download_file(server.url + "/a.bin", path)
        server.requests                                                # [(path, headers), ...]

Behaving means what a file host does: an ETag, Range with If-Range, 206 with Content-Range, 416 past the end. With
`hub=True` it also states the sha256 as the Hugging Face hub does (X-Linked-Etag, X-Linked-Size).
"""

import hashlib
import re
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Fault:
    """What is wrong with one answer; the default is nothing."""
    status: int | None = None    # answer with this status and no file
    headers: dict = field(default_factory=dict)  # added to the answer, or put in the place of its own
    cut: int | None = None       # close the connection after this many bytes of the body
    stall: int | None = None     # send this many bytes of the body, then nothing more
    flip: bool = False           # the same number of bytes, one of them wrong
    ranges: bool = True          # False: ignore Range, answer 200 and all of it
    shift: int = 0               # serve a range that begins this many bytes late
    etag: bool = True            # False: no ETag
    pace_s: float = 0.0          # wait this long after every 64 KiB


class FaultServer:
    def __init__(self, files: dict[str, bytes], hub: bool = False):
        self.files, self.hub = files, hub
        self.faults: dict[str, Iterable[Fault]] = {}
        self.requests: list[tuple[str, dict]] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer._answer(self)

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

    def ranges(self, path):
        """The Range header of each request for `path`, None where there was none."""
        return [headers.get("Range") for asked, headers in self.requests if asked == path]

    def _next_fault(self, path):
        with self._lock:
            faults = iter(self.faults.get(path, ()))
            self.faults[path] = faults
            return next(faults, Fault())

    def _answer(self, handler):
        path = urlsplit(handler.path).path  # a proxy is asked for the whole URL
        with self._lock:
            self.requests.append((path, dict(handler.headers)))
        fault, data = self._next_fault(path), self.files.get(path)
        handler.close_connection = True
        if fault.status is not None or data is None:
            return self._send(handler, fault.status or 404, {"Content-Length": "0"} | fault.headers, b"", fault)
        headers = {"ETag": f'"{hashlib.md5(data).hexdigest()}"'} if fault.etag else {}
        if self.hub:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        status, start = 200, 0
        asked = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        fresh = handler.headers.get("If-Range") in (None, headers.get("ETag"))
        if asked and fault.ranges and fresh:
            start = int(asked[1]) + fault.shift
            status = 206 if start < len(data) else 416
            reach = f"{start}-{len(data) - 1}" if status == 206 else "*"
            headers["Content-Range"] = f"bytes {reach}/{len(data)}"
        body = data[start:]
        if fault.flip:
            body = bytes([body[0] ^ 1]) + body[1:]
        self._send(handler, status, headers | {"Content-Length": str(len(body))} | fault.headers, body, fault)

    def _send(self, handler, status, headers, body, fault):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        limit = min(len(body), *(n for n in (fault.cut, fault.stall) if n is not None), len(body))
        try:
            for i in range(0, limit, 1 << 16):
                handler.wfile.write(body[i:min(i + (1 << 16), limit)])
                time.sleep(fault.pace_s)
            if fault.stall is not None:
                self.closing.wait(60)
        except OSError:  # the client hung up
            pass
