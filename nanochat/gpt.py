"""
The model: a decoder-only Transformer, with its initialisation, loss, FLOPs and optimizers.

  - rotary position embeddings, then queries and keys are normalised
  - RMSNorm without parameters, before each layer and once more after the embedding
  - ReLU^2 in the MLP, no biases anywhere
  - multi-query or grouped-query attention by n_kv_head
  - output head not tied to the embedding, logits capped by 15 tanh(x / 15)

`transformers` calls this architecture NanoChatForCausalLM, and scripts/export_hf writes it in that
format. One switch goes beyond it, off by default: value embeddings.

The model does not know how it is accelerated. ops.py has its operations, with a fast path for each
device. fp8.py replaces modules of it for training in 8 bits, inference.py for decoding.

Shapes: B batch, T tokens, C = n_embd, H heads, D head size, V vocabulary.
"""

import math
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.adamw import DistAdamW
from nanochat.common import IGNORE, ceil_div
from nanochat.muon import DistMuon
from nanochat.ops import (
    attention,
    cap_logits,
    cast_weight,
    chunk_rows,
    head_loss,
    norm,
    relu_square,
    rotary_norm,
    rotary_table,
)
from nanochat.precision import active_dtype

ROPE_BASE = 10000.0


@dataclass
class GPTConfig:
    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6      # query heads
    n_kv_head: int = 6   # key and value heads: n_head, fewer (grouped-query) or 1 (multi-query)
    n_embd: int = 768    # width
    value_embeds: bool = False  # each layer adds an embedding of the token to its values

    @classmethod
    def from_depth(cls, depth, vocab_size, sequence_len, head_dim=128, **switches):
        """
        The one dial: the width is 64 * depth, and the number of heads brings their size closest to
        head_dim. switches: value_embeds.
        """
        # Rotary embeddings need an even head size
        n_embd = 64 * depth
        possible = []
        for n in range(1, n_embd // 2 + 1):
            if n_embd % (2 * n) == 0:
                possible.append(n)
        n_head = min(possible, key=lambda n: abs(n_embd / n - head_dim))
        return cls(
            sequence_len=sequence_len,
            vocab_size=vocab_size,
            n_layer=depth,
            n_head=n_head,
            n_kv_head=n_head,
            n_embd=n_embd,
            **switches,
        )

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self):
        """
        Rows of embedding and head: a multiple of 64, for the matrix units. Extra rows are not used.
        """
        return 64 * ceil_div(self.vocab_size, 64)


# -----------------------------------------------------------------------------
# Modules


