"""Sampling for a batch against sampling row by row, and against sorting the whole vocabulary."""

import random

import pytest
import torch

from nanochat.sampling import Sampling, _topk, penalize, sample_rows, top_logprobs

MIXED = [Sampling(0), Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.3, top_p=0.8), Sampling(1.0, min_p=0.1),
         Sampling(0.9, top_k=20, top_p=0.5, min_p=0.01), Sampling(2.0, top_k=10**6), Sampling(0.5)]


def sample_row(logits, sampling, u):
    return int(sample_rows(logits[None], [sampling], [u]))


def test_a_batch_draws_what_each_row_draws_alone():
    torch.manual_seed(0)
    rng = random.Random(0)
    for _ in range(50):
        logits, u = torch.randn(len(MIXED), 300) * 3, [rng.random() for _ in MIXED]
        batch = sample_rows(logits, MIXED, u).tolist()
        assert batch == [sample_row(*row) for row in zip(logits, MIXED, u, strict=True)]


def reference_nucleus(logits, temperature, top_p):
    """The set of tokens that top_p keeps, by its definition."""
    p = torch.softmax(logits / temperature, dim=-1)
    kept, total = set(), 0.0
    for token in p.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept.add(token)
        total += float(p[token])
    return kept


def test_top_p_keeps_the_nucleus_even_when_it_is_most_of_a_large_vocabulary():
    logits = torch.linspace(0, 1, 2000)[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    draws = 4000
    for top_p in (0.05, 0.9):  # fewer tokens than are looked at first, and more
        u = [i / draws for i in range(draws)]
        drawn = set(sample_rows(logits.expand(draws, -1), [Sampling(1.0, top_p=top_p)] * draws, u).tolist())
        nucleus = reference_nucleus(logits, 1.0, top_p)
        assert drawn <= nucleus and len(drawn) > 0.95 * len(nucleus)


def test_the_topk_random_number_stays_inside():
    logits = torch.full((1, 1000), -50.0)
    logits[0, 3] = 0.0
    for sampling in (Sampling(1.0), Sampling(1.0, top_p=0.99), Sampling(1.0, top_k=7)):
        assert sample_rows(logits, [sampling], [1 - 2**-53]).tolist() == [3]


def test_settings_that_are_0_in_float32_take_the_likeliest():
    logits = torch.randn(1, 1000)
    for sampling in (Sampling(1e-320), Sampling(1.0, top_p=5e-324), Sampling(1e-320, top_k=5, min_p=1.0)):
        assert sample_rows(logits, [sampling], [0.9]).tolist() == [int(logits.argmax())]


def test_logprobs_are_those_of_the_unfiltered_model():
    logits = torch.randn(3, 40)
    reference = torch.log_softmax(logits, dim=-1)
    for row, (token, (logprob, top)) in enumerate(zip([4, 0, 39], top_logprobs(logits, [4, 0, 39], 3), strict=True)):
        assert logprob == float(reference[row, token])
        assert top == list(zip(*(x.tolist() for x in reversed(reference[row].topk(3))), strict=True))


@pytest.mark.parametrize("settings", [
    {"repetition_penalty": 1.3}, {"repetition_penalty": 0.5}, {"presence_penalty": 1.5}, {"frequency_penalty": -0.7},
    {"logit_bias": {0: -100.0, 5: 3.5}},
    {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3, "logit_bias": {2: 7.0}}])
def test_penalties_follow_their_definitions(settings):
    logits, prompt, tokens = torch.randn(12), [0, 1, 1, 2], [2, 3, 3, 3, 4]
    sampling = Sampling(**settings)
    expected = []
    for token, logit in enumerate(logits.tolist()):
        logit += sampling.logit_bias.get(token, 0)
        if token in prompt + tokens:
            factor = sampling.repetition_penalty
            logit = logit / factor if logit > 0 else logit * factor
        logit -= sampling.frequency_penalty * tokens.count(token)
        logit -= sampling.presence_penalty * (token in tokens)
        expected.append(logit)
    assert sampling.has_penalties and not Sampling().has_penalties
    penalize(logits, sampling, prompt, tokens)
    torch.testing.assert_close(logits, torch.tensor(expected))


def test_greedy_top_k_one_and_tiny_top_p_agree():
    logits = torch.randn(50)
    best = int(logits.argmax())
    for sampling in (Sampling(0), Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1.0, min_p=1.0)):
        assert sample_row(logits, sampling, 0.999) == best


def test_top_k_beyond_the_vocabulary_and_zero_switch_it_off():
    logits = torch.tensor([0.0, 1.0, 2.0])
    draws = [{sample_row(logits, Sampling(1.0, top_k=k), u / 100) for u in range(100)} for k in (None, 0, 3, 99)]
    assert draws == [{0, 1, 2}] * 4


def test_sampling_follows_the_softmax():
    logits, rng = torch.tensor([0.0, 1.0, 2.0, -1.0]), random.Random(0)
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sample_row(logits, Sampling(0.8), rng.random())] += 1
    torch.testing.assert_close(counts / 4000, torch.softmax(logits / 0.8, 0), atol=0.03, rtol=0)


def test_filters_never_let_a_dropped_token_through():
    logits = torch.tensor([3.0, 2.9, -5.0, -6.0])
    for sampling in (Sampling(1.0, top_p=0.9), Sampling(1.0, min_p=0.5), Sampling(1.0, top_k=2)):
        assert {sample_row(logits, sampling, u) for u in (*(i / 1000 for i in range(1000)), 1 - 2**-53)} == {0, 1}


@pytest.mark.parametrize("bad", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2},
                                 {"repetition_penalty": 0}])
def test_bad_sampling_settings_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Sampling(**bad)


@pytest.mark.parametrize("V, K", [(8192, 50), (8192 + 17, 50), (8192, 1), (300, 50)])
def test_the_topk_are_found_block_by_block(V, K):
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(V + K))
    logits[0, V - 3:], logits[1, :3] = 9.0, torch.tensor([7.0, 9.0, 8.0])  # at the very end, and all in one block
    values, ids = _topk(logits, K)
    assert values.equal(logits.topk(K).values) and values.equal(logits.gather(1, ids))
    assert all(len(set(row)) == K for row in ids.tolist())
