"""
Which tools read an exported tokenizer, by its split pattern.

Many read tokenizer.json with a splitter of their own, and so take only patterns that they know. The
table was made by running each tool on the exports of three tokenizers and comparing all ids, see
dev/log/2026-11-30-split.md: texts of many kinds, and every character of Unicode's first two planes.
A tool that takes a split gives our ids, except where EXCEPTIONS says otherwise.
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
    "gigatoken 0.10": KNOWN_ELSEWHERE,
    "onnxruntime-genai 0.18": KNOWN_ELSEWHERE,
    "js-tiktoken 1.0 on node 26": KNOWN_ELSEWHERE,
    "tiktoken-go 0.1.8": KNOWN_ELSEWHERE,
    "sugarme/tokenizer 0.3 for Go": (),
}

# What makes a tool give other ids without a word
EXCEPTIONS = {
    "onnxruntime-genai 0.18": "white space before a line end, and text from its first NUL on",
    "js-tiktoken 1.0 on node 26": "U+0085 and U+FEFF",
}


def describe_readers(pattern):
    """Lines of text: which tools read a tokenizer of this pattern, and which refuse it."""
    name = split_name(pattern)
    if name is None:
        return ["its split is none of tok_train's, so which tools read it was not tried"]

    takers = []
    refusing = []
    exceptions = []
    for tool, splits in READERS.items():
        if name not in splits:
            refusing.append(tool)
            continue
        takers.append(tool)
        if tool in EXCEPTIONS:
            exceptions.append(f"{tool}: {EXCEPTIONS[tool]}")

    lines = [f"split {name}, token ids as here in {', '.join(takers)}"]
    if exceptions:
        lines.append(f"but other ids, without a word, in {'; '.join(exceptions)}")
    lines.append(f"refused by {', '.join(refusing)}")
    if name not in KNOWN_ELSEWHERE:
        lines.append("tok_train --split=gpt4 or --split=qwen makes one that more of them read")
    return lines
