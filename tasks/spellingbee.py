"""
Two tasks made from a list of English words. A model reads tokens, not letters, so it has to be
taught how a word is spelled, and counting letters is a small chain of reasoning on top:

    SimpleSpelling   "Spell the word apple."           -> "The word apple is spelled a p p l e."
    SpellingBee      "How many p are there in apple?"  -> spells it, counts along, checks with the
                                                          python tool, #### 2

The spaces matter: " p" is one and the same token in every place, where letters joined by commas or
dashes need not be. The words of the test split never occur in training, in either task: the word
itself decides its split (is_test_word). Example i of a split depends on its name and i alone, so a
task may be of any size, and a larger one begins the same.
"""

import gzip
import random
import re
import zlib
from functools import cache
from pathlib import Path
from string import ascii_lowercase

from nanochat.common import UserError, get_data_dir, get_data_root
from nanochat.download import download_url
from tasks.common import Task, check_option, exchange, pick
from tasks.final_answer import parse_answer

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
WORD = re.compile("[a-z]{3,15}")  # few people ask about longer ones; leaves 358,606 of 370,099
ABSENT_FRAC = 0.1  # of the questions ask for any letter, mostly one that the word does not have

# -----------------------------------------------------------------------------
# Words


def find_words(url=WORDS_URL) -> Path:
    """The word list of the mirror, else of the base directory, where it is downloaded once."""
    root = get_data_root()
    path = root / "words_alpha.txt"
    packed = root / "words_alpha.txt.gz"
    if packed.is_file() and not path.is_file():
        return packed
    if get_data_dir() and not path.is_file():
        raise UserError(
            f"the mirror NANOCHAT_DATA_DIR={root} has no words_alpha.txt or words_alpha.txt.gz",
            f"put {url} there",
        )
    return download_url(url, path)


def is_test_word(word: str) -> bool:
    """One word in ten, by a hash that is the same everywhere (Python's own is not)."""
    return zlib.crc32(word.encode()) % 10 == 0


@cache  # the list is read once for a process, not for each task and split
def load_words(path: Path) -> dict[str, list[str]]:
    """{"train": words, "test": words} of a file with one word a line."""
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rt", encoding="utf-8") as lines:
        words = [line.strip() for line in lines]

    splits = {"train": [], "test": []}
    for word in words:
        if WORD.fullmatch(word):
            split = "test" if is_test_word(word) else "train"
            splits[split].append(word)
    for split, members in splits.items():
        if not members:
            raise UserError(
                f"{path} has no words for the {split} split",
                "it needs one word per line, a to z, 3 to 15 letters",
            )
    return splits


# -----------------------------------------------------------------------------
# How people ask

SPELL_PHRASES = (
    "Spell the word {word}.", "Spell {word}", "How do you spell {word}?", "How is {word} spelled?",
    "Can you spell {word} for me?", "Spell out {word}, please.", "What are the letters of {word}?",
    "Give me the letters in {word}, one by one.", "Please write {word} letter by letter.",
    "spelling of {word}",
)

COUNT_PHRASES = (
    # questions
    "How many {letter} are in {word}?", "How many {letter} are there in {word}?",
    "How many {letter}s are in {word}?", "How many {letter}s does {word} have?",
    "How many {letter}s do you see in {word}?", "How many times does {letter} occur in {word}?",
    "How many times does the letter {letter} appear in {word}?",
    "How many times is {letter} used in the word {word}?",
    "How many of the letters in {word} are {letter}?", "How often does {letter} appear in {word}?",
    "How often do you write {letter} when you write {word}?",
    "In the word {word}, how many {letter}s are there?",
    "In {word}, how often does one find {letter}?", "What is the number of {letter}s in {word}?",
    "What is the count of the letter {letter} in {word}?",
    "Looking at {word}, how many {letter}s can you find?",
    "If I spell {word}, how many {letter}s do I need?", "The word {word}: how many {letter}s?",
    "{word} has how many {letter}s?", "Which number of {letter}s is in {word}?",
    "Are there any {letter}s in {word}, and how many?",
    "Does {word} contain the letter {letter}? How many times?",
    # requests
    "Count the {letter}s in {word}.", "Count how many {letter}s are in {word}.",
    "Count the letter {letter} in {word}", "Please count every {letter} in the word {word}.",
    "Could you count the {letter}s in {word} for me?",
    "Can you tell me how many {letter}s {word} has?",
    "Tell me how many times {letter} is in {word}.", "Tell me the number of {letter}s in {word}.",
    "Find all the {letter}s in {word} and count them.", "Give me the count of {letter} in {word}.",
    "I need to know how many {letter}s there are in {word}.",
    "I am solving a puzzle: how many {letter}s does {word} have?",
    "My child asks how many {letter}s are in {word}.", "Help me count {letter} in {word}",
    "Quick question: how many {letter}s in {word}?",
    # as typed in a hurry
    "how many {letter} in {word}", "count {letter} in {word}", "{word}: number of {letter}",
    "{letter}s in {word}?", "number of {letter} in {word}", "{letter} count {word}",
    "how often {letter} in {word}",
    # other languages
    "¿Cuántas {letter} hay en {word}?", "¿Cuántas veces aparece {letter} en {word}?",
    "Cuenta las {letter} de {word}.", "Combien de {letter} y a-t-il dans {word} ?",
    "Combien de fois trouve-t-on {letter} dans {word} ?", "Wie viele {letter} hat {word}?",
    "Wie oft kommt {letter} in {word} vor?", "Zähle die {letter} in {word}.",
    "Quante {letter} ci sono in {word}?", "Quantas {letter} tem {word}?",
    "Hoeveel {letter} zitten er in {word}?", "Ile liter {letter} jest w słowie {word}?",
    "Сколько букв {letter} в слове {word}?", "{word} 里有几个 {letter}？",
    "{word} kelimesinde kaç {letter} var?", "{word}に{letter}はいくつありますか？",
    "{word}에 {letter}가 몇 개 있나요?",
)

