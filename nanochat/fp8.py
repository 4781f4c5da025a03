"""
Training in 8 bits, on Hopper and newer GPUs: `use_fp8(model)` replaces the linear layers of a model's blocks by ones
that multiply in float8. The model does not know; parameters keep their names, and evaluation multiplies in 16 bits.

Each tensor has one scale, taken from the tensor itself at every step ("dynamic tensorwise scaling").
"""

import torch
import torch.nn.functional as F

from nanochat.gpt import Linear
from nanochat.precision import active_dtype

MULTIPLE = 16  # what torch._scaled_mm needs all sizes to be a multiple of


def use_fp8(model):
    """Let the blocks' linear layers multiply in 8 bits while training, those whose sizes allow it. In place."""
    for block in model.transformer.h:
        for parent in (block.attn, block.mlp):
            for name, module in list(parent.named_children()):
                if isinstance(module, Linear) and _fits(module):
                    setattr(parent, name, Float8Linear(module))


def _fits(linear):
    return linear.in_features % MULTIPLE == 0 and linear.out_features % MULTIPLE == 0


class Float8Linear(Linear):
    """A Linear that multiplies in 8 bits in training, where the number of rows allows it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight  # the same Parameter: optimizers keep working

    def forward(self, x):
        num_rows = x.numel() // x.size(-1)
        if not self.training or num_rows % MULTIPLE:
            return F.linear(x, self.weight)
        return float8_linear(x, self.weight)


def float8_linear(x, weight):
    """F.linear(x (..., K), weight (M, K)) in 8 bits. The number of rows, K and M must be multiples of 16."""
    dtype = active_dtype(weight)
    rows = x.reshape(-1, x.size(-1)).to(dtype)
    y = _Float8Matmul.apply(rows, weight.to(dtype))
    return y.view(*x.shape[:-1], weight.size(0))


class _Float8Matmul(torch.autograd.Function):
    """y = x W^T with all three matmuls of the layer in 8 bits: e4m3 values, e5m2 gradients (wider range)."""

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
        w8_columns = w8.t().contiguous().t()
        x8_columns = x8.t().contiguous().t()
        g8_rows = g8.t().contiguous()
        dx = torch._scaled_mm(g8, w8_columns, scale_a=g_scale, scale_b=w_scale, out_dtype=grad.dtype)
        dw = torch._scaled_mm(g8_rows, x8_columns, scale_a=g_scale, scale_b=x_scale, out_dtype=grad.dtype)
        return dx, dw


def _to_float8(x, dtype):
    """x -> (x8, scale) with x ~ x8 * scale; the scale is a float32 scalar."""
    largest = x.abs().amax().float().clamp(min=1e-12)
    scale = largest / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale
