"""
How well does the tokenizer compress? Bytes of text per token, beside the tokenizers of GPT-2 and
GPT-4.

    python -m scripts.tok_eval                          after tok_train
    python -m scripts.tok_eval --data=my_texts/ --max_chars=100000

More bytes per token means that more text fits into a context and into a training step of the same
cost. The price is a larger vocabulary, so compare with the sizes in the table's head. The texts are
small samples of four kinds, written for this file, and documents of the corpus itself, seen (train)
and not seen (val) by the tokenizer.

GPT-2's and GPT-4's files are read from tiktoken's cache and never downloaded here. To fill the
cache once, online:
    python -c "import tiktoken; [tiktoken.get_encoding(name) for name in ('gpt2', 'cl100k_base')]"
"""

import hashlib
import os
import tempfile
from pathlib import Path

import tiktoken

from nanochat.common import get_data_dir, print0, run_script
from nanochat.configurator import get_settings, override_from_cli
from nanochat.dataset import iter_texts
from nanochat.download import base_data_dir
from nanochat.progress import show_progress
from nanochat.report import get_report
from nanochat.tokenizer import get_tokenizer

data: str | None = None          # file, folder or glob of .parquet, .jsonl, .txt; None = the default corpus
text_field: str = "text"         # column or field of the text, in .parquet and .jsonl
max_chars: int = 1_000_000       # characters of each split of the corpus; 0 = only the samples in this file

