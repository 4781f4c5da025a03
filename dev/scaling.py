"""
The scaling law of this code, measured: a series of small runs, a law through their losses, and what it says of larger
ones. It also tells which model a budget buys.

    python -m dev.scaling --minutes=180 --data=my_texts/       run a series (again: go on with it), fit, predict, draw
    python -m dev.scaling --minutes=0 --leave_out=d6           fit what is there, and predict the runs of d6
    python -m dev.scaling --minutes=0 --exponents=0.3478,0.3658    with exponents of larger series, to look far ahead
    python -m dev.scaling --plan --budget=100                  what $100 buys, by the fitted law

The series: every depth at several amounts of FLOPs, each twice the one before, as many as fit the minutes. A run is an
ordinary base_train (scaling_series.py). Its loss is that of whole documents of the validation text, each piece after
<|bos|>. All runs use the tokenizer of the base directory, and the head start is off, since it helps short runs only:
with it the law would not hold for long ones.

The law (nanochat/scaling_law.py, fitted by scaling_fit.py) needs scipy: uv sync --group dev.
"""

import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np

from dev.scaling_fit import Points, bootstrap, fit_law, interval, optimal_split, relative_errors
from dev.scaling_picture import draw_law
from dev.scaling_series import Series
from nanochat.common import UserError, get_base_dir, get_data_dir, run_script, write_text
from nanochat.configurator import CountOrOff, Fraction, NonNegative, Positive, override_from_cli
from nanochat.curves import to_svg
from nanochat.device_speed import PEAK_TFLOPS
from nanochat.download import base_data_dir
from nanochat.report import get_report
from nanochat.scaling_law import MEASURED, ModelSize, ScalingLaw, best_depth
from nanochat.tokenizer import get_tokenizer

# The series
minutes: NonNegative = 180.0      # for all runs; 0 = fit the runs that are there
data: str | None = None           # file, folder or glob of text; None = the default corpus
text_field: str = "text"          # column or field of the text, in .parquet and .jsonl
depths: str = "2,3,4,5,6,8"       # those whose runs would be too short are left out
levels: Positive = 4              # amounts of FLOPs, each twice the one before
seeds: Positive = 1               # runs of each kind
max_seq_len: Positive = 512       # context length of the runs
eval_tokens: CountOrOff = 250000  # of whole validation documents; -1 = all
flags: str = "--head_start=False"  # more flags of base_train, for all runs
device_type: str = ""             # cuda, mps or cpu; empty = detect
out: str | None = None            # folder of the series; None = scaling in the base directory
# The fit
count: Literal["matrices", "all", "blocks"] = "matrices"  # the parameters N: see scaling_law.py
exponents: str | None = None      # alpha,beta to keep: 0.3478,0.3658 of arXiv 2404.10102; None = fit them too
repeats: Positive = 200           # fits of the bootstrap
leave_out: str | None = None      # predict the runs of this depth, d6 or largest, by a law without them
# The models to predict; the plan
vocab_size: Positive = 65536      # of speedrun.sh's tokenizer
context: Positive = 2048          # of speedrun.sh's models
plan: bool = False                # print what --budget buys, by the fitted law
budget: NonNegative = 100.0       # dollars
gpu_hourly_rate: NonNegative = 3.0  # dollars for one GPU and hour, as in the report card
num_gpus: Positive = 8            # of the machine
gpu: str = "H100"                 # for its peak FLOP/s: device_speed.py
mfu: Fraction = 0.53              # on one H200: 54% at d20, 53% at d26 (dev/log/2026-11-26-first-gpu.md)
pretraining: Fraction = 0.75      # of the time: in speedrun.sh 3 of 4 hours
beside: Positive = 20             # depth of the run to compare with, at 20 tokens per parameter

PREDICTED = (12, 20, 26, 32)  # depths
RATIO = 20                    # tokens per parameter, of all parameters: base_train's default
COUNTS = {"matrices": "num_matrix_params", "all": "num_params", "blocks": "num_block_params"}
AROUND = 3                    # depths of the plan's table on each side of the best


def folder():
    return Path(out) if out else get_base_dir() / "scaling"


# -----------------------------------------------------------------------------
# The fit and what it says


