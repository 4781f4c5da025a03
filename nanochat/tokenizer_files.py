"""
The files of a tokenizer:

    <folder>/tokenizer.tiktoken      the ranks, in tiktoken's own format
    <folder>/tokenizer_meta.json     the rest, and a hash of all

Both are text; nothing is pickled.
"""

import base64
import hashlib
import json
from pathlib import Path

from nanochat.common import UserError, write_text

KINDS = ("rustbpe", "huggingface")  # of class, see tokenizer.TOKENIZER_KINDS
FORMAT_VERSION = 1                  # of the two files
META_NAME = "tokenizer_meta.json"
RANKS_NAME = "tokenizer.tiktoken"
TRAIN_HINT = "train one: python -m scripts.tok_train (--data=PATH for your own text)"


def write_tokenizer(directory, kind, mergeable, pattern, special_tokens):
    """
    Write the two files. mergeable: the bytes of each ordinary token, in rank order; special_tokens:
    names.
    """
    meta = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "vocab_size": len(mergeable) + len(special_tokens),
        "pattern": pattern,
        "special_tokens": special_tokens,
        "hash": hash_tokenizer(mergeable, pattern, special_tokens),
    }
    # The meta data go last: after a crash in between, the hash does not match
    directory = Path(directory)
    write_text(directory / RANKS_NAME, _ranks_to_text(mergeable))
    write_text(directory / META_NAME, json.dumps(meta, indent=2) + "\n")


def read_tokenizer(directory):
    """(kind, mergeable, pattern, special_tokens) of a saved tokenizer, checked against its hash."""
    directory = Path(directory)
    # Written last, so without it there is no tokenizer here
    if not (directory / META_NAME).exists():
        raise UserError(f"no tokenizer in {directory}: {META_NAME} is missing", TRAIN_HINT)

    # any fault in the files becomes one error line
    try:
        meta = json.loads((directory / META_NAME).read_text(encoding="utf-8"))
        version = meta["format_version"]
        if version > FORMAT_VERSION:
            raise ValueError(f"its format {version} is newer than this code's {FORMAT_VERSION}")

        # The number of a line is the rank of its token
        ranks_text = (directory / RANKS_NAME).read_text(encoding="utf-8")
        kind = meta["kind"]
        pattern = meta["pattern"]
        special_tokens = meta["special_tokens"]
        found_hash = _hash(ranks_text, pattern, special_tokens)
        if kind not in KINDS or meta["hash"] != found_hash:
            raise ValueError("its contents do not match its hash")
        mergeable = [base64.b64decode(line.split()[0]) for line in ranks_text.splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        message = f"the tokenizer in {directory} cannot be used: {error}"
        raise UserError(message, TRAIN_HINT) from error
    return kind, mergeable, pattern, special_tokens


def hash_tokenizer(mergeable, pattern, special_tokens):
    """sha256 (hex) of all that decides which ids a text becomes."""
    return _hash(_ranks_to_text(mergeable), pattern, special_tokens)


def _hash(ranks_text, pattern, special_tokens):
    # JSON keeps the borders between the strings
    settings = json.dumps([pattern, special_tokens])
    return hashlib.sha256(f"{settings}\n{ranks_text}".encode()).hexdigest()


def _ranks_to_text(mergeable):
    """tiktoken's own format, one line per token: base64 of its bytes, a space, its rank."""
    # base64, since a token may be any bytes
    lines = []
    for rank, token in enumerate(mergeable):
        encoded = base64.b64encode(token).decode()
        lines.append(f"{encoded} {rank}\n")
    return "".join(lines)
