"""
Serve models to many people at once: a chat page, and an API that any OpenAI client can talk to.

    python -m scripts.chat_web                          (the newest SFT model, http://127.0.0.1:8000)
    python -m scripts.chat_web --models base:d20,sft:d20         (several, chosen by name: sft-d20)
    NANOCHAT_API_KEY=... python -m scripts.chat_web --host 0.0.0.0 --num_gpus 8

All requests for a model are decoded together, by one thread per device. Closing the connection
frees the row within a step. Chat text is never logged.

Page: / · API: /v1/models /v1/chat/completions /v1/responses /v1/completions /tokenize
Operations: /health /ready /metrics
"""

import ipaddress
import math
import os
import re
from contextlib import asynccontextmanager
from functools import partial

import prometheus_client
import torch
from fastapi import FastAPI, HTTPException
from fastapi import Request as HTTPRequest
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, Response

from nanochat.api import ChatRequest, CompletionRequest, TokenizeRequest
from nanochat.api_responses import ResponsesRequest
from nanochat.chat_response import token_text
from nanochat.checkpoint_manager import STAGE_DIRS, CheckpointManager, find_checkpoint_dir, load_checkpoint
from nanochat.common import UserError, compute_init, run_script
from nanochat.configurator import ArgumentParser, switch
from nanochat.connections import Server
from nanochat.engine import PROMPTS, Engine
from nanochat.gate import ERROR_HANDLERS, BodyRoute, Gate, split_keys
from nanochat.kv_cache import KVCache
from nanochat.precision import get_precision_dtype
from nanochat.scheduler import Scheduler
from nanochat.service import Service, build_chat, build_completion, build_response, respond
from nanochat.web import LOCAL_HOSTS, listen, page_response

# -----------------------------------------------------------------------------
# The application


def create_app(service, api_keys=(), cors_origin=None, hosts=LOCAL_HOSTS):
    @asynccontextmanager
    async def lifespan(app):
        service.start()
        yield
        # open streams had their time: see Server
        service.stop(grace_s=0)
        await service.join()

    # FastAPI's own 422 is never sent; no /docs, since it would load scripts from elsewhere
    refused = {"4XX": {"description": "refused; the body is OpenAI's `error`"}}
    app = FastAPI(title="nanochat", lifespan=lifespan, docs_url=None, redoc_url=None,
                  responses=refused, exception_handlers=ERROR_HANDLERS)
    app.router.route_class = BodyRoute

    # the middleware that is added last is the outermost
    app.add_middleware(Gate, service=service, api_keys=api_keys, hosts=hosts)
    if cors_origin:
        app.add_middleware(
            CORSMiddleware, allow_origins=cors_origin, allow_methods=["*"], allow_headers=["*"])

    add_api_routes(app, service)
    add_operations_routes(app, service)
    return app


def add_api_routes(app, service):
    @app.get("/v1/models")
    def models():
        return {"object": "list", "data": [model_card(service, name) for name in service.names]}

    @app.get("/v1/models/{name}")
    def model(name: str):
        return model_card(service, service.find_name(name))

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, http_request: HTTPRequest):
        return await respond(service, http_request, body, build_chat)

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, http_request: HTTPRequest):
        return await respond(service, http_request, body, build_response)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http_request: HTTPRequest):
        return await respond(service, http_request, body, build_completion)

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest):
        _, scheduler = service.find_model(body.model)
        tokenizer = scheduler.engine.tokenizer
        try:
            if body.messages is None:
                ids = tokenizer.encode(body.prompt)
            else:
                turns = [message.as_turn() for message in body.messages]
                ids = tokenizer.render_for_completion({"messages": turns}, continue_final_message=True)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        # the JSON of a long text takes seconds: made here, in a worker thread, nobody waits for it
        return JSONResponse({
            "count": len(ids),
            "max_model_len": scheduler.decoder.max_length,
            "tokens": ids,
            "token_strs": [token_text(tokenizer, token) for token in ids],
        })


def model_card(service, name):
    scheduler = service.batchers[0].schedulers.get(name)  # None: not loaded yet
    return {
        "id": name,
        "object": "model",
        "created": int(service.started_at),
        "owned_by": "nanochat",
        "max_model_len": scheduler.decoder.max_length if scheduler else None,
        "nanochat": service.about.get(name, {}),
    }


