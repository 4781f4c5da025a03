"""
Soak the chat server: minutes of visitors of all kinds, and whether it comes through.

    python -m dev.soak_serving --minutes=15 --clients=64           a server of its own with random weights
    python -m dev.soak_serving --minutes=0.2 --clients=4 --depth=1 --vocab_size=512        the smallest run

Visitors ask like people, leave in the middle of an answer, send requests that are giant, half or no HTTP at all, and
come in bursts. Each has an address of its own in 127.0.0.0/8, and one of them, the greedy one, always has as many
completions waiting as the server lets it. At the end the script fails if an answer was a 5xx, if the server kept a
half-sent request longer than it says, if rows or places in the queue stayed taken, or if the memory of the server,
idle again, is more than a few percent above that at the start.
"""

import asyncio
import collections
import json
import random
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dev import bench_serving
from nanochat.common import UserError, run_script
from nanochat.configurator import override_from_cli

# -----------------------------------------------------------------------------
# Settings
minutes: float = 3.0          # how long visitors come
clients: int = 24             # visitors at any time, beside those that only hold a connection
lurkers: int = 50             # connections at any time that send nothing, or half a request
burst: int = 100              # requests at once, now and then
burst_every: float = 15.0     # seconds between bursts
requests: int = 0             # end after so many visits, even if time is left; 0 = no limit
depth: int = 4                # of the server's model
vocab_size: int = 8192        # of that model
max_seq_len: int = 1024       # of that model
rows: int = 64                # answers that the server decodes at once
max_waiting: int = 512        # completions that may wait
seed: int = 1                 # of all that is drawn
close_s: float = 45.0         # a half-sent request must be gone after so long
idle_s: float = 30.0          # until memory is measured at the end
memory_growth: float = 0.15   # of the memory at the start, at most

WORDS = bench_serving.WORDS
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"

# -----------------------------------------------------------------------------
# HTTP over plain streams, since most of the visits are none that a client library would make


def head(method, path, num_bytes, *more):
    """The head of a request, as bytes."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Connection: close",
        "Content-Type: application/json",
        f"Content-Length: {num_bytes}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def post(path, **fields):
    """A whole request, as bytes."""
    body = json.dumps(fields).encode()
    return head("POST", path, len(body)) + body


@dataclass
class Visitor:
    """One connection, from an address of its own."""
    address: str  # of the server
    rng: random.Random
    source: str   # the visitor's own address

    async def open(self, data):
        """Connect and send `data`; (reader, writer)."""
        parts = urlsplit(self.address)
        local = (self.source, 0)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port, local_addr=local)
        writer.write(data)
        return reader, writer

    async def ask(self, data, leave_after=None):
        """
        Send a request and read the response: its status, or "closed" if there is none. leave_after: read so many
        lines of it only, then hang up.
        """
        reader, writer = await self.open(data)
        try:
            await writer.drain()
            line = await reader.readline()
            status = line.split()[1].decode() if line else "closed"
            num_lines = 0
            while leave_after is None or num_lines < leave_after:
                chunk = await reader.read(2**16) if leave_after is None else await reader.readline()
                if not chunk:
                    break
                num_lines += 1
            return status
        except (ConnectionError, asyncio.LimitOverrunError, ValueError):
            return "closed"
        finally:
            writer.close()

    def words(self, most=40):
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(1, most)))

    def chat(self, **fields):
        messages = [{"role": "user", "content": self.words()}]
        return {"messages": messages, "max_tokens": self.rng.randint(1, 48), **fields}


# -----------------------------------------------------------------------------
# Kinds of visits. Each returns a status, or a word for what happened


async def stream(visitor):
    return await visitor.ask(post(CHAT, **visitor.chat(stream=True)))


async def stream_and_leave(visitor):
    return await visitor.ask(post(CHAT, **visitor.chat(stream=True)), visitor.rng.randrange(30))


async def whole(visitor):
    fields = {"n": visitor.rng.randint(1, 4), "logprobs": True, "top_logprobs": 5}
    return await visitor.ask(post(CHAT, **visitor.chat(**fields)))


async def leave_before_the_answer(visitor):
    reader, writer = await visitor.open(post(CHAT, **visitor.chat(max_tokens=400)))
    await asyncio.sleep(visitor.rng.random())
    writer.close()
    return "left"


async def long_chat(visitor):
    """As long as the context, of which the server has to make more room in its caches."""
    messages = []
    for i in range(2 * visitor.rng.randint(5, 60) + 1):
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": visitor.words()})
    return await visitor.ask(post(CHAT, messages=messages, max_tokens=100))


async def several(visitor):
    """An evaluation's request: prompts with their log-probabilities."""
    prompts = [visitor.words() for _ in range(visitor.rng.randint(2, 16))]
    return await visitor.ask(post(COMPLETIONS, prompt=prompts, max_tokens=4, logprobs=3, echo=True))


