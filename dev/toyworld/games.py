"""
Small things one can do with words and numbers: count, compare, repeat, list, say what is even and what is bigger.
"""

from dev.toyworld.calculate import number_word
from dev.toyworld.grammar import capitalize, with_article
from dev.toyworld.problems import any_name
from dev.toyworld.spelling import TRAIN_WORDS
from dev.toyworld.typed import typed

# from small to big, slow to fast
BY_SIZE = ("ant bee spider mouse frog bird rabbit cat duck hen fox dog sheep pig goat wolf lion cow horse bear giraffe "
           "elephant whale").split()
BY_SPEED = "snail turtle mole hen pig cow cat elephant dog wolf horse cheetah".split()
THINGS_BY_SIZE = "pea coin egg apple book chair table car bus house hill mountain moon earth sun".split()
COUNT = ("count to {n} / count up to {n} / count from 1 to {n} / can you count to {n} / please count to {n} / "
         "count till {n} / count until {n} / count from one to {n} / list the numbers from 1 to {n} / "
         "say the numbers up to {n} / i want you to count to {n} / numbers from 1 to {n} / tell me the numbers to {n}").split(" / ")
COUNT_FROM = ("count from {a} to {n} / numbers from {a} to {n} / list the numbers from {a} to {n} / "
              "can you count from {a} to {n} / say the numbers from {a} to {n}").split(" / ")
COUNT_DOWN = ("count down from {n} / count backwards from {n} / count down from {n} to 1 / countdown from {n} / "
              "count backwards from {n} to 1 / do a countdown from {n} / can you count backwards from {n}").split(" / ")
COUNT_PLAIN = "count / can you count / count for me / please count / count some numbers / do you know numbers".split(" / ")
AFTER = ("what comes after {n} / what number comes after {n} / which number is after {n} / what is the next number after {n} / "
         "what is after {n} / the number after {n} / which number comes next after {n} / what follows {n}").split(" / ")
BEFORE = ("what comes before {n} / what number comes before {n} / which number is before {n} / what is before {n} / "
          "the number before {n}").split(" / ")
EVEN = ("is {n} even or odd / is {n} even / is {n} odd / is {n} an even number / is {n} an odd number / "
        "is the number {n} even or odd / {n} even or odd / @tell if {n} is even").split(" / ")
BIGGER = ("what is bigger, {x} or {y} / which is bigger, {x} or {y} / who is bigger, {x} or {y} / is {x} bigger than {y} / "
          "is {x} smaller than {y} / what is larger, {x} or {y} / which is smaller, {x} or {y} / what is smaller, {x} or {y} / "
          "which one is bigger, {x} or {y} / {x} or {y}, which is bigger / @tell which is bigger, {x} or {y} / "
          "is {x} larger than {y} / bigger: {x} or {y} / which is larger, {x} or {y} / compare {x} and {y}").split(" / ")
FASTER = ("what is faster, {x} or {y} / which is faster, {x} or {y} / is {x} faster than {y} / who is faster, {x} or {y} / "
          "is {x} slower than {y} / which is slower, {x} or {y} / who runs faster, {x} or {y}").split(" / ")
MORE = ("what is bigger, {x} or {y} / which is bigger, {x} or {y} / which number is bigger, {x} or {y} / is {x} more than {y} / "
        "is {x} bigger than {y} / what is more, {x} or {y} / which is more, {x} or {y} / which number is larger, {x} or {y} / "
        "is {x} less than {y} / is {x} greater than {y} / what is larger, {x} or {y}").split(" / ")
REPEAT = ("repeat after me: {exact} / say {exact} / repeat: {exact} / say: {exact} / please say {exact} / can you say {exact} / "
          "repeat {exact} / write {exact} / repeat the words {exact} / say the words {exact} / repeat this: {exact} / "
          "could you say {exact} / can you repeat {exact} / say after me: {exact} / write: {exact} / echo {exact} / "
          "just say {exact} / type {exact} / now say {exact} / say it: {exact} / please repeat after me: {exact}").split(" / ")
SAYINGS = ("hello/good morning/i love cake/the sky is blue/yes/no/banana/i am a robot/tea is good/cats are nice/hello world/"
           "good night/my dog is big/we are friends/bread and butter/one two three/happy birthday/cheese/i like you/"
           "thank you/the cat sat on the mat/goodbye/red lorry yellow lorry/la la la/i am happy").split("/")
