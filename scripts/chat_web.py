"""
Serve models to many people at once: a chat page, and an API that any OpenAI client can talk to.

    python -m scripts.chat_web                                      (the newest SFT model, http://127.0.0.1:8000)
    python -m scripts.chat_web --models base:d20,sft:d20,rl:d20     (several, chosen by name: base-d20, sft-d20, ...)
    NANOCHAT_API_KEY=... python -m scripts.chat_web --host 0.0.0.0 --num_gpus 8

Everybody who asks is decoded together, in one thread per device. Closing the connection frees the row within a
step. Chat text is never logged. Pages: / · API: /v1/models /v1/chat/completions /v1/completions /tokenize, and
/chat/completions as the first nanochat servers had it · operations: /health /ready /stats /metrics.
"""

import errno
import hmac
import ipaddress
import math
import os
import secrets
import socket
import time
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import prometheus_client
import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from nanochat.checkpoint_manager import STAGE_DIRS, CheckpointManager, find_checkpoint_dir, load_checkpoint
from nanochat.common import UserError, compute_init, run_script
from nanochat.configurator import ArgumentParser
from nanochat.engine import Engine
from nanochat.precision import get_precision_dtype
from nanochat.protocol import (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    TokenReply,
    error_body,
    explain,
    token_text,
)
from nanochat.service import GRACE_S, Service, begin_chat, begin_completion, respond
from nanochat.serving import Lane

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
MAX_BODY_BYTES = 4 * 2**20  # of a request
OPEN_PATHS = ("/", "/health", "/ready", "/favicon.ico")  # need no key
CSP = ("default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src 'self' data:; "
       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")

# -----------------------------------------------------------------------------
# The application


class Gate:
    """Before everything else: is the key right, is the body small enough; and afterwards, count the response."""

    def __init__(self, app, service, api_key):
        self.app, self.service, self.api_key = app, service, api_key

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = 500

        async def counting_send(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            refusal = self.refuse(scope)
            await (refusal or self.app)(scope, self.bounded(receive), counting_send)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.service.requests.labels(path, str(status)).inc()

    def refuse(self, scope):
        headers = Headers(scope=scope)
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if self.api_key and scope["path"] not in OPEN_PATHS and not hmac.compare_digest(
                given.encode("latin-1"), self.api_key.encode()):  # headers are bytes, which ASGI shows as latin-1
            return error_response(401, "Invalid or missing API key: send it as 'Authorization: Bearer KEY'",
                                  headers={"WWW-Authenticate": "Bearer"})
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            return error_response(413, f"The request has {length} bytes; at most {MAX_BODY_BYTES} are allowed")

    @staticmethod
    def bounded(receive):
        num_bytes = 0

        async def bounded_receive():
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > MAX_BODY_BYTES:
                raise HTTPException(413, f"The request is longer than {MAX_BODY_BYTES} bytes")
            return message

        return bounded_receive


def error_response(status, message, param=None, code=None, headers=None):
    return JSONResponse(error_body(message, status, param, code), status, headers)


async def on_http_error(request, error):
    about = error.detail if isinstance(error.detail, dict) else {"message": str(error.detail)}
    return error_response(error.status_code, **about, headers=error.headers)


async def on_invalid_request(request, error):
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return error_response(400, f"The body is not JSON: {first['ctx']['error']} at character {first['loc'][1]}")
    if first["loc"] == ("body",) and "json" not in request.headers.get("content-type", ""):
        return error_response(415, "The request has no header 'Content-Type: application/json'")
    where, what = explain(error.errors())
    return error_response(400, f"{where or 'body'}: {what}", param=where or None)


async def on_failure(request, error):
    return error_response(500, "The server failed; its log has the details")


def create_app(service, api_key=None, cors_origin=None, hosts=LOCAL_HOSTS):
    @asynccontextmanager
    async def lifespan(app):
        service.start()
        yield
        service.stop(grace_s=0)
        await service.join()

    # no /docs: it would load scripts from elsewhere
    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None,
                  responses={"4XX": {"description": "refused; the body is OpenAI's `error`"}}, exception_handlers={
        StarletteHTTPException: on_http_error, RequestValidationError: on_invalid_request, Exception: on_failure})
    app.add_middleware(Gate, service=service, api_key=api_key)
    if not api_key:  # open to this machine alone: a web page that gives itself our address by DNS is refused
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    if cors_origin:
        app.add_middleware(CORSMiddleware, allow_origins=cors_origin, allow_methods=["*"], allow_headers=["*"])

    app.head("/", include_in_schema=False)(app.get("/", response_class=HTMLResponse)(page))

    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [model_card(service, name) for name in service.names]}

    @app.get("/v1/models/{name}")
    def model(name: str):
        return model_card(service, service.find_name(name))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http_request: Request):
        return await respond(service, http_request, request, begin_chat)

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest, http_request: Request):
        return await respond(service, http_request, request, begin_completion)

    @app.post("/chat/completions")
    async def token_stream(request: ChatRequest, http_request: Request):
        return await respond(service, http_request, request, partial(begin_chat, kind=TokenReply), stream=True)

    @app.post("/tokenize")
    def tokenize(request: TokenizeRequest):
        _, lane = service.resolve(request.model)
        tokenizer = lane.engine.tokenizer
        try:
            ids = tokenizer.encode(request.prompt) if request.messages is None else tokenizer.render_for_completion(
                {"messages": [message.as_turn() for message in request.messages]})
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return JSONResponse({  # made here, in a thread: a long text takes seconds, and nobody else should wait
            "count": len(ids), "max_model_len": lane.decoder.max_length, "tokens": ids,
            "token_strs": [token_text(tokenizer, token) for token in ids]})

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready():
        if service.trouble:
            raise HTTPException(503, service.trouble, {"Retry-After": "5"})
        return {"status": "ready"}

    @app.get("/stats")
    async def stats():
        return {"uptime_s": round(time.time() - service.started_at, 1), "models": service.names, "devices": [
            {"running": thread.num_running, "waiting": thread.num_waiting,
             "rows": {name: lane.num_rows for name, lane in thread.lanes.items()}} for thread in service.threads]}

    @app.get("/metrics")
    async def metrics():
        return Response(prometheus_client.generate_latest(service.registry),
                        media_type=prometheus_client.CONTENT_TYPE_LATEST)

    return app


