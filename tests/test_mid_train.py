"""Midtraining's weights: what the assistant writes counts fully, wherever a row begins or ends."""

import numpy as np

from scripts.mid_train import target_weights


def test_target_weights_are_the_mask_of_the_rendered_conversation(tokenizer):
    parts = [{"type": "text", "text": "Sum: "}, {"type": "python", "text": "1+1"},
             {"type": "python_output", "text": "2"}, {"type": "text", "text": " so 2"}]
    turns = [("user", "1+1?"), ("assistant", parts), ("user", "Thanks"), ("assistant", "Bye")]
    ids, mask = tokenizer.render_conversation({"messages": [{"role": r, "content": c} for r, c in turns]})
    row, expected = np.array([ids + ids]), np.array([(mask + mask)[1:]])
    assert (target_weights(row, tokenizer, 0.0) == expected).all()
    assert (target_weights(row, tokenizer, 0.25) == np.where(expected == 1, 1, 0.25)).all()
    assert (target_weights(row, tokenizer, 1.0) == 1).all()
    # the tail of a conversation that was cut amid an answer, then a whole one
    tail = [ids[0], *ids[ids.index(tokenizer.encode_special("<|python_start|>")):]]
    weights = target_weights(np.array([tail + ids]), tokenizer, 0.0)[0]
    assert (weights[len(tail) - 1:] == mask).all()
