"""The model against closed forms, plain torch, and transformers' implementation of the same architecture."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat import gpt, native
from nanochat.gpt import (
    GPT,
    IGNORE,
    GPTConfig,
    chunk_loss_and_grad,
    chunk_loss_and_grad_eager,
    norm,
)
from nanochat.precision import get_autocast_ctx
from scripts.export_hf import hf_weights
from tests.tiny import tiny_model


@pytest.mark.parametrize("depth, millions", [(20, 561), (26, 1082), (32, 1879)])
def test_parameter_count_of_the_published_sizes(depth, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(depth, 65536, 2048))
    assert round(model.num_params() / 1e6) == millions


@pytest.mark.parametrize("depth", range(1, 41))
def test_every_depth_gives_a_valid_shape(depth):
    config = GPTConfig.from_depth(depth, 65536, 2048)
    assert config.n_embd == 64 * depth and config.n_layer == depth
    assert config.n_embd % config.n_head == 0 and (config.n_embd // config.n_head) % 2 == 0
    if depth % 2 == 0:
        assert config.n_embd // config.n_head == 128


def test_odd_depth_runs():
    model = GPT.create(GPTConfig.from_depth(3, 70, 16), "cpu")
    assert model(torch.randint(0, 70, (2, 16))).shape == (2, 16, 70)


def test_init_sets_every_parameter_and_buffer():
    with torch.device("meta"):
        model = GPT(GPTConfig(16, 70, 2, 2, 2, 32, value_embeds=True))
    model.to_empty(device="cpu")
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data.fill_(math.nan)
    model.init_weights()
    assert all(tensor.isfinite().all() for tensor in [*model.parameters(), *model.buffers()])


def test_fresh_model_guesses_uniformly():
    model = GPT.create(GPTConfig(16, 70, 2, 2, 2, 32), "cpu")
    x = torch.randint(0, 70, (2, 16))
    assert model(x, x).item() == pytest.approx(math.log(70), abs=1e-5)


@pytest.mark.parametrize("n_kv_head", [4, 2, 1])
def test_logits_equal_transformers(n_kv_head):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    model = tiny_model(vocab_size=128, n_kv_head=n_kv_head)
    c = model.config
    theirs = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(
        vocab_size=128, hidden_size=c.n_embd, intermediate_size=4 * c.n_embd, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=n_kv_head, max_position_embeddings=c.sequence_len,
        rms_norm_eps=torch.finfo(torch.float32).eps, final_logit_softcapping=15.0, tie_word_embeddings=False)).eval()
    theirs.load_state_dict(hf_weights(model), strict=True)
    x = torch.randint(0, 128, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-5, rtol=1e-5)


def plain_loss(model, x, y, reduction):
    """Cross-entropy of the full logits, by torch alone."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction=reduction)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])  # 2^-8 of a gradient of 1
@pytest.mark.parametrize("rows, vocab, threads", [(1, 1, 1), (3, 33, 2), (5, 1000, 8), (64, 4099, 3), (40, 30_001, 2)])
def test_the_cpus_loss_and_gradient_equal_the_plain_ones(monkeypatch, rows, vocab, threads, dtype, atol):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    logits = (torch.randn(rows, vocab) * 20).to(dtype)  # far into the cap, too
    logits[0, 0], logits[-1, -1] = 1e30, -1e30
    targets, weights = torch.randint(vocab, (rows,)), torch.rand(rows)
    weights[rows // 2] = 0.0
    losses, gradient = chunk_loss_and_grad(logits.float(), targets, weights)
    cpu_losses, cpu_gradient = chunk_loss_and_grad_eager(logits.clone(), targets, weights)
    assert torch.allclose(cpu_losses, losses, rtol=1e-5, atol=1e-6)
    assert torch.allclose(cpu_gradient.float(), gradient, atol=atol) and cpu_gradient.dtype == dtype


def test_the_cpus_loss_of_many_logits_which_is_looked_up_has_the_bits_of_the_loss_of_few():
    logits, targets, weights = torch.randn(40, 30_001).bfloat16() * 9, torch.randint(30_001, (40,)), torch.rand(40)
    whole = chunk_loss_and_grad_eager(logits.clone(), targets, weights)
    eights = zip(*(x.split(8) for x in (logits.clone(), targets, weights)), strict=True)
    parts = [chunk_loss_and_grad_eager(*eight) for eight in eights]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))


