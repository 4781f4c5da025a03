"""
From documents to rows of tokens.

What a training step sees is a function of (seed, step) alone. Every rank walks the same stream of
documents, packs the same rows and keeps its share of them. So neither the number of ranks nor the
micro-batch can change a step, and a position in the stream is a few integers. Packing every rank's
rows on every rank is affordable because encoding runs in Rust at tens of megabytes per second and
ahead of training, in a background thread.

A row holds T + 1 tokens (inputs are the first T, targets the last T) and starts with <|bos|>, as
each document does. Rows are made block by block, a block being about BLOCK_TOKENS of consecutive
documents of one epoch:
  - a document longer than a row is cut; the rest becomes a document of its own, with its own
    <|bos|>;
  - the others are packed best-fit: the longest that still fits, until none does. Then the gap is
    filled with the start of a document, whose rest waits again;
  - the last row of a block is filled from the document after it, and the next block starts in the
    middle of that one.
So nothing is padded or lost. The position (epoch, file, row, token offset) where a block starts and
the number of rows taken from it are the whole state.

With `crop`, a long document gives one row in each epoch, from a random place, and a document that
fills a gap loses its rest. For a run that ends before it has seen all of the text, seeing part of
every document beats seeing a few documents in full (dev/LOG.md).
"""

import bisect
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from nanochat.common import IGNORE, UserError, ceil_div
from nanochat.dataset import read_documents

BLOCK_TOKENS = 2**19
BLOCKS_AHEAD = 3            # made in the background before they are asked for
ENCODE_CHARS = 2**19        # characters handed to the tokenizer at once
ENCODE_CONVERSATIONS = 256  # conversations handed to it at once

# State of a loader: where its current block starts, and how much of it is used
START = {
    "epoch": 0,
    "span": 0,       # place of the file in this epoch's order; 0 for conversations
    "row": 0,        # row of that file, or index of a conversation
    "offset": 0,     # tokens of that document that the block before took
    "rows_used": 0,  # rows taken from the block
}


# -----------------------------------------------------------------------------
# Streams of documents: ((epoch, span, row), ids), where ids is an int array without <|bos|>


def token_documents(tokenizer, spans, seed, start=(0, 0, 0), epochs=None):
    """
    Yield every document of `spans` from the position `start` on, for ever or for `epochs` epochs.
    Without `epochs`, the files are visited in another order in every epoch of every seed. A stream
    without documents is a UserError, not an endless search.
    """
    epoch, first_span, first_row = start
    while epochs is None or epoch < epochs:
        # `start` says where the first epoch begins; the later ones begin at their first file
        order = range(len(spans)) if epochs else _span_order(len(spans), seed, epoch)
        found = False
        for span in range(first_span, len(spans)):
            rows = read_documents(spans[order[span]], first_row)
            for row, ids in _encode_in_batches(tokenizer, rows):
                found = True
                yield (epoch, span, row), ids
            first_row = 0
        if not found and first_span == 0:
            raise UserError("the data holds no documents", "check --data, or run: python -m nanochat.dataset -n 8")
        epoch += 1
        first_span = 0


def _span_order(num_spans, seed, epoch):
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_spans)


def describe_position(state, spans, seed):
    """
    The file and row where the current block of a `training_rows` loader starts, in words; `state`
    is its state().
    """
    order = _span_order(len(spans), seed, state["epoch"])
    span = spans[order[state["span"]]]
    return f"{span.path}, row {state['row']} and after (epoch {state['epoch']})"


def _encode_in_batches(tokenizer, rows):
    """(row, text) pairs -> (row, ids) pairs, encoded ENCODE_CHARS at a time."""
    for batch in _batches_of_text(rows):
        texts = [text for _, text in batch]
        ids, offsets = tokenizer.encode_to_numpy(texts)
        for i, (row, _) in enumerate(batch):  # document i is a view of the batch's ids
            yield row, ids[offsets[i]: offsets[i + 1]]


def _batches_of_text(rows):
    batch = []
    num_chars = 0
    for row, text in rows:
        batch.append((row, text))
        num_chars += len(text)
        if num_chars >= ENCODE_CHARS:
            yield batch
            batch = []
            num_chars = 0
    if batch:
        yield batch


