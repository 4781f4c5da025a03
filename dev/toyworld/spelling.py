"""
Words and their letters: spelled, counted, the first, the last, backwards.

The answers have the form of tasks/spellingbee.py: the word is spelled first, letter by letter, and whatever is asked
is read off from that. No word that SpellingBee tests is spelled in training.
"""

import re

from dev.toyworld.grammar import read_words
from dev.toyworld.typed import typed
from tasks.spellingbee import count_letter, is_test_word, spell

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

SPELL = ("spell {w} / spell the word {w} / how do you spell {w} / how is {w} spelled / can you spell {w} / spell {w} for me / "
         "how do i spell {w} / how to spell {w} / how do you write {w} / what are the letters of {w} / spelling of {w} / "
         "the letters of {w} / @can spell {w} / write {w} letter by letter / give me the letters of {w} / "
         "what letters are in {w} / @tell how to spell {w} / @tell how {w} is spelled / what is the spelling of {w} / "
         "which letters are in {w} / how is the word {w} written / i want to spell {w} / i cannot spell {w} / "
         "spell out {w} / and {w} / please spell the word {w} / list the letters in {w} / break {w} into letters / "
         "how would you spell {w} / what about {w}, how is it spelled / say {w} letter by letter").split(" / ")
COUNT = ("how many {l} are in {w} / how many {l}'s are in {w} / how many {l}s are in {w} / how many {l} in {w} / "
         "how many {l}s in {w} / how many times does {l} appear in {w} / how many letters {l} are in {w} / "
         "how often is {l} in {w} / count the {l} in {w} / count the {l}s in {w} / count the letter {l} in {w} / "
         "how many {l}s does {w} have / how many {l} does {w} have / how many {l} are there in {w} / "
         "how many {l}s are there in the word {w} / number of {l} in {w} / how often does {l} occur in {w} / "
         "how often does the letter {l} appear in {w} / how many times is the letter {l} in {w} / "
         "@tell how many {l} are in {w} / in {w}, how many {l} are there / what is the number of {l}s in {w} / "
         "how many of the letter {l} are in {w} / the number of {l}s in the word {w} / {l} in {w}, how many / "
         "is there a {l} in {w} / does {w} have a {l} / does {w} contain {l} / does the word {w} have the letter {l} / "
         "how many times do i see {l} in {w} / and how many {l} are in {w}").split(" / ")
LENGTH = ("how many letters are in {w} / how many letters does {w} have / how many letters in {w} / how long is the word {w} / "
          "how many letters are there in {w} / count the letters in {w} / count the letters of {w} / "
          "number of letters in {w} / what is the length of {w} / how many letters has the word {w} / "
          "@tell how many letters {w} has / how many characters are in {w} / how many letters does the word {w} have / "
          "letters in {w} / length of {w} / the word {w} has how many letters").split(" / ")
FIRST = ("what is the first letter of {w} / first letter of {w} / which letter does {w} start with / "
         "what letter does {w} begin with / with which letter does {w} begin / the first letter in {w} / "
         "what does {w} start with / what letter is first in {w} / @tell the first letter of {w}").split(" / ")
LAST = ("what is the last letter of {w} / last letter of {w} / which letter does {w} end with / "
        "what letter does {w} end with / with which letter does {w} end / the last letter in {w} / what does {w} end with / "
        "what letter is last in {w} / @tell the last letter of {w}").split(" / ")
REVERSE = ("spell {w} backwards / reverse {w} / reverse the word {w} / what is {w} backwards / write {w} backwards / "
           "{w} backwards / how do you spell {w} backwards / turn {w} around / spell {w} in reverse / "
           "say {w} backwards / what is {w} spelled backwards / can you reverse {w}").split(" / ")


def count_all(word):
    """The letters of a word, numbered."""
    along = ", ".join(f"{letter} {i}" for i, letter in enumerate(word, start=1))
    return f"{spell(word)}\nCounting: {along}.\n#### {len(word)}"


def answer_length(word, letter):
    return count_all(word)


def answer_first(word, letter):
    return f"{spell(word)} It begins with {word[0]}."


def answer_last(word, letter):
    return f"{spell(word)} It ends with {word[-1]}."


def answer_reverse(word, letter):
    return f"{spell(word)} Backwards that is {' '.join(reversed(word))}."


# what is asked: (weight, ways to ask, answer(word, letter))
KINDS = {
    "spell": (8, SPELL, lambda word, letter: spell(word)),
    "count": (9, COUNT, count_letter),
    "length": (3, LENGTH, answer_length),
    "first": (1, FIRST, answer_first),
    "last": (1, LAST, answer_last),
    "reverse": (1, REVERSE, answer_reverse),
}
QUOTES = ["'{}'", '"{}"']


def quote(text, rng):
    return rng.choice(QUOTES).format(text) if rng.random() < 0.12 else text


def draw_word(rng):
    return rng.choice(TEST_WORDS if rng.split == "test" else TRAIN_WORDS)


def spelling_exchange(rng):
    kind = rng.choices(list(KINDS), [row[0] for row in KINDS.values()])[0]
    _, phrases, answer = KINDS[kind]
    word = draw_word(rng)
    letter = rng.choice(word) if rng.random() < 0.85 else rng.choice("abcdefghijklmnopqrstuvwxyz")
    template = rng.choice(phrases).replace("{w}", "{exact_w}").replace("{l}", "{exact_l}")
    slots = {"exact_w": quote(word, rng), "exact_l": quote(letter, rng)}
    return [(typed(template, rng, 0.7, **slots), answer(word, letter))]


def spelling_sheet(rng):
    """Six words letter by letter, some with a letter counted along: for pretraining."""
    lines = []
    for word in rng.sample(TRAIN_WORDS, 6):
        line = spell(word)
        if rng.random() < 0.4:
            line = "".join(part["text"] for part in count_letter(word, rng.choice(word))[:1])
            line = line.partition("\nThat makes")[0]
        lines.append(line)
    return "\n".join(lines)
