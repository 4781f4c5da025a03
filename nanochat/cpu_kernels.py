"""
Operations of the model on a CPU, by the native extension: one pass over each row where torch takes many, and nothing
to compile. Their sources are in rustbpe/src/kernels.

The extension reads and writes the memory of tensors: `_describe` is the one place that hands it over, after checks.
Every operation raises a ValueError for a tensor of the wrong device, dtype, shape or strides.
"""

import torch
from torch.autograd.function import once_differentiable

from rustbpe import kernels

# The dtypes that an argument may have, with the extension's names for them
FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLOAT32 = {torch.float32: "float32"}
INT64 = {torch.int64: "int64"}


def supports(x):
    """True if the kernels support x: on a CPU, float32 or bfloat16, and not inside torch.compile."""
    return not torch.compiler.is_compiling() and x.is_cpu and x.dtype in FLOATS


def _describe(name, tensor, dtypes=FLOATS, shape=None, contiguous=False):
    """
    (address, dtype, shape, strides) of a tensor, as the extension takes it. The caller must hold the tensor until the
    extension returns. `name` is for the ValueError; shape: the one that the operation needs, if it needs one.
    """
    # Memory that the extension can read, of a dtype that it knows
    dtype = dtypes.get(tensor.dtype)
    if dtype is None or not tensor.is_cpu or tensor.layout is not torch.strided:
        needed = " or ".join(dtypes.values())
        found = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
        raise ValueError(f"{name} must be a strided CPU tensor of {needed}, but is {found}")

    # The sizes that the other arguments call for
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, but has {tensor.shape}")

    # Strides count elements; the extension checks that those of a row lie side by side
    strides = tensor.stride()
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, but has strides {strides}")

    address = tensor.data_ptr()
    return address, dtype, tensor.shape, strides


# -----------------------------------------------------------------------------
# Norm, ReLU^2, softmax: row by row


def _run_rows(op, x, out, value=0.0, dy=None, angles=None):
    """
    out = op(x), or, with the gradient dy of the result, out = the gradient of x. x, out and dy have one shape of up to
    four dimensions, and the elements of a row lie side by side; angles are (cosines, sines).
    """
    # Only for a gradient
    described_dy = None
    if dy is not None:
        described_dy = _describe("dy", dy, shape=out.shape)

    # Only for rotary positions; the angles of all heads, and of all batch rows if the first size is 1, are the same
    described_angles = None
    if angles is not None:
        cos, sin = angles
        described_angles = (
            _describe("cos", cos, FLOAT32),
            _describe("sin", sin, FLOAT32),
        )

    kernels.row_op(
        op,
        _describe("x", x, shape=out.shape),
        _describe("out", out),
        torch.get_num_threads(),
        value,
        described_dy,
        described_angles,
    )


