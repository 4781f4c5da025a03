"""
Two losses on held-out text, and the windows in which whole documents are scored.

Bits per byte can be compared between tokenizers: a model with a larger vocabulary has a higher loss
per token because each token holds more text. So the losses are summed over the tokens and divided
by the bytes of their text. Special tokens have no text: neither their loss nor their bytes count.

The loss per target token is for SFT, whose targets are the assistant's tokens, special ones
included.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from nanochat.common import IGNORE, UserError
from nanochat.distributed import gather_objects, run_together
from nanochat.precision import get_autocast_ctx
from nanochat.progress import show_progress

# -----------------------------------------------------------------------------
# A ratio of sums, with its error


class Estimate(NamedTuple):
    """
    A loss on a sample of documents. With `_asdict()` it is a metric of the report.

    The standard error says how much the loss would differ on other documents of this kind, of which
    there are n. It is that of a ratio estimator (Cochran, Sampling Techniques, section 2.11).
    """
    value: float
    stderr: float | None  # None for a single document
    n: int

    @classmethod
    def from_sums(cls, nats, units):
        """sum(nats) / sum(units), of arrays (n,) with what each document has."""
        n = len(nats)
        total = units.sum()
        ratio = nats.sum() / total
        if n < 2:
            return cls(float(ratio), None, n)
        # a document has this much more than the ratio makes of its units; the mean is 0
        residuals = nats - ratio * units
        stderr = np.sqrt(n / (n - 1) * (residuals**2).sum()) / total
        return cls(float(ratio), float(stderr), n)

    def scaled(self, factor):
        """The same in another unit."""
        stderr = None if self.stderr is None else self.stderr * factor
        return Estimate(self.value * factor, stderr, self.n)

    def as_metrics(self, name):
        """{name: value, name_stderr: standard error} for the log of a run."""
        metrics = {name: self.value}
        if self.stderr is not None:
            metrics[f"{name}_stderr"] = self.stderr
        return metrics

    def __str__(self):
        error = "" if self.stderr is None else f" ± {self.stderr:.6f}"
        return f"{self.value:.6f}{error}"


# -----------------------------------------------------------------------------
# The two losses


def evaluate_bpb(model, batches, token_bytes):
    """
    Bits per byte of `model`, an Estimate. token_bytes: int tensor (V,), bytes of each token, 0 for
    special ones.

    batches: an iterable of (x, y, documents). x and y are int64 (B, T), with y < 0 where there is
    no target. documents, int (B, T) or (B, 1), numbers the document of each target. Collective;
    raises as `_nats_per_unit` does.
    """
    def num_bytes(y):
        text_bytes = token_bytes[y.clamp(min=0)]  # (B, T)
        return torch.where(y >= 0, text_bytes, 0)

    # one bit is log(2) nats
    return _nats_per_unit(model, batches, num_bytes).scaled(1 / math.log(2))


def evaluate_loss(model, batches):
    """
    Mean loss in nats over the targets y >= 0 of `batches`, as above. Collective; raises as
    `_nats_per_unit` does.
    """
    # each target is one unit
    return _nats_per_unit(model, batches, lambda y: (y >= 0).long()).value


def _nats_per_unit(model, batches, units):
    """
    Sum of the losses in nats / sum of units(y), an Estimate. units(y) counts the units (bytes,
    tokens) of each target; the loss of a target with 0 units is left out.

    Collective: every rank brings its own batches (perhaps none) and gets the same result. An error
    on one rank, out of memory for example, becomes an error on all. Raises UserError when there is
    nothing to score.
    """
    # Evaluation mode for the time of the loop, also when it fails
    was_training = model.training
    model.eval()
    try:
        sums = run_together(lambda: _sum_documents(model, batches, units), model.device)
    finally:
        model.train(was_training)

    # The sums of all ranks, which may have parts of the same document
    by_document = {}
    for document, nats, count in gather_objects(sums):
        total = by_document.setdefault(document, np.zeros(2))
        total += (nats, count)
    table = np.array([total for total in by_document.values() if total[1] > 0])  # (n, 2)
    if len(table) == 0:
        raise UserError("the rows hold nothing to score; need at least one target token",
                        "score more rows: --eval_tokens=-1, in SFT --eval_examples=-1, takes all")
    return Estimate.from_sums(table[:, 0], table[:, 1])


@torch.no_grad()
def _sum_documents(model, batches, units):
    """[(document, nats, units)] of this rank; a document may come in several parts."""
    sums = []
    for x, y, documents in batches:
        with get_autocast_ctx(x.device):
            nats = model(x, y, loss_reduction="none")  # (B, T)
        counts = units(y)  # (B, T)
        nats = nats * (counts > 0)

        # On the CPU, since MPS has no float64. In float64 the result does not depend on the size of
        # the batches
        nats = nats.cpu().double().numpy()
        counts = counts.cpu().numpy()
        numbers, places = np.unique(np.broadcast_to(documents, y.shape), return_inverse=True)
        places = places.ravel()
        nats_of = np.bincount(places, nats.ravel())
        counts_of = np.bincount(places, counts.ravel())
        sums += zip(numbers.tolist(), nats_of, counts_of, strict=True)
    return sums


# -----------------------------------------------------------------------------
# Whole documents


def document_windows(ids, bos, sequence_len):
    """
    [(inputs, targets)], int64 arrays of up to sequence_len tokens: windows that score every token
    of a document, int array (N,), exactly once. The first one starts with <|bos|>. The others start
    with tokens of the window before, which are context alone, so their targets are IGNORE: one
    token, or in the last window as many as have room.

    lm-evaluation-harness cuts documents in this way, for what it calls bits_per_byte.
    """
    stream = np.concatenate(([bos], ids)).astype(np.int64)  # (N + 1,)
    windows = []
    for start in range(0, len(ids), sequence_len):
        # The tokens start + 1 ... stop of the stream are scored
        stop = min(start + sequence_len, len(ids))
        first = max(0, stop - sequence_len)
        inputs = stream[first:stop]
        targets = stream[first + 1 : stop + 1].copy()
        targets[: start - first] = IGNORE
        windows.append((inputs, targets))
    return windows


def document_pieces(ids, bos, sequence_len):
    """
    [(inputs, targets)] like `document_windows`, but cut as training cuts: each piece starts with
    <|bos|>, and none has context of the piece before.
    """
    pieces = []
    for start in range(0, len(ids), sequence_len):
        targets = np.asarray(ids[start : start + sequence_len], dtype=np.int64)
        inputs = np.concatenate(([bos], targets[:-1]))
        pieces.append((inputs, targets))
    return pieces


def window_batches(documents, device_batch_size, device):
    """
    Yield (inputs, targets, documents): int64 (B, T) on the device, and the number of each row's
    document, int (B, 1). `documents` is an iterable of (number, windows), of at most T tokens each.
    Shorter windows are padded at the end, where causal attention does not look.
    """
    windows = []
    for number, document in documents:
        windows += [(inputs, targets, number) for inputs, targets in document]

    # By length: then a batch needs little padding
    windows.sort(key=lambda window: len(window[0]))
    starts = range(0, len(windows), device_batch_size)
    for first in show_progress(starts, "evaluating", "batches"):
        batch = windows[first : first + device_batch_size]
        T = len(batch[-1][0])
        inputs = np.zeros((len(batch), T), dtype=np.int64)
        targets = np.full((len(batch), T), IGNORE)
        numbers = np.zeros((len(batch), 1), dtype=np.int64)
        for row, (window_inputs, window_targets, number) in enumerate(batch):
            inputs[row, : len(window_inputs)] = window_inputs
            targets[row, : len(window_targets)] = window_targets
            numbers[row] = number
        yield torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device), numbers
