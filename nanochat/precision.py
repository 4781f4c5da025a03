"""
The one place that decides the number format in which the model computes.

Parameters and optimizer states are float32; activations and matmuls have the compute dtype. The
environment variable NANOCHAT_PRECISION chooses it: bfloat16, float16, float32 or fp8. Without it
the compute dtype is bfloat16 on GPUs that multiply it (Ampere and newer). On a CPU it is the faster
of float32 and bfloat16, measured once in a process: `settle_precision`. fp8 is bfloat16 with 8-bit
matmuls in the linear layers of pretraining (fp8.py; Hopper GPUs and newer).
"""

import contextlib
import os

import torch

from nanochat.common import UserError
from nanochat.device_speed import DECODING_ROWS, TRAINING_ROWS, core_matmul_rate
from nanochat.distributed import from_rank0

# value of NANOCHAT_PRECISION -> compute dtype
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.bfloat16,
}


# bfloat16 rounds, so float32 stays unless bfloat16 multiplies this much faster. The gap also keeps
# the choice, and with it a model's answers, the same from run to run
BF16_MARGIN = 1.1
DEFAULT_WIDTH = 256  # of the matmuls that are timed where no model has been named

# What `settle_precision` has decided for this process: {"cpu": a key of DTYPES}
_settled = {}

# -----------------------------------------------------------------------------
# The choice


def has_native_bf16(device_type):
    """Whether the hardware multiplies bfloat16."""
    # emulated on a CPU with AVX2, it is 200 times slower than float32
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)  # Ampere
    if device_type == "cpu":
        # not every build of PyTorch has both functions
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False  # Apple: float32 is the safe choice; ask for bfloat16 by name


def _has_float8(device_type):
    return device_type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)  # Hopper


def _native_precision(device_type):
    if device_type == "cpu":
        if "cpu" not in _settled:
            _settled["cpu"], _ = _faster_format(DEFAULT_WIDTH, TRAINING_ROWS)
        return _settled["cpu"]
    return "bfloat16" if has_native_bf16(device_type) else "float32"


def _faster_format(width, rows):
    """(the faster format for matmuls of this CPU, a note with what was measured)."""
    if not has_native_bf16("cpu"):
        return "float32", "this CPU does not multiply bfloat16"
    float32 = core_matmul_rate(width, rows, torch.float32)
    bfloat16 = core_matmul_rate(width, rows, torch.bfloat16)
    note = (
        f"a core multiplies {float32 / 1e9:.0f} GFLOP/s in float32, "
        f"{bfloat16 / 1e9:.0f} in bfloat16"
    )
    return "bfloat16" if bfloat16 > BF16_MARGIN * float32 else "float32", note


def settle_precision(device, width, decoding=False, saved=None):
    """
    Decide the format of this process for a model of this width, where NANOCHAT_PRECISION does not.
    On a CPU the faster one is measured in 0.2 seconds, by rank 0 for all ranks. The first call
    decides. Collective.

    decoding: time the few rows of decoding, not those of training. saved: the format with which a
    resumed run began; it is kept if this CPU has it. Returns a note for the log, or ''.
    """
    asked = os.environ.get("NANOCHAT_PRECISION")
    if asked and saved not in (None, asked):
        return f"the run began in {saved}"
    if asked or device.type != "cpu" or "cpu" in _settled:
        return ""
    if saved == "float32" or (saved == "bfloat16" and has_native_bf16("cpu")):
        _settled["cpu"] = saved
        return "as the run began"
    rows = DECODING_ROWS if decoding else TRAINING_ROWS
    _settled["cpu"], note = from_rank0(lambda: _faster_format(width, rows))
    return note


def get_precision(device_type=None):
    """
    The precision for a device type ('cuda', 'cpu', 'mps'): a key of DTYPES. None = the best device
    here.
    """
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    asked = os.environ.get("NANOCHAT_PRECISION")
    if asked and asked not in DTYPES:
        names = ", ".join(DTYPES)
        raise UserError(
            f"NANOCHAT_PRECISION={asked} is unknown",
            f"use one of {names}, or unset it",
        )
    # without the hardware for fp8 the request is ignored, with a note: see precision_note
    if not asked or (asked == "fp8" and not _has_float8(device_type)):
        return _native_precision(device_type)
    return asked


def precision_note(device_type, fp8=False):
    """The reason why the requested precision is ignored here, or ''. fp8: is this pretraining?"""
    # the request, and the precision that is used
    asked = os.environ.get("NANOCHAT_PRECISION")
    precision = get_precision(device_type)
    # only the loops of pretraining call use_fp8
    if precision == "fp8" and not fp8:
        return "NANOCHAT_PRECISION=fp8 is for pretraining"
    if asked in (None, "", precision):
        return ""
    return f"NANOCHAT_PRECISION={asked} needs compute capability 9.0 or newer"


def describe_precision(device_type, fp8=False, measured=""):
    """
    One line for the log of training: the precision, and perhaps why it is not the requested one.
    fp8: is this pretraining? measured: the note of `settle_precision`.
    """
    note = precision_note(device_type, fp8)
    if note:
        return f"{_native_precision(device_type)} ({note})"
    if measured:
        return f"{get_precision(device_type)} ({measured})"
    return get_precision(device_type)


def get_precision_dtype(device_type=None):
    """The compute dtype: of activations, matmuls and the KV cache."""
    return DTYPES[get_precision(device_type)]


def get_autocast_ctx(device):
    """Context for ONE forward pass of a float32 model in the compute dtype: no loop, no yield."""
    device_type = torch.device(device).type
    dtype = get_precision_dtype(device_type)
    if dtype == torch.float32:  # nothing to cast
        return contextlib.nullcontext()
    return torch.autocast(device_type=device_type, dtype=dtype)


def active_dtype(x):
    """The dtype of a forward pass: autocast's while it is active, else that of the parameter x."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
