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

import json
import os
import re
import shlex
import sys
import time

from nanochat.common import get_base_dir, get_dist_info

_IMPORT_TIME = time.time()  # scripts import this module first thing, so it is when the stage began

SECTIONS = ["Tokenizer training", "Tokenizer evaluation", "Base model training", "Base model loss",
            "Base model evaluation", "Chat evaluation base", "Midtraining", "Chat evaluation mid", "Chat SFT",
            "Chat evaluation sft", "Chat RL", "Chat evaluation rl"]

# -----------------------------------------------------------------------------
# Recording


def get_report():
    """The card in the base directory. Every rank may call log(); only rank 0 writes."""
    return Report(get_base_dir() / "report")


class Report:
    def __init__(self, report_dir):
        self.report_dir = report_dir

    def log(self, section, data):
        """Write the facts of a finished stage; a section that is logged again replaces what it said before."""
        rank, _, world_size = get_dist_info()
        if rank != 0:
            return
        times = {"start_time": _IMPORT_TIME, "end_time": time.time(), "world_size": world_size}
        number = SECTIONS.index(section) + 1 if section in SECTIONS else len(SECTIONS) + 1
        record = {"section": section, "command": _this_command(world_size), **times, **data}
        _write_text(self.report_dir / f"{number:02d}-{_slug(section)}.json", json.dumps(record, indent=1, default=str))


def _slug(text):
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _write_text(path, text):
    """Whole or not at all: under a temporary name first, then renamed into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _this_command(world_size):
    """What was typed to start this process, as far as it can tell (under torchrun, rebuilt from the world size)."""
    words = [os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]]
    if world_size > 1 and "-m" in words:
        per_node = os.environ.get("LOCAL_WORLD_SIZE", world_size)
        module, *args = words[words.index("-m") + 1:]
        words = ["torchrun", "--standalone", f"--nproc_per_node={per_node}", "-m", module, "--", *args]
    return shlex.join(words)
