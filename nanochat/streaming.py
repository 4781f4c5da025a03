"""
From a stream of tokens to what a reader sees: tool calls are evaluated, bytes become whole
characters, stop strings end the text. Nothing here knows the model.
"""

import codecs

from nanochat.calculator import use_calculator


class ToolState:
    """
    Watches the tokens of one row for a python block. When the block ends, the calculator evaluates
    it, and `feed` returns the tokens to force: output_start, the result, output_end. Without a
    result nothing is forced.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.python_start = tokenizer.encode_special("<|python_start|>")
        self.python_end = tokenizer.encode_special("<|python_end|>")
        self.output_start = tokenizer.encode_special("<|output_start|>")
        self.output_end = tokenizer.encode_special("<|output_end|>")
        self.block = None  # token ids of the open python block

    def feed(self, token):
        """Take the row's next token; returns the list of token ids to force after it."""
        if token == self.python_start:
            self.block = []
        # An end without a start means nothing
        elif token == self.python_end and self.block is not None:
            expression = self.tokenizer.decode(self.block)
            self.block = None
            result = use_calculator(expression)
            if result is not None:
                return [self.output_start, *self.tokenizer.encode(result), self.output_end]
        elif self.block is not None:
            self.block.append(token)
        # Nothing to force: the model goes on
        return []


class TextStream:
    """Token ids to text as they come: only whole characters, never a special token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        # their names are no text of the answer
        self.special = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
        # a token may end inside a character: its bytes wait here
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token):
        """The text that the token completes: "" while a character is unfinished."""
        if token in self.special:
            return ""
        return self._utf8.decode(self.tokenizer.decode_bytes([token]))

    def flush(self):
        """End the text: an unfinished character becomes U+FFFD."""
        return self._utf8.decode(b"", final=True)


def split_at_stop(text, stops):
    """
    (ready, held, found): the part of a growing text that is surely before any stop string, the end
    that may be the start of one, and whether a stop string was found.

    >>> split_at_stop("one two thr", ["three"])
    ('one two ', 'thr', False)
    """
    # The first stop string ends the text
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        return text[: min(places)], "", True

    # The longest end of the text that may become a stop string
    overlaps = [_overlap(text, stop) for stop in stops]
    num_held = max(overlaps, default=0)
    cut = len(text) - num_held
    return text[:cut], text[cut:], False


def _overlap(text, stop):
    """Length of the longest beginning of `stop` that `text` ends with."""
    # longest first; a whole stop string was found by the caller
    for length in range(len(stop) - 1, 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
