"""
Load on the chat server: many clients that stream, and what each of them feels.

    python -m dev.bench_serving --depth=4                      a server of its own with random weights, d4
    python -m dev.bench_serving --url=http://127.0.0.1:8000    a server that runs already (--model, --api_key)
    python -m dev.bench_serving --depth=1 --vocab_size=512 --clients=1,4 --seconds=2 --churn=20    the smallest run

Each client asks, reads its stream to the end and asks again, with prompts of mixed lengths. Reported for each number
of clients: requests/s, tokens/s, the time to the first token, the gap between pieces of text, /health meanwhile. Then
`churn` requests of which many are cut off at random, and the server's memory before and after. Clients speak HTTP
over plain asyncio streams, to take little of the machine that they share with the server. Answers end by length
alone (the stop tokens are off in a server of its own), so that each request is the same work.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import time
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
churn: int = 1000             # requests of which many are cut off; 0 = none
model: str | None = None      # name of the model to ask; None = the server's default
api_key: str | None = None    # of a server that wants one
serve: bool = False           # be the server (used by the benchmark itself)

WORDS = "the light of the sea and a boat that came home late in the evening when seven stars were out".split()


# -----------------------------------------------------------------------------
# A server of its own


def made_up_tokenizer():
    """Where the vocabulary's size matters and its words do not: bytes, pairs of letters, pairs of pairs."""
    from nanochat.tokenizer import SPECIAL_TOKENS, RustBPETokenizer

    letters = [bytes([byte]) for byte in range(ord("a"), ord("z") + 1)]
    pairs = [a + b for a in letters for b in letters]
    quads = (a + b for a in pairs for b in pairs)
    tokens = [bytes([byte]) for byte in range(256)] + pairs
    return RustBPETokenizer((tokens + list(islice(quads, vocab_size)))[: vocab_size - len(SPECIAL_TOKENS)])


def run_server():
    """Serve random weights on a free port, which is printed first."""
    import socket

    import torch
    import uvicorn

    from nanochat.common import compute_init
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.inference import prepare
    from nanochat.service import Service
    from nanochat.serving import Lane
    from scripts.chat_web import create_app

    device = compute_init()[3]
    tokenizer = made_up_tokenizer()

    def load(i):
        net = GPT.create(GPTConfig.from_depth(depth, tokenizer.get_vocab_size(), max_seq_len), device)
        with torch.no_grad():  # the zeros of a fresh model would make every token as likely
            for p in net.parameters():
                if not p.any():
                    p.normal_(std=0.02)
        engine = Engine(prepare(net), tokenizer)
        engine.stop_tokens = frozenset()
        return {"random": Lane(engine, rows, chunk=2048 if device.type == "cuda" else 256).prepare()}

    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    app = create_app(Service(load, ["random"], max_waiting=4096))
    uvicorn.Server(uvicorn.Config(app, log_level="error")).run(sockets=[sock])


