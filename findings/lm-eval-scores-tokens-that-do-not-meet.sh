#!/usr/bin/env bash
# lm-evaluation-harness: where a token crosses from the prompt into an answer, another text is scored
#
# Expected: the log-likelihood of an answer after a prompt is found on tokens that spell the prompt and
#   the answer. lighteval 0.13.0 cuts the tokens of the whole text in two and scores that.
# Happens:  the model is given the tokens of the prompt alone, and behind them those of the whole text
#   from the place on that lies as many tokens from its start. If a token crosses the border, characters
#   of the answer are left out without a word: "to" + "day is", where "today" is a token, is scored as
#   "to" + " is". Answers that begin with a space are safe with most tokenizers; endings of words, and
#   languages without spaces, are not.
#
# Versions: lm-eval 0.4.13, tokenizers 0.23.3, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   'to' + 'day is'    scored: 'to' + ' is'
#   'wat' + 'er is'    scored: 'wat' + ' is'
#   'the' + ' day is'  scored: 'the' + ' day is'
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python lm-eval==0.4.13 tokenizers==0.23.3
cat > try.py <<'PYTHON'
import sys

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

# A byte-level BPE of the bytes and a few words
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
merges = [
    ("t", "o"), ("d", "a"), ("da", "y"), ("to", "day"),
    ("w", "a"), ("wa", "t"), ("e", "r"), ("wat", "er"),
    ("t", "h"), ("th", "e"), ("\u0120", "day"), ("i", "s"), ("\u0120", "is"),
]
vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
tokenizer = Tokenizer(models.BPE(vocab, merges))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()


class Recorder(TemplateLM):
    """A model that keeps which tokens it was asked to score."""

    backend = "causal"
    eot_token_id = 0

    def tok_encode(self, string, add_special_tokens=None, **kwargs):
        return tokenizer.encode(string).ids

    def _loglikelihood_tokens(self, requests, **kwargs):
        self.seen = [tuple(map(tokenizer.decode, tokens)) for _, *tokens in requests]
        return [(0.0, False) for _ in requests]

    def loglikelihood_rolling(self, requests, **kwargs):
        raise NotImplementedError

    def generate_until(self, requests, **kwargs):
        raise NotImplementedError


pairs = [("to", "day is"), ("wat", "er is"), ("the", " day is")]
model = Recorder()
model.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
for pair, seen in zip(pairs, model.seen):
    text = f"{pair[0]!r} + {pair[1]!r}"
    print(f"{text:<18} scored: {seen[0]!r} + {seen[1]!r}")
sys.exit(model.seen != [("to", " is"), ("wat", " is"), ("the", " day is")])
PYTHON
HF_HUB_OFFLINE=1 venv/bin/python try.py
