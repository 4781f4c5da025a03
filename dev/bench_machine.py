"""
How well a CPU is used: number format, busy neighbours, parallel regions, memory, cold starts.

    python -m dev.bench_machine                              all parts
    python -m dev.bench_machine --parts=contention           one of them

Every part compares within one run, its cases in turn, and prints ratios: the machine may drift. Cases that differ in
the environment run in processes of their own. A busy neighbour is a loop in a session of its own, so Linux gives it a
fair share of the cores, as it does to another user's program. `memory`, `start` and `ranks` need what dev/runcpu.sh
leaves in NANOCHAT_BASE_DIR, and work on a copy. For the server under load, see --beside of dev/bench_serving.py.
"""

import ctypes
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from nanochat.common import get_base_dir, run_script, usable_cores
from nanochat.configurator import Positive, override_from_cli

parts: str = "format,contention,regions,memory,start,ranks"  # what to measure, separated by commas
rounds: Positive = 3          # times that each case runs, in turn
steps: Positive = 10          # steps of a case in a round; their median counts

FORMATS = ("float32", "bfloat16", "")  # of NANOCHAT_PRECISION; "" = the default
# name: (what to run, vocabulary, tokens in a row, tokens a step)
WORK = {
    "d4, V 1,024": ("train", 1024, 256, 2048),
    "d4, V 16,384": ("train", 16384, 512, 4096),
    "decoding, B 1": ("decode", 1024, 256, 1),
    "decoding, B 16": ("decode", 1024, 256, 16),
}
# How OpenMP's threads wait: ours, and its own default
WAITING = {"ours": {}, "OpenMP's": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}}
TOY_RUN = (  # as the first stage of dev/runcpu.sh
    "--depth=3 --head_dim=64 --max_seq_len=256 --total_batch_size=2048 --head_start=False "
    "--eval_every=-1 --eval_tokens=32768 --sample_every=-1"
).split()


def main():
    if os.environ.get("BENCH_WORK"):  # one case, in a process of its own
        print(json.dumps(measure(*json.loads(os.environ["BENCH_WORK"]))))
        return
    load = os.getloadavg()[0]
    print(f"{usable_cores()} cores | load before: {load:.1f}, below 0.2 is quiet\n")
    with tempfile.TemporaryDirectory() as folder:
        use_copy(Path(folder))
        for part in parts.split(","):
            PARTS[part]()
            print()


def use_copy(folder):
    """Let all that is started from here on work on a copy of the toy run's tokenizer and SFT model."""
    base_dir = get_base_dir()
    for name in ("tokenizer", "chatsft_checkpoints"):
        if (base_dir / name).is_dir():
            shutil.copytree(base_dir / name, folder / name)
    os.environ.setdefault("NANOCHAT_DATA_DIR", str(base_dir / "toy_world"))
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)


# -----------------------------------------------------------------------------
# A case, in a process of its own


