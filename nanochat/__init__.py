"""
nanochat: from raw text to a model that you can talk to.

Importing this package only settles how the threads of OpenMP wait, which torch's copy of it reads
once, when torch is loaded. So every entry point imports this package before torch. In a Python that
cannot run the project it ends the process with a line that says so.
"""

import importlib.util
import os
import sys

_fault = None
if sys.version_info < (3, 10):  # noqa: UP036
    _fault = f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed"
elif importlib.util.find_spec("torch") is None:
    _fault = f"torch is not installed for {sys.executable}"
if _fault:
    print(f"error: {_fault}", file=sys.stderr)
    print("hint: source .venv/bin/activate; `uv sync --extra cpu` makes that environment", file=sys.stderr)
    sys.exit(2)

# By default a thread that has nothing to do spins for milliseconds. If another program needs the
# core, the others wait for the spinning one at the end of every operation, and a training step takes
# five times as long. A thread that sleeps at once must be woken hundreds of times a step. In between
# an idle machine loses some 3% (dev/log/2026-11-29-speed.md)
_SPINS = "10000"         # of GNU's OpenMP, which torch's Linux wheels bring: about 0.3 ms
_BLOCK_TIME_MS = "1"     # of Intel's and LLVM's, as on a Mac

if "OMP_WAIT_POLICY" not in os.environ:  # what the user set stays
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    os.environ.setdefault("KMP_BLOCKTIME", _BLOCK_TIME_MS)
