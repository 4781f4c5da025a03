"""
The speed of rustbpe's training and encoding, beside its peers, on the same documents in one interleaved run.

    python -m dev.bench_tokenizer --data=PATH                          file, folder or glob; default: the local data
    python -m dev.bench_tokenizer --peer_python=/tmp/peers/bin/python  an interpreter with PyPI's rustbpe and gigatoken
    python -m dev.bench_tokenizer --num_bytes=2e6 --vocab_sizes=4096 --repeats=1      the smallest run, seconds

Each measurement is a process of its own, with its own peak memory and cold caches. The tools take turns, so that other
load on the machine slows all of them: compare ratios, and look at the load that is printed. A peer that is not
installed is left out with a message; nothing is installed. gigatoken splits text by a scheme of its own (the nearest
to ours is GPT-4's) and is measured as it comes.
"""

import base64
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# -----------------------------------------------------------------------------
# Settings
data: str | None = None            # documents: file, folder or glob; none = NANOCHAT_DATA_DIR or the downloaded shards
num_bytes: int = 50_000_000        # take documents up to this many bytes of UTF-8
vocab_sizes: str = "32768,65536"   # vocabularies to train; the first is also the one to encode with
train_threads: int = 2             # threads for training
encode_threads: str = "1,2"        # thread counts for encoding
split: str = "nanochat"            # pattern that ours splits by: nanochat, gpt4 or qwen
repeats: int = 3                   # measurements of each kind; the table shows medians
peer_python: str | None = None     # interpreter in which PyPI's rustbpe 0.1.0 and gigatoken are installed

# tool -> how many times as fast as it ours has to be; None = no goal
TRAIN_GOALS = {"ours": None, "rustbpe 0.1.0": 2.0, "gigatoken": 1.0, "tokenizers": None}
ENCODE_GOALS = {"ours": None, "tiktoken": 6.0, "gigatoken": None}
PEERS = ("rustbpe 0.1.0", "gigatoken")  # tools that run in --peer_python

# -----------------------------------------------------------------------------
# One measurement, in a child process. Its interpreter may lack nanochat, so it imports only what it measures


def import_rustbpe(tool):
    """Our rustbpe or PyPI's: they share the name, and only ours has from_ranks."""
    import rustbpe

    if hasattr(rustbpe.Tokenizer, "from_ranks") != (tool == "ours"):
        raise ImportError(f"the rustbpe of {sys.executable} is not {tool}")
    return rustbpe


def prepare_training(tool, texts, pattern, vocab_size):
    """The call to be timed: learn `vocab_size` tokens from a list of texts."""
    if tool == "ours" or tool == "rustbpe 0.1.0":
        tokenizer = import_rustbpe(tool).Tokenizer()
        return lambda: tokenizer.train_from_iterator(iter(texts), vocab_size, pattern=pattern)
    if tool == "gigatoken":
        import gigatoken

        corpus = "\0".join(texts).encode()
        texts.clear()  # one copy is enough
        return lambda: gigatoken.train_bpe(corpus, vocab_size, [], separator=b"\0")
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])
    alphabet = byte_level.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, initial_alphabet=alphabet)
    return lambda: tokenizer.train_from_iterator(iter(texts), trainer)


def prepare_encoding(tool, texts, pattern, ranks_path, threads):
    """The call to be timed: encode a list of texts; ours to numpy, tiktoken to its fastest form for many texts."""
    lines = [line.split() for line in Path(ranks_path).read_text(encoding="ascii").splitlines()]
    ranks = [(base64.b64decode(token), int(rank)) for token, rank in lines]
    if tool == "ours":
        import numpy as np

        tokenizer = import_rustbpe(tool).Tokenizer.from_ranks(ranks, pattern)
        return lambda: np.frombuffer(tokenizer.encode_to_buffer(texts, threads)[0], "<u4")
    if tool == "tiktoken":
        import tiktoken

        encoding = tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})
        if threads == 1:  # no thread pool in the way
            return lambda: [encoding.encode_ordinary(text) for text in texts]
        return lambda: encoding.encode_ordinary_batch(texts, num_threads=threads)
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_tiktoken(ranks_path, pretokenizer="cl100k")
    return lambda: tokenizer.encode_batch(texts, parallel=threads > 1)


def run_job(job):
    """{"seconds", "peak_mb"} of one measurement, or {"missing": why}."""
    with open(job["texts_path"], encoding="utf-8") as f:
        texts = [json.loads(line) for line in f]
    try:
        prepare = prepare_training if job["kind"] == "train" else prepare_encoding
        call = prepare(job["tool"], texts, job["pattern"], *job["args"])
    except ImportError as error:
        return {"missing": str(error)}
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mb": peak_mb()}


