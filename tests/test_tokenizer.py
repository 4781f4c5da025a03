"""The tokenizer room: both classes, their files, and conversations with masks."""

import json
import os

import numpy as np
import pytest
import regex
import tiktoken
import torch
from tiktoken.load import load_tiktoken_bpe

import rustbpe
from nanochat.common import UserError
from nanochat.split_patterns import NANOCHAT_PATTERN, SPLIT_PATTERNS, cut_places
from nanochat.tokenizer import (
    SPECIAL_TOKENS,
    HuggingFaceTokenizer,
    RustBPETokenizer,
    get_token_bytes,
    get_tokenizer,
)
from nanochat.tokenizer_files import META_NAME, RANKS_NAME

AWKWARD = {
    "empty": "", "letter": "x", "spaces": "   ", "newlines": "\n\n\r\n \n", "tabs": "\t\tend\t",
    "contractions": "It's they'LL we'Ve I'm don't 'sound ''s", "digits": "1 12 123 1234567 ٣٤٥٦ ¼½¾⅓ x1y22",
    "code": "def f(x):\n    return {'a': [1, 2]}  # ok\n", "punctuation": "...!!!\n\n--- ¿qué? «so»",
    "greek": "Η θάλασσα είναι σκοτεινή.", "hindi": "नमस्ते दुनिया", "japanese": "東京は晴れ、気温は21度。",
    "emoji": "👩\u200d🚀 ok 👍🏽 🇪🇺", "combining": "e\u0301 a\u0308 \u200b\ufeff", "control": "\x00\x01\x7f\x85\u2028",
    "bom": "\ufeffstart", "special": "<|bos|>hi<|assistant_end|>", "long word": "a" * 300, "astral": "𝔘𝔫𝔦 𐍈",
    "story": "She climbed the ninety-six steps and lit the lamp; the boat came home.",
}
awkward = pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
each_split = pytest.mark.parametrize("pattern", SPLIT_PATTERNS.values(), ids=SPLIT_PATTERNS.keys())


@pytest.fixture(params=[RustBPETokenizer, HuggingFaceTokenizer])
def kind(request):
    return request.param


# -----------------------------------------------------------------------------
# One regex, one merge table


def test_rustbpe_splits_by_our_pattern_by_default_and_knows_all_of_them():
    assert rustbpe.Tokenizer().get_pattern() == NANOCHAT_PATTERN
    assert rustbpe.Tokenizer.fast_patterns() == list(SPLIT_PATTERNS.values())


@pytest.mark.parametrize("name, pieces", [
    ("nanochat", ["It", "'s", " ", "12", "34", "5", " a", "٣٤", "٥"]),
    ("gpt4", ["It", "'s", " ", "123", "45", " a", "٣٤٥"]),
    ("qwen", ["It", "'s", " ", "1", "2", "3", "4", "5", " a", "٣", "٤", "٥"]),
])
def test_the_splits_differ_in_the_digits_of_a_piece(name, pieces):
    assert regex.findall(SPLIT_PATTERNS[name], "It's 12345 a٣٤٥") == pieces


