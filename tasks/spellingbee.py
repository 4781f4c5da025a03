"""
Two tasks made from a list of English words. A model reads tokens, not letters, so how a word is spelled is knowledge it
has to be taught, and counting letters is a small chain of reasoning on top of it:

    SimpleSpelling   "Spell the word apple."           -> "The word apple is spelled a p p l e."
    SpellingBee      "How many p are there in apple?"  -> spells it, counts along, checks with the python tool, #### 2

The spaces matter: " p" is one and the same token in every place, where letters joined by commas or dashes need not be.
The words of the test split never occur in training, in either task: the word itself decides its split (is_test_word).
Example i of a split depends on its name and i alone, so a task may be of any size, and a larger one begins the same.
"""

import gzip
import random
import zlib
from functools import cache
from pathlib import Path
from string import ascii_lowercase

from nanochat.common import UserError, get_data_dir, get_data_root
from nanochat.download import download_file
from tasks.common import Task, check_option, parse_answer

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/words_alpha.txt"
MIN_LETTERS, MAX_LETTERS = 3, 15  # few people ask about longer ones; leaves 358,606 of 370,099
ABSENT_FRAC = 0.1  # this share of questions asks for any letter, mostly one that the word does not have

# -----------------------------------------------------------------------------
# Words


def find_words(url=WORDS_URL) -> Path:
    """The word list of the mirror, else of the base directory, where it is downloaded once."""
    root = get_data_root()
    for name in ("words_alpha.txt", "words_alpha.txt.gz"):
        if (root / name).is_file():
            return root / name
    if get_data_dir():
        raise UserError(f"the mirror NANOCHAT_DATA_DIR={root} has no words_alpha.txt or words_alpha.txt.gz",
                        f"put {url} there")
    return download_file(url, root / "words_alpha.txt")


def is_test_word(word: str) -> bool:
    """One word in ten, by a hash that is the same everywhere (Python's own is not)."""
    return zlib.crc32(word.encode()) % 10 == 0


