"""Training in 8 bits, but for the GPU's kernel, which a stand-in replaces."""

import torch

from nanochat.fp8 import Float8Linear, _to_float8, float8_linear, use_fp8
from tests.tiny import tiny_model


def test_float8_linear_and_its_gradients_are_near_float32(monkeypatch):
    def scaled_mm(a, b, scale_a, scale_b, out_dtype, use_fast_accum=False):
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)  # the kernel needs a GPU; the arithmetic around it does not
    torch.manual_seed(0)
    x, w = torch.randn(2, 16, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    g = torch.randn(2, 16, 48)
    exact = torch.autograd.grad(torch.nn.functional.linear(x, w), (x, w), g)
    y = float8_linear(x, w)
    ours = torch.autograd.grad(y, (x, w), g)
    for a, b in zip((y, *ours), (x @ w.T, *exact), strict=True):
        assert (a - b).norm() / b.norm() < 0.1


def test_use_fp8_replaces_the_blocks_linears_and_keeps_parameters_and_evaluation():
    model = tiny_model()
    parameters = dict(model.named_parameters())
    ids = torch.randint(0, 100, (2, 16))
    expected = model(ids)
    flops = model.estimate_flops()
    use_fp8(model)
    assert isinstance(model.transformer.h[1].mlp.c_fc, Float8Linear) and not isinstance(model.lm_head, Float8Linear)
    assert all(parameters[name] is p for name, p in model.named_parameters()) and model.estimate_flops() == flops
    assert torch.equal(model.eval()(ids), expected)


def test_float8_quantisation_error_is_within_the_format():
    x = torch.randn(64, 64) * 37
    x8, scale = _to_float8(x, torch.float8_e4m3fn)
    # 3 mantissa bits: half a unit in the last place is 1/16 of a value; values near 0 have a fixed step
    assert ((x8.float() * scale - x).abs() <= x.abs() / 16 + scale * 2**-9).all()
