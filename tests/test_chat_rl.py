"""RL's own arithmetic: what is trained of an answer, how it compares with the start, and which weights write."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanochat.dataloader import IGNORE
from nanochat.engine import Engine
from nanochat.inference import refresh
from scripts import chat_rl
from scripts.chat_rl import compare_models, make_rollout_model, roll_out, training_arrays
from tests.tiny import tiny_model


def test_sampled_tokens_are_targets_forced_ones_and_the_prompt_are_not():
    row = SimpleNamespace(prompt=[1, 2, 3], tokens=[10, 11, 12, 13], mask=[1, 0, 0, 1])  # 13: the sampled stop token
    inputs, targets, weights = training_arrays([row], [0.25], 256)
    assert inputs.shape == targets.shape == weights.shape == (1, 32)
    assert inputs[0, :6].tolist() == [1, 2, 3, 10, 11, 12]
    assert targets[0, :6].tolist() == [IGNORE, IGNORE, 10, IGNORE, IGNORE, 13]
    assert (targets[0, 6:] == IGNORE).all() and (weights == 0.25).all()


def test_a_model_has_no_divergence_from_itself_and_some_from_another():
    inputs = np.arange(12, dtype=np.int32).reshape(2, 6)
    targets = inputs + 1
    model = tiny_model()
    kl, entropy = compare_models(model, model, inputs, targets, 2)
    assert kl == 0 and entropy > 0
    assert compare_models(model, tiny_model(seed=1), inputs, targets, 2)[0] != 0
    assert compare_models(model, model, inputs, np.full_like(targets, IGNORE), 2) == (0, 0)


@pytest.mark.parametrize("precision, dtype", [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_make_rollout_model_has_the_weights_of_the_last_step_in_the_compute_dtype(monkeypatch, precision, dtype):
    monkeypatch.setenv("NANOCHAT_PRECISION", precision)
    model = tiny_model()
    writer = make_rollout_model(model)
    assert (writer is model) == (dtype == torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    refresh(writer, model)
    for own, written in zip(model.parameters(), writer.parameters(), strict=True):
        assert own.dtype == torch.float32 and written.dtype == dtype and torch.equal(own.to(dtype), written)
    assert writer.cos.dtype == torch.float32


def test_equal_rewards_have_no_advantage_at_all(monkeypatch, tokenizer):
    """Also where their mean in float32 is not exactly the same number."""
    monkeypatch.setattr(chat_rl, "num_samples", 7)
    monkeypatch.setattr(chat_rl, "max_new_tokens", 2)
    engine = Engine(tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=64).eval(), tokenizer)
    for reward in (0.1, 0.7, 1 / 3):
        monkeypatch.setattr(Lengths, "reward", lambda *_, reward=reward: reward)
        _, rewards, advantages = roll_out(engine, Lengths(), range(2))
        assert rewards.tolist() == [np.float32(reward)] * 14 and not advantages.any()


class Lengths:
    """Two questions; an answer is worth its length."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"messages": [{"role": "user", "content": "one " * (index + 1)}, {"role": "assistant", "content": "."}]}

    def reward(self, conversation, completion):
        return float(len(completion))


def test_answers_are_compared_with_the_others_to_their_question_and_differ_from_step_to_step(monkeypatch, tokenizer):
    for name, value in dict(num_samples=3, max_new_tokens=12).items():
        monkeypatch.setattr(chat_rl, name, value)
    engine = Engine(tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=64).eval(), tokenizer)

    def answers(step):
        rows, rewards, advantages = roll_out(engine, Lengths(), range(2 * step, 2 * step + 2))
        assert [len(tokenizer.decode(row.tokens)) for row in rows] == rewards.tolist()
        for question in (slice(0, 3), slice(3, 6)):  # each is asked three times running
            prompt, *others = [row.prompt for row in rows[question]]
            assert others == [prompt, prompt] and len({tuple(row.tokens) for row in rows[question]}) == 3
            assert abs(advantages[question].sum()) < 1e-4 and advantages[question].any()
            assert np.ptp(rewards[question] - advantages[question]) < 1e-4
        assert len({len(row.prompt) for row in rows}) == 2
        return {(len(row.prompt), *row.tokens) for row in rows}

    first = answers(0)
    assert first == answers(0) and first.isdisjoint(answers(1))
