"""The head start: followers are counted right, the fit comes close to what the counts allow, on any number of ranks."""

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nanochat.bigrams import DISCOUNT, LOSS_SCALE, _add_gradients, count_followers, fit_followers, pays
from nanochat.common import UserError, compute_cleanup, compute_init
from nanochat.gpt import GPT, GPTConfig
from tests.ranks import on_ranks

BOS, VOCAB, PAIRS = 31, 32, 40


def documents(count=40, length=50, seed=0):
    """Random walks in which each token has three followers of unlike frequency, as a stream of (position, ids)."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        ids = [int(rng.integers(BOS))]
        for _ in range(length - 1):
            ids.append((3 * ids[-1] + int(rng.choice(3, p=[0.6, 0.3, 0.1]))) % BOS)
        yield (0, 0, i), np.array(ids, dtype=np.int32)


def counted(followers):
    """{((token before or -1, token), next token): how often}"""
    tokens, before = followers.tokens(np.arange(len(followers.totals)))
    return {((int(before[c]), int(tokens[c])), int(b)): int(n) for c in range(len(tokens))
            for s in [slice(followers.starts[c], followers.starts[c + 1])]
            for b, n in zip(followers.next_ids[s], followers.counts[s], strict=True)}


@pytest.mark.parametrize("num_pairs", [0, 7, VOCAB**2])
@pytest.mark.parametrize("max_tokens", [10**6, 777])
def test_followers_are_counted_as_a_loop_would(max_tokens, num_pairs):
    stream = [int(token) for _, ids in documents() for token in (BOS, *ids)][:max_tokens]
    pairs = list(zip(stream[:-1], stream[1:], strict=True))
    frequencies = sorted(Counter(pairs[:-1]).items(), key=lambda item: (-item[1], item[0]))  # with a follower
    listed = {pair for pair, _ in frequencies[:num_pairs]}
    contexts = [(-1, stream[0]), *(pair if pair in listed else (-1, pair[1]) for pair in pairs[:-1])]
    expected = Counter(zip(contexts, stream[1:], strict=True))
    followers = count_followers(documents(), BOS, VOCAB, num_pairs, max_tokens)
    assert counted(followers) == expected
    tokens, before = followers.tokens(np.arange(VOCAB + len(listed)))
    for context, total in zip(zip(before, tokens, strict=True), followers.totals, strict=False):
        assert total == sum(n for (c, _), n in expected.items() if c == context)
    assert followers.totals.sum() == len(stream) - 1 and len(followers.pairs) == num_pairs


@pytest.mark.parametrize("ids", [[], [7]])
def test_data_without_a_pair_is_named(ids):
    with pytest.raises(UserError, match="the data holds no text"):
        count_followers([((0, 0, 0), np.array(ids, dtype=np.int32))], BOS, VOCAB, PAIRS)


@pytest.mark.parametrize("run_tokens, vocab_size, expected", [
    (20 * 512, 65536, False), (3_932_160, 16384, True), (550 * 2048, 2048, False), (11 * 10**9, 65536, False)])
def test_a_short_run_with_a_large_vocabulary_gains(run_tokens, vocab_size, expected):
    """A trial of 20 steps, d4 on real text, the toy world, a d20's horizon."""
    assert pays(run_tokens, vocab_size) == expected


def soft_table(followers, contexts, times=5000):
    """The shares of contexts (R,) as (R, V)."""
    table = np.zeros((len(contexts), VOCAB), dtype=np.float32)
    draws = (np.arange(times) + 0.5) / times  # every follower of a token in proportion
    rows, next_ids, shares = followers.soft_targets(contexts, np.tile(draws, (len(contexts), 1)))
    np.add.at(table, (rows, next_ids), shares)
    return table


def test_soft_targets_are_discounted_shares_of_each_contexts_followers():
    followers = count_followers(documents(), BOS, VOCAB, PAIRS)
    counts, anywhere = counted(followers), np.zeros((VOCAB, VOCAB))
    for ((_, token), after), n in counts.items():
        anywhere[token, after] += n
    contexts = np.array([7, BOS, VOCAB + 2, 3, VOCAB + PAIRS - 1])
    for shares, token, before in zip(soft_table(followers, contexts), *followers.tokens(contexts), strict=True):
        seen = np.array([counts.get(((before, token), after), 0) for after in range(VOCAB)])
        discounts = DISCOUNT * (seen > 0) * (before >= 0)
        expected = (seen - discounts + discounts.sum() * anywhere[token] / anywhere[token].sum()) / seen.sum()
        assert np.allclose(shares, expected, atol=1e-3)
        assert np.allclose(shares, seen / seen.sum()) == (before < 0)


