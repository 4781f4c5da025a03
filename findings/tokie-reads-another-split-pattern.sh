#!/usr/bin/env bash
# tokie: a split pattern like GPT-4's, with other groups of digits, is read as GPT-4's without a word
#
# Expected: a tokenizer.json is read as it is, or refused. The package says "100% accurate".
# Happens:  groups of one to two digits, or of one to four, become groups of one to three, so every longer
#   number gets other ids, and another number of them, than the model was trained with. GPT-4's own {1,3}
#   and single digits are right.
#
# Versions: tokie 0.1.4, tokenizers 0.23.3, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   \p{N}{1,3}  tokenizers ['12', '3', '45', '6', '7']           tokie the same
#   \p{N}       tokenizers ['1', '2', '3', '4', '5', '6', '7']   tokie the same
#   \p{N}{1,2}  tokenizers ['12', '34', '56', '7']               tokie ['12', '3', '45', '6', '7']
#   \p{N}{1,4}  tokenizers ['12', '34', '56', '7']               tokie ['12', '3', '45', '6', '7']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python tokie==0.1.4 tokenizers==0.23.3
cat > try.py <<'PYTHON'
import sys

import tokie
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

# A split like GPT-4's, with the digits left open
WORDS = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"

# A byte-level BPE that knows all pairs of digits
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
pairs = [(a, b) for a in "0123456789" for b in "0123456789"]
vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}

seen = {}
for digits in (r"\p{N}{1,3}", r"\p{N}", r"\p{N}{1,2}", r"\p{N}{1,4}"):
    tokenizer = Tokenizer(models.BPE(vocab, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(f"{WORDS}|{digits}|{REST}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save("tokenizer.json")
    expected = tokenizer.encode("1234567").tokens
    encoding = tokie.Tokenizer.from_json("tokenizer.json").encode("1234567", add_special_tokens=False)
    found = [tokenizer.id_to_token(i) for i in encoding.ids]
    seen[digits] = found == expected
    print(f"{digits:<11} tokenizers {str(expected):<37} tokie {'the same' if seen[digits] else found}")

sys.exit(list(seen.values()) != [True, True, False, False])
PYTHON
venv/bin/python try.py