@each_split
@awkward
def test_encoding_equals_plain_tiktoken_and_rustbpe_on_the_same_ranks(tokenizer, text, pattern):
    tokenizer = RustBPETokenizer(tokenizer.mergeable, pattern)
    ranks = {token: rank for rank, token in enumerate(tokenizer.mergeable)}
    plain = tiktoken.Encoding("plain", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert tokenizer.encode(text) == plain.encode_ordinary(text)
    assert rustbpe.Tokenizer.from_ranks(list(ranks.items()), pattern).encode(text) == plain.encode_ordinary(text)


@each_split
@awkward
def test_hugging_face_class_encodes_the_same_ranks_to_the_same_ids(tokenizer, text, pattern):
    theirs = HuggingFaceTokenizer(tokenizer.mergeable, pattern)
    assert theirs.encode(text) == RustBPETokenizer(tokenizer.mergeable, pattern).encode(text)


@each_split
def test_the_ids_of_slices_are_those_of_the_whole(tokenizer, pattern, story):
    """A long document is encoded in slices: every place where it may be cut is tried."""
    tokenizer = RustBPETokenizer(tokenizer.mergeable, pattern)
    letters = np.random.default_rng(0).choice(list("aR's 1½٣_.,:! \t\r\n\u00a0é\u0301東。、👍lve"), 20_000)
    for text in (*AWKWARD.values(), " ".join(AWKWARD.values()), "".join(letters), story):
        places = cut_places(text, pattern, 1)
        slices = [text[i:j] for i, j in zip(places, places[1:], strict=False)]
        assert "".join(slices) == text
        assert sum(tokenizer.encode(slices), []) == tokenizer.encode(text)
    assert cut_places(story, pattern + "|x", 1) == [0, len(story)]  # a pattern of which nothing is known


def test_merges_by_hand():
    # "aab aab aab ": within pieces "aab" and " aab" the pairs aa and ab each occur 3 times (" a" twice); whichever
    # is merged first, the second merge makes aab, and then " aab" is the only pair left that occurs twice.
    tokenizer = RustBPETokenizer.train_from_iterator(["aab aab aab "], vocab_size=256 + 3 + len(SPECIAL_TOKENS))
    assert tokenizer.mergeable[256] in (b"aa", b"ab")
    assert tokenizer.mergeable[257:] == [b"aab", b" aab"]
    assert tokenizer.encode("aab aab aabb") == [257, 258, 258, ord("b")]


@awkward
def test_decode_gives_back_the_text(kind, tokenizer, text):
    tokenizer = kind(tokenizer.mergeable)
    assert tokenizer.decode(tokenizer.encode(text)) == text


# -----------------------------------------------------------------------------
# Training


def test_vocab_size_counts_the_special_tokens_which_come_last(kind, story):
    tokenizer = kind.train_from_iterator(iter([story]), vocab_size=300)
    assert tokenizer.get_vocab_size() == 300
    assert tokenizer.get_special_tokens() == list(SPECIAL_TOKENS)
    assert [tokenizer.encode_special(name) for name in SPECIAL_TOKENS] == list(range(291, 300))


def test_training_is_the_same_whatever_the_buffer(kind, story):
    lines = story.split("\n")
    by_one, at_once = (kind.train_from_iterator(lines, vocab_size=400, buffer_size=size) for size in (1, 8192))
    assert by_one.hash() == at_once.hash()


@pytest.mark.parametrize("name, longest", [("nanochat", 2), ("gpt4", 3), ("qwen", 1)])
def test_training_learns_no_number_longer_than_the_splits_pieces(kind, name, longest):
    pattern = SPLIT_PATTERNS[name]
    tokenizer = kind.train_from_iterator(["year 19841984 " * 50], vocab_size=300, pattern=pattern)
    numbers = [token for token in tokenizer.mergeable if token.isdigit()]
    assert tokenizer.pattern == pattern and max(map(len, numbers)) == longest


def test_a_short_text_gives_a_smaller_vocabulary(kind):
    tokenizer = kind.train_from_iterator(["hello hello"], vocab_size=1000)
    assert tokenizer.get_vocab_size() < 300
    assert tokenizer.encode_special("<|output_end|>") == tokenizer.get_vocab_size() - 1


def test_training_survives_lone_surrogates(kind):
    assert "\ufffdb".encode() in kind.train_from_iterator(["a\ud800b " * 20], vocab_size=1000).mergeable


def test_a_vocabulary_smaller_than_the_bytes_is_refused(kind):
    with pytest.raises(UserError, match="vocab_size 100 is less than 265"):
        kind.train_from_iterator(["text"], vocab_size=100)


# -----------------------------------------------------------------------------
# Encoding


def test_text_never_yields_a_special_token(kind, tokenizer):
    tokenizer = kind(tokenizer.mergeable)
    text = "".join(SPECIAL_TOKENS) + " " + " ".join(SPECIAL_TOKENS)
    assert max(tokenizer.encode(text)) < tokenizer.get_bos_token_id()
    ids, _ = tokenizer.render_conversation({"messages": [{"role": "user", "content": text}]})
    assert sum(token >= tokenizer.get_bos_token_id() for token in ids) == 3  # bos, user_start, user_end


def test_a_list_encodes_as_its_texts_do_one_by_one(kind, tokenizer):
    tokenizer, texts = kind(tokenizer.mergeable), list(AWKWARD.values())
    assert tokenizer.encode(texts, num_threads=2) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode([]) == []


def test_prepend_and_append_take_a_name_or_an_id(tokenizer):
    bos, end, plain = tokenizer.get_bos_token_id(), tokenizer.encode_special("<|user_end|>"), tokenizer.encode("hi")
    assert tokenizer.encode("hi", prepend="<|bos|>", append=end) == [bos, *plain, end]
    assert tokenizer(["hi", ""], prepend=bos) == [[bos, *plain], [bos]]


def test_an_unknown_special_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match="'<|eos|>' is no special token".replace("|", r"\|")):
        tokenizer.encode("hi", prepend="<|eos|>")


