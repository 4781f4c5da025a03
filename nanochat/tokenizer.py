"""
Text to token ids and back: byte-level BPE, special tokens, and the rendering of conversations.

A tokenizer is three things: the split pattern, which cuts text into pieces that no token crosses;
the ranks, the mergeable tokens in the order in which they were learned (rank = id); and the special
tokens, which take the last ids and mark documents, turns and tool calls. Both classes are views of
these three, and read each other's files:

    RustBPETokenizer       trains with `rustbpe`, encodes with `tiktoken`: the default
    HuggingFaceTokenizer   trains and encodes with `tokenizers`: the way to that ecosystem

Text never becomes a special token, whatever a user or a data set writes: only code adds them, by
name or id. Nothing here adds spaces, normalises or strips: decode(encode(text)) == text.
"""

import base64
import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
import torch
from tokenizers import pre_tokenizers

import rustbpe
from nanochat.common import UserError, get_base_dir, write_text
from nanochat.conversation import PART_FENCES, check_conversation

# GPT-4's split, but numbers in pieces of at most two digits: at vocabularies of this size,
# three-digit pieces would spend a thousand tokens on numbers. Possessive quantifiers (?+ ++) change
# no match and spare backtracking.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Every special token. The first starts each document and conversation; python marks a call of the
# calculator, which the assistant writes, and output its result, which the engine writes.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)

FORMAT_VERSION = 1  # of the two files
META_NAME = "tokenizer_meta.json"
RANKS_NAME = "tokenizer.tiktoken"
TRAIN_HINT = "train one: python -m scripts.tok_train (--data=PATH for your own text)"
TIKTOKEN_MAX_CHARS = 500_000  # its regex engine panics when a match backtracks a million times, as over many spaces

# -----------------------------------------------------------------------------
# Files: <directory>/tokenizer.tiktoken holds the ranks, <directory>/tokenizer_meta.json the rest
# and a hash of all


def _ranks_to_text(mergeable):
    """tiktoken's own format, one line per token: base64 of its bytes, a space, its rank."""
    lines = []
    for rank, token in enumerate(mergeable):
        encoded = base64.b64encode(token).decode()
        lines.append(f"{encoded} {rank}\n")
    return "".join(lines)


def _hash(ranks_text, pattern, special_tokens):
    """sha256 (hex) over everything that decides which ids a text becomes."""
    settings = json.dumps([pattern, list(special_tokens)])
    return hashlib.sha256(f"{settings}\n{ranks_text}".encode()).hexdigest()


