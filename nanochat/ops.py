"""
The operations of the model, each in plain PyTorch first. Some have a faster way to compute the
same: our own kernels for CPUs (cpu_kernels.py) and in Triton (gpu_kernels.py), FlashAttention 3,
torch.compile.

Shapes: B batch, T new tokens, S tokens attended to, H heads, D head size, C width, V vocabulary,
N = B * T rows.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat import cpu_kernels
from nanochat.common import HAS_TRITON, one_thread

try:  # FlashAttention 3 (Hopper), where its package is installed
    from flash_attn_interface import flash_attn_func
except ImportError:
    flash_attn_func = None

NORM_EPS = torch.finfo(torch.float32).eps  # 2^-23
LOGIT_CAP = 15.0

# -----------------------------------------------------------------------------
# Weights in the compute dtype

# A cast of this many elements takes some 50 microseconds. To wake torch's threads and to wait for
# them takes as long, and far longer where another program has their core
SMALL_CAST = 2**19


def cast_weight(weight, dtype):
    """
    A small float32 weight on a CPU, in the compute dtype. Others stay as they are: autocast casts
    them.
    """
    if weight.dtype == dtype or not weight.is_cpu or weight.numel() > SMALL_CAST:
        return weight
    return _SmallCast.apply(weight, dtype)


class _SmallCast(torch.autograd.Function):
    """weight.to(dtype) on one thread, and back."""

    @staticmethod
    def forward(ctx, weight, dtype):
        with one_thread():
            return weight.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with one_thread():
            return grad.float(), None


# -----------------------------------------------------------------------------
# Norm and activation


def norm(x):
    """RMSNorm over the last dimension, without a weight; epsilon is float32's for all dtypes."""
    if cpu_kernels.supports(x):
        return cpu_kernels.norm(x, NORM_EPS)
    # autocast may compute it in float32
    y = F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)
    return y.to(x.dtype)


def relu_square(x):
    """max(x, 0)^2."""
    if cpu_kernels.supports(x):
        return cpu_kernels.relu_square(x)
    return F.relu(x).square()


# -----------------------------------------------------------------------------
# Rotary position embeddings