def peak_mb():
    """Peak memory of this process. Linux carries ru_maxrss over from the parent, so there VmHWM is read instead."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text(encoding="ascii").splitlines())
        return int(lines["VmHWM"].split()[0]) / 1e3  # it is in kB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


# -----------------------------------------------------------------------------
# The run


def start_job(job, threads):
    """Run one job in the interpreter that has its tool. gigatoken and tokenizers obey RAYON_NUM_THREADS."""
    python = peer_python if job["tool"] in PEERS else sys.executable
    if python is None:
        return {"missing": "give --peer_python"}
    env = os.environ | {"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
    child = subprocess.run([python, __file__, json.dumps(job)], capture_output=True, text=True, env=env)
    if child.returncode != 0:
        return {"missing": (child.stderr.strip() or f"exit code {child.returncode}").splitlines()[-1]}
    return json.loads(child.stdout.splitlines()[-1])


def measure(title, kind, goals, args, threads, shared, size_mb):
    """Let all tools take turns, then print a table of their medians and their ratio to ours."""
    runs = {tool: [] for tool in goals}  # tool -> results
    missing = {}                         # tool -> why it is left out
    for _ in range(repeats):
        for tool in goals:
            if tool in missing:
                continue
            result = start_job(shared | {"kind": kind, "tool": tool, "args": args}, threads)
            if "missing" in result:
                missing[tool] = result["missing"]
            runs[tool].append(result)

    print(f"\n{title} | load {os.getloadavg()[0]:.1f}")
    print(f"{'tool':14} {'seconds':>8} {'best':>7} {'MB/s':>7} {'peak MB':>8} {'ours is':>8} {'goal':>6}")
    ours = None  # seconds; the first row of the table
    for tool, results in runs.items():
        if tool in missing:
            print(f"{tool:14} left out: {missing[tool]}")
            continue
        times = [result["seconds"] for result in results]
        seconds = statistics.median(times)
        peak = statistics.median(result["peak_mb"] for result in results)
        if tool == "ours":
            ours = seconds
        ratio = f"{seconds / ours:.1f}x" if ours else "-"
        goal = "-" if goals[tool] is None else f"{goals[tool]:g}x"
        speed = size_mb / seconds
        print(f"{tool:14} {seconds:8.2f} {min(times):7.2f} {speed:7.1f} {peak:8.0f} {ratio:>8} {goal:>6}")


def write_texts(texts, path):
    """Documents up to `num_bytes` as JSON lines; returns their size in MB."""
    size = 0
    with open(path, "w", encoding="utf-8") as f:
        for text in texts:
            f.write(json.dumps(text) + "\n")
            size += len(text.encode())
            if size >= num_bytes:
                break
    return size / 1e6


def main():
    import rustbpe
    from nanochat.dataset import iter_texts
    from nanochat.split_patterns import SPLIT_PATTERNS

    pattern = SPLIT_PATTERNS[split]
    with tempfile.TemporaryDirectory() as folder:
        # the documents, the same for all
        texts_path = Path(folder) / "texts.jsonl"
        size_mb = write_texts(iter_texts(data, "train"), texts_path)
        shared = {"texts_path": str(texts_path), "pattern": pattern}
        print(f"{size_mb:.1f} MB of text | {os.cpu_count()} cores | {repeats} runs each, medians")

        # training
        sizes = [int(size) for size in vocab_sizes.split(",")]
        for vocab_size in sizes:
            title = f"training, V {vocab_size}, {train_threads} threads"
            measure(title, "train", TRAIN_GOALS, [vocab_size], train_threads, shared, size_mb)

        # encoding, all with the merges of one tokenizer
        tokenizer = rustbpe.Tokenizer()
        with open(texts_path, encoding="utf-8") as f:
            tokenizer.train_from_iterator(map(json.loads, f), sizes[0], pattern=pattern)
        ranks_path = Path(folder) / "ranks.tiktoken"
        with open(ranks_path, "w", encoding="ascii") as f:
            for token, rank in tokenizer.get_mergeable_ranks():
                f.write(f"{base64.b64encode(token).decode()} {rank}\n")
        for threads in map(int, encode_threads.split(",")):
            title = f"encoding, V {sizes[0]}, {threads} threads"
            measure(title, "encode", ENCODE_GOALS, [str(ranks_path), threads], threads, shared, size_mb)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("{"):
        print(json.dumps(run_job(json.loads(sys.argv[1]))))
    else:
        from nanochat.common import run_script
        from nanochat.configurator import override_from_cli

        override_from_cli(globals(), prefix="--")
        run_script(main)
