"""
The native extension's operations for a model on a CPU, as torch functions: one pass over each row where torch takes
many, so that nothing has to be compiled. Their sources are rustbpe/src/rowwise.rs, attention.rs, loss.rs and adamw.rs.
"""

import torch
from torch.autograd.function import once_differentiable

import rustbpe


def suits(x):
    """Whether they can take x: on a CPU, bfloat16 or float32, and not while torch looks for what to compile."""
    return x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and not torch.compiler.is_compiling()


def _row_op(name, tensors, value=0.0, angles=()):
    """rustbpe's row_op: from x (B, T, H, D) to the result, or from x and the gradient by that to the gradient by x."""
    x = tensors[0]
    assert all(tensor.stride(-1) == 1 for tensor in (*tensors, *angles))
    assert all(a.dtype == torch.float32 and len(a) in (1, len(x)) for a in angles)
    places = [(tensor.data_ptr(), tensor.stride()[:3]) for tensor in tensors]
    # the angles of one row are those of every row
    angles = [(a.data_ptr(), (a.stride(0) if len(a) > 1 else 0, a.stride(2), 0)) for a in angles] or None
    rustbpe.row_op(name, places, x.shape, x.dtype == torch.bfloat16, torch.get_num_threads(), value, angles)


class _RowOp(torch.autograd.Function):
    """x (B, T, H, D) -> (B, H, T, D); `of` leaves autograd out where it is not wanted."""

    @staticmethod
    def forward(ctx, x, name, value=0.0, *angles):
        B, T, H, D = x.shape
        out = x.new_empty(B, H, T, D)
        _row_op(name, (x, out.transpose(1, 2)), value, angles)
        if ctx is not None:
            ctx.save_for_backward(x, *angles)
            ctx.name, ctx.value = name, value
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, *angles = ctx.saved_tensors
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        _row_op(ctx.name, (x, grad.contiguous().transpose(1, 2), dx), ctx.value, angles)
        return dx, None, None, *(None for _ in angles)

    @classmethod
    def of(cls, x, *settings):
        x = x if x.stride(-1) == 1 else x.contiguous()
        return cls.apply(x, *settings) if x.requires_grad else cls.forward(None, x, *settings)


def _of_rows(x, name, value=0.0):
    """norm or relu_square of x, whatever its shape."""
    if x.requires_grad or not x.is_contiguous():
        return _RowOp.of(x.reshape(1, -1, 1, x.size(-1)), name, value).view(x.shape)
    out, width = torch.empty_like(x), x.size(-1)  # decoding does this often, with little else than the call itself
    places, sizes = [(t.data_ptr(), (0, width, 0)) for t in (x, out)], (1, x.numel() // width, 1, width)
    rustbpe.row_op(name, places, sizes, x.dtype == torch.bfloat16, torch.get_num_threads(), value)
    return out


def norm(x, eps):
    """RMSNorm of the last dimension, without a weight."""
    return _of_rows(x, "norm", eps)


def rotary_norm(x, cos, sin, eps):
    """x (B, T, H, D), turned by minus the angles of cos and sin (1 or B, 1, T, D / 2), and its norm -> (B, H, T, D)."""
    return _RowOp.of(x, "norm", eps, cos.float(), sin.float())  # a copy only where model.bfloat16() was called


def relu_square(x):
    return _of_rows(x, "relu_square")


class ShortAttention(torch.autograd.Function):
    """
    Causal attention for training: the scores of a short row fit in memory, and up to 512 tokens batched products take
    half the time of torch's fused kernels in bfloat16 (dev/LOG.md). q, k, v (B, H, T, D) -> (B, H, T, D).
    """

    @staticmethod
    def forward(ctx, q, k, v):
        B, H, T, D = q.shape
        q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
        scores, P = q @ k.mT, q.new_empty(B * H, T, 1, T)
        _row_op("causal_softmax", (scores.view(P.shape), P), D**-0.5)
        ctx.save_for_backward(q, k, v, P)
        return (P[:, :, 0] @ v).view(B, H, T, D)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, P = ctx.saved_tensors
        shape, grad, dscores = grad.shape, grad.reshape(q.shape), torch.empty_like(P)
        _row_op("causal_softmax", (P, (grad @ v.mT).view(P.shape), dscores), q.size(-1) ** -0.5)
        P, dscores = P[:, :, 0], dscores[:, :, 0]
        return (dscores @ k).view(shape), (dscores.mT @ q).view(shape), (P.mT @ grad).view(shape)


def one_token_attention(q, k, v, last=None):
    """
    q (B, H, 1, D) attends to k and v (B, H_kv, S, D), which may be parts of a longer cache, up to position last (B, 1),
    or to all of them -> (B, H, 1, D).
    """
    B, H_kv, S, D = k.shape
    lengths = [S] * B if last is None else (last[:, 0] + 1).tolist()
    q, out = q.contiguous(), torch.empty_like(q, memory_format=torch.contiguous_format)
    if k.stride() != v.stride() or k.stride()[2:] != (D, 1):
        k, v = k.contiguous(), v.contiguous()
    addresses = (tensor.data_ptr() for tensor in (q, k, v, out))
    rustbpe.one_token_attention(*addresses, q.dtype == torch.bfloat16, lengths, (q.size(1), H_kv, D), k.stride()[:2],
                                torch.get_num_threads())
    return out


def capped_cross_entropy(logits, targets, weights, losses, cap):
    """
    The losses (n,) of raw logits (n, V), capped by cap * tanh(x / cap), times weights (n,), for targets (n,). The
    gradient takes the place of the logits. All contiguous, targets int64, weights and losses float32.
    """
    addresses = (tensor.data_ptr() for tensor in (logits, targets, weights, losses))
    bfloat16, threads = logits.dtype == torch.bfloat16, torch.get_num_threads()
    rustbpe.capped_cross_entropy(*addresses, bfloat16, *logits.shape, cap, threads)


def adamw_update(param, grad, exp_avg, exp_avg_sq, *settings):
    """adamw.adamw_update on contiguous float32 tensors of one size."""
    tensors = param, grad, exp_avg, exp_avg_sq
    assert all(t.dtype == torch.float32 and t.is_contiguous() and t.numel() == param.numel() for t in tensors)
    rustbpe.adamw_update([t.data_ptr() for t in tensors], param.numel(), *settings, torch.get_num_threads())
