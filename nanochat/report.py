"""
The report card of a run. Each stage writes its facts as JSON when it ends; `generate` renders all of them once as
`report.md`, with the curves as SVG pictures beside it. Nothing is ever read back from markdown.

    from nanochat.report import get_report
    get_report().log("Base model training", {"config": settings, "metrics": {"val bpb": 0.91}, "curves": path})

    python -m nanochat.report reset                              # a new card: start time and environment
    python -m nanochat.report generate --gpu_hourly_rate=2.5     # <base dir>/report/report.md, and ./report.md

What `log` takes, all of it optional: `config` {name: value}; `metrics` {name: value, or {value, n, stderr}};
`curves`, path or paths of a metrics.jsonl (an object a line with `step`); `samples` [{prompt, text}]; `tables`
{title: [row dicts]}; `command` (default: this process's own). Anything else is listed as a fact of the stage.
"""

import html
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanochat.common import get_base_dir, get_dist_info, run_script, write_text
from nanochat.configurator import ArgumentParser
from nanochat.curves import draw, read_panels

_IMPORT_TIME = time.time()  # scripts import this module first thing, so it is when their stage began

# The sections in the order of the pipeline, each with the column of the summary table that its metrics go to.
SECTIONS = {"Tokenizer training": None, "Tokenizer evaluation": None, "Base model training": "base",
            "Base model loss": "base", "Base model evaluation": "base", "Chat evaluation base": "base",
            "Midtraining": "mid", "Chat evaluation mid": "mid", "Chat SFT": "sft", "Chat evaluation sft": "sft",
            "Chat RL": "rl", "Chat evaluation rl": "rl"}
