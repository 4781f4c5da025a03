"""What only a GPU shows: the compiled model, 8-bit training, attention kernels. Skipped, with the reason, elsewhere."""

import pytest
import torch

from nanochat.fp8 import use_fp8
from nanochat.gpt import GPT, GPTConfig
from nanochat.precision import get_autocast_ctx
from nanochat.training import accumulate_gradients, optimizer_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def losses_of(monkeypatch, precision, compiled, steps=5):
    monkeypatch.setenv("NANOCHAT_PRECISION", precision)
    torch.manual_seed(0)
    model = GPT.create(GPTConfig.from_depth(2, 512, 128), "cuda")
    if precision == "fp8":
        use_fp8(model)
    if compiled:
        model.compile()
    optimizers = model.setup_optimizers()
    data = torch.randint(0, 512, (4, 129)).numpy()
    losses = []
    for _ in range(steps):
        loss, _ = accumulate_gradients(model, data[:, :-1], data[:, 1:], 512, 4)
        optimizer_step(model, optimizers)
        losses.append(loss.item())
    return losses


def test_the_compiled_model_learns_as_the_eager_one(monkeypatch):
    eager = losses_of(monkeypatch, "bfloat16", compiled=False)
    assert losses_of(monkeypatch, "bfloat16", compiled=True) == pytest.approx(eager, rel=0.02)


def test_fp8_learns_as_bf16(monkeypatch):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("fp8 needs compute capability 9.0")
    bf16 = losses_of(monkeypatch, "bfloat16", compiled=True)
    assert losses_of(monkeypatch, "fp8", compiled=True) == pytest.approx(bf16, rel=0.05)


def test_gpu_logits_are_near_the_cpus(monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRECISION", "bfloat16")
    torch.manual_seed(0)
    model = GPT.create(GPTConfig.from_depth(2, 512, 128), "cpu")
    torch.nn.init.normal_(model.lm_head.weight, std=0.05)
    x = torch.randint(0, 512, (2, 128))
    expected = model(x)
    model.cuda()
    with get_autocast_ctx("cuda"), torch.no_grad():
        assert (model(x.cuda()).cpu() - expected).abs().max() < 0.1
