"""
CUDA graphs for decoding. A step of one token per row launches hundreds of small kernels, and on a
fast GPU Python needs longer to issue them than they need to run. A graph records such a step once
and replays it with a single call.

A graph is for fixed shapes, so the number of rows is rounded up to a power of two, and a step
attends to the cache's whole length, with the length of each row in a tensor. The extra rows are
padding: they write to slots that are overwritten when a row is admitted there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

WARM_UP = 2  # ordinary steps of a shape before it is recorded: in the first, libraries choose kernels and workspace


class FixedCache:
    """A KVCache as a recorded step sees it: num_rows rows of all positions, whatever they hold."""

    def __init__(self, cache, num_rows):
        device = cache.k.device
        self.positions = torch.zeros(num_rows, 1, dtype=torch.long, device=device)  # (B, 1), where the token goes
        rows = torch.arange(num_rows, device=device)
        self.layers = []
        for k, v in zip(cache.k, cache.v, strict=True):
            self.layers.append(FixedLayer(k[:num_rows], v[:num_rows], rows, self.positions))

    def begin(self, T):
        """As KVCache.begin, for T = 1."""
        return self.positions, self.layers


@dataclass
class FixedLayer:
    """
    A layer of it. Stores as KVCache._store does, on tensors alone, so that all layers compile to
    the same code.
    """
    k: torch.Tensor          # (B, H_kv, S, D)
    v: torch.Tensor
    rows: torch.Tensor       # 0 .. B - 1
    positions: torch.Tensor  # (B, 1)

    def __call__(self, k, v):
        places = self.positions[:, 0]
        self.k[self.rows, :, places] = k[:, :, 0].to(self.k.dtype)
        self.v[self.rows, :, places] = v[:, :, 0].to(self.v.dtype)
        return self.k, self.v, self.positions


class StepGraphs:
    """
    The decode steps of one KVCache, recorded for each number of rows. forward(ids (B, 1), cache) ->
    logits (B, 1, V) is the model's; record(function) -> (replay, output) is a CudaRecorder, a
    stand-in in a test, or None for none.
    """

    def __init__(self, forward, cache, record):
        self.forward = forward
        self.cache = cache
        self.record = record
        self._forget()

    def _forget(self):
        """Graphs point at the cache's memory, so they end when it grows."""
        self._steps = {}  # number of rows -> RecordedStep
        self._uses = {}   # number of rows -> ordinary steps so far
        self._recorded_k = self.cache.k

    def step(self, tokens):
        """
        The logits (B, V) after one more token in each of the first B rows, or None where the step
        is not recorded (yet) and the caller takes it the ordinary way. Valid until the next step.
        """
        if self.record is None:
            return None
        B = len(tokens)
        lengths = self.cache.lengths[:B]
        self.cache.reserve(max(lengths) + 1)
        if self._recorded_k is not self.cache.k:
            self._forget()
        num_rows = min(1 << (B - 1).bit_length(), self.cache.k.size(1))
        step = self._find_step(num_rows)
        if step is None:
            return None

        # Fill in the inputs, then run: recording runs the step too, so it needs them first
        padding = [0] * (num_rows - B)
        step.ids.copy_(torch.tensor(tokens + padding)[:, None])
        step.cache.positions.copy_(torch.tensor(lengths + padding)[:, None])
        if step.replay is None and not self._record(step):
            return None
        step.replay()
        self.cache.lengths[:B] = [length + 1 for length in lengths]
        return step.logits[:B, -1]

    def _find_step(self, num_rows):
        """The step for num_rows rows, or None while it is still warming up."""
        if num_rows not in self._steps:
            self._uses[num_rows] = self._uses.get(num_rows, 0) + 1
            if self._uses[num_rows] <= WARM_UP:
                return None
            ids = torch.zeros(num_rows, 1, dtype=torch.long, device=self.cache.k.device)
            self._steps[num_rows] = RecordedStep(ids, FixedCache(self.cache, num_rows))
        return self._steps[num_rows]

    def _record(self, step):
        """False, once and for all steps, where recording fails: decoding goes on without."""
        try:
            step.replay, step.logits = self.record(lambda: self.forward(step.ids, step.cache))
        except RuntimeError as error:
            print(f"note: decoding without CUDA graphs: {error}", flush=True)
            self.record = None
        return step.replay is not None


@dataclass
class RecordedStep:
    ids: torch.Tensor                # (B, 1), the input tokens
    cache: FixedCache
    replay: Callable | None = None   # fills logits
    logits: torch.Tensor | None = None  # (B, 1, V)


class CudaRecorder:
    """
    recorder(function) records the kernels of function(), which returns a tensor that each replay
    fills anew.
    """

    def __init__(self, device):
        self.device = device
        self.last = None  # the last graph, which keeps the memory pool of all of them alive

    def __call__(self, function):
        """Returns (replay, the tensor)."""
        with torch.cuda.device(self.device):
            # Once on a stream of its own, as recording will be
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()
            torch.cuda.current_stream().wait_stream(stream)

            # All graphs share one memory pool, since only one runs at a time. thread_local: other
            # GPUs' engines go on
            graph = torch.cuda.CUDAGraph()
            pool = None if self.last is None else self.last.pool()
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                output = function()
        self.last = graph
        return graph.replay, output
