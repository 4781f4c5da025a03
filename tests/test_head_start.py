"""The head start: followers are counted right, the fit comes close to what the counts allow, on any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch

from nanochat.common import UserError, compute_cleanup, compute_init
from nanochat.gpt import GPT, GPTConfig
from nanochat.head_start import LOSS_SCALE, add_gradients, choose_head_start, count_followers, fit_followers
from tests.ranks import on_ranks

BOS, VOCAB = 31, 32


def documents(count=40, length=50, seed=0):
    """Random walks in which each token has three followers of unlike frequency, as a stream of (position, ids)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        ids = [int(rng.integers(BOS))]
        for _ in range(length - 1):
            ids.append((3 * ids[-1] + int(rng.choice(3, p=[0.6, 0.3, 0.1]))) % BOS)
        yield (0, 0, i), np.array(ids, dtype=np.int32)


@pytest.mark.parametrize("max_tokens", [10**6, 777])
def test_followers_are_counted_as_a_loop_would(max_tokens):
    stream = [int(token) for _, ids in documents() for token in (BOS, *ids)][:max_tokens]
    expected = Counter(zip(stream[:-1], stream[1:], strict=True))
    followers = count_followers(documents(), BOS, VOCAB, max_tokens)
    shares = followers.shares(np.arange(VOCAB))
    for token in range(VOCAB):
        total = sum(n for (first, _), n in expected.items() if first == token)
        assert followers.totals[token] == total
        for after in range(VOCAB):
            assert shares[token, after] == pytest.approx(expected[token, after] / max(total, 1))
    assert followers.totals.sum() == len(stream) - 1


@pytest.mark.parametrize("ids", [[], [7]])
def test_data_without_a_pair_is_named(ids):
    with pytest.raises(UserError, match="the data holds no text"):
        count_followers([((0, 0, 0), np.array(ids, dtype=np.int32))], BOS, VOCAB)


@pytest.mark.parametrize("run_tokens, vocab_size, expected", [
    (20 * 512, 65536, False), (3_932_160, 16384, True), (550 * 2048, 2048, False), (11 * 10**9, 65536, False)])
def test_a_short_run_with_a_large_vocabulary_gains(run_tokens, vocab_size, expected):
    """A trial of 20 steps, d4 on real text, the toy world, a d20's horizon."""
    assert choose_head_start(None, run_tokens, vocab_size) == expected
    assert choose_head_start(not expected, run_tokens, vocab_size) != expected


def fresh_model():
    torch.manual_seed(0)
    return GPT.create(GPTConfig(8, VOCAB, n_layer=2, n_head=1, n_kv_head=1, n_embd=64), "cpu")


def cross_entropies(model, followers, contexts):
    """By the whole model, whose blocks add nothing: (R,) nats."""
    log_p = model(torch.from_numpy(contexts)[:, None])[:, 0].log_softmax(dim=1)
    return -(torch.from_numpy(followers.shares(contexts)) * log_p).sum(dim=1)


@torch.no_grad()
def nats_a_token(model, followers):
    contexts = np.flatnonzero(followers.totals)
    return np.average(cross_entropies(model, followers, contexts), weights=followers.totals[contexts])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_the_cross_entropy_with_soft_targets(monkeypatch, precision):
    monkeypatch.setenv("NANOCHAT_PRECISION", precision)
    monkeypatch.setattr("nanochat.head_start.CHUNK_LOGITS", 2 * VOCAB)  # five contexts in three chunks
    followers = count_followers(documents(), BOS, VOCAB)
    model = fresh_model()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    parameters = (model.transformer.wte.weight, model.lm_head.weight)
    contexts, weights = np.array([7, BOS, 2, 30, 3]), np.array([0.2, 0.3, 0.1, 0.1, 0.3])
    loss = add_gradients(model, followers, contexts, weights)
    ours = [p.grad / LOSS_SCALE for p in parameters]
    expected = (cross_entropies(model, followers, contexts) * torch.from_numpy(weights)).sum()
    theirs = torch.autograd.grad(expected, parameters)
    tolerance = 1e-5 if precision == "float32" else 0.02
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for grad, exact in zip(ours, theirs, strict=True):
        assert grad.any()
        torch.testing.assert_close(grad, exact, atol=tolerance / 10, rtol=tolerance)


def test_the_fit_comes_close_to_what_the_counts_allow():
    followers = count_followers(documents(), BOS, VOCAB)
    shares = followers.shares(np.flatnonzero(followers.totals))
    entropies = -(shares * np.log(np.maximum(shares, 1e-9))).sum(axis=1)
    entropy = np.average(entropies, weights=followers.totals[followers.totals > 0])
    model = fresh_model()
    blocks = [p.clone() for p in model.transformer.h.parameters()]
    assert nats_a_token(model, followers) == pytest.approx(np.log(VOCAB), abs=1e-4)
    fit_followers(model, followers, seed=0)
    assert entropy < nats_a_token(model, followers) < entropy + 0.02
    assert all(torch.equal(p, before) for p, before in zip(model.transformer.h.parameters(), blocks, strict=True))
    assert all(p.grad is None for p in model.parameters())


def fit_and_save(out):
    rank, _, _, _ = compute_init("cpu")
    followers = count_followers(documents(), BOS, VOCAB)
    model = fresh_model()
    fit_followers(model, followers, seed=0, steps=10)
    if rank == 0:
        torch.save(model.state_dict(), out)
    compute_cleanup()


def test_any_number_of_ranks_fits_the_same(tmp_path):
    for ranks in (1, 2, 3):
        on_ranks(ranks, fit_and_save, tmp_path / f"{ranks}.pt")
    one = torch.load(tmp_path / "1.pt")
    for ranks in (2, 3):
        other = torch.load(tmp_path / f"{ranks}.pt")
        # Adam divides by the gradient: where that is tiny, its rounding shows
        assert all(torch.allclose(one[name], other[name], atol=2e-3) for name in one)
