"""
Sums in every notation: "12 + 35", "12+35=", "what's 7 times 8", "half of 20", "three plus four", two steps.

FORMS has a row for each kind of sum: (weight, what is calculated, ways to write it). `{a}` and `{b}` are numbers, written
in digits or, small ones, in words. The calculator's expression has the numbers in the order in which it needs them.
"""

from dev.toyworld.calculate import number_word, result_of, solve
from dev.toyworld.grammar import expand
from dev.toyworld.typed import typed

# kind: (weight, expression, noun phrases ("what is ..."), whole messages)
FORMS = {
    "add": (10, "{a}+{b}",
            "{a} + {b}; {a}+{b}; {a} plus {b}; {a} + {b}; {a}+{b}; {a} plus {b}; {a} and {b}; the sum of {a} and {b}; "
            "{a} added to {b}; {a} and {b} together; the total of {a} and {b}",
            "add {a} and {b}; add {a} to {b}; sum of {a} and {b}; sum {a} and {b}; add up {a} and {b}; "
            "add {a} + {b}; what do you get if you add {a} and {b}; {a} + {b} =; {a}+{b}=; {a} + {b} = ?; "
            "put {a} and {b} together"),
    "subtract": (9, "{a}-{b}",
                 "{a} - {b}; {a}-{b}; {a} minus {b}; {a} - {b}; {a}-{b}; {a} minus {b}; {a} take away {b}; "
                 "{a} less {b}; the difference between {a} and {b}; the difference of {a} and {b}",
                 "take {a} minus {b}; {a} - {b} =; {a}-{b}=; {a} - {b} = ?; "
                 "what is left of {a} if you take away {b}; what do you get if you take {a} minus {b}"),
    "subtract_from": (2, "{a}-{b}", "{b} subtracted from {a}; {b} taken from {a}",
                      "subtract {b} from {a}; take {b} from {a}; take away {b} from {a}; "
                      "what do you get if you subtract {b} from {a}"),
    "multiply": (10, "{a}*{b}",
                 "{a} * {b}; {a}*{b}; {a} times {b}; {a} x {b}; {a}x{b}; {a} times {b}; {a} multiplied by {b}; "
                 "the product of {a} and {b}; {a} × {b}",
                 "multiply {a} by {b}; multiply {a} and {b}; multiply {a} with {b}; product of {a} and {b}; "
                 "{a} * {b} =; {a} x {b} =; {a}*{b}=; {a} x {b} = ?; what do you get if you multiply {a} by {b}; "
                 "take {a} times {b}"),
    "divide": (9, "{a}/{b}",
               "{a} / {b}; {a}/{b}; {a} divided by {b}; {a} ÷ {b}; {a} divided by {b}; {a} over {b}; {a} : {b}",
               "divide {a} by {b}; {a} / {b} =; {a}/{b}=; {a} : {b} =; split {a} by {b}; {a} split into {b} parts; "
               "what do you get if you divide {a} by {b}; how many times does {b} go into {a}; "
               "how often does {b} fit into {a}; divide {a} into {b} parts"),
    "half": (3, "{a}/2", "half of {a}; half {a}; the half of {a}; one half of {a}", "half of {a}; halve {a}"),
    "double": (3, "{a}*2", "double {a}; twice {a}; the double of {a}; two times {a}",
               "double {a}; double the number {a}; twice {a}"),
    "triple": (1, "{a}*3", "triple {a}; the triple of {a}; three times {a}", "triple {a}"),
    "third": (1, "{a}/3", "a third of {a}; one third of {a}", "a third of {a}"),
    "quarter": (1, "{a}/4", "a quarter of {a}; one quarter of {a}; one fourth of {a}", "a quarter of {a}"),
    "square": (1, "{a}*{a}", "{a} squared; the square of {a}; {a} times itself", "square {a}; square of {a}"),
    "percent": (2, "{a}*{b}/100", "{a}% of {b}; {a} percent of {b}; {a} % of {b}", "{a}% of {b}"),
    "more": (1, "{b}+{a}", "{a} more than {b}; {a} more than {b}", "{a} more than {b}"),
    "less": (1, "{b}-{a}", "{a} less than {b}; {a} fewer than {b}", "{a} less than {b}"),
    "add_add": (3, "{a}+{b}+{c}",
                "{a} + {b} + {c}; {a}+{b}+{c}; {a} plus {b} plus {c}; the sum of {a}, {b} and {c}",
                "add {a}, {b} and {c}; {a} + {b} + {c} =; {a}+{b}+{c}=; add {a} and {b} and {c}"),
    "add_subtract": (2, "{a}+{b}-{c}", "{a} + {b} - {c}; {a}+{b}-{c}; {a} plus {b} minus {c}",
                     "{a} + {b} - {c} =; {a} plus {b}, then minus {c}"),
    "subtract_subtract": (1, "{a}-{b}-{c}", "{a} - {b} - {c}; {a} minus {b} minus {c}", "{a} - {b} - {c} ="),
    "subtract_add": (1, "{a}-{b}+{c}", "{a} - {b} + {c}; {a}-{b}+{c}; {a} minus {b} plus {c}", "{a} - {b} + {c} ="),
    "multiply_add": (3, "{a}*{b}+{c}", "{a} * {b} + {c}; {a} x {b} + {c}; {a} times {b} plus {c}; {a}*{b}+{c}",
                     "{a} * {b} + {c} =; multiply {a} by {b} and add {c}; {a} times {b}, then add {c}"),
    "add_multiply": (3, "{a}+{b}*{c}", "{a} + {b} * {c}; {a} + {b} x {c}; {a} plus {b} times {c}; {a}+{b}*{c}",
                     "{a} + {b} * {c} ="),
    "multiply_subtract": (2, "{a}*{b}-{c}", "{a} * {b} - {c}; {a} x {b} - {c}; {a} times {b} minus {c}",
                          "{a} * {b} - {c} =; multiply {a} by {b} and subtract {c}"),
    "brackets": (2, "({a}+{b})*{c}", "({a} + {b}) * {c}; ({a}+{b})*{c}; ({a} + {b}) x {c}; ({a} + {b}) times {c}",
                 "({a} + {b}) * {c} =; add {a} and {b}, then multiply by {c}; "
                 "add {a} and {b} and multiply the result by {c}"),
}
FRAMES = ("what is {e} / what is {e} / what is {e} / how much is {e} / how much is {e} / {e} / {e} / {e} / {e} / {e} / "
          "calculate {e} / compute {e} / work out {e} / [can you|could you|please] [work out|calculate|solve|do] {e} / "
          "solve {e} / @tell what {e} is / what does {e} make / what does {e} equal / {e} equals / {e} is / {e} is what / "
          "{e} is how much / tell me {e} / i need {e} / what is the result of {e} / what is the answer to {e} / "
          "do you know {e} / how much does {e} make / {e} makes / find {e} / what would {e} be / and {e} / what about {e} / "
          "give me {e} / help me with {e} / sum: {e} / do the sum {e} / can you do {e} / evaluate {e} / the answer to {e} / "
          "my homework is {e} / what do you get for {e} / math: {e} / {e}, how much is that / what is the value of {e} / "
          "i want to know {e} / let me know {e} / how many is {e}").split(" / ")
