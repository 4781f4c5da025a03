#!/usr/bin/env bash
# polars: a field that first occurs after the hundredth row of a .jsonl vanishes
#
# Expected: an error, as duckdb raises, or a column that is null before, as pyarrow gives. A field that
#   rows have is not lost without a word.
# Happens:  `read_ndjson` takes the columns, and the fields of nested ones, from the first 100 rows.
#   What later rows have besides is dropped. In a file of conversations where only some late messages
#   are marked `"weight": 0` (do not train on this), the marks are gone and the texts stay.
#
# Versions: polars 2.1.0, pyarrow 26.0.1, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   marked row 100: [{'role': 'assistant', 'content': 'draft', 'weight': 0}]
#   marked row 101: [{'role': 'assistant', 'content': 'draft'}]
#   by pyarrow:     [{'role': 'assistant', 'content': 'draft', 'weight': 0}]
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python polars==2.1.0 pyarrow==26.0.1
cat > try.py <<'PYTHON'
import json
import sys

import polars
import pyarrow.json


def write(path, num_before):
    """Conversations of one message each; the last one is marked."""
    plain = {"messages": [{"role": "assistant", "content": "answer"}]}
    marked = {"messages": [{"role": "assistant", "content": "draft", "weight": 0}]}
    with open(path, "w") as file:
        for row in [plain] * num_before + [marked]:
            file.write(json.dumps(row) + "\n")


write("early.jsonl", 99)
write("late.jsonl", 100)
early = polars.read_ndjson("early.jsonl").row(-1)[0]
print("marked row 100:", early)
late = polars.read_ndjson("late.jsonl").row(-1)[0]
print("marked row 101:", late)
by_arrow = pyarrow.json.read_json("late.jsonl").to_pylist()[-1]["messages"]
print("by pyarrow:    ", by_arrow)

whole = [{"role": "assistant", "content": "draft", "weight": 0}]
without = [{"role": "assistant", "content": "draft"}]
sys.exit((early, late, by_arrow) != (whole, without, whole))
PYTHON
venv/bin/python try.py
