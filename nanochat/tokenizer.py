"""
Text to token ids and back: byte-level BPE, special tokens, and the rendering of conversations.

A tokenizer is three things. The split pattern cuts text into pieces that no token crosses. The
ranks are the mergeable tokens in the order in which they were learned (rank = id). The special
tokens mark documents, turns and tool calls, and have the last ids. Two classes share these three,
and each reads the files of the other:

    RustBPETokenizer       trains with `rustbpe`, encodes with `tiktoken`: the default
    HuggingFaceTokenizer   trains and encodes with `tokenizers`: the way to that ecosystem

Text never becomes a special token, even if a user or a data set writes its name: only code adds
them, by name or id. Nothing here adds spaces, normalises or strips: decode(encode(text)) == text.
"""

import itertools

import numpy as np
import tiktoken
import tokenizers
import torch
from tokenizers import pre_tokenizers

import rustbpe
from nanochat.common import UserError, get_base_dir
from nanochat.conversation import PART_FENCES, normalize_messages
from nanochat.split_patterns import NANOCHAT_PATTERN
from nanochat.tokenizer_files import hash_tokenizer, read_tokenizer, write_tokenizer

# Every special token. The first starts each document and conversation; python marks a call of the
# calculator, which the assistant writes, and output its result, which the engine writes.
SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>",
    "<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>",
)

# tiktoken's regex engine panics when a match backtracks a million times, for example over spaces
TIKTOKEN_MAX_CHARS = 500_000

# -----------------------------------------------------------------------------
# The interface of both tokenizers


def _replace_surrogates(text):
    """
    Replace lone surrogates, which JSON can hold and UTF-8 cannot, by U+FFFD, as tiktoken does.
    """
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_turns(conversation):
    messages = conversation.get("messages") if isinstance(conversation, dict) else conversation
    return normalize_messages(messages)