@pytest.mark.parametrize("dtype, vocab", [(torch.float32, 50), (torch.bfloat16, 50), (torch.bfloat16, 400_001)])
def test_the_cpus_loss_hides_no_nan(dtype, vocab):
    logits = torch.zeros(3, vocab, dtype=dtype)
    logits[1, 7] = torch.nan
    losses, gradient = chunk_loss_and_grad_eager(logits, torch.tensor([1, 2, 3]), torch.ones(3))
    assert losses.isnan().tolist() == [False, True, False] and gradient[1].isnan().all()


def test_the_loss_in_pieces_equals_the_whole(monkeypatch):
    """As on a GPU without a compiler; on a CPU float16 takes this way."""
    monkeypatch.setattr(gpt, "EAGER_PIECE", 150)  # three rows of 50; the last piece is short
    logits, targets, weights = torch.randn(7, 50).half(), torch.randint(50, (7,)), torch.rand(7)
    expected = chunk_loss_and_grad(logits, targets, weights)
    for ours, whole in zip(chunk_loss_and_grad_eager(logits.clone(), targets, weights), expected, strict=True):
        assert torch.equal(ours, whole)


def test_the_cpus_loss_refuses_a_target_outside_the_vocabulary():
    with pytest.raises(ValueError, match="vocabulary of 50"):
        chunk_loss_and_grad_eager(torch.zeros(1, 50), torch.tensor([50]), torch.ones(1))


def test_chunked_loss_and_gradients_equal_plain_cross_entropy(monkeypatch):
    model = tiny_model(vocab_size=100)  # 100 is no multiple of 64: 28 padded rows must not count
    monkeypatch.setattr(model, "chunk_rows", lambda: 7)  # several chunks, the last one short
    x, y = torch.randint(0, 100, (2, 3, 32))
    y[0, :10] = IGNORE
    grads = []
    for loss in (model(x, y), plain_loss(model, x, y, "mean")):
        model.zero_grad()
        loss.backward()
        grads.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-4)
    assert model.lm_head.weight.grad[100:].abs().max() == 0


def test_loss_reductions_agree():
    model = tiny_model()
    x, y = torch.randint(0, 100, (2, 3, 32))
    y[1, 5:] = IGNORE
    each = model(x, y, loss_reduction="none")
    assert each.shape == (3, 32) and (each[1, 5:] == 0).all()
    torch.testing.assert_close(model(x, y, loss_reduction="sum"), each.sum(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, y), each.sum() / (y != IGNORE).sum(), rtol=1e-5, atol=1e-5)


def test_a_batch_without_targets_gives_zero_loss_and_zero_gradients():
    model = tiny_model()
    x = torch.randint(0, 100, (2, 8))
    loss = model(x, torch.full_like(x, IGNORE))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in model.parameters())


def test_logits_are_capped_float32_and_without_padding():
    model = tiny_model(vocab_size=100).bfloat16()
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    logits = model(torch.randint(0, 100, (1, 8)))
    assert logits.dtype == torch.float32 and logits.shape == (1, 8, 100)
    assert 14.9 < logits.abs().max() <= 15


def test_causality():
    model = tiny_model()
    x = torch.randint(0, 100, (1, 20))
    changed = x.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % 100
    torch.testing.assert_close(model(x)[:, :10], model(changed)[:, :10])


def test_flops_per_token_of_d20():
    with torch.device("meta"):
        model = GPT(GPTConfig.from_depth(20, 65536, 2048))
    # by hand: 6 * (20 * 12 * 1280^2 + 65536 * 1280) + 12 * 20 * 1280 * 2048
    assert model.estimate_flops() == 6 * (393_216_000 + 83_886_080) + 629_145_600