QUOTES = ("{}", "{}", "'{}'", '"{}"')  # bare half of the time


def ask(rng, phrases, word, letter=""):
    """One of the phrases, filled in, with or without quotes, sometimes without a capital."""
    phrase = pick(rng, phrases)
    if rng.random() < 0.2:
        phrase = phrase[0].lower() + phrase[1:]
    quoted_word = pick(rng, QUOTES).format(word)
    quoted_letter = pick(rng, QUOTES).format(letter)
    return phrase.format(word=quoted_word, letter=quoted_letter)


# -----------------------------------------------------------------------------
# How the assistant answers


def spell(word: str) -> str:
    """
    Each letter after a space: " b" is another token than "b", and in a question a letter mostly
    follows a space.

    >>> spell("bee")
    'The word bee is spelled b e e.'
    """
    letters = " ".join(word)
    return f"The word {word} is spelled {letters}."


def count_letter(word: str, letter: str) -> list[dict]:
    """
    The worked solution as parts: the word is spelled, its letters are counted with a running total,
    the count is checked by a tool call, and the answer is given.
    """
    total = 0
    steps = []
    for c in word:
        total += c == letter
        steps.append(f"{c} {total}")
    counting = (
        f"{spell(word)}\nCounting {letter}: {', '.join(steps)}.\n"
        f"That makes {total}, let me check: "
    )
    # double quotes: the tokenizer's split cuts 'strawberry into the contraction 's and trawberry
    call = f'"{word}".count("{letter}")'
    return [
        {"type": "text", "text": counting},
        {"type": "python", "text": call},
        {"type": "python_output", "text": str(total)},
        {"type": "text", "text": f"\n#### {total}"},
    ]


# -----------------------------------------------------------------------------
# The tasks


class WordTask(Task):
    """
    A task of any size over the words of one split. A subclass defines make_example, which makes an
    example from an rng.
    """

    def __init__(self, size=1000, split="train", **kwargs):
        super().__init__(**kwargs)
        check_option(self, "split", split, ("train", "test"))
        if size < 0:
            raise UserError(f"{type(self).__name__}(size={size}): need 0 or more")
        self.size = size
        self.split = split
        self.words = load_words(find_words())[split]

    def num_examples(self):
        return self.size

    def get_example(self, index):
        # seeded by a text, since the seeds -1 and 1 are the same
        rng = random.Random(f"{type(self).__name__}:{self.split}:{index}")
        word = pick(rng, self.words)
        question, answer = self.make_example(rng, word)
        return {"messages": exchange(question, answer)}


class SimpleSpelling(WordTask):
    def make_example(self, rng, word):
        question = ask(rng, SPELL_PHRASES, word)
        return question, spell(word)

    def evaluate(self, conversation, completion):
        answer = conversation["messages"][-1]["content"]
        return completion.strip() == answer


class SpellingBee(WordTask):
    def make_example(self, rng, word):
        letters = ascii_lowercase if rng.random() < ABSENT_FRAC else word
        letter = pick(rng, letters)
        question = ask(rng, COUNT_PHRASES, word, letter)
        return question, count_letter(word, letter)

    def evaluate(self, conversation, completion):
        """Is the number after the last #### the count?"""
        last_part = conversation["messages"][-1]["content"][-1]
        return parse_answer(completion) == parse_answer(last_part["text"])
