"""
Load on the chat server: many clients that stream, and what each of them feels.

    python -m dev.bench_serving --depth=4                      a server of its own with random weights, d4
    python -m dev.bench_serving --url=http://127.0.0.1:8000    a server that runs already (--model, --api_key)
    python -m dev.bench_serving --depth=1 --vocab_size=512 --clients=1,4 --seconds=2 --churn=20    the smallest run

Each client asks, reads its stream to the end and asks again, with prompts of mixed lengths. Reported for each number
of clients: requests/s, tokens/s, the time to the first token, the gap between pieces of text, and the latency of
/health meanwhile. Then `churn` requests, many of which are cut off at random, and the server's memory before and after.

The clients speak HTTP over plain asyncio streams: they share the machine with the server, and a client library would
take more of it. In a server of its own, answers end by length alone, so that each request is the same work.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from urllib.parse import urlsplit

from nanochat.common import UserError, run_script
from nanochat.configurator import override_from_cli

# -----------------------------------------------------------------------------
# Settings
url: str = ""                 # server to load; empty = start one with random weights
depth: int = 4                # of the model of a server of its own
vocab_size: int = 32768       # of that model
max_seq_len: int = 1024       # of that model
rows: int = 64                # answers that server decodes at once
clients: str = "1,4,16,64"    # numbers of clients, one measurement each
seconds: float = 20.0         # of each measurement
max_tokens: int = 32          # of each answer
prompt_words: int = 40        # of the longest prompt; the shortest has one
churn: int = 1000             # requests, two thirds of which are cut off; 0 = none
model: str | None = None      # name of the model to ask; None = the server's default
api_key: str | None = None    # of a server that wants one
max_waiting: int = 4096       # completions that may wait at that server
beside: int = 0               # processes that keep a core busy meanwhile
serve: bool = False           # be the server (used by the benchmark itself)
probe: str = ""               # be the one that asks for /health at this address (used by the benchmark itself)

WORDS = "the light of the sea and a boat that came home late in the evening when seven stars were out".split()


# -----------------------------------------------------------------------------
# A server of its own


def made_up_tokenizer():
    """A tokenizer with the vocabulary's size and meaningless words: bytes, pairs of letters, pairs of pairs."""
    from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

    letters = [bytes([byte]) for byte in range(ord("a"), ord("z") + 1)]
    pairs = [a + b for a in letters for b in letters]
    quads = (a + b for a in pairs for b in pairs)
    tokens = [bytes([byte]) for byte in range(256)] + pairs
    tokens.extend(islice(quads, vocab_size))
    return RustBPETokenizer(tokens[: vocab_size - len(SPECIAL_TOKENS)])


def run_server():
    """Serve random weights on a free port, which is printed first."""
    import torch

    from nanochat.common import compute_init
    from nanochat.connections import Server
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.inference import prepare
    from nanochat.scheduler import Scheduler
    from nanochat.service import Service
    from nanochat.web import listen
    from scripts.chat_web import create_app

    _, _, _, device = compute_init()
    tokenizer = made_up_tokenizer()
    chunk = 2048 if device.type == "cuda" else 256

    def load(i):
        net = GPT.create(GPTConfig.from_depth(depth, tokenizer.get_vocab_size(), max_seq_len), device)
        # a fresh model has zeros in its last layers, with which every token would be as likely
        with torch.no_grad():
            for p in net.parameters():
                if not p.any():
                    p.normal_(std=0.02)
        engine = Engine(prepare(net), tokenizer)
        engine.stop_tokens = frozenset()
        return {"random": Scheduler(engine, rows, chunk).warm_up()}

    sock = listen("127.0.0.1", 0)
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    service = Service(load, ["random"], max_waiting=max_waiting)
    Server(create_app(service), service).run(sockets=[sock])