@torch.no_grad()
def test_value_embeddings_start_as_if_they_were_not_there_and_cost_no_flops():
    plain, model = tiny_model(n_kv_head=2), tiny_model(n_kv_head=2, value_embeds=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert model.estimate_flops() == plain.estimate_flops()
    ids, tables = torch.randint(0, 100, (2, 9)), model.transformer.value_embeds
    assert [table.weight.shape for table in tables] == [(128, 32)] * 2  # the padded vocabulary, 2 heads of 16
    assert not torch.allclose(model(ids), plain(ids))
    for table in tables:
        table.weight.zero_()
    torch.testing.assert_close(model(ids), plain(ids))


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match="n_embd=65"):
        GPT(GPTConfig(n_embd=65))
    with pytest.raises(ValueError, match="33 tokens exceed the rotary table of 32"):
        tiny_model()(torch.zeros(1, 33, dtype=torch.long))


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("shape", [(1, 1, 2, 32), (5, 3, 2, 34), (2, 1, 1, 2), (0, 4, 1, 64), (3, 700, 4, 64)])
def test_row_ops_on_a_cpu_and_their_gradients_are_those_of_torch(shape, dtype, tol):
    """Norm, ReLU^2, and the norm of rotated rows, which are part of a wider tensor and have angles of their own."""
    B, T, H, D = shape
    x = torch.randn(B, T, H + 1, D).to(dtype)[:, :, :H].requires_grad_()
    angle = torch.rand(max(B, 1), 1, T, D // 2)
    angles = torch.stack((angle.cos(), angle.sin()))
    plain = [lambda x: F.rms_norm(x, x.shape[-1:], eps=2**-23), lambda x: F.relu(x).square(),
             lambda x: F.rms_norm(gpt.apply_rotary(x.transpose(1, 2), *angles.double()), x.shape[-1:], eps=2**-23)]
    ours = [norm, gpt.relu_square, lambda x: gpt.rotary_norm(x, *angles)]
    for op, reference in zip(ours, plain, strict=True):
        out, exact = op(x), x.detach().double().requires_grad_()
        expected = reference(exact)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, atol=tol, rtol=tol)
        assert torch.equal(op(x.detach()), out)
        grad = torch.randn(out.shape).transpose(0, 1).contiguous().transpose(0, 1).to(dtype)  # in another order
        for result, start in ((out, grad), (expected, grad.double())):
            result.backward(start)
        torch.testing.assert_close(x.grad.double(), exact.grad, atol=8 * tol, rtol=tol)
        x.grad = None


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("B, H, H_kv, S, D", [(1, 4, 4, 1, 16), (3, 4, 2, 70, 32), (2, 6, 1, 600, 128),
                                              (5, 3, 3, 9, 6)])
def test_attention_of_one_token_on_a_cpu_is_torchs(B, H, H_kv, S, D, dtype, atol):
    q = torch.randn(B, 1, H, D).to(dtype).transpose(1, 2)
    k, v = torch.randn(2, B, H_kv, S + 5, D).to(dtype)[:, :, :, :S]  # parts of a cache that is longer
    for last in (None, torch.randint(0, S, (B, 1))):
        mask = None if last is None else (torch.arange(S) <= last)[:, None, None]
        expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask, enable_gqa=True)
        out = gpt.attention(q, k, v, last)
        assert out.dtype == dtype
        with pytest.raises(RuntimeError, match="dtype"):  # as torch says it
            gpt.attention(q, k.half(), v.half(), last)
        torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_attention_of_short_rows_is_torchs_with_its_gradients(dtype, atol):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 77, 16).to(dtype).requires_grad_() for _ in range(3))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out, expected = native.ShortAttention.apply(q, k, v), F.scaled_dot_product_attention(*exact, is_causal=True)
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    expected.backward(grad.double())
    torch.testing.assert_close(out.double(), expected, atol=atol, rtol=0)
    for ours, theirs in zip((q, k, v), exact, strict=True):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, atol=2 * atol, rtol=0)


def test_training_in_16_bits_takes_the_gradients_of_32(monkeypatch):
    torch.manual_seed(0)
    model = tiny_model(vocab_size=512, sequence_len=32)
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    ids = torch.randint(0, 512, (4, 33))
    grads = {}
    for precision in ("float32", "bfloat16"):
        monkeypatch.setenv("NANOCHAT_PRECISION", precision)
        model.zero_grad()
        with get_autocast_ctx("cpu"):
            loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        grads[precision] = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert torch.cosine_similarity(grads["bfloat16"], grads["float32"], dim=0) > 0.999
