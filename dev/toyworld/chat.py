"""
What the chat stages read: conversations of one to four exchanges of all kinds, in the shares of EXCHANGES.

An exchange is a list of turns (what the user says, what the model answers); an answer is text or parts (calculate.py).
"""

from dev.toyworld import talk
from dev.toyworld.games import game_exchange
from dev.toyworld.grammar import read_phrases, with_article
from dev.toyworld.memory import memory_conversation, unknown_exchange
from dev.toyworld.persona import load_persona
from dev.toyworld.problems import problem_exchange
from dev.toyworld.spelling import draw_word, spelling_exchange
from dev.toyworld.stories import draw_hero, story, story_exchange
from dev.toyworld.sums import one_sum, sum_exchange
from dev.toyworld.typed import typed, typed_one
from dev.toyworld.village import village_exchange
from tasks.spellingbee import spell

PHRASES = read_phrases("offers")
PERSONA = load_persona("toy")


def small_exchange(rng):
    return talk.small_exchange(rng, PERSONA)


# kind: its share of all exchanges, percent
EXCHANGES = {
    "small talk": (30, small_exchange),
    "facts": (23, talk.fact_exchange),
    "outside the world": (13, talk.outside_exchange),
    "village": (3, village_exchange),
    "sums": (8, sum_exchange),
    "word problems": (8, problem_exchange),
    "spelling": (7, spelling_exchange),
    "stories": (3, story_exchange),
    "games": (4, game_exchange),
    "not told": (1, unknown_exchange),
}
TALK = ["small talk", "facts", "village"]  # kinds whose answers can stand beside another one
MEMORY_SHARE = 0.1  # of the conversations, how many are about remembering
LENGTHS = [1, 1, 1, 2, 2, 3, 4]

GREETINGS = ("hi! |hello! |hey! |hi, |hello, |good morning! |hi there! |hello. |hi |hey |good evening. |Hi! |Hello! |"
             "Hey ").split("|")
THANKS = "thanks! |thank you! |ok thanks. |thanks, |great, thanks. |Thank you. |thx ".split("|")
JOINTS = " and | and |. |? |, and |! | also ".split("|")


def draw_kind(rng, kinds=tuple(EXCHANGES)):
    return rng.choices(kinds, [EXCHANGES[kind][0] for kind in kinds])[0]


def draw_exchange(rng, kinds=tuple(EXCHANGES)):
    """One exchange of any kind, now and then with a greeting or thanks in front, or two wishes in one message."""
    kind = draw_kind(rng, kinds)
    turns = EXCHANGES[kind][1](rng)
    chance = rng.random()
    if chance < 0.05:
        turns[0] = greet(turns[0], kind, rng)
    elif chance < 0.07:
        turns[0] = give_thanks(turns[0], kind, rng)
    elif chance < 0.1 and kind in TALK and len(turns) == 1:
        other = EXCHANGES[draw_kind(rng, TALK)][1](rng)
        turns[0] = join(turns[0], other[0], rng)
    if rng.random() < 0.2:
        turns += take_up(turns, rng)
    return turns


def accept_story(rng):
    return typed_one(PHRASES["yes"], rng, 0.1), story(rng, draw_hero(rng))


def name_hero(rng):
    hero = draw_hero(rng)
    return typed("[|about ]{h}", rng, 0, h=with_article(hero)), story(rng, hero)


def give_word(rng):
    word = draw_word(rng)
    return typed("{exact_w}", rng, 0, exact_w=word), spell(word)


def ask_story(rng):
    return story_exchange(rng)[0]


# the end of an offer: what the user makes of it
OFFERS = {
    "story help?": accept_story,
    "like a story?": accept_story,
    "story be about?": name_hero,
    "me a sum!": one_sum,
    "me a word!": give_word,
    "or spell a word.": ask_story,
}


def take_up(turns, rng):
    """The turn after an offer, if the last answer ends in one."""
    answer = turns[-1][1]
    for ending, make in OFFERS.items():
        if isinstance(answer, str) and answer.endswith(ending):
            return [make(rng)]
    return []


def greet(turn, kind, rng):
    message, answer = turn
    if kind in TALK and not answer.startswith("Hello"):
        answer = f"Hello! {answer}"
    return rng.choice(GREETINGS) + message, answer


def give_thanks(turn, kind, rng):
    message, answer = turn
    if kind in TALK and not answer.startswith("You are welcome"):
        answer = f"You are welcome! {answer}"
    return rng.choice(THANKS) + message, answer


def join(first, second, rng):
    """Two wishes in one message, both answered."""
    message = first[0].rstrip(".?!") + rng.choice(JOINTS) + second[0]
    return message, f"{first[1]} {second[1]}"


def ask_back(rng):
    return talk.say_named(["name", "howareyou", "skills"], rng, PERSONA)


def draw_turns(rng):
    """The turns of a conversation."""
    if rng.random() < MEMORY_SHARE:
        return memory_conversation(rng, draw_exchange, ask_back)
    turns = []
    for _ in range(rng.choice(LENGTHS)):
        turns += draw_exchange(rng)
    return turns


def conversation(turns):
    """[(user, assistant), ...] -> [{role, content}, ...]"""
    messages = []
    for message, answer in turns:
        messages.append({"role": "user", "content": message})
        messages.append({"role": "assistant", "content": answer})
    return messages


def draw_conversation(rng):
    return conversation(draw_turns(rng))
