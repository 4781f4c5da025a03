"""
Which tools read an exported tokenizer, by its split pattern.

Many read tokenizer.json with a splitter of their own, and so take only patterns that they know. The
table was made by running each tool on the exports of three tokenizers and comparing all ids, see
dev/log/2026-11-30-split.md: texts of many kinds, and every character of Unicode's first two planes
(2026-11-30-engines.md for the crate: texts alone).
A tool that takes a split gave our ids for every ordinary text; EXCEPTIONS has the others.
"""

from nanochat.split_patterns import SPLIT_PATTERNS, split_name

ALL = tuple(SPLIT_PATTERNS)
KNOWN_ELSEWHERE = ("gpt4", "qwen")

# Tool and version -> the splits that it takes; it refuses the others
READERS = {
    "transformers 5.23": ALL,
    "tokenizers 0.23": ALL,
    "tiktoken 0.14": ALL,
    "openvino-tokenizers 2026.4": ALL,
    "kitoken 0.11": ALL,
    "@huggingface/transformers 4.3": ALL,
    # the crate for Rust, after its own canonicalize_file: as it is, it refuses every file of today
    "tokenizers 1.0-rc.3 converted": KNOWN_ELSEWHERE,
    "gigatoken 0.10": KNOWN_ELSEWHERE,
    "onnxruntime-genai 0.18": KNOWN_ELSEWHERE,
    "js-tiktoken 1.0 on node 26": KNOWN_ELSEWHERE,
    "tiktoken-go 0.1.8": KNOWN_ELSEWHERE,
    "sugarme/tokenizer 0.3 for Go": (),
}

# What a tool that takes a split cuts elsewhere, without a word. Ids differ where a token crosses the
# cut, which was not seen in any ordinary text
LONG_S = "' before a long s (U+017F)"
EXCEPTIONS = {
    "openvino-tokenizers 2026.4": "U+180E",
    "@huggingface/transformers 4.3": LONG_S,
    "onnxruntime-genai 0.18": "blanks before a line end, and all from U+0000 on is left out",
    "js-tiktoken 1.0 on node 26": "U+0085 and U+FEFF",
    "tiktoken-go 0.1.8": LONG_S,
}


def read_outcomes(pattern):
    """
    [(tool, what it makes of a tokenizer of this pattern)]; empty if the pattern was not tried.
    """
    name = split_name(pattern)
    if name is None:
        return []
    outcomes = []
    for tool, splits in READERS.items():
        outcome = "same ids" if name in splits else "refused"
        if name in splits and tool in EXCEPTIONS:
            outcome += f"; cuts elsewhere: {EXCEPTIONS[tool]}"
        outcomes.append((tool, outcome))
    return outcomes


def reader_lines(pattern):
    """The same as lines of a table, with what to do where many tools refuse it."""
    outcomes = read_outcomes(pattern)
    if not outcomes:
        return ["its split pattern is none of tok_train's: which tools read it was not tried"]
    lines = [f"{tool:30} {outcome}" for tool, outcome in outcomes]
    if split_name(pattern) not in KNOWN_ELSEWHERE:
        lines.append("more tools read the tokenizers of tok_train --split=gpt4 and --split=qwen")
    return lines
