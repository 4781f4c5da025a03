"""
How fast a device multiplies: from data sheets, or timed. MFU is a fraction of it, and on a CPU the
number format follows from it (precision.py), since no flag of a processor tells which format is
faster: with AVX512-BF16 some take half the time of float32 for bfloat16, others twice as much.
"""

import functools
import re
import time

import torch

from nanochat.common import one_thread, synchronize

# Dense bf16 peak in TFLOP/s, from the vendors' data sheets (SXM parts unless named, without
# sparsity). The first name that matches counts
PEAK_TFLOPS = {
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L4": 121,
    "A10G": 70,
    "RTX 5090": 209,
    "RTX 4090": 165,
    "RTX 3090": 71,
}

# -----------------------------------------------------------------------------
# The peak, for MFU


def get_peak_flops(device, dtype, width=256):
    """
    (FLOP/s, 'data sheet' | 'measured'): the peak, of which MFU is a fraction. Known GPUs in 16 bits
    come from the table. Other devices are timed in the dtype of training; a CPU on the matmuls of a
    model of this width.
    """
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        name = torch.cuda.get_device_name(device)
        for key, tflops in PEAK_TFLOPS.items():
            # a laptop's GPU has fewer units than others of that name
            if re.search(rf"\b{key}\b", name) and "Laptop" not in name:
                return tflops * 1e12, "data sheet"
    if device.type == "cpu":
        rate = core_matmul_rate(width, TRAINING_ROWS, dtype)
        return rate * torch.get_num_threads(), "measured"
    return _square_matmul_rate(device, dtype), "measured"


def _square_matmul_rate(device, dtype):
    """FLOP/s of the best square matmul of half a second."""
    best_flops = 0.0
    size = 1024
    a, out = torch.ones(2, size, size, device=device, dtype=dtype)
    end = time.perf_counter() + 0.5
    # the best of half a second, since others may share the machine
    while best_flops == 0 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        synchronize(device)
        seconds = time.perf_counter() - start
        # a matmul of two (n, n) matrices takes n^3 multiplications and as many additions
        best_flops = max(best_flops, 2 * size**3 / seconds)
        if seconds < 0.02 and size < 8192:  # too small to keep the device busy
            size *= 2
            a, out = torch.ones(2, size, size, device=device, dtype=dtype)
    return best_flops


# -----------------------------------------------------------------------------
# A CPU's matmuls, in the shapes of a model

TRAINING_ROWS = 256     # of a micro-batch; more are no faster
DECODING_ROWS = 16      # conversations decoded at once
TIMING_S = 0.1
MIN_TRIES = 3


@functools.cache
def core_matmul_rate(width, rows, dtype):
    """
    FLOP/s of one core of this CPU for x (rows, C) @ w (C, 4 C), where C is the width: the matmul of
    an MLP. Other programs hardly change it: the time is that of the thread on its core, not the
    clock's, and the best try counts. Cached, so that a process has one answer.
    """
    x = torch.ones(rows, width, dtype=dtype)
    weight = torch.ones(4 * width, width, dtype=dtype)
    w = weight.T  # in the order of a Linear
    best_s = float("inf")
    num_tries = 0
    end = time.perf_counter() + TIMING_S
    with one_thread():
        while num_tries < MIN_TRIES or time.perf_counter() < end:
            start = time.thread_time()
            torch.mm(x, w)
            best_s = min(best_s, time.thread_time() - start)
            num_tries += 1

    flops = 2 * rows * width * 4 * width  # a multiplication and an addition each
    return flops / best_s
