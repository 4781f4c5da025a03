"""
Load on the chat server: many clients that stream, and what each of them feels.

    python -m dev.bench_serving --depth=4                      a server of its own with random weights, d4
    python -m dev.bench_serving --source=sft                   a server of its own with the newest SFT model
    python -m dev.bench_serving --url=http://127.0.0.1:8000    a server that runs already (--model, --api_key)
    python -m dev.bench_serving --against=http://127.0.0.1:8001    in turn with another server: dev/compare_serving.sh
    python -m dev.bench_serving --depth=1 --vocab_size=512 --clients=1,4 --seconds=2 --churn=20    the smallest run

Each client asks, reads its stream to the end and asks again, with prompts of mixed lengths. Reported for each number
of clients: requests/s, tokens/s, the time to the first token, the gap between pieces of text, the latency of /health
meanwhile, and the server's memory. Then `churn` requests, many of which are cut off at random, and the memory before
and after.

When the time is over, open answers are cut off. What they had counts; one that still waits for its first token counts
as if that had come now. A client that is refused asks again a second later.

The clients speak HTTP over plain asyncio streams: they share the machine with the server, and a client library would
take more of it. In a server of its own, answers end by length alone, so that each request is the same work.
"""

import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import islice
from urllib.parse import urlsplit

from dev.bench_machine import busy_neighbours
from nanochat.common import UserError, run_script
from nanochat.configurator import override_from_cli

# -----------------------------------------------------------------------------
# Settings
url: str = ""                 # server to load; empty = start one
against: str = ""             # a second server, for a comparison: measured in turn with the first
against_pid: int = 0          # its process, whose memory is told
source: str | None = None     # stage of the checkpoint that a server of its own loads; None = random weights
depth: int = 4                # of a model with random weights
vocab_size: int = 32768       # of that model
max_seq_len: int = 1024       # of that model
rows: int = 64                # answers that server decodes at once
clients: str = "1,4,16,64"    # numbers of clients, one measurement each
seconds: float = 20.0         # of each measurement
max_tokens: int = 32          # of each answer
temperature: float | None = None  # None = the server's default; 0 = greedy
constrained: bool = False     # every answer is a JSON array of strings; compare with a run without it
prompt_words: int = 40        # of the longest prompt; the shortest has one
churn: int = 1000             # requests, two thirds of which are cut off; 0 = none
model: str | None = None      # name of the model to ask; None = the server's default
api_key: str | None = None    # of a server that wants one
max_waiting: int = 4096       # completions that may wait at that server
beside: int = 0               # processes that keep a core busy meanwhile
serve: bool = False           # be the server (used by the benchmark itself)
probe: str = ""               # be the one that asks for /health at this address (used by the benchmark itself)

RETRY_S = 1  # after a refusal
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


def random_model(device):
    """(model, tokenizer) with random weights."""
    import torch

    from nanochat.gpt import GPT, GPTConfig
    from nanochat.inference import prepare

    tokenizer = made_up_tokenizer()
    net = GPT.create(GPTConfig.from_depth(depth, tokenizer.get_vocab_size(), max_seq_len), device)
    # a fresh model has zeros in its last layers, with which every token would be as likely
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.normal_(std=0.02)
    return prepare(net), tokenizer


def run_server():
    """Serve a model on a free port, which is printed first."""
    from nanochat.checkpoint_manager import load_checkpoint
    from nanochat.common import compute_init
    from nanochat.connections import Server
    from nanochat.engine import Engine
    from nanochat.scheduler import Scheduler
    from nanochat.service import Service
    from nanochat.web import listen
    from scripts.chat_web import create_app

    _, _, _, device = compute_init()
    chunk = 2048 if device.type == "cuda" else 256

    def load(i):
        net, tokenizer = load_checkpoint(source, device)[:2] if source else random_model(device)
        engine = Engine(net, tokenizer)
        engine.stop_tokens = frozenset()
        return {"bench": Scheduler(engine, rows, chunk).warm_up()}

    sock = listen("127.0.0.1", 0)
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    service = Service(load, ["bench"], max_waiting=max_waiting)
    server = Server(create_app(service), service)
    service.on_failure = lambda: setattr(server, "should_exit", True)
    server.run(sockets=[sock])
    if service.error is not None:
        raise service.error


SERVER_SETTINGS = ("source", "depth", "vocab_size", "max_seq_len", "rows", "max_waiting")


def start_server():
    """(process, its address)"""
    flags = [f"--{name}={globals()[name]}" for name in SERVER_SETTINGS]  # None is a value, too
    command = [sys.executable, "-m", "dev.bench_serving", "--serve=True", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, process.stdout.readline().strip()


def resident_mib(pid):
    """Memory that a process holds, in MiB, or nan where the kernel does not say."""
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
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
    begin: float = field(default_factory=time.perf_counter)  # time of the request, in seconds
    times: list = field(default_factory=list)  # of the pieces of text
    usage: int | None = None                   # tokens, by the server's count
    complete: bool = False                     # read to its end: neither refused nor cut off
    refused: bool = False

    @property
    def tokens(self):
        """Tokens so far. In an open answer every piece of text counts as one."""
        return len(self.times) if self.usage is None else self.usage

    def first_s(self, now):
        """Seconds to the first piece of text, or until now."""
        first = self.times[0] if self.times else now
        return first - self.begin

    def gaps(self):
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


async def stream(address, rng, leave_after=None, answer=None):
    """
    Ask for an answer and read it, up to a number of pieces of text if leave_after is set. answer: the Answer to fill,
    for a caller that looks at it meanwhile. Returns it.
    """
    answer = answer or Answer()
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, prompt_words)))
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "stream": True,
        "max_tokens": max_tokens,
        "stream_options": {"include_usage": True},
        "model": model,
        "temperature": temperature,
    }
    if constrained:
        schema = {"type": "array", "items": {"type": "string"}}
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    reader, writer = await request(address, "POST", "/v1/chat/completions", body)
    try:
        answer.refused = b" 200 " not in await reader.readline()
        if answer.refused:
            return answer
        async for line in reader:
            if line.startswith(b'data: {"error'):
                answer.refused = True
                return answer
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
        answer.usage = chunk["usage"]["completion_tokens"]


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