def to_points(lines, name):
    """Results of runs as Points, with N counted as `name` says."""
    return Points(
        num_params=np.array([line[COUNTS[name]] for line in lines], dtype=float),
        num_tokens=np.array([line["num_tokens"] for line in lines], dtype=float),
        losses=np.array([line["bpb"] for line in lines]),
    )


def count_params(size):
    return getattr(size, COUNTS[count])


def split_runs(lines, name):
    """(runs to fit, runs left out). name: d6, or largest."""
    depth = max(line["depth"] for line in lines)
    if name != "largest":
        depth = int(name.removeprefix("d"))
    left_out = [line for line in lines if line["depth"] == depth]
    if not left_out:
        raise UserError(f"--leave_out={name}: no run has that depth", "--leave_out=largest")
    return [line for line in lines if line["depth"] != depth], left_out


def fixed_exponents():
    """(alpha, beta) of --exponents, or None."""
    if exponents is None:
        return None
    try:
        alpha, beta = map(float, exponents.split(","))
    except ValueError:
        raise UserError(f"--exponents={exponents}: need two numbers", "--exponents=0.3478,0.3658") from None
    return alpha, beta


def fit(points):
    """(the law, the laws of the bootstrap)."""
    fixed = fixed_exponents()
    law = fit_law(points, exponents=fixed)
    return law, bootstrap(points, law, repeats, exponents=fixed)


def describe(values, style=".4f"):
    """'low to high' of the values of a bootstrap."""
    low, high = interval(values)
    return f"{low:{style}} to {high:{style}}"


def law_rows(law, laws):
    """The parameters of the law as table rows."""
    rows = []
    for name, value in asdict(law).items():
        others = [getattr(other, name) for other in laws]
        rows.append({"": name, "fitted": f"{value:.4g}", "90% interval": describe(others, ".4g")})
    return rows


def count_rows(lines):
    """How well the law fits with N counted in each way, and how well it predicts the largest depth."""
    rows = []
    fitted, left_out = split_runs(lines, "largest")
    for name in COUNTS:
        points = to_points(lines, name)
        law = fit_law(points, exponents=fixed_exponents())
        rms = np.sqrt(np.mean(relative_errors(law, points) ** 2))
        row = {"N": name, "rms error of the fit": f"{100 * rms:.2f}%"}
        if to_points(fitted, name).determine_a_law():
            law = fit_law(to_points(fitted, name), exponents=fixed_exponents())
            errors = relative_errors(law, to_points(left_out, name))
            row[f"d{left_out[0]['depth']} by a law without it"] = ", ".join(f"{100 * error:+.2f}%" for error in errors)
        rows.append(row)
    return rows


def optimum_rows(law, laws, lines):
    """The best split of FLOPs into parameters and tokens: those of the series, and those of larger runs."""
    amounts = {max(line["flops"] for line in lines): "the largest of the series"}
    for depth in PREDICTED:
        size = ModelSize.from_depth(depth, vocab_size, context)
        amounts[RATIO * size.num_params * size.flops_per_token] = f"d{depth} at {RATIO} tokens per parameter"
    rows = []
    for flops, source in amounts.items():
        num_params, num_tokens = optimal_split(law, flops)
        ratios = []
        for other in laws:
            best_params, best_tokens = optimal_split(other, flops)
            ratios.append(best_tokens / best_params)
        rows.append({
            "FLOPs": f"{flops:.2e}",
            "of": source,
            "N": f"{num_params:.3g}",
            "tokens per N": f"{num_tokens / num_params:.3g}",
            "90% interval": describe(ratios, ".3g"),
        })
    return rows


def predictions(law, laws):
    """[{depth, flops, bpb, low, high}] of larger models at RATIO tokens per parameter."""
    predicted = []
    for depth in PREDICTED:
        size = ModelSize.from_depth(depth, vocab_size, context)
        num_tokens = RATIO * size.num_params
        low, high = interval([other.loss(count_params(size), num_tokens) for other in laws])
        predicted.append({
            "depth": depth,
            "flops": num_tokens * size.flops_per_token,
            "bpb": law.loss(count_params(size), num_tokens),
            "low": low,
            "high": high,
        })
    return predicted


def prediction_rows(predicted):
    rows = []
    for line in predicted:
        rows.append({
            "model": f"d{line['depth']}",
            "FLOPs": f"{line['flops']:.2e}",
            "bpb": f"{line['bpb']:.3f}",
            "90% interval": f"{line['low']:.3f} to {line['high']:.3f}",
        })
    return rows


