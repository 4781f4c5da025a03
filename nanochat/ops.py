"""
The operations that the model is made of, each in plain PyTorch, and a faster way to compute the same where there is
one: kernels of our own on a CPU (cpu_kernels.py) and in Triton (gpu_kernels.py), FlashAttention 3, torch.compile.

Shapes: B batch, T new tokens, S tokens attended to, H heads, D head size, C width, V vocabulary, N = B * T rows.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat import cpu_kernels
from nanochat.common import HAS_TRITON

try:  # FlashAttention 3 (Hopper), where its package is installed
    from flash_attn_interface import flash_attn_func
except ImportError:
    flash_attn_func = None

NORM_EPS = torch.finfo(torch.float32).eps  # 2^-23
LOGIT_CAP = 15.0

# -----------------------------------------------------------------------------
# Norm and activation


def norm(x):
    """RMSNorm over the last dimension, without a weight, with float32's epsilon whatever the dtype."""
    if cpu_kernels.supports(x):
        return cpu_kernels.norm(x, NORM_EPS)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS).to(x.dtype)


def relu_square(x):
    """max(x, 0)^2."""
    if cpu_kernels.supports(x):
        return cpu_kernels.relu_square(x)
    return F.relu(x).square()


# -----------------------------------------------------------------------------
# Rotary position embeddings


