"""
Text to token ids and back: byte-level BPE, special tokens, and the rendering of conversations.

A tokenizer is three things: the split pattern, which cuts text into pieces that no token crosses; the ranks, the
mergeable tokens in the order in which they were learned (rank = id); and the special tokens, which take the last ids
and mark documents, turns and tool calls. Both classes are views of these three, and read each other's files:

    RustBPETokenizer       trains with `rustbpe`, encodes with `tiktoken`: the default
    HuggingFaceTokenizer   trains and encodes with `tokenizers`: the way to that ecosystem

Text never yields a special token, whatever a user or a data set writes: only code does, by name or id. Nothing here
adds spaces, normalises or strips: decode(encode(text)) == text.
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

import rustbpe
from nanochat.common import UserError, get_base_dir, write_text

# GPT-4's split, but numbers in pieces of at most two digits: at vocabularies of this size, three-digit pieces would
# spend a thousand tokens on numbers. Possessive quantifiers (?+ ++) change no match and spare backtracking.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and conversation
    "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>",  # a call of the calculator, written by the assistant
    "<|output_start|>", "<|output_end|>",  # its result, written by the engine
)

FORMAT_VERSION = 1
META_NAME, RANKS_NAME = "tokenizer_meta.json", "tokenizer.tiktoken"
TRAIN_HINT = "train one: python -m scripts.tok_train (--data=PATH for your own text)"
TIKTOKEN_MAX_CHARS = 500_000  # its regex engine panics on a match that steps back a million times: so many spaces

# -----------------------------------------------------------------------------
# Files: <directory>/tokenizer.tiktoken holds the ranks, <directory>/tokenizer_meta.json the rest and a hash of all


def _ranks_to_text(mergeable):
    """tiktoken's own format, one line per token: base64 of its bytes, a space, its rank."""
    return "".join(f"{base64.b64encode(token).decode('ascii')} {rank}\n" for rank, token in enumerate(mergeable))


def _hash(ranks_text, pattern, special_tokens):
    """sha256 (hex) over all that decides which ids a text becomes."""
    return hashlib.sha256(f"{json.dumps([pattern, list(special_tokens)])}\n{ranks_text}".encode()).hexdigest()


def _read_files(directory):
    """(kind, (mergeable, pattern, special_tokens)) of a saved tokenizer, checked against its hash."""
    directory = Path(directory)
    if not (directory / META_NAME).exists():
        raise UserError(f"no tokenizer in {directory}: {META_NAME} is missing", TRAIN_HINT)
    try:
        meta = json.loads((directory / META_NAME).read_text(encoding="utf-8"))
        kind, pattern, special_tokens = meta["kind"], meta["pattern"], meta["special_tokens"]
        if meta["format_version"] > FORMAT_VERSION:
            raise ValueError(f"its format {meta['format_version']} is newer than this code's {FORMAT_VERSION}")
        ranks_text = (directory / RANKS_NAME).read_text(encoding="utf-8")
        if kind not in TOKENIZER_KINDS or _hash(ranks_text, pattern, special_tokens) != meta["hash"]:
            raise ValueError("its contents do not match its hash")
        mergeable = [base64.b64decode(line.split()[0]) for line in ranks_text.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the tokenizer in {directory} cannot be used: {error}", TRAIN_HINT) from error
    return kind, (mergeable, pattern, special_tokens)


# -----------------------------------------------------------------------------
# Conversations: {"messages": [{"role": ..., "content": str | [{"type": ..., "text": str}]}]}

FENCES = {"python": "python", "python_output": "output"}  # part type -> x of the <|x_start|> and <|x_end|> around it


def _parse_message(message, index):
    """(role, [(part type, text), ...]) of message number `index`; UserError where it is malformed."""
    if not isinstance(message, dict) or message.get("role") not in ("system", "user", "assistant"):
        raise UserError(f"message {index} needs a role, one of system, user, assistant: {message!r:.80}")
    role, content = message["role"], message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, (list, tuple)):
        raise UserError(f"message {index} has content of type {type(content).__name__}, needed: str or list of parts")
    allowed = ["text", *FENCES] if role == "assistant" else ["text"]
    for part_index, part in enumerate(parts):
        if not isinstance(part, dict) or part.get("type") not in allowed or not isinstance(part.get("text"), str):
            raise UserError(f"part {part_index} of message {index} ({role}) needs a type, one of {', '.join(allowed)}, "
                            f"and a text: {part!r:.80}")
    if role != "assistant":  # text only: joined before it is encoded, so that part borders leave no trace
        parts = [{"type": "text", "text": "".join(part["text"] for part in parts)}]
    return role, [(part["type"], part["text"]) for part in parts]