def add_operations_routes(app, service):
    app.get("/", response_class=HTMLResponse)(page)
    app.head("/", include_in_schema=False)(page)

    @app.head("/health", include_in_schema=False)
    @app.get("/health")
    async def health():
        return {"status": "ok"}

    @app.head("/ready", include_in_schema=False)
    @app.get("/ready")
    async def ready():
        service.check_ready()
        return {"status": "ready"}

    @app.get("/metrics")
    async def metrics():
        content = prometheus_client.generate_latest(service.registry)
        return Response(content, media_type=prometheus_client.CONTENT_TYPE_LATEST)


def page():
    """The chat page."""
    return page_response("ui.html")


# -----------------------------------------------------------------------------
# Flags

AT_LEAST = {"step": 0, "temperature": 0, "top_k": 0, "max_tokens": 1,
            "port": 0, "num_gpus": 1, "rows": 1, "max_waiting": 1}
AT_MOST = {"temperature": 10, "port": 65535}  # temperature: as in api.py


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("-i", "--source", default="sft", choices=STAGE_DIRS, help="stage of the model (default: sft)")
    add("-g", "--model_tag", "--model-tag", help="model to load (default: the one saved last)")
    add("-s", "--step", type=int, help="step to load (default: the last)")
    add("--models", help="several models, stage:tag or stage:tag:step, with commas between; "
        "the first is the default")
    add("--verify", type=switch, default=True, metavar="BOOL",
        help="false: load without comparing files with their checksums (default: true)")
    add("-p", "--port", type=int, default=8000, help="0 = any free one (default: 8000)")
    add("--host", default="127.0.0.1", help="address (default: 127.0.0.1, this machine alone)")
    add("--api_key", "--api-key", default=os.environ.get("NANOCHAT_API_KEY") or None,
        help="required of every request; several, with commas between them, tell clients apart "
        "(default: $NANOCHAT_API_KEY, which other users cannot read)")
    add("--allow_host", "--allow-host", action="append", default=[],
        help="name by which others call this server, such as host.docker.internal; may be repeated "
        "(with a key any name is answered)")
    add("--cors_origin", "--cors-origin", action="append",
        help="web origin that may call the API; may be repeated")
    add("-n", "--num_gpus", "--num-gpus", type=int, default=1,
        help="GPUs, each with a copy of the models (default: 1)")
    add("--rows", type=int, help="requests decoded at once on a device (default: by memory, at "
        "most 64 on a CPU, 256 on a GPU)")
    add("--max_waiting", "--max-waiting", type=int, default=512,
        help="completions (prompts x n) that may wait per device; a lone client may have half of "
        "them (default: 512)")
    add("--device_type", "--device-type", default="", help="cuda, mps or cpu (default: detect)")
    add = parser.add_argument_group("for requests that leave them out").add_argument
    add("-t", "--temperature", type=float, default=0.8, help="default: 0.8")
    add("-k", "--top_k", "--top-k", type=int, default=50, help="0 = off (default: 50)")
    add("-m", "--max_tokens", "--max-tokens", type=int, default=512, help="of chats (default: 512)")
    args = parser.parse_args(argv)

    for name, low in AT_LEAST.items():
        value = getattr(args, name)
        high = AT_MOST.get(name, math.inf)
        if value is not None and not low <= value <= high:  # also refuses nan
            need = f"{low} to {high}" if name in AT_MOST else f"{low} or more"
            example = parser.get_default(name) or low
            raise UserError(f"--{name}={value}: need {need}", f"for example --{name}={example}")

    args.api_keys = split_keys(args.api_key)
    # somebody meant to have a key: an empty variable, for example
    if args.api_key is not None and not args.api_keys:
        raise UserError(f"--api_key={args.api_key!r}: a blank key is no key",
                        "NANOCHAT_API_KEY=$(openssl rand -hex 16) python -m scripts.chat_web")
    return args


