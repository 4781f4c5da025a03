#!/usr/bin/env bash
# onnxruntime-extensions: GPT-4's split pattern cuts white space elsewhere
#
# Expected: a tokenizer.json with GPT-4's or Llama 3's split pattern gives the ids that the library
#   tokenizers gives. The pattern takes white space up to its last line end as one piece: `\s*[\r\n]+`.
# Happens:  a run of white space that starts with a blank is taken whole except for its last character,
#   one that starts with a line end is cut after its first line ends. So a line with a blank at its end
#   before an indented one, and a blank line with indentation, become other pieces, without a word.
#   onnxruntime-genai 0.18.0 gives the same ids. A trained model has seen the other pieces.
#
# Versions: onnxruntime-extensions 0.15.2, tokenizers 0.23.3, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen (a blank is _, a line end N): as in as_seen.txt below
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python onnxruntime-extensions==0.15.2 tokenizers==0.23.3 numpy
cat > try.py <<'PYTHON'
import itertools
import json
import os

from onnxruntime_extensions.pp_api import Tokenizer as OrtTokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# A byte-level BPE that knows all white space of up to six characters: a piece is always one token
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
blanks = ["\u0120", "\u010a", "\u0109"]  # space, line feed and tab in that alphabet
runs = ["".join(run) for length in range(2, 7) for run in itertools.product(blanks, repeat=length)]
merges = [(run[:cut], run[cut:]) for run in runs for cut in range(1, len(run))]
vocab = {token: i for i, token in enumerate([*alphabet, *runs])}
library = Tokenizer(models.BPE(vocab, merges))
library.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(GPT4), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])
library.decoder = decoders.ByteLevel()
os.mkdir("model")
library.save("model/tokenizer.json")
with open("model/tokenizer_config.json", "w") as f:
    json.dump({"tokenizer_class": "PreTrainedTokenizerFast"}, f)

names = {i: token for token, i in vocab.items()}
ort = OrtTokenizer("model")
for text in ("a\n\n  b", "a \n", "a \nb", "a \n b", "a \n  b", "a\n \n b", "a\n  ", " \n "):
    expected = library.encode(text).tokens
    seen = [names[int(i)] for i in ort.tokenize(text)]
    readable = str.maketrans({"\u0120": "_", "\u010a": "N", "\u0109": "T"})
    rows = [" ".join(tokens).translate(readable) for tokens in (expected, seen)]
    print(f"{json.dumps(text)}: tokenizers {rows[0]} | onnxruntime {rows[1]}")
PYTHON
venv/bin/python try.py | tee seen.txt
cat > as_seen.txt <<'TEXT'
"a\n\n  b": tokenizers a NN _ _ b | onnxruntime a NN _ _ b
"a \n": tokenizers a _N | onnxruntime a _N
"a \nb": tokenizers a _N b | onnxruntime a _N b
"a \n b": tokenizers a _N _ b | onnxruntime a _N _ b
"a \n  b": tokenizers a _N _ _ b | onnxruntime a _N_ _ b
"a\n \n b": tokenizers a N_N _ b | onnxruntime a N _N _ b
"a\n  ": tokenizers a N __ | onnxruntime a N __
" \n ": tokenizers _N _ | onnxruntime _N_
TEXT
cmp seen.txt as_seen.txt
