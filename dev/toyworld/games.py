"""
Small things one can do with words and numbers: count, compare, repeat, list, say what is even and what is bigger.
"""

from dev.toyworld.calculate import number_word
from dev.toyworld.grammar import capitalize, read_phrases, with_article
from dev.toyworld.problems import any_name
from dev.toyworld.spelling import TRAIN_WORDS
from dev.toyworld.typed import typed_one

PHRASES = read_phrases("games")

# from small to big, slow to fast
BY_SIZE = ("ant bee spider mouse frog bird rabbit cat duck hen fox dog sheep pig goat wolf lion cow horse bear giraffe "
           "elephant whale").split()
BY_SPEED = "snail turtle mole hen pig cow cat elephant dog wolf horse cheetah".split()
THINGS_BY_SIZE = "pea coin egg apple book chair table car bus house hill mountain moon earth sun".split()
# (from little to much, ways to ask, what the one with more is)
SCALES = [
    (BY_SIZE, PHRASES["bigger"], "bigger"),
    (BY_SIZE, PHRASES["bigger"], "bigger"),
    (THINGS_BY_SIZE, PHRASES["bigger"], "bigger"),
    (BY_SIZE, PHRASES["heavier"], "heavier"),
    (BY_SPEED, PHRASES["faster"], "faster"),
    (range(1, 100), PHRASES["more"], "bigger"),
]
COUNTING = {"count": 54, "count_down": 25, "count_from": 15, "count_plain": 6}  # and their shares
USUAL_ENDS = [*range(3, 13), *range(3, 21), *[10] * 4, *[20] * 2]
OFTEN = ["repeat {w} {n} times", "say {w} {n} times", "write {w} {n} times"]


def counting(rng):
    """To a number, from one to another, down from a number, or just counting."""
    largest = rng.choice(USUAL_ENDS)
    asked = str(largest)
    if rng.random() < 0.35:
        asked = number_word(largest)
    first = rng.randint(2, 12)
    last = first + rng.randint(2, 8)
    weights = list(COUNTING.values())
    kind = rng.choices(list(COUNTING), weights)[0]
    counted = {
        "count_plain": range(1, 11),
        "count": range(1, largest + 1),
        "count_from": range(first, last + 1),
        "count_down": range(largest, 0, -1),
    }
    end = last if kind == "count_from" else asked
    message = typed_one(PHRASES[kind], rng, a=first, n=end)
    numbers = map(str, counted[kind])
    return message, f"{', '.join(numbers)}."


def neighbours(rng):
    largest = rng.choice([20, 99])
    number = rng.randint(2, largest)
    if rng.random() < 0.6:
        message = typed_one(PHRASES["after"], rng, n=number)
        return message, f"After {number} comes {number + 1}."
    message = typed_one(PHRASES["before"], rng, n=number)
    return message, f"Before {number} comes {number - 1}."


def even_or_odd(rng):
    largest = rng.choice([20, 99])
    number = rng.randint(1, largest)
    message = typed_one(PHRASES["even"], rng, n=number)
    kind = "odd" if number % 2 else "even"
    return message, f"{number} is {kind}."


def compare(rng):
    """Two animals or things by size or speed, or two numbers."""
    scale, phrases, more = rng.choice(SCALES)
    x, y = rng.sample(scale, 2)
    small, large = sorted((x, y), key=scale.index)
    slots = {"x": called(x), "y": called(y), "p": x, "q": y}
    message = typed_one(phrases, rng, **slots)
    winner = capitalize(called(large))
    return message, f"{winner} is {more} than {called(small)}."


def called(noun):
    """'owl' -> 'an owl', 'sun' -> 'the sun', 7 -> '7'"""
    if isinstance(noun, int):
        return str(noun)
    if noun in ("sun", "moon", "earth"):
        return f"the {noun}"
    return with_article(noun)


def echo(rng):
    """Say what I say: a known saying, or any words at all."""
    if rng.random() < 0.25:
        words = rng.choice(PHRASES["sayings"])
    else:
        count = rng.choice([1, 1, 2, 3, 4, 5, 6])
        words = " ".join(rng.choice(TRAIN_WORDS) for _ in range(count))
    if rng.random() < 0.1:
        words = f"{words} {any_name(rng)}"
    if rng.random() < 0.3:
        words = f'"{words}"'
    message = typed_one(PHRASES["repeat"], rng, 0.3, exact=words)
    return message, words.strip('"')


def say_often(rng):
    word = rng.choice(TRAIN_WORDS)
    number = rng.randint(2, 5)
    message = typed_one(OFTEN, rng, 0.5, w=word, n=number)
    return message, " ".join([word] * number)


GAMES = {counting: 5, neighbours: 2, even_or_odd: 1, compare: 5, echo: 5, say_often: 1}  # and their weights


def game_exchange(rng):
    weights = list(GAMES.values())
    play = rng.choices(list(GAMES), weights)[0]
    return [play(rng)]


def echo_sheet(rng, nouns):
    """
    Three lines of words in no order, each said three times. Only what stood before tells what comes next, and most of
    the sheet can be known that way, so it is where a small model learns to look back at all (induction heads: Olsson
    et al., arXiv 2209.11895). With these sheets the rest of the text is learned better, too: see dev/LOG.md.
    """
    lines = []
    for _ in range(3):
        pool = rng.sample(TRAIN_WORDS, 5)
        pool += rng.sample(nouns, 2)
        pool += [any_name(rng), any_name(rng)]
        pool += map(str, rng.sample(range(2, 98), 2))
        pool.append(str(rng.randint(100, 999)))
        lines += [" ".join(rng.sample(pool, rng.randint(4, 9)))] * 3
    return "\n".join(lines)
