"""
From documents to rows of tokens.

What a training step sees is a function of (seed, step) alone. Every rank walks the same stream of documents, packs
the same rows and keeps its share of them, so neither the number of ranks nor the micro-batch can change a step, and
a position in the stream is a few integers. Packing every rank's rows on every rank is affordable because encoding
runs in Rust at tens of megabytes per second and ahead of training, in a background thread.

A row holds T + 1 tokens (inputs are the first T, targets the last T) and starts with <|bos|>, as each document does.
Rows are made block by block, a block being about BLOCK_TOKENS of consecutive documents of one epoch:
  - a document longer than a row is cut; what remains becomes a document of its own, with its own <|bos|>;
  - the others are packed best-fit: the longest that still fits, until none does, and the gap takes the head of a
    document, whose tail goes back to the rest;
  - the last row of a block is filled from the document after it, and the next block starts in the middle of that one.
So nothing is padded or lost: the position (epoch, file, row, token offset) where a block starts plus the number of rows
taken from it is all the state there is.

With `crop`, a long document gives one row in each epoch, from a random place, and what fills a gap loses its tail. For
a run that ends before it has seen all of the text, some of every document is better than all of some (dev/LOG.md).
"""

import bisect
import queue
import threading

import numpy as np
import torch

from nanochat.common import IGNORE, UserError, ceil_div
from nanochat.dataset import read_documents

BLOCK_TOKENS = 2**19
ENCODE_CHARS = 2**19  # characters handed to the tokenizer at once
ENCODE_CONVERSATIONS = 256  # conversations handed to it at once


# -----------------------------------------------------------------------------
# Documents


def token_documents(tokenizer, spans, seed, start=(0, 0, 0), epochs=None):
    """
    Yield ((epoch, span, row), ids) for every document of `spans` from `start` on, forever or for `epochs` epochs;
    ids is an int array without <|bos|>. The files are visited in another order in every epoch of every seed, span
    being the place in that order. A stream without documents is a UserError, not an endless search.
    """
    epoch, first_span, first_row = start
    while epochs is None or epoch < epochs:
        order = _span_order(len(spans), seed, epoch) if epochs is None else range(len(spans))
        found = False
        for index in range(first_span, len(spans)):
            rows = read_documents(spans[order[index]], first_row)
            for row, ids in _encode_in_batches(tokenizer, rows):
                found = True
                yield (epoch, index, row), ids
            first_row = 0
        if not found and first_span == 0:
            raise UserError("the data holds no documents", "check --data, or run: python -m nanochat.dataset -n 8")
        epoch, first_span = epoch + 1, 0


