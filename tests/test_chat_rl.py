"""RL's own arithmetic: what is trained of an answer, how it compares with the start, and which weights write."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanochat.dataloader import IGNORE
from scripts.chat_rl import compare_models, training_arrays, update_copy, writing_copy
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
def test_the_writing_copy_has_the_weights_of_the_last_step_in_the_compute_dtype(monkeypatch, precision, dtype):
    monkeypatch.setenv("NANOCHAT_PRECISION", precision)
    model = tiny_model()
    writer = writing_copy(model)
    assert (writer is model) == (dtype == torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    update_copy(writer, model)
    for own, written in zip(model.parameters(), writer.parameters(), strict=True):
        assert own.dtype == torch.float32 and written.dtype == dtype and torch.equal(own.to(dtype), written)
    assert writer.cos.dtype == torch.float32
