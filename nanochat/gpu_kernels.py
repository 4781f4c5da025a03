"""
Our own kernel, in Triton, for an operation that PyTorch lacks: attention of one new token per row
to a cache whose rows have different lengths. It reads nothing beyond the end of a row. This module
is imported where it is needed, since only PyTorch's CUDA builds come with Triton.

Shapes: B rows, H query heads, H_kv key and value heads, S cached positions, D head size.
"""

import torch
import triton
import triton.language as tl

# Positions per program. With so few, even one row gives enough programs to use all of a GPU
KEYS = 128


@triton.jit
def _attend_to_part(
    q, k, v, last,    # see decode_attention
    parts, log_sums,  # results: (B, H, P, D) and (B, H, P), P parts of KEYS positions
    q_b, q_h,         # strides of q, in elements
    k_b, k_h, k_s,    # strides of k
    v_b, v_h, v_s,    # strides of v
    H,
    num_parts,        # P
    GROUP: tl.constexpr,     # query heads per key head
    SCALE: tl.constexpr,     # D^-0.5
    D: tl.constexpr,
    D_PADDED: tl.constexpr,  # D rounded up to a power of two, as tl.arange needs
    KEYS: tl.constexpr,
):
    # This program's row, head and positions
    b = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1)
    part = tl.program_id(2)
    s = part * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, D_PADDED)
    is_channel = d < D

    # Where its results go
    out = (b * H + h) * num_parts + part
    out_places = parts + out * D + d
    num_used = tl.load(last + b) + 1

    if part * KEYS < num_used:
        # Addresses of the query (D,), the keys and the values (KEYS, D)
        kv_head = h // GROUP
        query_places = q + b * q_b + h * q_h + d
        key_start = k + b * k_b + kv_head * k_h
        value_start = v + b * v_b + kv_head * v_h
        key_places = key_start + s[:, None] * k_s + d[None, :]
        value_places = value_start + s[:, None] * v_s + d[None, :]

        # Load them
        is_position = s < num_used
        inside = is_position[:, None] & is_channel[None, :]
        query = tl.load(query_places, mask=is_channel, other=0.0).to(tl.float32)
        keys = tl.load(key_places, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(value_places, mask=inside, other=0.0).to(tl.float32)

        # Softmax over these positions
        scores = tl.sum(keys * query[None, :], axis=1) * SCALE
        scores = tl.where(is_position, scores, -float("inf"))
        highest = tl.max(scores, axis=0)
        p = tl.exp(scores - highest)
        total = tl.sum(p, axis=0)
        y = tl.sum(values * p[:, None], axis=0) / total
        tl.store(out_places, y, mask=is_channel)
        tl.store(log_sums + out, highest + tl.log(total))
    else:  # beyond the row's end: read nothing, and give this part no weight
        zeros = tl.zeros([D_PADDED], tl.float32)
        tl.store(out_places, zeros, mask=is_channel)
        tl.store(log_sums + out, -float("inf"))


def decode_attention(q, k, v, last):
    """
    q (B, H, 1, D); k and v (B, H_kv, S, D), with stride 1 in D; last (B, 1) int64, at most S - 1:
    row b attends to the keys 0 .. last[b]. Returns (B, H, 1, D).

    Every program attends to KEYS positions, as if there were no others. The partial results are
    then averaged by their share of softmax's denominator (Flash-Decoding, Dao et al. 2023).
    """
    B, H, _, D = q.shape
    num_parts = -(-k.size(2) // KEYS)  # rounded up
    parts = torch.empty(
        (B, H, num_parts, D),
        dtype=torch.float32,
        device=q.device,
    )
    log_sums = torch.empty(
        (B, H, num_parts),
        dtype=torch.float32,
        device=q.device,
    )

    # One program for each row, head and part
    grid = (B, H, num_parts)
    _attend_to_part[grid](
        q, k, v, last,
        parts, log_sums,
        q.stride(0), q.stride(1),
        k.stride(0), k.stride(1), k.stride(2),
        v.stride(0), v.stride(1), v.stride(2),
        H,
        num_parts,
        GROUP=H // k.size(1),
        SCALE=D**-0.5,
        D=D,
        D_PADDED=1 << (D - 1).bit_length(),
        KEYS=KEYS,
        num_warps=8,
    )
    shares = log_sums.softmax(dim=-1)[..., None]  # (B, H, P, 1)
    y = (shares * parts).sum(dim=2, keepdim=True)  # (B, H, 1, D)
    return y.to(q.dtype)
