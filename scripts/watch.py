"""
Watch runs in a browser, while they train and afterwards.

    python -m scripts.watch             (http://127.0.0.1:8001)
    python -m scripts.watch -p 0        (any free port)

The page shows the runs of $NANOCHAT_BASE_DIR: curves of the loss, bits per byte, learning rates,
gradient norm, speed and memory, by step, by tokens or by time, several runs laid over each other;
progress and time left; samples; the error of every rank that failed. It only reads files, so it may
be started and ended at any time, and it only answers this machine. To watch another one:

    ssh -L 8001:127.0.0.1:8001 MACHINE python -m scripts.watch
"""

import threading

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse
from starlette.routing import Route

from nanochat.configurator import ArgumentParser
from nanochat.files import UserError, get_base_dir, run_script
from nanochat.log_reader import LogReader
from nanochat.run_status import describe_run, find_runs
from nanochat.web import listen, page_response

# A web page may give itself our address by DNS (rebinding), and then calls us by its own name
HOSTS = ["localhost", "127.0.0.1"]
HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # of the data


def create_app(base_dir):
    """The page, and what it asks for: /runs, and /curves/<stage>/<tag>. All of it is only read."""
    readers = {}  # run -> (its LogReader, a lock on it)
    readers_lock = threading.Lock()

    def page(request):
        return page_response("watch.html")

    def runs(request):
        found = find_runs(base_dir)
        described = {run: describe_run(folder) for run, folder in found.items()}
        return JSONResponse({"folder": str(base_dir), "runs": described}, headers=HEADERS)

    def curves(request):
        # the path is only looked up, never opened
        run = "{stage}/{tag}".format(**request.path_params)
        folder = find_runs(base_dir).get(run)
        if folder is None:
            raise HTTPException(404, f"there is no run {run!r:.200}")
        generation = read_count(request, "generation")
        start = read_count(request, "start")
        with readers_lock:
            reader, lock = readers.setdefault(run, (LogReader(folder / "metrics.jsonl"), threading.Lock()))
        with lock:
            reader.read()
            return JSONResponse(reader.curves(generation, start), headers=HEADERS)

    routes = [Route("/", page), Route("/runs", runs), Route("/curves/{stage}/{tag}", curves)]
    host_check = Middleware(TrustedHostMiddleware, allowed_hosts=HOSTS)
    return Starlette(routes=routes, middleware=[host_check])


def read_count(request, name):
    """A whole number of the query, 0 without it."""
    text = request.query_params.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise HTTPException(400, f"{name}={text!r:.50} is no whole number")
    return int(text)


def parse_args(argv=None):
    parser = ArgumentParser(prog="python -m scripts.watch", description=__doc__)
    parser.add_argument("-p", "--port", type=int, default=8001, help="0 = any free one (default: 8001)")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        raise UserError(f"--port={args.port}: need 0 to 65535", "for example --port=8001")
    return args


def main():
    args = parse_args()
    base_dir = get_base_dir()
    sock = listen("127.0.0.1", args.port, "watch")
    print(f"http://127.0.0.1:{sock.getsockname()[1]} | runs of {base_dir}", flush=True)
    config = uvicorn.Config(create_app(base_dir), log_level="warning", ws="none", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[sock])


if __name__ == "__main__":
    run_script(main)
