"""
Templates, tables and random choice: what all other modules are written with.

A template is a string: `[one|two]` is a choice (choices nest), `{name}` a slot that is filled in later, and `@word` a
macro of MACROS:

    >>> fill(expand("[hi|hello] {name}", Rng(1)), name="Ann")
    'hello Ann'
"""

import functools
import random
import re
from pathlib import Path

from tasks.spellingbee import is_test_word

DATA = Path(__file__).parent / "data"

MACROS = {
    "@tell": "[can you tell me|could you tell me|please tell me|tell me|do you know|i want to know|"
             "i would like to know|let me know|any idea]",
    "@can": "[can you|could you|will you|would you|can you please|could you please|please]",
    "@dunno": "I do not know that. I can @offer.",
    "@cannot": "I cannot do that. I can @offer.",
    "@offer": "tell a story, do a sum or spell a word",
}
# Plurals that are not the singular with an s, as the templates write them
PLURALS = {"mouses": "mice", "gooses": "geese", "sheeps": "sheep", "deers": "deer", "wolfs": "wolves",
           "calfs": "calves", "fishs": "fish", "butterflys": "butterflies", "ponys": "ponies", "babys": "babies",
           "flys": "flies", "persons": "people", "policemans": "policemen", "firemans": "firemen",
           "postmans": "postmen", "foxs": "foxes", "ostrichs": "ostriches", "walruss": "walruses",
           "octopuss": "octopuses", "lynxs": "lynxes"}
PLURAL = re.compile(rf"\b({'|'.join(PLURALS)})\b")
ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])(?!uni|one\b|eu|uku|use|are\b|is\b|in\b|appear|occur|and\b|or\b)")
SINGLE = re.compile(r"\bone (nose|heart|head|tail|horn)s\b")


class Rng(random.Random):
    """A source of random numbers that knows for which split ("train" or "test") it draws."""

    split = "train"


class Pool:
    """
    Words of one kind. One in ten is for the test split alone, which draws nothing else; the hash is that of
    tasks/spellingbee.py. The first `keep` words, the commonest, are always for training.
    """

    def __init__(self, words, keep=0):
        self.words = list(words)
        self.test = [word for word in self.words[keep:] if is_test_word(word)]
        held = set(self.test)
        self.train = [word for word in self.words if word not in held]

    def draw(self, rng):
        return rng.choice(self.test if rng.split == "test" else self.train)


def read_words(name):
    """The words of a data file, in its order, each once."""
    return list(dict.fromkeys((DATA / name).read_text(encoding="utf-8").split()))


def read_phrases(section):
    """{name: phrases} of a section of data/phrases.txt"""
    phrases = {}
    name = None
    for line in (DATA / "phrases.txt").read_text(encoding="utf-8").splitlines():
        header = re.fullmatch(r"# (\w+) (\w+)", line)
        if header:
            name = header[2] if header[1] == section else None
        elif name and line.startswith("> "):
            phrases[name] = line[2:].split(" / ")
    return phrases


# -----------------------------------------------------------------------------
# Templates


def expand(template, rng):
    """Replace the macros and pick one of every `[a|b]`. Slots stay as they are."""
    return _choose(_parse(template), rng)


@functools.cache
def _parse(template):
    """'a[b|c]' -> ('a', [('b',), ('c',)]): text, and lists of alternatives that are templates themselves."""
    while "@" in template:
        replaced = re.sub("@[a-z]+", lambda match: MACROS.get(match[0], match[0]), template)
        if replaced == template:
            break
        template = replaced
    stack = [[[]]]  # for each open bracket its alternatives, each a list of parts
    for piece in re.split(r"([\[\]|])", template):
        if piece == "[":
            stack.append([[]])
        elif piece == "]" and len(stack) > 1:
            alternatives = [tuple(parts) for parts in stack.pop()]
            stack[-1][-1].append(alternatives)
        elif piece == "|" and len(stack) > 1:
            stack[-1].append([])
        elif piece:
            stack[-1][-1].append(piece)
    return tuple(stack[0][0])


def _choose(parts, rng):
    pieces = []
    for part in parts:
        if isinstance(part, str):
            pieces.append(part)
        else:
            pieces.append(_choose(part[int(rng.random() * len(part))], rng))
    return "".join(pieces)


def repair(text):
    """`a owl` -> `an owl`, `mouses` -> `mice`, `one noses` -> `one nose`."""
    text = PLURAL.sub(lambda match: PLURALS[match[0]], text)
    text = SINGLE.sub(r"one \1", text)
    return ARTICLE.sub(r"\1n ", text)


def capitalize(text):
    """The first letter only; the rest stays as it is."""
    return text[:1].upper() + text[1:]


class Slots(dict):
    """What fills a template; the slot `Word` is the slot `word` with a capital, for the start of a sentence."""

    def __missing__(self, name):
        lower = name[0].lower() + name[1:]
        if lower == name:
            raise KeyError(name)
        return capitalize(str(self[lower]))


def fill(text, **slots):
    return repair(text.format_map(Slots(slots)))


def with_article(noun):
    """'owl' -> 'an owl'; a name or a word with its article stays."""
    if noun[0].isupper() or noun.startswith(("the ", "a ", "an ", "my ")):
        return noun
    return repair(f"a {noun}")


# -----------------------------------------------------------------------------
# Data files of intents


def read_intents(name):
    """
    (tables, intents) of a data file. `@ name: field field` begins a table, whose rows follow, divided by `;` and their
    fields by `=`. `# name : table xN flag` begins an intent of weight N; its lines begin with > (ways to say it), <
    (answers) or ! (phrases one of which a right answer has), each divided by ` / `.
    """
    tables = {}
    intents = []
    fields = None  # of the table that the next line belongs to
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "@":
            table, _, names = rest.partition(":")
            fields = names.split()
            tables[table] = []
        elif kind == "#" and re.fullmatch(r"[a-z_]+( .*)?", rest) and len(rest) < 40:
            intents.append(read_header(rest))
        elif kind in (">", "<", "!") and intents:
            intents[-1][kind] += [part for part in rest.split(" / ") if part.strip()]
        elif fields and line.strip():
            for row in line.split(";"):
                values = [value.strip() for value in row.split("=", len(fields) - 1)]
                tables[table].append(dict(zip(fields, values, strict=True)))
        else:
            fields = None
    return tables, [intent for intent in intents if intent[">"]]


def read_header(text):
    """'capital : capitals x8 outside' -> the intent's name, table, weight and flags."""
    name, _, rest = text.partition(" ")
    intent = {"name": name, "table": None, "weight": 2.0, "flags": set(), ">": [], "<": [], "!": []}
    words = rest.split()
    if words[:1] == [":"]:
        intent["table"] = words[1]
        words = words[2:]
    for word in words:
        if re.fullmatch(r"x\d+", word):
            intent["weight"] = float(word[1:])
        else:
            intent["flags"].add(word)
    return intent