def fresh_model(followers):
    torch.manual_seed(0)
    pairs = len(followers.pairs)
    model = GPT.create(GPTConfig(8, VOCAB, n_layer=2, n_head=1, n_kv_head=1, n_embd=64, pair_embeds=pairs), "cpu")
    if pairs:
        model.pairs.copy_(torch.from_numpy(followers.pairs))
    return model


def logits_after(model, followers, contexts):
    """Through blocks that add nothing: (contexts, V)."""
    tokens, before = map(torch.from_numpy, followers.tokens(contexts))
    lone = before < 0  # a token at the start of a row
    ids = torch.stack((torch.where(lone, tokens, before), tokens), dim=1)
    logits = model(ids)
    return torch.where(lone[:, None], logits[:, 0], logits[:, 1])


def nats_a_token(model, followers):
    contexts = np.flatnonzero(followers.totals)
    with torch.no_grad():
        log_p = logits_after(model, followers, contexts).log_softmax(dim=1)
    totals = followers.totals[contexts, None]
    return -np.sum(totals * soft_table(followers, contexts) * log_p.numpy()) / totals.sum()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_gradient_is_that_of_the_cross_entropy_with_soft_targets(monkeypatch, precision):
    monkeypatch.setenv("NANOCHAT_PRECISION", precision)
    followers = count_followers(documents(), BOS, VOCAB, PAIRS)
    model = fresh_model(followers)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    parameters = (model.transformer.wte.weight, model.pair_embeds.requires_grad_(), model.lm_head.weight)
    contexts, weights = np.array([7, BOS, VOCAB + 2, VOCAB + PAIRS - 1, 3]), np.array([0.2, 0.3, 0.1, 0.1, 0.3])
    draws = np.tile((np.arange(30) + 0.5) / 30, (5, 1))  # what soft_table takes: so that followers come twice
    loss = _add_gradients(model, followers, contexts, weights, draws)
    ours = [p.grad.clone() / LOSS_SCALE for p in parameters]
    for p in parameters:
        p.grad = None
    shares = torch.from_numpy(soft_table(followers, contexts, 30))
    logits = logits_after(model, followers, contexts)
    expected = (F.cross_entropy(logits, shares, reduction="none") * torch.from_numpy(weights)).sum()
    expected.backward()
    tolerance = 1e-5 if precision == "float32" else 0.02
    assert loss.item() == pytest.approx(expected.item(), rel=tolerance)
    for grad, parameter in zip(ours, parameters, strict=True):
        assert grad.any()
        torch.testing.assert_close(grad, parameter.grad[: len(grad)], atol=tolerance / 10, rtol=tolerance)


@pytest.mark.parametrize("num_pairs", [0, PAIRS])
def test_the_fit_comes_close_to_what_the_counts_allow(num_pairs):
    followers = count_followers(documents(), BOS, VOCAB, num_pairs)
    contexts = np.flatnonzero(followers.totals)
    shares = soft_table(followers, contexts)
    entropy = -np.sum(followers.totals[contexts, None] * shares * np.log(np.maximum(shares, 1e-9)))
    entropy /= followers.totals.sum()
    model = fresh_model(followers)
    blocks = [p.clone() for p in model.transformer.h.parameters()]
    assert nats_a_token(model, followers) == pytest.approx(np.log(VOCAB), abs=1e-4)
    fit_followers(model, followers, seed=0)
    assert entropy < nats_a_token(model, followers) < entropy + 0.02
    assert all(torch.equal(p, before) for p, before in zip(model.transformer.h.parameters(), blocks, strict=True))
    assert all(p.grad is None for p in model.parameters())
    if num_pairs:
        assert model.pair_embeds[:-1].any() and not model.pair_embeds[-1].any()  # the row of all other pairs
        assert not model.pair_embeds.requires_grad and model.pair_embeds.grad is None


def fit_and_save(out):
    rank, _, _, _ = compute_init("cpu")
    followers = count_followers(documents(), BOS, VOCAB, PAIRS)
    model = fresh_model(followers)
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
