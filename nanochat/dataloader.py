"""
From documents to rows of tokens.

The rows of a training step depend on (seed, step) alone. Every rank walks the same stream of
documents, packs the same rows and keeps its share of them. So neither the number of ranks nor the
micro-batch can change the rows of a step, and a position in the stream is a few integers. Every
rank can afford to pack all rows: encoding runs in Rust at tens of megabytes per second, ahead of
training, in a background thread.

packing.py makes rows in blocks of documents. The whole state of a loader is the position where a
block starts (epoch, file, row, token offset) and the number of rows taken from the block.
"""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch

from nanochat.common import IGNORE, UserError, ceil_div
from nanochat.dataset import no_documents, read_documents
from nanochat.packing import pack_documents, packed_blocks
from nanochat.progress import show_progress
from nanochat.split_patterns import cut_places

PORTIONS_AHEAD = 3          # of blocks: made in the background before they are needed
PORTION_TOKENS = 2**20      # a block has more only if a document is long
ENCODE_CHARS = 2**19        # characters that the tokenizer gets at once
ENCODE_CONVERSATIONS = 256  # conversations that it gets at once

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


def token_documents(tokenizer, spans, seed, start=(0, 0, 0), epochs=None, max_tokens=-1):
    """
    Yield every document of `spans` from the position `start` on: for `epochs` epochs, or for ever.
    Without `epochs`, the files come in another order in every epoch of every seed. A stream without
    documents is a UserError, since the search would never end. max_tokens: of a long document no
    more needs to be encoded; -1 = all.
    """
    epoch, first_span, first_row = start
    while epochs is None or epoch < epochs:
        # `start` says where the first epoch begins; the later ones begin at their first file
        order = range(len(spans)) if epochs else _span_order(len(spans), seed, epoch)
        found = False
        for span in range(first_span, len(spans)):
            rows = read_documents(spans[order[span]], first_row)
            for row, ids in _encode_in_batches(tokenizer, rows, max_tokens):
                found = True
                yield (epoch, span, row), ids
                del ids  # a long document is not kept while the next is read
            first_row = 0
        if not found and first_span == 0:
            raise no_documents(spans)
        epoch += 1
        first_span = 0


def _span_order(num_spans, seed, epoch):
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(num_spans)


def describe_position(state, spans, seed):
    """The file and row, in words, where the current block of a loader with this state() starts."""
    # the state counts files in the order of its epoch
    order = _span_order(len(spans), seed, state["epoch"])
    span = spans[order[state["span"]]]
    return f"{span.path}, row {state['row']} and after (epoch {state['epoch']})"


def _encode_in_batches(tokenizer, rows, max_tokens):
    """(row, text) pairs -> (row, ids) pairs, encoded ENCODE_CHARS at a time."""
    for batch in _batches_of_text(rows):
        # A long text stands alone
        if len(batch) == 1:
            row, text = batch.pop()
            ids = _encode_in_slices(tokenizer, text, max_tokens)
            del text  # nothing here keeps it while the next is read
            yield row, ids
            del ids
            continue
        texts = [text for _, text in batch]
        # One thread is faster than any training, and leaves the other cores to it. All ids of the
        # batch come in one array
        ids, offsets = tokenizer.encode_to_numpy(texts, num_threads=1)
        for i, (row, _) in enumerate(batch):  # document i is a view of the batch's ids
            yield row, ids[offsets[i]: offsets[i + 1]]


def _encode_in_slices(tokenizer, text, max_tokens):
    """The ids of a text. The encoder needs much memory, so it gets slices; until max_tokens."""
    places = cut_places(text, tokenizer.pattern, ENCODE_CHARS)
    buffer = bytearray()  # grows in place: a list of arrays would be copied into one at the end
    what = f"encoding a document of {len(text) / 1e6:,.0f} million characters"
    for start, stop in show_progress(pairwise(places), what, "parts", total=len(places) - 1):
        ids, _ = tokenizer.encode_to_numpy([text[start:stop]], num_threads=1)
        buffer += ids.data
        if 0 <= max_tokens <= len(buffer) // ids.itemsize:
            break
    return np.frombuffer(buffer, dtype=np.uint32)


def _batches_of_text(rows):
    """
    (row, text) pairs -> lists of them, of ENCODE_CHARS characters or a little more. A text as long
    as that comes alone.
    """
    batch = []
    num_chars = 0
    for row, text in rows:
        if batch and len(text) >= ENCODE_CHARS:
            yield batch
            batch = []
            num_chars = 0
        batch.append((row, text))
        num_chars += len(text)
        del text
        if num_chars >= ENCODE_CHARS:
            yield batch
            batch = []
            num_chars = 0
    if batch:
        yield batch