async def most_choices(visitor):
    """The most choices that the fields allow: more than can wait here."""
    prompts = [visitor.words(4) for _ in range(128)]
    return await visitor.ask(post(COMPLETIONS, prompt=prompts, n=16, max_tokens=16))


async def giant_text(visitor):
    content = visitor.words() * 2000
    messages = [{"role": "user", "content": content[:100_000]}]
    path = visitor.rng.choice([CHAT, "/tokenize"])
    return await visitor.ask(post(path, messages=messages, prompt=None))


async def giant_list(visitor):
    """Bodies just below the limit, whose parts are many."""
    ids = [1] * 1_300_000
    parts = [{"type": "text", "text": "a"}] * 100_000
    fields = {"prompt": ids}
    path = COMPLETIONS
    if visitor.rng.random() < 0.5:
        fields = {"messages": [{"role": "user", "content": parts}]}
        path = CHAT
    return await visitor.ask(post(path, **fields))


async def giant_body(visitor):
    return await visitor.ask(head("POST", CHAT, 2**23) + b"x" * 2**23)


async def giant_head(visitor):
    num_bytes = visitor.rng.choice([50_000, 500_000])
    return await visitor.ask(head("GET", "/health", 0, "X-Long: " + "x" * num_bytes))


async def no_http(visitor):
    return await visitor.ask(visitor.rng.randbytes(visitor.rng.randint(1, 2000)) + b"\r\n\r\n")


async def wrong(visitor):
    return await visitor.ask(post(CHAT, messages=[{"role": "robot", "content": visitor.words()}]))


# (visit, how often in relation to the others)
VISITS = (
    (stream, 30), (stream_and_leave, 20), (whole, 10), (leave_before_the_answer, 10), (long_chat, 5), (several, 5),
    (most_choices, 1), (giant_text, 3), (giant_list, 1), (giant_body, 2), (giant_head, 3), (no_http, 3), (wrong, 5),
)


async def lurk(visitor):
    """Send nothing, or half a request, and wait for the server to hang up. Some leave before."""
    whole_request = post(CHAT, **visitor.chat())
    data = visitor.rng.choice([b"", whole_request[:60], whole_request[:-20]])
    patience_s = visitor.rng.choice([visitor.rng.random() * 10, close_s])
    reader, writer = await visitor.open(data)
    try:
        await asyncio.wait_for(reader.read(), patience_s)
        return "was closed"
    except asyncio.TimeoutError:
        return "stayed" if patience_s == close_s else "left"
    except ConnectionError:
        return "was closed"
    finally:
        writer.close()


# -----------------------------------------------------------------------------
# The soak


@dataclass
class Tally:
    """What happened so far."""
    outcomes: collections.Counter = field(default_factory=collections.Counter)  # of (kind, status or word)
    health_s: list = field(default_factory=list)       # latencies of /health
    first_text_s: list = field(default_factory=list)   # from the request of an ordinary chat to its first text
    num_visits: int = 0

    def note(self, visit, outcome):
        self.outcomes[visit.__name__, outcome] += 1
        self.num_visits += 1

    def faults(self):
        """Outcomes that must not be, as text."""
        found = []
        for (kind, outcome), count in self.outcomes.items():
            if outcome.startswith("5") or outcome == "stayed":
                found.append(f"{kind}: {outcome}, {count} times")
        return found


