"""
Words and their letters: spelled, counted, the first, the last, backwards.

The answers have the form of tasks/spellingbee.py: the word is spelled first, letter by letter, and whatever is asked
is read off from that. No word that SpellingBee tests is spelled in training.
"""

import re
from string import ascii_lowercase

from dev.toyworld.grammar import read_phrases, read_words
from dev.toyworld.typed import typed
from tasks.spellingbee import count_letter, is_test_word, spell

PHRASES = read_phrases("spelling")

WORD_FILES = ["words.txt", "things.txt", "animals.txt", "people.txt", "objects.txt"]


def load_words():
    """All English words of the world, 3 to 12 letters, sorted."""
    words = set()
    for name in WORD_FILES:
        words.update(word for word in read_words(name) if re.fullmatch("[a-z]{3,12}", word))
    return sorted(words)


WORDS = load_words()
TRAIN_WORDS = [word for word in WORDS if not is_test_word(word)]
TEST_WORDS = [word for word in WORDS if is_test_word(word)]

def count_all(word):
    """The letters of a word, numbered."""
    along = ", ".join(f"{letter} {i}" for i, letter in enumerate(word, start=1))
    return f"{spell(word)}\nCounting: {along}.\n#### {len(word)}"


def answer_length(word, _):
    return count_all(word)


def answer_vowels(word, _):
    """Counted along, as one letter is."""
    along = []
    total = 0
    for letter in word:
        total += letter in "aeiou"
        along.append(f"{letter} {total}")
    return f"{spell(word)}\nCounting vowels: {', '.join(along)}.\n#### {total}"


def answer_first(word, _):
    return f"{spell(word)} It begins with {word[0]}."


def answer_last(word, _):
    return f"{spell(word)} It ends with {word[-1]}."


def answer_reverse(word, _):
    return f"{spell(word)} Backwards that is {' '.join(reversed(word))}."


# what is asked: (weight, ways to ask, answer(word, letter))
KINDS = {
    "spell": (8, PHRASES["spell"], lambda word, _: spell(word)),
    "count": (9, PHRASES["count"], count_letter),
    "length": (3, PHRASES["length"], answer_length),
    "vowels": (1, PHRASES["vowels"], answer_vowels),
    "first": (1, PHRASES["first"], answer_first),
    "last": (1, PHRASES["last"], answer_last),
    "reverse": (1, PHRASES["reverse"], answer_reverse),
}
QUOTES = ["'{}'", '"{}"']


def quote(text, rng):
    """In quotes now and then."""
    if rng.random() > 0.12:
        return text
    quotes = rng.choice(QUOTES)
    return quotes.format(text)


def draw_word(rng):
    return rng.choice(TEST_WORDS if rng.split == "test" else TRAIN_WORDS)


def spelling_exchange(rng):
    weights = [row[0] for row in KINDS.values()]
    _, phrases, answer = rng.choices(list(KINDS.values()), weights)[0]
    word = draw_word(rng)
    letter = rng.choice(word if rng.random() < 0.85 else ascii_lowercase)
    template = rng.choice(phrases).replace("{w}", "{exact_w}").replace("{l}", "{exact_l}")

    # How the two are written; the answer has them in lower case
    written = word
    asked = letter
    if rng.random() < 0.05:
        written = word.capitalize()
    if rng.random() < 0.12:
        asked = letter.upper()
    slots = {"exact_w": quote(written, rng), "exact_l": quote(asked, rng)}
    message = typed(template, rng, 0.7, **slots)
    return [(message, answer(word, letter))]


def spelling_sheet(rng):
    """Eight words letter by letter, some with a letter counted along: for pretraining."""
    lines = []
    for word in rng.sample(TRAIN_WORDS, 8):
        line = spell(word)
        if rng.random() < 0.4:
            counted = count_letter(word, rng.choice(word))[0]["text"]
            line = counted.partition("\nThat makes")[0]
        lines.append(line)
    return "\n".join(lines)