def _dense_rows(x):
    """x, copied if the elements of a row do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _RowOp(torch.autograd.Function):
    """x (B, T, H, D) -> (B, H, T, D); angles: None, or cosines and sines (1 or B, T, 1, D / 2)."""

    @staticmethod
    def forward(ctx, x, op, value=0.0, angles=None):
        # Heads before tokens, as attention wants them
        B, T, H, D = x.shape
        out = x.new_empty(B, H, T, D)
        _run_rows(op, x, out.transpose(1, 2), value, angles=angles)

        if ctx is not None:
            # x is enough: the backward pass computes the norm again
            ctx.save_for_backward(x)
            ctx.settings = (op, value, angles)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        op, value, angles = ctx.settings
        # grad is (B, H, T, D), dx like x
        dy = _dense_rows(grad).transpose(1, 2)
        dx = x.new_empty(x.shape)
        _run_rows(op, x, dx, value, dy, angles)
        return dx, None, None, None


def _row_op(x, *settings):
    x = _dense_rows(x)
    if x.requires_grad:
        return _RowOp.apply(x, *settings)
    # Without the overhead of autograd
    return _RowOp.forward(None, x, *settings)


def _same_shape_op(x, op, value=0.0):
    """norm or relu_square of x, whatever its shape."""
    if x.requires_grad or not x.is_contiguous() or x.dim() > 4:
        # Each row as a token of one head
        num_rows = x.shape[:-1].numel()
        rows = x.reshape(1, num_rows, 1, x.size(-1))
        return _row_op(rows, op, value).view(x.shape)

    # Decoding one token comes here hundreds of times a step: `out`, made like x, needs no checks
    described = _describe("x", x)
    out = torch.empty_like(x)
    described_out = (out.data_ptr(), *described[1:])
    num_threads = torch.get_num_threads()
    kernels.row_op(op, described, described_out, num_threads, value)
    return out


def norm(x, eps):
    """RMSNorm of the last dimension, without a weight."""
    return _same_shape_op(x, "norm", eps)


def relu_square(x):
    return _same_shape_op(x, "relu_square")


def rotary_norm(x, cos, sin, eps):
    """
    x (B, T, H, D), rotated by minus the angles of cos and sin (1 or B, 1, T, D / 2), then normalised -> (B, H, T, D).
    """
    # float() copies only where model.bfloat16() was called
    cos = cos.float().transpose(1, 2)
    sin = sin.float().transpose(1, 2)
    return _row_op(x, "norm", eps, (cos, sin))


# -----------------------------------------------------------------------------
# Attention


class ShortAttention(torch.autograd.Function):
    """
    Causal attention for training: the scores of a short row fit in memory, and up to 512 tokens batched matmuls take
    half the time of torch's fused kernels in bfloat16 (dev/LOG.md). q, k, v (B, H, T, D) -> (B, H, T, D).
    """

    @staticmethod
    def forward(ctx, q, k, v):
        # One batch of matmuls for all rows and heads
        B, H, T, D = q.shape
        q = q.reshape(B * H, T, D)
        k = k.reshape(B * H, T, D)
        v = v.reshape(B * H, T, D)

        # Softmax of the scores (B * H, T, 1, T)
        scores = (q @ k.mT).unsqueeze(2)
        P = torch.empty_like(scores)
        _run_rows("causal_softmax", scores, P, D**-0.5)
        ctx.save_for_backward(q, k, v, P)
        # The weighted mean of the values
        out = P.squeeze(2) @ v
        return out.view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, P = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(q.shape)
        # Through the softmax
        dP = (grad @ v.mT).unsqueeze(2)
        dscores = torch.empty_like(P)
        _run_rows("causal_softmax", P, dscores, q.size(-1) ** -0.5, dP)

        # Through the matmuls
        dscores = dscores.squeeze(2)
        dq = dscores @ k
        dk = dscores.mT @ q
        dv = P.squeeze(2).mT @ grad
        return dq.view(shape), dk.view(shape), dv.view(shape)


def one_token_attention(q, k, v, last=None):
    """
    q (B, H, 1, D) attends to k and v (B, H_kv, S, D), which may be parts of a longer cache, up to position last (B, 1),
    int64, or to all of them -> (B, H, 1, D).
    """
    # The only token is contiguous already, unless q is a part of something
    q = q.contiguous()
    out = torch.empty_like(q)

    # The positions of a head must lie side by side
    dense = (q.size(-1), 1)
    # A cache has them so; k and v of one forward pass may not
    if k.stride()[2:] != dense:
        k = k.contiguous()
    if v.stride()[2:] != dense:
        v = v.contiguous()

    # Rows of a batch may have reached different positions
    described_last = None
    if last is not None:
        last = last.contiguous()
        described_last = _describe("last", last, INT64, (q.size(0), 1))

    kernels.one_token_attention(
        _describe("q", q),
        _describe("k", k),
        _describe("v", v, shape=k.shape),
        _describe("out", out),
        described_last,
        torch.get_num_threads(),
    )
    return out


# -----------------------------------------------------------------------------
# Loss and AdamW


def capped_cross_entropy(logits, targets, weights, losses, cap):
    """
    losses (n,) = cross-entropy of the logits (n, V), capped by cap * tanh(x / cap), for targets (n,) int64, times
    weights (n,). The gradient overwrites the logits. All contiguous, weights and losses float32.
    """
    rows = logits.shape[:1]  # (n,)
    tensors = (
        _describe("logits", logits, contiguous=True),
        _describe("targets", targets, INT64, rows, contiguous=True),
        _describe("weights", weights, FLOAT32, rows, contiguous=True),
        _describe("losses", losses, FLOAT32, rows, contiguous=True),
    )
    num_threads = torch.get_num_threads()
    kernels.capped_cross_entropy(tensors, cap, num_threads)


def adamw_update(param, grad, exp_avg, exp_avg_sq, *settings):
    """adamw.adamw_update of contiguous float32 tensors of one shape, in place."""
    # A rank's shard of each
    shape = param.shape
    tensors = (
        _describe("param", param, FLOAT32, contiguous=True),
        _describe("grad", grad, FLOAT32, shape, contiguous=True),
        _describe("exp_avg", exp_avg, FLOAT32, shape, contiguous=True),
        _describe("exp_avg_sq", exp_avg_sq, FLOAT32, shape, contiguous=True),
    )
    kernels.adamw_update(tensors, settings, torch.get_num_threads())
