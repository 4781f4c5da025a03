"""
Makes a trained model fast to decode, by replacing some of its modules.

`prepare(model)` does three things. It stores the parameters in the compute dtype, so that decoding
never casts. It multiplies by the weights of q, k and v at once. On a CPU in bfloat16 it keeps a
copy of each weight in the layout that oneDNN multiplies fastest.

`refresh(model, trained)` copies parameters that have changed since. `compile_decoding(model)`
compiles the step of one token per row on a GPU. Parameters keep their names throughout.

Shapes: B rows, T tokens, C width, H heads, H_kv key and value heads, D head size.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from nanochat.cuda_graphs import FixedLayer
from nanochat.gpt import Block, CausalSelfAttention, Linear
from nanochat.ops import rotary_norm
from nanochat.precision import get_precision_dtype, has_native_bf16

PACK_ROWS = 64  # rows of x that oneDNN chooses a weight's layout for


def prepare(model):
    """Make a model fast to decode, in place. It has no gradients from now on. Returns it."""
    model.eval().requires_grad_(False)
    model.to(get_precision_dtype(model.device.type))
    model.set_rotary(model.cos.size(2))  # the rotary table stays in float32
    for block in model.transformer.h:
        block.attn = FusedAttention(block.attn)
    if _can_pack(model):
        for block in model.transformer.h:
            block.attn.c_proj = PackedLinear(block.attn.c_proj)
            block.mlp.c_fc = PackedLinear(block.mlp.c_fc)
            block.mlp.c_proj = PackedLinear(block.mlp.c_proj)
        model.lm_head = PackedLinear(model.lm_head)
    repack(model)
    return model


@torch.no_grad()
def refresh(model, trained):
    """Give a prepared model the parameters of `trained`, the model that it is a copy of."""
    targets = dict(model.named_parameters())
    for name, p in trained.named_parameters():
        targets[name].copy_(p)
    repack(model)


def repack(model):
    """Update the packed copies of the weights, after the weights have changed."""
    if _can_pack(model):
        for module in model.modules():
            if isinstance(module, FusedAttention | PackedLinear):
                module.repack()


def compile_decoding(model, **options):
    """
    Compile the recorded step of one token per row (cuda_graphs.py). All blocks share the compiled
    code, which takes any number of rows. options: for torch.compile.
    """
    # the function, not the blocks: so it is compiled once
    compiled = torch.compile(Block.forward, **options)
    for block in model.transformer.h:
        block.forward = functools.partial(_block_forward, compiled, block)


def _block_forward(compiled, block, x, cos, sin, store, value_embed):
    # only recorded steps have fixed shapes
    run = compiled if isinstance(store, FixedLayer) else Block.forward
    return run(block, x, cos, sin, store, value_embed)


# -----------------------------------------------------------------------------
# Modules


class FusedAttention(CausalSelfAttention):
    """
    Attention that multiplies by the weights of q, k and v at once. They stay parameters, as parts
    of one tensor.
    """

    def __init__(self, attn):
        # the parent's __init__ would make new weights
        nn.Module.__init__(self)
        self.head_dim = attn.head_dim
        self.c_q = attn.c_q
        self.c_k = attn.c_k
        self.c_v = attn.c_v
        self.c_proj = attn.c_proj

        # One tensor holds the three weights
        linears = (self.c_q, self.c_k, self.c_v)
        weights = [linear.weight.data for linear in linears]
        self.qkv = torch.cat(weights)  # (outputs of q, k and v, C)
        self.packed = None             # see repack

        # The parameters become views of it
        parts = self.qkv.split([linear.out_features for linear in linears])
        for linear, part in zip(linears, parts, strict=True):
            linear.weight.data = part

    def repack(self):
        self.packed = pack(self.qkv)

    def project(self, x, cos, sin):
        """x (B, T, C) -> q (B, H, T, D), k and v (B, H_kv, T, D)."""
        B, T, _ = x.shape
        kv_heads = self.c_k.out_features // self.head_dim
        qkv = packed_linear(x, self.qkv, self.packed)
        qkv = qkv.view(B, T, -1, self.head_dim)  # (B, T, H + 2 H_kv, D)
        # q and k are normalised together: at this size a call costs more than its work
        qk = rotary_norm(qkv[:, :, :-kv_heads], cos, sin)  # (B, H + H_kv, T, D)
        v = qkv[:, :, -kv_heads:].transpose(1, 2)
        return qk[:, :-kv_heads], qk[:, -kv_heads:], v


class PackedLinear(Linear):
    """A Linear with a second copy of its weight in oneDNN's layout."""

    def __init__(self, linear):
        # on the meta device: the weight is that of the other linear
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.packed = None  # see repack

    def repack(self):
        self.packed = pack(self.weight)

    def forward(self, x):
        return packed_linear(x, self.weight, self.packed)


# -----------------------------------------------------------------------------
# Weights in the layout of oneDNN, by operations that torch.compile calls for constant weights


def _can_pack(model):
    # only where the hardware multiplies bfloat16
    weight = model.lm_head.weight
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and has_native_bf16("cpu")
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def pack(weight):
    """
    A copy of a bfloat16 weight (M, K), reordered once instead of in every matmul. Reordering takes
    up to half of the time where few rows meet a large weight (dev/LOG.md).
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACK_ROWS)


def packed_linear(x, weight, packed):
    """F.linear(x (..., K), weight (M, K)). packed: `pack(weight)` or None."""
    # for one row only reading the weight takes time, and that is fast in its own order
    one_row = x.numel() == x.size(-1)
    if packed is None or one_row:
        return F.linear(x, weight)

    x_rows = x.reshape(-1, x.size(-1))
    num_rows = len(x_rows)
    padding = round_up(num_rows) - num_rows
    if padding:
        x_rows = F.pad(x_rows, (0, 0, 0, padding))  # rows of zeros
    y = torch.ops.mkldnn._linear_pointwise(x_rows, packed, None, "none", [], "")
    return y[:num_rows].view(*x.shape[:-1], -1)


def matmul_sizes(model, most):
    """All results of `round_up` for up to `most` rows; [] where nothing is made for them."""
    if not _can_pack(model):
        return []
    return sorted({round_up(num_rows) for num_rows in range(1, most + 1)})


def round_up(num_rows):
    """
    The number of rows that a matmul is done with: 1 to 8, then four numbers up to each power of 2.
    For each one that it meets oneDNN makes code of 0.6 MB, which takes 0.05 s, and keeps 1,024 of
    them. Prompts have any length, so a server grew by 600 MB.

    >>> [round_up(n) for n in (7, 9, 17, 31, 33, 100)]
    [7, 10, 20, 32, 40, 112]
    """
    step = max(1, 2 ** ((num_rows - 1).bit_length() - 3))
    return math.ceil(num_rows / step) * step
