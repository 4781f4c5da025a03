"""
The scaling law: which loss a model of N parameters reaches after D tokens, so which depth suits a
given amount of computation.

    L = E + A / N^alpha + B / D^beta          bits per byte (Hoffmann et al., arXiv 2203.15556)

N counts the parameters that each token is multiplied by: the matrices of the blocks and the output
head, without embeddings. These are the parameters that cost FLOPs. dev/scaling.py fits the law to
runs, and compares this N with others.
"""

from dataclasses import dataclass

import torch

from nanochat.gpt import GPT, GPTConfig

# A single layer cannot copy what followed a token before: that takes two (Olsson et al., arXiv 2209.11895)
MIN_DEPTH = 2
MAX_DEPTH = 48


@dataclass(frozen=True)
class ScalingLaw:
    E: float      # bits per byte that no model and no amount of text takes away
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, num_params, num_tokens):
        """Bits per byte. Numbers or numpy arrays."""
        return self.E + self.A / num_params**self.alpha + self.B / num_tokens**self.beta


# Fitted to twelve runs of d1 to d6 at 7e12 to 6e13 FLOPs (dev/log/2026-11-30-series.md), with the
# exponents of Besiroglu et al. (arXiv 2404.10102). Those of so small runs hold for small runs only:
# they would make a d10 the best at the FLOPs of a d26
MEASURED = ScalingLaw(E=1.338, A=34.33, alpha=0.3478, B=94.65, beta=0.3658)


@dataclass(frozen=True)
class ModelSize:
    depth: int
    num_params: int         # all
    num_matrix_params: int  # N of the law
    num_block_params: int   # N without the output head
    flops_per_token: int    # of training, with attention

    @classmethod
    def from_depth(cls, depth, vocab_size, sequence_len, head_dim=128):
        """Of the model that base_train makes; no memory is used for it."""
        config = GPTConfig.from_depth(depth, vocab_size, sequence_len, head_dim)
        with torch.device("meta"):
            model = GPT(config)
        matrices = model.num_matrix_params()
        return cls(
            depth=depth,
            num_params=model.num_params(),
            num_matrix_params=matrices,
            num_block_params=matrices - model.lm_head.weight.numel(),
            flops_per_token=model.estimate_flops(),
        )


def best_depth(flops, vocab_size, sequence_len, law=MEASURED, count="num_matrix_params"):
    """
    The depth with the least predicted loss after `flops` of training, whose tokens follow from the
    depth: a larger model sees fewer. count: the field of ModelSize that is the law's N.
    """
    least = float("inf")
    for depth in range(MIN_DEPTH, MAX_DEPTH + 1):
        size = ModelSize.from_depth(depth, vocab_size, sequence_len)
        loss = law.loss(getattr(size, count), flops / size.flops_per_token)
        # from the best depth on, each larger one is worse
        if loss > least:
            return depth - 1
        least = loss
    return MAX_DEPTH
