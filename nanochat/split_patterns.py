"""
The split patterns: regular expressions that cut text into pieces which no token crosses.

They differ only in how many digits make a piece, but that decides which tools read the tokenizer:
many know GPT-4's and Qwen2's patterns and refuse others. So these two stand here as transformers
spells them, in its converter of tiktoken's files and its Qwen2Tokenizer. `rustbpe` splits all three
by hand.

A saved tokenizer holds its pattern, not the name of it, so that any other pattern works as well.
"""

import re

# GPT-4's split, but numbers in pieces of at most two digits: at vocabularies of this size,
# three-digit pieces would spend a thousand tokens on numbers. Possessive quantifiers (?+ ++) change
# no match and spare backtracking.
NANOCHAT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)"        # English contractions: 's, 'll
    r"|[^\r\n\p{L}\p{N}]?+\p{L}+"   # a word, with at most one space or sign in front
    r"|\p{N}{1,2}"                  # one or two digits
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*"  # punctuation, with the line ends after it
    r"|\s*[\r\n]"                   # white space up to a line end
    r"|\s+(?!\S)"                   # white space, except the last one before a word
    r"|\s+"                         # this last one
)

# The same in the usual spelling, around the rule for digits
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

GPT4_PATTERN = rf"{_WORDS}|\p{{N}}{{1,3}}|{_SIGNS}"
QWEN_PATTERN = rf"{_WORDS}|\p{{N}}|{_SIGNS}"

# Where all three patterns end a piece: a letter or a number is never followed by a space or by one
# of these signs within a piece
CUT = re.compile(r"(?<=[^\W_])[ .,;:!?、。，]")

# By the names that tok_train takes
SPLIT_PATTERNS = {"nanochat": NANOCHAT_PATTERN, "gpt4": GPT4_PATTERN, "qwen": QWEN_PATTERN}


def cut_places(text, pattern, size):
    """
    Where a text can be cut into slices of `size` characters or a little more, whose ids are
    together those of the whole: [0, ..., len(text)]. No cuts with a pattern that has no name here,
    nor in text without spaces and signs.

    >>> cut_places("one two three", NANOCHAT_PATTERN, 4)
    [0, 7, 13]
    """
    places = [0]
    if split_name(pattern):
        while found := CUT.search(text, places[-1] + size):
            places.append(found.start())
    return [*places, len(text)]


def split_name(pattern):
    """The name of a pattern, None if it has none here."""
    for name, known in SPLIT_PATTERNS.items():
        if pattern == known:
            return name
    return None
