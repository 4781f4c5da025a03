"""Packing and order: every token once, any split the same, exact resume, and never a spin."""

import doctest
import json
import threading
import tracemalloc
import zlib
from functools import partial
from itertools import islice

import numpy as np
import pytest
import torch

from nanochat import dataloader, split_patterns
from nanochat.common import UserError
from nanochat.dataloader import (
    ENCODE_CHARS,
    IGNORE,
    PORTION_TOKENS,
    RowLoader,
    conversation_rows,
    count_used,
    describe_position,
    eval_batches,
    eval_rows,
    packed_conversations,
    shift,
    token_documents,
    training_rows,
)
from nanochat.dataset import Span, describe_skipped, get_spans
from nanochat.distributed import rank_slice
from nanochat.packing import pack_documents, pack_rows, packed_blocks

BOS = 0
# crop, block_tokens, crc32 of 300 rows, the loader's state after them
GOLDEN = [
    (False, None, 3054704906, (0, 0, 0, 0, 300)),
    (False, 700, 1697804218, (0, 1, 9, 12, 16)),
    (True, None, 10622814, (7, 0, 0, 0, 34)),
    (True, 700, 519362567, (7, 0, 22, 0, 12)),
]


def make_pieces(lengths):
    """Pieces that start with bos; every other token is unique, so a lost or doubled one shows."""
    next_id = iter(range(1, 10**6))
    return [np.array([BOS, *(next(next_id) for _ in range(n - 1))], dtype=np.int32) for n in lengths]


def content(arrays):
    """All tokens but bos, sorted."""
    tokens = np.concatenate([np.asarray(a).ravel() for a in arrays])
    return sorted(tokens[tokens != BOS].tolist())


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_token_once_and_starts_rows_with_bos(seed):
    pieces = make_pieces(np.random.default_rng(seed).integers(1, 100, size=200))
    rows, rest = pack_rows(pieces, BOS, capacity=33)
    assert rows.shape[1] == 33 and (rows[:, 0] == BOS).all()
    assert content([rows, rest]) == content(pieces)


def test_packing_a_long_document_takes_memory_in_proportion_to_it():
    """Each row once kept the rest of the document: 40,000 tokens took 400 MB, 4 million all of a machine's memory."""
    piece = np.arange(40_000, dtype=np.int32)
    tracemalloc.start()
    rows, rest = pack_rows([piece], BOS, capacity=9)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert content([rows, rest]) == list(range(1, 40_000))
    assert peak < 20 * piece.nbytes


def test_packing_leaves_the_pieces_as_they_are():
    pieces = make_pieces([100, 7, 60])
    copies = [piece.copy() for piece in pieces]
    pack_rows(pieces, BOS, capacity=9)
    assert all(map(np.array_equal, pieces, copies))


def test_crop_drops_tails_but_invents_nothing():
    pieces = make_pieces(np.random.default_rng(0).integers(5, 60, size=300))
    rows, rest = pack_rows(pieces, BOS, capacity=65, crop=True)
    kept, all_tokens = content([rows, rest]), content(pieces)
    assert len(set(kept)) == len(kept) and set(kept) <= set(all_tokens)
    assert 0 < 1 - len(kept) / len(all_tokens) < 0.4


