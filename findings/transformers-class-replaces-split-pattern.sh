#!/usr/bin/env bash
# transformers: the name of a class replaces the split pattern of tokenizer.json
#
# Expected: a tokenizer.json is the whole tokenizer. AutoTokenizer gives the ids that the library
#   tokenizers gives for the same file, whatever `tokenizer_class` in tokenizer_config.json says.
# Happens:  with `tokenizer_class` Qwen2Tokenizer (a name that many derived models keep) the pattern
#   of that class is used instead of the file's own, without a warning. Here the file splits digits in
#   groups of at most two; the class splits them one by one, so a trained model meets other tokens for
#   every number. GPT2Tokenizer and PreTrainedTokenizerFast follow the file. CohereTokenizer does not.
#
# Versions: transformers 5.24.0, tokenizers 0.23.3, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   the file, by tokenizers   ['12', '34', '5']
#   PreTrainedTokenizerFast   ['12', '34', '5']
#   GPT2Tokenizer             ['12', '34', '5']
#   Qwen2Tokenizer            ['1', '2', '3', '4', '5']
#   CohereTokenizer           ['1', '2', '3', '4', '5']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cat > try.py <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

# A byte-level BPE that knows all pairs of digits, and meets them in groups of at most two
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
pairs = [(a, b) for a in "0123456789" for b in "0123456789"]
vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in pairs)])}
tokenizer = Tokenizer(models.BPE(vocab, pairs))
tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(r"\p{N}{1,2}|\P{N}+"), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
])
tokenizer.decoder = decoders.ByteLevel()

expected = tokenizer.encode("12345").tokens
print(f"{'the file, by tokenizers':<25} {expected}")
seen = {}
for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "CohereTokenizer"):
    folder = Path(name)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": name, "eos_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    seen[name] = AutoTokenizer.from_pretrained(name).tokenize("12345")
    print(f"{name:<25} {seen[name]}")

digits = list("12345")
as_seen = {"PreTrainedTokenizerFast": expected, "GPT2Tokenizer": expected, "Qwen2Tokenizer": digits, "CohereTokenizer": digits}
sys.exit(expected != ["12", "34", "5"] or seen != as_seen)
PYTHON
HF_HUB_DISABLE_TELEMETRY=1 HF_HUB_OFFLINE=1 venv/bin/python try.py