def left_out_rows(lines):
    """The runs of --leave_out, predicted by a law of the others, beside what they measured."""
    fitted, left_out = split_runs(lines, leave_out)
    law, laws = fit(to_points(fitted, count))
    rows = []
    for line in left_out:
        (num_params,), (num_tokens,) = to_points([line], count).num_params, to_points([line], count).num_tokens
        predicted = law.loss(num_params, num_tokens)
        rows.append({
            "run": line["tag"],
            "predicted": f"{predicted:.4f}",
            "90% interval": describe([other.loss(num_params, num_tokens) for other in laws]),
            "measured": f"{line['bpb']:.4f} ± {line['stderr']:.4f}",
            "error": f"{100 * (predicted / line['bpb'] - 1):+.2f}%",
        })
    return rows


def run_rows(lines, law):
    rows = []
    for line in lines:
        rows.append({
            "run": line["tag"],
            "tokens": f"{line['num_tokens'] / 1e6:.2f}M",
            "bpb": f"{line['bpb']:.4f} ± {line['stderr']:.4f}",
            "by the law": f"{law.loss(line[COUNTS[count]], line['num_tokens']):.4f}",
            "minutes": f"{line['wall_s'] / 60:.1f}",
        })
    return rows


def print_table(title, rows):
    """A Markdown table, with columns as wide as their widest cell."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns] + [[str(row.get(name, "")) for name in columns] for row in rows]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    cells.insert(1, ["-" * width for width in widths])
    print(f"\n{title}\n")
    for line in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    sys.stdout.flush()


def analyse(lines):
    """Fit, print, save and draw."""
    repeated = [line["tag"] for line in lines if line["epochs"] > 0]
    if repeated:
        print(f"note: {len(repeated)} runs saw a part of the text twice, such as {repeated[-1]}: more --data is better")
    law, laws = fit(to_points(lines, count))
    predicted = predictions(law, laws)
    tables = {
        "Runs": run_rows(lines, law),
        f"The law L = E + A / N^alpha + B / D^beta, N = {count}": law_rows(law, laws),
        "What N counts": count_rows(lines),
        "Compute-optimal tokens per parameter": optimum_rows(law, laws, lines),
        f"Predicted at {RATIO} tokens per parameter, vocabulary {vocab_size:,}": prediction_rows(predicted),
    }
    if leave_out is not None:
        tables[f"Left out: {leave_out}"] = left_out_rows(lines)
    for title, rows in tables.items():
        print_table(title, rows)

    # The law for --plan, the picture, the card
    saved = {"law": asdict(law), "bootstrap": [asdict(other) for other in laws], "count": count, "runs": len(lines)}
    write_text(folder() / "law.json", json.dumps(saved, indent=1))
    picture = to_svg(draw_law(lines, COUNTS[count], law, laws, predicted))
    write_text(folder() / "scaling.svg", picture)
    report = get_report()
    write_text(report.report_dir / "report-scaling-law.svg", picture)
    report.log("Scaling law", {"tables": tables, "picture": "report-scaling-law.svg"})
    print(f"\n{folder()}: runs.jsonl, law.json, scaling.svg")


# -----------------------------------------------------------------------------
# The plan


def read_law():
    """(law, laws of the bootstrap, what N counts) of the last fit; the core's, without intervals, if there is none."""
    path = folder() / "law.json"
    if not path.is_file():
        print(f"note: {path} is missing, so this is the law of nanochat/scaling_law.py, without intervals")
        return MEASURED, [MEASURED], "matrices"
    saved = json.loads(path.read_text("utf-8"))
    laws = [ScalingLaw(**values) for values in saved["bootstrap"]]
    return ScalingLaw(**saved["law"]), laws, saved["count"]


def checkpoint_bytes(size):
    """(of the weights, with the optimizers' state): float32; Adam keeps two numbers for each, Muon one."""
    weights = 4 * size.num_params
    tables = size.num_params - size.num_block_params
    return weights, weights + 8 * tables + 4 * size.num_block_params