def start_server():
    """(process, its address)"""
    flags = [f"--{name}={globals()[name]}" for name in ("depth", "vocab_size", "max_seq_len", "rows")]
    process = subprocess.Popen([sys.executable, "-m", "dev.bench_serving", "--serve=True", *flags],
                               stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def resident_bytes(pid):
    """Memory that a process holds, or None where the kernel does not say."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, TypeError):
        return None


# -----------------------------------------------------------------------------
# Clients


async def request(address, method, path, body=None):
    """Send a request; returns (reader, writer) before the response."""
    parts = urlsplit(address)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
    data = json.dumps(body).encode() if body is not None else b""
    key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n{key}Content-Type: "
                 f"application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


async def stream(address, rng, leave_after=None):
    """One streamed answer: (seconds to the first token, gaps, tokens), or None where it was cut off or refused."""
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, prompt_words)))
    body = {"messages": [{"role": "user", "content": prompt}], "stream": True, "max_tokens": max_tokens,
            "stream_options": {"include_usage": True}, **({"model": model} if model else {})}
    begin, times, tokens = time.perf_counter(), [], 0
    reader, writer = await request(address, "POST", "/v1/chat/completions", body)
    try:
        if b" 200 " not in await reader.readline():
            return None
        async for line in reader:
            if line.startswith(b"data: {"):
                chunk = json.loads(line[6:])
                delta = chunk["choices"][0]["delta"] if chunk.get("choices") else {}
                if delta.get("content") or "nanochat" in delta:
                    times.append(time.perf_counter())
                tokens = chunk.get("usage", {}).get("completion_tokens", tokens)
            if leave_after is not None and len(times) >= leave_after:
                return None
    finally:
        writer.close()
    return times[0] - begin, [b - a for a, b in zip(times, times[1:], strict=False)], tokens


async def probe_health(address, latencies):
    """Ask /health four times a second, until cancelled."""
    while True:
        begin = time.perf_counter()
        reader, writer = await request(address, "GET", "/health")
        await reader.read()
        writer.close()
        latencies.append(time.perf_counter() - begin)
        await asyncio.sleep(0.25)


def quantile(values, q):
    """In milliseconds."""
    values = sorted(values)
    return 1000 * values[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


async def measure(address, num_clients):
    """A row of the table: `seconds` of num_clients that ask again and again."""
    answers, health, deadline = [], [], time.perf_counter() + seconds

    async def client(i):
        rng = random.Random(i)
        while time.perf_counter() < deadline:
            answers.append(await stream(address, rng))

    probe = asyncio.create_task(probe_health(address, health))
    begin = time.perf_counter()
    await asyncio.gather(*map(client, range(num_clients)))
    elapsed = time.perf_counter() - begin
    probe.cancel()
    done = [answer for answer in answers if answer is not None]
    first, gaps = [answer[0] for answer in done], [gap for answer in done for gap in answer[1]]
    return {"clients": num_clients, "requests/s": len(done) / elapsed, "tokens/s": sum(a[2] for a in done) / elapsed,
            "first p50 ms": quantile(first, 0.5), "first p95 ms": quantile(first, 0.95),
            "gap p50 ms": quantile(gaps, 0.5), "gap p99 ms": quantile(gaps, 0.99),
            "health max ms": quantile(health, 1.0), "refused": len(answers) - len(done)}


async def cut_off(address, num_requests, num_clients=32):
    """num_requests of which two thirds leave somewhere in the middle. Returns how many were read to the end."""
    left, finished = iter(range(num_requests)), 0

    async def client():
        nonlocal finished
        for i in left:
            rng = random.Random(i)
            answer = await stream(address, rng, rng.randrange(max_tokens) if rng.random() < 2 / 3 else None)
            finished += answer is not None

    await asyncio.gather(*(client() for _ in range(num_clients)))
    return finished


async def until_ready(address, process, timeout_s=600):
    """Returns when the server is ready; raises when it ended, or does not get ready in time."""
    give_up_at = time.monotonic() + timeout_s
    while time.monotonic() < give_up_at and (process is None or process.poll() is None):
        try:
            reader, writer = await request(address, "GET", "/ready")
            ready = b" 200 " in await reader.readline()
            writer.close()
            if ready:
                return
        except OSError:
            pass
        await asyncio.sleep(0.1)
    raise UserError(f"the server at {address} does not get ready", "python -m scripts.chat_web shows why")


async def bench(address, process):
    await until_ready(address, process)
    await stream(address, random.Random(0))  # the first one warms up
    for i, num_clients in enumerate(map(int, clients.split(","))):
        row = await measure(address, num_clients)
        if i == 0:
            print(" | ".join(row), flush=True)
        print(" | ".join(f"{value:{len(name)}.{0 if isinstance(value, int) else 1}f}" for name, value in row.items()),
              flush=True)
    if churn:
        pid = process and process.pid
        before = resident_bytes(pid)
        finished = await cut_off(address, churn)
        await asyncio.sleep(1)
        reader, writer = await request(address, "GET", "/stats")
        stats = json.loads((await reader.read()).split(b"\r\n\r\n", 1)[1])
        writer.close()
        memory = "" if before is None else f" | memory {before / 2**20:.0f} -> {resident_bytes(pid) / 2**20:.0f} MiB"
        busy = [sum(device[key] for device in stats["devices"]) for key in ("running", "waiting")]
        print(f"{churn} requests, {finished} read to the end{memory} | running {busy[0]}, waiting {busy[1]} afterwards")


def main():
    if serve:
        return run_server()
    print(f"load average: {statistics.fmean(os.getloadavg()):.1f} on {os.cpu_count()} cores | depth {depth} | "
          f"vocabulary {vocab_size} | {max_tokens} tokens an answer" if not url else f"server: {url}", flush=True)
    process, address = (None, url.rstrip("/")) if url else start_server()
    try:
        asyncio.run(bench(address, process))
    finally:
        if process:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
