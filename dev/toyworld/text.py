"""
What pretraining reads: documents of stories, facts, talk, sums and letters as plain text, in the shares of DOCUMENTS.

A document is (text, keys of the items that it is made of): an item that is held out is in no document.
"""

from dev.toyworld import choices, talk
from dev.toyworld.calculate import to_text
from dev.toyworld.chat import draw_turns
from dev.toyworld.draws import choice_keys, message_keys, normalize
from dev.toyworld.games import echo_sheet
from dev.toyworld.problems import THINGS, draw_problem
from dev.toyworld.spelling import spelling_sheet
from dev.toyworld.stories import draw_hero, story
from dev.toyworld.sums import one_sum
from dev.toyworld.village import FRIENDS, fact_sheet


def plain(make):
    """A document that holds no item of any task."""
    def document(rng):
        return make(rng), []
    return document


def dialogue(rng):
    """Conversations, the user's lines marked by `>`."""
    lines = []
    keys = []
    while len(lines) < 6:
        for message, answer in draw_turns(rng):
            lines += [f"> {message}", to_text(answer)]
            keys += message_keys(message)
    return "\n".join(lines), keys


def stories(rng):
    return "\n\n".join(story(rng, draw_hero(rng)) for _ in range(3))


def village_story(rng):
    """A fact sheet of the village, and a story of one of its friends."""
    friend = rng.choice(FRIENDS)
    return f"{fact_sheet(rng)}\n{story(rng, friend.animal)}"


def facts(rng):
    return f"{talk.fact_sheet(rng)} {talk.fact_sheet(rng)}"


def worked(rng):
    """Word problems and sums with their solutions."""
    blocks = []
    keys = []
    for _ in range(4):
        problem = draw_problem(rng)
        question, answer = one_sum(rng)
        blocks += [f"{problem.question}\n{to_text(problem.parts)}", f"{question}\n{to_text(answer)}"]
        keys += [normalize(problem.question), normalize(question)]
    return "\n\n".join(blocks), keys


def quiz(rng):
    items = [choices.choice_item(rng, choices.SUBJECTS["mmlu"]) for _ in range(3)]
    return choices.quiz_sheet(items), [choice_keys(item) for item in items]


def echo(rng):
    return echo_sheet(rng, THINGS.train)


# kind: (its share of all documents, percent, its maker)
DOCUMENTS = {
    "dialogues": (52, dialogue),
    "stories": (8, plain(stories)),
    "echoes": (9, plain(echo)),
    "spelled words": (10, plain(spelling_sheet)),
    "worked problems": (6, worked),
    "quizzes": (2, quiz),
    "the village": (5, plain(village_story)),
    "facts": (8, plain(facts)),
}


def draw_document(rng):
    kinds = list(DOCUMENTS)
    kind = rng.choices(kinds, [DOCUMENTS[name][0] for name in kinds])[0]
    return DOCUMENTS[kind][1](rng)
