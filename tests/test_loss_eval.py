"""Bits per byte and the loss per target, against sums by hand, for any split into batches and ranks."""

import math

import pytest
import torch

from nanochat.common import compute_cleanup, compute_init
from nanochat.gpt import GPT, GPTConfig
from nanochat.loss_eval import document_windows, evaluate_bpb, evaluate_loss, window_batches
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
    assert evaluate_bpb(model, [(x, y)], token_bytes) == pytest.approx(2 * 6 / 4)
    assert evaluate_loss(model, [(x, y)]) == pytest.approx(math.log(64))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_both_are_the_sums_by_hand_for_any_split(size):
    model, (x, y) = tiny_model(), batch()
    (nats, num_bytes), (all_nats, num_targets) = by_hand(model, x, y)
    batches = list(zip(x.split(size), y.split(size), strict=True))
    assert evaluate_bpb(model, batches, TOKEN_BYTES) == pytest.approx(nats / num_bytes / math.log(2), rel=1e-6)
    assert evaluate_loss(model, batches) == pytest.approx(all_nats / num_targets, rel=1e-6)
    assert model.training


def evaluate_on_rank(out, num_batches):
    """Batch i goes to rank i. Every rank writes what it got."""
    rank, _, _, _ = compute_init("cpu")
    torch.set_num_threads(1)
    model, mine = tiny_model(), [batch()][:num_batches][rank: rank + 1]
    try:
        result = [evaluate_bpb(model, mine, TOKEN_BYTES), evaluate_loss(model, mine)]
    except ValueError as error:
        result = str(error)
    torch.save(result, f"{out}{rank}")
    compute_cleanup()


def test_a_rank_without_rows_gets_the_result_of_all(tmp_path):
    model = tiny_model()
    on_ranks(2, evaluate_on_rank, str(tmp_path / "out"), 1)
    expected = [evaluate_bpb(model, [batch()], TOKEN_BYTES), evaluate_loss(model, [batch()])]
    for rank in range(2):
        assert torch.load(tmp_path / f"out{rank}") == pytest.approx(expected, rel=1e-6)


def test_nothing_to_score_is_an_error_on_every_rank(tmp_path):
    x, y = batch()
    for batches in ([], [(x, torch.full_like(y, -1))], [(x, torch.full_like(y, 8))]):  # 8 is special
        with pytest.raises(ValueError, match="nothing to score"):
            evaluate_bpb(tiny_model(), batches, TOKEN_BYTES)
    with pytest.raises(ValueError, match="nothing to score"):
        evaluate_loss(tiny_model(), [(x, torch.full_like(y, -1))])
    on_ranks(2, evaluate_on_rank, str(tmp_path / "out"), 0)
    assert "nothing to score" in torch.load(tmp_path / "out0") and "nothing to score" in torch.load(tmp_path / "out1")


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


@pytest.mark.parametrize("sequence_len", [1, 4, 16])
def test_every_token_of_a_document_is_scored_once(sequence_len):
    for length in range(40):
        scored = []
        for inputs, targets in document_windows(range(100, 100 + length), 9, sequence_len):
            assert len(inputs) == len(targets) <= sequence_len
            scored += [target for target in targets.tolist() if target != -1]
        assert scored == list(range(100, 100 + length))


@pytest.mark.parametrize("size", [1, 2, 7])
def test_documents_in_batches_are_scored_as_alone(size):
    model = tiny_model()
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(10, 100, (length,), generator=generator).numpy() for length in (5, 1, 40, 16, 23)]
    windows = [window for ids in documents for window in document_windows(ids, 0, 16)]
    found = evaluate_bpb(model, window_batches(windows, size, "cpu"), TOKEN_BYTES)

    nats = num_bytes = 0
    for inputs, targets in windows:
        (window_nats, window_bytes), _ = by_hand(model, torch.tensor(inputs)[None], torch.tensor(targets)[None])
        nats += window_nats
        num_bytes += window_bytes
    assert found == pytest.approx(nats / num_bytes / math.log(2), rel=1e-6)
