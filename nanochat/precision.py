"""
The one place that decides in which number format the model computes.

Parameters and optimizer states are float32; activations and matmuls run in the compute dtype. The
choice is `NANOCHAT_PRECISION` (bfloat16, float16, float32, fp8), else bfloat16 where the hardware
multiplies it natively (Ampere GPUs and newer; CPUs with AMX or AVX512-BF16), else float32. fp8 is
bfloat16 with 8-bit matmuls in the linear layers of pretraining (fp8.py; Hopper and newer).
"""

import contextlib
import os

import torch

from nanochat.common import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": torch.bfloat16}


def has_native_bf16(device_type):
    """
    True if the hardware multiplies bfloat16. Emulated it is 200 times slower than float32 on a CPU
    with AVX2.
    """
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device_type == "cpu":
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False  # Apple: float32 is the safe choice; ask for bfloat16 by name


def _has_float8(device_type):
    return device_type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)


def _native_precision(device_type):
    return "bfloat16" if has_native_bf16(device_type) else "float32"


def get_precision(device_type=None):
    """
    One of DTYPES' names for a device type ('cuda', 'cpu', 'mps'; None = the best device here).
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    asked = os.environ.get("NANOCHAT_PRECISION")
    if asked and asked not in DTYPES:
        raise UserError(f"NANOCHAT_PRECISION={asked} is unknown", f"use one of {', '.join(DTYPES)}, or unset it")
    if not asked or (asked == "fp8" and not _has_float8(device_type)):
        return _native_precision(device_type)
    return asked


def precision_note(device_type, fp8=False):
    """
    Explain why the requested precision is ignored here ('' if it is used). fp8: is this
    pretraining?
    """
    asked = os.environ.get("NANOCHAT_PRECISION")
    precision = get_precision(device_type)
    if precision == "fp8" and not fp8:
        return "NANOCHAT_PRECISION=fp8 is for pretraining"
    if asked in (None, "", precision):
        return ""
    return f"NANOCHAT_PRECISION={asked} needs compute capability 9.0 or newer"


def describe_precision(device_type, fp8=False):
    """
    One line for the log of training: the precision, and why not the requested one. fp8: is this
    pretraining?
    """
    note = precision_note(device_type, fp8)
    if note:
        return f"{_native_precision(device_type)} ({note})"
    return get_precision(device_type)


def get_precision_dtype(device_type=None):
    """The compute dtype: that of activations, of matmuls and of the KV cache."""
    return DTYPES[get_precision(device_type)]


def get_autocast_ctx(device):
    """
    Context for ONE forward pass (never a loop or a yield) of a float32 model in the compute dtype.
    """
    device_type = torch.device(device).type
    dtype = get_precision_dtype(device_type)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device_type, dtype=dtype)


def active_dtype(x):
    """
    The dtype that a forward pass computes in: autocast's while it is active, else that of the
    parameter x.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
