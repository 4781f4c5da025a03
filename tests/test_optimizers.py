"""Both update rules against plain references: torch's AdamW, an SVD, and a matrix-by-matrix NorMuon."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat.adamw import DistAdamW, adamw_update
from nanochat.muon import DistMuon, Muon, muon_update, orthogonalize

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("native", [True, False])
def test_adamw_equals_torch(monkeypatch, native):
    if not native:
        monkeypatch.setattr("nanochat.cpu_kernels.adamw_update", adamw_update)
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(600, 513))  # more than one part, and not a whole number of them
    theirs = torch.nn.Parameter(ours.detach().clone())
    settings = dict(betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    a = DistAdamW([dict(named_params=[("p", ours)], lr=0.01)], **settings)
    b = torch.optim.AdamW([theirs], lr=0.01, **settings)
    for _ in range(5):
        ours.grad = torch.randn_like(ours)
        theirs.grad = ours.grad.clone()
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_means_that_fade_become_zero():
    """The row of a token that does not occur: numbers below 2^-126 would make every later step slow."""
    ours, theirs = (torch.nn.Parameter(torch.arange(1.0, 9)) for _ in range(2))
    a = DistAdamW([dict(named_params=[("p", ours)], lr=0.01)])
    b = torch.optim.AdamW([theirs], lr=0.01, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0)
    for step in range(2000):
        ours.grad, theirs.grad = (torch.full((8,), 0.0 if step else 1e-3) for _ in range(2))
        a.step()
        b.step()
    torch.testing.assert_close(ours, theirs)
    assert not any(a.state[ours][name].any() for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32)])
def test_orthogonalize_is_near_the_polar_factor(shape):
    torch.manual_seed(0)
    U, S, Vh = torch.linalg.svd(torch.randn(3, *shape), full_matrices=False)
    G = U @ torch.diag_embed(torch.logspace(-1.5, 0, S.size(-1)).expand_as(S)) @ Vh
    X = orthogonalize(G, torch.float32)
    assert X.shape == G.shape
    assert ((torch.linalg.svdvals(X) - 1).abs() < 0.2).all()
    polar = U @ Vh
    cosine = (X * polar).sum((-2, -1)) / (X.norm(dim=(-2, -1)) * polar.norm(dim=(-2, -1)))
    assert (cosine > 0.99).all()


def reference_muon(p, grads, lr, momentum, beta2, weight_decay):
    """One matrix at a time, written from the formulas, with state in local variables."""
    m, v = torch.zeros_like(p), torch.zeros(p.size(0), 1)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        u = orthogonalize(((1 - momentum) * g + momentum * m)[None], torch.float32)[0]
        v = beta2 * v + (1 - beta2) * (u**2).mean(1, keepdim=True)
        scaled = u / v.sqrt()
        scaled = scaled * u.norm() / scaled.norm()
        p = torch.where(scaled * p > 0, p - lr * weight_decay * p, p)
        p = p - lr * max(1, p.size(0) / p.size(1)) ** 0.5 * scaled
    return p


@pytest.mark.parametrize("shape", [(24, 24), (16, 48), (48, 16)])
def test_muon_update_equals_the_reference(shape):
    torch.manual_seed(0)
    params = torch.randn(3, *shape)
    grads = [torch.randn_like(params) for _ in range(4)]
    settings = dict(lr=0.02, momentum=0.9, beta2=0.95, weight_decay=0.5)
    expected = torch.stack([reference_muon(params[i], [g[i] for g in grads], **settings) for i in range(3)])
    momentum_buffer, second_moment = torch.zeros_like(params), torch.zeros(3, shape[0], 1)
    for g in grads:
        muon_update(params, g, momentum_buffer, second_moment, dtype=torch.float32, **settings)
    torch.testing.assert_close(params, expected, rtol=1e-4, atol=1e-5)


def test_one_class_has_both_names():
    assert Muon is DistMuon


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match="bias has shape"):
        DistMuon([("bias", torch.nn.Parameter(torch.zeros(3)))])


def test_full_state_round_trip_continues_exactly():
    torch.manual_seed(0)
    start = [torch.randn(40, 8), torch.randn(8, 40), torch.randn(8, 40)]
    grads = [[torch.randn_like(p) for p in start] for _ in range(6)]

    def build(params):
        named = [(f"p{i}", p) for i, p in enumerate(params)]
        return [DistAdamW([dict(named_params=named[:1], lr=0.01)]), DistMuon(named[1:], weight_decay=0.1)]

    def run(params, optimizers, some_grads):
        for step_grads in some_grads:
            for p, g in zip(params, step_grads, strict=True):
                p.grad = g.clone()
            for optimizer in optimizers:
                optimizer.step()

    unbroken = [torch.nn.Parameter(p.clone()) for p in start]
    run(unbroken, build(unbroken), grads)

    first = [torch.nn.Parameter(p.clone()) for p in start]
    optimizers = build(first)
    run(first, optimizers, grads[:3])
    saved = {k: v.clone() for optimizer in optimizers for k, v in optimizer.full_state().items()}
    second = [torch.nn.Parameter(p.detach().clone()) for p in first]
    optimizers = build(second)
    for optimizer in optimizers:
        optimizer.load_full_state(saved)
    run(second, optimizers, grads[3:])
    for a, b in zip(unbroken, second, strict=True):
        assert torch.equal(a, b)


def test_a_training_step_does_not_load_torch_s_compiler():
    """It takes seconds and 170 MB, and torch.optim.Optimizer's constructor loads it."""
    program = """
import sys
from nanochat.training import optimizer_step
from tests.tiny import tiny_model
model = tiny_model()
optimizers = model.setup_optimizers()
ids = model.lm_head.weight.new_zeros(1, 4).long()
model(ids, ids).sum().backward()
optimizer_step(model, optimizers)
assert "torch._dynamo" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