def page():
    nonce = secrets.token_urlsafe(16)
    html = (Path(__file__).parents[1] / "nanochat" / "ui.html").read_text(encoding="utf-8")
    return HTMLResponse(html.replace("__NONCE__", nonce), headers={
        "Content-Security-Policy": CSP.format(nonce), "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"})


def model_card(service, name):
    lane = service.threads[0].lanes.get(name)
    return {"id": name, "object": "model", "created": int(service.started_at), "owned_by": "nanochat",
            "max_model_len": lane.decoder.max_length if lane else None}


# -----------------------------------------------------------------------------
# Start

RANGES = {"step": (0, math.inf), "temperature": (0, 10), "top_k": (0, math.inf), "max_tokens": (1, math.inf),
          "port": (0, 65535), "num_gpus": (1, math.inf), "rows": (1, math.inf), "max_waiting": (1, math.inf)}


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-i", "--source", default="sft", choices=STAGE_DIRS, help="stage of the model (default: sft)")
    add("-g", "--model_tag", "--model-tag", help="model to load (default: the one saved last)")
    add("-s", "--step", type=int, help="step to load (default: the last)")
    add("--models", help="several models, stage:tag or stage:tag:step, with commas between; the first is the default")
    add("-t", "--temperature", type=float, default=0.8, help="where a request names none (default: 0.8)")
    add("-k", "--top_k", "--top-k", type=int, default=50, help="where a request names none; 0 = off (default: 50)")
    add("-m", "--max_tokens", "--max-tokens", type=int, default=512, help="of an answer, if unnamed (default: 512)")
    add("-p", "--port", type=int, default=8000, help="0 = any free one (default: 8000)")
    add("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine alone)")
    add("--api_key", "--api-key", default=os.environ.get("NANOCHAT_API_KEY"), help="required of every request "
        "(default: $NANOCHAT_API_KEY, which other users of this machine cannot read)")
    add("--cors_origin", "--cors-origin", action="append", help="web origin that may call the API; may be repeated")
    add("-n", "--num_gpus", "--num-gpus", type=int, default=1, help="GPUs, each with a copy of the models (default: 1)")
    add("--rows", type=int, help="answers at once on a device (default: by memory, at most 64 on a CPU, 256 on a GPU)")
    add("--max_waiting", "--max-waiting", type=int, default=256, help="answers that may wait per device (default: 256)")
    add("--device_type", "--device-type", default="", help="cuda, mps or cpu (default: detect)")
    args = parser.parse_args(argv)
    for name, (low, high) in RANGES.items():
        value, need = getattr(args, name), f"{low} or more" if high == math.inf else f"{low} to {high}"
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name}={value}: need {need}", f"for example --{name}={parser.get_default(name) or low}")
    return args


