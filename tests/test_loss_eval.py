"""Bits per byte and the loss per target, against sums by hand, for any split into batches and ranks."""

import math

import numpy as np
import pytest
import torch

from nanochat.common import compute_cleanup, compute_init
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import (
    Estimate,
    document_pieces,
    document_windows,
    evaluate_bpb,
    evaluate_loss,
    window_batches,
)
from tests.ranks import on_ranks
from tests.tiny import tiny_model

TOKEN_BYTES = torch.arange(2, 102) % 5  # the tokens 3, 8, 13 ... are special: no bytes


def batch(num_rows=5):
    x, y = torch.randint(0, 100, (2, num_rows, 16), generator=torch.Generator().manual_seed(1))
    y[:, 1], y[0, 4:] = 8, -1  # every row has a special token, one has few targets
    return x, y


def by_hand(model, x, y):
    """(nats, bytes) over ordinary targets, and (nats, number) over all targets, one target at a time."""
    ordinary, every = [0.0, 0], [0.0, 0]
    with torch.no_grad():
        probabilities = model(x).double().softmax(dim=-1)
    for row in range(len(y)):
        for place, target in enumerate(y[row].tolist()):
            if target == -1:
                continue
            nats = -math.log(probabilities[row, place, target])
            every[0], every[1] = every[0] + nats, every[1] + 1
            if num_bytes := int(TOKEN_BYTES[target]):
                ordinary[0], ordinary[1] = ordinary[0] + nats, ordinary[1] + num_bytes
    return ordinary, every


def test_a_uniform_guess_costs_the_log_of_the_vocabulary():
    model = GPT.create(GPTConfig(32, 64, 1, 2, 2, 32), "cpu")  # its head is zero: each of 64 tokens takes 6 bits
    x = torch.tensor([[1, 2, 3, 4]])
    y = torch.tensor([[2, 7, 9, -1]])
    token_bytes = torch.zeros(64, dtype=torch.int64)
    token_bytes[2], token_bytes[7] = 1, 3  # 9 is special
    batches = [(x, y, [[0]])]
    bpb = evaluate_bpb(model, batches, token_bytes)
    assert bpb.value == pytest.approx(2 * 6 / 4)
    assert bpb.stderr is None and bpb.n == 1 and str(bpb) == "3.000000"
    assert evaluate_loss(model, batches) == pytest.approx(math.log(64))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_both_are_the_sums_by_hand_for_any_split(size):
    model, (x, y) = tiny_model(), batch()
    (nats, num_bytes), (all_nats, num_targets) = by_hand(model, x, y)
    documents = torch.arange(len(x))[:, None]  # each row is one
    batches = list(zip(x.split(size), y.split(size), documents.split(size), strict=True))
    bpb = evaluate_bpb(model, batches, TOKEN_BYTES)
    assert bpb.value == pytest.approx(nats / num_bytes / math.log(2), rel=1e-6)
    assert bpb.stderr == pytest.approx(evaluate_bpb(model, [(x, y, documents)], TOKEN_BYTES).stderr, rel=1e-6)
    assert evaluate_loss(model, batches) == pytest.approx(all_nats / num_targets, rel=1e-6)
    assert model.training


def evaluate_on_rank(out, num_rows, documents):
    """Rank 0 has two rows, rank 1 the others, if there are any. Every rank writes what it got."""
    rank, _, _, _ = compute_init("cpu")
    torch.set_num_threads(1)
    x, y = batch()
    rows = slice(0, min(2, num_rows)) if rank == 0 else slice(2, num_rows)
    model, mine = tiny_model(), []
    if len(x[rows]) > 0:
        mine = [(x[rows], y[rows], documents[rows])]
    try:
        result = [*evaluate_bpb(model, mine, TOKEN_BYTES), evaluate_loss(model, mine)]
    except ValueError as error:
        result = str(error)
    torch.save(result, f"{out}{rank}")
    compute_cleanup()


@pytest.mark.parametrize("num_rows, num_documents", [(2, 2), (5, 4)])  # with 2, rank 1 has none
def test_every_rank_gets_the_result_of_all(num_rows, num_documents, tmp_path):
    """Also for a document, number 1, of which each rank has a part."""
    model, (x, y) = tiny_model(), batch()
    documents = np.array([[0], [1], [1], [2], [3]])
    on_ranks(2, evaluate_on_rank, str(tmp_path / "out"), num_rows, documents)
    rows = [(x[:num_rows], y[:num_rows], documents[:num_rows])]
    expected = [*evaluate_bpb(model, rows, TOKEN_BYTES), evaluate_loss(model, rows)]
    assert expected[2] == num_documents and expected[1] > 0
    for rank in range(2):
        assert torch.load(tmp_path / f"out{rank}") == pytest.approx(expected, rel=1e-6)


