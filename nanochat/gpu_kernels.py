"""
Our own kernel, in Triton, for the one operation that PyTorch lacks: attention of a single new token per row to a cache
whose rows have different lengths, without reading what lies beyond a row's end. Imported where it is needed, since
Triton comes with PyTorch's CUDA builds alone.

Shapes: B rows, H query heads, H_kv key and value heads, S cached positions, D head size.
"""

import torch
import triton
import triton.language as tl

KEYS = 128  # positions per program: enough programs run at once to use all of a GPU, even for one row


@triton.jit
def _attend_to_part(
    q, k, v, last,    # see decode_attention
    parts, log_sums,  # results: (B, H, P, D) and (B, H, P), P parts of KEYS positions
    q_b, q_h,         # strides of q, in elements
    k_b, k_h, k_s,    # strides of k
    v_b, v_h, v_s,    # strides of v
    H, num_parts,
    GROUP: tl.constexpr,     # query heads per key head
    SCALE: tl.constexpr,     # D^-0.5
    D: tl.constexpr,
    D_PADDED: tl.constexpr,  # D rounded up to a power of two, as tl.arange needs
    KEYS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    part = tl.program_id(2)
    s = part * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, D_PADDED)
    out = (b * H + h) * num_parts + part
    num_used = tl.load(last + b) + 1
    if part * KEYS < num_used:
        # Load the query (D,), the keys and the values (KEYS, D)
        inside = (s < num_used)[:, None] & (d < D)[None, :]
        kv_head = h // GROUP
        key_places = b * k_b + kv_head * k_h + s[:, None] * k_s + d[None, :]
        value_places = b * v_b + kv_head * v_h + s[:, None] * v_s + d[None, :]
        query = tl.load(q + b * q_b + h * q_h + d, mask=d < D, other=0.0).to(tl.float32)
        keys = tl.load(k + key_places, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(v + value_places, mask=inside, other=0.0).to(tl.float32)

        # Softmax over these positions
        scores = tl.sum(keys * query[None, :], axis=1) * SCALE
        scores = tl.where(s < num_used, scores, -float("inf"))
        highest = tl.max(scores, axis=0)
        p = tl.exp(scores - highest)
        total = tl.sum(p, axis=0)
        y = tl.sum(values * p[:, None], axis=0) / total
        tl.store(parts + out * D + d, y, mask=d < D)
        tl.store(log_sums + out, highest + tl.log(total))
    else:  # beyond the row's end: read nothing, weigh nothing
        tl.store(parts + out * D + d, tl.zeros([D_PADDED], tl.float32), mask=d < D)
        tl.store(log_sums + out, -float("inf"))


def decode_attention(q, k, v, last):
    """
    q (B, H, 1, D); k, v (B, H_kv, S, D), of any strides but 1 for D; last (B, 1) int64, at most S - 1: row b attends to
    the keys 0 .. last[b]. Returns (B, H, 1, D).

    Every program attends to KEYS positions, as if there were no others. The partial results are then averaged by their
    share of softmax's denominator (Flash-Decoding, Dao et al. 2023).
    """
    B, H, _, D = q.shape
    num_parts = -(-k.size(2) // KEYS)
    parts = torch.empty(B, H, num_parts, D, dtype=torch.float32, device=q.device)
    log_sums = torch.empty(B, H, num_parts, dtype=torch.float32, device=q.device)
    _attend_to_part[(B, H, num_parts)](
        q, k, v, last,
        parts, log_sums,
        q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2),
        H, num_parts,
        GROUP=H // k.size(1),
        SCALE=D**-0.5,
        D=D,
        D_PADDED=1 << (D - 1).bit_length(),
        KEYS=KEYS,
        num_warps=8,
    )
    shares = log_sums.softmax(dim=-1)[..., None]  # (B, H, P, 1)
    return (shares * parts).sum(dim=2, keepdim=True).to(q.dtype)
