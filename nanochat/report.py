"""
The report card of a run. Each stage writes its facts as JSON when it ends. `generate` renders all
of them as `report.md` from a template (report.md.j2), with the curves as SVG pictures beside it.
Markdown is never read back.

    facts = {"config": settings, "metrics": {"val bpb": 0.91}, "curves": path}
    get_report().log("Base model training", facts)

    python -m nanochat.report reset        # a new card: start time and environment
    python -m nanochat.report generate     # <base dir>/report/report.md, and ./report.md

`log` takes these keys, all optional: `config` {name: value}; `metrics` {name: value, or {value, n,
stderr}}; `curves`, the path of a metrics.jsonl; `samples` [{prompt, text}]; `tables` {title: [row
dicts]}; `command` (default: that of this process). Any other key is listed as a fact of the stage.
"""

import html
import json
import os
import re
import shutil
import time
from pathlib import Path

from markupsafe import Markup

from nanochat.common import get_base_dir, get_dist_info, run_script, write_text
from nanochat.configurator import ArgumentParser
from nanochat.curves import draw, read_panels, to_svg
from nanochat.run_facts import get_command, get_environment, get_process_start

# The sections in the order of the pipeline, each with its column in the table of metrics
SECTIONS = {
    "Tokenizer training": None,
    "Tokenizer evaluation": None,
    "Base model training": "base",
    "Base model loss": "base",
    "Base model evaluation": "base",
    "Chat evaluation base": "base",
    "Midtraining": "mid",
    "Chat evaluation mid": "mid",
    "Chat SFT": "sft",
    "Chat evaluation sft": "sft",
    "Chat RL": "rl",
    "Chat evaluation rl": "rl",
}
# The order of the table's rows; other metrics come after these
METRICS = [
    "Strangers", "CORE", "bpb",
    "ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "ChatCORE",
]

# Keys of a stage's JSON, each with its default; any other key is a fact to list.
STAGE_KEYS = {
    "section": "",
    "start_time": 0.0,  # seconds since 1970
    "end_time": 0.0,
    "world_size": 1,
    "command": "",
    "config": {},
    "metrics": {},
    "curves": "",       # path of a metrics.jsonl, relative to the card's folder
    "samples": [],
    "tables": {},
    "picture": "",      # file name of the drawn curves
}
LONG_TABLE = 12  # rows; a longer table is folded
DEFAULT_GPU_HOURLY_RATE = 3.0  # dollars for an H100, the usual rent in 2025

# -----------------------------------------------------------------------------
# Recording


def get_report():
    """The card in the base directory. Every rank may call log(); only rank 0 writes."""
    return Report(get_base_dir() / "report")


class Report:
    """The card in one folder: start.json, and a JSON file for each section."""
    def __init__(self, report_dir):
        self.report_dir = Path(report_dir)

    def log(self, section, data):
        """Write the facts of a finished stage. They replace those of the same section."""
        rank, _, world_size = get_dist_info()
        if rank != 0:
            return

        # the facts of the stage override those found here
        record = {
            "section": section,
            "start_time": get_process_start(),
            "end_time": time.time(),
            "world_size": world_size,
            "command": get_command(world_size),
            **data,
        }

        # a relative path, so that the base directory may be moved
        if "curves" in record:
            record["curves"] = os.path.relpath(record["curves"], self.report_dir)

        # the number sorts the files in the order of the pipeline; other sections come last
        order = [*SECTIONS, section]
        number = order.index(section) + 1
        write_text(self.report_dir / f"{number:02d}-{slug(section)}.json", to_json(record))

    def reset(self):
        """Start a new card. The previous one is kept under report_previous/."""
        if self.report_dir.exists():
            previous = self.report_dir.with_name(self.report_dir.name + "_previous")
            shutil.rmtree(previous, ignore_errors=True)
            self.report_dir.rename(previous)
        start = {"time": time.time(), "environment": get_environment()}
        write_text(self.report_dir / "start.json", to_json(start))

    def generate(self, gpu_hourly_rate=None, copy_to=None):
        """Render report.md and its pictures, also into `copy_to`. Returns the path of report.md."""
        # the facts of the run as a whole; a run without a reset has those of now
        start_path = self.report_dir / "start.json"
        if start_path.exists():
            start = json.loads(start_path.read_text("utf-8"))
        else:
            start = {"environment": get_environment()}

        # the facts of each stage, its curves as a picture
        files = {}  # name -> text
        stages = []
        for path in sorted(self.report_dir.glob("[0-9]*.json")):
            stage = STAGE_KEYS | json.loads(path.read_text("utf-8"))
            panels = read_panels(self.report_dir / stage["curves"])
            if panels:
                stage["picture"] = f"report-{slug(stage['section'])}.svg"
                files[stage["picture"]] = to_svg(draw(panels))
            stages.append(stage)
        files["report.md"] = render(start, stages, gpu_hourly_rate)

        # the same files in each folder; a working directory may be read-only
        folders = [self.report_dir]
        if copy_to and os.access(copy_to, os.W_OK):
            folders.append(Path(copy_to))
        for folder in folders:
            for name, text in files.items():
                write_text(folder / name, text)
        return self.report_dir / "report.md"