class Linear(nn.Linear):
    """A linear layer without bias."""

    def __init__(self, in_features, out_features, device=None):
        super().__init__(in_features, out_features, bias=False, device=device)

    def reset_parameters(self):
        """
        Nothing: GPT.init_weights sets every parameter. On a meta device PyTorch's own takes
        seconds.
        """

    def forward(self, x):
        # autocast would cast the weight too; ops.py has a faster way for small ones
        return F.linear(x, cast_weight(self.weight, x.dtype))


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Nothing, as in Linear."""


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.c_q = Linear(config.n_embd, config.n_head * config.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * config.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def project(self, x, cos, sin):
        """
        x (B, T, C) -> q (B, H, T, D), k and v (B, H_kv, T, D). q and k are rotated and normalised.
        """
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, -1, self.head_dim)  # (B, T, H, D)
        k = self.c_k(x).view(B, T, -1, self.head_dim)
        v = self.c_v(x).view(B, T, -1, self.head_dim)
        return rotary_norm(q, cos, sin), rotary_norm(k, cos, sin), v.transpose(1, 2)

    def forward(self, x, cos, sin, store=None, value_embed=None):
        B, T, C = x.shape
        q, k, v = self.project(x, cos, sin)
        if value_embed is not None:
            value_embed = value_embed.view(B, T, -1, self.head_dim)
            v = v + value_embed.transpose(1, 2)  # (B, H_kv, T, D)
        last = None  # causal: see `attention`
        if store is not None:
            k, v, last = store(k, v)  # (B, H_kv, S, D): everything so far
        y = attention(q, k, v, last)            # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, 4 C)
        x = relu_square(x)
        return self.c_proj(x)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, store=None, value_embed=None):
        """
        x (B, T, C); cos and sin (1 or B, 1, T, D / 2); value_embed (B, T, H_kv * D) is added to the
        values. store(k, v) puts the keys and values of the T tokens into a layer's cache and
        returns (k, v, last) for `attention`.
        """
        x = x + self.attn(norm(x), cos, sin, store, value_embed)  # (B, T, C)
        x = x + self.mlp(norm(x))                                 # (B, T, C)
        return x


class GPT(nn.Module):
    """
    `GPT.create(config, device)` makes a new model. It goes through the meta device, so that memory
    is written only once.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_head % config.n_kv_head or config.n_embd % (2 * config.n_head):
            raise ValueError(
                f"n_embd={config.n_embd}, n_head={config.n_head}, n_kv_head={config.n_kv_head}: "
                "need an even head size n_embd / n_head and an n_kv_head that divides n_head"
            )
        self.config = config

        # Embedding, blocks, head
        rows = config.padded_vocab_size
        kv_dim = config.n_kv_head * config.head_dim
        # Value embeddings are from modded-nanogpt (values that bypass layers: arXiv 2410.17897). A
        # table costs a lookup and no matmul, and holds facts for which a small model has no room
        num_tables = config.n_layer if config.value_embeds else 0
        self.transformer = nn.ModuleDict({
            "wte": Embedding(rows, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            "value_embeds": nn.ModuleList(Embedding(rows, kv_dim) for _ in range(num_tables)),
        })
        self.lm_head = Linear(config.n_embd, rows)
        # (1, 1, S, D / 2) each, made by set_rotary; not part of a checkpoint
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self.compiled = False

    # -- initialisation

    @classmethod
    def create(cls, config, device):
        """A freshly initialised model, float32, on the device."""
        with torch.device("meta"):
            model = cls(config)
        # Same as to_empty(), which would import torch._refs and take seconds
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(torch.empty(p.shape, device=device)))
        model.init_weights()
        return model

    @torch.no_grad()
    def init_weights(self):
        """
        Set every parameter and buffer. Matrices are uniform with standard deviation 1 / sqrt(C).
        The head and the layers that write into the residual stream start at 0, so the first
        prediction is uniform.
        """
        # Uniform on [-b, b] has standard deviation b / sqrt(3)
        bound = math.sqrt(3 / self.config.n_embd)
        nn.init.normal_(self.transformer.wte.weight, std=1.0)  # a norm follows
        nn.init.zeros_(self.lm_head.weight)
        for block in self.transformer.h:
            # layers that read the residual stream
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            # layers that write into it
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
        for table in self.transformer.value_embeds:
            nn.init.zeros_(table.weight)
        self.set_rotary(self.config.sequence_len)

    def set_rotary(self, length):
        """Give the rotary table `length` positions."""
        self.cos, self.sin = rotary_table(length, self.config.head_dim, ROPE_BASE, self.device)

    def compile(self):
        """
        Compile the blocks and the loss for training on a GPU. The module and its parameter names
        stay as they are. All blocks share the code of the first one: as fast as compiling the whole
        model, and a d20 starts 20 s earlier.
        """
        # static shapes, since only one or two batch sizes occur
        for block in self.transformer.h:
            block.compile(dynamic=False)
        self.compiled = True

    # -- forward

    @property
    def device(self):
        return self.lm_head.weight.device

    def embed(self, idx):
        """idx (...) -> normalised embeddings (..., C)."""
        # an embedding's output has the dtype of its weight, also under autocast
        x = self.transformer.wte(idx)
        return norm(x.to(active_dtype(x)))

    def trunk(self, idx, kv_cache=None):
        """idx (B, T) -> the normalised residual stream (B, T, C) that the head reads."""
        T = idx.size(1)
        blocks = self.transformer.h
        if kv_cache is None:
            cos = self.cos[:, :, :T]  # (1, 1, T, D / 2)
            sin = self.sin[:, :, :T]
            stores = [None] * len(blocks)
        else:
            # (B, T), and for each layer the `store` of Block.forward
            positions, stores = kv_cache.begin(T)
            cos = self.cos[0, 0, positions][:, None]  # (B, 1, T, D / 2)
            sin = self.sin[0, 0, positions][:, None]

        x = self.embed(idx)
        for i, block in enumerate(blocks):
            # (B, T, H_kv * D), from the layer's own table
            value_embed = None
            if self.config.value_embeds:
                value_embed = self.transformer.value_embeds[i](idx).to(x.dtype)
            # block.forward is not compiled: a cache's shapes change at every step
            run = block if kv_cache is None else block.forward
            x = run(x, cos, sin, stores[i], value_embed)
        return norm(x)

    def logits(self, x):
        """
        Rows (..., C) of the trunk -> capped logits (..., V), float32, without the padded
        vocabulary.
        """
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        return cap_logits(logits.float())

    def forward(
        self,
        idx,
        targets=None,
        weights=None,
        kv_cache=None,
        loss_reduction="mean",
        last_only=False,
    ):
        """
        idx (B, T) int64 -> logits (B, T, V). last_only: those of the last position, (B, 1, V).

        With targets (B, T), which are IGNORE where there is none: the loss in nats. loss_reduction
        is 'mean' or 'sum' over the targets (0 without targets), or 'none' for (B, T), 0 at ignored
        places. weights (B, T) multiply the summed losses.
        """
        T = idx.size(1)
        if kv_cache is None and T > self.cos.size(2):
            raise ValueError(
                f"{T} tokens exceed the rotary table of {self.cos.size(2)}; call set_rotary({T})"
            )
        x = self.trunk(idx, kv_cache)
        if targets is None:
            if last_only:
                x = x[:, -1:]
            return self.logits(x)

        # The loss of each token, or their sum without ever holding all logits
        if loss_reduction == "none":
            losses = self._losses(x.flatten(0, 1), targets.flatten())
            return losses.view(targets.shape)
        counted = targets != IGNORE
        row_weights = counted.float() if weights is None else counted * weights  # (B, T)
        total = head_loss(
            x.flatten(0, 1),
            self.lm_head.weight[: self.config.vocab_size],
            targets.clamp(min=0).flatten(),
            row_weights.flatten(),
            self.compiled,
        )
        if loss_reduction == "sum":
            return total
        return total / counted.sum().clamp(min=1)

    def _losses(self, x, targets):
        """The loss (N,) of each row of x (N, C), by its target (N,)."""
        # A quarter of the usual rows: cross_entropy makes several float32 copies of the logits
        rows = chunk_rows(self.config.vocab_size, self.device) // 4
        rows = max(64, rows)
        losses = []
        for x_chunk, targets_chunk in zip(x.split(rows), targets.split(rows), strict=True):
            logits = self.logits(x_chunk)
            loss = F.cross_entropy(logits, targets_chunk, ignore_index=IGNORE, reduction="none")
            losses.append(loss)
        return torch.cat(losses)

    # -- facts

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def num_matrix_params(self):
        """
        Parameters that every token is multiplied by: all but the tables in which it is looked up.
        """
        tables = [self.transformer.wte, *self.transformer.value_embeds]
        return self.num_params() - sum(table.weight.numel() for table in tables)

    def estimate_flops(self):
        """
        Training FLOPs per token at full context: 6 per matrix parameter (2 forward, 4 backward),
        and 12 C T per layer for the two matmuls of attention. Causality is not deducted (Chowdhery
        et al., arXiv 2204.02311, appendix B).
        """
        c = self.config
        return 6 * self.num_matrix_params() + 12 * c.n_layer * c.n_embd * c.sequence_len

    # -- optimizers

    @property
    def adam_scale(self):
        """Factor on Adam's learning rates, which are given for a width of 768."""
        return (self.config.n_embd / 768) ** -0.5

    def setup_optimizers(
        self,
        embedding_lr=0.3,      # Adam
        unembedding_lr=0.004,  # Adam, output head
        matrix_lr=0.02,        # Muon, matrices of the blocks
        compile=None,          # whether Muon compiles its update: see DistMuon
        value_lr=0.1,          # Adam, value embeddings
    ):
        """
        [DistAdamW for tables and head, DistMuon for the blocks]. Adam's rates scale with the width.
        Without weight decay, which base_train sets in each step: `set_rates`.
        """
        groups = [
            self._adam_group("unembedding", "lm_head.weight", unembedding_lr),
            self._adam_group("embedding", "transformer.wte.weight", embedding_lr),
        ]
        if self.config.value_embeds:
            groups.append(self._adam_group("value", "transformer.value_embeds.*", value_lr))
        # everything in the blocks is a matrix
        matrices = self._named_parameters("transformer.h.*")
        return [DistAdamW(groups), DistMuon(matrices, matrix_lr, compile=compile)]

    def _adam_group(self, name, pattern, lr):
        # the name is for the log
        params = self._named_parameters(pattern)
        return {"name": name, "named_params": params, "lr": lr * self.adam_scale}

    def _named_parameters(self, pattern):
        return [(name, p) for name, p in self.named_parameters() if fnmatch(name, pattern)]