def quantile_ms(seconds, q):
    if not seconds:
        return float("nan")
    ordered = sorted(seconds)
    place = min(len(ordered) - 1, int(q * len(ordered)))
    return 1000 * ordered[place]


async def measure(address, pid, num_clients):
    """A row of the table: `seconds` of num_clients that ask again and again."""
    answers = []
    health_probe = start_probe(address)
    begin = time.perf_counter()

    async def client(i):
        rng = random.Random(i)
        while True:
            answer = Answer()
            answers.append(answer)
            await stream(address, rng, answer=answer)
            # many clients that ask again at once would leave the server nothing but refusals
            if answer.refused:
                await asyncio.sleep(RETRY_S)

    # the answers that are open at the end are cut off
    tasks = [asyncio.create_task(client(i)) for i in range(num_clients)]
    done, still_open = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_EXCEPTION)
    now = time.perf_counter()
    memory = resident_mib(pid)
    for task in still_open:
        task.cancel()
    await asyncio.gather(*still_open, return_exceptions=True)
    for task in done:
        task.result()  # raises what ended it
    health = end_probe(health_probe)

    served = [answer for answer in answers if not answer.refused]
    first = [answer.first_s(now) for answer in served]
    gaps = [gap for answer in served for gap in answer.gaps()]
    return {
        "clients": num_clients,
        "requests/s": sum(answer.complete for answer in served) / (now - begin),
        "tokens/s": sum(answer.tokens for answer in served) / (now - begin),
        "first p50 ms": quantile_ms(first, 0.5),
        "first p95 ms": quantile_ms(first, 0.95),
        "gap p50 ms": quantile_ms(gaps, 0.5),
        "gap p99 ms": quantile_ms(gaps, 0.99),
        "health p99 ms": quantile_ms(health, 0.99),
        "health max ms": quantile_ms(health, 1.0),
        "MiB": memory,
        "refused": len(answers) - len(served),
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
            # a server without /ready loads its model before it listens
            status = (await fetch(address, "/ready")).split()[1]
            if status in ("200", "404"):
                return
        except OSError:  # it does not listen yet
            pass
        await asyncio.sleep(0.1)
    raise UserError(f"the server at {address} does not get ready", "python -m scripts.chat_web shows why")


async def bench(address, process):
    pid = process.pid if process else None
    servers = [("", address, pid)]  # (name, address, process id or None)
    if against:
        servers = [("first", address, pid), ("against", against.rstrip("/"), against_pid)]
    for _, each_address, _ in servers:
        await wait_until_ready(each_address, process)
        await stream(each_address, random.Random(0))  # warm-up

    is_first = True
    for num_clients in map(int, clients.split(",")):
        for name, each_address, each_pid in servers:
            row = await measure(each_address, each_pid, num_clients)
            if is_first:
                print(" | ".join(row), flush=True)
            is_first = False
            print(table_line(row), name, flush=True)

    if churn:
        before = resident_mib(pid)
        num_complete = await cut_off(address, churn)
        await asyncio.sleep(1)
        metrics = await fetch(address, "/metrics")
        busy = [line for line in metrics.splitlines() if line.startswith(("nanochat_running ", "nanochat_waiting "))]
        print(f"{churn} requests, {num_complete} read to the end | memory {before:.0f} -> {resident_mib(pid):.0f} "
              f"MiB | afterwards: {', '.join(busy)}")


def table_line(row):
    """The values of a row, each as wide as its name."""
    cells = []
    for name, value in row.items():
        decimals = 0 if isinstance(value, int) else 1
        cells.append(f"{value:{len(name)}.{decimals}f}")
    return " | ".join(cells)


def end_at_sigterm():
    """Let SIGTERM, which `timeout` sends, end this process in order: it ends the server that it has started."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def main():
    if serve:
        run_server()
        return
    if probe:
        asyncio.run(run_probe())
        return
    end_at_sigterm()
    if url:
        process = None
        address = url.rstrip("/")
        print(f"server: {address}", flush=True)
    else:
        process, address = start_server()
        load = statistics.fmean(os.getloadavg())
        served = f"the newest {source} model" if source else f"depth {depth} | vocabulary {vocab_size}"
        print(f"load average: {load:.1f} on {os.cpu_count()} cores | {served} | {max_tokens} tokens an answer",
              flush=True)
    try:
        with busy_neighbours(beside):
            asyncio.run(bench(address, process))
    finally:
        if process:
            process.terminate()
            process.wait()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