def test_crop_takes_another_row_of_a_long_document_in_every_epoch():
    documents = (((epoch, 0, row), np.arange(200) + 1000 * row) for epoch in range(9) for row in (1, 2))
    starts = set()
    for _, rows in islice(packed_blocks(documents, BOS, 33, seed=0, crop=True), 8):
        assert rows.shape == (2, 33) and (rows[:, 0] == BOS).all() and (np.diff(rows[:, 1:]) == 1).all()
        assert sorted(rows[:, 1] // 1000) == [1, 2]
        starts |= set(rows[:, 1])
    assert len(starts) > 12


def test_best_fit_of_a_hand_made_example():
    # capacity 6: the 4 goes first and leaves 2, which the 2 fills; then 3 and 3
    rows, rest = pack_rows(make_pieces([3, 2, 4, 3]), BOS, capacity=6)
    assert rows.tolist() == [[0, 4, 5, 6, 0, 3], [0, 7, 8, 0, 1, 2]] and len(rest) == 0


def test_blocks_lose_nothing_between_them():
    rng = np.random.default_rng(1)
    documents = [((0, 0, i), piece[1:]) for i, piece in enumerate(make_pieces(rng.integers(2, 90, size=400)))]
    endless = (document for documents in [documents] for document in documents)
    seen = []
    with pytest.raises(RuntimeError):  # the finite test stream ends inside the generator
        for _, rows in packed_blocks(endless, BOS, 17, seed=0, block_tokens=200):
            assert (rows[:, 0] == BOS).all()
            seen.append(rows)
    # tokens are numbered in the order of the documents: whole blocks hold a prefix of them, each once
    got = content(seen)
    assert got == list(range(1, len(got) + 1))
    assert len(got) > 0.9 * sum(len(ids) for _, ids in documents)


@pytest.fixture
def corpus(tmp_path, story):
    """40 documents of different lengths in two files."""
    paragraphs = [p for p in story.split("\n\n") if p.strip()]
    for name, count in (("a.jsonl", 25), ("b.jsonl", 15)):
        texts = [f"{name} {i} " + paragraphs[i % len(paragraphs)] * (1 + i % 4) for i in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path)


def rows_of(loader, steps, rows_per_step=4):
    rows = [loader.next_rows(rows_per_step) for _ in range(steps)]
    loader.close()
    return rows


def test_same_seed_same_rows_other_seed_other_rows(tokenizer, corpus):
    spans = get_spans(corpus, "train")
    a, b, c = (np.stack(rows_of(training_rows(tokenizer, spans, 32, seed), 20)) for seed in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize("crop, block_tokens, crc, state", GOLDEN)
def test_the_rows_and_their_order_never_change(tokenizer, corpus, crop, block_tokens, crc, state):
    """What a resumed run of an earlier release relies on. The numbers were written by format 1's first release."""
    loader = training_rows(tokenizer, get_spans(corpus, "train"), 32, 7, None, crop, block_tokens)
    rows = np.concatenate([loader.next_rows(5) for _ in range(60)])
    loader.close()
    assert zlib.crc32(rows.astype("<i4").tobytes()) == crc
    assert tuple(loader.state().values()) == state


@pytest.mark.parametrize("crop", [False, True])
@pytest.mark.parametrize("resume_at", [1, 13, 60])
def test_resume_is_exact(tokenizer, corpus, resume_at, crop):
    training_rows = partial(dataloader.training_rows, crop=crop, block_tokens=700)  # many small blocks
    spans = get_spans(corpus, "train")
    unbroken = rows_of(training_rows(tokenizer, spans, 32), 80)
    loader = training_rows(tokenizer, spans, 32)
    for _ in range(resume_at):
        loader.next_rows(4)
    state = json.loads(json.dumps(loader.state()))  # a few integers that survive JSON
    loader.close()
    resumed = rows_of(training_rows(tokenizer, spans, 32, state=state), 80 - resume_at)
    assert np.array_equal(np.stack(unbroken[resume_at:]), np.stack(resumed))


def test_a_resumed_run_goes_on_when_its_text_has_become_less(tokenizer, corpus):
    """Rows as far as the block had are not there any more: the next block, rather than a search without an end."""
    state = {"epoch": 0, "span": 0, "row": 0, "offset": 0, "rows_used": 10**6}
    assert len(rows_of(training_rows(tokenizer, get_spans(corpus, "train"), 32, state=state), 5)) == 5


def long_blocks():
    """Blocks of seven portions each; the tokens count the rows."""
    for block in range(9):
        rows = np.arange(7 * 4).reshape(-1, 1) + 1000 * block
        yield (0, 0, block, 0), np.broadcast_to(rows, (7 * 4, PORTION_TOKENS // 4)).astype(np.int32)


def test_after_a_long_document_the_next_block_waits_until_most_of_it_is_used():
    """Four such blocks at a time once were most of the memory of a run with long documents."""
    made = []
    loader = RowLoader(made.append(start) or (start, rows) for start, rows in long_blocks())
    loader.next_rows(4 * 2)
    loader.close()
    assert len(made) == 1


@pytest.mark.parametrize("used", [0, 3, 4, 18, 27])
def test_resume_amid_a_long_block(used):
    loader = RowLoader(long_blocks(), used)
    rows = loader.next_rows(30)[:, 0]
    loader.close()
    assert rows.tolist() == [*range(used, 28), *range(1000, 1002 + used)]
    assert loader.state() == {"epoch": 0, "span": 0, "row": 1, "offset": 0, "rows_used": 2 + used}


def test_a_long_document_is_encoded_in_slices_and_no_further_than_asked(tokenizer, tmp_path, story):
    texts = ["short", " ".join([story] * (1 + 3 * ENCODE_CHARS // len(story))), "also short"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    spans = [Span(tmp_path / "a.jsonl", 0, 3)]
    documents = token_documents(tokenizer, spans, seed=0, epochs=1)
    for (_, ids), text in zip(documents, texts, strict=True):
        assert ids.tolist() == tokenizer.encode(text)
    first = [ids for _, ids in token_documents(tokenizer, spans, seed=0, epochs=1, max_tokens=9)]
    assert 9 <= len(first[1]) < 0.5 * len(tokenizer.encode(texts[1])) and len(first[2]) > 0


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, 7, 11])
def test_ranks_partition_a_step(world_size):
    parts = [list(range(10))[rank_slice(10, rank, world_size)] for rank in range(world_size)]
    assert sum(parts, []) == list(range(10)) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_empty_stream_is_an_error_not_a_spin(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 40, encoding="utf-8")
    with pytest.raises(UserError):
        training_rows(tokenizer, get_spans(str(tmp_path), "train"), 32).next_rows(1)


def test_a_bad_row_does_not_end_the_stream(tokenizer, tmp_path):
    lines = ['{"text": "fine"}'] * 30
    spans = []
    for bad in ("", '{"text": null}\n{"text": 7}\n{"text": ""}\n'):
        (tmp_path / "some.jsonl").write_text("\n".join(lines[:20]) + "\n" + bad + "\n".join(lines), encoding="utf-8")
        spans.append(get_spans(str(tmp_path), "train"))
        rows = rows_of(training_rows(tokenizer, spans[-1], 32), 20)
        assert tokenizer.decode(np.concatenate(rows[0]).tolist()).startswith("<|bos|>fine<|bos|>fine")
    assert describe_skipped(spans[0]) == "none"
    assert describe_skipped(spans[1]).startswith("3 skipped, first in each file: ")


def test_a_file_that_has_gone_surfaces_in_the_reader_of_rows(tokenizer, tmp_path):
    (tmp_path / "some.jsonl").write_text('{"text": "fine"}\n' * 30, encoding="utf-8")
    spans = get_spans(str(tmp_path), "train")
    (tmp_path / "some.jsonl").unlink()
    with pytest.raises(UserError, match="some.jsonl: cannot be read"):
        training_rows(tokenizer, spans, 32).next_rows(1)


def test_close_ends_the_thread(tokenizer, corpus):
    before = set(threading.enumerate())
    loader = training_rows(tokenizer, get_spans(corpus, "train"), 32)
    loader.close()
    assert set(threading.enumerate()) <= before


def test_eval_rows_hold_each_token_once_and_pad_only_the_end(tokenizer, corpus):
    rows = eval_rows(tokenizer, get_spans(corpus, "val"), 32, max_tokens=-1)
    assert (rows[:-1] != IGNORE).all() and (rows[:, 0, 0] == tokenizer.get_bos_token_id()).all()
    limited = eval_rows(tokenizer, get_spans(corpus, "val"), 32, max_tokens=50)[:, 0]
    bos = tokenizer.get_bos_token_id()
    assert ((limited != bos) & (limited != IGNORE)).sum() == 50


@pytest.mark.parametrize("seed", range(3))
def test_eval_rows_know_the_document_of_each_token(seed):
    """Document n has the tokens 1000 n + 1, 1000 n + 2 ...; many are longer than a row."""
    lengths = np.random.default_rng(seed).integers(1, 100, size=60)
    documents = [(None, 1000 * n + np.arange(1, 1 + length)) for n, length in enumerate(lengths)]
    rows = pack_documents(documents, bos=0, sequence_len=32, max_tokens=-1)
    tokens, owners = rows[:, 0], rows[:, 1]
    text = tokens > 0
    assert text.sum() == lengths.sum()
    assert (tokens[text] // 1000 == owners[text]).all()
    assert (owners[tokens == IGNORE] == IGNORE).all()


def test_eval_batches_shift_by_one_and_ignore_padding():
    rows = np.array([[[5, 6, 7, IGNORE], [3, 3, 4, IGNORE]]], dtype=np.int32)
    ((x, y, documents),) = eval_batches(rows, 8, torch.device("cpu"))
    assert x.tolist() == [[5, 6, 7]] and y.tolist() == [[6, 7, IGNORE]]
    assert documents.tolist() == [[3, 4, IGNORE]]
    assert x.dtype == y.dtype == torch.int64


# -----------------------------------------------------------------------------
# Conversations


def talk(*texts, **fields):
    """A conversation that the user begins. fields: of the assistant's messages."""
    messages = []
    for i, text in enumerate(texts):
        messages.append({"role": "assistant", **fields} if i % 2 else {"role": "user"})
        messages[-1]["content"] = text
    return {"messages": messages}


def packed_targets(conversations, tokenizer, sequence_len):
    """(inputs, targets) of three passes over the conversations, packed as midtraining does."""
    loader = packed_conversations(conversations, tokenizer, sequence_len)
    num_tokens = sum(len(ids) for ids in tokenizer.render_batch(conversations))
    rows = loader.next_rows(3 * num_tokens // sequence_len)
    loader.close()
    return shift(rows)


def test_a_turn_of_weight_0_is_read_and_not_trained_on_in_midtraining(tokenizer):
    conversations = [talk("Hi", "bad " * 9, weight=0), talk("Ho", "good " * 9)]
    inputs, targets = packed_targets(conversations, tokenizer, 64)
    read = tokenizer.decode(inputs.ravel())
    trained = tokenizer.decode(targets[targets != IGNORE])
    assert read.count("bad") > 10 and trained.count("bad") == 0
    assert trained.count("Hi") > 0 and trained.count("good") > 10
    unweighted = packed_targets([talk("Hi", "bad " * 9), conversations[1]], tokenizer, 64)
    assert np.array_equal(inputs, unweighted[0])  # the same tokens at the same places


def test_a_conversation_cut_to_the_context_does_not_end_there_in_finetuning(tokenizer):
    end = tokenizer.encode_special("<|assistant_end|>")
    whole = talk("Hi", "short")
    cut = talk("Ho", "word " * 200)
    inputs, targets, num_cut = conversation_rows([whole, cut], [0, 1], tokenizer, max_len=64)
    ids, _ = tokenizer.render_conversation(cut)
    assert num_cut == 1 and (targets == end).sum(axis=1).tolist() == [1, 0]
    assert targets[1, -1] == ids[64] and inputs[1].tolist() == ids[:64]  # the next word, up to the last place


def test_a_conversation_cut_to_the_context_does_not_end_there_in_midtraining(tokenizer):
    end = tokenizer.encode_special("<|assistant_end|>")
    inputs, targets = packed_targets([talk("Ho", f"{i} " * (50 + 20 * i)) for i in range(9)], tokenizer, 64)
    begins = targets == tokenizer.get_bos_token_id()
    assert begins.sum() > 5 and (inputs[begins] == end).all()


def test_the_sign_of_a_token_says_whether_it_is_a_target():
    inputs, targets = shift(np.array([[0, 5, ~6, ~0, 7, IGNORE]], dtype=np.int32))
    assert inputs.tolist() == [[0, 5, 6, 0, 7]] and targets.tolist() == [[5, IGNORE, IGNORE, 7, IGNORE]]


def test_count_used_stops_at_the_last_target_of_each_row():
    targets = np.array([[5, IGNORE, IGNORE, IGNORE], [IGNORE, 1, 2, 3], [IGNORE] * 4, [0, 0, 0, 0]])
    assert count_used(targets) == 1 + 4 + 0 + 4


def test_a_pass_over_little_data_sees_all_of_it_before_the_next_begins():
    """Much less than a block: a block that ran on would mix random parts of many passes."""
    def documents():
        for epoch in range(9):
            for row, length in enumerate((5, 9, 4, 12)):
                yield (epoch, 0, row), np.arange(length) + 100 * (row + 1)
    blocks = packed_blocks(documents(), BOS, 8, seed=0)
    seen = content([next(blocks)[1] for _ in range(3)])
    once = content([ids for _, ids in islice(documents(), 4)])
    assert set(seen) == set(once) and max(map(seen.count, once)) <= 4 and min(map(seen.count, once)) >= 3


def test_a_position_in_the_data_is_told_as_file_and_row(tmp_path, tokenizer):
    """What a run that meets a loss of NaN says; in the order in which the files are visited."""
    for i in range(4):
        (tmp_path / f"part{i}.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for _ in range(8)), encoding="utf-8")
    spans = get_spans(str(tmp_path), "train")
    position, ids = next(token_documents(tokenizer, spans, seed=3, start=(0, 2, 1)))
    state = dict(zip(("epoch", "span", "row"), position, strict=True))
    told = describe_position(state, spans, seed=3)
    assert f"part{tokenizer.decode(ids)}.jsonl, row 1 and after (epoch 0)" in told


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(dataloader).failed == 0
    assert doctest.testmod(split_patterns).failed == 0
