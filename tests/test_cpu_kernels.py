"""
The native extension's operations for a model on a CPU against torch's own, with gradients, on any threads, and with
tensors that they must refuse.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import rustbpe.kernels
import torch
import torch.nn.functional as F

from nanochat import cpu_kernels, ops
from nanochat.ops import chunk_loss_and_grad, norm
from rustbpe import kernels
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


def kernel_results():
    """Of every operation, at a size of several parts."""
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
    alone = kernel_results()
    torch.set_num_threads(num_threads)
    with ThreadPoolExecutor(1) as pool:  # a server decodes in another thread than the first
        for results in (kernel_results(), pool.submit(kernel_results).result()):
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


# -----------------------------------------------------------------------------
# What does not fit is a ValueError, never a crash


def good_arguments(name):
    """Arguments that the operation takes, all of them tensors but the last ones."""
    row = torch.randn(4, 8)
    if name in ("norm", "relu_square"):
        return [row, 1e-6][: 2 if name == "norm" else 1]
    if name == "rotary_norm":
        return [torch.randn(2, 3, 2, 8), torch.rand(1, 1, 3, 4), torch.rand(1, 1, 3, 4), 1e-6]
    if name == "one_token_attention":
        return [torch.randn(2, 4, 1, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8), torch.tensor([[4], [0]])]
    if name == "capped_cross_entropy":
        return [torch.randn(3, 9), torch.tensor([0, 8, 2]), torch.rand(3), torch.empty(3), 15.0]
    assert name == "adamw_update"
    return [*torch.rand(4, 10), 3, 0.01, (0.8, 0.95), 1e-10, 0.1]


OPERATIONS = ["norm", "relu_square", "rotary_norm", "one_token_attention", "capped_cross_entropy", "adamw_update"]
TENSOR_ARGUMENTS = [(name, i) for name in OPERATIONS for i, x in enumerate(good_arguments(name)) if torch.is_tensor(x)]


def refused(name, arguments, message=None):
    with pytest.raises(ValueError, match=message):
        getattr(cpu_kernels, name)(*arguments)


@pytest.mark.parametrize("name, i", TENSOR_ARGUMENTS)
def test_a_tensor_of_another_dtype_device_or_layout_is_refused(name, i):
    arguments = good_arguments(name)
    getattr(cpu_kernels, name)(*arguments)
    good = arguments[i]
    bad = [good.to(dtype) for dtype in (torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64)]
    bad += [good.to("meta"), torch.empty_like(good, device="meta").float()]
    if name == "rotary_norm" and i > 0:
        bad = bad[-2:]  # the angles are converted to float32
    for tensor in bad:
        arguments[i] = tensor
        refused(name, arguments, "must be a strided CPU tensor")


@pytest.mark.parametrize("name, i", TENSOR_ARGUMENTS)
def test_a_tensor_of_another_size_is_refused(name, i):
    arguments = good_arguments(name)
    good = arguments[i]
    if name in ("norm", "relu_square"):
        return  # they take any shape
    for shape in [(7, *good.shape[1:]), (*good.shape[:-1], good.size(-1) + 1), (0, *good.shape[1:]), (2,) * 5]:
        if name == "rotary_norm" and i == 0 and shape[0] in (7, 0):
            continue  # angles of (1, 1, T, D / 2) serve any batch
        if name == "capped_cross_entropy" and shape == (3, 10):
            continue  # a larger vocabulary
        arguments[i] = torch.ones(shape, dtype=good.dtype)
        refused(name, arguments)


def test_operations_in_place_refuse_strides():
    for name in ("capped_cross_entropy", "adamw_update"):
        for i, good in enumerate(good_arguments(name)):
            if torch.is_tensor(good):
                arguments = good_arguments(name)
                arguments[i] = torch.stack((good, good), dim=-1)[..., 0]
                refused(name, arguments, "must be contiguous")


def test_operations_in_place_refuse_the_same_memory_twice():
    state = torch.rand(4, 10)
    refused("adamw_update", [state[0], state[0], *state[2:], 3, 0.01, (0.8, 0.95), 1e-10, 0.1], "shares memory")
    refused("adamw_update", [*state[:3], state[2], 3, 0.01, (0.8, 0.95), 1e-10, 0.1], "shares memory")
    weights = torch.rand(3)
    arguments = [torch.randn(3, 9), torch.tensor([0, 8, 2]), weights, weights, 15.0]
    refused("capped_cross_entropy", arguments, "shares memory")


def test_positions_and_targets_out_of_range_are_refused():
    arguments = good_arguments("one_token_attention")
    for last in ([[5], [0]], [[-1], [0]], [[0], [2**40]], [[0], [-(2**63)]]):
        arguments[3] = torch.tensor(last)
        refused("one_token_attention", arguments, "positions")
    refused("one_token_attention", [arguments[0], torch.ones(2, 3, 5, 8), torch.ones(2, 3, 5, 8)])  # 4 heads for 3
    refused("one_token_attention", [arguments[0], torch.ones(2, 2, 0, 8), torch.ones(2, 2, 0, 8)])  # no position
    refused("one_token_attention", [arguments[0], arguments[1], arguments[2].bfloat16()])
    arguments = good_arguments("capped_cross_entropy")
    for target in (9, -1, 2**62):
        arguments[1] = torch.tensor([0, target, 2])
        refused("capped_cross_entropy", arguments, "target")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_tensors_give_empty_results(dtype):
    for shape in [(0,), (0, 8), (3, 0), (2, 0, 4, 8), (2, 3, 0, 1, 8)]:
        for op in (lambda x: cpu_kernels.norm(x, 1e-6), cpu_kernels.relu_square):
            x = torch.empty(shape, dtype=dtype, requires_grad=True)
            out = op(x)
            out.sum().backward()
            assert out.shape == x.grad.shape == op(x.detach()).shape == shape
    for B, T, H, D in [(0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)]:
        x = torch.empty(B, T, H, D, dtype=dtype, requires_grad=True)
        angles = torch.rand(1, 1, T, D // 2)
        out = cpu_kernels.rotary_norm(x, angles, angles, 1e-6)
        out.sum().backward()
        assert out.shape == (B, H, T, D) and x.grad.shape == x.shape
    for B, H, D in [(0, 4, 8), (2, 0, 8), (2, 4, 0)]:
        q, k = torch.empty(B, H, 1, D, dtype=dtype), torch.ones(B, 2, 3, D, dtype=dtype)
        assert cpu_kernels.one_token_attention(q, k, k).shape == q.shape
    losses = torch.empty(0)
    cpu_kernels.capped_cross_entropy(torch.empty(0, 9, dtype=dtype), losses.long(), losses, losses.clone(), 15.0)
    cpu_kernels.adamw_update(*torch.empty(4, 0), 3, 0.01, (0.8, 0.95), 1e-10, 0.1)


def test_the_extension_refuses_what_is_no_tensor():
    x = torch.ones(2, 8)
    out = torch.ones(2, 8)
    good = (x.data_ptr(), "float32", (2, 8), (8, 1))
    good_out = (out.data_ptr(), *good[1:])
    kernels.row_op("norm", good, good_out, 1, 1e-6)
    bad = {
        "address": [(0, *good[1:]), (x.data_ptr() + 1, *good[1:])],
        "no kernel takes": [(good[0], "float64", *good[2:])],
        "larger than memory": [(good[0], "float32", (2**62, 8), (8, 1)), (good[0], "float32", (2, 8), (2**63, 1)),
                               (2**64 - 4, "float32", (2, 8), (8, 1))],
        "dimensions": [(good[0], "float32", (1, 1, 1, 2, 8), (16, 16, 16, 8, 1))],
        "shape": [(good[0], "float32", (2, 4), (8, 1)), (good[0], "float32", (3, 8), (0, 1))],
        "contiguous": [(good[0], "float32", (2, 8), (1, 2))],
        "is needed": [(good[0], "int64", (1, 8), (8, 1))],
        "shares memory": [good_out],
    }
    for message, tensors in bad.items():
        for tensor in tensors:
            with pytest.raises(ValueError, match=message):
                kernels.row_op("norm", tensor, good_out, 1, 1e-6)
    with pytest.raises(ValueError, match="overlap"):
        kernels.row_op("norm", good, (out.data_ptr(), "float32", (2, 8), (4, 1)), 1, 1e-6)
    with pytest.raises(ValueError, match="no operation"):
        kernels.row_op("softmax", good, good_out, 1)
    with pytest.raises(ValueError, match="queries"):  # more of them than keys
        kernels.row_op("causal_softmax", (good[0], "float32", (9, 1, 1), (1, 1, 1)),
                       (out.data_ptr(), "float32", (9, 1, 1), (1, 1, 1)), 1)


def test_the_extension_is_two_modules():
    assert rustbpe.kernels is kernels and rustbpe.kernels.__name__ == "rustbpe.kernels"
    assert not hasattr(rustbpe, "row_op") and not hasattr(kernels, "Tokenizer")