def start_server():
    """(process, its address)"""
    flags = [f"--{name}={globals()[name]}" for name in ("depth", "vocab_size", "max_seq_len", "rows", "max_waiting")]
    command = [sys.executable, "-m", "dev.bench_serving", "--serve=True", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def resident_mib(process):
    """Memory that a server of our own holds, in MiB, or nan where the kernel does not say."""
    try:
        with open(f"/proc/{process.pid}/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except (OSError, AttributeError):
        return float("nan")


# -----------------------------------------------------------------------------
# Clients


async def request(address, method, path, body=None):
    """Send a request; returns (reader, writer) before the response."""
    parts = urlsplit(address)
    data = b"" if body is None else json.dumps(body).encode()
    headers = [
        f"{method} {path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    if api_key:
        headers.append(f"Authorization: Bearer {api_key}")
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    writer.write("\r\n".join([*headers, "", ""]).encode() + data)
    await writer.drain()
    return reader, writer


async def fetch(address, path):
    """The whole response to a GET, head included, as text."""
    reader, writer = await request(address, "GET", path)
    response = await reader.read()
    writer.close()
    return response.decode()


@dataclass
class Answer:
    """What a client saw of a streamed answer."""
    begin: float                               # time of the request, in seconds
    times: list = field(default_factory=list)  # of the pieces of text
    tokens: int = 0
    complete: bool = False                     # read to its end: neither refused nor cut off

    def gaps(self):
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def stream(address, rng, leave_after=None):
    """Ask for an answer and read it, up to a number of pieces of text if leave_after is set."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, prompt_words)))
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "max_tokens": max_tokens,
        "stream_options": {"include_usage": True},
        "model": model,
    }
    answer = Answer(time.perf_counter())
    reader, writer = await request(address, "POST", "/v1/chat/completions", body)
    try:
        if b" 200 " not in await reader.readline():
            return answer
        async for line in reader:
            if line.startswith(b"data: {"):
                read_chunk(json.loads(line[6:]), answer)
            if leave_after is not None and len(answer.times) >= leave_after:
                return answer
    finally:
        writer.close()
    answer.complete = True
    return answer


def read_chunk(chunk, answer):
    """Note the time of a chunk with text; the last chunk holds the usage instead."""
    if chunk["choices"]:
        delta = chunk["choices"][0]["delta"]
        if delta.get("content") or "nanochat" in delta:
            answer.times.append(time.perf_counter())
    if "usage" in chunk:
        answer.tokens = chunk["usage"]["completion_tokens"]


# -----------------------------------------------------------------------------
# Measurements


async def run_probe():
    """Ask for /health 20 times a second and print the latencies, in seconds, until ended."""
    while True:
        begin = time.perf_counter()
        await fetch(probe, "/health")
        print(time.perf_counter() - begin, flush=True)
        await asyncio.sleep(0.05)


def start_probe(address):
    """A process of its own, since the clients here would delay what it measures."""
    command = [sys.executable, "-m", "dev.bench_serving", f"--probe={address}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def end_probe(process):
    """Its latencies."""
    process.terminate()
    output, _ = process.communicate()
    return [float(line) for line in output.splitlines()]


def start_busy_processes():
    command = [sys.executable, "-c", "while True: pass"]
    return [subprocess.Popen(command) for _ in range(beside)]


def quantile_ms(seconds, q):
    if not seconds:
        return float("nan")
    ordered = sorted(seconds)
    place = min(len(ordered) - 1, int(q * len(ordered)))
    return 1000 * ordered[place]


async def measure(address, num_clients):
    """A row of the table: `seconds` of num_clients that ask again and again."""
    answers = []
    health_probe = start_probe(address)
    begin = time.perf_counter()

    async def client(i):
        rng = random.Random(i)
        while time.perf_counter() < begin + seconds:
            answers.append(await stream(address, rng))

    await asyncio.gather(*map(client, range(num_clients)))
    elapsed = time.perf_counter() - begin
    health = end_probe(health_probe)

    complete = [answer for answer in answers if answer.complete]
    first = [answer.times[0] - answer.begin for answer in complete]
    gaps = [gap for answer in complete for gap in answer.gaps()]
    return {
        "clients": num_clients,
        "requests/s": len(complete) / elapsed,
        "tokens/s": sum(answer.tokens for answer in complete) / elapsed,
        "first p50 ms": quantile_ms(first, 0.5),
        "first p95 ms": quantile_ms(first, 0.95),
        "gap p50 ms": quantile_ms(gaps, 0.5),
        "gap p99 ms": quantile_ms(gaps, 0.99),
        "health p99 ms": quantile_ms(health, 0.99),
        "health max ms": quantile_ms(health, 1.0),
        "refused": len(answers) - len(complete),
    }


async def cut_off(address, num_requests, num_clients=32):
    """num_requests, two thirds of which leave somewhere in the middle. Returns how many were read to the end."""
    left = iter(range(num_requests))  # shared by the clients
    num_complete = 0

    async def client():
        nonlocal num_complete
        for i in left:
            rng = random.Random(i)
            leave_after = rng.randrange(max_tokens) if rng.random() < 2 / 3 else None
            answer = await stream(address, rng, leave_after)
            num_complete += answer.complete

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return num_complete


async def wait_until_ready(address, process, timeout_s=600):
    """Raises UserError if the server ends, or is not ready in time."""
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at and (process is None or process.poll() is None):
        try:
            if " 200 " in (await fetch(address, "/ready")).splitlines()[0]:
                return
        except OSError:  # it does not listen yet
            pass
        await asyncio.sleep(0.1)
    raise UserError(f"the server at {address} does not get ready", "python -m scripts.chat_web shows why")


async def bench(address, process):
    await wait_until_ready(address, process)
    await stream(address, random.Random(0))  # warm-up

    for i, num_clients in enumerate(clients.split(",")):
        row = await measure(address, int(num_clients))
        if i == 0:
            print(" | ".join(row), flush=True)
        cells = []
        for name, value in row.items():
            decimals = 0 if isinstance(value, int) else 1
            cells.append(f"{value:{len(name)}.{decimals}f}")
        print(" | ".join(cells), flush=True)

    if churn:
        before = resident_mib(process)
        num_complete = await cut_off(address, churn)
        await asyncio.sleep(1)
        metrics = await fetch(address, "/metrics")
        busy = [line for line in metrics.splitlines() if line.startswith(("nanochat_running ", "nanochat_waiting "))]
        print(f"{churn} requests, {num_complete} read to the end | memory {before:.0f} -> {resident_mib(process):.0f} "
              f"MiB | afterwards: {', '.join(busy)}")


def main():
    if serve:
        run_server()
        return
    if probe:
        asyncio.run(run_probe())
        return
    if url:
        process = None
        address = url.rstrip("/")
        print(f"server: {address}", flush=True)
    else:
        process, address = start_server()
        load = statistics.fmean(os.getloadavg())
        print(f"load average: {load:.1f} on {os.cpu_count()} cores | depth {depth} | vocabulary {vocab_size} | "
              f"{max_tokens} tokens an answer", flush=True)
    busy = start_busy_processes()
    try:
        asyncio.run(bench(address, process))
    finally:
        for other in busy + [process] * bool(process):
            other.terminate()
            other.wait()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
