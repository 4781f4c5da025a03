"""The native extension's operations for a model on a CPU against torch's own, with gradients, on any threads."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from nanochat import cpu_kernels, ops
from nanochat.ops import chunk_loss_and_grad, norm
from tests.ranks import on_ranks


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", [(1, 1, 2, 32), (5, 3, 2, 34), (2, 1, 1, 2), (0, 4, 1, 64), (3, 700, 4, 64)])
def test_row_ops_on_a_cpu_and_their_gradients_are_those_of_torch(shape, dtype, tol):
    """Norm, ReLU^2, and the norm of rotated rows, which are part of a wider tensor and have angles of their own."""
    B, T, H, D = shape
    x = torch.randn(B, T, H + 1, D).to(dtype)[:, :, :H].requires_grad_()
    angle = torch.rand(max(B, 1), 1, T, D // 2)
    angles = torch.stack((angle.cos(), angle.sin()))
    plain = [lambda x: F.rms_norm(x, x.shape[-1:], eps=2**-23), lambda x: F.relu(x).square(),
             lambda x: F.rms_norm(ops.apply_rotary(x.transpose(1, 2), *angles.double()), x.shape[-1:], eps=2**-23)]
    ours = [norm, ops.relu_square, lambda x: ops.rotary_norm(x, *angles)]
    for op, reference in zip(ours, plain, strict=True):
        out, exact = op(x), x.detach().double().requires_grad_()
        expected = reference(exact)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=tol, rtol=tol)
        assert torch.equal(op(x.detach()), out) and torch.equal(op(x.detach().contiguous()), out)
        grad = torch.randn(out.shape).transpose(0, 1).contiguous().transpose(0, 1).to(dtype)  # in another order
        for result, start in ((out, grad), (expected, grad.double())):
            result.backward(start)
        torch.testing.assert_close(x.grad.double(), exact.grad, atol=8 * tol, rtol=tol)
        x.grad = None


def test_relu_square_hides_no_nan():
    x = torch.tensor([1.0, torch.nan, -1.0]).requires_grad_()
    ops.relu_square(x).sum().backward()
    assert x.grad.isnan().tolist() == [False, True, False] and ops.relu_square(x.detach())[1].isnan()


def test_row_ops_take_rows_whose_numbers_lie_apart():
    x = torch.randn(8, 4)
    assert torch.equal(norm(x.t()), norm(x.t().contiguous()))
    assert torch.equal(ops.relu_square(x[:, :1].expand(8, 6)), ops.relu_square(x[:, :1].repeat(1, 6)))


def native_results():
    """Of every native operation, at a size of several parts."""
    torch.manual_seed(0)
    x, angles, results = torch.randn(2, 400, 4, 64).bfloat16(), torch.randn(2, 1, 1, 400, 32), []
    for op in (norm, ops.relu_square, lambda x: ops.rotary_norm(x, *angles)):
        y = x.clone().requires_grad_()
        results.append(op(y))
        results[-1].backward(torch.ones_like(results[-1]) * results[-1].detach())
        results.append(y.grad)
    q, k, v = (torch.randn(4, 4, 300, 32).bfloat16().requires_grad_() for _ in range(3))
    cpu_kernels.ShortAttention.apply(q, k, v).square().sum().backward()
    results += [cpu_kernels.one_token_attention(q[:, :, :1].detach(), k.detach(), v.detach()), q.grad, k.grad, v.grad]
    logits = torch.randn(40, 30_001).bfloat16()
    results += chunk_loss_and_grad(logits, torch.randint(30_001, (40,)), torch.rand(40))
    state = torch.rand(4, 100_000)
    cpu_kernels.adamw_update(*state, 3, 0.01, (0.8, 0.95), 1e-10, 0.1)
    return [*(result.detach() for result in results), state]


def compare_threads(num_threads):
    """In a process of its own: one that has used several threads cannot be forked."""
    alone = native_results()
    torch.set_num_threads(num_threads)
    with ThreadPoolExecutor(1) as pool:  # a server decodes in another thread than the first
        for results in (native_results(), pool.submit(native_results).result()):
            assert all(torch.equal(a, b) for a, b in zip(alone, results, strict=True))


@pytest.mark.parametrize("num_threads", [2, 3, 9])
def test_any_number_of_threads_gives_the_same_bits(num_threads):
    on_ranks(1, compare_threads, num_threads)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("B, H, H_kv, S, D", [(1, 4, 4, 1, 16), (3, 4, 2, 70, 32), (2, 6, 1, 600, 128),
                                              (5, 3, 3, 9, 6)])
def test_attention_of_one_token_on_a_cpu_is_torchs(B, H, H_kv, S, D, dtype, atol):
    q = torch.randn(B, 1, H, D).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, B, H_kv, S + 5, D).to(dtype)[:, :, :, :S]  # parts of a cache that is longer
    for last in (None, torch.randint(0, S, (B, 1))):
        mask = None if last is None else (torch.arange(S) <= last)[:, None, None]
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
        out = ops.attention(q, k, v, last)
        assert out.dtype == dtype
        with pytest.raises(RuntimeError, match="dtype"):  # as torch says it
            ops.attention(q, k.half(), v.half(), last)
        torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_attention_of_short_rows_is_torchs_with_its_gradients(dtype, atol):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 77, 16).to(dtype).requires_grad_() for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, expected = cpu_kernels.ShortAttention.apply(q, k, v), F.scaled_dot_product_attention(*exact, is_causal=True)
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)
    for ours, theirs in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2 * atol, rtol=0)