ASKED = {kind: [forms.split("; ") for forms in row[2:]] for kind, row in FORMS.items()}
CHECKS = ("are you sure / are you sure about that / really / is that right / is that correct / how do you know that / "
          "can you check it / is it true / did you calculate that / how did you get that / how did you do that").split(" / ")
NEXT_STEPS = {
    "{r}+{n}": "and {n} more / plus {n} / and plus {n} / add {n} / now add {n} / add {n} to that / and if i add {n} / "
               "and another {n} / + {n} / what if i add {n} / and {n} more makes",
    "{r}-{n}": "minus {n} / and minus {n} / take away {n} / now subtract {n} / and {n} less / - {n} / subtract {n} from that",
    "{r}*{n}": "times {n} / and times {n} / multiply that by {n} / now multiply it by {n} / and that times {n} / * {n}",
    "{r}*2": "double that / double it / and twice that / and the double",
    "{r}/2": "half of that / and half of that / halve it",
}


def any_number(rng, largest=999):
    """One to three digits, each length often enough to learn."""
    limit = rng.choice([9, 20, 50, 99, 99, 99, largest])
    return rng.randint(1, max(2, min(limit, largest)))


def draw_numbers(kind, rng):
    """Numbers for a kind of sum; most divisions come out even, most differences are positive."""
    a, b, c = any_number(rng), any_number(rng), any_number(rng, 50)
    if kind in ("multiply", "multiply_add", "multiply_subtract", "brackets", "add_multiply") and rng.random() < 0.7:
        b = rng.randint(2, 12)
        c = rng.randint(2, 20)
    if kind.startswith("subtract") and b > a and rng.random() < 0.9:
        a, b = b, a
    if kind == "divide":
        b = rng.randint(2, 12) if rng.random() < 0.8 else rng.randint(2, 60)
        a = b * rng.randint(2, 30) if rng.random() < 0.85 else a
    if kind in ("half", "third", "quarter") and rng.random() < 0.8:
        a *= {"half": 2, "third": 3, "quarter": 4}[kind]
    if kind == "percent":
        a = rng.choice([5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, rng.randint(1, 99)])
        b = rng.choice([b, 10 * rng.randint(2, 50)])
    if kind == "less" and a > b:
        a, b = b, a
    return {"a": a, "b": b, "c": c}


