"""
The report card of a run. Each stage writes its facts as JSON when it ends. `generate` renders all
of them from templates: as report.html, one file that a browser opens, and as report.md, with the
curves as SVG pictures beside it. The pages are never read back.

    facts = {"config": settings, "metrics": {"val bpb": 0.91}, "curves": path}
    get_report().log("Base model training", facts)

    python -m nanochat.report reset        # a new card: start time and environment
    python -m nanochat.report generate     # <base dir>/report/report.html and .md, and the same here

`log` takes these keys, all optional: `config` {name: value}; `metrics` {name: value, or {value, n,
stderr}}; `curves`, the path of a metrics.jsonl; `samples` [{prompt, text}]; `tables` {title: [row
dicts]}; `command` (default: that of this process). Any other key is listed as a fact of the stage.
"""

import json
import os
import shutil
import time
from pathlib import Path

from nanochat.common import get_base_dir, get_dist_info, run_script, write_text
from nanochat.configurator import ArgumentParser
from nanochat.curves import draw, read_panels, to_svg
from nanochat.report_page import SECTIONS, STAGE_KEYS, collect, render_html, render_markdown
from nanochat.report_text import slug
from nanochat.run_facts import get_command, get_environment, get_process_start


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
        """
        Render report.html, and report.md with its pictures, also into `copy_to`. Returns the path
        of report.md.
        """
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
            stage["panels"] = read_panels(self.report_dir / stage["curves"])
            if stage["panels"]:
                stage["picture"] = f"report-{slug(stage['section'])}.svg"
                files[stage["picture"]] = to_svg(draw(stage["panels"]))
            stages.append(stage)
        card = collect(start, stages, gpu_hourly_rate)
        files["report.md"] = render_markdown(card)
        files["report.html"] = render_html(card)

        # the same files in each folder; a working directory may be read-only
        folders = [self.report_dir]
        if copy_to and os.access(copy_to, os.W_OK):
            folders.append(Path(copy_to))
        for folder in folders:
            for name, text in files.items():
                write_text(folder / name, replace_surrogates(text))
        return self.report_dir / "report.md"


def replace_surrogates(text):
    """Text that UTF-8 can hold. A file name with other bytes in it, in a command, has surrogates."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def to_json(record):
    """Indented JSON. A tensor of one element becomes its number, any other object its text."""
    # called for objects that json does not know
    def convert(value):
        return value.item() if hasattr(value, "item") else str(value)
    return json.dumps(record, indent=1, default=convert)


# -----------------------------------------------------------------------------


def main():
    parser = ArgumentParser(
        prog="python -m nanochat.report",
        description="The report card of a run",
    )
    parser.add_argument(
        "action",
        choices=["reset", "generate"],
        help="start a new card / render report.html and report.md",
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
        path = report.generate(args.gpu_hourly_rate, copy_to=Path.cwd())
        print(f"Wrote {path} and {path.with_suffix('.html')}")


if __name__ == "__main__":
    run_script(main)
