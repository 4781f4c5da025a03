"""The choice of number format, the autocast context, and the products of packed and of 8-bit weights."""

import copy
import time

import pytest
import torch

from nanochat import inference, precision
from nanochat.decoder import Decoder, Row
from nanochat.device_speed import core_matmul_rate
from nanochat.gpt import Linear
from nanochat.inference import prepare, refresh
from nanochat.ops import cast_weight
from nanochat.precision import get_autocast_ctx, get_precision, get_precision_dtype, has_native_bf16
from nanochat.sampling import Sampling
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def unset(monkeypatch):
    """Nothing is asked for, and this process has decided nothing yet."""
    monkeypatch.delenv("NANOCHAT_PRECISION", raising=False)
    monkeypatch.setattr(precision, "_settled", {})


@pytest.fixture
def rates(monkeypatch):
    """GFLOP/s of a CPU that multiplies bfloat16, to be changed by the test. Counts how often they are asked for."""
    rates = {torch.float32: 100.0, torch.bfloat16: 100.0, "asked": 0}

    def rate(width, rows, dtype):
        rates["asked"] += 1
        return 1e9 * rates[dtype]
    monkeypatch.setattr(precision, "has_native_bf16", lambda device_type: True)
    monkeypatch.setattr(precision, "core_matmul_rate", rate)
    return rates


@pytest.mark.parametrize("name, dtype", [("bfloat16", torch.bfloat16), ("float16", torch.float16),
                                         ("float32", torch.float32)])
def test_the_environment_decides(monkeypatch, name, dtype):
    monkeypatch.setenv("NANOCHAT_PRECISION", name)
    assert get_precision("cpu") == name and get_precision_dtype("cpu") == dtype


@pytest.mark.parametrize("bfloat16, chosen", [(50, "float32"), (100, "float32"), (108, "float32"), (120, "bfloat16")])
def test_the_faster_format_is_taken_and_float32_unless_the_gap_is_clear(bfloat16, chosen, rates):
    rates[torch.bfloat16] = bfloat16
    note = precision.settle_precision(CPU, 256)
    assert get_precision("cpu") == chosen and get_precision_dtype("cpu") == precision.DTYPES[chosen]
    assert note == f"a core multiplies 100 GFLOP/s in float32, {bfloat16} in bfloat16"


def test_a_process_decides_once(rates):
    rates[torch.bfloat16] = 200
    precision.settle_precision(CPU, 256)
    rates[torch.bfloat16] = 50
    assert precision.settle_precision(CPU, 768, decoding=True) == ""
    assert get_precision("cpu") == "bfloat16" and rates["asked"] == 2


def test_without_a_model_the_default_is_measured_too(rates):
    rates[torch.bfloat16] = 200
    assert get_precision("cpu") == get_precision("cpu") == "bfloat16" and rates["asked"] == 2


@pytest.mark.parametrize("saved", ["float32", "bfloat16"])
def test_a_resumed_run_computes_as_it_began(saved, rates):
    rates[torch.bfloat16] = 50 if saved == "bfloat16" else 200
    assert precision.settle_precision(CPU, 256, saved=saved) == "as the run began"
    assert get_precision("cpu") == saved and rates["asked"] == 0


def test_what_the_user_asks_for_comes_before_what_the_run_began_with(rates, monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRECISION", "float32")
    assert precision.settle_precision(CPU, 256, saved="bfloat16") == "the run began in bfloat16"
    assert get_precision("cpu") == "float32" and rates["asked"] == 0


def test_a_cpu_that_only_emulates_bfloat16_is_not_timed(rates, monkeypatch):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device_type: False)
    assert "does not multiply bfloat16" in precision.settle_precision(CPU, 256)
    assert get_precision("cpu") == "float32" and rates["asked"] == 0


def test_a_rate_is_measured_quickly_and_once():
    core_matmul_rate.cache_clear()
    start = time.thread_time()
    rate = core_matmul_rate(128, 16, torch.float32)
    assert time.thread_time() - start < 0.25 and 1e8 < rate < 1e13
    assert core_matmul_rate(128, 16, torch.float32) == rate


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_small_cast_is_autocasts(requires_grad):
    weight = torch.randn(64, 32, requires_grad=requires_grad)
    cast = cast_weight(weight, torch.bfloat16)
    assert torch.equal(cast, weight.bfloat16()) and cast.requires_grad == requires_grad
    if requires_grad:
        cast.square().sum().backward()
        assert weight.grad.dtype == torch.float32
        assert torch.equal(weight.grad, (2 * weight.bfloat16()).float())
    assert cast_weight(weight, torch.float32) is weight


