"""
The KV cache: keys and values of the tokens so far. With it, a new token costs one token's work.

Shapes: L layers, B rows, H_kv key and value heads, S cached positions, D head size, T new tokens.
"""

import math
from functools import partial

import numpy as np
import torch


def zeros(shape, device, dtype):
    """
    Zeros. On a CPU they take no memory until they are written, page by page; torch.zeros writes
    all of them at once.
    """
    if device.type != "cpu":
        return torch.zeros(shape, device=device, dtype=dtype)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, np.uint8)).view(dtype).view(shape)


class KVCache:
    """
    Keys and values of up to `num_rows` rows, each with its own length, in two tensors
    (L, B, H_kv, S, D) of the compute dtype. They grow by doubling, up to max_length.
    """

    def __init__(self, config, num_rows, max_length, device, dtype, length=256):
        """length: number of positions to begin with."""
        shape = (
            config.n_layer,
            num_rows,
            config.n_kv_head,
            min(length, max_length),
            config.head_dim,
        )
        device = torch.device(device)
        self.k = zeros(shape, device, dtype)
        self.v = zeros(shape, device, dtype)
        self.first_shape = shape
        self.max_length = max_length
        self.lengths = [0] * num_rows  # tokens stored per row
        self.num_active = num_rows     # rows 0 .. num_active - 1 take part in a forward pass

    def begin(self, T):
        """
        Make room for T more tokens in every active row. Returns their positions (B, T), and a list
        with a function store(k, v) for each layer: see `_store`.
        """
        lengths = self.lengths[: self.num_active]
        self.reserve(max(lengths) + T)
        device = self.k.device
        starts = torch.tensor(lengths, device=device)
        steps = torch.arange(T, device=device)
        positions = starts[:, None] + steps  # (B, T)

        # The layers of one forward pass share the old lengths and the positions
        stores = []
        for layer in range(self.k.size(0)):
            store = partial(self._store, layer, lengths, positions)
            stores.append(store)
        return positions, stores

    def _store(self, layer, lengths, positions, k, v):
        """
        Store k and v (B, H_kv, T, D) of a layer. Returns (k, v, last): views (B, H_kv, S, D) of all
        positions so far, and the positions (B, T) up to which the new tokens may look. last is None
        where plain causal attention gives the same.
        """
        B, T = positions.shape
        start = min(lengths)
        end = max(lengths) + T
        same_length = end - start == T

        # Views of the active rows: (B, H_kv, S, D)
        k_cache = self.k[layer, :B]
        v_cache = self.v[layer, :B]
        if same_length:
            k_cache[:, :, start:end] = k
            v_cache[:, :, start:end] = v
        else:
            # Two index tensors put their dimensions in front: (B, T, H_kv, D)
            rows = torch.arange(B, device=k.device)[:, None]  # (B, 1)
            k = k.transpose(1, 2)
            v = v.transpose(1, 2)
            k_cache[rows, :, positions] = k.to(k_cache.dtype)
            v_cache[rows, :, positions] = v.to(v_cache.dtype)

        # The last layer ends the forward pass
        num_layers = self.k.size(0)
        if layer == num_layers - 1:
            self.lengths[:B] = [length + T for length in lengths]

        # One token sees every key, and tokens in an empty cache see theirs causally. But on a GPU
        # our kernel needs `last`
        one_token = T == 1 and not k.is_cuda
        last = positions
        if same_length and (start == 0 or one_token):
            last = None
        k_seen = k_cache[:, :, :end]
        v_seen = v_cache[:, :, :end]
        return k_seen, v_seen, last

    # A cache that grew in a forward pass holds inference tensors, read-only outside this mode
    @torch.inference_mode()
    def copy_row(self, target, source_cache, source):
        """
        Overwrite row `target` with row `source` of a cache of the same model, or of this cache.
        """
        length = source_cache.lengths[source]
        self.reserve(length)
        k = source_cache.k[:, source, :, :length]  # (L, H_kv, length, D)
        v = source_cache.v[:, source, :, :length]
        self.k[:, target, :, :length] = k
        self.v[:, target, :, :length] = v
        self.lengths[target] = length

    def reserve(self, length):
        """Make room for `length` tokens per row. ValueError beyond max_length."""
        if length > self.max_length:
            most = self.max_length
            raise ValueError(f"the KV cache holds {most} tokens per row, {length} needed")
        capacity = self.k.size(3)
        if length <= capacity:
            return

        # Doubling keeps the number of copies small
        new_capacity = max(length, 2 * capacity)
        new_capacity = min(new_capacity, self.max_length)

        # New positions are 0. Both tensors are replaced, or neither when memory runs out
        L, B, H_kv, _, D = self.k.shape
        shape = (L, B, H_kv, new_capacity, D)
        k = zeros(shape, self.k.device, self.k.dtype)
        v = zeros(shape, self.v.device, self.v.dtype)

        # nothing is copied of the rows after the last one that holds something
        used = [row for row, length in enumerate(self.lengths) if length]
        num_used = 1 + max(used, default=-1)
        k[:, :num_used, :, :capacity] = self.k[:, :num_used]
        v[:, :num_used, :, :capacity] = self.v[:, :num_used]
        self.k = k
        self.v = v

    def shrink(self):
        """Remove all rows, and give back the memory by which the cache has grown."""
        self.lengths = [0] * len(self.lengths)
        if self.k.shape != self.first_shape:
            device = self.k.device
            dtype = self.k.dtype
            self.k = zeros(self.first_shape, device, dtype)
            self.v = zeros(self.first_shape, device, dtype)