def _read_files(directory):
    """(kind, mergeable, pattern, special_tokens) of a saved tokenizer, checked against its hash."""
    directory = Path(directory)
    # Written last, so without it there is no tokenizer here
    if not (directory / META_NAME).exists():
        raise UserError(f"no tokenizer in {directory}: {META_NAME} is missing", TRAIN_HINT)

    try:
        meta = json.loads((directory / META_NAME).read_text(encoding="utf-8"))
        if meta["format_version"] > FORMAT_VERSION:
            raise ValueError(f"its format {meta['format_version']} is newer than this code's {FORMAT_VERSION}")
        ranks_text = (directory / RANKS_NAME).read_text(encoding="utf-8")
        kind = meta["kind"]
        pattern = meta["pattern"]
        special_tokens = meta["special_tokens"]
        found_hash = _hash(ranks_text, pattern, special_tokens)
        if kind not in TOKENIZER_KINDS or meta["hash"] != found_hash:
            raise ValueError("its contents do not match its hash")
        # A token's rank is the number of its line, so the rank itself need not be read
        mergeable = [base64.b64decode(line.split()[0]) for line in ranks_text.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer in {directory} cannot be used: {error}", TRAIN_HINT) from error
    return kind, mergeable, pattern, special_tokens


# -----------------------------------------------------------------------------
# The interface of both tokenizers


def _replace_surrogates(text):
    """
    `text` with lone surrogates, which JSON can hold and UTF-8 cannot, replaced by U+FFFD (as
    tiktoken does).
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """
    Everything but training and encoding. The subclasses add _train_ranks, _encode_one,
    _encode_batch and encode_to_numpy.
    """

    def __init__(self, mergeable, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
        """
        `mergeable`: the bytes of each ordinary token, in rank order; `special_tokens`: names, after
        them.
        """
        # The three things that a tokenizer is
        self.mergeable = list(mergeable)
        self.pattern = pattern
        first = len(self.mergeable)
        self._special_ids = {name: first + i for i, name in enumerate(special_tokens)}
        # For decoding: the bytes of every id; a special token decodes to its name
        all_bytes = self.mergeable + [name.encode() for name in special_tokens]
        self._id_to_bytes = dict(enumerate(all_bytes))

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size, buffer_size=8192):
        """
        Train on an iterator of strings, read once, `buffer_size` texts at a time. `vocab_size`
        counts the special tokens; a text with too few different pairs gives a smaller vocabulary
        than asked for.
        """
        num_mergeable = vocab_size - len(SPECIAL_TOKENS)
        if num_mergeable < 256:
            num_special = len(SPECIAL_TOKENS)
            raise UserError(f"vocab_size {vocab_size} is less than {256 + num_special}: 256 bytes and {num_special} "
                            "special tokens", "for example --vocab_size=4096")
        texts = map(_replace_surrogates, text_iterator)
        return cls(cls._train_ranks(texts, num_mergeable, buffer_size))

    @classmethod
    def from_directory(cls, directory):
        """Load what `save` of either class wrote; UserError where it is missing or damaged."""
        _, *parts = _read_files(directory)
        return cls(*parts)

    def save(self, directory):
        """
        Write the two files. The metadata go last: after a crash in between, the hash does not
        match.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        meta = {
            "format_version": FORMAT_VERSION,
            "kind": self.kind,
            "vocab_size": self.get_vocab_size(),
            "pattern": self.pattern,
            "special_tokens": self.get_special_tokens(),
            "hash": self.hash(),
        }
        write_text(directory / RANKS_NAME, _ranks_to_text(self.mergeable))
        write_text(directory / META_NAME, json.dumps(meta, indent=2) + "\n")

    def hash(self):
        """
        sha256 (hex) over pattern, ranks and special tokens. Equal hashes encode every text alike.
        """
        return _hash(_ranks_to_text(self.mergeable), self.pattern, self._special_ids)

    def get_vocab_size(self):
        return len(self._id_to_bytes)

    def get_special_tokens(self):
        """Names of the special tokens, in the order of their ids."""
        return list(self._special_ids)

    def id_to_token(self, token_id):
        """One token as text; a token that ends inside a character shows U+FFFD."""
        return self.decode([token_id])

    def encode_special(self, name):
        """'<|bos|>' -> its id. The only way to get a special token."""
        if name not in self._special_ids:
            raise ValueError(f"{name!r} is no special token, known: {' '.join(self._special_ids)}")
        return self._special_ids[name]

    def get_bos_token_id(self):
        return self.encode_special("<|bos|>")

    def encode(self, text, prepend=None, append=None, num_threads=8):
        """
        str -> list of ids; list of str -> list of lists, by `num_threads` threads. `prepend` and
        `append`, a special token's name or an id, go around each text: encode("hi",
        prepend="<|bos|>") == [bos, *encode("hi")].
        """
        head = self._as_ids(prepend)
        tail = self._as_ids(append)
        if isinstance(text, str):
            ids = self._encode_one(text)
            return head + ids + tail
        if not isinstance(text, (list, tuple)):
            raise ValueError(f"encode takes a str or a list of str, got {type(text).__name__}")
        rows = self._encode_batch(list(text), num_threads)
        return [head + ids + tail for ids in rows]

    __call__ = encode

    def _as_ids(self, token):
        """A special token's name, an id, or None, as a list of ids."""
        if token is None:
            return []
        return [self.encode_special(token) if isinstance(token, str) else token]

    def decode_bytes(self, ids):
        """
        The exact bytes of `ids`, which may end inside a character: a stream of text is cut from
        them.
        """
        try:
            return b"".join([self._id_to_bytes[token_id] for token_id in ids])
        except KeyError as error:
            raise ValueError(f"token id {error} is not in the vocabulary of {self.get_vocab_size()}") from None

    def decode(self, ids):
        """ids -> text; bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render_conversation(self, conversation, max_tokens=2048):
        """
        (ids, mask), both cut to `max_tokens` (None: whole). The mask is 1 exactly on what the
        assistant must write: its text, its python calls with their fences, its end token. Tool
        outputs are 0: the engine writes them.
        """
        ids, mask = self._render_turns(check_conversation(conversation))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation):
        """
        The ids after which the assistant speaks: without a last assistant message, then
        <|assistant_start|>.
        """
        # A last answer is what the model is to write anew
        turns = check_conversation(conversation)
        if turns[-1][0] == "assistant":
            turns.pop()
        ids, _ = self._render_turns(turns)
        return ids + [self.encode_special("<|assistant_start|>")]

    def render_batch(self, conversations):
        """
        The fast path of packing: the ids of each conversation as an int32 array, without masks.
        """
        plans = [self._plan(check_conversation(conversation)) for conversation in conversations]

        # Encode all texts at once
        texts = []
        for plan in plans:
            texts += [item for item, _ in plan if isinstance(item, str)]
        ids, offsets = self.encode_to_numpy(texts)
        encoded = iter(np.split(ids, offsets[1:]))

        # Put the special tokens between them
        rows = []
        for plan in plans:
            pieces = [next(encoded) if isinstance(item, str) else [item] for item, _ in plan]
            rows.append(np.concatenate(pieces).astype(np.int32))
        return rows

    def _render_turns(self, turns):
        ids = []
        mask = []
        for item, trained in self._plan(turns):
            tokens = self._encode_one(item) if isinstance(item, str) else [item]
            ids += tokens
            mask += [trained] * len(tokens)
        return ids, mask

    def _plan(self, turns):
        """
        A conversation before its texts are encoded: [(text or a special token's id, 1 where it is
        trained on)].
        """
        plan = [(self.get_bos_token_id(), 0)]
        for role, parts in turns:
            # The start of the assistant's turn is given to it; its end is its own to write
            trained = 1 if role == "assistant" else 0
            plan.append((self.encode_special(f"<|{role}_start|>"), 0))
            for part_type, text in parts:
                fences = [self.encode_special(name) for name in PART_FENCES[part_type]]  # a start and an end, or none
                items = fences[:1] + [text] + fences[1:]
                mask = 0 if part_type == "python_output" else trained
                plan += [(item, mask) for item in items]
            plan.append((self.encode_special(f"<|{role}_end|>"), trained))
        return plan

    def visualize_tokenization(self, ids, mask):
        """
        One line for a terminal, `|` between tokens: green where the mask is 1 (trained on), red
        where it is 0.
        """
        tokens = []
        for token_id, trained in zip(ids, mask, strict=True):
            colour = 32 if trained else 31
            text = self.id_to_token(token_id).replace("\n", "\\n")
            tokens.append(f"\033[{colour}m{text}\033[0m")
        return "|".join(tokens)


# -----------------------------------------------------------------------------
# Trained by rustbpe, used through tiktoken


class RustBPETokenizer(Tokenizer):
    kind = "rustbpe"

    def __init__(self, mergeable, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
        super().__init__(mergeable, pattern, special_tokens)
        ranks = {token: rank for rank, token in enumerate(self.mergeable)}
        self._rustbpe = rustbpe.Tokenizer.from_ranks(list(ranks.items()), pattern)
        self._tiktoken = tiktoken.Encoding(
            "nanochat",
            pat_str=pattern,
            mergeable_ranks=ranks,
            special_tokens=self._special_ids,
        )

    @staticmethod
    def _train_ranks(texts, num_mergeable, buffer_size):
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(texts, num_mergeable, buffer_size=buffer_size, pattern=SPLIT_PATTERN)
        # The tokens in the order in which they were learned
        ranks = dict(trainer.get_mergeable_ranks())
        return sorted(ranks, key=ranks.get)

    def _encode_one(self, text):
        if len(text) > TIKTOKEN_MAX_CHARS:  # our own splitter never backtracks, and gives the same ids
            return self._rustbpe.encode(_replace_surrogates(text))
        return self._tiktoken.encode_ordinary(text)  # `ordinary`: special tokens in the text are plain text

    def _encode_batch(self, texts, num_threads):
        if any(len(text) > TIKTOKEN_MAX_CHARS for text in texts):
            return [self._encode_one(text) for text in texts]
        return self._tiktoken.encode_ordinary_batch(texts, num_threads=num_threads)

    def encode_to_numpy(self, texts, num_threads=None):
        """
        The loader's fast path: list of str -> (ids uint32 (N,), offsets int64 (len(texts) + 1,));
        text i is ids[offsets[i]:offsets[i + 1]], without <|bos|>. No Python int is made on the way;
        the arrays are read-only.
        """
        try:
            ids, offsets = self._rustbpe.encode_to_buffer(texts, num_threads)
        except UnicodeEncodeError:  # a lone surrogate somewhere: too rare to look for in every text
            texts = [_replace_surrogates(text) for text in texts]
            ids, offsets = self._rustbpe.encode_to_buffer(texts, num_threads)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<i8")


# -----------------------------------------------------------------------------
# Trained by and used through Hugging Face's tokenizers


def _byte_characters():
    """
    {byte: character} of GPT-2's alphabet, in which `tokenizers` writes bytes as visible characters:
    b"A " is 'AĠ'. Bytes that print in Latin-1 stand for themselves, the others in order for U+0100,
    U+0101, ...
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # the 256 characters, in no order
    visible_first = sorted(range(256), key=lambda byte: chr(byte) not in alphabet)
    return dict(zip(visible_first, sorted(alphabet), strict=True))


class HuggingFaceTokenizer(Tokenizer):
    kind = "huggingface"

    def __init__(self, mergeable, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
        super().__init__(mergeable, pattern, special_tokens)
        # The vocabulary in the library's alphabet
        characters = _byte_characters()
        names = ["".join(map(characters.get, token)) for token in self.mergeable]
        vocab = {name: rank for rank, name in enumerate(names)}
        # tiktoken merges any two neighbours whose union is a token, so a token has a merge for each
        # way to cut it
        merges = []
        for name in names:
            cuts = [(name[:i], name[i:]) for i in range(1, len(name))]
            merges += [(left, right) for left, right in cuts if left in vocab and right in vocab]
        # ignore_merges: a whole piece that is a token is taken as it is, also as tiktoken does
        model = tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
        # The library's own tokenizer; it does not know the special tokens, so no text reaches them
        self.core = tokenizers.Tokenizer(model)
        self.core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])

    @classmethod
    def _train_ranks(cls, texts, num_mergeable, buffer_size):
        characters = _byte_characters()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=num_mergeable,
            initial_alphabet=list(characters.values()),
            show_progress=False,
        )
        single_bytes = [bytes([byte]) for byte in range(256)]
        core = cls(single_bytes).core  # splits as it should, knows no merge yet
        batches = iter(lambda: list(itertools.islice(texts, buffer_size)), [])  # until an empty one
        core.train_from_iterator(batches, trainer)

        # The learned tokens after the single bytes, in the order in which they were learned
        ranks = core.get_vocab()  # token -> rank
        learned = [token for token in sorted(ranks, key=ranks.get) if len(token) > 1]
        to_byte = {character: byte for byte, character in characters.items()}
        return single_bytes + [bytes(map(to_byte.get, token)) for token in learned]

    def _encode_one(self, text):
        return self._encode_batch([text], num_threads=1)[0]

    def _encode_batch(self, texts, num_threads):  # the library has threads of its own
        texts = [_replace_surrogates(text) for text in texts]
        rows = self.core.encode_batch_fast(texts, add_special_tokens=False)
        return [row.ids for row in rows]

    def encode_to_numpy(self, texts, num_threads=None):
        """As RustBPETokenizer.encode_to_numpy, at this library's speed."""
        rows = self._encode_batch(texts, num_threads)
        ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint32)
        return ids, np.cumsum([0, *map(len, rows)], dtype=np.int64)


# -----------------------------------------------------------------------------
# What the stages use

TOKENIZER_KINDS = {cls.kind: cls for cls in (RustBPETokenizer, HuggingFaceTokenizer)}


def get_tokenizer(directory=None):
    """
    The saved tokenizer of <base dir>/tokenizer, or of `directory`, in the class that saved it.
    """
    kind, *parts = _read_files(directory or get_base_dir() / "tokenizer")
    return TOKENIZER_KINDS[kind](*parts)


def get_token_bytes(device, tokenizer=None):
    """
    (vocab_size,) int64: bytes of text that each token stands for, 0 for special tokens; bits per
    byte divides by it. Counted from raw bytes: a token that is half a character has no text whose
    length could be taken.
    """
    tokenizer = tokenizer or get_tokenizer()
    lengths = [len(token) for token in tokenizer.mergeable]
    lengths += [0] * len(tokenizer.get_special_tokens())
    return torch.tensor(lengths, dtype=torch.int64, device=device)
