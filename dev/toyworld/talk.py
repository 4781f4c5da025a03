"""
Ordinary conversation: every intent of the talk files, the facts, and the questions from outside the world.

An exchange is a list of (what the user says, what the model answers). Which intents there are, how they are said and
how often they come is in data/*.txt alone.
"""

from functools import cache

from dev.toyworld.grammar import expand, fill, read_intents, read_phrases
from dev.toyworld.spelling import TRAIN_WORDS
from dev.toyworld.typed import typed, typed_one
from dev.toyworld.village import NAMES

PHRASES = read_phrases("outside")

FRIENDS_TEXT = f"{', '.join(NAMES[:-1])} and {NAMES[-1]}"
SHORT = {"hello", "goodbye", "yes", "no", "maybe", "wow", "thanks", "why", "sure", "blank", "foreign", "code"}
# the end of an answer: intents of what is said next
FOLLOW_UPS = {
    "And you?": ["usergood", "usergood", "usersad", "usertired"],
    "What do you like?": ["userthing", "userlikes"],
    "with you?": ["weathersunny", "weatherbad"],
    "Tell me more.": ["userlikes", "usergood"],
    "Tell me about it.": ["usersad", "userdislikes"],
    "know?": ["skills", "joke"],
}
OUTSIDE_ANSWERS = {
    "": "@dunno",
    "cannot": "@cannot",
    "gibberish": "I do not understand that. I can @offer.",
    "english": "I only speak English. I can @offer.",
}


class Intents:
    """The intents of some data files, drawn by weight, with their tables."""

    def __init__(self, *names):
        self.tables = {}
        self.intents = []
        for name in names:
            tables, intents = read_intents(name)
            self.tables |= tables
            self.intents += intents
        self.weights = [intent["weight"] for intent in self.intents]

    def draw(self, rng):
        return rng.choices(self.intents, self.weights)[0]

    def slots(self, intent, rng):
        """A row of the intent's table, a field `[one|two]` of which may be a choice."""
        if intent["table"] is None:
            return {}
        row = rng.choice(self.tables[intent["table"]])
        return {field: rng.choice(text.split("|")) for field, text in row.items()}

    def fillers(self, template, rng):
        """One value for each table that the template names, as the questions from outside do."""
        slots = {}
        for name, rows in self.tables.items():
            if "{" + name + "}" in template:
                slots[name] = rng.choice(rows)[name]
        return slots


@cache
def small_talk():
    return Intents("talk_self.txt", "talk_small.txt", "talk_village.txt")


@cache
def facts():
    return Intents("facts.txt")


@cache
def outside():
    return Intents("outside.txt")


def frame_of(intent):
    return 0.25 if intent["name"] in SHORT else 1.0


def small_exchange(rng, persona):
    intent = small_talk().draw(rng)
    turns = [say_intent(intent, rng, persona)]
    if rng.random() < 0.4:
        reply = follow_up(turns[0], rng, persona)
        if reply is not None:
            turns.append(reply)
    return turns


def say_intent(intent, rng, persona):
    question = typed_one(intent[">"], rng, frame_of(intent), name=persona["name"])
    answer = expand(rng.choice(intent["<"]), rng).format(friends=FRIENDS_TEXT, **persona)
    return question, answer


def follow_up(turn, rng, persona):
    """What people say next where an answer asks something back: an exchange of one of FOLLOW_UPS, or None."""
    for ending, names in FOLLOW_UPS.items():
        if turn[1].endswith(ending):
            return say_named(names, rng, persona)
    return None


def say_named(names, rng, persona):
    """A turn of one of the intents of small talk with these names."""
    name = rng.choice(names)
    intent = next(intent for intent in small_talk().intents if intent["name"] == name)
    return say_intent(intent, rng, persona)


def fact_exchange(rng):
    source = facts()
    intent = source.draw(rng)
    slots = source.slots(intent, rng)
    question = typed_one(intent[">"], rng, **slots)
    return [(question, fill(expand(rng.choice(intent["<"]), rng), **slots))]


def fact_sheet(rng):
    """Six facts as sentences: for pretraining."""
    source = facts()
    sentences = []
    for _ in range(6):
        intent = source.draw(rng)
        template = expand(rng.choice(intent["<"]), rng)
        sentences.append(fill(template, **source.slots(intent, rng)))
    return " ".join(sentences)


def nonsense(rng):
    template = rng.choice(PHRASES["nonsense"])
    p, q, r = (rng.choice(TRAIN_WORDS) for _ in range(3))
    return typed(template, rng, 0.7, p=p, q=q, r=r)


def mash(rng):
    """Letters of a cat on the keyboard."""
    return "".join(rng.choice("asdfghjklqwertyuiopzxcvbnm") for _ in range(rng.randint(3, 12)))


def outside_exchange(rng):
    kind = rng.random()
    if kind < 0.2:
        return [(nonsense(rng), expand(OUTSIDE_ANSWERS[""], rng))]
    if kind < 0.23:
        return [(mash(rng), expand(OUTSIDE_ANSWERS["gibberish"], rng))]
    source = outside()
    intent = source.draw(rng)
    template = rng.choice(intent[">"])
    question = typed(template, rng, frame_of(intent), **source.fillers(template, rng))
    flag = next((flag for flag in intent["flags"] if flag in OUTSIDE_ANSWERS), "")
    return [(question, expand(OUTSIDE_ANSWERS[flag], rng))]