def write_numbers(form, numbers, rng):
    """Digits, or words where the form itself is in words and all of its numbers are small."""
    in_words = not any(sign in form for sign in "+-*/=%÷×:(x") and "number" not in form
    if in_words and max(numbers.values()) <= 20 and rng.random() < 0.4:
        return {name: number_word(number) for name, number in numbers.items()}
    return {name: str(number) for name, number in numbers.items()}


def one_sum(rng):
    """(question, answer)"""
    kind = rng.choices(list(FORMS), [row[0] for row in FORMS.values()])[0]
    numbers = draw_numbers(kind, rng)
    phrases, messages = ASKED[kind]
    whole = rng.random() < 0.25
    form = rng.choice(messages if whole else phrases)
    if rng.random() < 0.15:  # a small sum is the likeliest to be told in words
        numbers = {name: 1 + number % 20 for name, number in numbers.items()}
    asked = {name: number for name, number in numbers.items() if "{" + name + "}" in form}
    told = write_numbers(form, asked, rng)
    template = form if whole else rng.choice(FRAMES).replace("{e}", form)
    question = typed(template, rng, 0.7, **told)
    return question, solve("", FORMS[kind][1].format(**numbers))


def sum_exchange(rng):
    """A sum, and now and then a step that goes on from it or a doubt."""
    question, answer = one_sum(rng)
    turns = [(question, answer)]
    result = result_of(answer)
    while rng.random() < 0.2 and result.isdigit() and len(turns) < 3:
        expression = rng.choice(list(NEXT_STEPS))
        number = any_number(rng, 50)
        template = rng.choice(NEXT_STEPS[expression].split(" / "))
        answer = solve("", expression.format(r=result, n=number))
        turns.append((typed(template, rng, 0.2, n=number), answer))
        result = result_of(answer)
    if rng.random() < 0.07:
        sure = "[Yes, I worked it out with a calculator.|Yes. My calculator did the sum.]"
        turns.append((typed(rng.choice(CHECKS), rng, 0.3), expand(sure, rng)))
    return turns