RHYTHM = {"repeat {w} {n} times": " ", "say {w} {n} times": " ", "write {w} {n} times": " "}


def counting(rng):
    kind = rng.random()
    largest = rng.choice([3, 5, 10, 10, 10, 10, 12, 15, 20, 20, rng.randint(3, 20)])
    asked = number_word(largest) if rng.random() < 0.35 else str(largest)
    if kind < 0.06:
        return typed(rng.choice(COUNT_PLAIN), rng), listed(range(1, 11))
    if kind < 0.6:
        return typed(rng.choice(COUNT), rng, n=asked), listed(range(1, largest + 1))
    if kind < 0.75:
        first = rng.randint(2, 12)
        last = first + rng.randint(2, 8)
        return typed(rng.choice(COUNT_FROM), rng, a=first, n=last), listed(range(first, last + 1))
    return typed(rng.choice(COUNT_DOWN), rng, n=asked), listed(range(largest, 0, -1))


def listed(numbers):
    return ", ".join(map(str, numbers)) + "."


def neighbours(rng):
    number = rng.randint(2, rng.choice([20, 99]))
    if rng.random() < 0.6:
        return typed(rng.choice(AFTER), rng, n=number), f"After {number} comes {number + 1}."
    return typed(rng.choice(BEFORE), rng, n=number), f"Before {number} comes {number - 1}."


def even_or_odd(rng):
    number = rng.randint(1, rng.choice([20, 99]))
    return typed(rng.choice(EVEN), rng, n=number), f"{number} is {'odd' if number % 2 else 'even'}."


def compare(rng):
    """Two animals or things by size or speed, or two numbers."""
    scale, phrases, more = rng.choice([(BY_SIZE, BIGGER, "bigger"), (BY_SIZE, BIGGER, "bigger"),
                                       (THINGS_BY_SIZE, BIGGER, "bigger"), (BY_SPEED, FASTER, "faster"),
                                       (range(1, 100), MORE, "bigger")])
    x, y = rng.sample(scale, 2)
    large, small = (x, y) if scale.index(x) > scale.index(y) else (y, x)
    if isinstance(x, int):
        return typed(rng.choice(phrases), rng, x=x, y=y), f"{large} is bigger than {small}."
    names = {noun: with_article(noun) for noun in (x, y)}
    for noun in ("sun", "moon", "earth"):
        names[noun] = f"the {noun}"
    answer = f"{capitalize(names[large])} is {more} than {names[small]}."
    return typed(rng.choice(phrases), rng, x=names[x], y=names[y]), answer


def echo(rng):
    """Say what I say: a known saying, or any words at all."""
    if rng.random() < 0.25:
        words = rng.choice(SAYINGS)
    else:
        count = rng.choice([1, 1, 2, 3, 4, 5, 6])
        words = " ".join(rng.choice(TRAIN_WORDS) for _ in range(count))
    if rng.random() < 0.1:
        words = f"{words} {any_name(rng)}"
    if rng.random() < 0.3:
        words = f'"{words}"'
    return typed(rng.choice(REPEAT), rng, 0.3, exact=words), words.strip('"')


def say_often(rng):
    word = rng.choice(TRAIN_WORDS)
    number = rng.randint(2, 5)
    template = rng.choice(list(RHYTHM))
    return typed(template, rng, 0.5, w=word, n=number), " ".join([word] * number)


def game_exchange(rng):
    play = rng.choices([counting, neighbours, even_or_odd, compare, echo, say_often], [5, 2, 1, 5, 5, 1])[0]
    return [play(rng)]


def echo_sheet(rng, nouns):
    """
    Three lines of words in no order, each said three times. Only what stood before tells what comes next, and most of
    the sheet can be known that way, so it is where a small model learns to look back at all (induction heads: Olsson
    et al., arXiv 2209.11895). With these sheets the rest of the text is learned better, too: see dev/LOG.md.
    """
    lines = []
    for _ in range(3):
        pool = [*rng.sample(TRAIN_WORDS, 5), *rng.sample(nouns, 2), any_name(rng), any_name(rng),
                *map(str, rng.sample(range(2, 98), 2)), str(rng.randint(100, 999))]
        lines += [" ".join(rng.sample(pool, rng.randint(4, 9)))] * 3
    return "\n".join(lines)
