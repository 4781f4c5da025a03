#!/usr/bin/env bash
# torchrun: after a restart, the store still holds what the dead ranks wrote
#
# Expected: --max_restarts starts all ranks anew, with a store of their own, as a comment in torch's
#   rendezvous.py says ("We create a new TCPStore for every retry").
# Happens:  the agent keeps one store through all restarts, with all keys of the attempts before. So a counter
#   goes on from its old value, a barrier made of keys lets everybody through, and gloo finds the
#   addresses of dead ranks: a rank that comes first after a restart may wait for one in vain, fail
#   ("Gloo connectFullMesh failed") and use up the next restart. With TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#   each attempt has a new store.
#
# Versions: torch 2.15.0 (the package of PyPI, on a CPU), Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv, 6 GB of disk for torch. Two ranks, which meet on this machine.
#
# Output seen (each attempt writes a key, meets the other rank, and ends; the first with exit code 1):
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=0
#   attempt 0: key of an attempt before: False, ranks counted: 2
#   attempt 1: key of an attempt before: True, ranks counted: 4
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
#   attempt 0: key of an attempt before: False, ranks counted: 2
#   attempt 1: key of an attempt before: False, ranks counted: 2
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python torch==2.15.0
cat > try.py <<'PYTHON'
import os

import torch.distributed as dist

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
store, rank, _ = next(dist.rendezvous("env://"))


def meet(name):
    """Until both ranks are here. The keys are those of this attempt alone."""
    store.set(f"{name} {attempt} {rank}", "here")
    store.wait([f"{name} {attempt} 0", f"{name} {attempt} 1"])


found = store.check(["left behind"])
meet("looked")
store.set("left behind", f"by attempt {attempt}")
store.add("ranks", 1)
meet("counted")
if rank == 0:
    ranks = store.add("ranks", 0)
    print(f"attempt {attempt}: key of an attempt before: {found}, ranks counted: {ranks}", flush=True)
meet("said")
if rank == 0:  # its store may be the one that is asked: the other leaves first
    store.wait([f"left {attempt}"])
else:
    store.set(f"left {attempt}", "yes")
os._exit(1 if attempt == 0 else 0)
PYTHON
export OMP_NUM_THREADS=1
for off in 0 1; do
  echo "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=$off"
  TORCH_DISABLE_SHARE_RDZV_TCP_STORE=$off timeout 300 \
    venv/bin/torchrun --standalone --nproc_per_node=2 --max_restarts=1 try.py 2> errors.txt
done | tee seen.txt
cat > as_seen.txt <<'TEXT'
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=0
attempt 0: key of an attempt before: False, ranks counted: 2
attempt 1: key of an attempt before: True, ranks counted: 4
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
attempt 0: key of an attempt before: False, ranks counted: 2
attempt 1: key of an attempt before: False, ranks counted: 2
TEXT
cmp seen.txt as_seen.txt
