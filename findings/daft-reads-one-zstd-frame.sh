#!/usr/bin/env bash
# daft: of a .jsonl.zst with several frames only the first is read
#
# Expected: all rows. A zstd file may hold several frames (one after the other: parts that were joined by
#   `cat`, a log that was opened again, what parallel compressors write), and pandas, polars, duckdb,
#   datasets and pyarrow read all of them.
# Happens:  daft reads the rows of the first frame and no error is raised: a third of the corpus here.
#   With gzip's several members it reads all.
#
# Versions: daft 0.7.26, polars 2.1.0, zstandard 0.25.0, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   rows written 3000
#   polars, zstd 3000
#   daft, gzip   3000
#   daft, zstd   1000
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python daft==0.7.26 polars==2.1.0 zstandard==0.25.0
cat > try.py <<'PYTHON'
import gzip
import json
import sys

import daft
import polars
import zstandard

parts = []
for first in (0, 1000, 2000):
    rows = [json.dumps({"text": f"document {i}"}) + "\n" for i in range(first, first + 1000)]
    parts.append("".join(rows).encode())
with open("all.jsonl.zst", "wb") as file:
    for part in parts:
        file.write(zstandard.ZstdCompressor().compress(part))
with open("all.jsonl.gz", "wb") as file:
    for part in parts:
        file.write(gzip.compress(part))

print("rows written 3000")
by_polars = polars.read_ndjson("all.jsonl.zst").height
print("polars, zstd", by_polars)
by_gzip = daft.read_json("all.jsonl.gz").count_rows()
print("daft, gzip  ", by_gzip)
by_zstd = daft.read_json("all.jsonl.zst").count_rows()
print("daft, zstd  ", by_zstd)
sys.exit((by_polars, by_gzip, by_zstd) != (3000, 3000, 1000))
PYTHON
DO_NOT_TRACK=true DAFT_PROGRESS_BAR=0 venv/bin/python try.py