METRICS = ["CORE", "bpb", "ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "ChatCORE"]
KNOWN_KEYS = {"section", "start_time", "end_time", "world_size", "command", "config", "metrics", "curves", "samples",
              "tables"}  # of a stage's JSON; any other is a fact to list
LONG_TABLE = 12  # rows; a longer one is folded away
DEFAULT_GPU_HOURLY_RATE = 3.0  # dollars for one H100 and hour, the usual price for rent in 2025

# -----------------------------------------------------------------------------
# Recording


def get_report():
    """The card in the base directory. Every rank may call log(); only rank 0 writes."""
    return Report(get_base_dir() / "report")


class Report:
    def __init__(self, report_dir):
        self.report_dir = Path(report_dir)

    def log(self, section, data):
        """Write the facts of a finished stage; a section that is logged again replaces what it said before."""
        rank, _, world_size = get_dist_info()
        if rank != 0:
            return
        number = list(SECTIONS).index(section) + 1 if section in SECTIONS else len(SECTIONS) + 1  # sorts the files
        record = {"section": section, "start_time": _IMPORT_TIME, "end_time": time.time(), "world_size": world_size,
                  "command": _this_command(world_size), **data}
        curves = [record["curves"]] if isinstance(record.get("curves"), str | Path) else record.get("curves") or []
        record["curves"] = [os.path.relpath(path, self.report_dir) for path in curves]  # the card can move with them
        write_text(self.report_dir / f"{number:02d}-{_slug(section)}.json", _to_json(record))

    def reset(self):
        """Start a new card. The card before it is kept, once, under report_previous/."""
        if self.report_dir.exists():
            previous = self.report_dir.with_name(self.report_dir.name + "_previous")
            shutil.rmtree(previous, ignore_errors=True)
            self.report_dir.rename(previous)
        write_text(self.report_dir / "start.json", _to_json({"time": time.time(), "environment": get_environment()}))

    def generate(self, gpu_hourly_rate=None, copy_to=None):
        """Render report.md and its pictures; returns its path. `copy_to`: a folder that gets the same files."""
        start_path = self.report_dir / "start.json"
        start = json.loads(start_path.read_text("utf-8")) if start_path.exists() else {"environment": get_environment()}
        stages = [json.loads(path.read_text("utf-8")) for path in sorted(self.report_dir.glob("[0-9]*.json"))]
        pictures = {}  # file name -> SVG
        text = _render(start, stages, gpu_hourly_rate, self.report_dir, pictures)
        for folder in [self.report_dir] + ([Path(copy_to)] if copy_to and os.access(copy_to, os.W_OK) else []):
            for name, svg in pictures.items():
                write_text(folder / name, svg)
            write_text(folder / "report.md", text)
        return self.report_dir / "report.md"


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _to_json(record):
    """JSON for people: indented, a number inside a tensor as a number, anything unknown as its text."""
    return json.dumps(record, indent=1, default=lambda value: value.item() if hasattr(value, "item") else str(value))


def _this_command(world_size):
    """What was typed to start this process, as far as it can tell (under torchrun, rebuilt from the world size)."""
    words = [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]
    if world_size > 1 and "-m" in words:
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes = "--standalone" if per_node == world_size else f"--nnodes={world_size // per_node}"
        module, *args = words[words.index("-m") + 1:]
        words = ["torchrun", nodes, f"--nproc_per_node={per_node}", "-m", module, "--", *args]
    return shlex.join(words)


def _ask(*command):
    """First line that a tool prints, or "" where the tool, the repository or an answer is missing."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip().split("\n")[0] if result.returncode == 0 else ""


def get_environment():
    """What the run stands on: code, machine and packages. What cannot be found out is left empty."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cpu = _ask("sysctl", "-n", "machdep.cpu.brand_string") if sys.platform == "darwin" else ""
    if os.path.exists("/proc/cpuinfo"):
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text("utf-8"))
        cpu = names[0] if names else cpu
    pages = os.sysconf("SC_PHYS_PAGES") if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}) else 0
    memory = f"{pages * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB memory" if pages else ""
    installed = {(dist.metadata["Name"] or "?"): dist.version for dist in importlib.metadata.distributions()}
    return {
        "commit": _ask("git", "rev-parse", "--short", "HEAD"),
        "branch": _ask("git", "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(_ask("git", "status", "--porcelain", "--untracked-files=no")),
        "num_gpus": len(gpus), "gpus": [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB" for gpu in gpus],
        "driver": _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpus else "",
        "cpu": ", ".join(filter(None, [cpu or platform.machine(), f"{os.cpu_count()} cores", memory])),
        "system": platform.platform(), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda or "", "packages": dict(sorted(installed.items(), key=lambda item: item[0].lower())),
    }


# -----------------------------------------------------------------------------
# Rendering: the parts of the page


def _render(start, stages, rate, report_dir, pictures):
    """The whole page; the pictures that it shows are added to `pictures` (file name -> SVG)."""
    seconds, packages = _busy_seconds(stages), start["environment"]["packages"].items()
    missing = [name for name in SECTIONS if name not in {stage["section"] for stage in stages}]
    took = [[_md(stage["section"]), _date(stage["end_time"]), _duration(stage["end_time"] - stage["start_time"])]
            for stage in stages]
    parts = ["# nanochat report card", _header(start, stages, seconds, rate),
             "## Metrics by stage", _summary(stages),
             f"Not in this card, since they have not run: {', '.join(missing)}." if missing else "Every stage has run.",
             "## Time", _table(["stage", "ended (UTC)", "took"], [*took, ["**all**", "", f"**{_duration(seconds)}**"]])]
    for stage in stages:
        parts += _stage(stage, report_dir, pictures)
    parts += ["## The run again", "The commands of the stages above, in order:",
              _fence("\n".join(stage["command"] for stage in stages)),
              _details("Installed packages", _md(", ".join(f"{name} {version}" for name, version in packages)))]
    return "\n\n".join(parts) + "\n"


def _busy_seconds(stages):
    """Wall time of all stages; what two sections of one process, or two stages side by side, share counts once."""
    seconds, until = 0.0, 0.0  # counted so far, and up to which point in time
    for stage in sorted(stages, key=lambda stage: stage["start_time"]):
        seconds += max(0.0, stage["end_time"] - max(stage["start_time"], until))
        until = max(until, stage["end_time"])
    return seconds


def _header(start, stages, seconds, rate):
    """The list on top of the page: when, what code, which machine, how long, what cost."""
    env = start["environment"]
    code = env["commit"] and f"commit {env['commit']} on {env['branch']}" + " with local changes" * env["dirty"]
    gpus = ", ".join(f"{env['gpus'].count(name)} x {name}" for name in dict.fromkeys(env["gpus"]))
    versions = f"Python {env['python']}, torch {env['torch']}" + (f", CUDA {env['cuda']}" if env["cuda"] else "")
    facts = {"Started": f"{_date(start['time'])} UTC" if "time" in start else "unknown (no reset before the run)",
             "Code": code or "not a git checkout", "GPU": gpus or "none", "CPU": env["cpu"],
             "Software": f"{versions}, {env['system']}" + (f", driver {env['driver']}" if env["driver"] else ""),
             "Time in the stages": _duration(seconds)}
    if "time" in start and stages:
        facts["From start to the last stage"] = _duration(max(stage["end_time"] for stage in stages) - start["time"])
    return _facts(facts | {"Cost": _cost(env["num_gpus"], stages, seconds, rate)})


def _cost(num_gpus, stages, seconds, rate):
    """Rate x GPUs x hours: all GPUs of the machine, since a rented one is paid whole, or more if the run had more."""
    if not num_gpus and rate is None:
        return "not counted: no GPU, and no --gpu_hourly_rate given"
    rate = DEFAULT_GPU_HOURLY_RATE if rate is None else rate
    units = max([num_gpus, *(stage["world_size"] for stage in stages)]) if num_gpus else 1  # one machine without GPUs
    return f"${rate * units * seconds / 3600:,.2f} ({units} x ${rate:,.2f} an hour)"


def _summary(stages):
    """The table of metrics: one row per metric, one column per stage. The latest section of a column wins."""
    columns, cells = ["base", "mid", "sft", "rl"], {}  # cells: metric name -> {column: cell}
    known = {name.lower(): name for name in METRICS}
    for stage in stages:
        column = SECTIONS.get(stage["section"])
        for name, metric in (stage.get("metrics") or {}).items() if column else ():
            name = known.get(re.sub(r"^val[/_ ]", "", name.lower()), name)  # "val/bpb", "val_bpb", "bpb": one row
            cells.setdefault(name, {})[column] = _metric(metric)
    names = [name for name in METRICS if name in cells] + [name for name in cells if name not in METRICS]
    if not names:
        return "No stage has recorded a metric yet."
    rows = [[_md(name), *(cells[name].get(column, "–") for column in columns)] for name in names]
    return _table(["metric", *columns], rows) + "\n\nEach with its standard error and n, the number of problems, " \
                                                "where known."


def _stage(stage, report_dir, pictures):
    """One section: metrics and facts, curves, samples, tables; settings, command and long tables folded away."""
    metrics = {name: _metric(metric) for name, metric in (stage.get("metrics") or {}).items()}
    others = {name: _value(value) for name, value in stage.items() if name not in KNOWN_KEYS}
    parts = [f"## {_md(stage['section'])}"] + ([_facts(metrics | others)] if metrics or others else [])
    panels = read_panels([report_dir / path for path in stage["curves"]])
    if panels:
        name = f"report-{_slug(stage['section'])}.svg"
        pictures[name] = draw(panels)
        parts.append(f"![Curves of {stage['section']}]({name})")
    elif stage["curves"]:
        parts.append("No curves: the file of metrics is missing or has no step in it.")
    for sample in stage.get("samples") or []:
        prompt = sample["prompt"].strip()
        text = sample["text"].strip().removeprefix(prompt).strip()  # base models' samples begin with their prompt
        parts.append(f"> **{_md(prompt)}** {_md(text)}" if prompt else f"> {_md(text)}")
    for title, rows in (stage.get("tables") or {}).items():
        header = list(dict.fromkeys(key for row in rows for key in row))  # of all rows, in the order of the first
        body = _table(list(map(_md, header)), [[_md(_value(row.get(key, ""))) for key in header] for row in rows])
        parts += [_details(title, body)] if len(rows) > LONG_TABLE else [f"**{_md(title)}**", body]
    if stage.get("config"):
        settings = [[_code(name), _code(value)] for name, value in stage["config"].items()]
        parts.append(_details("Settings", _table(["setting", "value"], settings)))
    return parts + [_details("Command", _fence(stage["command"]))]


# -----------------------------------------------------------------------------
# Rendering: pieces of markdown


def _md(text):
    """Plain text -> markdown that shows just this text, in a paragraph or in a table cell."""
    # an underscore within a word is no markup, and device_batch_size reads better without backslashes
    text = re.sub(r"[\\`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])", lambda match: "\\" + match.group(), text)
    return html.escape(text, quote=False).replace("\r", "").replace("\n", "<br>")


def _code(text):
    return "`" + str(text).replace("`", "'").replace("|", "\\|").replace("\n", " ") + "`"


def _fence(text):
    return f"```text\n{text}\n```"


def _details(title, body):
    return f"<details><summary>{_md(title)}</summary>\n\n{body}\n\n</details>"


def _facts(facts):
    return "\n".join(f"- **{_md(name)}**: {_md(value)}" for name, value in facts.items())


def _table(header, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


def _metric(metric):
    """0.2103 ± 0.0061 (n=48,211), or what is known of it."""
    if not isinstance(metric, dict):
        return _value(metric, ".4f")
    stderr = f" ± {_value(metric['stderr'], '.4f')}" if metric.get("stderr") is not None else ""
    return _value(metric.get("value"), ".4f") + stderr + (f" (n={metric['n']:,})" if metric.get("n") else "")


def _value(value, style=".4g"):
    """Numbers with separators or four digits, the rest as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):  # a bool is an int, too
        return {True: "yes", False: "no", None: "–"}.get(value, str(value))
    if abs(value) >= 1e15:  # FLOPs: nobody counts the zeros
        return f"{value:.3e}"
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:{style}}"


def _date(seconds):
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def _duration(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}h {minutes % 60:02d}m" if minutes >= 60 else f"{minutes}m {seconds:02d}s"


# -----------------------------------------------------------------------------


def main():
    parser = ArgumentParser(prog="python -m nanochat.report", description="The report card of a run")
    parser.add_argument("action", choices=["reset", "generate"], help="start a new card / render report.md")
    parser.add_argument("--gpu_hourly_rate", type=float, help="dollars for one GPU and hour (default: 3.0 where there "
                        "are GPUs; without GPUs a run has no cost unless this is given)")
    args = parser.parse_args()
    report = get_report()
    if args.action == "reset":
        report.reset()
        print(f"New report card in {report.report_dir}")
    else:
        print(f"Wrote {report.generate(args.gpu_hourly_rate, copy_to=Path.cwd())}")


if __name__ == "__main__":
    run_script(main)
