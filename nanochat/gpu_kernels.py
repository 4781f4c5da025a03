"""
Kernels of our own, in Triton, for the one thing that PyTorch has none for: attention of a single new token per row to a
cache whose rows have different lengths, without reading what lies behind a row's end. Imported where it is needed:
Triton comes with PyTorch's CUDA builds alone.
"""

import torch
import triton
import triton.language as tl

KEYS = 128  # positions that one program looks at: enough of them run at once to use all of a GPU, even for one row


@triton.jit
def _attend_to_part(q, k, v, last, parts, log_sums, q_b, q_h, k_b, k_h, k_s, v_b, v_h, v_s, H, num_parts,
                    GROUP: tl.constexpr, SCALE: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
                    KEYS: tl.constexpr):
    b, h, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    s, d = part * KEYS + tl.arange(0, KEYS), tl.arange(0, D_PADDED)
    out = (b * H + h) * num_parts + part
    used = tl.load(last + b) + 1
    if part * KEYS < used:
        inside = (s < used)[:, None] & (d < D)[None, :]
        query = tl.load(q + b * q_b + h * q_h + d, mask=d < D, other=0.0).to(tl.float32)
        keys = tl.load(k + b * k_b + (h // GROUP) * k_h + s[:, None] * k_s + d[None, :], mask=inside, other=0.0)
        values = tl.load(v + b * v_b + (h // GROUP) * v_h + s[:, None] * v_s + d[None, :], mask=inside, other=0.0)
        scores = tl.sum(keys.to(tl.float32) * query[None, :], axis=1) * SCALE
        scores = tl.where(s < used, scores, -float("inf"))
        highest = tl.max(scores, axis=0)
        p = tl.exp(scores - highest)
        total = tl.sum(p, axis=0)
        y = tl.sum(values.to(tl.float32) * p[:, None], axis=0) / total
        tl.store(parts + out * D + d, y, mask=d < D)
        tl.store(log_sums + out, highest + tl.log(total))
    else:  # behind the row's end: nothing is read, and it counts nothing
        tl.store(parts + out * D + d, tl.zeros([D_PADDED], tl.float32), mask=d < D)
        tl.store(log_sums + out, -float("inf"))


def decode_attention(q, k, v, last):
    """
    q (B, H, 1, D); k, v (B, H_kv, S, D), of any strides but 1 for D; last (B, 1) int64, at most S - 1: row b looks at
    the keys 0 .. last[b]. Returns (B, H, 1, D). Every program attends to KEYS positions, as if there were no others;
    what they found is averaged by their share of softmax's denominator (Flash-Decoding, Dao et al. 2023).
    """
    B, H, _, D = q.shape
    num_parts = -(-k.size(2) // KEYS)
    parts = torch.empty(B, H, num_parts, D, dtype=torch.float32, device=q.device)
    log_sums = torch.empty(B, H, num_parts, dtype=torch.float32, device=q.device)
    _attend_to_part[(B, H, num_parts)](
        q, k, v, last, parts, log_sums, q.stride(0), q.stride(1), k.stride(0), k.stride(1), k.stride(2), v.stride(0),
        v.stride(1), v.stride(2), H, num_parts, GROUP=H // k.size(1), SCALE=D**-0.5, D=D,
        D_PADDED=1 << (D - 1).bit_length(), KEYS=KEYS, num_warps=8)
    return (log_sums.softmax(dim=-1)[..., None] * parts).sum(dim=2, keepdim=True).to(q.dtype)