class Tokenizer:
    """
    Everything except training and encoding, which the two subclasses add: _train_ranks,
    _encode_one, _encode_batch and encode_to_numpy.
    """

    def __init__(self, mergeable, pattern=NANOCHAT_PATTERN, special_tokens=SPECIAL_TOKENS):
        """
        mergeable: the bytes of each ordinary token, in rank order. special_tokens: names, after
        them.
        """
        # The three things that a tokenizer is
        self.mergeable = list(mergeable)
        self.pattern = pattern
        first = len(self.mergeable)
        self._special_ids = {name: first + i for i, name in enumerate(special_tokens)}

        # For decoding: the bytes of every id. A special token decodes to its name
        all_bytes = self.mergeable + [name.encode() for name in special_tokens]
        self._id_to_bytes = dict(enumerate(all_bytes))

    @classmethod
    def train_from_iterator(
        cls, text_iterator, vocab_size, buffer_size=8192, pattern=NANOCHAT_PATTERN
    ):
        """
        Train on an iterator of strings, read once, `buffer_size` texts at a time. `vocab_size`
        counts the special tokens. A text with too few different pairs gives a smaller vocabulary.
        """
        # Every byte is a token, so that any text can be encoded
        num_special = len(SPECIAL_TOKENS)
        num_mergeable = vocab_size - num_special
        if num_mergeable < 256:
            raise UserError(
                f"vocab_size {vocab_size} is less than {256 + num_special}: 256 bytes and "
                f"{num_special} special tokens",
                "for example --vocab_size=4096",
            )
        texts = map(_replace_surrogates, text_iterator)
        return cls(cls._train_ranks(texts, num_mergeable, buffer_size, pattern), pattern)

    @classmethod
    def from_directory(cls, directory):
        """Load what `save` of either class wrote. UserError if it is missing or damaged."""
        _, *parts = read_tokenizer(directory)
        return cls(*parts)

    def save(self, directory):
        """Write the tokenizer's files to a folder, which is made if necessary."""
        write_tokenizer(
            directory,
            self.kind,
            self.mergeable,
            self.pattern,
            self.get_special_tokens(),
        )

    def hash(self):
        """
        sha256 (hex) of pattern, ranks and special tokens. Equal hashes encode every text alike.
        """
        return hash_tokenizer(self.mergeable, self.pattern, self.get_special_tokens())

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
        str -> list of ids; list of str -> list of lists, on `num_threads` threads. `prepend` and
        `append` are names of special tokens or ids, to go around each text: encode("hi",
        prepend="<|bos|>") == [bos, *encode("hi")].
        """
        # One text
        head = self._as_ids(prepend)
        tail = self._as_ids(append)
        if isinstance(text, str):
            ids = self._encode_one(text)
            return head + ids + tail

        # Many at once
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
        The exact bytes of `ids`. They may end inside a character, so a stream of text needs them.
        """
        try:
            return b"".join([self._id_to_bytes[token_id] for token_id in ids])
        except KeyError as error:
            size = self.get_vocab_size()
            raise ValueError(f"token id {error} is not in the vocabulary of {size}") from None

    def decode(self, ids):
        """ids -> text; bytes that are not UTF-8 become U+FFFD, special tokens their names."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def render_conversation(self, conversation, max_tokens=2048):
        """
        (ids, mask) of {"messages": [...]}, see conversation.py; both cut to `max_tokens` (None:
        whole). The mask is 1 for tokens that the assistant must write: its text, its python calls
        with their fences, its end token. It is 0 for the outputs of tools, which the engine writes,
        and in a turn of weight 0.
        """
        turns = _read_turns(conversation)
        ids, mask = self._encode_plan(self._plan(turns))
        return ids[:max_tokens], mask[:max_tokens]

    def render_for_completion(self, conversation, continue_final_message=False):
        """
        The ids after which the assistant speaks. If its message is the last one already, that is
        left out, and the model will write it again; with `continue_final_message` it stays, without
        its end token, and the model goes on from it.
        """
        turns = _read_turns(conversation)
        if turns[-1]["role"] == "assistant" and continue_final_message:
            ids, _ = self._encode_plan(self._plan(turns))
            return ids[:-1]
        if turns[-1]["role"] == "assistant":
            turns.pop()
        ids, _ = self._encode_plan(self._plan(turns))
        return ids + [self.encode_special("<|assistant_start|>")]

    def render_batch(self, conversations):
        """
        The ids of each conversation as an int32 array: the fast path of packing, for training on
        all that is said. Tokens of an assistant's turn of weight 0 are no targets, and stand as
        ~id.
        """
        plans = [self._plan(_read_turns(conversation)) for conversation in conversations]

        # Encode all texts at once
        texts = []
        for plan in plans:
            texts += [item for item, _, _ in plan if isinstance(item, str)]
        ids, offsets = self.encode_to_numpy(texts)
        encoded = iter(np.split(ids, offsets[1:]))

        # Put the special tokens between them
        rows = []
        for plan in plans:
            pieces = []
            for item, _, is_excluded in plan:
                tokens = next(encoded) if isinstance(item, str) else [item]
                if is_excluded:
                    tokens = ~np.asarray(tokens, dtype=np.int32)
                pieces.append(tokens)
            rows.append(np.concatenate(pieces).astype(np.int32))
        return rows

    def _encode_plan(self, plan):
        # Each text is encoded alone, so no token crosses a special token
        ids = []
        mask = []
        for item, trained, _ in plan:
            tokens = self._encode_one(item) if isinstance(item, str) else [item]
            ids += tokens
            mask += [trained] * len(tokens)
        return ids, mask

    def _plan(self, turns):
        """
        A conversation before encoding: [(text or id of a special token, 1 if it is in the mask,
        whether it is excluded from all training)].
        """
        plan = [(self.get_bos_token_id(), 0, False)]
        for turn in turns:
            role = turn["role"]
            # The start of the assistant's turn is given to it; the end it must write itself
            trained = turn["weight"]
            is_excluded = role == "assistant" and not trained
            plan.append((self.encode_special(f"<|{role}_start|>"), 0, is_excluded))
            for part in turn["content"]:
                # A start and an end, or none
                fences = [self.encode_special(name) for name in PART_FENCES[part["type"]]]
                items = fences[:1] + [part["text"]] + fences[1:]
                mask = 0 if part["type"] == "python_output" else trained
                plan += [(item, mask, is_excluded) for item in items]
            plan.append((self.encode_special(f"<|{role}_end|>"), trained, is_excluded))
        return plan

    def visualize_tokenization(self, ids, mask):
        """
        One line for a terminal, `|` between tokens: green where the mask is 1 (trained on), else
        red.
        """
        # 31 and 32 are a terminal's numbers of red and green
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

    def __init__(self, mergeable, pattern=NANOCHAT_PATTERN, special_tokens=SPECIAL_TOKENS):
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
    def _train_ranks(texts, num_mergeable, buffer_size, pattern):
        trainer = rustbpe.Tokenizer()
        trainer.train_from_iterator(
            texts,
            num_mergeable,
            buffer_size=buffer_size,
            pattern=pattern,
        )
        # The tokens in the order in which they were learned
        ranks = dict(trainer.get_mergeable_ranks())
        return sorted(ranks, key=ranks.get)

    def _encode_one(self, text):
        # Our own splitter never backtracks, and gives the same ids
        if len(text) > TIKTOKEN_MAX_CHARS:
            return self._rustbpe.encode(_replace_surrogates(text))
        # `ordinary`: special tokens in the text are plain text
        return self._tiktoken.encode_ordinary(text)

    def _encode_batch(self, texts, num_threads):
        if any(len(text) > TIKTOKEN_MAX_CHARS for text in texts):
            return [self._encode_one(text) for text in texts]
        return self._tiktoken.encode_ordinary_batch(texts, num_threads=num_threads)

    def encode_to_numpy(self, texts, num_threads=None):
        """
        The fast path of the loader: list of str -> (ids uint32 (N,), offsets int64 (len(texts) +
        1,)). Text i is ids[offsets[i]:offsets[i + 1]], without <|bos|>. Both arrays are read-only;
        no Python int is made on the way.
        """
        try:
            ids, offsets = self._rustbpe.encode_to_buffer(texts, num_threads)
        except UnicodeEncodeError:
            # A lone surrogate: too rare to look for in every text
            texts = [_replace_surrogates(text) for text in texts]
            ids, offsets = self._rustbpe.encode_to_buffer(texts, num_threads)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(offsets, dtype="<i8")


# -----------------------------------------------------------------------------
# Trained by and used through Hugging Face's tokenizers


def byte_characters():
    """
    {byte: character} of GPT-2's alphabet, in which `tokenizers` writes bytes as visible characters:
    b"A " is 'AĠ'. Bytes that print in Latin-1 stand for themselves, the others are U+0100, U+0101,
    ... in order.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # the 256 characters, in no order
    visible_first = sorted(range(256), key=lambda byte: chr(byte) not in alphabet)
    return dict(zip(visible_first, sorted(alphabet), strict=True))