class Soak:
    def __init__(self, address, process):
        self.address = address
        self.process = process
        self.tally = Tally()
        self.end_at = time.monotonic() + 60 * minutes

    @property
    def is_over(self):
        enough = requests and self.tally.num_visits >= requests
        return enough or time.monotonic() > self.end_at or self.process.poll() is not None

    def visitor(self, number, rng):
        # 127.0.0.0/8 is this machine
        source = f"127.0.{1 + number // 250}.{1 + number % 250}"
        return Visitor(self.address, rng, source)

    async def run_client(self, number):
        """One visit after another, of kinds drawn at random."""
        rng = random.Random(f"{seed}:{number}")
        visits, weights = zip(*VISITS, strict=True)
        visitor = self.visitor(number, rng)
        while not self.is_over:
            visit = rng.choices(visits, weights)[0]
            self.tally.note(visit, await visit(visitor))

    async def run_lurker(self, number):
        visitor = self.visitor(250 + number, random.Random(f"{seed}:lurker:{number}"))
        while not self.is_over:
            self.tally.note(lurk, await lurk(visitor))

    async def run_bursts(self):
        """All at once, from few addresses; what does not fit in the queue is refused with a 429."""
        while not self.is_over:
            visitors = [self.visitor(1000 + i % 4, random.Random(i)) for i in range(burst)]
            for outcome in await asyncio.gather(*map(stream, visitors)):
                self.tally.note(stream, outcome)
            await asyncio.sleep(burst_every)

    async def run_greedy(self):
        """Always the most completions that one client may have."""
        visitor = self.visitor(2000, random.Random(seed))
        while not self.is_over:
            prompts = [visitor.words(4) for _ in range(max(1, max_waiting // 8))]
            data = post(COMPLETIONS, prompt=prompts, n=4, max_tokens=200)
            outcome = await visitor.ask(data)
            self.tally.note(self.run_greedy, outcome)
            if outcome != "200":
                await asyncio.sleep(0.5)

    async def probe(self):
        """The latencies of /health and of an ordinary chat's first text."""
        rng = random.Random(seed)
        while not self.is_over:
            begin = time.perf_counter()
            await bench_serving.fetch(self.address, "/health")
            self.tally.health_s.append(time.perf_counter() - begin)
            answer = await bench_serving.stream(self.address, rng, leave_after=1)
            if answer.times:
                self.tally.first_text_s.append(answer.times[0] - answer.begin)
            await asyncio.sleep(0.25)

    async def run(self):
        """All of it; returns the faults."""
        tasks = [self.run_bursts(), self.run_greedy(), self.probe()]
        tasks += [self.run_client(i) for i in range(clients)]
        tasks += [self.run_lurker(i) for i in range(lurkers)]
        before = bench_serving.resident_mib(self.process.pid)
        await asyncio.gather(*tasks)
        peak = bench_serving.resident_mib(self.process.pid)
        await asyncio.sleep(idle_s)
        return self.report(before, peak, await self.metrics())

    async def metrics(self):
        """{name of a metric with its labels: value}"""
        text = await bench_serving.fetch(self.address, "/metrics")
        lines = [line for line in text.splitlines() if line.startswith("nanochat_")]
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def report(self, before, peak, metrics):
        after = bench_serving.resident_mib(self.process.pid)
        for (kind, outcome), count in sorted(self.tally.outcomes.items()):
            print(f"{kind:24} {outcome:10} {count:6}")
        quantile = bench_serving.quantile_ms
        health = [quantile(self.tally.health_s, q) for q in (0.5, 0.99, 1)]
        first = [quantile(self.tally.first_text_s, q) for q in (0.5, 0.99, 1)]
        print(f"{self.tally.num_visits} visits | memory {before:.0f} MiB at the start, {peak:.0f} at the end, "
              f"{after:.0f} after {idle_s:.0f} s of rest")
        print("ms, p50 / p99 / max | /health {:.0f} / {:.0f} / {:.0f}".format(*health),
              "| first text {:.0f} / {:.0f} / {:.0f}".format(*first), flush=True)

        faults = self.tally.faults()
        for name, value in metrics.items():
            # /ready was asked while the model was loading
            if name.startswith("nanochat_requests_total") and 'code="5' in name and "/ready" not in name:
                faults.append(f"{name} is {value:.0f}")
            if name in ("nanochat_running", "nanochat_waiting") and value:
                faults.append(f"{name} is {value:.0f} although nobody is there")
        if after > (1 + memory_growth) * before:
            faults.append(f"memory grew by {after / before - 1:.0%}")
        if self.process.poll() is not None:
            faults.append("the server has ended")
        return faults


async def soak(address, process):
    await bench_serving.wait_until_ready(address, process)
    await bench_serving.stream(address, random.Random(0))  # warm-up
    return await Soak(address, process).run()


def main():
    bench_serving.end_at_sigterm()
    for name in ("depth", "vocab_size", "max_seq_len", "rows", "max_waiting"):
        setattr(bench_serving, name, globals()[name])
    process, address = bench_serving.start_server()
    try:
        faults = asyncio.run(soak(address, process))
    finally:
        process.terminate()
        process.wait(60)
    if faults:
        raise UserError("; ".join(faults), "the server's own output is above")
    print("came through: no 5xx, nothing kept")


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
