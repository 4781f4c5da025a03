"""
rustbpe against a slow BPE written out in plain Python, against tiktoken on the same merge table, and by hand.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import regex
import tiktoken
from tokenizers import Regex, pre_tokenizers

import rustbpe

PATTERN = rustbpe.Tokenizer().get_pattern()
FAST_PATTERNS = dict(zip(["nanochat", "gpt4", "qwen"], rustbpe.Tokenizer.fast_patterns(), strict=True))
NO_SPLIT = r"[\s\S]+"
BYTES = [(bytes([byte]), byte) for byte in range(256)]
AWKWARD = [
    "", " ", "\n", "a", "'", "''s", "it's I'LL we'Ve 'ſx 'Kelvin DON'T", "12345 67 8 ٣٤٥ ⅷⅨ", "  two  spaces   ",
    "\r\n\r\n \t x\n\n  y", "a\u00a0b\u3000c\u2028d\x85e\x1cf", "!!! ??\n\n...", " 'tis", "naïve Ünïcödé ﬁ ſt",
    "日本語のテキスト、そして 한국어", "שלום עולם مرحبا", "👩‍👩‍👧‍👦 🇨🇭 e\u0301 \u200d\ufeff", "\x00\x01\x7f",
    "x" * 40, "<|bos|> <|user_start|>",
]
TEXTS = AWKWARD + ["the theme of these theses is that the others then thank them", "aaaa aaa aaaaaaa baaa caaab"] * 3

each_split = pytest.mark.parametrize("pattern", FAST_PATTERNS.values(), ids=FAST_PATTERNS.keys())


# -----------------------------------------------------------------------------
# The oracle


def slow_train(texts, vocab_size, pattern=PATTERN):
    """
    BPE as one would explain it: count all pairs of neighbours (overlapping ones too), merge the most frequent one
    (among equals the one with the smallest ids) everywhere from left to right, and start again.
    A pair whose bytes are a token already is passed over. Returns the tokens, in the order of their ids.
    """
    splitter = pre_tokenizers.Split(Regex(pattern), "isolated")
    pieces = Counter(piece for text in texts for piece, _ in splitter.pre_tokenize_str(text))
    words = [(list(piece.encode()), count) for piece, count in pieces.items()]
    tokens = [bytes([byte]) for byte in range(256)]
    while len(tokens) < vocab_size:
        counts = Counter()
        for ids, count in words:
            for pair in zip(ids, ids[1:], strict=False):
                counts[pair] += count
        known = set(tokens)
        counts = {pair: n for pair, n in counts.items() if tokens[pair[0]] + tokens[pair[1]] not in known}
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        words = [(slow_merge(ids, best, len(tokens)), count) for ids, count in words]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


def slow_merge(ids, pair, new_id):
    """[1, 1, 1], (1, 1), 9 -> [9, 1]"""
    merged, i = [], 0
    while i < len(ids):
        is_pair = tuple(ids[i:i + 2]) == pair
        merged.append(new_id if is_pair else ids[i])
        i += 2 if is_pair else 1
    return merged


def trained(texts=TEXTS, vocab_size=400, **kwargs):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(texts, vocab_size, **kwargs)
    return tokenizer


def tokens_of(tokenizer):
    ranks = tokenizer.get_mergeable_ranks()
    assert [rank for _, rank in ranks] == list(range(len(ranks)))
    return [token for token, _ in ranks]


def tiktoken_of(ranks, pattern=PATTERN):
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=dict(ranks), special_tokens={})


def random_text(rng, alphabet, length):
    return "".join(rng.choice(alphabet) for _ in range(length))


# -----------------------------------------------------------------------------
# Training


def test_training_gives_the_hand_derived_tokens():
    # Words: "ab" 3x, "abc" 2x, "bc" 4x. Pairs: (a,b) 5, (b,c) 6 -> bc; then ab 3, (a,bc) 2 -> ab, then abc.
    texts = ["ab,ab,ab,abc,abc,bc,bc,bc,bc"]
    assert tokens_of(trained(texts, 300, pattern="[abc]+"))[256:] == [b"bc", b"ab", b"abc"]


def test_ties_go_to_the_smallest_pair_of_ids():
    assert tokens_of(trained(["zy zy ba ba"], 258, pattern=r"\w+"))[256:] == [b"ba", b"zy"]


@each_split
@pytest.mark.parametrize("vocab_size", [256, 257, 300, 420, 5000])
def test_training_equals_the_slow_oracle(vocab_size, pattern):
    assert tokens_of(trained(TEXTS, vocab_size, pattern=pattern)) == slow_train(TEXTS, vocab_size, pattern)


@pytest.mark.parametrize("seed", range(8))
def test_training_equals_the_slow_oracle_on_repetitive_random_text(seed):
    rng = random.Random(seed)
    texts = [random_text(rng, "aab" + "c " * (seed % 3), rng.randint(1, 60)) for _ in range(30)]
    pattern = NO_SPLIT if seed % 2 else PATTERN
    assert tokens_of(trained(texts, 380, pattern=pattern)) == slow_train(texts, 380, pattern)


def test_training_is_the_same_for_any_number_of_threads_and_any_buffer_size():
    rng = random.Random(1)
    texts = [random_text(rng, "etaoin shrdlu\n'é", 200) for _ in range(400)]
    reference = tokens_of(trained(texts, 700, num_threads=1))
    for num_threads, buffer_size in [(2, 1), (3, 7), (8, 100_000)]:
        assert tokens_of(trained(texts, 700, num_threads=num_threads, buffer_size=buffer_size)) == reference


def test_training_counts_beyond_the_workers_own_tables():
    # 150,000 distinct words overflow the caches and the local tables of the workers; `qz` is in all of them.
    texts = (f"qz{i:x}" for i in range(150_000))
    assert tokens_of(trained(texts, 257, pattern=r"\w+", num_threads=2))[256] == b"qz"


def test_training_reads_the_iterator_as_a_stream():
    ahead = []

    def stream():
        for i in range(200):
            ahead.append(i)
            yield "x" * 100_000  # 20 MB in all; batches close at a megabyte

    tokenizer = rustbpe.Tokenizer()
    iterator = stream()
    tokenizer.train_from_iterator(iterator, 260, pattern="x{1,9}")
    assert len(ahead) == 200 and next(iterator, None) is None and tokenizer.vocab_size > 256


def test_training_passes_on_the_iterators_own_error():
    def stream():
        yield "some text"
        raise KeyError("shard 7")

    with pytest.raises(KeyError, match="shard 7"):
        trained(stream())


def test_training_stops_at_keyboard_interrupt():
    def endless():
        while True:
            yield "never ends"

    # a process that a shell started in the background ignores the signal unless told otherwise
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start()
    start = time.perf_counter()
    try:
        with pytest.raises(KeyboardInterrupt):
            trained(endless())
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.perf_counter() - start < 5


def test_a_failed_training_leaves_the_tokenizer_as_it_was():
    tokenizer = trained()
    with pytest.raises(ValueError):
        tokenizer.train_from_iterator(["ok", 5], 300)
    assert tokens_of(tokenizer) == tokens_of(trained())


def test_training_on_nothing_leaves_the_bytes():
    assert tokens_of(trained([], 300)) == [bytes([byte]) for byte in range(256)]


# -----------------------------------------------------------------------------
# Encoding


def test_encoding_equals_the_hand_derived_ids():
    ranks = BYTES + [(b"bc", 256), (b"ab", 257), (b"abc", 258)]
    tokenizer = rustbpe.Tokenizer.from_ranks(ranks, None)
    assert tokenizer.encode("abc") == [258]  # a whole word that is a token, whatever its merges
    assert tokenizer.encode("abcab ab") == [258, 257, 32, 257]  # a·bc·a·b: bc first (256), then ab (257), then abc
    assert tokenizer.encode("aab") == [97, 257]


@pytest.mark.parametrize("pattern", [*FAST_PATTERNS.values(), NO_SPLIT, r"\w+| "])
def test_encoding_equals_tiktoken_on_awkward_strings(pattern):
    tokenizer = trained(TEXTS, 500, pattern=pattern)
    reference = tiktoken_of(tokenizer.get_mergeable_ranks(), pattern)
    for text in TEXTS:
        assert tokenizer.encode(text) == reference.encode_ordinary(text), repr(text)


@each_split
@pytest.mark.parametrize("seed", range(4))
def test_encoding_equals_tiktoken_on_random_unicode(seed, pattern):
    rng = random.Random(seed)
    alphabet = "aAsStTlLrRveE'''ſK123٣½ⅷ  \t\n\r\x85\u00a0\u2003!?.,-–“éßжΩ日本ะ́\u200d👍\U0001d400\U000e0001\ufffd"
    texts = [random_text(rng, alphabet, rng.randint(1, 80)) for _ in range(500)]
    # Merges learned without a split cross every boundary, so that a wrong cut shows in the ids.
    ranks = trained(texts, 3000, pattern=NO_SPLIT).get_mergeable_ranks()
    tokenizer, reference = rustbpe.Tokenizer.from_ranks(ranks, pattern), tiktoken_of(ranks, pattern)
    assert tokenizer.batch_encode(texts) == reference.encode_ordinary_batch(texts)


def ranks_that_show_each_cut(seed=0):
    """
    All pairs of bytes as tokens, in random order: where a piece starts decides which bytes pair up.
    """
    rng = random.Random(seed)
    pairs = [bytes([a, b]) for a in range(256) for b in range(256)]
    rng.shuffle(pairs)
    return BYTES + [(pair, 256 + i) for i, pair in enumerate(pairs)]


@each_split
def test_splitting_equals_tiktoken_on_the_first_two_planes(pattern):
    # (The tests of the crate compare with the regex on every code point.)
    ranks = ranks_that_show_each_cut()
    tokenizer, reference = rustbpe.Tokenizer.from_ranks(ranks, pattern), tiktoken_of(ranks, pattern)
    chars = [chr(i) for i in range(0x20000) if not 0xD800 <= i < 0xE000]
    text = "".join(f"a{c}1{c}{c}b '{c}\n{c} {c}!{c}{c}{c}" for c in chars)
    assert tokenizer.encode(text) == reference.encode_ordinary(text)


@each_split
def test_splitting_equals_the_regex_module(pattern):
    # a second engine of Unicode regular expressions; ids of a text = ids of its pieces, one by one
    tokenizer = rustbpe.Tokenizer.from_ranks(ranks_that_show_each_cut(), pattern)
    rng = random.Random(7)
    alphabet = "aStTlLve''ſ0123456789٣½ⅷ  \t\n\r\u00a0\u3000!.-éж日\u0301👍"
    for _ in range(3000):
        text = random_text(rng, alphabet, rng.randint(1, 60))
        pieces = regex.findall(pattern, text)
        assert "".join(pieces) == text
        assert tokenizer.encode(text) == sum(tokenizer.batch_encode(pieces), []), repr(text)


@pytest.mark.parametrize("text", ["a" * 100_000, "ab" * 50_000, " " * 100_000 + "x", "\n " * 30_000, "é" * 50_000,
                                  "!" * 100_000, "'" * 100_000, "1" * 100_000], ids=lambda text: repr(text[:2]))
def test_encoding_of_long_repetition_is_exact_and_not_quadratic(text):
    tokenizer = trained([text[:3000], *TEXTS], 600)
    start = time.perf_counter()
    ids = tokenizer.encode(text)
    assert time.perf_counter() - start < 2  # quadratic: minutes
    tokens = tokens_of(tokenizer)
    assert b"".join(tokens[i] for i in ids).decode() == text
    reference = tiktoken_of(tokenizer.get_mergeable_ranks())
    assert tokenizer.encode(text[:20_000]) == reference.encode_ordinary(text[:20_000])


def test_the_fast_patterns_take_no_longer_than_each_other():
    text = "In 1984 she counted 31,536,000 seconds; by 2026 it was 1,357,924,680. " * 3000
    seconds = {}
    for pattern in [*FAST_PATTERNS.values(), f"(?:{PATTERN})"]:  # the last one goes through the regex engine
        tokenizer = rustbpe.Tokenizer.from_ranks(BYTES, pattern)
        times = []
        for _ in range(5):
            start = time.thread_time()
            tokenizer.encode(text)
            times.append(time.thread_time() - start)
        seconds[pattern] = min(times)
    *fast, slow = seconds.values()
    assert max(fast) < slow / 1.5


def test_special_token_text_stays_text():
    tokenizer = trained(["<|bos|>"] * 10, 300)
    ids = tokenizer.encode("<|bos|>")
    assert b"".join(tokens_of(tokenizer)[i] for i in ids) == b"<|bos|>" and len(ids) > 1


@pytest.mark.parametrize("num_threads", [None, 1, 2, 5])
def test_encode_to_buffer_holds_what_encode_returns(num_threads):
    tokenizer = trained()
    texts = TEXTS * 20 + ["long text " * 50_000]
    ids, offsets = tokenizer.encode_to_buffer(texts, num_threads=num_threads)
    ids, offsets = np.frombuffer(ids, "<u4"), np.frombuffer(offsets, "<i8")
    assert len(offsets) == len(texts) + 1 and offsets[-1] == len(ids)
    rows = [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]
    assert rows == [tokenizer.encode(text) for text in texts] == tokenizer.batch_encode(texts)


def test_encode_to_buffer_of_nothing_is_empty():
    ids, offsets = trained().encode_to_buffer([])
    assert len(ids) == 0 and np.frombuffer(offsets, "<i8").tolist() == [0]


def test_a_tokenizer_from_ranks_equals_the_trained_one():
    tokenizer = trained(pattern=r"\w+|\W+")
    copy = rustbpe.Tokenizer.from_ranks(tokenizer.get_mergeable_ranks(), tokenizer.get_pattern())
    assert copy.get_mergeable_ranks() == tokenizer.get_mergeable_ranks() and copy.get_pattern() == r"\w+|\W+"
    assert copy.vocab_size == tokenizer.vocab_size == 400
    assert copy.batch_encode(TEXTS) == tokenizer.batch_encode(TEXTS)


# -----------------------------------------------------------------------------
# Mistakes are ValueErrors

@pytest.mark.parametrize("kwargs", [
    {"vocab_size": 255}, {"vocab_size": -1}, {"vocab_size": 10**30}, {"vocab_size": "many"}, {"vocab_size": None},
    {"buffer_size": 0}, {"buffer_size": -5}, {"buffer_size": 1.5}, {"num_threads": 0}, {"num_threads": 10**6},
    {"pattern": "(unclosed"}, {"pattern": 5}, {"texts": [1, 2]}, {"texts": ["ok", None]}, {"texts": [b"bytes"]},
    {"texts": 7}, {"texts": "one string"}, {"texts": ["lone surrogate \ud800"]},
    {"texts": ["ab" * 50], "pattern": r"(a|b|ab)*(?>c)"},  # the regex engine gives up on this text
], ids=str)
def test_a_bad_training_argument_is_a_value_error(kwargs):
    with pytest.raises(ValueError):
        trained(**kwargs)


@pytest.mark.parametrize("ranks", [
    [], BYTES[:255], BYTES[1:], BYTES + [(b"ab", 257)], BYTES + [(b"ab", 256), (b"ab", 257)], BYTES + [(b"abc", 256)],
    BYTES + [(b"", 256)], BYTES + [(b"a", 256)], BYTES + [(b"ab", -1)], BYTES + [(b"ab", 256), (b"cd", 256)],
    [(b"ab", 0)] + [(bytes([byte]), byte + 1) for byte in range(255)], [("a", 0)], [1], None, BYTES + [(b"ab", 2**80)],
], ids=lambda ranks: str(ranks)[-40:])
def test_bad_ranks_are_a_value_error(ranks):
    with pytest.raises(ValueError):
        rustbpe.Tokenizer.from_ranks(ranks, None)


@pytest.mark.parametrize("use", [
    lambda t: t.encode("x"), lambda t: t.batch_encode(["x"]), lambda t: t.encode_to_buffer(["x"]),
    lambda t: t.get_mergeable_ranks(),
])
def test_use_before_training_is_a_value_error(use):
    with pytest.raises(ValueError, match="not trained"):
        use(rustbpe.Tokenizer())


@pytest.mark.parametrize("use", [
    lambda t: t.encode(5), lambda t: t.encode(b"x"), lambda t: t.encode("\udfff"), lambda t: t.batch_encode("x"),
    lambda t: t.batch_encode(["x", 5]), lambda t: t.batch_encode(None),
    lambda t: t.encode_to_buffer(["x"], num_threads=0),
])
def test_a_bad_encoding_argument_is_a_value_error(use):
    with pytest.raises(ValueError):
        use(trained())


def test_memory_stays_flat_over_a_long_stream():
    # 200 MB of text through a process that may grow by 50 MB.
    code = """if True:
        import resource, rustbpe
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        tokenizer, before = rustbpe.Tokenizer(), peak()
        tokenizer.train_from_iterator(("some words come again %d " % (i % 5000) * 40 for i in range(200_000)), 1000)
        print(peak() - before)"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert float(run.stdout) < 50 * (3 if sys.platform == "darwin" else 1)
