#!/usr/bin/env bash
# outlines-core: where a text may end, tokens that begin an optional rest are forbidden
#
# Expected: a token is allowed if some text of the pattern begins with what was written and this token.
#   After "3", the pattern [0-9]+(\.[0-9]+)? allows a digit, "." and the end.
# Happens:  "." is not allowed: at a place where the text so far is complete, a token is dropped if the text
#   is not complete again at its end. So 3.5 cannot be written with the token ".", only with a token ".5";
#   (ab)+ gives one "ab" if a and b are tokens; a letter of two bytes cannot follow in [a-zà-ÿ]+ if its bytes
#   are tokens. If something must follow (x at the end), all is allowed. No error is raised.
#
# Versions: outlines-core 0.2.14, Python 3.11. Seen: 2026-11-30.
# Needs: bash, uv.
#
# Output seen:
#   [0-9]+(\.[0-9]+)?    3.5     stops before '.'
#   [0-9]+(\.[0-9]+)?x   3.5x    whole
#   (ab)+                abab    stops before 'a'
#   (ab)+x               ababx   whole
#   [0-9]{1,3}           123     whole
#   Yes( it is)?         Yes it is stops before ' '
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
uv venv -q venv
uv pip install -q --python venv/bin/python outlines-core==0.2.14
cat > try.py <<'PYTHON'
import re
import string
import sys

from outlines_core import Guide, Index, Vocabulary

CHARACTERS = string.digits + string.ascii_letters + " ."
CASES = {  # pattern, text -> the character before which the guide stops, None if it takes all
    (r"[0-9]+(\.[0-9]+)?", "3.5"): ".",
    (r"[0-9]+(\.[0-9]+)?x", "3.5x"): None,
    (r"(ab)+", "abab"): "a",
    (r"(ab)+x", "ababx"): None,
    (r"[0-9]{1,3}", "123"): None,
    (r"Yes( it is)?", "Yes it is"): " ",
}


def write(pattern, text):
    """The first character of the text that the guide of the pattern does not allow; None if it allows all."""
    vocabulary = Vocabulary(len(CHARACTERS), {character: [i] for i, character in enumerate(CHARACTERS)})
    guide = Guide(Index(pattern, vocabulary))
    for character in text:
        token = CHARACTERS.index(character)
        if token not in guide.get_tokens():
            return character
        guide.advance(token)
    return None


seen = {}
for pattern, text in CASES:
    assert re.fullmatch(pattern, text)
    seen[pattern, text] = write(pattern, text)
    outcome = "whole" if seen[pattern, text] is None else f"stops before {seen[pattern, text]!r}"
    print(f"{pattern:<20} {text:<9} {outcome}")
sys.exit(seen != CASES)
PYTHON
venv/bin/python try.py
