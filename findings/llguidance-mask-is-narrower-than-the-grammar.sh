#!/usr/bin/env bash
# llguidance: where the grammar leaves one text, the mask allows one tokenization of it, not all
#
# Expected: the mask of a step holds every token after which the text can still follow the grammar: it is
#   the set of tokens that `consume_token` takes.
# Happens:  where the grammar leaves one text only, the mask holds the single token with which the
#   tokenizer itself would begin that text, while `consume_token` takes the others too. A model that has
#   learned to write the same text in other pieces (as tokenizers that split digits, or models that were
#   trained with dropout of merges) is kept from its likeliest token, and probabilities are of another
#   language than the grammar's. `%llguidance {"no_forcing": true}` in the grammar gives the whole mask.
#
# Versions: llguidance 1.9.1, numpy 2.4.6, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   default     allowed [b', then']                   taken [b',', b', ', b', then']
#   no_forcing  allowed [b',', b', ', b', then']      taken [b',', b', ', b', then']
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python llguidance==1.9.1 numpy==2.4.6
cat > try.py <<'PYTHON'
import sys

import llguidance
import numpy as np

TOKENS = [*(bytes([i]) for i in range(256)), b", ", b", then", b"<|end|>"]
GRAMMAR = 'start: /[0-9]/ ", then"'


class Encoder:
    """What llguidance asks of a tokenizer. Encodes greedily: the longest token first."""

    tokens = TOKENS
    eos_token_id = len(TOKENS) - 1
    bos_token_id = None
    special_token_ids = [len(TOKENS) - 1]

    def __call__(self, text):
        rest = text if isinstance(text, bytes) else text.encode()
        ids = []
        while rest:
            token = max(filter(rest.startswith, TOKENS[:-1]), key=len)
            ids.append(TOKENS.index(token))
            rest = rest[len(token):]
        return ids


tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Encoder()), n_vocab=len(TOKENS))
seen = {}
for name, head in (("default", ""), ("no_forcing", '%llguidance {"no_forcing": true}\n')):
    matcher = llguidance.LLMatcher(tokenizer, head + GRAMMAR, log_level=0)
    matcher.consume_token(ord("7"))
    mask = np.frombuffer(matcher.compute_logit_bias(), np.uint8)
    allowed = [TOKENS[i] for i in np.flatnonzero(mask)]
    taken = [token for i, token in enumerate(TOKENS) if matcher.deep_copy().consume_token(i)]
    print(f"{name:<11} allowed {str(allowed):<33} taken {taken}")
    seen[name] = (allowed, taken)

every = [b",", b", ", b", then"]
sys.exit(seen != {"default": ([b", then"], every), "no_forcing": (every, every)})
PYTHON
venv/bin/python try.py
