"""
Documents packed into rows.

A row holds T + 1 tokens (inputs are the first T, targets the last T). It starts with <|bos|>, as
each document does. A token that is no target, in a turn of weight 0, stands as ~id. Rows are made
in blocks, each of about BLOCK_TOKENS of consecutive documents of one epoch:
  - a document longer than a row is cut; the rest becomes a document with its own <|bos|>;
  - the others are packed best-fit: the longest that still fits, until none does. Then the start of
    a document fills the gap, and its rest waits again;
  - the last row of a block is filled from the document after it, and the next block starts in the
    middle of that document.
So nothing is padded or lost.

With `crop`, a long document gives one row in each epoch, from a random place, and a document that
fills a gap loses its rest. Of documents of 2,800 tokens on average that leaves out 83% at T = 512,
45% at 2,048. This is for runs that end before they have seen all of the text: a part of every
document teaches more than a few documents in full (dev/log/2026-11-30-packing.md). The loss on
training rows does not show it: without `crop` it is lower.
"""

import bisect
import sys

import numpy as np

from nanochat.common import IGNORE, ceil_div
from nanochat.progress import show_progress

BLOCK_TOKENS = 2**19  # of a block, about


def pack_rows(pieces, bos, capacity, crop=False):
    """
    Best-fit packing of pieces (int arrays that start with bos) into rows of `capacity` tokens.
    Returns (rows, rest): whole rows as an array (R, capacity), and the tokens of an unfinished last
    row. crop: a piece that fills a gap loses its rest; otherwise the rest is packed, too.

    >>> pack_rows([np.array([0, 1, 2]), np.array([0, 3])], bos=0, capacity=4)[0]
    array([[0, 1, 2, 0]])
    """
    # Long pieces give whole rows
    packed = []  # the rows' pieces one after the other; they fill the rows without a gap
    pool = []    # pieces that wait, sorted by length
    for piece in pieces:
        if len(piece) > capacity:
            whole_rows, piece = _cut(piece, bos, capacity)
            packed.append(whole_rows.ravel())
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


def _cut(piece, bos, capacity):
    """A long piece as whole rows (n, capacity) and a rest of at most `capacity`, each with a bos."""
    # a row holds capacity - 1 tokens of the piece, and so does its rest at most
    num_rows = ceil_div(len(piece) - capacity, capacity - 1)
    end = 1 + num_rows * (capacity - 1)
    rows = np.full((num_rows, capacity), bos, dtype=np.int32)
    rows[:, 1:] = piece[1:end].reshape(num_rows, capacity - 1)
    return rows, _drop_start(piece, end, bos)


def _drop_start(piece, count, bos):
    """Drop the first `count` tokens of a piece and let the rest start with bos again."""
    # the last dropped token becomes the bos
    rest = piece[count - 1:].copy()
    rest[0] = bos
    return rest


def _with_bos(bos, ids):
    return np.concatenate(([bos], ids), dtype=np.int32, casting="unsafe")


class _Cursor:
    """
    A place in a stream of documents: in the document `ids` at `position`, after `offset` tokens.
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
    Yield blocks without end, each as ((*position, offset), rows): where in the stream the block
    starts, and its shuffled rows, int32 (R, capacity). A block ends with its epoch. `documents` is
    an endless iterator of (position, ids); it starts with the document in which `offset` counts.
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
            if crop and len(cursor.ids) >= capacity:  # with its bos more than a row
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
    # a generator of its own, so that the order of reading does not matter
    rng = np.random.default_rng(seed)
    first = rng.integers(len(ids) - length + 1)
    return ids[first: first + length]


def pack_documents(documents, bos, sequence_len, max_tokens):
    """
    A finite stream of (position, ids) as rows, int32 (R, 2, T + 1), from its start until max_tokens
    (-1 = all): tokens, and for each token the number of its document. Packed as in training,
    without cropping. IGNORE fills the last row.
    """
    # The first max_tokens tokens
    pieces = []
    owners = []
    left = sys.maxsize if max_tokens < 0 else max_tokens
    for _, ids in show_progress(documents, "packing", "documents"):
        if left == 0:
            break
        ids = ids[:left]
        pieces.append(_with_bos(bos, ids))
        owners.append(np.full(1 + len(ids), len(owners), dtype=np.int32))
        left -= len(ids)

    # Packing looks at lengths alone, so both are packed alike
    tokens = _pack_and_pad(pieces, bos, sequence_len + 1)
    numbers = _pack_and_pad(owners, 0, sequence_len + 1)
    return np.stack((tokens, numbers), axis=1)


def _pack_and_pad(pieces, bos, capacity):
    """The rows of pack_rows, and its unfinished last one filled with IGNORE."""
    rows, rest = pack_rows(pieces, bos, capacity)
    # one with a bos alone has no target
    if len(rest) > 1:
        last_row = np.full((1, capacity), IGNORE, dtype=np.int32)
        last_row[0, : len(rest)] = rest
        rows = np.concatenate((rows, last_row))
    return rows
