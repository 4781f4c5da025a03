#!/usr/bin/env bash
# mlx-lm: the streamed text of an answer lacks the space that it begins with
#
# Expected: the pieces that a detokenizer streams are, joined, what `decode` gives for the same tokens.
#   So a text and the model's continuation of it can be joined.
# Happens:  with a byte-level BPE the first space of an answer is dropped ("The capital is" +
#   "Paris"), though `clean_up_tokenization_spaces` is off and the decoder of tokenizer.json keeps it.
#   Only the first token of a stream is touched, and only if it begins with a space: what stream_generate
#   and the server give for a base model is glued to the prompt.
#
# Versions: mlx-lm 0.32.2 (mlx-cpu 0.32.4), transformers 5.24.0, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   ' the cat'    decode ' the cat'    streamed 'the cat'
#   '  the cat'   decode '  the cat'   streamed ' the cat'
#   'the cat'     decode 'the cat'     streamed 'the cat'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python mlx-lm==0.32.2 "mlx[cpu]==0.32.4" transformers==5.24.0
mkdir model
cat > try.py <<'PYTHON'
import json
import sys
from pathlib import Path

from mlx_lm.tokenizer_utils import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# A byte-level BPE of the bytes and one word, whose first letter is the space
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [("\u0120", "t"), ("\u0120t", "h"), ("\u0120th", "e")]
vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges), "<|end|>"])}
tokenizer = Tokenizer(models.BPE(vocab, merges))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens(["<|end|>"])
tokenizer.save("model/tokenizer.json")
config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "clean_up_tokenization_spaces": False}
Path("model/tokenizer_config.json").write_text(json.dumps(config))

wrapper = load(Path("model"))
seen = []
for text in (" the cat", "  the cat", "the cat"):
    ids = tokenizer.encode(text).ids
    detokenizer = wrapper.detokenizer
    detokenizer.reset()
    streamed = ""
    for token in ids:
        detokenizer.add_token(token)
        streamed += detokenizer.last_segment
    detokenizer.finalize()
    streamed += detokenizer.last_segment
    print(f"{text!r:<13} decode {tokenizer.decode(ids)!r:<13} streamed {streamed!r}")
    seen.append((tokenizer.decode(ids) == text, streamed))
sys.exit(seen != [(True, "the cat"), (True, " the cat"), (True, "the cat")])
PYTHON
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 venv/bin/python try.py