def rotary_table(length, head_dim, base, device):
    """cos and sin of position * base^(-2i / D), each (1, 1, length, D / 2), always float32."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    frequencies = base ** -(pairs / head_dim)  # (D / 2,), radians per token
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, frequencies)  # (length, D / 2)
    angles = angles[None, None]  # two dimensions in front, for batch and heads
    return angles.cos(), angles.sin()


def apply_rotary(x, cos, sin):
    """Rotate each pair (x_i, x_{i + D/2}) of x (B, H, T, D) by minus the angle of its position."""
    x1, x2 = x.float().chunk(2, dim=-1)
    y1 = x1 * cos + x2 * sin
    y2 = x2 * cos - x1 * sin
    y = torch.cat((y1, y2), dim=-1)
    return y.to(x.dtype)


def rotary_norm(x, cos, sin):
    """Queries or keys x (B, T, H, D), rotated by their positions and normalised: (B, H, T, D)."""
    if cpu_kernels.supports(x):
        return cpu_kernels.rotary_norm(x, cos, sin, NORM_EPS)
    x = x.transpose(1, 2)  # (B, H, T, D)
    return norm(apply_rotary(x, cos, sin))


# -----------------------------------------------------------------------------
# Attention

# Up to this many tokens per row, training on a CPU keeps the (T, T) scores of attention
SHORT_ROW = 1024
# Code on a GPU that is not compiled uses all of torch's backends but cuDNN's, which is built anew
# for every length (github.com/pytorch/pytorch/pull/155958). For one shape cuDNN's is the fastest
EAGER_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def attention(q, k, v, last=None):
    """
    Causal attention of q (B, H, T, D) to k and v (B, H_kv, S, D) -> (B, H, T, D); H_kv divides H.
    last (B, T): the last key that each query may look at. Without it S = T, or T = 1 and the query
    sees every key.
    """
    fast = _fast_attention(q, k, v, last)
    if fast is not None:
        return fast

    # True where a query may look
    mask = None
    if last is not None:
        keys = torch.arange(k.size(2), device=q.device)
        mask = keys <= last[:, :, None]  # (B, T, S)
        mask = mask[:, None]  # the same for all heads
    causal = mask is None and q.size(2) > 1

    backends = contextlib.nullcontext()
    if q.is_cuda and not torch.compiler.is_compiling():
        backends = sdpa_kernel(EAGER_BACKENDS)
    with backends:
        return F.scaled_dot_product_attention(
            q, k, v,
            attn_mask=mask,
            is_causal=causal,
            enable_gqa=q.size(1) != k.size(1),
        )


def _fast_attention(q, k, v, last):
    """The same by a kernel for this device and these shapes; None where there is no such kernel."""
    if q.is_cuda:
        return _gpu_attention(q, k, v, last)
    if cpu_kernels.supports(q):
        return _cpu_attention(q, k, v, last)
    return None


def _gpu_attention(q, k, v, last):
    # Decoding rows of different lengths: our kernel reads each row up to its own end
    one_token = q.size(2) == 1
    if one_token and last is not None and HAS_TRITON:
        from nanochat.gpu_kernels import decode_attention  # needs Triton
        return decode_attention(q, k, v, last)

    # Rows of one length
    half = q.dtype in (torch.bfloat16, torch.float16)
    if flash_attn_func is not None and half and last is None:
        q = q.transpose(1, 2)  # (B, T, H, D), the order of this package
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        out = flash_attn_func(q, k, v, causal=not one_token)
        if isinstance(out, tuple):  # older releases return the log-sums too
            out = out[0]
        return out.transpose(1, 2)
    return None


def _cpu_attention(q, k, v, last):
    # Decoding
    T = q.size(2)
    same_dtype = q.dtype == k.dtype == v.dtype
    if T == 1 and same_dtype and not q.requires_grad:
        return cpu_kernels.one_token_attention(q, k, v, last)

    # Training with as many key heads as query heads
    training = q.requires_grad and last is None and q.shape == k.shape
    if training and q.dtype == torch.bfloat16 and 1 < T <= SHORT_ROW:
        return cpu_kernels.ShortAttention.apply(q, k, v)
    return None


# -----------------------------------------------------------------------------
# Output head: cap and cross-entropy

CPU_LOGITS = 2**26    # logits made at once on a CPU: 256 MB of float32
GPU_LOGITS = 2**29    # on a GPU: 2 GB
EAGER_LOGITS = 2**26  # logits of which plain PyTorch makes several float32 copies


def cap_logits(logits):
    """15 tanh(x / 15) of float32 logits. Overwrites them unless they need a gradient."""
    if logits.requires_grad:
        return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
    # tanh(x) = 2 (sigmoid(2x) - 1/2): torch computes sigmoid faster on a CPU
    logits.mul_(2 / LOGIT_CAP).sigmoid_()
    return logits.sub_(0.5).mul_(2 * LOGIT_CAP)


def chunk_rows(vocab_size, device):
    """Number of rows of logits to make at once."""
    budget = GPU_LOGITS if device.type == "cuda" else CPU_LOGITS
    return max(64, budget // vocab_size)


def head_loss(x, weight, targets, row_weights, compiled=False):
    """
    Sum over rows of row_weights * cross_entropy(cap_logits(x W'), targets), with gradients by x and
    W. The (N, V) logits are never all in memory.

    x (N, C), weight (V, C), targets (N,) int64 >= 0, row_weights (N,) float32; rows of weight 0
    cost nothing. compiled: the chunks go through torch.compile, all in one shape.
    """
    rows = slice(None)
    if not compiled:  # compiled code needs the same number of rows every time
        rows = row_weights.nonzero()[:, 0]
    # without autocast: _HeadLoss chooses its dtypes itself
    with torch.autocast(x.device.type, enabled=False):
        return _HeadLoss.apply(x, weight, targets, row_weights, rows, compiled)


class _HeadLoss(torch.autograd.Function):
    """
    The gradients are computed in the forward pass, chunk by chunk, since they need the logits. The
    backward pass only scales them.
    """

    @staticmethod
    def forward(ctx, all_x, weight, all_targets, all_weights, rows, compiled):
        """rows: indices of the rows that count, or a slice."""
        x = all_x[rows]
        targets = all_targets[rows]
        row_weights = all_weights[rows]
        w = weight.to(x.dtype)  # (V, C)
        loss_and_grad = chunk_loss_and_grad
        if compiled:
            loss_and_grad = _compiled_loss_and_grad()

        total = torch.zeros((), device=x.device)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight)
        chunk = chunk_rows(w.size(0), x.device)
        for start in range(0, x.size(0), chunk):
            part = slice(start, start + chunk)
            logits = x[part] @ w.T  # (n, V)
            losses, dlogits = loss_and_grad(
                logits,
                targets[part],
                row_weights[part],
            )
            total += losses.sum()
            torch.mm(dlogits, w, out=dx[part])  # (n, C)
            if w.dtype == dw.dtype:  # adds without a copy of (V, C)
                dw.addmm_(dlogits.T, x[part])
            else:
                dw += dlogits.T @ x[part]

        # Rows of weight 0 were left out: their gradient is 0
        if len(x) < len(all_x):
            all_dx = torch.zeros_like(all_x)
            dx = all_dx.index_copy_(0, rows, dx)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        dx.mul_(grad)
        dw.mul_(grad)
        return dx, dw, None, None, None, None  # one for each argument of forward


def chunk_loss_and_grad(logits, targets, row_weights):
    """
    (row_weights * loss (n,), its gradient by the raw logits (n, V)) for targets (n,). The gradient
    overwrites the logits.
    """
    logits = logits.contiguous()
    losses = torch.empty(len(logits), device=logits.device)

    # Our kernel makes one pass over each row
    if cpu_kernels.supports(logits):
        targets = targets.contiguous()
        row_weights = row_weights.contiguous()
        cpu_kernels.capped_cross_entropy(logits, targets, row_weights, losses, LOGIT_CAP)
        return losses, logits

    # Plain PyTorch goes piece by piece, to bound its float32 copies
    rows = max(1, EAGER_LOGITS // logits.size(1))
    for start in range(0, len(logits), rows):
        part = slice(start, start + rows)
        losses[part], logits[part] = plain_loss_and_grad(
            logits[part],
            targets[part],
            row_weights[part],
        )
    return losses, logits


def plain_loss_and_grad(logits, targets, row_weights):
    """
    As chunk_loss_and_grad, in plain PyTorch; the logits stay as they are. The cap keeps the
    argument of exp below 15, so no maximum has to be subtracted first.
    """
    t = torch.tanh(logits.float() / LOGIT_CAP)  # (n, V)
    p = torch.exp(LOGIT_CAP * t)                # (n, V), not normalised
    total = p.sum(dim=-1, keepdim=True)         # (n, 1)
    index = targets[:, None]
    target_logits = LOGIT_CAP * t.gather(1, index)
    loss = (total.log() - target_logits).squeeze(1)

    # d loss / d capped logit = softmax - one-hot
    weights = row_weights[:, None]  # (n, 1)
    gradient = p * (weights / total)
    gradient = gradient.scatter_add(1, index, -weights)
    # d capped logit / d logit = 1 - t^2
    gradient = gradient * (1 - t * t)
    return loss * row_weights, gradient.to(logits.dtype)


@functools.cache
def _compiled_loss_and_grad():
    return torch.compile(plain_loss_and_grad, dynamic=False)
