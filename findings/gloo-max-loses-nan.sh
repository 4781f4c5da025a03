#!/usr/bin/env bash
# torch.distributed, gloo: the maximum over ranks keeps a NaN or drops it, depending on who has it
#
# Expected: all_reduce with MAX gives NaN if one rank has NaN, as torch.maximum, max and amax do. So a loss
#   that is NaN on one rank is seen on all.
# Happens:  the NaN of rank 0 is kept and that of rank 1 is dropped if there is one value. Of a longer tensor
#   each rank owns a part, in which its own NaN is kept and those of others are dropped. MIN does the
#   same. All ranks get equal values, so nothing looks wrong. SUM keeps every NaN.
#
# Versions: torch 2.15.0 (the package of PyPI, on a CPU, gloo), Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv, 6 GB of disk for torch. Two processes, which meet through a file.
#
# Output seen (the first of two ranks or the second has NaN in all values, the other has 1):
#   torch.maximum in one process: nan nan
#   MAX, 1 value,  rank 0 has NaN: nan
#   MAX, 1 value,  rank 1 has NaN: 1
#   MAX, 8 values, rank 0 has NaN: nan nan nan nan 1 1 1 1
#   MAX, 8 values, rank 1 has NaN: 1 1 1 1 nan nan nan nan
#   SUM, 8 values, rank 1 has NaN: nan nan nan nan nan nan nan nan
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python torch==2.15.0
cat > try.py <<'PYTHON'
import datetime
import sys

import torch
import torch.distributed as dist

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=120))


def show(values):
    return " ".join(f"{value:g}" for value in values.tolist())


if rank == 0:
    nan_and_one = torch.tensor([float("nan"), 1.0])
    print("torch.maximum in one process:", show(torch.maximum(nan_and_one, nan_and_one.flip(0))))
for name, size, holder in (("MAX", 1, 0), ("MAX", 1, 1), ("MAX", 8, 0), ("MAX", 8, 1), ("SUM", 8, 1)):
    values = torch.full((size,), float("nan") if rank == holder else 1.0)
    dist.all_reduce(values, op=getattr(dist.ReduceOp, name))
    if rank == 0:
        words = "1 value, " if size == 1 else f"{size} values,"
        print(f"{name}, {words} rank {holder} has NaN: {show(values)}")
dist.destroy_process_group()
PYTHON
export OMP_NUM_THREADS=1
timeout 300 venv/bin/python -W ignore try.py 1 "$work/meet" &
timeout 300 venv/bin/python -W ignore try.py 0 "$work/meet" | tee seen.txt
wait $!
cat > as_seen.txt <<'TEXT'
torch.maximum in one process: nan nan
MAX, 1 value,  rank 0 has NaN: nan
MAX, 1 value,  rank 1 has NaN: 1
MAX, 8 values, rank 0 has NaN: nan nan nan nan 1 1 1 1
MAX, 8 values, rank 1 has NaN: 1 1 1 1 nan nan nan nan
SUM, 8 values, rank 1 has NaN: nan nan nan nan nan nan nan nan
TEXT
cmp seen.txt as_seen.txt