def find_models(args):
    """{name: (stage, tag, step)} of the checkpoints to serve; refuses what is not there before anything starts."""
    single = [args.source, args.model_tag or "", "" if args.step is None else str(args.step)]
    specs = args.models.split(",") if args.models else [":".join(single)]
    found = {}
    for spec in specs:
        stage, tag, step, *rest = [*spec.strip().split(":"), "", ""]
        if any(rest) or not (step or "0").isdecimal():
            raise UserError(f"--models: {spec!r} is not stage:tag or stage:tag:step", "for example --models=sft:d20")
        folder = find_checkpoint_dir(stage, tag or None)
        step, _ = CheckpointManager(folder).load_meta(int(step) if step else None)
        name = f"{stage}-{folder.name}"
        found[f"{name}-{step}" if name in found else name] = (stage, folder.name, step)  # several steps of a model
    return found


def load_lanes(models, device_type, rows, i):
    """{name: Lane} on device i, every model with its share of the memory."""
    device = torch.device(device_type, i) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    loaded = {name: load_checkpoint(stage, device, tag, step) for name, (stage, tag, step) in models.items()}
    most, memory = (256, 0.5 * torch.cuda.mem_get_info(device)[0]) if device_type == "cuda" else (64, 4e9)
    lanes = {}
    for name, (model, tokenizer, _) in loaded.items():
        c, itemsize = model.config, get_precision_dtype(device_type).itemsize
        row_bytes = 2 * c.n_layer * c.n_kv_head * (c.n_embd // c.n_head) * c.sequence_len * itemsize  # keys and values
        num_rows = rows or int(min(most, max(1, memory / len(loaded) // row_bytes)))
        lanes[name] = Lane(Engine(model, tokenizer), num_rows, chunk=2048 if device_type == "cuda" else 256).prepare()
    return lanes


class Server(uvicorn.Server):
    """A signal first stops the service, so that open streams get their time; then the server."""

    def handle_exit(self, sig, frame):
        self.config.app.state.service.stop()
        super().handle_exit(sig, frame)


def is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(host, port):
    """A socket on this address, before anything is loaded. A name with several addresses (localhost) means its IPv4."""
    try:
        family, *_, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        return socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:  # UnicodeError: no name of a machine can look like that
        other_port = f"-p {port + 1 if 1023 < port < 65535 else 8001}"
        flag = other_port if getattr(error, "errno", 0) in (errno.EADDRINUSE, errno.EACCES) else "--host=127.0.0.1"
        raise UserError(f"cannot listen on --host={host} --port={port}: {getattr(error, 'strerror', None) or error}",
                        f"python -m scripts.chat_web {flag}") from error


def main():
    args = parse_args()
    if not is_loopback(args.host) and not args.api_key:
        raise UserError(f"--host={args.host} lets other machines in, which needs a key",
                        f"NANOCHAT_API_KEY=$(openssl rand -hex 16) python -m scripts.chat_web --host={args.host}")
    models = find_models(args)
    sock = listen(args.host, args.port)
    device = compute_init(args.device_type)[3]
    if args.num_gpus > max(1, torch.cuda.device_count()):
        raise UserError(f"--num_gpus={args.num_gpus}, but there are {torch.cuda.device_count()}", "ask for fewer")
    service = Service(partial(load_lanes, models, device.type, args.rows), list(models), args.num_gpus,
                      args.max_waiting, args.temperature, args.top_k, args.max_tokens)
    app = create_app(service, args.api_key, args.cors_origin, (*LOCAL_HOSTS, args.host))
    app.state.service = service
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S + 2))
    service.on_failure = lambda: setattr(server, "should_exit", True)
    address = f"http://{f'[{args.host}]' if ':' in args.host else args.host}:{sock.getsockname()[1]}"
    print(f"{address} | device: {args.num_gpus} x {device.type} | loading: {', '.join(models)}", flush=True)
    server.run(sockets=[sock])
    if service.error is not None:
        raise service.error


if __name__ == "__main__":
    run_script(main)
