#!/usr/bin/env bash
# duckdb: texts in a .jsonl become times of day or UUIDs, and are written back as other texts
#
# Expected: a JSON string stays a string; JSON has types of its own. From a CSV one expects guesses.
# Happens:  `read_json` guesses for strings too. Answers of the form 9:05 come back as 09:05:00, and
#   identifiers in capitals in small letters: reading a file of questions and writing it again changes
#   the answers to be matched. Numbers in strings (007) and "true" stay as they are.
#   `columns` or `auto_detect=false` keep the text.
#
# Versions: duckdb 2.0.1, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   9:05                                 TIME     09:05:00
#   2024-1-2                             DATE     2024-01-02
#   550E8400-E29B-41D4-A716-446655440000 UUID     550e8400-e29b-41d4-a716-446655440000
#   007                                  VARCHAR  007
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python duckdb==2.0.1
cat > try.py <<'PYTHON'
import json
import sys

import duckdb

database = duckdb.connect()
seen = []
for text in ("9:05", "2024-1-2", "550E8400-E29B-41D4-A716-446655440000", "007"):
    with open("in.jsonl", "w") as file:
        file.write(json.dumps({"question": "What?", "answer": text}) + "\n")
    database.execute("COPY (SELECT * FROM read_json('in.jsonl')) TO 'out.jsonl' (FORMAT json)")
    kind = database.execute("SELECT typeof(answer) FROM read_json('in.jsonl')").fetchone()[0]
    with open("out.jsonl") as file:
        back = json.loads(file.readline())["answer"]
    print(f"{text:<36} {kind:<8} {back}")
    seen.append((kind, back))

as_seen = [("TIME", "09:05:00"), ("DATE", "2024-01-02"),
           ("UUID", "550e8400-e29b-41d4-a716-446655440000"), ("VARCHAR", "007")]
sys.exit(seen != as_seen)
PYTHON
venv/bin/python try.py