def conversation_documents(dataset, tokenizer, start=(0, 0, 0), epochs=None):
    """
    Yield the conversations of a dataset in its order as documents, from the position `start` on,
    for ever or for `epochs` epochs.
    """
    epoch, _, first = start
    if len(dataset) == 0:
        raise UserError("the mixture of conversations is empty", "check the data of its tasks")
    while epochs is None or epoch < epochs:
        for index, ids in rendered_conversations(dataset, range(first, len(dataset)), tokenizer):
            yield (epoch, 0, index), ids[1:]  # packing puts the <|bos|> in front again
        epoch += 1
        first = 0


def rendered_conversations(dataset, indices, tokenizer):
    """
    Yield (index, ids with <|bos|>) of each conversation of `indices`, ENCODE_CONVERSATIONS rendered
    at a time.
    """
    for start in range(0, len(indices), ENCODE_CONVERSATIONS):
        batch = indices[start: start + ENCODE_CONVERSATIONS]
        conversations = [dataset[i] for i in batch]
        yield from zip(batch, tokenizer.render_batch(conversations), strict=True)


# -----------------------------------------------------------------------------
# Packing


def pack_rows(pieces, bos, capacity, crop=False):
    """
    Best-fit packing of pieces (int arrays that start with bos) into rows of `capacity` tokens.
    Returns (rows, rest): whole rows as an array (R, capacity), and the tokens of an unfinished last
    row. crop: a piece that fills a gap loses its rest instead of giving it back.

    >>> pack_rows([np.array([0, 1, 2]), np.array([0, 3])], bos=0, capacity=4)[0]
    array([[0, 1, 2, 0]])
    """
    # Long pieces give whole rows
    packed = []  # the rows' pieces one after the other; they fill the rows without a gap
    pool = []    # pieces that wait, sorted by length
    for piece in pieces:
        while len(piece) > capacity:
            packed.append(piece[:capacity])
            piece = _drop_start(piece, capacity, bos)
        pool.append(piece)
    pool.sort(key=len)

    # The others fill rows: the longest that fits in the rest of the row, else a part of one
    space = capacity
    while pool:
        num_fitting = bisect.bisect_right(pool, space, key=len)
        if num_fitting > 0:
            piece = pool.pop(num_fitting - 1)
        elif crop:
            piece = pool.pop(0)[:space]  # the shortest loses least
        else:
            longest = pool.pop()
            piece = longest[:space]
            rest = _drop_start(longest, space, bos)
            bisect.insort_left(pool, rest, key=len)
        packed.append(piece)
        space -= len(piece)
        if space == 0:
            space = capacity

    # One long array, cut into rows
    tokens = np.concatenate([np.empty(0, dtype=np.int32), *packed])
    end = len(tokens) - len(tokens) % capacity
    return tokens[:end].reshape(-1, capacity), tokens[end:]


def _drop_start(piece, count, bos):
    """Drop the first `count` tokens of a piece and let the rest start with bos again."""
    rest = piece[count - 1:].copy()
    rest[0] = bos
    return rest


def _with_bos(bos, ids):
    return np.concatenate(([bos], ids)).astype(np.int32)


class _Cursor:
    """
    A place in a stream of documents: inside the document `ids` at `position`, after its first
    `offset` tokens.
    """

    def __init__(self, documents, bos, offset):
        self.documents = documents
        self.bos = bos
        self.next_document()
        self.offset = offset

    def next_document(self):
        self.position, self.ids = next(self.documents)
        self.offset = 0

    def piece(self):
        return _with_bos(self.bos, self.ids[self.offset:])


