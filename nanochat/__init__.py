"""
nanochat: from raw text to a model that you can talk to.

Importing this package only settles how the threads of OpenMP wait, which torch's copy of it reads
once, when torch is loaded. So every entry point imports this package before torch.
"""

import os

# By default a thread that has nothing to do spins for milliseconds. If another program needs the
# core, the others wait for the spinning one at the end of every operation, and a training step takes
# five times as long. A thread that sleeps at once must be woken hundreds of times a step. In between
# an idle machine loses some 3% (dev/log/2026-11-29-speed.md)
_SPINS = "10000"         # of GNU's OpenMP, which torch's Linux wheels bring: about 0.3 ms
_BLOCK_TIME_MS = "1"     # of Intel's and LLVM's, as on a Mac

if "OMP_WAIT_POLICY" not in os.environ:  # what the user set stays
    os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    os.environ.setdefault("KMP_BLOCKTIME", _BLOCK_TIME_MS)
