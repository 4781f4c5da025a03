#!/usr/bin/env bash
# torch.distributed, gloo: collectives on a view with gaps take the numbers between, too
#
# Expected: all_reduce, broadcast and reduce work in place on the values of the tensor they get, or say, as
#   send does, that it has to be contiguous.
# Happens:  of a view such as x[::2] or x[:, :2] they take as many numbers as the view has from the start of
#   its memory, one after the other. So of every second number the first half is summed and the second
#   half stays this rank's own, and numbers that do not belong to the view are changed. No error, no warning.
#   all_gather, reduce_scatter_tensor and all_to_all_single of the same view are right.
#
# Versions: torch 2.15.0 (the package of PyPI, on a CPU, gloo), Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv, 6 GB of disk for torch. Two processes, which meet through a file.
#
# Output seen (rank 0 has 1 to 8, rank 1 has 10 to 80; the view is every second number):
#   before     1 2 3 4 5 6 7 8
#   all_reduce 11 22 33 44 5 6 7 8, expected 11 2 33 4 55 6 77 8
#   broadcast  10 20 30 40 5 6 7 8, expected 10 2 30 4 50 6 70 8
#   reduce     11 22 33 44 5 6 7 8, expected 11 2 33 4 55 6 77 8
#   all_gather 1 3 5 7 10 30 50 70, expected 1 3 5 7 10 30 50 70
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


def start():
    return torch.arange(1.0, 9.0) * (1, 10)[rank]


def show(values):
    return " ".join(f"{value:g}" for value in values.tolist())


in_place = {
    "all_reduce": (lambda view: dist.all_reduce(view), "11 2 33 4 55 6 77 8"),
    "broadcast": (lambda view: dist.broadcast(view, src=1), "10 2 30 4 50 6 70 8"),
    "reduce": (lambda view: dist.reduce(view, dst=0), "11 2 33 4 55 6 77 8"),
}
lines = [f"before     {show(start())}"]
for name, (collective, expected) in in_place.items():
    values = start()
    collective(values[::2])
    lines.append(f"{name:<10} {show(values)}, expected {expected}")
parts = [torch.zeros(4), torch.zeros(4)]
dist.all_gather(parts, start()[::2])
lines.append(f"all_gather {show(torch.cat(parts))}, expected 1 3 5 7 10 30 50 70")
if rank == 0:
    print("\n".join(lines))
dist.destroy_process_group()
PYTHON
export OMP_NUM_THREADS=1
timeout 300 venv/bin/python -W ignore try.py 1 "$work/meet" &
timeout 300 venv/bin/python -W ignore try.py 0 "$work/meet" | tee seen.txt
wait $!
cat > as_seen.txt <<'TEXT'
before     1 2 3 4 5 6 7 8
all_reduce 11 22 33 44 5 6 7 8, expected 11 2 33 4 55 6 77 8
broadcast  10 20 30 40 5 6 7 8, expected 10 2 30 4 50 6 70 8
reduce     11 22 33 44 5 6 7 8, expected 11 2 33 4 55 6 77 8
all_gather 1 3 5 7 10 30 50 70, expected 1 3 5 7 10 30 50 70
TEXT
cmp seen.txt as_seen.txt