def test_nothing_to_score_is_an_error_on_every_rank(tmp_path):
    x, y = batch()
    for batches in ([], [(x, torch.full_like(y, -1), [[0]])], [(x, torch.full_like(y, 8), [[0]])]):  # 8 is special
        with pytest.raises(ValueError, match="nothing to score"):
            evaluate_bpb(tiny_model(), batches, TOKEN_BYTES)
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate_loss(tiny_model(), [(x, torch.full_like(y, -1), [[0]])])
    on_ranks(2, evaluate_on_rank, str(tmp_path / "out"), 0, np.zeros((0, 1)))
    assert "nothing to score" in torch.load(tmp_path / "out0") and "nothing to score" in torch.load(tmp_path / "out1")


# -----------------------------------------------------------------------------
# Standard errors


estimate = Estimate.from_sums


def made_up_documents(rng, n):
    """Bits and bytes of n documents: long ones are a little easier, and lengths differ a lot."""
    num_bytes = rng.lognormal(6, 1, n)
    bits = num_bytes * (1.5 - 0.03 * np.log(num_bytes) + rng.normal(0, 0.2, n))
    return bits, num_bytes


def test_the_standard_error_is_the_spread_over_samples_of_documents():
    rng = np.random.default_rng(0)
    estimates = [estimate(*made_up_documents(rng, 200)) for _ in range(1000)]
    spread = np.std([sample.value for sample in estimates])
    stated = np.array([sample.stderr for sample in estimates])
    assert np.sqrt(np.mean(stated**2)) == pytest.approx(spread, rel=0.1)
    truth = estimate(*made_up_documents(rng, 1_000_000)).value
    within = [abs(sample.value - truth) < 2 * sample.stderr for sample in estimates]
    assert 0.90 < np.mean(within) < 0.98  # a normal distribution has 0.954


def test_equal_documents_have_no_error_and_one_document_has_none_to_state():
    num_bytes = np.array([10.0, 200.0, 3000.0])
    assert estimate(1.25 * num_bytes, num_bytes) == (pytest.approx(1.25), pytest.approx(0, abs=1e-12), 3)
    assert estimate(np.array([5.0]), np.array([4.0])) == (1.25, None, 1)
    assert Estimate(1.25, None, 1).as_metrics("val/bpb") == {"val/bpb": 1.25}
    assert Estimate(1.25, 0.5, 9).as_metrics("val/bpb") == {"val/bpb": 1.25, "val/bpb_stderr": 0.5}


# -----------------------------------------------------------------------------
# Whole documents


def test_the_windows_of_a_document_by_hand():
    windows = [(x.tolist(), y.tolist()) for x, y in document_windows([11, 12, 13, 14, 15, 16, 17, 18], 9, 3)]
    assert windows == [
        ([9, 11, 12], [11, 12, 13]),
        ([13, 14, 15], [14, 15, 16]),
        ([15, 16, 17], [-1, 17, 18]),  # two are left, so one more token is context
    ]
    assert [(x.tolist(), y.tolist()) for x, y in document_windows([11, 12], 9, 3)] == [([9, 11], [11, 12])]
    assert document_windows([], 9, 3) == []


def test_the_pieces_of_a_document_by_hand():
    pieces = [(x.tolist(), y.tolist()) for x, y in document_pieces([11, 12, 13, 14, 15], 9, 3)]
    assert pieces == [([9, 11, 12], [11, 12, 13]), ([9, 14], [14, 15])]
    assert document_pieces([], 9, 3) == []


@pytest.mark.parametrize("cut", [document_windows, document_pieces])
@pytest.mark.parametrize("sequence_len", [1, 4, 16])
def test_every_token_of_a_document_is_scored_once(sequence_len, cut):
    for length in range(40):
        scored = []
        for inputs, targets in cut(range(100, 100 + length), 9, sequence_len):
            assert len(inputs) == len(targets) <= sequence_len
            scored += [target for target in targets.tolist() if target != -1]
        assert scored == list(range(100, 100 + length))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_documents_in_batches_are_scored_as_alone(size):
    model = tiny_model()
    generator = torch.Generator().manual_seed(2)
    documents = []
    for length in (5, 1, 40, 16, 23):
        ids = torch.randint(10, 100, (length,), generator=generator).numpy()
        documents.append(document_windows(ids, 0, 16))
    found = evaluate_bpb(model, window_batches(enumerate(documents), size, "cpu"), TOKEN_BYTES)

    bits, num_bytes = np.zeros(5), np.zeros(5)
    for number, windows in enumerate(documents):
        for inputs, targets in windows:
            (window_nats, window_bytes), _ = by_hand(model, torch.tensor(inputs)[None], torch.tensor(targets)[None])
            bits[number] += window_nats / math.log(2)
            num_bytes[number] += window_bytes
    scored = num_bytes > 0
    assert found == pytest.approx(estimate(bits[scored], num_bytes[scored]), rel=1e-5)