def packed_blocks(documents, bos, capacity, seed, offset=0, crop=False, block_tokens=None):
    """
    Endless ((*position, offset), rows): where in the stream the block starts, and its rows, int32
    (R, capacity), shuffled. A block ends with its epoch. `documents` is an endless iterator of
    (position, ids) that starts at the document with the offset.
    """
    block_tokens = max(block_tokens or BLOCK_TOKENS, capacity)  # a row at least
    cursor = _Cursor(documents, bos, offset)
    while True:
        start = (*cursor.position, cursor.offset)
        epoch = start[0]

        # Take whole documents of one epoch: else one pass would see some of the next
        pieces = []
        num_tokens = 0
        while num_tokens < block_tokens and cursor.position[0] == epoch:
            if crop and len(cursor.ids) >= capacity:  # together with its bos more than a row
                cursor.ids = _random_part(cursor.ids, capacity - 1, [seed, *cursor.position])
            pieces.append(cursor.piece())
            num_tokens += len(pieces[-1])
            cursor.next_document()
        rows, rest = pack_rows(pieces, bos, capacity, crop)

        # Finish the last row with the documents that come next
        while 0 < len(rest) < capacity:
            space = capacity - len(rest)
            piece = cursor.piece()
            rest = np.concatenate((rest, piece[:space]))
            if crop or len(piece) <= space:
                cursor.next_document()
            else:
                cursor.offset += space - 1  # the bos in front took one of the places
        if len(rest) > 0:
            rows = np.concatenate((rows, rest[None]))

        # Long documents give runs of neighbouring rows: spread them over the block
        rng = np.random.default_rng([seed, *start])
        order = rng.permutation(len(rows))
        yield start, rows[order]


def _random_part(ids, length, seed):
    rng = np.random.default_rng(seed)
    first = rng.integers(len(ids) - length + 1)
    return ids[first: first + length]


def pack_documents(documents, bos, sequence_len, max_tokens):
    """
    A finite stream of (position, ids) as rows, int32 (R, T + 1), from its start until max_tokens
    (-1 = all), packed as in training with nothing cropped; the last row is filled with IGNORE.
    """
    pieces = []
    left = sys.maxsize if max_tokens < 0 else max_tokens
    for _, ids in documents:
        if left == 0:
            break
        ids = ids[:left]
        pieces.append(_with_bos(bos, ids))
        left -= len(ids)
    rows, rest = pack_rows(pieces, bos, sequence_len + 1)

    # A last row with a bos alone has no target
    if len(rest) > 1:
        last_row = np.full((1, sequence_len + 1), IGNORE, dtype=np.int32)
        last_row[0, : len(rest)] = rest
        rows = np.concatenate((rows, last_row))
    return rows


# -----------------------------------------------------------------------------
# Loaders


class RowLoader:
    """
    Rows for training, from `packed_blocks`: `next_rows(n)` -> int32 (n, T + 1). `state()` is a dict
    of integers; a loader made with it continues with the very next row. Blocks are made ahead in a
    thread. An error there is raised by the `next_rows` that needs the block.
    """

    def __init__(self, blocks, rows_used=0):
        self._blocks = blocks
        # One thread, so that the blocks come in order
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead = deque(self._thread.submit(next, blocks) for _ in range(BLOCKS_AHEAD))
        self._next_block()
        self._used = rows_used

    def _next_block(self):
        # Ask for one more before waiting for the one that is due
        block = self._ahead.popleft()
        self._ahead.append(self._thread.submit(next, self._blocks))
        self._start, self._rows = block.result()
        self._used = 0

    def next_rows(self, n):
        parts = []
        while n > 0:
            if self._used >= len(self._rows):  # greater, when a resumed run finds less text than there was
                self._next_block()
            part = self._rows[self._used: self._used + n]
            self._used += len(part)
            n -= len(part)
            parts.append(part)
        return np.concatenate(parts)

    def state(self):
        """A dict of integers, with the keys of START."""
        values = (*self._start, self._used)
        return dict(zip(START, values, strict=True))

    def close(self):
        self._thread.shutdown(cancel_futures=True)


def _position(state):
    return state["epoch"], state["span"], state["row"]


def training_rows(tokenizer, spans, sequence_len, seed=42, state=None, crop=False, block_tokens=None):
    """
    A RowLoader over the documents of `spans` (see nanochat.dataset.get_spans), from the start or
    from `state`.
    """
    state = state or START
    documents = token_documents(tokenizer, spans, seed, _position(state))
    blocks = packed_blocks(
        documents,
        tokenizer.get_bos_token_id(),
        sequence_len + 1,
        seed,
        state["offset"],
        crop,
        block_tokens,
    )
    return RowLoader(blocks, state["rows_used"])


