"""What the server took for many or long answers, it gives back."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.batcher import Batcher, release_free_memory
from nanochat.decoder import Row
from nanochat.sampling import Sampling
from nanochat.scheduler import Request, Scheduler
from tests.servers import tiny_engine, wait_for

ROOT = Path(__file__).parent.parent


def long_requests(tokenizer, num):
    requests = []
    for i in range(num):
        row = Row([1, 2, i], Sampling(0), 280, frozenset())
        requests.append(Request(row, tokenizer))
    return requests


def cache_bytes(decoder):
    caches = [decoder.cache] + [decoder.short_staging] * (decoder.short_staging is not None)
    return sum(cache.k.nbytes + cache.v.nbytes for cache in caches)


def test_caches_that_have_grown_shrink_when_nobody_asks(tokenizer):
    scheduler = Scheduler(tiny_engine(tokenizer, sequence_len=512), 4, 64)
    decoder, first = scheduler.decoder, cache_bytes(scheduler.decoder)
    batcher = Batcher(lambda: {"m": scheduler}, lambda events: None, 64, idle_s=0.2)
    batcher.start()
    try:
        batcher.loaded.wait()
        for _ in range(2):  # and grow again for the next ones
            (request,) = long_requests(tokenizer, 1)
            batcher.submit("m", [request])
            assert wait_for(lambda: cache_bytes(decoder) >= 2 * first, 120)
            assert wait_for(lambda: cache_bytes(decoder) == first, 120)
            assert len(request.row.tokens) == 280
    finally:
        batcher.stop(0)
        batcher.join()


def test_a_cache_takes_memory_only_for_what_it_holds():
    code = """
import torch
from nanochat.gpt import GPTConfig
from nanochat.kv_cache import KVCache
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
cache = KVCache(GPTConfig(2048, 512, 4, 4, 4, 256), 64, 2048, "cpu", torch.float32, 256)
cache.lengths[0] = 200
cache.reserve(2000)
assert cache.k.nbytes > 2**28 and resident() - before < 2**25, resident() - before
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system does not tell the memory of a process")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_freed_memory_can_always_be_asked_for():
    release_free_memory()


@pytest.mark.slow
def test_a_short_soak_comes_through():
    flags = ["--minutes=0.3", "--clients=4", "--lurkers=8", "--burst=20", "--depth=1", "--vocab_size=512", "--rows=8",
             "--max_seq_len=256", "--idle_s=8", "--memory_growth=0.3", "--max_waiting=64"]
    command = [sys.executable, "-m", "dev.soak_serving", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "came through" in done.stdout, done.stdout + done.stderr
