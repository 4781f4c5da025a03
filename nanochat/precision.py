"""
The one place that decides in which number format the model computes.

Parameters and optimizer states are float32; activations and matrix products run in the compute dtype. The choice
is `NANOCHAT_PRECISION` (bfloat16, float16, float32, fp8), else bfloat16 where the hardware multiplies it natively
(Ampere GPUs and newer; CPUs with AMX or AVX512-BF16), else float32. fp8 is bfloat16, with 8-bit matmuls in the linear
layers of pretraining (`float8_linear`, Hopper and newer).
"""

import contextlib
import os
from typing import NamedTuple

import torch

from nanochat.common import UserError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "fp8": torch.bfloat16}
CHOICES = tuple(DTYPES)


def _has_native_bf16(device_type):
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if device_type == "cpu":  # elsewhere a bf16 product is emulated: 200 times slower than float32 on an AVX2 machine
        probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return False  # Apple: float32 is the safe choice; ask for bfloat16 by name


def _has_float8(device_type):
    return device_type == "cuda" and torch.cuda.get_device_capability() >= (9, 0)


def get_precision(device_type=None):
    """One of CHOICES for a device type ('cuda', 'cpu', 'mps'; None = the best here)."""
    if device_type is None:
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    asked = os.environ.get("NANOCHAT_PRECISION")
    if asked and asked not in CHOICES:
        raise UserError(f"NANOCHAT_PRECISION={asked} is unknown", f"use one of {', '.join(CHOICES)}, or unset it")
    if not asked or (asked == "fp8" and not _has_float8(device_type)):
        return _native_precision(device_type)
    return asked


def _native_precision(device_type):
    return "bfloat16" if _has_native_bf16(device_type) else "float32"


def precision_note(device_type, fp8=False):
    """Why what was asked for is not used, or ''. fp8: is this pretraining, the place for it?"""
    precision, asked = get_precision(device_type), os.environ.get("NANOCHAT_PRECISION")
    if precision == "fp8" and not fp8:
        return "NANOCHAT_PRECISION=fp8 is for pretraining"
    return "" if asked in (None, "", precision) else f"NANOCHAT_PRECISION={asked} needs compute capability 9.0 or newer"


def describe_precision(device_type, fp8=False):
    """One line for the log of training: what is used, and why it is not what was asked for. fp8: can this script?"""
    precision, note = get_precision(device_type), precision_note(device_type, fp8)
    if note:
        precision = _native_precision(device_type)
    return f"{precision} ({note})" if note else precision


def get_precision_dtype(device_type=None):
    """The compute dtype: that of activations, of matrix products and of the KV cache."""
    return DTYPES[get_precision(device_type)]


def get_autocast_ctx(device):
    """Context for ONE forward pass (never a loop or a yield) of a float32 model in the compute dtype."""
    device_type = torch.device(device).type
    dtype = get_precision_dtype(device_type)
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_type=device_type, dtype=dtype)


def active_dtype(x):
    """The dtype a forward pass computes in: autocast's while it is active, else that of the parameter x."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


# -----------------------------------------------------------------------------
# 8-bit products in training: one scale per tensor, taken from the tensor itself ("dynamic tensorwise scaling")


def _to_float8(x, dtype):
    """x -> (x8, scale) with x ~ x8 * scale; the scale is a float32 scalar."""
    scale = x.abs().amax().float().clamp(min=1e-12) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


class _Float8Linear(torch.autograd.Function):
    """y = x W^T with all three products of the layer in 8 bits: e4m3 values, e5m2 gradients (wider range)."""

    @staticmethod
    def forward(ctx, x, weight):  # (N, K), (M, K) -> (N, M)
        x8, x_scale = _to_float8(x, torch.float8_e4m3fn)
        w8, w_scale = _to_float8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        # _scaled_mm wants its second factor column-major, which a transposed view is
        return torch._scaled_mm(x8, w8.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=x.dtype, use_fast_accum=True)

    @staticmethod
    def backward(ctx, grad):  # (N, M)
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = _to_float8(grad.contiguous(), torch.float8_e5m2)
        w8_columns, x8_columns = w8.t().contiguous().t(), x8.t().contiguous().t()
        dx = torch._scaled_mm(g8, w8_columns, scale_a=g_scale, scale_b=w_scale, out_dtype=grad.dtype)
        dw = torch._scaled_mm(g8.t().contiguous(), x8_columns, scale_a=g_scale, scale_b=x_scale, out_dtype=grad.dtype)
        return dx, dw


def float8_linear(x, weight):
    """F.linear(x (..., K), weight (M, K)) in 8 bits. Needs all of rows, K and M to be multiples of 16."""
    dtype = active_dtype(weight)
    flat = x.reshape(-1, x.size(-1)).to(dtype)
    return _Float8Linear.apply(flat, weight.to(dtype)).view(*x.shape[:-1], weight.size(0))


# -----------------------------------------------------------------------------
# Weights packed for inference on a CPU, in the order that its matrix unit reads


def packs(device_type, dtype):
    """Whether `pack` works here. Its two functions are those that torch.compile's frozen graphs call (oneDNN)."""
    return (device_type == "cpu" and dtype == torch.bfloat16 and _has_native_bf16("cpu")
            and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


class Packed(NamedTuple):
    plain: torch.Tensor      # the weight as it is, for a single row: to read it in order is all that takes time
    reordered: torch.Tensor  # for several rows


def pack(weight):
    """
    A bfloat16 weight (M, K) reordered once instead of in every product: what takes up to half of the time when few rows
    meet a large weight (dev/LOG.md). 64 rows of x are what the order is chosen for.
    """
    return Packed(weight.detach(), torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 64))


def packed_linear(x, packed):
    """F.linear(x (..., K), weight (M, K)) for a weight out of `pack`, or as it is."""
    if isinstance(packed, Packed):
        if x.numel() > x.size(-1):
            return torch.ops.mkldnn._linear_pointwise(x, packed.reordered, None, "none", [], "")
        packed = packed.plain
    return torch.nn.functional.linear(x, packed)
