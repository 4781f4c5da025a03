"""
Train the tokenizer and save it under <base dir>/tokenizer, where every later stage finds it.

    # as speedrun.sh does: about a minute
    python -m scripts.tok_train --max_chars=2000000000 --vocab_size=65536
    # on files of your own: seconds on a laptop
    python -m scripts.tok_train --data=my_texts/ --vocab_size=4096
    # one that more tools of others read
    python -m scripts.tok_train --data=my_texts/ --vocab_size=4096 --split=gpt4

It runs in one process, without torchrun, and streams the text: memory holds the distinct words,
not the corpus.
"""

import time
from typing import Annotated, Literal

from nanochat.common import UserError, get_base_dir, print0, run_script
from nanochat.configurator import CountOrOff, Positive, Range, get_settings, override_from_cli
from nanochat.dataset import describe_skipped, get_spans, read_texts
from nanochat.progress import show_progress
from nanochat.report import get_report
from nanochat.split_patterns import SPLIT_PATTERNS
from nanochat.tokenizer import TOKENIZER_KINDS, get_token_bytes, get_tokenizer

data: str | None = None           # file, folder or glob of .parquet, .jsonl, .txt; None = the default corpus
text_field: str = "text"          # column or field of the text, in .parquet and .jsonl
strict: bool = False              # refuse rows without text before training starts; False = skip and count them
max_chars: Positive = 2_000_000_000  # stop after this many characters
doc_cap: CountOrOff = 10_000      # characters taken of one document, so that a few long ones do not decide; -1 = all
vocab_size: Annotated[int, Range(265, 2**31)] = 65_536  # tokens; 265 = the bytes and the special ones
split: Literal["nanochat", "gpt4", "qwen"] = "nanochat"  # digits a token: at most 2, 3, 1; decides which tools read it
buffer_size: Annotated[int, Range(1, 2**31)] = 8192  # documents handed to the trainer at a time: memory against waiting
trainer: str = "rustbpe"          # rustbpe, or huggingface (the `tokenizers` library, slower)

# Decoding must give this back unchanged: contractions, digits, scripts, emoji, control characters,
# names of special tokens
ROUND_TRIP = (
    "It's 12345 o'clock:\tnaïve 東京 Ελλάδα नमस्ते 👩\u200d🚀\r\n\n  def f(x):\n    return x**2 <|bos|> "
    "\x00 \u200b end "
)


def cap_texts(texts, max_chars, doc_cap, counts):
    """
    Yield the documents, cut to `doc_cap` characters, until there are `max_chars`. Adds documents,
    characters and bytes up in `counts`. Says when all are read: what the trainer does then is one
    call, which tells nothing.
    """
    for text in texts:
        if doc_cap > 0:
            text = text[:doc_cap]
        text = text[:max_chars - counts["characters"]]  # the last document may be cut
        counts["documents"] += 1
        counts["characters"] += len(text)
        counts["bytes"] += len(text.encode("utf-8", errors="replace"))
        yield text
        if counts["characters"] >= max_chars:
            break
    print0(f"words counted in {counts['documents']:,} documents; the merges are learned next")


def train_tokenizer():
    """-> (tokenizer, facts for the report)"""
    facts = {"documents": 0, "characters": 0, "bytes": 0}
    spans = get_spans(data, "train", text_field, strict)
    texts = show_progress(read_texts(spans), "counting words", "documents")
    texts = cap_texts(texts, max_chars, doc_cap, facts)
    # reading the text is part of the time: it is decoded while the trainer counts
    start = time.perf_counter()
    kind = TOKENIZER_KINDS[trainer]
    pattern = SPLIT_PATTERNS[split]
    tokenizer = kind.train_from_iterator(texts, vocab_size, buffer_size, pattern)
    seconds = time.perf_counter() - start
    facts["seconds"] = seconds

    print0(" | ".join([
        f"documents: {facts['documents']:,}",
        f"characters: {facts['characters']:,}",
        f"time: {seconds:.2f}s",
        f"speed: {facts['bytes'] / 1e6 / seconds:.1f} MB/s",
    ]))
    facts["rows without text"] = describe_skipped(spans)
    print0(f"rows without text: {facts['rows without text']}")
    if tokenizer.get_vocab_size() < vocab_size:
        print0(
            f"vocab_size: {tokenizer.get_vocab_size():,}, less than the {vocab_size:,} asked for: "
            "the text has no more pairs to merge"
        )
    return tokenizer, facts


def main():
    settings = get_settings(globals())
    if trainer not in TOKENIZER_KINDS:
        kinds = " or ".join(TOKENIZER_KINDS)
        raise UserError(f"--trainer={trainer} is unknown, needed: {kinds}")

    # train
    tokenizer, facts = train_tokenizer()

    # save, and read it back as every later stage will
    tokenizer_dir = get_base_dir() / "tokenizer"
    tokenizer.save(tokenizer_dir)
    tokenizer = get_tokenizer(tokenizer_dir)
    # a tokenizer that loses text would spoil everything after it
    ids = tokenizer.encode(ROUND_TRIP)
    if tokenizer.decode(ids) != ROUND_TRIP:
        raise RuntimeError(
            f"the tokenizer in {tokenizer_dir} does not give back the text that it encodes"
        )
    print0(f"saved: {tokenizer_dir} | hash: {tokenizer.hash()[:16]}")

    # facts for the report: what was read, how long it took, how long the tokens are
    token_bytes = get_token_bytes("cpu", tokenizer)
    lengths = token_bytes[token_bytes > 0].double()  # ordinary tokens only
    get_report().log("Tokenizer training", {
        "config": settings,
        **facts,
        "vocab size": tokenizer.get_vocab_size(),
        "special tokens": len(tokenizer.get_special_tokens()),
        "mean token length (bytes)": lengths.mean().item(),
        "longest token (bytes)": int(lengths.max()),
        "hash": tokenizer.hash(),
    })


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