def test_fp8_falls_back_and_says_so(monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRECISION", "fp8")
    assert get_precision("cpu") in ("bfloat16", "float32")
    assert "NANOCHAT_PRECISION=fp8 needs compute capability 9.0" in precision.describe_precision("cpu")


def test_an_unknown_name_is_refused(monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRECISION", "int3")
    with pytest.raises(ValueError, match="NANOCHAT_PRECISION=int3.*\n.*bfloat16"):
        get_precision("cpu")


def test_autocast_computes_in_the_dtype_and_ends_with_the_block(monkeypatch):
    a = torch.randn(4, 4)
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        monkeypatch.setenv("NANOCHAT_PRECISION", name)
        with get_autocast_ctx(torch.device("cpu")):
            assert (a @ a).dtype == dtype
        assert (a @ a).dtype == torch.float32


def packed_model(monkeypatch):
    monkeypatch.setenv("NANOCHAT_PRECISION", "bfloat16")
    if not has_native_bf16("cpu"):
        pytest.skip("this CPU does not multiply bfloat16 natively")
    return prepare(tiny_model())


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (8, 1), (70, 3)])
def test_a_packed_model_says_what_an_unpacked_one_does(monkeypatch, shape):
    model = packed_model(monkeypatch)
    blocks = model.transformer.h
    assert all(block.attn.packed is not None and block.mlp.c_fc.packed is not None for block in blocks)
    idx = torch.randint(0, 100, shape)
    packed = model(idx)
    with monkeypatch.context() as patch:
        patch.setattr(inference, "_can_pack", lambda model: False)
        plain = prepare(tiny_model())
    assert type(plain.lm_head) is Linear and plain.transformer.h[0].attn.packed is None
    torch.testing.assert_close(packed, plain(idx), atol=0.05, rtol=0)  # logits up to 2.4
    torch.testing.assert_close(packed.mean(), plain(idx).mean(), atol=0.002, rtol=0)


@pytest.mark.parametrize("name", ["c_q", "c_k", "c_v", "c_proj"])
def test_packed_weights_follow_the_parameters_that_rl_writes(monkeypatch, name):
    model = packed_model(monkeypatch)
    trained = tiny_model()
    getattr(trained.transformer.h[0].attn, name).weight.data.mul_(-3)
    refresh(model, trained)
    for shape in [(2, 16), (1, 1)]:
        idx = torch.randint(0, 100, shape)
        torch.testing.assert_close(model(idx), prepare(copy.deepcopy(trained))(idx), atol=0, rtol=0)


@pytest.mark.parametrize("name, tolerance", [("bfloat16", 0.1), ("float16", 0.015)])  # of logits up to 2.4
@pytest.mark.parametrize("stored", [False, True])
def test_cached_decoding_in_16_bits_is_the_full_forward(name, tolerance, stored, monkeypatch):
    """Of a model in float32, as while it trains, and of one that is stored in the compute dtype."""
    monkeypatch.setenv("NANOCHAT_PRECISION", name)
    model = tiny_model().eval().requires_grad_(False)
    decoder = Decoder(prepare(model) if stored else model, num_rows=2)
    for prompt in ([1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4, 3, 2, 1]):
        *_, (_, logits) = decoder.prefill(prompt)
        decoder.admit(Row(prompt, Sampling(1.0, 0), 30, frozenset()), logits)
    for _ in range(8):
        decoder.step()
        for row, cached in zip(decoder.rows, decoder.logits, strict=True):
            with get_autocast_ctx("cpu"):
                full = model(torch.tensor([row.prompt + row.tokens]))[0, -1]
            torch.testing.assert_close(cached, full, atol=tolerance, rtol=0)
    assert decoder.cache.k.dtype == decoder.cache.v.dtype == decoder.staging.k.dtype == precision.DTYPES[name]


@pytest.mark.parametrize("before", [0, 1, 63, 64, 65, 100, 130, 159])
def test_a_prompt_gives_the_same_bits_whatever_was_read_before(before, monkeypatch):
    """`before`: tokens that it shares with the prompt before it."""
    monkeypatch.setenv("NANOCHAT_PRECISION", "bfloat16")
    model = prepare(tiny_model(sequence_len=256, n_embd=128).eval())
    prompt = torch.randint(0, 100, (160,), generator=torch.Generator().manual_seed(0)).tolist()
    fresh, used = Decoder(model, 1), Decoder(model, 1)
    expected = fresh.read_prompt(prompt)
    used.read_prompt([*prompt[:before], 3, 1, 4])
    assert torch.equal(used.read_prompt(prompt), expected)
    assert torch.equal(used.staging.k[..., :160, :], fresh.staging.k[..., :160, :])
    assert torch.equal(used.staging.v[..., :160, :], fresh.staging.v[..., :160, :])


def test_matmuls_are_done_with_few_numbers_of_rows():
    """oneDNN makes and keeps code for each: a server whose prompts have any length grew by 600 MB."""
    sizes = {num_rows: inference.round_up(num_rows) for num_rows in range(1, 513)}
    assert len(set(sizes.values())) <= 32 and len({sizes[num_rows] for num_rows in range(1, 65)}) <= 20
    assert all(num_rows <= size < 1.25 * num_rows for num_rows, size in sizes.items())


@pytest.mark.skipif(not precision.has_native_bf16("cpu"), reason="needs a CPU that multiplies bfloat16")
@pytest.mark.parametrize("shape", [(2, 1), (1, 9), (9, 1), (3, 11), (1, 70)])
def test_rows_of_zeros_change_no_result(shape):
    weight = torch.randn(24, 16).bfloat16()
    x = torch.randn(*shape, 16).bfloat16()
    y = inference.packed_linear(x, weight, inference.pack(weight))
    torch.testing.assert_close(y, torch.nn.functional.linear(x, weight), rtol=2e-2, atol=2e-2)
