#!/usr/bin/env bash
# datasets: a column of texts that are all dates is no text any more, and is written back as numbers
#
# Expected: load_dataset("json") keeps JSON strings as strings, as it does for "007" or "true".
# Happens:  if every text of the column reads as a date, the column becomes timestamp[s]: rows hold
#   datetime objects, "2024-01-02" and "2024-01-02T00:00:00Z" can no longer be told apart, and `to_json`
#   writes milliseconds since 1970. One other text anywhere in the column, and all stay strings, so two
#   parts of one data set get different features. `features=` keeps the text.
#
# Versions: datasets 5.2.0, pyarrow 26.0.1, pandas 3.1.1, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   all dates        timestamp[s]  2024-01-02 00:00:00    "answer":1704153600000
#   one other text   string        2024-01-02             "answer":"2024-01-02"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1
cat > try.py <<'PYTHON'
import json
import sys

import datasets

datasets.disable_progress_bars()


def load(name, answers):
    with open(f"{name}.jsonl", "w") as file:
        for answer in answers:
            file.write(json.dumps({"answer": answer}) + "\n")
    rows = datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache")
    rows.to_json(f"{name}_back.jsonl")
    with open(f"{name}_back.jsonl") as file:
        back = json.loads(file.readline())["answer"]
    return rows.features["answer"].dtype, str(rows[0]["answer"]), back


seen = []
for name, answers in (("all dates", ["2024-01-02", "2024-03-04"]), ("one other text", ["2024-01-02", "in March"])):
    kind, value, back = load(name, answers)
    print(f"{name:<16} {kind:<13} {value:<22} \"answer\":{json.dumps(back)}")
    seen.append((kind, value, back))
as_seen = [("timestamp[s]", "2024-01-02 00:00:00", 1704153600000), ("string", "2024-01-02", "2024-01-02")]
sys.exit(seen != as_seen)
PYTHON
HF_HOME="$work/hub" HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 venv/bin/python try.py