def plan_rows(flops, law, laws, count_name, also=None):
    """A row for each depth around the best, and for the depth `also`: what it reaches with `flops`."""
    center = best_depth(flops, vocab_size, context, law, COUNTS[count_name])
    around = set(range(max(1, center - AROUND), center + AROUND + 1))
    if also:
        around.add(also)
    sizes = {depth: ModelSize.from_depth(depth, vocab_size, context) for depth in sorted(around)}
    best = sizes[center]

    def predict(some_law, size):
        return some_law.loss(getattr(size, COUNTS[count_name]), flops / size.flops_per_token)

    rows = []
    for size in sizes.values():
        num_tokens = flops / size.flops_per_token
        weights, whole = checkpoint_bytes(size)
        rows.append({
            "depth": f"d{size.depth}" + (" (best)" if size is best else ""),
            "parameters": f"{size.num_params / 1e6:,.0f}M",
            "tokens": f"{num_tokens / 1e9:.1f}B",
            "per parameter": f"{num_tokens / size.num_params:.1f}",
            "bpb": f"{predict(law, size):.4f}",
            "90% interval": describe([predict(other, size) for other in laws]),
            "more than the best": describe([predict(other, size) - predict(other, best) for other in laws], "+.4f"),
            "checkpoint": f"{whole / 1e9:.1f} GB ({weights / 1e9:.1f} of weights)",
        })
    return rows


def print_plan():
    law, laws, count_name = read_law()
    if gpu not in PEAK_TFLOPS:
        raise UserError(f"--gpu={gpu} is not known", f"one of {', '.join(PEAK_TFLOPS)}")
    hours = budget / (gpu_hourly_rate * num_gpus)
    flops_per_hour = 3600 * num_gpus * mfu * PEAK_TFLOPS[gpu] * 1e12
    flops = pretraining * hours * flops_per_hour
    print(f"${budget:,.0f} at ${gpu_hourly_rate:.2f} an hour and GPU: {hours:.1f} hours of {num_gpus} x {gpu}, "
          f"{pretraining * hours:.1f} of them for pretraining\n"
          f"{flops:.2e} FLOPs at {100 * mfu:.0f}% of {PEAK_TFLOPS[gpu]} TFLOP/s")
    print_table("All depths take this time", plan_rows(flops, law, laws, count_name))

    # The run script's: its own amount of FLOPs, and the best use of them
    size = ModelSize.from_depth(beside, vocab_size, context)
    flops = RATIO * size.num_params * size.flops_per_token
    hours = flops / flops_per_hour
    cost = hours * gpu_hourly_rate * num_gpus
    title = f"The time of d{beside} at {RATIO} tokens per parameter: {hours:.1f} hours, ${cost:,.0f}, {flops:.2e} FLOPs"
    print_table(title, plan_rows(flops, law, laws, count_name, also=beside))


# -----------------------------------------------------------------------------


def read_depths():
    """[int] of --depths."""
    try:
        values = sorted({int(depth.strip().removeprefix("d")) for depth in depths.split(",")})
    except ValueError:
        values = []
    if len(values) < 3 or values[0] < 1:
        raise UserError(f"--depths={depths}: need three depths or more, separated by commas", "--depths=2,3,4,5,6")
    return values


def open_series():
    """The Series, with the tokenizer of the base directory."""
    where = folder()
    if not (where / "tokenizer").is_dir():
        get_tokenizer().save(where / "tokenizer")
    text = data
    if text is None and get_data_dir() is None:
        text = str(base_data_dir())  # before the base directory becomes another
    settings = {
        "data": text,
        "text_field": text_field,
        "depths": read_depths(),
        "levels": levels,
        "seeds": seeds,
        "max_seq_len": max_seq_len,
        "eval_tokens": eval_tokens,
        "flags": flags.split(),
        "device_type": device_type,
    }
    tokenizer = type(get_tokenizer()).from_directory(where / "tokenizer")
    return Series(where, settings, tokenizer.get_vocab_size())


def main():
    if plan:
        print_plan()
        return
    # SIGTERM ends it like Ctrl-C: the run in progress saves a checkpoint first
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    series = open_series()
    if minutes > 0:
        left = series.run_all(series.plan(minutes), minutes)
        if left:
            print(f"note: {len(left)} runs do not fit {minutes:g} minutes any more, such as {left[0].tag}; "
                  "a larger --minutes goes on with them")
    lines = series.results()
    if not lines:
        raise UserError(f"{folder()} has no finished run", "--minutes=180 runs a series")
    analyse(lines)


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