def _parse_conversation(conversation):
    """[(role, parts), ...], user first and taking turns; a leading system message heads the first user turn."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, (list, tuple)) or len(messages) == 0:
        raise UserError(f"a conversation needs a non-empty list under 'messages', got {messages!r:.80}")
    turns = [_parse_message(message, index) for index, message in enumerate(messages)]
    first = int(turns[0][0] == "system")  # index of the first user message
    if len(turns) == first:
        raise UserError("message 0 is a system message, and no user message follows it")
    for index in range(first, len(turns)):
        needed = "assistant" if (index - first) % 2 else "user"
        if turns[index][0] != needed:
            raise UserError(f"message {index} has role {turns[index][0]!r}, needed {needed!r}: an optional system "
                            "message, then user and assistant in turns")
    if first == 1:
        (_, [(_, system_text)]), (_, [(_, user_text)]) = turns[:2]
        turns[:2] = [("user", [("text", f"{system_text}\n\n{user_text}")])]
    return turns


# -----------------------------------------------------------------------------
# The interface of both tokenizers


def _replace_surrogates(text):
    """`text` with lone surrogates, which JSON can hold and UTF-8 cannot, replaced by U+FFFD (as tiktoken does)."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Tokenizer:
    """All but training and encoding: the subclasses add _train_ranks, _encode_one, _encode_batch, encode_to_numpy."""

    def __init__(self, mergeable, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
        """`mergeable`: the bytes of each ordinary token, in rank order; `special_tokens`: names, after them."""
        self.mergeable, self.pattern = list(mergeable), pattern
        self._special_ids = {name: len(self.mergeable) + i for i, name in enumerate(special_tokens)}
        self._id_to_bytes = dict(enumerate(self.mergeable + [name.encode("utf-8") for name in special_tokens]))

    @classmethod
    def train_from_iterator(cls, text_iterator, vocab_size, buffer_size=8192):
        """From any iterator of strings, read once, `buffer_size` texts at a time. `vocab_size` counts the special
        tokens; a text with too few different pairs gives a smaller vocabulary than asked for."""
        num_mergeable = vocab_size - len(SPECIAL_TOKENS)
        if num_mergeable < 256:
            raise UserError(f"vocab_size {vocab_size} is less than {256 + len(SPECIAL_TOKENS)}: 256 bytes and "
                            f"{len(SPECIAL_TOKENS)} special tokens", "for example --vocab_size=4096")
        return cls(cls._train_ranks(map(_replace_surrogates, text_iterator), num_mergeable, buffer_size))

    @classmethod
    def from_directory(cls, directory):
        """Load what `save` of either class wrote; UserError where it is missing or damaged."""
        return cls(*_read_files(directory)[1])

    def save(self, directory):
        """Write the two files. The metadata go last: a crash in between leaves what the hash tells from a whole."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        meta = {"format_version": FORMAT_VERSION, "kind": self.kind, "vocab_size": self.get_vocab_size(),
                "pattern": self.pattern, "special_tokens": self.get_special_tokens(), "hash": self.hash()}
        write_text(directory / RANKS_NAME, _ranks_to_text(self.mergeable))
        write_text(directory / META_NAME, json.dumps(meta, indent=2) + "\n")

    def hash(self):
        """sha256 (hex) over pattern, ranks and special tokens. Equal hashes encode every text alike."""
        return _hash(_ranks_to_text(self.mergeable), self.pattern, self._special_ids)

    def get_vocab_size(self):
        return len(self._id_to_bytes)

    def get_special_tokens(self):
        """Names of the special tokens, in the order of their ids."""
        return list(self._special_ids)

    def id_to_token(self, token_id):
        """One token as text; a token that ends amid a character shows U+FFFD."""
        return self.decode([token_id])

    def encode_special(self, name):
        """'<|bos|>' -> its id. The one way to a special token."""
        if name not in self._special_ids:
            raise ValueError(f"{name!r} is no special token, known: {' '.join(self._special_ids)}")
        return self._special_ids[name]

    def get_bos_token_id(self):
        return self.encode_special("<|bos|>")

    def encode(self, text, prepend=None, append=None, num_threads=8):
        """str -> list of ids; list of str -> list of lists, by `num_threads` threads. `prepend` and `append`, a special
        token's name or an id, go around each text: encode("hi", prepend="<|bos|>") == [bos, *encode("hi")]."""
        head, tail = ([] if token is None else [token if isinstance(token, int) else self.encode_special(token)]
                      for token in (prepend, append))
        if isinstance(text, str):
            return [*head, *self._encode_one(text), *tail]
        if not isinstance(text, (list, tuple)):
            raise ValueError(f"encode takes a str or a list of str, got {type(text).__name__}")
        return [[*head, *ids, *tail] for ids in self._encode_batch(list(text), num_threads)]

    __call__ = encode

    def decode_bytes(self, ids):
        """The exact bytes of `ids`, which may end amid a character: what a stream of text is cut from."""
        try:
            return b"".join([self._id_to_bytes[token_id] for token_id in ids])
        except KeyError as error:
            raise ValueError(f"token id {error} is not in the vocabulary of {self.get_vocab_size()}") from None

    def decode(self, ids):
        """ids -> text; bytes that are no UTF-8 become U+FFFD, special tokens their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render_conversation(self, conversation, max_tokens=2048):
        """(ids, mask), both cut to `max_tokens` (None: whole). The mask is 1 exactly on what the assistant must write:
        its text, its python calls with their fences, its end token. Tool outputs are 0: the engine writes them."""
        ids, mask = self._render_turns(_parse_conversation(conversation))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation):
        """The ids after which the assistant speaks: without a last assistant message, then <|assistant_start|>."""
        turns = _parse_conversation(conversation)
        if turns[-1][0] == "assistant":
            turns.pop()
        return self._render_turns(turns)[0] + [self.encode_special("<|assistant_start|>")]

    def render_batch(self, conversations):
        """Packing's fast path: the ids of each conversation as an int32 array, without masks."""
        plans = [[item for item, _ in self._plan(_parse_conversation(conversation))] for conversation in conversations]
        ids, offsets = self.encode_to_numpy([item for plan in plans for item in plan if isinstance(item, str)])
        texts = iter(np.split(ids, offsets[1:]))
        return [np.concatenate([next(texts) if isinstance(item, str) else [item] for item in plan]).astype(np.int32)
                for plan in plans]

    def _render_turns(self, turns):
        pieces = [(self._encode_one(item) if isinstance(item, str) else [item], trained)
                  for item, trained in self._plan(turns)]
        ids = [token for tokens, _ in pieces for token in tokens]
        return ids, [trained for tokens, trained in pieces for _ in tokens]

    def _plan(self, turns):
        """[(id of a special token, or a text, 1 where it is trained on)]: what a conversation is made of."""
        plan = [(self.get_bos_token_id(), 0)]
        for role, parts in turns:
            trained = int(role == "assistant")
            plan.append((self.encode_special(f"<|{role}_start|>"), 0))
            for part_type, text in parts:
                mask = 0 if part_type == "python_output" else trained
                fence = FENCES.get(part_type)
                plan += [(self.encode_special(f"<|{fence}_start|>"), mask)] if fence else []
                plan.append((text, mask))
                plan += [(self.encode_special(f"<|{fence}_end|>"), mask)] if fence else []
            plan.append((self.encode_special(f"<|{role}_end|>"), trained))
        return plan

    def visualize_tokenization(self, ids, mask):
        """One line for a terminal, `|` between tokens: green where the mask is 1 (trained on), red where it is 0."""
        return "|".join(f"\033[{32 if trained else 31}m{self.id_to_token(token_id)}\033[0m".replace("\n", "\\n")
                        for token_id, trained in zip(ids, mask, strict=True))


# -----------------------------------------------------------------------------
# Trained by rustbpe, used through tiktoken


class RustBPETokenizer(Tokenizer):
    kind = "rustbpe"

    def __init__(self, mergeable, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
        super().__init__(mergeable, pattern, special_tokens)
        ranks = [(token, rank) for rank, token in enumerate(self.mergeable)]
        self._rustbpe = rustbpe.Tokenizer.from_ranks(ranks, pattern)
        self._tiktoken = tiktoken.Encoding("nanochat", pat_str=pattern, mergeable_ranks=dict(ranks),
                                           special_tokens=self._special_ids)

    @staticmethod
    def _train_ranks(text_iterator, num_mergeable, buffer_size):
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(text_iterator, num_mergeable, buffer_size=buffer_size, pattern=SPLIT_PATTERN)
        return [token for token, _ in sorted(trainer.get_mergeable_ranks(), key=lambda pair: pair[1])]

    def _encode_one(self, text):
        if len(text) > TIKTOKEN_MAX_CHARS:  # our own splitter never steps back, and gives the same ids
            return self._rustbpe.encode(_replace_surrogates(text))
        return self._tiktoken.encode_ordinary(text)  # `ordinary`: special tokens in the text are plain text

    def _encode_batch(self, texts, num_threads):
        if any(len(text) > TIKTOKEN_MAX_CHARS for text in texts):
            return [self._encode_one(text) for text in texts]
        return self._tiktoken.encode_ordinary_batch(texts, num_threads=num_threads)

    def encode_to_numpy(self, texts, num_threads=None):
        """The loader's fast path: list of str -> (ids uint32 (N,), offsets int64 (len(texts) + 1,)); text i is
        ids[offsets[i]:offsets[i + 1]], without <|bos|>. No Python int is made on the way; the arrays are read-only."""
        try:
            ids, offsets = self._rustbpe.encode_to_buffer(texts, num_threads)
        except UnicodeEncodeError:  # a lone surrogate somewhere: rare, so the check costs nothing until then
            ids, offsets = self._rustbpe.encode_to_buffer([_replace_surrogates(text) for text in texts], num_threads)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<i8")


# -----------------------------------------------------------------------------
# Trained by and used through Hugging Face's tokenizers


def _byte_characters():
    """GPT-2's alphabet, in which `tokenizers` writes bytes, each as one visible character: b"A " is 'AĠ'."""
    # Bytes that print in Latin-1 stand for themselves, the others in order for U+0100, U+0101, ...
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    shifted = itertools.count(0x100)
    return [chr(byte) if byte in visible else chr(next(shifted)) for byte in range(256)]


class HuggingFaceTokenizer(Tokenizer):
    kind = "huggingface"

    def __init__(self, mergeable, pattern=SPLIT_PATTERN, special_tokens=SPECIAL_TOKENS):
        super().__init__(mergeable, pattern, special_tokens)
        characters = _byte_characters()
        vocab = {"".join(characters[byte] for byte in token): rank for rank, token in enumerate(self.mergeable)}
        # As tiktoken does: any two neighbours whose union is a token merge, so a token has a merge for each way to cut
        # it; and a whole piece that is a token is taken as it is (ignore_merges).
        merges = [(token[:cut], token[cut:]) for token in vocab for cut in range(1, len(token))
                  if token[:cut] in vocab and token[cut:] in vocab]
        # The special tokens stay unknown to the core, so no text reaches them.
        self._core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
        self._core.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])

    @classmethod
    def _train_ranks(cls, text_iterator, num_mergeable, buffer_size):
        characters, single_bytes = _byte_characters(), [bytes([byte]) for byte in range(256)]
        core = cls(single_bytes)._core  # splits as it should, knows no merge yet
        batches = iter(lambda: list(itertools.islice(text_iterator, buffer_size)), [])
        core.train_from_iterator(batches, tokenizers.trainers.BpeTrainer(
            vocab_size=num_mergeable, initial_alphabet=characters, show_progress=False))
        learned = sorted((rank, token) for token, rank in core.get_vocab().items() if len(token) > 1)
        to_byte = {character: byte for byte, character in enumerate(characters)}
        return single_bytes + [bytes(to_byte[character] for character in token) for _, token in learned]

    def _encode_one(self, text):
        return self._core.encode(_replace_surrogates(text), add_special_tokens=False).ids

    def _encode_batch(self, texts, num_threads):
        texts = [_replace_surrogates(text) for text in texts]
        return [row.ids for row in self._core.encode_batch_fast(texts, add_special_tokens=False)]  # its own threads

    def encode_to_numpy(self, texts, num_threads=None):
        """As RustBPETokenizer.encode_to_numpy, at this library's speed."""
        rows = self._encode_batch(texts, num_threads)
        ids = np.fromiter(itertools.chain.from_iterable(rows), dtype=np.uint32)
        return ids, np.cumsum([0, *map(len, rows)], dtype=np.int64)


# -----------------------------------------------------------------------------
# What the stages use

TOKENIZER_KINDS = {cls.kind: cls for cls in (RustBPETokenizer, HuggingFaceTokenizer)}


def get_tokenizer(directory=None):
    """The saved tokenizer of <base dir>/tokenizer, or of `directory`, in the class that saved it."""
    kind, parts = _read_files(get_base_dir() / "tokenizer" if directory is None else directory)
    return TOKENIZER_KINDS[kind](*parts)


def get_token_bytes(device, tokenizer=None):
    """(vocab_size,) int64: bytes of text that each token stands for, 0 for special tokens; bits per byte divides by it.
    Counted from raw bytes: a token that is half a character has no text whose length one could take."""
    tokenizer = get_tokenizer() if tokenizer is None else tokenizer
    lengths = [len(token) for token in tokenizer.mergeable] + [0] * len(tokenizer.get_special_tokens())
    return torch.tensor(lengths, dtype=torch.int64, device=device)