class HuggingFaceTokenizer(Tokenizer):
    kind = "huggingface"

    def __init__(self, mergeable, pattern=NANOCHAT_PATTERN, special_tokens=SPECIAL_TOKENS):
        super().__init__(mergeable, pattern, special_tokens)
        # The vocabulary in the library's alphabet
        characters = byte_characters()
        names = ["".join(map(characters.get, token)) for token in self.mergeable]
        vocab = {name: rank for rank, name in enumerate(names)}

        # tiktoken merges any two neighbours whose union is a token, so a token has a merge for each
        # way to cut it
        merges = []
        for name in names:
            cuts = [(name[:i], name[i:]) for i in range(1, len(name))]
            merges += [(left, right) for left, right in cuts if left in vocab and right in vocab]

        # ignore_merges: a piece that is a token as a whole is not merged, as in tiktoken
        model = tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=True)
        # The library's own tokenizer; it does not know the special tokens, so no text reaches them
        self.core = tokenizers.Tokenizer(model)
        self.core.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ])

    @classmethod
    def _train_ranks(cls, texts, num_mergeable, buffer_size, pattern):
        characters = byte_characters()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=num_mergeable,
            initial_alphabet=list(characters.values()),
            show_progress=False,
        )

        # An untrained tokenizer: it splits as it should and knows no merge yet
        single_bytes = [bytes([byte]) for byte in range(256)]
        core = cls(single_bytes, pattern).core
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
    kind, *parts = read_tokenizer(directory or get_base_dir() / "tokenizer")
    return TOKENIZER_KINDS[kind](*parts)


def get_token_bytes(device, tokenizer=None):
    """
    (vocab_size,) int64: the bytes of text of each token, 0 for special tokens. Bits per byte
    divides by them. They are counted from raw bytes, since a token may be half a character.
    """
    tokenizer = tokenizer or get_tokenizer()
    lengths = [len(token) for token in tokenizer.mergeable]
    lengths += [0] * len(tokenizer.get_special_tokens())
    return torch.tensor(lengths, dtype=torch.int64, device=device)
