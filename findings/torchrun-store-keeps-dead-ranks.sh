#!/usr/bin/env bash
# torchrun: after a restart, new ranks find the addresses of dead ones
#
# Expected: --max_restarts starts all ranks anew, with a store of their own, as a comment in torch's
#   rendezvous.py says ("We create a new TCPStore for every retry"). It does not matter which comes first.
# Happens:  the agent keeps one store through all restarts, and the addresses of the attempt before stay in
#   it. A rank that comes first reads the address of its dead neighbour, tries for some time to reach it, and
#   fails: a job whose ranks do not come at the same time uses up its restarts, although nothing is wrong
#   with it. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 each attempt has a new store, and the job goes on.
#
# Versions: torch 2.15.0 (the package of PyPI, on a CPU, gloo), Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv, 6 GB of disk for torch, one to five minutes. The ranks meet on this machine.
#
# Output seen:
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=0
#   attempt 0, rank 0: met the other
#   attempt 0, rank 1: met the other
#   attempt 1, rank 0: Gloo connectFullMesh failed
#   torchrun: exit code 1
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#   attempt 0, rank 0: met the other
#   attempt 0, rank 1: met the other
#   attempt 1, rank 0: met the other
#   attempt 1, rank 1: met the other
#   torchrun: exit code 0
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python torch==2.15.0
cat > try.py <<'PYTHON'
import datetime
import os
import time
from pathlib import Path

import torch.distributed as dist

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
rank = int(os.environ["RANK"])
first_is_here = Path(os.environ["FIRST_IS_HERE"])
if attempt == 1 and rank == 0:
    first_is_here.touch()
if attempt == 1 and rank == 1:  # after the restart it comes later
    while not first_is_here.exists():
        time.sleep(0.1)
    time.sleep(20)
try:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    dist.barrier()
    outcome = "met the other"
except RuntimeError as error:
    outcome = str(error).split(" with [")[0]  # what follows is an address, mostly "connection refused"
if rank == 0 or outcome == "met the other":  # how rank 1 learns that rank 0 has failed differs
    print(f"attempt {attempt}, rank {rank}: {outcome}", flush=True)
if attempt == 0 or outcome != "met the other":
    os._exit(1)
dist.destroy_process_group()
PYTHON
export OMP_NUM_THREADS=1
for off in 0 1; do
  echo "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=$off"
  code=0
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=$off FIRST_IS_HERE="$work/first$off" timeout 600 \
    venv/bin/torchrun --standalone --nproc_per_node=2 --max_restarts=1 try.py > out.txt 2> errors.txt || code=$?
  sort out.txt
  echo "torchrun: exit code $code"
done | tee seen.txt
cat > as_seen.txt <<'TEXT'
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=0
attempt 0, rank 0: met the other
attempt 0, rank 1: met the other
attempt 1, rank 0: Gloo connectFullMesh failed
torchrun: exit code 1
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
attempt 0, rank 0: met the other
attempt 0, rank 1: met the other
attempt 1, rank 0: met the other
attempt 1, rank 1: met the other
torchrun: exit code 0
TEXT
cmp seen.txt as_seen.txt
