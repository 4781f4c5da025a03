"""The head start: pairs are counted right, the fit comes close to what the counts allow, on any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.bigrams import CONTEXTS, _add_gradients, count_pairs, fit_pairs, pays
from nanochat.common import UserError, compute_cleanup, compute_init
from nanochat.gpt import GPT, GPTConfig
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


def counted(pairs):
    return {(a, int(b)): int(n) for a in range(VOCAB) for s in [slice(pairs.starts[a], pairs.starts[a + 1])]
            for b, n in zip(pairs.next_ids[s], pairs.counts[s], strict=True)}


@pytest.mark.parametrize("max_tokens", [10**6, 777])
def test_pairs_are_counted_as_a_loop_would(max_tokens):
    stream = [int(token) for _, ids in documents() for token in (BOS, *ids)][:max_tokens]
    expected = Counter(zip(stream[:-1], stream[1:], strict=True))
    pairs = count_pairs(documents(), BOS, VOCAB, max_tokens)
    assert counted(pairs) == expected
    assert pairs.totals.tolist() == [sum(n for (a, _), n in expected.items() if a == token) for token in range(VOCAB)]


def test_data_without_a_pair_is_named():
    with pytest.raises(UserError, match="the data holds no text"):
        count_pairs([((0, 0, 0), np.array([], dtype=np.int32))], BOS, VOCAB)


@pytest.mark.parametrize("run_tokens, vocab_size, expected", [
    (20 * 512, 65536, False), (3_932_160, 16384, True), (550 * 2048, 2048, False), (11 * 10**9, 65536, False)])
def test_a_short_run_with_a_large_vocabulary_gains(run_tokens, vocab_size, expected):
    """A trial of 20 steps, d4 on real text, the toy world, a d20's horizon."""
    assert pays(run_tokens, vocab_size) == expected


def test_soft_targets_are_shares_of_each_contexts_followers():
    pairs = count_pairs(documents(), BOS, VOCAB)
    contexts = np.array([7, BOS, 3])
    rows, next_ids, shares = pairs.soft_targets(contexts)
    assert np.allclose(np.bincount(rows, shares), 1)
    for row, token, share in zip(rows, next_ids, shares, strict=True):
        a = int(contexts[row])
        assert share == pytest.approx(counted(pairs)[a, int(token)] / pairs.totals[a])


def fresh_model():
    torch.manual_seed(0)
    return GPT.create(GPTConfig(8, VOCAB, n_layer=2, n_head=1, n_kv_head=1, n_embd=64), "cpu")


def nats_per_pair(model, pairs):
    with torch.no_grad():
        log_p = model(torch.arange(VOCAB)[:, None]).squeeze(1).log_softmax(dim=1)
    return -sum(n * log_p[a, b].item() for (a, b), n in counted(pairs).items()) / pairs.totals.sum()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_the_cross_entropy_with_soft_targets(monkeypatch, precision):
    monkeypatch.setenv("NANOCHAT_PRECISION", precision)
    pairs, model = count_pairs(documents(), BOS, VOCAB), fresh_model()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    contexts, weights = np.array([7, BOS, 3]), np.array([0.2, 0.5, 0.3])
    loss = _add_gradients(model, pairs, contexts, weights)
    ours = [p.grad.clone() / CONTEXTS for p in (model.transformer.wte.weight, model.lm_head.weight)]
    model.zero_grad()
    shares = torch.zeros(3, VOCAB)
    rows, next_ids, values = pairs.soft_targets(contexts)
    shares[rows, next_ids] = torch.from_numpy(values)
    logits = model(torch.from_numpy(contexts)[:, None]).squeeze(1)  # through blocks that add nothing
    expected = (F.cross_entropy(logits, shares, reduction="none") * torch.from_numpy(weights)).sum()
    expected.backward()
    tolerance = 1e-5 if precision == "float32" else 0.02
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for grad, parameter in zip(ours, (model.transformer.wte.weight, model.lm_head.weight), strict=True):
        torch.testing.assert_close(grad, parameter.grad[: len(grad)], atol=tolerance / 10, rtol=tolerance)


def test_the_fit_comes_close_to_what_the_counts_allow():
    pairs = count_pairs(documents(), BOS, VOCAB)
    entropy = -sum(n * np.log(n / pairs.totals[a]) for (a, _), n in counted(pairs).items()) / pairs.totals.sum()
    model = fresh_model()
    blocks = [p.clone() for p in model.transformer.h.parameters()]
    assert nats_per_pair(model, pairs) == pytest.approx(np.log(VOCAB), abs=1e-4)
    fit_pairs(model, pairs, seed=0)
    assert entropy < nats_per_pair(model, pairs) < entropy + 0.02
    assert all(torch.equal(p, before) for p, before in zip(model.transformer.h.parameters(), blocks, strict=True))
    assert all(p.grad is None for p in model.parameters())


def fit_and_save(out):
    rank, _, _, _ = compute_init("cpu")
    model = fresh_model()
    fit_pairs(model, count_pairs(documents(), BOS, VOCAB), seed=0, steps=10)
    if rank == 0:
        torch.save(model.state_dict(), out)
    compute_cleanup()


def test_any_number_of_ranks_fits_the_same(tmp_path):
    for ranks in (1, 2, 3):
        on_ranks(ranks, fit_and_save, tmp_path / f"{ranks}.pt")
    one = torch.load(tmp_path / "1.pt")
    for ranks in (2, 3):
        other = torch.load(tmp_path / f"{ranks}.pt")
        assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
