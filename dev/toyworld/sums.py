"""
Sums in every notation: "12 + 35", "12+35=", "what's 7 times 8", "half of 20", "three plus four", two steps.

The kinds of sums and the ways to write them are in data/sums.txt, the frames around them in data/phrases.txt.
"""

import re

from dev.toyworld.calculate import number_word, result_of, solve
from dev.toyworld.grammar import DATA, expand, read_phrases
from dev.toyworld.typed import typed, typed_one


def read_sums():
    """({kind: (weight, expression, noun phrases, whole messages)}, {expression of a next step: messages})"""
    kinds = {}
    steps = {}
    text = (DATA / "sums.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        header = re.fullmatch(r"# (\w+) (\d+) (\S+)", line)
        sign, _, rest = line.partition(" ")
        if header:
            kinds[header[1]] = [float(header[2]), header[3]]
        elif sign == "+":
            steps[rest] = []
        elif sign in (">", "!") and steps:
            steps[list(steps)[-1]] += rest.split("; ")
        elif sign in (">", "!"):
            kinds[list(kinds)[-1]].append(rest.split("; "))
    return kinds, steps


SURE = "[Yes, I worked it out with a calculator.|Yes. My calculator did the sum.]"
KINDS, NEXT_STEPS = read_sums()
PHRASES = read_phrases("sums")
PRODUCTS = ("multiply", "multiply_add", "multiply_subtract", "brackets", "add_multiply")
SIMPLE = ("add", "subtract", "multiply", "add_add")  # kinds that are also asked with small numbers and decimals
PARTS = {"half": 2, "third": 3, "quarter": 4}
ROUND_NUMBERS = list(map(int, "100 150 200 250 300 400 500 600 750 800 1000 1000 1200 1500 2000 5000 10000".split()))
USUAL_PERCENTS = list(map(int, "5 10 15 20 25 30 40 50 60 75 80".split()))


def any_number(rng, largest=999):
    """One to three digits, each length often enough to learn."""
    limit = rng.choice([9, 12, 20, 50, 99, 99, 99, largest])
    if limit == 999 and rng.random() < 0.3:
        return rng.choice(ROUND_NUMBERS)
    if limit == 999 and rng.random() < 0.1:
        return rng.randint(1000, 9999)
    return rng.randint(1, min(limit, largest))


def draw_numbers(kind, rng):
    """Numbers for a kind of sum; most divisions come out even, most differences are positive."""
    a = any_number(rng)
    b = any_number(rng)
    c = any_number(rng, 50)
    if kind in PRODUCTS and rng.random() < 0.7:
        b = rng.randint(2, 12)
        c = rng.randint(2, 20)
    if kind.startswith("subtract") and rng.random() < 0.9:
        b, a = sorted((a, b))
    if kind == "divide":
        largest = rng.choice([12, 12, 12, 12, 60])
        b = rng.randint(2, largest)
        if rng.random() < 0.85:
            a = b * rng.randint(2, 30)
    if rng.random() < 0.8:
        a *= PARTS.get(kind, 1)
    if kind == "percent":
        a = rng.choice(USUAL_PERCENTS)
        if rng.random() < 0.5:
            b = 10 * rng.randint(2, 50)
    if kind == "less":
        a, b = sorted((a, b))
    return {"a": a, "b": b, "c": c}


def write_numbers(form, numbers, rng):
    """Digits, or words where the form itself is in words and all of its numbers are small."""
    small = all(number in range(21) for number in numbers.values())
    in_words = small and rng.random() < 0.4
    if in_words and not re.search(r"[-+*/=%÷×:(x]|number", form):
        return {name: number_word(number) for name, number in numbers.items()}
    return numbers


def one_sum(rng):
    """(question, answer)"""
    weights = [row[0] for row in KINDS.values()]
    kind = rng.choices(list(KINDS), weights)[0]
    numbers = draw_numbers(kind, rng)
    _, expression, phrases, messages = KINDS[kind]
    whole = rng.random() < 0.25
    form = rng.choice(messages if whole else phrases)
    if kind in SIMPLE and rng.random() < 0.2:  # a small sum is the likeliest to be told in words
        numbers = {name: 1 + number % 20 for name, number in numbers.items()}
    if kind in SIMPLE and rng.random() < 0.03:
        added = rng.choice([0.5, 0.2, 0.25])
        numbers = {name: number + added for name, number in numbers.items()}

    asked = {name: numbers[name] for name in re.findall(r"\{([abc])\}", form)}
    told = write_numbers(form, asked, rng)
    template = form
    if not whole:
        template = rng.choice(PHRASES["frames"]).replace("{e}", form)
    question = typed(template, rng, 0.7, **told)
    return question, solve("", expression.format(**numbers))


def sum_exchange(rng):
    """A sum, and now and then a step that goes on from it or a doubt."""
    question, answer = one_sum(rng)
    turns = [(question, answer)]
    result = result_of(answer)
    while rng.random() < 0.2 and result.isdigit() and len(turns) < 3:
        expression = rng.choice(list(NEXT_STEPS))
        number = any_number(rng, 50)
        template = rng.choice(NEXT_STEPS[expression])
        message = typed(template, rng, 0.2, n=number)
        answer = solve("", expression.format(r=result, n=number))
        turns.append((message, answer))
        result = result_of(answer)
    if rng.random() < 0.07:
        doubt = typed_one(PHRASES["checks"], rng, 0.3)
        turns.append((doubt, expand(SURE, rng)))
    return turns
