"""
Training in 8 bits, on Hopper and newer GPUs. `use_fp8(model)` replaces the linear layers of the
blocks by layers that multiply in float8. Parameters keep their names, and evaluation multiplies in
16 bits.

Each tensor has one scale, computed from the tensor at every step (dynamic tensorwise scaling).

Shapes: N rows, K inputs, M outputs.
"""

import torch
import torch.nn.functional as F

from nanochat.gpt import Linear
from nanochat.precision import active_dtype

MULTIPLE = 16  # torch._scaled_mm takes only sizes that are multiples of 16


def use_fp8(model):
    """Replace the blocks' linear layers in place, where their sizes allow 8 bits."""
    for block in model.transformer.h:
        for parent in (block.attn, block.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, Linear) and _fits(module):
                    setattr(parent, name, Float8Linear(module))


def _fits(linear):
    sizes = (linear.in_features, linear.out_features)
    return all(size % MULTIPLE == 0 for size in sizes)


class Float8Linear(Linear):
    """A Linear that multiplies in 8 bits in training, where the number of rows allows it."""

    def __init__(self, linear):
        # on the meta device, since the weight is not this layer's own
        super().__init__(
            linear.in_features,
            linear.out_features,
            device="meta",
        )
        self.weight = linear.weight  # the same Parameter: optimizers keep working

    def forward(self, x):
        # 16 bits in evaluation, and where the number of rows does not fit
        num_rows = x.numel() // x.size(-1)
        if not self.training or num_rows % MULTIPLE:
            return F.linear(x, self.weight)
        return float8_linear(x, self.weight)


def float8_linear(x, weight):
    """F.linear(x (..., K), weight (M, K)) in 8 bits. N, K and M must be multiples of 16."""
    dtype = active_dtype(weight)
    rows = x.reshape(-1, x.size(-1))  # (N, K)
    y = _Float8Matmul.apply(rows.to(dtype), weight.to(dtype))  # (N, M)
    return y.view(*x.shape[:-1], weight.size(0))


class _Float8Matmul(torch.autograd.Function):
    """
    y = x W^T, with all three matmuls of forward and backward in 8 bits. Values are e4m3; gradients
    are e5m2, which has the wider range.
    """

    @staticmethod
    def forward(ctx, x, weight):  # (N, K), (M, K) -> (N, M)
        # only the 8-bit copies are kept for the backward pass
        x8, x_scale = _to_float8(x, torch.float8_e4m3fn)
        w8, w_scale = _to_float8(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        # _scaled_mm needs its second factor column-major, as a transposed view is
        return torch._scaled_mm(
            x8,
            w8.t(),
            scale_a=x_scale,
            scale_b=w_scale,
            out_dtype=x.dtype,
            use_fast_accum=True,
        )

    @staticmethod
    def backward(ctx, grad):  # (N, M)
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = _to_float8(grad.contiguous(), torch.float8_e5m2)

        # dx (N, K) = grad W
        dx = torch._scaled_mm(
            g8,
            _column_major(w8),
            scale_a=g_scale,
            scale_b=w_scale,
            out_dtype=grad.dtype,
        )
        # dW (M, K) = grad^T x
        dw = torch._scaled_mm(
            g8.t().contiguous(),
            _column_major(x8),
            scale_a=g_scale,
            scale_b=x_scale,
            out_dtype=grad.dtype,
        )
        return dx, dw


def _column_major(x):
    """The same matrix, stored column by column."""
    return x.t().contiguous().t()


def _to_float8(x, dtype):
    """(x8, scale) with x8 * scale about equal to x. The scale is a float32 scalar."""
    largest = x.abs().amax().float()
    largest = largest.clamp(min=1e-12)  # a tensor of zeros must not divide by 0
    scale = largest / torch.finfo(dtype).max
    x8 = x.float() / scale
    return x8.to(dtype), scale