def slug(text):
    """A file name from a title: slug("Chat SFT") == "chat-sft"."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def to_json(record):
    """Indented JSON. A tensor of one element becomes its number, any other object its text."""
    # called for objects that json does not know
    def convert(value):
        return value.item() if hasattr(value, "item") else str(value)
    return json.dumps(record, indent=1, default=convert)


# -----------------------------------------------------------------------------
# Rendering: the data of the page, for the template


def render(start, stages, rate):
    """The text of report.md. rate: dollars for one GPU and hour, or None."""
    import jinja2  # slow to import, and only `report generate` renders

    # autoescape and finalize: every printed value goes through escape_markdown
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=escape_markdown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "metric": format_metric,
        "value": format_value,
        "date": format_date,
        "duration": format_duration,
        "columns": list_columns,
        "code": code,
        "verbatim": verbatim,
    }

    # the data of the page
    seconds = busy_seconds(stages)
    ran = {stage["section"] for stage in stages}
    page = environment.get_template("report.md.j2").render(
        start=start.get("time"),
        environment=start["environment"],
        stages=stages,
        seconds=seconds,
        cost=describe_cost(start["environment"]["num_gpus"], stages, seconds, rate),
        summary=summary_rows(stages),
        missing=[name for name in SECTIONS if name not in ran],
        known_keys=STAGE_KEYS,
        long_table=LONG_TABLE,
    )

    # parts of the page that are left out leave their blank lines behind
    return re.sub(r"\n{3,}", "\n\n", page)


def busy_seconds(stages):
    """Wall time of all stages. Time in which two of them ran side by side counts once."""
    seconds = 0.0
    counted_until = 0.0
    for stage in sorted(stages, key=lambda stage: stage["start_time"]):
        # the part of the stage after all earlier ones
        begin = max(stage["start_time"], counted_until)
        seconds += max(0.0, stage["end_time"] - begin)
        counted_until = max(counted_until, stage["end_time"])
    return seconds


def describe_cost(num_gpus, stages, seconds, rate):
    """
    Rate x GPUs x hours. All GPUs of the machine count, since it is rented whole; more if the run
    had more.
    """
    # a machine without GPUs has a cost only at a stated rate
    if not num_gpus and rate is None:
        return "not counted: no GPU, and no --gpu_hourly_rate given"
    if rate is None:
        rate = DEFAULT_GPU_HOURLY_RATE
    units = 1  # a machine without GPUs is one unit
    if num_gpus:
        units = max([num_gpus, *(stage["world_size"] for stage in stages)])
    return f"${rate * units * seconds / 3600:,.2f} ({units} x ${rate:,.2f} an hour)"


def summary_rows(stages):
    """
    The table of metrics, one row dict each: {"metric": name, "base": text, ...}. Of several
    sections in a column the last one counts.
    """
    rows = {}
    for stage in stages:
        column = SECTIONS.get(stage["section"])
        if column is None:
            continue
        # a metric that no stage of a column has stays a dash
        for name, metric in stage["metrics"].items():
            empty = {"metric": name, "base": "–", "mid": "–", "sft": "–", "rl": "–"}
            rows.setdefault(name, empty)[column] = format_metric(metric)

    # the known metrics first, in their order
    known = [name for name in METRICS if name in rows]
    others = [name for name in rows if name not in METRICS]
    return [rows[name] for name in known + others]


def list_columns(rows):
    """The keys of all row dicts, in the order of their first appearance."""
    return list(dict.fromkeys(key for row in rows for key in row))


# -----------------------------------------------------------------------------
# Rendering: from values to text, from text to Markdown


def format_metric(metric):
    """0.2103 ± 0.0061 (n=48,211), as far as it is known."""
    # a plain number has neither error nor count
    if not isinstance(metric, dict):
        return format_value(metric, ".4f")
    text = format_value(metric.get("value"), ".4f")
    if metric.get("stderr") is not None:
        text += f" ± {format_value(metric['stderr'], '.4f')}"
    if metric.get("n"):
        text += f" (n={metric['n']:,})"
    return text


def format_value(value, style=".4g"):
    """Numbers with separators or four digits, everything else as text."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {format_value(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(format_value(item) for item in value)
    # bool before int, since it is a subclass of int
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, int | float):
        return str(value)
    if abs(value) >= 1e15:  # FLOPs
        return f"{value:.3e}"
    # separators for large numbers, four digits for small ones
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:{style}}"


def format_date(seconds):
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def format_duration(seconds):
    # hours without seconds
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h {minutes % 60:02d}m"
    return f"{minutes}m {seconds:02d}s"


def escape_markdown(text):
    """
    Text -> Markdown that shows exactly this text, in a paragraph or a table. Markup stays as it is.
    """
    if isinstance(text, Markup):
        return text
    # an underscore within a word is no markup, and device_batch_size reads better without
    # backslashes
    special = r"[\\`*\[\]|~#$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])"
    text = re.sub(special, lambda match: "\\" + match.group(), str(text))
    text = html.escape(text, quote=False)
    return Markup(text.replace("\r", "").replace("\n", "<br>"))


def code(value):
    """A value between backticks, in a table."""
    # in a table a | would end the cell, and a backtick the code
    text = " ".join(str(value).splitlines())
    return Markup("`" + text.replace("`", "'").replace("|", "\\|") + "`")


def verbatim(text):
    """Text for a fenced block, without the fence that would end it."""
    return Markup(text.replace("```", "'''"))


# -----------------------------------------------------------------------------


def main():
    parser = ArgumentParser(
        prog="python -m nanochat.report",
        description="The report card of a run",
    )
    parser.add_argument(
        "action",
        choices=["reset", "generate"],
        help="start a new card / render report.md",
    )
    parser.add_argument(
        "--gpu_hourly_rate",
        type=float,
        help="dollars for one GPU and hour (default: 3.0 with GPUs; a run without GPUs has a cost "
             "only if this is given)",
    )
    args = parser.parse_args()
    report = get_report()
    if args.action == "reset":
        report.reset()
        print(f"New report card in {report.report_dir}")
    else:
        print(f"Wrote {report.generate(args.gpu_hourly_rate, copy_to=Path.cwd())}")


if __name__ == "__main__":
    run_script(main)
