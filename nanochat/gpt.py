"""
The model: a decoder-only Transformer, its initialisation, its loss, its FLOPs and its optimizers.

Rotary position embeddings, normalised queries and keys, ReLU^2 in the MLP, grouped-query attention on request, no
biases, RMSNorm without parameters (one more after the embedding), untied output head, logits capped by
15 tanh(x / 15). This is what `transformers` calls NanoChatForCausalLM, and scripts/export_hf writes it for that. One
switch goes beyond it, value embeddings, off by default.

Shapes: B batch, T tokens, C = n_embd, H heads, D head size, V vocabulary.
"""

import contextlib
import math
from dataclasses import dataclass
from fnmatch import fnmatch

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nanochat import cpu_kernels
from nanochat.adamw import DistAdamW
from nanochat.common import HAS_TRITON, IGNORE, ceil_div
from nanochat.muon import DistMuon
from nanochat.precision import (
    active_dtype,
    float8_linear,
    get_precision_dtype,
    pack,
    packed_linear,
    packs,
)

try:  # FlashAttention 3 (Hopper), where its package is installed
    from flash_attn_interface import flash_attn_func
except ImportError:
    flash_attn_func = None

LOGIT_CAP = 15.0
ROPE_BASE = 10000.0
# Not cuDNN's, the fastest where training is compiled for one shape: it is compiled anew for every length
# (github.com/pytorch/pytorch/pull/155958), and prompts come in all of them
EAGER_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
EAGER_PIECE = 2**26  # logits that torch works on at once without a compiler: 256 MB of float32
NORM_EPS = torch.finfo(torch.float32).eps
SHORT_T = 1024       # tokens a row up to which a CPU's attention keeps its (T, T) scores


@dataclass
class GPTConfig:
    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6      # query heads
    n_kv_head: int = 6   # key and value heads; fewer than n_head = grouped-query attention, 1 = multi-query
    n_embd: int = 768
    value_embeds: bool = False  # every layer adds to a token's values a row of a table of its own: see GPT.__init__

    @classmethod
    def from_depth(cls, depth, vocab_size, sequence_len, head_dim=128, **switches):  # value_embeds
        """The one dial: width 64 * depth, and the number of heads that brings their size closest to head_dim."""
        n_embd = 64 * depth
        fitting = [n for n in range(1, n_embd // 2 + 1) if n_embd % (2 * n) == 0]  # rotary needs an even head size
        n_head = min(fitting, key=lambda n: abs(n_embd / n - head_dim))
        return cls(sequence_len, vocab_size, depth, n_head, n_head, n_embd, **switches)

    @property
    def padded_vocab_size(self):
        """Rows of the embedding and the head: a multiple of 64, for the matrix units. The extra rows are never used."""
        return 64 * ceil_div(self.vocab_size, 64)


# -----------------------------------------------------------------------------
# Pieces


def norm(x):
    """RMSNorm without a weight, with float32's epsilon (2^-23) whatever the dtype."""
    if cpu_kernels.suits(x):
        return cpu_kernels.norm(x, NORM_EPS)
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS).to(x.dtype)


def relu_square(x):
    return cpu_kernels.relu_square(x) if cpu_kernels.suits(x) else F.relu(x).square()


def rotary_table(length, head_dim, device):
    """cos and sin of position * base^(-2i / D), each (1, 1, length, D / 2), always float32."""
    inverse = ROPE_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), inverse)
    return angles.cos()[None, None], angles.sin()[None, None]