def _span_order(num_spans, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(num_spans)


def describe_position(state, spans, seed):
    """The file and row in it where the current block of a `training_rows` loader with this state() starts, in words."""
    span = spans[_span_order(len(spans), seed, state["epoch"])[state["span"]]]
    return f"{span.path}, row {state['row']} and after (epoch {state['epoch']})"


def _encode_in_batches(tokenizer, rows):
    """(row, text) pairs -> (row, ids) pairs, encoded ENCODE_CHARS at a time."""
    numbers, texts, chars = [], [], 0

    def flush():
        ids, offsets = tokenizer.encode_to_numpy(texts)
        for i, number in enumerate(numbers):
            yield number, ids[offsets[i]: offsets[i + 1]]

    for number, text in rows:
        numbers.append(number)
        texts.append(text)
        chars += len(text)
        if chars >= ENCODE_CHARS:
            yield from flush()
            numbers, texts, chars = [], [], 0
    if texts:
        yield from flush()


# -----------------------------------------------------------------------------
# Packing


def pack_rows(pieces, bos, capacity, crop=False):
    """
    Best-fit packing of pieces (int arrays that start with bos) into rows of `capacity` tokens.
    Returns (rows, rest): whole rows as an array (R, capacity), and the tokens of an unfinished last row.
    crop: what fills a gap loses its tail instead of giving it back.

    >>> pack_rows([np.array([0, 1, 2]), np.array([0, 3])], bos=0, capacity=4)[0]
    array([[0, 1, 2, 0]])
    """
    rows, pool = [], []
    for piece in pieces:
        while len(piece) > capacity:  # a long document gives whole rows
            rows.append(piece[:capacity])
            piece = _behead(piece, capacity, bos)
        pool.append(piece)
    pool.sort(key=len)
    lengths = [len(piece) for piece in pool]  # kept parallel to pool, ascending

    def take(i):
        del lengths[i]
        return pool.pop(i)

    row, room = [], capacity
    while pool:
        fitting = bisect.bisect_right(lengths, room) - 1
        if fitting >= 0:
            row.append(take(fitting))
        else:  # nothing fits: cut the document that loses least (crop), or the longest
            piece = take(0 if crop else len(pool) - 1)
            row.append(piece[:room])
            if not crop:
                tail = _behead(piece, room, bos)
                place = bisect.bisect_left(lengths, len(tail))
                lengths.insert(place, len(tail))
                pool.insert(place, tail)
        room -= len(row[-1])
        if room == 0:
            rows.append(np.concatenate(row))
            row, room = [], capacity
    rows = np.stack(rows) if rows else np.empty((0, capacity), dtype=np.int32)
    return rows, np.concatenate(row) if row else np.empty(0, dtype=np.int32)


def _behead(piece, count, bos):
    """Drop the first `count` tokens of a piece and let the rest start with bos again."""
    rest = piece[count - 1:].copy()
    rest[0] = bos
    return rest


def packed_blocks(documents, bos, capacity, seed, offset=0, crop=False, block_tokens=None):
    """
    Endless ((position, offset), rows): where in the stream the block starts, and its rows, int32 (R, capacity),
    shuffled. A block ends with its epoch. `documents` is an endless iterator of (position, ids) that starts at the
    document with the offset.
    """
    block_tokens = max(block_tokens or BLOCK_TOKENS, capacity)
    position, ids = next(documents)
    while True:
        start, pieces, total = (position, offset), [], 0
        while total < block_tokens and position[0] == start[0][0]:  # else one pass would see some of the next
            if crop and len(ids) >= capacity:  # a row of it, from another place in every epoch
                at = np.random.default_rng([seed, *position]).integers(len(ids) - capacity + 2)
                ids = ids[at: at + capacity - 1]
            pieces.append(np.concatenate(([bos], ids[offset:])).astype(np.int32))
            total += len(pieces[-1])
            (position, ids), offset = next(documents), 0
        rows, rest = pack_rows(pieces, bos, capacity, crop)
        while 0 < len(rest) < capacity:  # finish the last row with what comes next
            piece = np.concatenate(([bos], ids[offset:])).astype(np.int32)
            room = capacity - len(rest)
            rest = np.concatenate((rest, piece[:room]))
            if crop or len(piece) <= room:
                (position, ids), offset = next(documents), 0
            else:
                offset += room - 1  # the bos in front took one of the places
        if len(rest):
            rows = np.concatenate((rows, rest[None]))
        # long documents give runs of neighbouring rows: spread them over the block
        order = np.random.default_rng([seed, *start[0], start[1]]).permutation(len(rows))
        yield start, rows[order]


# -----------------------------------------------------------------------------
# Training and validation rows


class RowLoader:
    """
    Rows for training: `next_rows(n)` -> int32 (n, T + 1). `state()` is a dict of integers; a loader made with it goes
    on with the very next row. Works ahead in a thread; an error there is raised by the next `next_rows`.

    documents(position) must return an endless iterator of (position, ids) from that position (three integers) on.
    """

    def __init__(self, documents, bos, sequence_len, seed=42, state=None, crop=False, block_tokens=None):
        state = state or {"epoch": 0, "span": 0, "row": 0, "offset": 0, "rows_used": 0}  # files: span; else 0
        position = (state["epoch"], state["span"], state["row"])
        offset, capacity = state["offset"], sequence_len + 1
        self._blocks = packed_blocks(documents(position), bos, capacity, seed, offset, crop, block_tokens)
        self._queue, self._stop = queue.Queue(maxsize=2), threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        self._start, self._rows = self._next_block()
        self._used = state["rows_used"]

    def _work(self):
        try:
            for block in self._blocks:
                if not self._put(block):
                    return
        except BaseException as error:  # handed to the thread that waits for rows
            self._put(error)

    def _put(self, item):
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _next_block(self):
        block = self._queue.get()
        if isinstance(block, BaseException):
            raise block
        return block

    def next_rows(self, n):
        parts = []
        while n > 0:
            if self._used >= len(self._rows):  # more, when a resumed run finds less text than it had
                (self._start, self._rows), self._used = self._next_block(), 0
            part = self._rows[self._used: self._used + n]
            self._used += len(part)
            n -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    def state(self):
        (epoch, span, row), offset = self._start
        return {"epoch": int(epoch), "span": int(span), "row": int(row), "offset": int(offset),
                "rows_used": int(self._used)}

    def close(self):
        self._stop.set()
        self._thread.join(timeout=5)


def training_rows(tokenizer, spans, sequence_len, seed=42, state=None, crop=False, block_tokens=None):
    """A RowLoader over the documents of `spans` (see nanochat.dataset.get_spans)."""
    def documents(position):
        return token_documents(tokenizer, spans, seed, position)
    return RowLoader(documents, tokenizer.get_bos_token_id(), sequence_len, seed, state, crop, block_tokens)


def eval_rows(tokenizer, spans, sequence_len, max_tokens):
    """A fixed set of rows (see pack_documents): the documents of `spans` from the first one on."""
    documents = token_documents(tokenizer, spans, seed=0, epochs=1)
    return pack_documents(documents, tokenizer.get_bos_token_id(), sequence_len, max_tokens)


def pack_documents(documents, bos, sequence_len, max_tokens):
    """
    A finite stream of (position, ids) as rows, int32 (R, T + 1), from its start until max_tokens (-1 = all), packed
    as in training with nothing cropped; the last row is filled with IGNORE.
    """
    pieces, total = [], 0
    for _, ids in documents:
        if 0 <= max_tokens <= total:
            break
        keep = len(ids) if max_tokens < 0 else min(len(ids), max_tokens - total)
        pieces.append(np.concatenate(([bos], ids[:keep])).astype(np.int32))
        total += keep
    rows, rest = pack_rows(pieces, bos, sequence_len + 1)
    if len(rest) > 1:
        filler = np.full(sequence_len + 1 - len(rest), IGNORE, dtype=np.int32)
        rows = np.concatenate((rows, np.concatenate((rest, filler))[None]))
    return rows


def conversation_rows(dataset, indices, tokenizer, max_len):
    """
    One conversation per row, the shortest first: (inputs, targets, number of conversations cut), int32 (R, T) each, T
    the longest of them rounded up to a multiple of 32 (few shapes occur), at most max_len. Targets are the tokens that
    the assistant itself produces, IGNORE elsewhere; what goes beyond max_len is cut off.
    """
    rendered = [tokenizer.render_conversation(dataset[index], max_tokens=None) for index in indices]
    rendered.sort(key=lambda conversation: len(conversation[0]))  # micro-batches of like length need little padding
    longest = len(rendered[-1][0]) - 1
    T = min(max_len, 32 * ceil_div(longest, 32))
    inputs = np.full((len(rendered), T), tokenizer.get_bos_token_id(), dtype=np.int32)
    targets = np.full((len(rendered), T), IGNORE, dtype=np.int32)
    for row, (ids, mask) in enumerate(rendered):
        ids, mask = np.array(ids[: T + 1]), np.array(mask[: T + 1])
        inputs[row, : len(ids) - 1] = ids[:-1]
        targets[row, : len(ids) - 1] = np.where(mask[1:] == 1, ids[1:], IGNORE)
    return inputs, targets, sum(len(ids) > T + 1 for ids, _ in rendered)


def even_weights(targets):
    """Weights (R, T) for targets (R, T) by which every row counts the same: 1 in all, over rows, then targets."""
    is_target = targets != IGNORE
    counts = is_target.sum(axis=1, keepdims=True)
    return (is_target / np.maximum(counts, 1) / max(1, (counts > 0).sum())).astype(np.float32)


def count_used(targets):
    """Tokens of (R, T) that training looks at: each row's up to its last target."""
    return int(((targets != IGNORE) * np.arange(1, 1 + targets.shape[1])).max(axis=1).sum())


def conversation_documents(dataset, tokenizer, start=(0, 0, 0), epochs=None):
    """
    Conversations as a stream of documents for packing: ((epoch, 0, index), ids without <|bos|>), for ever or for so
    many epochs.
    """
    epoch, _, index = start
    if len(dataset) == 0:
        raise UserError("the mixture of conversations is empty", "check the data of its tasks")
    while epochs is None or epoch < epochs:
        for i, ids in rendered_conversations(dataset, range(index, len(dataset)), tokenizer):
            yield (epoch, 0, i), ids[1:]
        epoch, index = epoch + 1, 0


def rendered_conversations(dataset, indices, tokenizer):
    """Yield (index, ids with <|bos|>) of each conversation of `indices`, ENCODE_CONVERSATIONS rendered at a time."""
    for first in range(0, len(indices), ENCODE_CONVERSATIONS):
        batch = indices[first: first + ENCODE_CONVERSATIONS]
        yield from zip(batch, tokenizer.render_batch([dataset[i] for i in batch]), strict=True)


def shift(rows):
    """Rows (R, T + 1) -> (inputs, targets), (R, T) each; an IGNORE stays one among the targets."""
    return np.maximum(rows[:, :-1], 0), rows[:, 1:]


def to_device(array, device):
    """An array as a tensor on the device: token ids as int64, weights as they are."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    tensor = tensor if tensor.is_floating_point() else tensor.long()
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def eval_batches(rows, device_batch_size, device):
    """Yield (inputs, targets), int64 (B, T) on the device, of rows (R, T + 1); targets are IGNORE where a row is."""
    for start in range(0, len(rows), device_batch_size):
        inputs, targets = shift(rows[start: start + device_batch_size])
        yield to_device(inputs, device), to_device(targets, device)