def test_only_str_and_lists_are_encoded(tokenizer):
    with pytest.raises(ValueError, match="got bytes"):
        tokenizer.encode(b"hi")


def test_lone_surrogates_become_replacement_characters(kind, tokenizer):
    tokenizer = kind(tokenizer.mergeable)
    text = "a\ud800b"
    for ids in (tokenizer.encode(text), tokenizer.encode([text])[0], tokenizer.encode_to_numpy([text])[0]):
        assert tokenizer.decode(ids) == "a\ufffdb"


def test_a_million_spaces_do_not_panic(tokenizer):
    text = " " * 1_000_001 + "x"  # tiktoken alone panics on it, which no `except Exception` would catch
    ids = tokenizer.encode([text, "hi"])
    assert tokenizer.decode(ids[0]) == text and ids[1] == tokenizer.encode("hi")


@each_split
def test_half_a_million_of_the_same_character_do_not_panic(tokenizer, pattern):
    tokenizer = RustBPETokenizer(tokenizer.mergeable, pattern)
    for character in " \n1a!":
        text = character * 499_999 + "x"  # just short enough to go through tiktoken
        ids, _ = tokenizer.encode_to_numpy([text])
        assert tokenizer.encode(text) == ids.tolist()


def test_encode_to_numpy_equals_encode(kind, tokenizer):
    tokenizer, texts = kind(tokenizer.mergeable), list(AWKWARD.values())
    ids, offsets = tokenizer.encode_to_numpy(texts, num_threads=2)
    assert (ids.dtype, offsets.dtype, len(offsets)) == (np.uint32, np.int64, len(texts) + 1)
    rows = [ids[start:stop].tolist() for start, stop in zip(offsets[:-1], offsets[1:], strict=True)]
    assert rows == tokenizer.encode(texts)


def test_encode_to_numpy_of_nothing(kind, tokenizer):
    ids, offsets = kind(tokenizer.mergeable).encode_to_numpy([])
    assert (ids.tolist(), offsets.tolist()) == ([], [0])


# -----------------------------------------------------------------------------
# Decoding and bytes


def test_decode_bytes_is_exact_where_a_token_ends_amid_a_character(tokenizer):
    ids = tokenizer.encode("東京")  # learned from a text without Japanese: single bytes
    assert [tokenizer.decode_bytes(ids[:n]) for n in range(7)] == ["東京".encode()[:n] for n in range(7)]
    assert tokenizer.decode(ids[:4]) == "東\ufffd"


def test_special_tokens_decode_to_their_names(kind, tokenizer):
    tokenizer = kind(tokenizer.mergeable)
    for name in SPECIAL_TOKENS:
        assert tokenizer.id_to_token(tokenizer.encode_special(name)) == name


@pytest.mark.parametrize("token_id", [512, -1])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, token_id):
    with pytest.raises(ValueError, match=f"token id {token_id} is not in the vocabulary of 512"):
        tokenizer.decode([token_id])


def test_token_bytes_counts_raw_bytes_and_nothing_for_special_tokens(kind, tokenizer, story):
    tokenizer = kind(tokenizer.mergeable)
    token_bytes = get_token_bytes("cpu", tokenizer)
    assert (token_bytes.shape, token_bytes.dtype) == ((512,), torch.int64)
    assert token_bytes[:256].tolist() == [1] * 256  # bytes from 0x80 on too, which alone are no text
    assert token_bytes[tokenizer.get_bos_token_id():].tolist() == [0] * len(SPECIAL_TOKENS)
    text = story + "東京 👍"
    assert token_bytes[tokenizer.encode(text)].sum() == len(text.encode("utf-8"))