def apply_rotary(x, cos, sin):
    """Rotate (x_i, x_{i + D/2}) by minus the angle of its position. x (B, H, T, D) keeps its dtype."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1).to(x.dtype)


def rotary_norm(x, cos, sin):
    """x (B, T, H, D), rotated by its positions and normalised -> (B, H, T, D)."""
    if cpu_kernels.suits(x):
        return cpu_kernels.rotary_norm(x, cos, sin, NORM_EPS)
    return norm(apply_rotary(x.transpose(1, 2), cos, sin))


def attention(q, k, v, last=None):
    """
    Causal attention: q (B, H, T, D), k and v (B, H_kv, S, D) -> (B, H, T, D). `last` (B, T) is the last key that each
    query may look at. Without it S = T, or T = 1 and the query sees every key.
    """
    T, S = q.size(2), k.size(2)
    if last is not None and T == 1 and q.is_cuda and HAS_TRITON:
        from nanochat.gpu_kernels import decode_attention
        return decode_attention(q, k, v, last)
    if T == 1 and not q.requires_grad and cpu_kernels.suits(q) and q.dtype == k.dtype == v.dtype:
        return cpu_kernels.one_token_attention(q, k, v, last)
    mask = None if last is None else (torch.arange(S, device=q.device) <= last[:, :, None])[:, None]  # (B, 1, T, S)
    causal = mask is None and T > 1
    half = q.dtype in (torch.bfloat16, torch.float16)
    short = q.dtype == torch.bfloat16 and q.shape == k.shape and T <= SHORT_T
    if short and causal and q.requires_grad and cpu_kernels.suits(q):
        return cpu_kernels.ShortAttention.apply(q, k, v)
    if flash_attn_func is not None and q.is_cuda and half and mask is None:
        out = flash_attn_func(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)
    eager = q.is_cuda and not torch.compiler.is_compiling()
    with sdpa_kernel(EAGER_BACKENDS) if eager else contextlib.nullcontext():
        gqa = q.size(1) != k.size(1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=gqa)


class Linear(nn.Linear):
    """
    A linear layer without bias. `fp8` multiplies in 8 bits where training asks for it and the shapes allow; inference
    takes `packed`, where there is one, in the place of the weight.
    """

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)
        self.fp8, self.packed = False, None

    def reset_parameters(self):
        """Nothing: GPT.init_weights sets every parameter, and torch's own start on a meta device takes seconds."""

    def forward(self, x):
        if self.fp8 and self.training and x[..., 0].numel() % 16 == 0:
            return float8_linear(x, self.weight)
        if self.packed is not None:
            return packed_linear(x, self.packed)
        return F.linear(x, self.weight)


