"""
Operations of the model on a CPU, by the native extension: one pass over each row where torch takes many, and nothing
to compile. Their sources are in rustbpe/src/kernels.

The extension reads and writes the memory of tensors. `_describe` is the one place that hands it over, after checks.
"""

import torch
from torch.autograd.function import once_differentiable

from rustbpe import kernels

# The dtypes that an operation may take, with the extension's names for them
FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLOAT32 = {torch.float32: "float32"}
INT64 = {torch.int64: "int64"}


def supports(x):
    """True if the kernels support x: on a CPU, float32 or bfloat16, and not inside torch.compile."""
    return not torch.compiler.is_compiling() and x.is_cpu and x.dtype in FLOATS


def _describe(name, tensor, dtypes=FLOATS, shape=None, contiguous=False):
    """
    (address, dtype, shape, strides) of a tensor, as the extension takes it. `name` is for the ValueError that says
    what is wrong with the tensor: its device, dtype, shape or strides.
    """
    dtype = dtypes.get(tensor.dtype)
    if dtype is None or not tensor.is_cpu or tensor.layout is not torch.strided:
        found = f"{tensor.dtype} with layout {tensor.layout} on {tensor.device}"
        raise ValueError(f"{name} must be a dense CPU tensor of {' or '.join(dtypes.values())}, but is {found}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, but has {tuple(tensor.shape)}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, but has strides {tensor.stride()}")
    return tensor.data_ptr(), dtype, tensor.shape, tensor.stride()


# -----------------------------------------------------------------------------
# Norm, ReLU^2, softmax: row by row


def _run_rows(op, x, out, value=0.0, dy=None, angles=()):
    """
    out = op(x), or with dy, the gradient of the result, the gradient of x. All have the shape of out, which is
    contiguous; angles (cosines, sines) may have size 1 where they are the same for all.
    """
    described_dy = None if dy is None else _describe("dy", dy, shape=out.shape)
    described_angles = [_describe("angles", a.transpose(1, 2), FLOAT32) for a in angles] or None
    kernels.row_op(
        op,
        _describe("x", x, shape=out.shape),
        _describe("out", out),
        torch.get_num_threads(),
        value,
        described_dy,
        described_angles,
    )


def _with_dense_rows(x):
    """x, with the elements of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _RowOp(torch.autograd.Function):
    """x (B, T, H, D) -> (B, H, T, D)"""

    @staticmethod
    def forward(ctx, x, op, value, *angles):
        B, T, H, D = x.shape
        out = x.new_empty(B, H, T, D)
        _run_rows(op, x, out.transpose(1, 2), value, angles=angles)
        if ctx is not None:
            ctx.save_for_backward(x, *angles)
            ctx.op = op
            ctx.value = value
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *angles = ctx.saved_tensors
        dx = x.new_empty(x.shape)
        dy = _with_dense_rows(grad).transpose(1, 2)
        _run_rows(ctx.op, x, dx, ctx.value, dy, angles)
        return dx, None, None, *(None for _ in angles)


def _apply_row_op(x, op, value, *angles):
    x = _with_dense_rows(x)
    if x.requires_grad:
        return _RowOp.apply(x, op, value, *angles)
    return _RowOp.forward(None, x, op, value, *angles)  # without the overhead of autograd


def _same_shape_op(x, op, value=0.0):
    """norm or relu_square of x, whatever its shape."""
    if x.requires_grad or not x.is_contiguous() or x.dim() > 4:
        rows = x.reshape(1, x.shape[:-1].numel(), 1, x.size(-1))
        return _apply_row_op(rows, op, value).view(x.shape)
    # Decoding one token comes here hundreds of times a step
    described = _describe("x", x)
    out = torch.empty_like(x)
    described_out = (out.data_ptr(), *described[1:])  # new, and like x
    kernels.row_op(op, described, described_out, torch.get_num_threads(), value)
    return out


def norm(x, eps):
    """RMSNorm of the last dimension, without a weight."""
    return _same_shape_op(x, "norm", eps)


def relu_square(x):
    return _same_shape_op(x, "relu_square")


def rotary_norm(x, cos, sin, eps):
    """
    x (B, T, H, D), rotated by minus the angles of cos and sin (1 or B, 1, T, D / 2), and normalised -> (B, H, T, D).
    """
    return _apply_row_op(x, "norm", eps, cos.float(), sin.float())  # a copy only where model.bfloat16() was called


# -----------------------------------------------------------------------------
# Attention


class ShortAttention(torch.autograd.Function):
    """
    Causal attention for training: the scores of a short row fit in memory, and up to 512 tokens batched matmuls take
    half the time of torch's fused kernels in bfloat16 (dev/LOG.md). q, k, v (B, H, T, D) -> (B, H, T, D).
    """

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        scores = q @ k.mT  # (B * H, T, T)
        P = torch.empty_like(scores)
        _run_rows("causal_softmax", scores.unsqueeze(2), P.unsqueeze(2), D**-0.5)
        ctx.save_for_backward(q, k, v, P)
        return (P @ v).view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, P = ctx.saved_tensors
        shape = grad.shape
        grad = grad.reshape(q.shape)
        dscores = torch.empty_like(P)
        dP = grad @ v.mT
        _run_rows("causal_softmax", P.unsqueeze(2), dscores.unsqueeze(2), q.size(-1) ** -0.5, dP.unsqueeze(2))
        dq = (dscores @ k).view(shape)
        dk = (dscores.mT @ q).view(shape)
        dv = (P.mT @ grad).view(shape)
        return dq, dk, dv


def one_token_attention(q, k, v, last=None):
    """
    q (B, H, 1, D) attends to k and v (B, H_kv, S, D), which may be parts of a longer cache, up to position last (B, 1),
    int64, or to all of them -> (B, H, 1, D).
    """
    q = q.contiguous()
    out = torch.empty_like(q)
    B, _, _, D = q.shape
    # The positions of a head have to lie side by side
    if k.stride()[2:] != (D, 1):
        k = k.contiguous()
    if v.stride()[2:] != (D, 1):
        v = v.contiguous()
    dtype = {q.dtype: FLOATS.get(q.dtype, "float32")}
    kernels.one_token_attention(
        _describe("q", q),
        _describe("k", k, dtype),
        _describe("v", v, dtype, k.shape),
        _describe("out", out),
        None if last is None else _describe("last", last.contiguous(), INT64, (B, 1)),
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
    rows = logits.shape[:1]
    tensors = (
        _describe("logits", logits, contiguous=True),
        _describe("targets", targets, INT64, rows, contiguous=True),
        _describe("weights", weights, FLOAT32, rows, contiguous=True),
        _describe("losses", losses, FLOAT32, rows, contiguous=True),
    )
    kernels.capped_cross_entropy(tensors, cap, torch.get_num_threads())


def adamw_update(param, grad, exp_avg, exp_avg_sq, *settings):
    """adamw.adamw_update of contiguous float32 tensors of one shape, in place."""
    tensors = (
        _describe("param", param, FLOAT32, contiguous=True),
        _describe("grad", grad, FLOAT32, param.shape, contiguous=True),
        _describe("exp_avg", exp_avg, FLOAT32, param.shape, contiguous=True),
        _describe("exp_avg_sq", exp_avg_sq, FLOAT32, param.shape, contiguous=True),
    )
    kernels.adamw_update(tensors, settings, torch.get_num_threads())