def rotary_table(length, head_dim, base, device):
    """cos and sin of position * base^(-2i / D), each (1, 1, length, D / 2), always float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    frequencies = base**-exponents
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)
    return angles.cos()[None, None], angles.sin()[None, None]


def apply_rotary(x, cos, sin):
    """Rotate each pair (x_i, x_{i + D/2}) by minus the angle of its position. x (B, H, T, D) keeps its dtype."""
    x1, x2 = x.float().chunk(2, dim=-1)
    y1 = x1 * cos + x2 * sin
    y2 = x2 * cos - x1 * sin
    return torch.cat((y1, y2), dim=-1).to(x.dtype)


def rotary_norm(x, cos, sin):
    """Rotate queries or keys x (B, T, H, D) by their positions, then normalise them -> (B, H, T, D)."""
    if cpu_kernels.supports(x):
        return cpu_kernels.rotary_norm(x, cos, sin, NORM_EPS)
    return norm(apply_rotary(x.transpose(1, 2), cos, sin))


# -----------------------------------------------------------------------------
# Attention

# Tokens in a row up to which a CPU keeps the (T, T) scores of attention in training
SHORT_ROW = 1024
# On a GPU without a compiler, all of torch's backends but cuDNN's. That one is the fastest where training is compiled
# for one shape, but it is built anew for every length (github.com/pytorch/pytorch/pull/155958)
EAGER_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(q, k, v, last=None):
    """
    Causal attention of q (B, H, T, D) to k and v (B, H_kv, S, D) -> (B, H, T, D); H_kv divides H.
    last (B, T): the last key that each query may look at. None: S = T, or T = 1 and the query sees every key.
    """
    fast = _fast_attention(q, k, v, last)
    if fast is not None:
        return fast
    mask = None
    if last is not None:
        keys = torch.arange(k.size(2), device=q.device)
        mask = (keys <= last[:, :, None])[:, None]  # (B, 1, T, S)
    causal = mask is None and q.size(2) > 1
    grouped = q.size(1) != k.size(1)
    backends = contextlib.nullcontext()
    if q.is_cuda and not torch.compiler.is_compiling():
        backends = sdpa_kernel(EAGER_BACKENDS)
    with backends:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def _fast_attention(q, k, v, last):
    """The same by a kernel for this device and these shapes, or None where there is none."""
    if q.is_cuda:
        return _gpu_attention(q, k, v, last)
    if cpu_kernels.supports(q):
        return _cpu_attention(q, k, v, last)
    return None


def _gpu_attention(q, k, v, last):
    one_token = q.size(2) == 1
    if one_token and last is not None and HAS_TRITON:
        from nanochat.gpu_kernels import decode_attention  # needs Triton
        return decode_attention(q, k, v, last)
    half = q.dtype in (torch.bfloat16, torch.float16)
    if flash_attn_func is not None and half and last is None:
        q = q.transpose(1, 2)  # (B, T, H, D), as this package wants it
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        out = flash_attn_func(q, k, v, causal=not one_token)
        out = out[0] if isinstance(out, tuple) else out  # older releases return the log-sums too
        return out.transpose(1, 2)
    return None


def _cpu_attention(q, k, v, last):
    T = q.size(2)
    if T == 1 and not q.requires_grad and q.dtype == k.dtype == v.dtype:
        return cpu_kernels.one_token_attention(q, k, v, last)
    training = q.requires_grad and last is None and q.shape == k.shape
    if training and q.dtype == torch.bfloat16 and 1 < T <= SHORT_ROW:
        return cpu_kernels.ShortAttention.apply(q, k, v)
    return None


# -----------------------------------------------------------------------------
# Output head: cap and cross-entropy

# Logits made at once: 256 MB of float32 on a CPU, 2 GB on a GPU
CPU_LOGITS = 2**26
GPU_LOGITS = 2**29
# Logits that plain PyTorch works on at once, in several float32 copies
EAGER_LOGITS = 2**26


def cap_logits(logits):
    """15 tanh(x / 15) of float32 logits, overwriting them where no gradient is wanted."""
    if logits.requires_grad:
        return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
    # tanh(x) = 2 (sigmoid(2x) - 1/2): torch computes sigmoid faster on a CPU
    return logits.mul_(2 / LOGIT_CAP).sigmoid_().sub_(0.5).mul_(2 * LOGIT_CAP)


def chunk_rows(vocab_size, device):
    """Rows of logits to make at once."""
    budget = GPU_LOGITS if device.type == "cuda" else CPU_LOGITS
    return max(64, budget // vocab_size)


def head_loss(x, weight, targets, row_weights, compiled=False):
    """
    Sum over rows of row_weights * cross_entropy(cap_logits(x W'), targets), with gradients by x and W. The (N, V)
    logits never exist at once. x (N, C), weight (V, C), targets (N,) int64 >= 0, row_weights (N,) float32: rows of
    weight 0 cost nothing. compiled: chunks of one shape go through torch.compile.
    """
    rows = slice(None)
    if not compiled:  # compiled code wants the same number of rows every time
        rows = row_weights.nonzero()[:, 0]
    with torch.autocast(x.device.type, enabled=False):
        return _HeadLoss.apply(x, weight, targets, row_weights, rows, compiled)


class _HeadLoss(torch.autograd.Function):
    """The gradients are made in the forward pass, chunk by chunk while the logits are at hand; backward scales them."""

    @staticmethod
    def forward(ctx, all_x, weight, all_targets, all_weights, rows, compiled):
        """rows: indices of the rows that count, or a slice."""
        x = all_x[rows]
        targets = all_targets[rows]
        row_weights = all_weights[rows]
        w = weight.to(x.dtype)
        loss_and_grad = _compiled_loss_and_grad() if compiled else chunk_loss_and_grad

        total = torch.zeros((), device=x.device)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight)
        chunk = chunk_rows(w.size(0), x.device)
        for start in range(0, x.size(0), chunk):
            part = slice(start, start + chunk)
            logits = x[part] @ w.T
            losses, dlogits = loss_and_grad(logits, targets[part], row_weights[part])
            total += losses.sum()
            torch.mm(dlogits, w, out=dx[part])
            if w.dtype == dw.dtype:
                dw.addmm_(dlogits.T, x[part])
            else:
                dw += dlogits.T @ x[part]

        if len(x) < len(all_x):  # rows without a weight have no gradient
            all_dx = torch.zeros_like(all_x)
            dx = all_dx.index_copy_(0, rows, dx)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), dw.mul_(grad), None, None, None, None


def chunk_loss_and_grad(logits, targets, row_weights):
    """
    (row_weights * loss (n,), its gradient by the raw logits (n, V)) for targets (n,). The gradient overwrites the
    logits: on a CPU in one pass over each row, elsewhere piece by piece.
    """
    logits = logits.contiguous()
    losses = torch.empty(len(logits), device=logits.device)
    if cpu_kernels.supports(logits):
        targets = targets.contiguous()
        row_weights = row_weights.contiguous()
        cpu_kernels.capped_cross_entropy(logits, targets, row_weights, losses, LOGIT_CAP)
        return losses, logits
    rows = max(1, EAGER_LOGITS // logits.size(1))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        piece = plain_loss_and_grad(logits[part], targets[part], row_weights[part])
        losses[part] = piece[0]
        logits[part] = piece[1]
    return losses, logits


def plain_loss_and_grad(logits, targets, row_weights):
    """
    As chunk_loss_and_grad, in plain PyTorch, leaving the logits alone. The cap bounds the argument of exp at 15, so no
    maximum has to be subtracted first.
    """
    t = torch.tanh(logits.float() / LOGIT_CAP)
    p = torch.exp(LOGIT_CAP * t)
    total = p.sum(dim=-1, keepdim=True)
    index = targets[:, None]
    loss = (total.log() - LOGIT_CAP * t.gather(1, index)).squeeze(1)

    # d loss / d capped logit = softmax - one-hot
    weights = row_weights[:, None]
    gradient = p * (weights / total)
    gradient = gradient.scatter_add(1, index, -weights)
    # d capped logit / d logit = 1 - t^2
    gradient = gradient * (1 - t * t)
    return loss * row_weights, gradient.to(logits.dtype)


@functools.cache
def _compiled_loss_and_grad():
    return torch.compile(plain_loss_and_grad, dynamic=False)
