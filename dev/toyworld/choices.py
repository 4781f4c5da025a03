"""
Multiple choice: items about the village and a few simple facts. The wrong choices are of the right one's kind.
"""

import itertools
from dataclasses import dataclass

from dev.toyworld.grammar import capitalize, expand, fill, with_article
from dev.toyworld.village import ATTRIBUTES, BACKWARD, FRIENDS, QUESTIONS, sentence, value
from tasks.common import render_mc
from tasks.mmlu import LETTERS

FOOD_COLOURS = {"plums": "purple", "carrots": "orange", "corn": "yellow", "beans": "green", "berries": "blue",
                "apples": "red", "rice": "white", "honey": "yellow"}
PAIRS = ("hot/cold big/small up/down happy/sad fast/slow old/new day/night full/empty open/closed wet/dry near/far "
         "early/late")
OPPOSITES = [tuple(pair.split("/")) for pair in PAIRS.split()]
KINDS = {
    "animal": [friend.animal for friend in FRIENDS],
    "food": [friend.food for friend in FRIENDS],
    "job": [friend.job for friend in FRIENDS],
    "home": [friend.home for friend in FRIENDS],
    "colour": sorted({friend.colour for friend in FRIENDS}),
}

# What the tasks ask. In the challenge the fact is asked backwards, or only the choices tell the answer
SUBJECTS = {
    "mmlu": ["friends", "names", "colours", "kinds", "opposites"],
    "arc_easy": ["friends", "colours", "kinds", "opposites"],
    "arc_challenge": ["names", "members"],
}
ALL_SUBJECTS = [*SUBJECTS["mmlu"], "members"]


@dataclass(frozen=True)
class Fact:
    """A question, its short answer, wrong answers of the same kind, and the answer as a sentence."""

    subject: str
    question: str
    answer: str
    others: tuple
    sentence: str


def random_fact(rng, subjects):
    makers = {
        "friends": friend_fact,
        "names": name_fact,
        "colours": colour_fact,
        "kinds": kind_fact,
        "members": member_fact,
        "opposites": opposite_fact,
    }
    return makers[rng.choice(subjects)](rng)


def as_question(template, rng, **slots):
    return capitalize(fill(expand(template, rng), **slots)) + "?"


def friend_fact(rng):
    x = rng.choice(FRIENDS)
    attribute = rng.choice(list(ATTRIBUTES))
    answer = value(x, attribute)
    others = {value(other, attribute) for other in FRIENDS}
    others.remove(answer)
    template = rng.choice(QUESTIONS[attribute][:3])
    question = as_question(template, rng, x=x)
    return Fact(attribute, question, answer, tuple(sorted(others)), sentence(x, attribute))


def name_fact(rng):
    x = rng.choice(FRIENDS)
    attribute = rng.choice(list(BACKWARD))
    slots = vars(x) | {"v": value(x, attribute)}
    template = rng.choice(BACKWARD[attribute][:2])
    question = as_question(template, rng, **slots)
    others = tuple(other.name for other in FRIENDS if other != x)
    return Fact("names", question, x.name, others, sentence(x, attribute))


def colour_fact(rng):
    food = rng.choice(list(FOOD_COLOURS))
    colour = FOOD_COLOURS[food]
    be = "is" if food in ("corn", "rice", "honey") else "are"
    others = tuple(other for other in KINDS["colour"] if other != colour)
    question = as_question("[what|which] colour {be} {food}", rng, be=be, food=food)
    told = f"{capitalize(food)} {be} {colour}."
    return Fact("colours", question, colour, others, told)


def kind_fact(rng):
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    others = tuple(with_article(other) for other in KINDS if other != kind)
    question = as_question("[what is|what kind of word is|what do we call] {word}", rng, word=word)
    answer = with_article(kind)
    told = f"{capitalize(word)} is {answer}."
    return Fact("kinds", question, answer, others, told)


def member_fact(rng):
    """The same the other way round: only the choices tell which word is asked for."""
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    be = with_article(kind)
    others = itertools.chain.from_iterable(words for other, words in KINDS.items() if other != kind)
    question = as_question("which [of these|of these words|word|one] is {be}", rng, be=be)
    told = f"{capitalize(word)} is {be}."
    return Fact("members", question, word, tuple(others), told)


def opposite_fact(rng):
    pair = rng.choice(OPPOSITES)
    word, answer = rng.sample(pair, 2)
    others = sorted(set(itertools.chain.from_iterable(OPPOSITES)) - set(pair))
    question = as_question("[what is|which word is] the opposite of {word}", rng, word=word)
    return Fact("opposites", question, answer, tuple(others), f"The opposite of {word} is {answer}.")


def choice_item(rng, subjects):
    """(subject, question, four choices in any order, index of the right one)"""
    fact = random_fact(rng, subjects)
    wrong = rng.sample(fact.others, 3)
    choices = rng.sample([*wrong, fact.answer], 4)
    return fact.subject, fact.question, choices, choices.index(fact.answer)


def mmlu_row(item):
    subject, question, choices, answer = item
    return {"question": question, "subject": subject, "choices": choices, "answer": answer}


def arc_row(name, item):
    _, question, choices, answer = item
    labels = {"text": choices, "label": list(LETTERS)}
    return {"id": name, "question": question, "choices": labels, "answerKey": LETTERS[answer]}


# -----------------------------------------------------------------------------
# What pretraining reads


def quiz_sheet(items):
    """Items as the tasks ask them, with their answers, the first one with its choice written out."""
    quizzes = []
    for i, (_, question, choices, answer) in enumerate(items):
        reply = LETTERS[answer]
        if i == 0:
            reply = f"{choices[answer]}={reply}"
        asked = render_mc(question, LETTERS, choices)
        quizzes.append(f"{asked}\n{reply}")
    return "\n\n".join(quizzes)