def find_models(args):
    """{name: its stage, tag, step and examples}. UserError if a checkpoint does not exist."""
    # without --models, -i, -g and -s say the same as one spec; empty parts mean the newest
    last_part = "" if args.step is None else args.step
    models = args.models or f"{args.source}:{args.model_tag or ''}:{last_part}"

    found = {}
    for spec in models.split(","):
        match = re.fullmatch(r"([^:]*):?([^:]*):?(\d*)", spec.strip())
        if match is None:
            raise UserError(f"--models: {spec!r} is not stage:tag or stage:tag:step",
                            "for example --models=sft:d20")
        stage, tag, step = match.groups()
        # the newest tag and step where none is named
        folder = find_checkpoint_dir(stage, tag or None)
        step, meta = CheckpointManager(folder, args.verify).load_meta(int(step) if step else None)
        name = f"{stage}-{folder.name}"
        if name in found:  # another step of the same model
            name = f"{name}-{step}"
        # what the page offers to ask; a base model answers nothing, it goes on with a text
        examples = PROMPTS if stage == "base" else meta.get("examples", [])
        found[name] = {"stage": stage, "tag": folder.name, "step": step, "examples": examples}
    return found


# -----------------------------------------------------------------------------
# Start


def load_schedulers(models, device_type, rows, i, verify=True):
    """{name: Scheduler} on device i, for the models of `find_models`."""
    device = enter_device(device_type, i)
    # all models first: what memory they leave is for the caches
    loaded = {}
    for name, spec in models.items():
        loaded[name] = load_checkpoint(spec["stage"], device, spec["tag"], spec["step"], verify)

    # each model's cache gets an equal share
    cache_bytes = cache_budget(device) / len(loaded)
    chunk = 2048 if device_type == "cuda" else 256  # tokens of prompts between two decoding steps
    schedulers = {}
    for name, (model, tokenizer, _) in loaded.items():
        num_rows = rows or count_rows(model.config, device, cache_bytes)
        schedulers[name] = Scheduler(Engine(model, tokenizer), num_rows, chunk).warm_up()
    return schedulers


def enter_device(device_type, i):
    """Device i of this type; a GPU becomes the current one of this thread."""
    if device_type != "cuda":
        return torch.device(device_type)
    device = torch.device("cuda", i)
    torch.cuda.set_device(device)
    return device


def cache_budget(device):
    """Bytes that all KV caches may take: half of a GPU's free memory, 4 GB of a CPU's."""
    if device.type == "cuda":
        return 0.5 * torch.cuda.mem_get_info(device)[0]
    return 4e9


def count_rows(config, device, cache_bytes):
    """Rows of a model's KV cache that fit into cache_bytes: 1 to 256 on a GPU, 1 to 64 on a CPU."""
    # a cache of one full row, on the device that has shapes but no memory
    dtype = get_precision_dtype(device.type)
    length = config.sequence_len
    cache = KVCache(config, 1, length, "meta", dtype, length)
    num_rows = int(cache_bytes / (cache.k.nbytes + cache.v.nbytes))
    most_rows = 256 if device.type == "cuda" else 64
    return min(most_rows, max(1, num_rows))


def is_loopback(host):
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def main():
    # refuse what cannot work before anything is loaded
    args = parse_args()
    if not is_loopback(args.host) and not args.api_keys:
        command = f"python -m scripts.chat_web --host={args.host}"
        raise UserError(f"--host={args.host} lets other machines in, which needs a key",
                        f"NANOCHAT_API_KEY=$(openssl rand -hex 16) {command}")
    models = find_models(args)
    sock = listen(args.host, args.port)

    _, _, _, device = compute_init(args.device_type)
    num_gpus = torch.cuda.device_count()
    if args.num_gpus > max(1, num_gpus):
        raise UserError(f"--num_gpus={args.num_gpus}, but there are {num_gpus}", "ask for fewer")

    # models load in the threads that will serve them
    load = partial(load_schedulers, models, device.type, args.rows, verify=args.verify)
    service = Service(load, list(models), args.num_gpus, args.max_waiting,
                      args.temperature, args.top_k, args.max_tokens)
    service.about = models
    hosts = (*LOCAL_HOSTS, args.host, *(name.lower() for name in args.allow_host))
    app = create_app(service, args.api_keys, args.cors_origin, hosts)
    server = Server(app, service)

    # a model that cannot be loaded ends the server; its error is raised below
    service.on_failure = lambda: setattr(server, "should_exit", True)
    host = f"[{args.host}]" if ":" in args.host else args.host  # an IPv6 address
    address = f"http://{host}:{sock.getsockname()[1]}"
    print(f"{address} | device: {args.num_gpus} x {device.type} | loading: {', '.join(models)}", flush=True)
    server.run(sockets=[sock])
    if service.error is not None:
        raise service.error


if __name__ == "__main__":
    run_script(main)
