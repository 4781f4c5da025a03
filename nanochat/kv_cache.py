"""
The KV cache: keys and values of the tokens so far, so that a new token costs one token's work.

Shapes: L layers, B rows, H_kv key and value heads, S cached positions, D head size, T new tokens.
"""

from functools import partial

import torch


class KVCache:
    """
    Keys and values of up to `num_rows` rows, each with its own length: two tensors (L, B, H_kv, S, D), allocated once
    in the compute dtype. They grow by doubling up to max_length and refuse to go further.
    """

    def __init__(self, config, num_rows, max_length, device, dtype, length=256):
        """length: positions to begin with."""
        shape = (
            config.n_layer,
            num_rows,
            config.n_kv_head,
            min(length, max_length),
            config.head_dim,
        )
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.max_length = max_length
        self.lengths = [0] * num_rows  # tokens stored per row
        self.num_active = num_rows     # rows 0 .. num_active - 1 take part in a forward pass

    def begin(self, T):
        """
        Make room for T more tokens in every active row. Returns (positions (B, T), a function per layer: see `_store`).
        """
        lengths = self.lengths[: self.num_active]
        self.reserve(max(lengths) + T)
        device = self.k.device
        starts = torch.tensor(lengths, device=device)
        positions = starts[:, None] + torch.arange(T, device=device)
        stores = []
        for layer in range(self.k.size(0)):
            stores.append(partial(self._store, layer, lengths, positions))
        return positions, stores

    def _store(self, layer, lengths, positions, k, v):
        """
        Store k, v (B, H_kv, T, D) of a layer. Returns (k, v, last): views (B, H_kv, S, D) of all positions so far, and
        the positions (B, T) up to which the new tokens may look, or None where plain causal attention says the same.
        """
        B, T = positions.shape
        start = min(lengths)
        end = max(lengths) + T
        same_length = end - start == T
        k_cache = self.k[layer, :B]
        v_cache = self.v[layer, :B]
        if same_length:
            k_cache[:, :, start:end] = k
            v_cache[:, :, start:end] = v
        else:  # indexed by (row, position) pairs, which puts these two dimensions in front of the heads
            rows = torch.arange(B, device=k.device)[:, None]
            k_cache[rows, :, positions] = k.transpose(1, 2).to(k_cache.dtype)
            v_cache[rows, :, positions] = v.transpose(1, 2).to(v_cache.dtype)
        if layer == self.k.size(0) - 1:
            self.lengths[:B] = [length + T for length in lengths]

        # One token sees every key, and tokens in an empty cache see theirs causally. On a GPU our kernel wants `last`
        one_token = T == 1 and not k.is_cuda
        last = positions
        if same_length and (start == 0 or one_token):
            last = None
        return k_cache[:, :, :end], v_cache[:, :, :end], last

    @torch.inference_mode()  # as in the forward pass, where the cache may have grown: its tensors allow no other mode
    def copy_row(self, target, source_cache, source):
        """Overwrite row `target` with row `source` of a cache of the same model, perhaps this one."""
        length = source_cache.lengths[source]
        self.reserve(length)
        self.k[:, target, :, :length] = source_cache.k[:, source, :, :length]
        self.v[:, target, :, :length] = source_cache.v[:, source, :, :length]
        self.lengths[target] = length

    def reserve(self, length):
        """Make room for rows of so many tokens; ValueError beyond max_length."""
        if length > self.max_length:
            raise ValueError(f"the KV cache holds {self.max_length} tokens per row, {length} needed")
        capacity = self.k.size(3)
        if length <= capacity:
            return
        capacity = min(self.max_length, max(length, 2 * capacity))
        k = self._grown(self.k, capacity)
        v = self._grown(self.v, capacity)
        self.k = k  # both or, when memory runs out, none
        self.v = v

    @staticmethod
    def _grown(old, capacity):
        L, B, H, S, D = old.shape
        new = old.new_zeros(L, B, H, capacity, D)
        new[:, :, :, :S] = old
        return new
