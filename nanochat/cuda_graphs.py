"""
CUDA graphs for decoding. A step of one token per row launches hundreds of small kernels, and on a fast GPU Python needs
longer to issue them than they need to run. A graph records such a step once and replays it with a single call.

A graph is for fixed shapes, so the number of rows is rounded up to a power of two, a step sees the cache's whole length
and reads the rows' own from a tensor. The rows that only fill up the shape write where nobody reads: a row is
overwritten from its first position on when it is admitted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 2  # ordinary steps of a shape before it is recorded: libraries choose kernels and take workspace in the first


class FixedCache:
    """A KVCache as a recorded step sees it: num_rows rows of all positions, whatever they hold."""

    fixed = True

    def __init__(self, cache, num_rows):
        device = cache.k.device
        self.positions = torch.zeros(num_rows, 1, dtype=torch.long, device=device)  # (B, 1), where the token goes
        rows = torch.arange(num_rows, device=device)
        self.stores = [FixedLayer(k[:num_rows], v[:num_rows], rows, self.positions)
                       for k, v in zip(cache.k, cache.v, strict=True)]

    def begin(self, T):
        """As KVCache.begin, for T = 1."""
        return self.positions, self.stores


@dataclass
class FixedLayer:
    """A layer's part of it: what KVCache._store does, on tensors alone, so that all layers compile to the same code."""
    k: torch.Tensor          # (B, H_kv, S, D)
    v: torch.Tensor
    rows: torch.Tensor       # 0 .. B - 1
    positions: torch.Tensor  # (B, 1)

    def __call__(self, k, v):
        for cache, new in ((self.k, k), (self.v, v)):
            cache[self.rows, :, self.positions[:, 0]] = new[:, :, 0].to(cache.dtype)
        return self.k, self.v, self.positions


class StepGraphs:
    """
    The decode steps of one KVCache, recorded for each number of rows. forward(ids (B, 1), cache) -> logits (B, 1, V)
    is the model's; record(function) -> (replay, output) is a CudaRecorder, its like in a test, or None for none.
    """

    def __init__(self, forward, cache, record):
        self.forward, self.cache, self.record = forward, cache, record
        self._steps, self._uses, self._recorded_k = {}, {}, None

    def step(self, tokens):
        """
        The logits (B, V) after one more token in each of the first B rows, or None where the step is not recorded
        (yet) and the caller takes it the ordinary way. Valid until the next step.
        """
        if self.record is None:
            return None
        cache, B = self.cache, len(tokens)
        cache.reserve(max(cache.lengths[:B]) + 1)
        if self._recorded_k is not cache.k:  # it has grown: the graphs point at memory that is gone
            self._steps, self._uses, self._recorded_k = {}, {}, cache.k
        num_rows = min(1 << (B - 1).bit_length(), cache.k.size(1))
        if num_rows not in self._steps:
            self._uses[num_rows] = self._uses.get(num_rows, 0) + 1
            if self._uses[num_rows] <= WARM_UP:
                return None
            ids = torch.zeros(num_rows, 1, dtype=torch.long, device=cache.k.device)
            self._steps[num_rows] = _Step(ids, FixedCache(cache, num_rows))
        step, fill = self._steps[num_rows], [0] * (num_rows - B)
        step.ids.copy_(torch.tensor(tokens + fill)[:, None])
        step.fixed.positions.copy_(torch.tensor(cache.lengths[:B] + fill)[:, None])
        if step.replay is None and not self._record(step):  # with these inputs, for recording runs the step, too
            return None
        step.replay()
        cache.lengths[:B] = [length + 1 for length in cache.lengths[:B]]
        return step.logits[:B, -1]

    def _record(self, step):
        """False, once and for all steps, where recording fails: decoding goes on without."""
        try:
            step.replay, step.logits = self.record(lambda: self.forward(step.ids, step.fixed))
        except RuntimeError as error:
            print(f"note: decoding without CUDA graphs: {error}", flush=True)
            self.record = None
        return step.replay is not None


@dataclass
class _Step:
    ids: torch.Tensor                # (B, 1), the tokens that go in
    fixed: FixedCache
    replay: Callable | None = None   # fills logits
    logits: torch.Tensor | None = None  # (B, 1, V)


class CudaRecorder:
    """recorder(function) records the kernels of function(), which returns a tensor that each replay fills anew."""

    def __init__(self, device):
        self.device, self.last = device, None  # the last graph, which keeps the memory pool of all of them alive

    def __call__(self, function):
        """Returns (replay, the tensor)."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # once on a stream of its own, as recording will be
                function()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            pool = None if self.last is None else self.last.pool()  # one for all: only one graph runs at a time
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):  # other GPUs' engines go on
                output = function()
        self.last = graph
        return graph.replay, output
