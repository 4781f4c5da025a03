"""The model against closed forms, plain torch, and transformers' implementation of the same architecture."""

import math

import pytest
import torch
import torch.nn.functional as F

from nanochat import ops
from nanochat.gpt import GPT, IGNORE, GPTConfig
from nanochat.ops import chunk_loss_and_grad, plain_loss_and_grad
from nanochat.precision import get_autocast_ctx
from scripts.export_hf import export_weights
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
    theirs.load_state_dict(export_weights(model), strict=True)
    x = torch.randint(0, 128, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs(x).logits, atol=1e-5, rtol=1e-5)


def plain_loss(model, x, y, reduction):
    """Cross-entropy of the full logits, by torch alone."""
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE, reduction=reduction)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-6), (torch.bfloat16, 0.004)])  # 2^-8 of a gradient of 1
@pytest.mark.parametrize("rows, vocab", [(1, 1), (3, 33), (5, 1000), (64, 4099), (40, 30_001)])
def test_the_cpus_loss_and_gradient_equal_the_plain_ones(rows, vocab, dtype, atol):
    logits = (torch.randn(rows, vocab) * 20).to(dtype)  # far into the cap, too
    logits[0, 0], logits[-1, -1] = 1e30, -1e30
    targets, weights = torch.randint(vocab, (rows,)), torch.rand(rows)
    weights[rows // 2] = 0.0
    losses, gradient = plain_loss_and_grad(logits.float(), targets, weights)
    cpu_losses, cpu_gradient = chunk_loss_and_grad(logits.clone(), targets, weights)
    assert torch.allclose(cpu_losses, losses, rtol=1e-5, atol=1e-6)
    assert torch.allclose(cpu_gradient.float(), gradient, atol=atol) and cpu_gradient.dtype == dtype


def test_the_cpus_loss_of_many_logits_which_is_looked_up_has_the_bits_of_the_loss_of_few():
    logits, targets, weights = torch.randn(40, 30_001).bfloat16() * 9, torch.randint(30_001, (40,)), torch.rand(40)
    whole = chunk_loss_and_grad(logits.clone(), targets, weights)
    eights = zip(*(x.split(8) for x in (logits.clone(), targets, weights)), strict=True)
    parts = [chunk_loss_and_grad(*eight) for eight in eights]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts, strict=True), strict=True))


@pytest.mark.parametrize("dtype, vocab", [(torch.float32, 50), (torch.bfloat16, 50), (torch.bfloat16, 400_001)])
def test_the_cpus_loss_hides_no_nan(dtype, vocab):
    logits = torch.zeros(3, vocab, dtype=dtype)
    logits[1, 7] = torch.nan
    losses, gradient = chunk_loss_and_grad(logits, torch.tensor([1, 2, 3]), torch.ones(3))
    assert losses.isnan().tolist() == [False, True, False] and gradient[1].isnan().all()


def test_the_loss_in_pieces_equals_the_whole(monkeypatch):
    """As on a GPU without a compiler; on a CPU float16 takes this way."""
    monkeypatch.setattr(ops, "EAGER_LOGITS", 150)  # three rows of 50; the last piece is short
    logits, targets, weights = torch.randn(7, 50).half(), torch.randint(50, (7,)), torch.rand(7)
    expected = plain_loss_and_grad(logits, targets, weights)
    for ours, whole in zip(chunk_loss_and_grad(logits.clone(), targets, weights), expected, strict=True):
        assert torch.equal(ours, whole)


def test_the_cpus_loss_refuses_a_target_outside_the_vocabulary():
    with pytest.raises(ValueError, match="vocabulary of 50"):
        chunk_loss_and_grad(torch.zeros(1, 50), torch.tensor([50]), torch.ones(1))


def test_chunked_loss_and_gradients_equal_plain_cross_entropy(monkeypatch):
    model = tiny_model(vocab_size=100)  # 100 is no multiple of 64: 28 padded rows must not count
    monkeypatch.setattr(ops, "chunk_rows", lambda *_: 7)  # several chunks, the last one short
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


def test_a_model_whose_buffers_were_cast_still_rotates():
    model, ids = tiny_model(), torch.randint(0, 100, (1, 20))
    expected = model(ids).detach()
    model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    torch.testing.assert_close(model(ids), expected, atol=0.05, rtol=0)


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
