"""
The runs of a scaling series: planning, running and recording them; used by scaling.py.

A series lies in a folder of its own, which is also the base directory of its runs: tokenizer/, series.json (the plan),
runs.jsonl (a line for each finished run), logs/. A run is an ordinary `python -m scripts.base_train`, then
`python -m scripts.base_loss` on whole documents. The checkpoints of a finished run are deleted.
"""

import json
import math
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from nanochat.common import UserError, write_text
from nanochat.scaling_law import ModelSize

MIN_TOKENS = 2**19   # of a run: shorter ones are mostly warmup
PLANNED_SHARE = 0.9  # of the minutes: the speed that was measured may be too high
EVAL_COST = 0.5      # of the time of training on as many tokens
SPEED_STEPS = 4      # that are timed; the first is left out
SPEED_TOKENS = 4096  # of each of them


@dataclass(frozen=True)
class Run:
    depth: int
    flops: float  # of training
    seed: int

    @property
    def tag(self):
        return f"d{self.depth}-{self.flops:.3g}-seed{self.seed}".replace("+", "")


@dataclass(frozen=True)
class Speed:
    """Of a depth on this machine."""
    flops_per_s: float  # in training steps
    start_s: float      # from a command to its first step and after the last one


# -----------------------------------------------------------------------------
# The plan


def run_seconds(run, size, speed, eval_tokens):
    """Expected time of a run: two commands, training, scoring."""
    eval_flops = EVAL_COST * eval_tokens * size.flops_per_token
    return 2 * speed.start_s + (run.flops + eval_flops) / speed.flops_per_s


def list_runs(top_flops, levels, seeds, sizes):
    """
    [Run], the cheapest first: every size at every amount of FLOPs, top_flops and levels - 1 halves of it, as long as
    it sees MIN_TOKENS.
    """
    runs = []
    for level in reversed(range(levels)):
        flops = top_flops / 2**level
        for size in sizes:
            if flops / size.flops_per_token >= MIN_TOKENS:
                runs += [Run(size.depth, flops, seed) for seed in seeds]
    return runs


def plan_series(seconds, levels, seeds, sizes, speeds, eval_tokens):
    """
    The runs that take `seconds` together, with as many FLOPs as fit. sizes: [ModelSize]; speeds: {depth: Speed}.
    UserError if not even the smallest series fits.
    """
    size_of = {size.depth: size for size in sizes}

    def total_s(top_flops):
        total = 0.0
        for run in list_runs(top_flops, levels, seeds, sizes):
            total += run_seconds(run, size_of[run.depth], speeds[run.depth], eval_tokens)
        return total

    # at least three sizes, each at two levels
    by_cost = sorted(size.flops_per_token for size in sizes)
    low = 2 * MIN_TOKENS * by_cost[2]
    if total_s(low) > seconds:
        raise UserError(
            f"the smallest series takes {total_s(low) / 60:.0f} minutes, {seconds / 60:.0f} are planned for",
            "raise --minutes, or take fewer --levels or smaller --depths",
        )
    high = low
    while total_s(high) <= seconds:
        high *= 2
    for _ in range(50):  # the largest amount that fits, by bisection
        middle = math.sqrt(low * high)
        if total_s(middle) <= seconds:
            low = middle
        else:
            high = middle
    return list_runs(low, levels, seeds, sizes)


# -----------------------------------------------------------------------------
# Running


def run_module(folder, log, module, *flags):
    """Run a script of the project with `folder` as its base directory. Its output is appended to the file `log`."""
    command = [sys.executable, "-m", module, *flags]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            code = process.wait()
        finally:
            # when we are stopped: it saves a checkpoint, from which the next call goes on
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code != 0:
        end = log.read_text("utf-8").strip().splitlines()[-2:]
        raise UserError(f"{module} ended with code {code}: {' '.join(end)}", f"all of its output: {log}")


