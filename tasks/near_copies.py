"""
Near copies: is a message of an evaluation also, but for small changes, in the training data?

Two messages are compared by their letters, not their meaning. Every number becomes 0 (a word problem with other numbers
is the same problem), contractions are written out, and what remains is cut into pieces of three characters. The measure
is Dice's: twice the shared pieces over the pieces of both.

The threshold was read off pairs made by hand (tests/test_near_copies.py keeps them). A typo, a lost apostrophe, two
halves in another order or a "please" leave 0.81 or more, and so does another name or noun in a long message. Other
words for the same wish, or another noun in a short request ("spell garden", "spell kitchen"), give 0.79 or less.
"""

import functools
import re

import numpy as np

from tasks.answer_rules import plain

THRESHOLD = 0.8

# A message of these words and numbers alone is a bare sum
SUM_WORDS = (
    "what is are does how much many the a of by from and to with plus minus times x add added subtract subtracted "
    "take away multiply multiplied divide divided sum difference product between double half twice please pls plz "
    "can could you me tell give calculate compute work out for up equal equals answer get do make makes "
    "hey hi that"
)


def normalize(message: str) -> str:
    """
    >>> normalize("What's 1,200 plus 3?  PLEASE!")
    'what is 0 plus 0 please'
    """
    # Word by word, since no rule reaches across a space and the same words come again and again
    words = map(_normalize_word, message.split())
    return " ".join(filter(None, words))


@functools.lru_cache(maxsize=2**17)
def _normalize_word(word: str) -> str:
    """What's -> what is, 1,200? -> 0, a word of punctuation alone -> the empty string."""
    without_numbers = re.sub(r"[0-9][0-9.,]*", " 0 ", word)
    return plain(without_numbers)


def is_exempt(message: str) -> bool:
    """
    One or two words, or a bare sum. There are few ways to write these, so a copy of one proves nothing.

    >>> is_exempt("hello there"), is_exempt("what's 7 times 8?"), is_exempt("spell the word tree")
    (True, True, False)
    """
    words = normalize(message).split()
    sum_words = ["0", *SUM_WORDS.split()]
    bare_sum = all(word in sum_words for word in words)
    return bare_sum or len(words) <= 2


def pieces(message: str) -> set[str]:
    """The three-character pieces of a message, with a space at either end."""
    text = f" {normalize(message)} "
    return {text[i : i + 3] for i in range(len(text) - 2)}


def similarity(message: str, training_message: str) -> float:
    """0 when they share no piece, 1 when they share every piece."""
    first = pieces(message)
    second = pieces(training_message)
    num_shared = len(first & second)
    return 2 * num_shared / (len(first) + len(second))


def near_copy(message: str, training_message: str) -> bool:
    if is_exempt(message):
        return False
    return similarity(message, training_message) >= THRESHOLD


class NearCopies:
    """
    near_copy() of a list of messages against many training messages, by an index of the pieces.

    >>> NearCopies(["could you spell garden for me"]).find("could you spel garden for me?")
    ['could you spell garden for me']
    """

    def __init__(self, messages):
        self.messages = [message for message in messages if not is_exempt(message)]
        found = [pieces(message) for message in self.messages]
        self.sizes = np.array([len(of_message) for of_message in found])
        self.rows = {piece: row for row, piece in enumerate(sorted(set().union(*found)))}

        # holds[row of a piece, i] is 1 if message i holds the piece
        self.holds = np.zeros((len(self.rows), len(self.messages)), dtype=np.int16)
        for i, of_message in enumerate(found):
            self.holds[[self.rows[piece] for piece in of_message], i] = 1

    def find(self, training_message: str) -> list[str]:
        """Those of the messages of which the training message is a near copy."""
        found = pieces(training_message)
        rows = [self.rows[piece] for piece in found if piece in self.rows]
        num_shared = self.holds[rows].sum(axis=0, dtype=np.int16)

        scores = 2 * num_shared / (self.sizes + len(found))
        return [self.messages[i] for i in np.flatnonzero(scores >= THRESHOLD)]


def user_texts(messages: list[dict], max_turns: int = 4) -> list[str]:
    """
    Each run of 1 to max_turns user messages of a conversation, joined by newlines. An item of several turns is
    compared as a whole: its first message, "my name is Ana", is a copy of nothing.
    """
    turns = []
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            if not isinstance(content, str):
                content = "".join(part["text"] for part in content)
            turns.append(content)

    texts = []
    for num_turns in range(1, max_turns + 1):
        for start in range(len(turns) - num_turns + 1):
            run = turns[start : start + num_turns]
            texts.append("\n".join(run))
    return texts