def conversation_documents(dataset, tokenizer, start=(0, 0, 0), epochs=None):
    """
    Yield the conversations of a dataset in its order, as documents, from the position `start` on:
    for `epochs` epochs, or for ever.
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
    """Yield (index, ids with <|bos|>) of each conversation of `indices`."""
    # many at once, since encoding runs on several threads
    for start in range(0, len(indices), ENCODE_CONVERSATIONS):
        batch = indices[start: start + ENCODE_CONVERSATIONS]
        conversations = [dataset[i] for i in batch]
        yield from zip(batch, tokenizer.render_batch(conversations), strict=True)


# -----------------------------------------------------------------------------
# Loaders


class RowLoader:
    """
    Rows for training, from `packed_blocks`: `next_rows(n)` -> int32 (n, T + 1). `state()` is a dict
    of integers, from which a new loader continues with the very next row. The first block is made
    at once, the others ahead by a thread. Its errors are raised by the `next_rows` that needs the
    block.
    """

    def __init__(self, blocks, rows_used=0):
        self._portions = _portions(blocks)
        # not by the thread, so that the progress of a long document shows
        self._start, self._first, self._rows = next(self._portions)
        self._used = rows_used
        # One thread, so that the blocks come in order
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._ahead = deque()
        for _ in range(PORTIONS_AHEAD):
            self._ask_for_more()

    def _ask_for_more(self):
        self._ahead.append(self._thread.submit(next, self._portions))

    def _next_portion(self):
        # Ask for one more before waiting for the one that is due
        self._ask_for_more()
        self._start, self._first, self._rows = self._ahead.popleft().result()
        if self._first == 0:  # another block
            self._used = 0

    def next_rows(self, n):
        # the n rows may come from several blocks
        parts = []
        while n > 0:
            # greater if a resumed run used this portion, or finds less text than there was
            if self._used >= self._first + len(self._rows):
                self._next_portion()
                continue
            start = self._used - self._first
            part = self._rows[start: start + n]
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


def _portions(blocks):
    """
    Yield (start of the block, number of the first row, rows), PORTION_TOKENS at a time: so the
    block after that of a long document is not made before most of this one is used.
    """
    for start, rows in blocks:
        num_rows = max(1, PORTION_TOKENS // rows.shape[1])
        for first in range(0, len(rows), num_rows):
            yield start, first, rows[first: first + num_rows].copy()
        del rows  # before the next block is made


def _position(state):
    # of a document: without the offset, which packing needs
    return state["epoch"], state["span"], state["row"]


def training_rows(
    tokenizer,
    spans,
    sequence_len,
    seed=42,
    state=None,
    crop=False,
    block_tokens=None,
):
    """A RowLoader over the documents of `spans`, from the start or from `state`."""
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
    """A RowLoader over the conversations of `dataset`, packed like documents."""
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
    documents = token_documents(tokenizer, spans, seed=0, epochs=1, max_tokens=max_tokens)
    bos = tokenizer.get_bos_token_id()
    return pack_documents(documents, bos, sequence_len, max_tokens)


def conversation_rows(dataset, indices, tokenizer, max_len):
    """
    One conversation per row, the shortest first: (inputs, targets, number of conversations cut),
    int32 (R, T) each. T is the longest of them, rounded up to a multiple of 32 so that few shapes
    occur, and at most max_len. Longer ones are cut. Targets are the tokens that the assistant
    itself writes, IGNORE elsewhere.
    """
    # Sorted by length: then micro-batches need little padding
    rendered = []
    for index in indices:
        rendered.append(tokenizer.render_conversation(dataset[index], max_tokens=None))
    rendered.sort(key=lambda conversation: len(conversation[0]))

    # Row i has lengths[i] inputs and as many targets, shifted by one
    lengths = [len(ids) - 1 for ids, _ in rendered]
    T = min(max_len, 32 * ceil_div(lengths[-1], 32))

    # Padding is bos in the inputs, IGNORE in the targets
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
    """
    Rows (R, T + 1) -> inputs and targets, (R, T) each. A token ~id is id among the inputs and
    IGNORE among the targets. IGNORE itself, which fills a last row, is ~0.
    """
    inputs = np.where(rows < 0, ~rows, rows)[:, :-1]
    targets = np.where(rows < 0, IGNORE, rows)[:, 1:]
    return inputs, targets


def to_device(array, device):
    """An array as a tensor on the device: token ids as int64, weights as they are."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if not tensor.is_floating_point():
        tensor = tensor.long()
    # from pinned memory the copy does not wait for queued work
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def eval_batches(rows, device_batch_size, device):
    """
    Yield (inputs, targets, documents) of rows (R, 2, T + 1), see pack_documents: int64 (B, T) on the
    device, and the number of each target's document, int (B, T) on the CPU.
    """
    starts = range(0, len(rows), device_batch_size)
    for start in show_progress(starts, "evaluating", "batches"):
        batch = rows[start: start + device_batch_size]
        inputs, targets = shift(batch[:, 0])
        documents = batch[:, 1, 1:]
        yield to_device(inputs, device), to_device(targets, device), documents


def count_used(targets):
    """Tokens of (R, T) that training looks at: those of each row up to its last target."""
    places = np.arange(1, 1 + targets.shape[1])
    last_targets = ((targets != IGNORE) * places).max(axis=1)
    return int(last_targets.sum())