class Embedding(nn.Embedding):
    def reset_parameters(self):
        """Nothing, as in Linear."""


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.n_embd // config.n_head
        self.c_q = Linear(config.n_embd, config.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, config.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, config.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.qkv = None  # for inference, the three weights in one: see fuse and GPT.pack

    @torch.no_grad()
    def fuse(self):
        """For inference: multiply by the three weights at once. They stay parameters, parts of one tensor."""
        linears = (self.c_q, self.c_k, self.c_v)
        self.qkv = torch.cat([linear.weight for linear in linears])
        for linear, part in zip(linears, self.qkv.split([linear.out_features for linear in linears]), strict=True):
            linear.weight.data = part

    def forward(self, x, cos, sin, store=None, value_embed=None):
        B, T, C = x.shape
        if self.qkv is None:  # (B, T, heads * D) -> (B, heads, T, D)
            q, k, v = (y.view(B, T, -1, self.head_dim) for y in (self.c_q(x), self.c_k(x), self.c_v(x)))
            q, k, v = rotary_norm(q, cos, sin), rotary_norm(k, cos, sin), v.transpose(1, 2)
        else:  # q and k as one, too: so few numbers take no time, starting to work on them does
            kv_heads = self.c_k.out_features // self.head_dim
            qkv = packed_linear(x, self.qkv).view(B, T, -1, self.head_dim)
            qk, v = rotary_norm(qkv[:, :, :-kv_heads], cos, sin), qkv[:, :, -kv_heads:].transpose(1, 2)
            q, k = qk[:, :-kv_heads], qk[:, -kv_heads:]
        if value_embed is not None:
            v = v + value_embed.view(B, T, -1, self.head_dim).transpose(1, 2)
        last = None
        if store is not None:
            k, v, last = store(k, v)  # (B, H_kv, S, D): everything so far
        y = attention(q, k, v, last)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(relu_square(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attn = CausalSelfAttention(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, store=None, value_embed=None):
        """
        x (B, T, C); cos, sin (1 or B, 1, T, D / 2); store(k, v) puts the keys and values of the T tokens in a layer's
        cache and returns (k, v, last) for `attention`; value_embed (B, T, H_kv * D) is added to the values.
        """
        x = x + self.attn(norm(x), cos, sin, store, value_embed)
        return x + self.mlp(norm(x))


# -----------------------------------------------------------------------------
# Loss: head, cap and cross-entropy over chunks of rows, so that B * T * V logits never exist at once


def chunk_loss_and_grad(logits, targets, weights):
    """
    Per-row loss (n,), times weights (n,), and its gradient by the raw logits (n, V), for targets (n,).
    The cap bounds what goes into exp at e^15, so no maximum has to be subtracted first.
    """
    t = torch.tanh(logits.float() / LOGIT_CAP)
    p = torch.exp(LOGIT_CAP * t)
    Z = p.sum(dim=-1, keepdim=True)
    index = targets[:, None]
    loss = (Z.log() - LOGIT_CAP * t.gather(1, index)).squeeze(1) * weights
    p = p * (weights[:, None] / Z)
    p = p.scatter_add(1, index, -weights[:, None])
    return loss, (p * (1 - t * t)).to(logits.dtype)


def chunk_loss_and_grad_eager(logits, targets, weights):
    """
    The same without a compiler; the gradient takes the place of the logits. On a CPU the native extension does it in
    one pass over each row, elsewhere torch in pieces, for it makes several float32 copies.
    """
    logits, targets, weights = logits.contiguous(), targets.contiguous(), weights.contiguous()
    losses = torch.empty(len(logits), device=logits.device)
    assert (targets.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert len(targets) == len(weights) == len(logits)
    if cpu_kernels.suits(logits):
        cpu_kernels.capped_cross_entropy(logits, targets, weights, losses, LOGIT_CAP)
        return losses, logits
    rows = max(1, EAGER_PIECE // logits.size(1))
    pieces = zip(*(x.split(rows) for x in (logits, targets, weights, losses)), strict=True)
    for logits_piece, targets_piece, weights_piece, losses_piece in pieces:
        loss, gradient = chunk_loss_and_grad(logits_piece, targets_piece, weights_piece)
        logits_piece.copy_(gradient)
        losses_piece.copy_(loss)
    return losses, logits


class HeadLoss(torch.autograd.Function):
    """
    sum of weights * cross-entropy(cap(x W'), targets) over the rows. The gradients by x and W are made in the forward
    pass, chunk by chunk while the logits are at hand; the backward pass only scales them.
    """

    @staticmethod
    def forward(ctx, all_x, weight, targets, row_weights, chunk_rows, chunk_fn, used):
        """all_x (N, C), weight (V, C), targets and row_weights (N,); used: indices of rows with a target or a slice."""
        x, targets, row_weights, dtype = all_x[used], targets[used], row_weights[used], all_x.dtype
        w = weight.to(dtype)
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        total = torch.zeros((), device=x.device)
        for start in range(0, x.size(0), chunk_rows):
            s = slice(start, start + chunk_rows)
            loss, dlogits = chunk_fn(x[s] @ w.T, targets[s], row_weights[s])
            total += loss.sum()
            torch.mm(dlogits, w, out=dx[s])
            if dtype == dw.dtype:
                dw.addmm_(dlogits.T, x[s])
            else:
                dw += dlogits.T @ x[s]
        if len(x) < len(all_x):
            dx = torch.zeros_like(all_x).index_copy_(0, used, dx)
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx.mul_(grad), dw.mul_(grad), None, None, None, None, None


# -----------------------------------------------------------------------------


class GPT(nn.Module):
    """
    `GPT.create(config, device)` is a fresh model. Built by hand, it goes through the meta device, so that no memory
    is touched twice: `with torch.device("meta"): model = GPT(config)`, `model.to_empty(device=...)`,
    `model.init_weights()`.
    """

    def __init__(self, config):
        super().__init__()
        if config.n_head % config.n_kv_head or config.n_embd % (2 * config.n_head):
            raise ValueError(f"n_embd={config.n_embd}, n_head={config.n_head}, n_kv_head={config.n_kv_head}: need an "
                             "even head size n_embd / n_head and an n_kv_head that divides n_head")
        self.config = config
        kv_dim, num_tables = config.n_embd // config.n_head * config.n_kv_head, config.n_layer * config.value_embeds
        self.transformer = nn.ModuleDict({
            "wte": Embedding(config.padded_vocab_size, config.n_embd),
            "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            # a lookup costs no product: a small model keeps in tables what its few matrices cannot hold
            # (modded-nanogpt's value embeddings; for values that bypass layers see arXiv 2410.17897)
            "value_embeds": nn.ModuleList(Embedding(config.padded_vocab_size, kv_dim) for _ in range(num_tables)),
        })
        self.lm_head = Linear(config.n_embd, config.padded_vocab_size)
        # (1, 1, S, D / 2) each, made by set_rotary; not part of a checkpoint
        self.register_buffer("cos", None, persistent=False)
        self.register_buffer("sin", None, persistent=False)
        self._chunk_fn = chunk_loss_and_grad_eager
        self._decode_block = Block.forward

    # -- initialisation

    @classmethod
    def create(cls, config, device):
        """A freshly initialised model, float32, on the device."""
        with torch.device("meta"):
            model = cls(config)
        for module in model.modules():  # what to_empty does, without the seconds that its imports take
            for name, p in module.named_parameters(recurse=False):
                module.register_parameter(name, nn.Parameter(torch.empty(p.shape, device=device)))
        model.init_weights()
        return model

    @torch.no_grad()
    def init_weights(self):
        """
        Set every parameter and buffer. Matrices uniform with standard deviation 1 / sqrt(C); the layers that write
        into the residual stream, and the head, start at zero, so that the model starts as a uniform guess.
        """
        bound = math.sqrt(3 / self.config.n_embd)  # uniform on [-b, b] has standard deviation b / sqrt(3)
        nn.init.normal_(self.transformer.wte.weight, std=1.0)  # a norm follows
        nn.init.zeros_(self.lm_head.weight)
        for block in self.transformer.h:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
        for table in self.transformer.value_embeds:
            nn.init.zeros_(table.weight)
        self.set_rotary(self.config.sequence_len)

    def set_rotary(self, length):
        """Give the rotary table `length` positions."""
        head_dim = self.config.n_embd // self.config.n_head
        self.cos, self.sin = rotary_table(length, head_dim, self.lm_head.weight.device)

    def to_compute_dtype(self):
        """Store the parameters in the compute dtype, for inference: decoding then never casts. Returns the model."""
        self.to(get_precision_dtype(self.device.type))
        self.set_rotary(self.cos.size(2))  # which stays in float32
        self.pack()
        return self

    def pack(self):
        """
        On a CPU in bfloat16, give the products weights in the order that suits them: copies, which cost as much memory
        again and have to be made anew when a parameter has changed. Elsewhere nothing.
        """
        if packs(self.device.type, self.lm_head.weight.dtype):
            for block in self.transformer.h:
                block.attn.fuse()
                block.attn.qkv = pack(block.attn.qkv)
                for linear in (block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                    linear.packed = pack(linear.weight)
            self.lm_head.packed = pack(self.lm_head.weight)

    def compile(self):
        """
        Compile the blocks and the loss for training on a GPU. The module and its parameter names stay as they are. All
        blocks share what the first one compiles to: as fast as the trunk in one piece, and a d20 starts 20 s earlier.
        """
        for block in self.transformer.h:  # static shapes: one or two batch sizes occur, kernels for any are slower
            block.compile(dynamic=False)
        self._chunk_fn = torch.compile(chunk_loss_and_grad, dynamic=False)

    def compile_decoding(self):
        """Compile the step of one token per row, as graphs.py records it, of a model in the compute dtype on a GPU."""
        for block in self.transformer.h:
            block.attn.fuse()
        self._decode_block = torch.compile(Block.forward)  # any number of rows: for one, and for all others

    # -- forward

    @property
    def device(self):
        return self.lm_head.weight.device

    def embed(self, idx):
        """idx (...) -> normalised embeddings (..., C)."""
        x = self.transformer.wte(idx)
        return norm(x.to(active_dtype(x)))

    def trunk(self, idx, kv_cache=None):
        """idx (B, T) -> the normalised residual stream (B, T, C) that the head reads."""
        T, blocks = idx.size(1), self.transformer.h
        if kv_cache is None:
            cos, sin, stores = self.cos[:, :, :T], self.sin[:, :, :T], [None] * len(blocks)
            run = Block.__call__  # where compile's work is called
        else:
            positions, stores = kv_cache.begin(T)  # (B, T), and a function per layer
            cos, sin = self.cos[0, 0][positions][:, None], self.sin[0, 0][positions][:, None]
            run = self._decode_block if kv_cache.fixed else Block.forward
        x = self.embed(idx)
        tables = self.transformer.value_embeds or [None] * len(blocks)
        for block, store, table in zip(blocks, stores, tables, strict=True):
            x = run(block, x, cos, sin, store, None if table is None else table(idx).to(x.dtype))
        return norm(x)

    def forward(self, idx, targets=None, weights=None, kv_cache=None, loss_reduction="mean", last_only=False):
        """
        idx (B, T) int64 -> logits (B, T, V) in float32, capped; last_only: those of one position, (B, 1, V), the last
        or, given as a tensor (B,), each row's own.
        With targets (B, T), IGNORE where there is none -> the loss in nats: 'mean' or 'sum' over the targets (0 when
        there are none), or 'none' for (B, T), 0 at ignored places. weights (B, T) multiply the summed losses.
        """
        T = idx.size(1)
        if kv_cache is None and T > self.cos.size(2):
            raise ValueError(f"{T} tokens exceed the rotary table of {self.cos.size(2)}; call set_rotary({T})")
        x = self.trunk(idx, kv_cache)
        if targets is not None:
            return self._loss(x.flatten(0, 1), targets, weights, loss_reduction)
        if isinstance(last_only, torch.Tensor):
            return self.logits(x[torch.arange(len(x), device=x.device), last_only][:, None])
        return self.logits(x[:, -1:] if last_only else x)

    def logits(self, x):
        """Rows of the trunk's output -> capped float32 logits; padded vocabulary rows are left out."""
        logits = self.lm_head(x)[..., : self.config.vocab_size].float()
        if logits.requires_grad:
            return LOGIT_CAP * torch.tanh(logits / LOGIT_CAP)
        sigmoid = logits.mul_(2 / LOGIT_CAP).sigmoid_()  # the same, faster on a CPU
        return torch.add(sigmoid.new_tensor(-LOGIT_CAP), sigmoid, alpha=2 * LOGIT_CAP, out=sigmoid)

    def _loss(self, x, targets, weights, reduction):
        rows, shape, targets = self.chunk_rows(), targets.shape, targets.flatten()
        if reduction == "none":
            rows = max(64, rows // 4)  # several float32 tensors of this size at once
            chunks = zip(x.split(rows), targets.split(rows), strict=True)
            losses = [F.cross_entropy(self.logits(a), b, ignore_index=IGNORE, reduction="none") for a, b in chunks]
            return torch.cat(losses).view(shape)
        counted = targets != IGNORE
        row_weights = counted.float() if weights is None else counted * weights.flatten()
        eager = self._chunk_fn is chunk_loss_and_grad_eager  # compiled code wants the same shape every time
        used = counted.nonzero()[:, 0] if eager else slice(None)
        with torch.autocast(x.device.type, enabled=False):
            weight = self.lm_head.weight[: self.config.vocab_size]
            total = HeadLoss.apply(x, weight, targets.clamp(min=0), row_weights, rows, self._chunk_fn, used)
        return total if reduction == "sum" else total / counted.sum().clamp(min=1)

    def chunk_rows(self):
        """Rows of logits made at once: about 256 MB of float32 (half in 16 bits) on a CPU, 2 GB on a GPU."""
        budget = 2**31 if self.device.type == "cuda" else 2**28
        return max(64, budget // (4 * self.config.padded_vocab_size))

    # -- facts

    def num_params(self):
        return sum(p.numel() for p in self.parameters())

    def num_matrix_params(self):
        """Parameters that every token is multiplied with: all but the tables that it is looked up in."""
        return self.num_params() - sum(m.weight.numel() for m in self.modules() if isinstance(m, Embedding))

    def estimate_flops(self):
        """
        Training FLOPs per token at full context: 6 per multiplied parameter (2 forward, 4 backward), and 12 C T per
        layer for attention's two products (Chowdhery et al., arXiv 2204.02311, appendix B; causality not deducted).
        From shapes alone, so the number format cannot change it.
        """
        c = self.config
        return 6 * self.num_matrix_params() + 12 * c.n_layer * c.n_embd * c.sequence_len

    # -- optimizers

    @property
    def adam_scale(self):
        """What Adam's rates are multiplied with: they are given for a width of 768."""
        return (self.config.n_embd / 768) ** -0.5

    def setup_optimizers(self, embedding_lr=0.3, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0,
                         momentum=0.95, compile=None, value_lr=None):
        """
        [DistAdamW for tables and head, DistMuon for the blocks]; Adam's rates scale with 1 / sqrt(C / 768).
        compile: whether Muon compiles its update: see DistMuon. value_lr: of value embeddings; None = embedding_lr.
        """
        def named(pattern):
            return [(name, p) for name, p in self.named_parameters() if fnmatch(name, pattern)]

        scale, value_lr = self.adam_scale, embedding_lr if value_lr is None else value_lr
        groups = [dict(named_params=named("lm_head.weight"), lr=unembedding_lr * scale),
                  dict(named_params=named("transformer.wte.weight"), lr=embedding_lr * scale)]
        if self.config.value_embeds:
            groups.append(dict(named_params=named("transformer.value_embeds.*"), lr=value_lr * scale))
        muon = DistMuon(named("transformer.h.*"), matrix_lr, momentum, weight_decay=weight_decay, compile=compile)
        return [DistAdamW(groups), muon]

    def use_fp8(self):
        """Multiply the blocks' linear layers in 8 bits while training (shapes must be multiples of 16)."""
        for module in self.transformer.h.modules():
            if isinstance(module, Linear):
                module.fp8 = module.in_features % 16 == 0 and module.out_features % 16 == 0
