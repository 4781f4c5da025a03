"""Our Triton kernels against plain attention: on a GPU as they are, elsewhere in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


def check_decode_attention(device):
    from nanochat.gpu_kernels import decode_attention
    torch.manual_seed(0)
    B = 3
    for H, H_kv, D, S in [(2, 2, 16, 300), (4, 2, 24, 128), (3, 1, 8, 1)]:
        q = torch.randn(B, H, 1, D, device=device)
        cache = torch.randn(2, B + 1, H_kv, S + 5, D, device=device)  # with more rows and positions than are seen
        k, v = cache[:, :B, :, :S]
        last = torch.tensor([[0], [S // 2], [S - 1]], device=device)
        mask = (torch.arange(S, device=device) <= last)[:, None, None]
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(decode_attention(q, k, v, last), expected, rtol=1e-5, atol=1e-5)
        cache[:, :, :, 1:] = torch.nan  # what lies behind a row's end may be anything
        alone = decode_attention(q, k, v, torch.zeros_like(last))
        torch.testing.assert_close(alone, v[:, :, :1].repeat_interleave(H // H_kv, dim=1), rtol=1e-5, atol=1e-5)


def test_decode_attention_looks_at_each_row_s_own_keys():
    if torch.cuda.is_available():
        return check_decode_attention("cuda")
    done = subprocess.run(  # Triton asks for this variable when it is imported
        [sys.executable, "-c", "from tests.test_gpu_kernels import *; check_decode_attention('cpu')"], text=True,
        cwd=Path(__file__).parent.parent, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr
