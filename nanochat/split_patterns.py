"""
The split patterns: regular expressions that cut text into pieces which no token crosses.

They differ only in how many digits make a piece, but that decides which tools read the tokenizer:
many know GPT-4's and Qwen2's patterns and refuse others. So these two stand here as transformers
spells them, in its converter of tiktoken's files and its Qwen2Tokenizer. `rustbpe` splits all three
by hand.

A saved tokenizer holds its pattern, not the name of it, so that any other pattern works as well.
"""

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

# By the names that tok_train takes
SPLIT_PATTERNS = {"nanochat": NANOCHAT_PATTERN, "gpt4": GPT4_PATTERN, "qwen": QWEN_PATTERN}


def split_name(pattern):
    """The name of a pattern, None if it has none here."""
    for name, known in SPLIT_PATTERNS.items():
        if pattern == known:
            return name
    return None
