"""
The runs of a base directory, and how each of them is: from the end of its metrics.jsonl, and from
what run_file.py has written.
"""

import contextlib
import json
import re
import time
from pathlib import Path

from nanochat.files import STAGE_DIRS
from nanochat.locks import is_locked

QUIET_S = 5         # seconds without a new line, after which it is asked whether the run still lives
TAIL_BYTES = 2**15  # of a log: about the last 40 steps
ERROR_CHARS = 4000  # of an error that are shown


def find_runs(base_dir):
    """{"<stage>/<tag>": folder} of every run with metrics, newest first; moved aside ones too."""
    found = []
    for stage, name in STAGE_DIRS.items():
        for log in Path(base_dir, name).glob("*/metrics.jsonl"):
            with contextlib.suppress(OSError):  # moved in this moment
                found.append((log.stat().st_mtime, f"{stage}/{log.parent.name}", log.parent))
    return {run: folder for _, run, folder in sorted(found, reverse=True)}


def describe_run(folder):
    """
    How a run is, as a dict for JSON: what its run.json has, and `state`, `step`, `updated` (seconds
    since 1970), `eta_s` and `errors` {rank: text}. Values that are not known are None or missing.

    Besides the states of run.json there are "killed": it runs no more and did not say so; and
    "unknown": a run of an earlier version, without the file.
    """
    facts = {"state": "unknown", "iterations": None, "started": 0, **read_json(folder / "run.json")}
    log = folder / "metrics.jsonl"
    steps = [row for row in read_tail(log) if "train/loss" in row]
    facts["step"] = steps[-1]["step"] if steps else 0
    facts["updated"] = log.stat().st_mtime
    facts["errors"] = read_errors(folder)

    # A run that fails or is killed may have no time to say so
    quiet_s = time.time() - facts["updated"]
    if facts["state"] == "running" and quiet_s > QUIET_S:
        if not is_locked(folder.with_name(f".{folder.name}.lock")):
            facts["state"] = "failed" if facts["errors"] else "killed"
    facts["eta_s"] = None
    if facts["state"] == "running":
        facts["eta_s"] = estimate_eta(steps, facts["started"], facts["iterations"])
    return facts


def estimate_eta(steps, started, iterations):
    """Seconds to the end of a run, evaluations and saves included, from the lines of its last steps."""
    # not across the break before a resumed run
    times = [(row["step"], row["time"]) for row in steps if row.get("time", 0) >= started]
    if len(times) < 2:
        return None
    first_step, first_time = times[0]
    last_step, last_time = times[-1]
    if last_step <= first_step:
        return None
    return (last_time - first_time) / (last_step - first_step) * (iterations - last_step)


def read_tail(path):
    """The last lines of a log, as dicts; those that are not whole are left out."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().splitlines()
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def read_json(path):
    """The dict in a JSON file; {} if there is none."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def read_errors(folder):
    """{rank: its error} of the ranks that have failed."""
    errors = {}
    for path in folder.glob("error_rank*.txt"):
        match = re.fullmatch(r"error_rank(\d+)\.txt", path.name)
        if match:
            with contextlib.suppress(OSError):
                text = path.read_text(encoding="utf-8", errors="replace")
                errors[int(match[1])] = text[:ERROR_CHARS]
    return dict(sorted(errors.items()))