def run_case(name, num_steps, **environment):
    """What `measure` returns for a case of WORK, with these variables in its environment."""
    work = json.dumps([*WORK[name], num_steps])
    env = {**os.environ, "BENCH_WORK": work, **environment}
    done = subprocess.run([sys.executable, "-m", "dev.bench_machine"], env=env, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(kind, vocab_size, sequence_len, size, num_steps):
    """Times of num_steps steps in ms, CPU ms a step, parallel regions a step, and the precision."""
    import torch  # after nanochat, which settles how its threads wait

    from nanochat.common import compute_init
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.precision import get_precision, settle_precision

    _, _, _, device = compute_init("cpu")
    model = GPT.create(GPTConfig.from_depth(4, vocab_size, sequence_len, head_dim=64), torch.device("cpu"))
    note = settle_precision(device, model.config.n_embd, decoding=kind == "decode")
    step = train_step(model, size) if kind == "train" else decode_step(model, size)
    for _ in range(2):
        step()

    regions_before = count_regions()
    cpu_before = time.process_time()
    times_ms = []
    for _ in range(num_steps):
        start = time.perf_counter()
        step()
        times_ms.append(1000 * (time.perf_counter() - start))
    return {
        "ms": statistics.median(times_ms),
        "cpu_ms": 1000 * (time.process_time() - cpu_before) / num_steps,
        "regions": (count_regions() - regions_before) / num_steps,
        "precision": get_precision("cpu"),
        "note": note,
    }


def train_step(model, batch_tokens):
    """A function that makes one optimizer step on random tokens."""
    import numpy as np

    from nanochat.training import accumulate_gradients, optimizer_step

    T = model.config.sequence_len
    num_rows = batch_tokens // T
    optimizers = model.setup_optimizers()
    rng = np.random.default_rng(0)
    rows = rng.integers(0, model.config.vocab_size, (num_rows, T + 1)).astype(np.int32)

    def step():
        accumulate_gradients(model, rows[:, :-1], rows[:, 1:], batch_tokens, num_rows)
        optimizer_step(model, optimizers)
    return step


def decode_step(model, num_rows):
    """A function that decodes one token for each of num_rows conversations."""
    from nanochat.decoder import Decoder, Row
    from nanochat.inference import prepare
    from nanochat.sampling import Sampling

    prompt = list(range(1, 33))
    decoder = Decoder(prepare(model), num_rows)
    for _ in range(num_rows):
        logits = decoder.read_prompt(prompt)
        decoder.admit(Row(prompt, Sampling(1.0, 50), 200, frozenset()), logits)
    return decoder.step


def count_regions():
    """Parallel regions so far, if count_regions.c is loaded; else 0."""
    counter = os.environ.get("LD_PRELOAD")
    return ctypes.CDLL(counter).count_regions() if counter else 0


# -----------------------------------------------------------------------------
# The parts


def compare_formats():
    print("1. The default against the better of two formats")
    for name in WORK:
        found = {form: [] for form in FORMATS}
        for _ in range(rounds):
            for form in FORMATS:
                found[form].append(run_case(name, steps, NANOCHAT_PRECISION=form))
        ms = {form: statistics.median(case["ms"] for case in cases) for form, cases in found.items()}
        choices = {case["precision"] for case in found[""]}
        best = min(ms["float32"], ms["bfloat16"])
        print(f"{name}: float32 {ms['float32']:.1f} ms, bfloat16 {ms['bfloat16']:.1f} ms, default {ms['']:.1f} ms "
              f"= {ms[''] / best:.2f} of the better | chosen: {', '.join(choices)} | {found[''][0]['note']}")


# It also ends with the process that started it, whatever ends that
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


@contextmanager
def busy_neighbours(count):
    """`count` processes that use a core each, until the context ends."""
    loops = [subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def compare_contention():
    print("2. Beside busy neighbours: ms a step (times the idle step), CPU ms a step")
    for name in WORK:
        found = {(way, busy): [] for way in WAITING for busy in (0, 1, 2)}
        for _ in range(rounds):
            for busy in (0, 1, 2):
                with busy_neighbours(busy):
                    for way, environment in WAITING.items():
                        found[way, busy].append(run_case(name, steps, **environment))
        for way in WAITING:
            idle = statistics.median(case["ms"] for case in found[way, 0])
            cells = []
            for busy in (0, 1, 2):
                ms = statistics.median(case["ms"] for case in found[way, busy])
                cpu_ms = statistics.median(case["cpu_ms"] for case in found[way, busy])
                cells.append(f"{busy} busy: {ms:.1f} ({ms / idle:.2f}), {cpu_ms:.0f}")
            print(f"{name}, {way} waiting | " + " | ".join(cells))


def count_regions_of_all():
    print("3. Parallel regions a step, and CPU ms")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(__file__).with_name("count_regions.c")
        counter = str(Path(folder) / "count_regions.so")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", counter, "-ldl"], check=True)
        for name in WORK:
            case = run_case(name, steps, LD_PRELOAD=counter)
            print(f"{name}: {case['regions']:.0f} regions, {case['cpu_ms']:.0f} CPU ms, {case['precision']}")


def measure_memory():
    print("4. Peak memory of the toy run's pretraining")
    output = subprocess.run(toy_run(num_steps=30), capture_output=True, text=True, check=True).stdout
    print(next(line for line in output.splitlines() if line.startswith("peak memory")))


def toy_run(num_steps, launcher=("-m",)):
    return [sys.executable, *launcher, "scripts.base_train", *TOY_RUN, f"--num_iterations={num_steps}"]


def compare_ranks():
    print("6. The toy run's step: threads of one process, or ranks of one thread each")
    cores = usable_cores()
    launchers = {
        f"1 process of {cores} threads": ("-m",),
        f"{cores} ranks": ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cores}", "-m"),
    }
    found = {(name, busy): [] for name in launchers for busy in (0, 1, 2)}
    for _ in range(rounds):
        for busy in (0, 1, 2):
            with busy_neighbours(busy):
                for name, launcher in launchers.items():
                    command = toy_run(2 * steps, launcher)
                    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    times = [int(ms) for ms in re.findall(r"dt: (\d+)ms", output)]
                    found[name, busy].append(statistics.median(times))
    for name in launchers:
        print(f"{name} | " + " | ".join(f"{busy} busy: {statistics.median(found[name, busy]):.0f} ms"
                                        for busy in (0, 1, 2)))


def seconds_until(command, text):
    """Seconds from the start of a command until its output holds `text`; it is then ended."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    seen = b""
    while text not in seen or not seen:
        byte = process.stdout.read1(1)
        if not byte:  # the end of the output
            break
        seen += byte
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    return seconds


def measure_starts():
    print("5. Cold starts, as ratios to `import torch`")
    python = sys.executable
    starts = {
        "import torch": ([python, "-c", "import torch; print()"], b"\n"),
        "base_train --help": ([python, "-m", "scripts.base_train", "--help"], b"settings:"),
        "chat_cli -p, first character": ([python, "-m", "scripts.chat_cli", "-p", "Who are you?"], b""),
        "base_train, first step": (toy_run(num_steps=1), b"step: 00001"),
    }
    found = {name: [] for name in starts}
    for _ in range(rounds):
        for name, (command, text) in starts.items():
            found[name].append(seconds_until(command, text))
    seconds = {name: statistics.median(times) for name, times in found.items()}
    for name in starts:
        print(f"{name}: {seconds[name]:.2f} s = {seconds[name] / seconds['import torch']:.2f}")


PARTS = {
    "format": compare_formats,
    "contention": compare_contention,
    "regions": count_regions_of_all,
    "memory": measure_memory,
    "start": measure_starts,
    "ranks": compare_ranks,
}

if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
