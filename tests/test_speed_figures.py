"""What the speeds on the screen rest on: the data sheets' peaks, a step's arithmetic, the first guess of a batch."""

import math

import pytest
import torch

from nanochat.device_speed import get_peak_flops
from nanochat.gpt import GPTConfig
from nanochat.horizon import choose_device_batch_size
from nanochat.metrics_log import step_line

CUDA = torch.device("cuda")


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA B200", 2250), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA A10G", 70), ("NVIDIA GeForce RTX 4090", 165),
])
def test_the_peak_of_a_known_gpu_is_its_data_sheets(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    for dtype in (torch.bfloat16, torch.float16):
        assert get_peak_flops(CUDA, dtype) == (tflops * 1e12, "data sheet")


def test_the_peak_of_anything_else_is_measured(monkeypatch):
    flops, source = get_peak_flops(torch.device("cpu"), torch.float32)
    assert source == "measured" and 1e8 < flops < 1e15

    def ones(*shape, device, dtype):
        raise RuntimeError(f"measuring {dtype}")
    monkeypatch.setattr(torch, "ones", ones)
    for name, dtype in (("NVIDIA L40", torch.bfloat16), ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16),
                         ("NVIDIA H100 PCIe", torch.float32)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        with pytest.raises(RuntimeError, match=f"measuring {dtype}"):
            get_peak_flops(CUDA, dtype)


def test_a_steps_figures():
    metrics = {"step": 50, "train/loss": 2.0, "lrm": 0.5, "dt_ms": 250, "tok_per_sec": 16384, "mfu": 0.25, "epoch": 1}
    assert step_line(metrics, 200, eta_s=90) == (
        "step: 00050/00200 (25.0%) | loss: 2.00000 | lrm: 0.500 | dt: 250ms | tok/s: 16,384 | mfu: 25.0% | eta: 1.5m")


@pytest.mark.parametrize("depth", [4, 20, 32])
def test_more_memory_lets_more_rows_in(depth, monkeypatch):
    def guess(gib, max_rows=10**6):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gib * 2**30, 2**40))
        return choose_device_batch_size(-1, config, CUDA, max_rows)
    monkeypatch.setenv("NANOCHAT_PRECISION", "bfloat16")
    config = GPTConfig.from_depth(depth, 65536, 2048)
    rows = [guess(gib) for gib in (0.01, 1, 8, 24, 80, 140, 10_000)]
    assert rows == sorted(rows) and rows[0] == 1 and rows[-1] > rows[1]
    assert all(math.log2(n).is_integer() for n in rows)
    assert guess(10_000, max_rows=24) == 16
    # in a format of twice the size half as many fit
    monkeypatch.setenv("NANOCHAT_PRECISION", "float32")
    assert guess(10_000) * 2 == rows[-1]