@cache  # the list is read once for a process, not for each task and split
def load_words(path: Path) -> dict[str, list[str]]:
    """{"train": words, "test": words} of a file with one word a line."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        words = [line.strip() for line in lines]
    words = [w for w in words if MIN_LETTERS <= len(w) <= MAX_LETTERS and w.isascii() and w.isalpha() and w.islower()]
    splits = {"train": [w for w in words if not is_test_word(w)], "test": [w for w in words if is_test_word(w)]}
    for split, members in splits.items():
        if not members:
            raise UserError(f"{path} has no words for the {split} split",
                            f"it needs one word per line, a to z, {MIN_LETTERS} to {MAX_LETTERS} letters")
    return splits


def pick(rng, items):
    """rng.choice, by the one method whose numbers are promised to be the same in every Python."""
    return items[int(rng.random() * len(items))]


# -----------------------------------------------------------------------------
# How people ask

SPELL_PHRASES = (
    "Spell the word {word}.", "Spell {word}", "How do you spell {word}?", "How is {word} spelled?",
    "Can you spell {word} for me?", "Spell out {word}, please.", "What are the letters of {word}?",
    "Give me the letters in {word}, one by one.", "Please write {word} letter by letter.", "spelling of {word}",
)

COUNT_PHRASES = (
    # questions
    "How many {letter} are in {word}?", "How many {letter} are there in {word}?", "How many {letter}s are in {word}?",
    "How many {letter}s does {word} have?", "How many {letter}s do you see in {word}?",
    "How many times does {letter} occur in {word}?", "How many times does the letter {letter} appear in {word}?",
    "How many times is {letter} used in the word {word}?", "How many of the letters in {word} are {letter}?",
    "How often does {letter} appear in {word}?", "How often do you write {letter} when you write {word}?",
    "In the word {word}, how many {letter}s are there?", "In {word}, how often does one find {letter}?",
    "What is the number of {letter}s in {word}?", "What is the count of the letter {letter} in {word}?",
    "Looking at {word}, how many {letter}s can you find?", "If I spell {word}, how many {letter}s do I need?",
    "The word {word}: how many {letter}s?", "{word} has how many {letter}s?", "Which number of {letter}s is in {word}?",
    "Are there any {letter}s in {word}, and how many?", "Does {word} contain the letter {letter}? How many times?",
    # requests
    "Count the {letter}s in {word}.", "Count how many {letter}s are in {word}.", "Count the letter {letter} in {word}",
    "Please count every {letter} in the word {word}.", "Could you count the {letter}s in {word} for me?",
    "Can you tell me how many {letter}s {word} has?", "Tell me how many times {letter} is in {word}.",
    "Tell me the number of {letter}s in {word}.", "Find all the {letter}s in {word} and count them.",
    "Give me the count of {letter} in {word}.", "I need to know how many {letter}s there are in {word}.",
    "I am solving a puzzle: how many {letter}s does {word} have?", "My child asks how many {letter}s are in {word}.",
    "Help me count {letter} in {word}", "Quick question: how many {letter}s in {word}?",
    # as typed in a hurry
    "how many {letter} in {word}", "count {letter} in {word}", "{word}: number of {letter}", "{letter}s in {word}?",
    "number of {letter} in {word}", "{letter} count {word}", "how often {letter} in {word}",
    # other languages
    "¿Cuántas {letter} hay en {word}?", "¿Cuántas veces aparece {letter} en {word}?", "Cuenta las {letter} de {word}.",
    "Combien de {letter} y a-t-il dans {word} ?", "Combien de fois trouve-t-on {letter} dans {word} ?",
    "Wie viele {letter} hat {word}?", "Wie oft kommt {letter} in {word} vor?", "Zähle die {letter} in {word}.",
    "Quante {letter} ci sono in {word}?", "Quantas {letter} tem {word}?", "Hoeveel {letter} zitten er in {word}?",
    "Ile liter {letter} jest w słowie {word}?", "Сколько букв {letter} в слове {word}?", "{word} 里有几个 {letter}？",
    "{word} kelimesinde kaç {letter} var?", "{word}に{letter}はいくつありますか？", "{word}에 {letter}가 몇 개 있나요?",
)

QUOTES = ("{}", "{}", "'{}'", '"{}"')  # bare half of the time


def ask(rng, phrases, word, letter=""):
    """One of the phrases, filled in, with or without quotes, sometimes without a capital."""
    phrase = pick(rng, phrases)
    if rng.random() < 0.2:
        phrase = phrase[0].lower() + phrase[1:]
    return phrase.format(word=pick(rng, QUOTES).format(word), letter=pick(rng, QUOTES).format(letter))


# -----------------------------------------------------------------------------
# How the assistant answers


def spell(word: str) -> str:
    """
    After a space, for " bee" and "bee" are different tokens, and in a question it mostly follows a space.

    >>> spell("bee")
    'The word bee is spelled b e e.'
    """
    return f"The word {word} is spelled {' '.join(word)}."


def count_letter(word: str, letter: str) -> list[dict]:
    """The worked solution as parts: spelled, counted along with the running total, checked by a call, answered."""
    totals = [word[: i + 1].count(letter) for i in range(len(word))]
    along = ", ".join(f"{c} {total}" for c, total in zip(word, totals, strict=True))
    total = str(word.count(letter))
    # double quotes: the tokenizer's split cuts 'strawberry into the contraction 's and trawberry
    return [{"type": "text", "text": f"{spell(word)}\nCounting {letter}: {along}.\nThat makes {total}, let me check: "},
            {"type": "python", "text": f'"{word}".count("{letter}")'},
            {"type": "python_output", "text": total},
            {"type": "text", "text": f"\n#### {total}"}]


# -----------------------------------------------------------------------------
# The tasks


class WordTask(Task):
    """What both have in common: a size of one's choice, and the words of one split."""

    def __init__(self, size=1000, split="train", **kwargs):
        super().__init__(**kwargs)
        check_option(self, "split", split, ("train", "test"))
        if size < 0:
            raise UserError(f"{type(self).__name__}(size={size}): need 0 or more")
        self.size, self.split = size, split
        self.words = load_words(find_words())[split]

    def num_examples(self):
        return self.size

    def rng(self, index):
        return random.Random(f"{type(self).__name__}:{self.split}:{index}")  # text, for seeds -1 and 1 are the same


class SimpleSpelling(WordTask):
    def get_example(self, index):
        rng = self.rng(index)
        word = pick(rng, self.words)
        return {"messages": [{"role": "user", "content": ask(rng, SPELL_PHRASES, word)},
                             {"role": "assistant", "content": spell(word)}]}

    def evaluate(self, conversation, completion):
        return completion.strip() == conversation["messages"][-1]["content"]


class SpellingBee(WordTask):
    def get_example(self, index):
        rng = self.rng(index)
        word = pick(rng, self.words)
        letter = pick(rng, ascii_lowercase if rng.random() < ABSENT_FRAC else word)
        return {"messages": [{"role": "user", "content": ask(rng, COUNT_PHRASES, word, letter)},
                             {"role": "assistant", "content": count_letter(word, letter)}]}

    def evaluate(self, conversation, completion):
        """The number after the last #### is the count."""
        return parse_answer(completion) == parse_answer(conversation["messages"][-1]["content"][-1]["text"])
