"""
CUDA graphs for decoding. A step of one token per row launches hundreds of small kernels. On a fast
GPU, Python takes longer to launch them than they take to run. A graph records such a step once and
replays it with a single call.

A graph has fixed shapes. So the number of rows is rounded up to a power of two, and a step attends
to the cache's whole length, with the length of each row in a tensor. The extra rows are padding:
they write to slots that are overwritten when a row is admitted there.

Shapes: B rows, S positions of the cache, D head size, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

# Ordinary steps of a shape before it is recorded: in the first, libraries choose their kernels
WARM_UP = 2


class FixedCache:
    """A KVCache as a recorded step sees it: num_rows rows, each with all of its positions."""

    def __init__(self, cache, num_rows):
        device = cache.k.device
        # (B, 1): where the new tokens go; filled in before each step
        self.positions = torch.zeros(
            (num_rows, 1),
            dtype=torch.long,
            device=device,
        )
        rows = torch.arange(num_rows, device=device)
        self.layers = []
        for k, v in zip(cache.k, cache.v, strict=True):
            layer = FixedLayer(k[:num_rows], v[:num_rows], rows, self.positions)
            self.layers.append(layer)

    def begin(self, T):
        """As KVCache.begin, for T = 1."""
        return self.positions, self.layers


@dataclass
class FixedLayer:
    """
    A layer of a FixedCache. Stores as KVCache._store does. It holds tensors alone, so that all
    layers compile to the same code.
    """
    k: torch.Tensor          # (B, H_kv, S, D)
    v: torch.Tensor          # likewise
    rows: torch.Tensor       # 0 .. B - 1
    positions: torch.Tensor  # (B, 1)

    def __call__(self, k, v):
        places = self.positions[:, 0]  # (B,)
        self.k[self.rows, :, places] = k[:, :, 0].to(self.k.dtype)
        self.v[self.rows, :, places] = v[:, :, 0].to(self.v.dtype)
        return self.k, self.v, self.positions


class StepGraphs:
    """
    The decode steps of one KVCache, recorded for each number of rows.

    forward(ids (B, 1), cache) -> logits (B, 1, V) is the model's. record(function) -> (replay,
    output) is a CudaRecorder, or its stand-in in a test. Without it nothing is recorded.
    """

    def __init__(self, forward, cache, record):
        self.forward = forward
        self.cache = cache
        self.record = record
        self._forget()

    def _forget(self):
        """Drop all graphs: they point at the cache's memory, which it leaves when it grows."""
        self._steps = {}  # number of rows -> RecordedStep
        self._uses = {}   # number of rows -> ordinary steps so far
        self._recorded_k = self.cache.k

    def step(self, tokens):
        """
        The logits (B, V) after one more token in each of the first B rows, valid until the next
        step. None where the step is not recorded (yet): then the caller takes an ordinary step.
        """
        if self.record is None:
            return None

        # The recorded step for this number of rows, if the cache is still where it was
        B = len(tokens)
        lengths = self.cache.lengths[:B]
        self.cache.reserve(max(lengths) + 1)
        if self._recorded_k is not self.cache.k:
            self._forget()
        power_of_two = 1 << (B - 1).bit_length()
        num_rows = min(power_of_two, self.cache.k.size(1))
        step = self._find_step(num_rows)
        if step is None:
            return None

        # Fill in the inputs, then run: recording runs the step too, so it needs them first
        padding = [0] * (num_rows - B)
        ids = torch.tensor(tokens + padding)
        positions = torch.tensor(lengths + padding)
        step.ids.copy_(ids[:, None])
        step.cache.positions.copy_(positions[:, None])
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
            # The memory of its input and output stays in place
            cache = FixedCache(self.cache, num_rows)
            ids = torch.zeros_like(cache.positions)  # (B, 1)
            self._steps[num_rows] = RecordedStep(ids, cache)
        return self._steps[num_rows]

    def _record(self, step):
        """Record a step; False if that fails. Then decoding goes on without graphs."""
        try:
            step.replay, step.logits = self.record(lambda: self.forward(step.ids, step.cache))
        except RuntimeError as error:
            print(f"note: decoding without CUDA graphs: {error}", flush=True)
            self.record = None
        return step.replay is not None


@dataclass
class RecordedStep:
    ids: torch.Tensor                   # (B, 1), the input tokens
    cache: FixedCache
    replay: Callable | None = None      # computes the logits; None = not recorded yet
    logits: torch.Tensor | None = None  # (B, 1, V)


class CudaRecorder:
    """recorder(function) records the kernels of function(), which returns a tensor."""

    def __init__(self, device):
        self.device = device
        self.last = None  # the last graph, which keeps the memory pool of all of them alive

    def __call__(self, function):
        """Returns (replay, the tensor). Each replay() overwrites the tensor."""
        with torch.cuda.device(self.device):
            # Once on a stream of its own, as recording will be
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()
            torch.cuda.current_stream().wait_stream(stream)

            # All graphs share one memory pool, since only one runs at a time. thread_local: the
            # threads of other GPUs go on meanwhile
            graph = torch.cuda.CUDAGraph()
            pool = None if self.last is None else self.last.pool()
            with torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                output = function()
        self.last = graph
        return graph.replay, output
