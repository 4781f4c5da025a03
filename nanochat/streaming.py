"""
From a stream of tokens to what a reader sees: tool calls are evaluated, bytes become whole
characters, stop strings end the text. Nothing here knows the model.
"""

import codecs

from nanochat.calculator import use_calculator


class ToolState:
    """
    Watches one row's tokens for a python block, evaluates it with the calculator when it closes,
    and returns the tokens to force: output_start, the result, output_end. An expression without a
    result forces nothing.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.python_start = tokenizer.encode_special("<|python_start|>")
        self.python_end = tokenizer.encode_special("<|python_end|>")
        self.output_start = tokenizer.encode_special("<|output_start|>")
        self.output_end = tokenizer.encode_special("<|output_end|>")
        self.block = None  # ids of the open python block

    def feed(self, token):
        """Take the row's next token; returns the list of token ids to force after it."""
        if token == self.python_start:
            self.block = []
        elif token == self.python_end and self.block is not None:
            expression = self.tokenizer.decode(self.block)
            self.block = None
            result = use_calculator(expression)
            if result is not None:
                return [self.output_start, *self.tokenizer.encode(result), self.output_end]
        elif self.block is not None:
            self.block.append(token)
        return []


class TextStream:
    """
    Token ids to text as they come: only whole characters, never a special token. `flush` ends the
    text.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token):
        if token in self.special:
            return ""
        return self._utf8.decode(self.tokenizer.decode_bytes([token]))

    def flush(self):
        return self._utf8.decode(b"", final=True)


def split_at_stop(text, stops):
    """
    (ready, held, found): the part of a growing text that is surely before any stop string, the tail
    that may be the start of one, and whether one has been found.

    >>> split_at_stop("one two thr", ["three"])
    ('one two ', 'thr', False)
    """
    places = [text.find(stop) for stop in stops if stop in text]
    if places:
        return text[: min(places)], "", True
    num_held = max((_overlap(text, stop) for stop in stops), default=0)
    cut = len(text) - num_held
    return text[:cut], text[cut:], False


def _overlap(text, stop):
    """Length of the longest beginning of `stop` that `text` ends with."""
    for length in range(len(stop) - 1, 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
