"""Small things that several test files build: a model of a few thousand parameters with weights that are not zero."""

import torch

from nanochat.gpt import GPT, GPTConfig


def tiny_model(vocab_size=100, sequence_len=32, n_layer=2, n_head=4, n_kv_head=4, n_embd=64, seed=0, **switches):
    torch.manual_seed(seed)
    model = GPT.create(GPTConfig(sequence_len, vocab_size, n_layer, n_head, n_kv_head, n_embd, **switches), "cpu")
    with torch.no_grad():  # a fresh model answers 0 everywhere, which would make every comparison succeed
        for p in model.parameters():
            if not p.any():
                p.normal_(std=0.3 / n_embd**0.5 * 4)
    return model