# name in the table -> tiktoken's name, and its files: address -> sha256
# (from tiktoken_ext/openai_public.py)
REFERENCES = {
    "GPT-2": ("gpt2", {
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe":
            "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
        "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/encoder.json":
            "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}),
    "GPT-4": ("cl100k_base", {
        "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken":
            "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"}),
}

# -----------------------------------------------------------------------------
# The samples

ENGLISH = """\
The town council met on Tuesday evening to decide what should become of the old railway bridge. Built in 1887, it has
carried no train for forty years, and most of its timbers are rotten. "We can't keep paying for a bridge that nobody's
allowed to cross," said the treasurer, who would rather see it sold for scrap. Others spoke of the swallows that nest
beneath the arches every spring, of the view across the estuary, and of their grandparents, who had met there after
the harvest fair. In the end the vote was put off until an engineer has measured how much weight the piers would still
bear. Her report is expected before the first frost; until then the gate stays locked, although everyone in the town
knows, of course, where the fence has a gap.
"""

CODE = '''\
class RingBuffer:
    """Keeps the last `capacity` items; appending to a full buffer drops the oldest one."""

    def __init__(self, capacity):
        if capacity < 1:
            raise ValueError(f"capacity must be positive, got {capacity}")
        self._items = [None] * capacity
        self._start, self._length = 0, 0

    def append(self, item):
        end = (self._start + self._length) % len(self._items)
        self._items[end] = item
        if self._length < len(self._items):
            self._length += 1
        else:
            self._start = (self._start + 1) % len(self._items)

    def __iter__(self):
        for offset in range(self._length):
            yield self._items[(self._start + offset) % len(self._items)]


if __name__ == "__main__":
    buffer = RingBuffer(3)
    for number in (2, 3, 5, 7, 11):
        buffer.append(number)
    print(list(buffer))  # [5, 7, 11]
'''

MATHS = r"""
\begin{lemma}
Let $a_1, \dots, a_n > 0$ with $\sum_{i=1}^{n} a_i = 1$. Then $\sum_{i=1}^{n} a_i^2 \geq \frac{1}{n}$.
\end{lemma}
\begin{proof}
By the Cauchy--Schwarz inequality, $1 = \left( \sum_{i=1}^{n} 1 \cdot a_i \right)^2 \leq n \sum_{i=1}^{n} a_i^2$, and
dividing by $n$ gives the claim. Equality holds if and only if $a_1 = \dots = a_n = 1/n$. \qedhere
\end{proof}

Exercise 14. A cistern holds 1250 litres. One pipe fills 36.5 litres a minute, a second 13.5 litres a minute, and a leak
loses 0.8% of the capacity a minute. How long does the empty cistern take to fill?
Solution. In: 36.5 + 13.5 = 50 litres a minute. Out: 0.008 * 1250 = 10. Net: 40. Hence 1250 / 40 = 31.25 minutes.
"""

KOREAN = """\
할머니는 해마다 가을이 되면 마당에 있는 감나무에서 감을 따셨다. 높은 가지에 달린 감은 까치를 위해 남겨 두어야 한다고
말씀하셨고, 나는 그 말이 참 좋았다. 우리는 감을 깎아 실에 꿰어 처마 밑에 걸어 두었다. 바람이 차가워질수록 감은 조금씩
달아졌고, 첫눈이 올 무렵이면 하얀 가루가 앉았다. 지금은 그 집에 다른 사람이 살지만, 감나무는 아직 그 자리에 서 있다.
지난 주말에 골목을 지나다가 맨 꼭대기에 남아 있는 감 세 개를 보았다. 까치 한 마리가 나를 내려다보고 있었다.
"""

SAMPLES = {"English": [ENGLISH], "code": [CODE], "maths": [MATHS], "Korean": [KOREAN]}

# -----------------------------------------------------------------------------
# The tokenizers


def get_tiktoken_cache_dir():
    """
    Where tiktoken keeps downloaded files, by its own rules; None where its cache is switched off.
    """
    # an empty variable switches the cache off
    default = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    cache_dir = os.environ.get("DATA_GYM_CACHE_DIR", default)
    cache_dir = os.environ.get("TIKTOKEN_CACHE_DIR", cache_dir)
    return Path(cache_dir) if cache_dir else None


def find_reference(name, files, get_encoding=tiktoken.get_encoding):
    """
    (encoding, None), or (None, "absent" or "damaged"). tiktoken would fetch a file that is missing
    or wrong, so it is only asked when each file is whole in its cache, where its name is the sha1
    of its address.
    """
    cache_dir = get_tiktoken_cache_dir()
    if cache_dir is None:
        return None, "absent"
    for address, sha256 in files.items():
        # tiktoken names a file by the sha1 of its address
        path = cache_dir / hashlib.sha1(address.encode("utf-8")).hexdigest()
        if not path.is_file():
            return None, "absent"
        digest = hashlib.sha256(path.read_bytes())
        if digest.hexdigest() != sha256:
            return None, "damaged"
    return get_encoding(name), None


def get_encoders(tokenizer, skipped):
    """
    {title with vocabulary size: function from texts to ids}, our tokenizer first.
    Tokenizers that are missing are added to `skipped`.
    """
    encoders = {f"nanochat ({tokenizer.get_vocab_size():,})": tokenizer.encode}
    # the references whose files are at hand
    for title, (name, files) in REFERENCES.items():
        encoding, reason = find_reference(name, files)
        if encoding is None:
            skipped[title] = reason
        else:
            encoders[f"{title} ({encoding.n_vocab:,})"] = encoding.encode_ordinary_batch
    return encoders


# -----------------------------------------------------------------------------
# The texts


def get_corpus_texts(split):
    """
    Documents of a split, `max_chars` in all; none where the default corpus was not downloaded.
    """
    # no corpus is fine, unless one was asked for by --data
    texts = []
    if data is None and get_data_dir() is None and not base_data_dir().exists():
        return texts
    # the last document may be cut
    num_left = max_chars  # characters
    for text in iter_texts(data, split, text_field):
        texts.append(text[:num_left])
        num_left -= len(texts[-1])
        if num_left <= 0:
            break
    return texts


def get_texts(skipped):
    """{name: documents}: the samples, then the corpus. Adds what is missing to `skipped`."""
    texts = dict(SAMPLES)
    if max_chars <= 0:
        return texts
    # seen and not seen by the tokenizer
    for split in ("train", "val"):
        name = f"corpus, {split}"
        documents = get_corpus_texts(split)
        if documents:
            texts[name] = documents
        else:
            skipped[name] = "absent"
    return texts


# -----------------------------------------------------------------------------
# The comparison


def compare(texts, encoders):
    """
    Rows of the table. `texts` is {name: list of str}; `encoders` is {name: function from a list of
    str to a list of lists of ids}, our tokenizer first. A cell is bytes per token; "vs" is how many
    fewer tokens ours needs, in percent of the other's.
    """
    rows = []
    for name, documents in show_progress(texts.items(), "encoding", "texts"):
        # bytes, not characters: they do not depend on the language
        num_bytes = 0
        for document in documents:
            num_bytes += len(document.encode("utf-8", errors="replace"))
        row = {"text": name, "bytes": num_bytes}
        # ours comes first, so the others can be compared with it
        num_ours = None
        for title, encode in encoders.items():
            num_tokens = sum(map(len, encode(documents)))
            row[title] = num_bytes / num_tokens
            if num_ours is None:
                num_ours = num_tokens
            else:
                fewer = 100 * (1 - num_ours / num_tokens)
                row[f"vs {title}"] = f"{fewer:+.1f}%"
        rows.append(row)
    return rows


def format_cell(value):
    if isinstance(value, float):
        return f"{value:.2f}"
    if isinstance(value, int):
        return f"{value:,}"
    return value


def format_table(rows):
    """Lines of text, columns aligned: names to the left, figures to the right."""
    # column by column, since a column's width depends on all of its cells
    columns = []
    for i, title in enumerate(rows[0]):
        cells = [title] + [format_cell(row[title]) for row in rows]
        width = max(map(len, cells))
        if i == 0:
            columns.append([cell.ljust(width) for cell in cells])
        else:
            columns.append([cell.rjust(width) for cell in cells])
    return ["  ".join(cells) for cells in zip(*columns, strict=True)]


def main():
    # tokenizers and texts
    settings = get_settings(globals())
    tokenizer = get_tokenizer()
    skipped = {}  # name of a tokenizer or text -> why it is missing
    encoders = get_encoders(tokenizer, skipped)
    texts = get_texts(skipped)

    # nothing may be lost
    for name, documents in texts.items():
        decoded = [tokenizer.decode(ids) for ids in tokenizer.encode(documents)]
        if decoded != documents:
            raise RuntimeError(f"the tokenizer does not give back the text {name!r}")

    # compression
    rows = compare(texts, encoders)
    print0("bytes per token")
    print0("\n".join(format_table(rows)))
    # said, so that a missing line does not look like an oversight
    for title, reason in skipped.items():
        print0(f"skipped {title}: {reason}")

    get_report().log("Tokenizer evaluation", {
        "config": settings,
        "tokenizer": tokenizer.hash(),
        "skipped": skipped,
        "tables": {"Bytes per token": rows},
    })


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