# -----------------------------------------------------------------------------
# Files


@each_split
@pytest.mark.parametrize("loader", [RustBPETokenizer, HuggingFaceTokenizer])
def test_each_class_loads_what_each_saved(kind, loader, tokenizer, story, tmp_path, pattern):
    saved = kind(tokenizer.mergeable, pattern)
    saved.save(tmp_path)
    loaded = loader.from_directory(tmp_path)
    assert type(loaded) is loader and loaded.hash() == saved.hash() and loaded.pattern == pattern
    text = story + " 1234567"
    assert loaded.encode(text) == saved.encode(text)


def test_get_tokenizer_takes_the_class_that_saved_and_the_base_dir(kind, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    kind(tokenizer.mergeable).save(tmp_path / "tokenizer")
    assert type(get_tokenizer()) is kind
    assert get_token_bytes("cpu").shape == (512,)


def test_files_are_tiktoken_text_and_ascii_json_and_nothing_else(tokenizer, tmp_path, monkeypatch):
    RustBPETokenizer(tokenizer.mergeable, pattern=r"\p{L}+|é|[^\p{L}]+").save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([META_NAME, RANKS_NAME])
    assert all(path.read_bytes().isascii() for path in tmp_path.iterdir())  # the same under any locale
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # it would keep copies of local files
    ranks = load_tiktoken_bpe(str(tmp_path / RANKS_NAME))
    assert list(ranks) == tokenizer.mergeable and list(ranks.values()) == list(range(503))


def test_the_hash_covers_pattern_ranks_and_special_tokens(tokenizer):
    others = [RustBPETokenizer(tokenizer.mergeable, pattern=NANOCHAT_PATTERN.replace("1,2", "1,3")),
              RustBPETokenizer([*tokenizer.mergeable[:-2], tokenizer.mergeable[-1], tokenizer.mergeable[-2]]),
              RustBPETokenizer(tokenizer.mergeable, special_tokens=[*SPECIAL_TOKENS[:-1], "<|other|>"])]
    assert len({tokenizer.hash(), *(other.hash() for other in others)}) == 4


def test_a_missing_tokenizer_names_the_command_that_trains_one(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer in .*\nhint: train one: python -m scripts\.tok_train"):
        get_tokenizer(tmp_path)


@pytest.mark.parametrize("name", [META_NAME, RANKS_NAME])
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:len(data) // 2], lambda data: b"\xff" + data,
                                    lambda data: data.replace(b"z", b"y").replace(b"d", b"c")],
                         ids=["empty", "cut", "not utf-8", "changed"])
def test_damaged_files_are_refused(tokenizer, tmp_path, name, damage):
    tokenizer.save(tmp_path)
    (tmp_path / name).write_bytes(damage((tmp_path / name).read_bytes()))
    with pytest.raises(UserError, match="cannot be used"):
        get_tokenizer(tmp_path)


def test_ranks_of_another_tokenizer_are_refused(tokenizer, tmp_path):
    RustBPETokenizer(tokenizer.mergeable[:300]).save(tmp_path)  # as after a crash between the two files
    old_meta = (tmp_path / META_NAME).read_bytes()
    tokenizer.save(tmp_path)
    (tmp_path / META_NAME).write_bytes(old_meta)
    with pytest.raises(UserError, match="do not match its hash"):
        RustBPETokenizer.from_directory(tmp_path)


def test_a_newer_format_is_refused(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    meta = json.loads((tmp_path / META_NAME).read_text(encoding="utf-8"))
    (tmp_path / META_NAME).write_text(json.dumps({**meta, "format_version": 2}), encoding="utf-8")
    with pytest.raises(UserError, match="format 2 is newer"):
        get_tokenizer(tmp_path)


def test_a_long_lived_tokenizer_frees_its_batches(tokenizer, story):
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("resident memory is read from /proc")
    texts = [story] * 20  # 43 KB, 12K tokens

    def megabytes_after(num_batches):
        for _ in range(num_batches):
            tokenizer.encode(texts, num_threads=2)
            tokenizer.encode_to_numpy(texts, 2)
        with open("/proc/self/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = megabytes_after(10)
    assert megabytes_after(100) - before < 8  # one batch's texts, lists and arrays, kept each time: 15 MB and more