class Series:
    """
    A series in `folder`. settings: what all of its runs share: data, text_field, depths, levels, seeds, max_seq_len,
    flags (more flags of base_train), eval_tokens, device_type. A series that was begun keeps its settings. run_module:
    as above.
    """

    def __init__(self, folder, settings, vocab_size, run_module=run_module):
        self.folder = Path(folder)
        self.settings = settings
        self._run_module = run_module
        self.sizes = [ModelSize.from_depth(d, vocab_size, settings["max_seq_len"]) for d in settings["depths"]]
        self._plan_path = self.folder / "series.json"
        self._results_path = self.folder / "runs.jsonl"

    def plan(self, minutes):
        """[Run]: the saved plan, or a new one after the speed of each depth was measured."""
        if self._plan_path.is_file():
            saved = json.loads(self._plan_path.read_text("utf-8"))
            self._compare(saved["settings"])
        else:
            saved = self._make_plan(minutes)
            write_text(self._plan_path, json.dumps(saved, indent=1))
        self.expected_s = saved["expected_s"]
        return [Run(**run) for run in saved["runs"]]

    def _compare(self, saved):
        for name, value in self.settings.items():
            if saved[name] != value:
                raise UserError(
                    f"--{name}: {value} now, but the series in {self.folder} has {saved[name]}",
                    "begin another one: --out=FOLDER",
                )

    def _make_plan(self, minutes):
        start = time.monotonic()
        speeds = {}
        for size in self.sizes:
            speeds[size.depth] = self.measure_speed(size)
            print(f"d{size.depth}: {speeds[size.depth].flops_per_s:.3g} FLOP/s, "
                  f"{speeds[size.depth].start_s:.0f} s to start and end", flush=True)
        seconds = PLANNED_SHARE * (60 * minutes - (time.monotonic() - start))
        eval_tokens = self.settings["eval_tokens"]
        seeds = range(42, 42 + self.settings["seeds"])
        runs = plan_series(seconds, self.settings["levels"], seeds, self.sizes, speeds, eval_tokens)
        size_of = {size.depth: size for size in self.sizes}
        expected_s = {}
        for run in runs:
            expected_s[run.tag] = run_seconds(run, size_of[run.depth], speeds[run.depth], eval_tokens)
        return {
            "settings": self.settings,
            "speeds": {depth: asdict(speed) for depth, speed in speeds.items()},
            "runs": [asdict(run) for run in runs],
            "expected_s": expected_s,
        }

    def measure_speed(self, size):
        """The Speed of a depth, by a few steps of base_train."""
        tag = f"speed-d{size.depth}"
        start = time.monotonic()
        self._train(tag, size.depth, f"--num_iterations={SPEED_STEPS}", f"--total_batch_size={SPEED_TOKENS}")
        wall_s = time.monotonic() - start
        folder = self._checkpoint_dir(tag)
        steps = [line["dt_ms"] / 1000 for line in read_lines(folder / "metrics.jsonl") if "dt_ms" in line]
        shutil.rmtree(folder)
        flops_per_s = SPEED_TOKENS * size.flops_per_token / statistics.median(steps[1:])
        return Speed(flops_per_s, wall_s - sum(steps))

    def results(self):
        """The lines of the finished runs, dicts."""
        return read_lines(self._results_path)

    def run_all(self, runs, minutes):
        """Do the runs that are not recorded yet, as long as they fit the minutes. Returns those left."""
        done = {line["tag"] for line in self.results()}
        waiting = [run for run in runs if run.tag not in done]
        while waiting and self._fits(waiting[0], minutes):
            run = waiting.pop(0)
            number = len(runs) - len(waiting)
            print(f"run {number} of {len(runs)}: {run.tag}, about {self._expect(run) / 60:.1f} minutes", flush=True)
            result = self.run(run)
            print(f"    {result['num_tokens'] / 1e6:.2f}M tokens, {result['bpb']:.4f} ± {result['stderr']:.4f} bpb, "
                  f"{result['wall_s'] / 60:.1f} minutes", flush=True)
        return waiting

    def _expect(self, run):
        """Seconds of a run, corrected by those that the finished ones took."""
        ratios = [line["wall_s"] / self.expected_s[line["tag"]] for line in self.results()]
        factor = statistics.median(ratios) if ratios else 1.0
        return factor * self.expected_s[run.tag]

    def _fits(self, run, minutes):
        spent_s = sum(line["wall_s"] for line in self.results())
        return spent_s + self._expect(run) <= 60 * minutes

    def run(self, run):
        """Train, score, record and tidy up. Returns the recorded line."""
        start = time.monotonic()
        self._train(run.tag, run.depth, f"--target_flops={run.flops:.6g}", f"--seed={run.seed}")
        self._command(
            run.tag, "scripts.base_loss", f"--model_tag={run.tag}", "--per_document", "--cut=pieces", "--split=val",
            "--sample=False", f"--eval_tokens={self.settings['eval_tokens']}",
        )
        wall_s = time.monotonic() - start
        trained = self._section("base-model-training", run.tag)
        loss = self._section("base-model-loss-per-document", run.tag)["metrics"]["bpb per document"]
        folder = self._checkpoint_dir(run.tag)
        steps = [line for line in read_lines(folder / "metrics.jsonl") if "epoch" in line]
        size = next(size for size in self.sizes if size.depth == run.depth)
        line = {
            "tag": run.tag,
            **asdict(run),
            "num_params": size.num_params,
            "num_matrix_params": size.num_matrix_params,
            "num_block_params": size.num_block_params,
            "flops_per_token": size.flops_per_token,
            "num_tokens": trained["tokens"],
            "steps": trained["steps"],
            "batch_tokens": trained["tokens per step"],
            "bpb": loss["value"],
            "stderr": loss["stderr"],
            "documents": loss["n"],
            "epochs": steps[-1]["epoch"],  # passes over the text before the one it ended in
            "train_s": 60 * trained["training minutes"],
            "wall_s": max(wall_s, 60 * trained["training minutes"]),  # the latter also counts a part broken off
        }
        lines = [*self.results(), line]
        write_text(self._results_path, "".join(json.dumps(result) + "\n" for result in lines))
        (folder / "metrics.jsonl").rename(self.folder / "logs" / f"{run.tag}.jsonl")
        shutil.rmtree(folder)
        return line

    def _train(self, tag, depth, *flags):
        self._command(
            tag, "scripts.base_train", f"--depth={depth}", f"--max_seq_len={self.settings['max_seq_len']}",
            f"--model_tag={tag}", "--auto_resume", "--save_every=100", "--keep_last=1", "--eval_every=-1",
            f"--eval_tokens={SPEED_TOKENS}", "--sample_every=-1", *self.settings["flags"], *flags,
        )

    def _command(self, tag, module, *flags):
        """Run a script of the project on the data of the series."""
        flags = list(flags)
        if self.settings["data"] is not None:
            flags.append(f"--data={self.settings['data']}")
        flags.append(f"--text_field={self.settings['text_field']}")
        flags.append(f"--device_type={self.settings['device_type']}")
        self._run_module(self.folder, self.folder / "logs" / f"{tag}.log", module, *flags)

    def _checkpoint_dir(self, tag):
        return self.folder / "base_checkpoints" / tag

    def _section(self, name, tag):
        """The section of the report that a command has just written."""
        path = next((self.folder / "report").glob(f"*-{name}.json"))
        section = json.loads(path.read_text("utf-8"))
        if section["config"]["model_tag"] != tag:
            raise RuntimeError(f"{path} is of {section['config']['model_tag']}, not of {tag}")
        return section


def read_lines(path):
    """The objects of a .jsonl file; [] without the file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