def packed_conversations(dataset, tokenizer, sequence_len, seed=42, state=None):
    """
    A RowLoader over the conversations of `dataset`, packed like documents, from the start or from
    `state`.
    """
    state = state or START
    documents = conversation_documents(dataset, tokenizer, _position(state))
    blocks = packed_blocks(
        documents,
        tokenizer.get_bos_token_id(),
        sequence_len + 1,
        seed,
        state["offset"],
    )
    return RowLoader(blocks, state["rows_used"])


def eval_rows(tokenizer, spans, sequence_len, max_tokens):
    """A fixed set of rows (see pack_documents): the documents of `spans` from the first one on."""
    documents = token_documents(tokenizer, spans, seed=0, epochs=1)
    bos = tokenizer.get_bos_token_id()
    return pack_documents(documents, bos, sequence_len, max_tokens)


def conversation_rows(dataset, indices, tokenizer, max_len):
    """
    One conversation per row, the shortest first: (inputs, targets, number of conversations cut),
    int32 (R, T) each. T is the longest of them rounded up to a multiple of 32 (so that few shapes
    occur), at most max_len; what goes beyond is cut off. Targets are the tokens that the assistant
    itself produces, IGNORE elsewhere.
    """
    rendered = [tokenizer.render_conversation(dataset[index], max_tokens=None) for index in indices]
    rendered.sort(key=lambda conversation: len(conversation[0]))  # micro-batches of like length need little padding
    # Row i has lengths[i] inputs and as many targets, shifted by one
    lengths = [len(ids) - 1 for ids, _ in rendered]
    T = min(max_len, 32 * ceil_div(lengths[-1], 32))

    # What is not filled stays bos in the inputs, IGNORE in the targets
    shape = (len(rendered), T)
    inputs = np.full(shape, tokenizer.get_bos_token_id(), dtype=np.int32)
    targets = np.full(shape, IGNORE, dtype=np.int32)
    for row, (ids, mask) in enumerate(rendered):
        n = min(lengths[row], T)
        inputs[row, :n] = ids[:n]
        targets[row, :n] = np.where(mask[1: n + 1], ids[1: n + 1], IGNORE)
    num_cut = sum(length > T for length in lengths)
    return inputs, targets, num_cut


# -----------------------------------------------------------------------------
# From rows to the model


def shift(rows):
    """Rows (R, T + 1) -> (inputs, targets), (R, T) each; an IGNORE stays one among the targets."""
    return np.maximum(rows[:, :-1], 0), rows[:, 1:]


def to_device(array, device):
    """An array as a tensor on the device: token ids as int64, weights as they are."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if not tensor.is_floating_point():
        tensor = tensor.long()
    if device.type == "cuda":  # from pinned memory, so that the copy does not wait for queued work
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def eval_batches(rows, device_batch_size, device):
    """
    Yield (inputs, targets), int64 (B, T) on the device, of rows (R, T + 1); targets are IGNORE
    where a row is.
    """
    for start in range(0, len(rows), device_batch_size):
        inputs, targets = shift(rows[start: start + device_batch_size])
        yield to_device(inputs, device), to_device(targets, device)


def even_weights(targets):
    """
    Weights (R, T) for targets (R, T) that make every row with targets count the same. Their sum is
    1.
    """
    is_target = targets != IGNORE
    counts = is_target.sum(axis=1, keepdims=True)  # (R, 1)
    num_rows = (counts > 0).sum()
    weights = is_target / np.maximum(counts, 1)
    weights /= max(1, num_rows)
    return weights.astype(np.float32)


def count_used(targets):
    """Tokens of (R, T) that training looks at: each row's up to its last target."""
    places = np.arange(1, 1 + targets.shape[1])
    last_targets = ((targets != IGNORE) * places).max(axis=1)
    return int(last_targets.sum())
