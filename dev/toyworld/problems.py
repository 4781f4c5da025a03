"""
Word problems with any names, things and verbs, in the families of data/problems.txt.

A problem is told of somebody: a name (often one that no other problem has), "my sister", "a farmer", I or you; in the
present or the past; capitalised or as typed in a hurry. Its answer copies the numbers and the name from the question
and leaves the arithmetic to the calculator.
"""

import re
from dataclasses import dataclass

from dev.toyworld.calculate import calculated, finish, number_word, to_gsm8k
from dev.toyworld.grammar import DATA, Pool, capitalize, expand, fill, read_words
from dev.toyworld.typed import misspell
from nanochat.calculator import use_calculator

NAMES = Pool(read_words("names.txt"), keep=40)
THINGS = Pool(read_words("things.txt"), keep=20)
BOXES = ("box/boxes bag/bags basket/baskets jar/jars bowl/bowls pack/packs crate/crates bucket/buckets carton/cartons "
         "drawer/drawers shelf/shelves tray/trays cup/cups bus/buses truck/trucks room/rooms case/cases tin/tins "
         "sack/sacks can/cans plate/plates tank/tanks garden/gardens").split()
RELATIVES = ("sister brother mother father mum dad friend uncle aunt cousin neighbour teacher grandmother grandfather "
             "son daughter boss").split()
WORKERS = ("farmer baker teacher boy girl man woman child king queen cook student shopkeeper sailor gardener doctor "
           "fisher builder monkey bear fox rabbit dog cat squirrel robot pirate wizard").split()
GET = ("buy buys bought/find finds found/get gets got/pick picks picked/collect collects collected/win wins won/"
       "make makes made/receive receives received/take takes took/catch catches caught/buy buys bought/"
       "find finds found/get gets got/gather gathers gathered/order orders ordered/bake bakes baked").split("/")
LOSE = ("lose loses lost/eat eats ate/sell sells sold/give|away gives|away gave|away/drop drops dropped/"
        "break breaks broke/use uses used/throw|away throws|away threw|away/eat eats ate/lose loses lost/"
        "sell sells sold/spend spends spent/forget forgets forgot/hide hides hid").split("/")
HAVE = "have has had".split()
# Verbs with slots of their own: {gives}, {shares}
MORE_VERBS = ("give gives gave/share shares shared/divide divides divided/split splits split/put puts put/"
              "pack packs packed/fill fills filled/take takes took/pay pays paid").split("/")
SPEND = "spend spends spent".split()
EARN = "earn earns earned".split()
BE = {"I": "am", "you": "are"}
ONE_THING = "book ball hat toy ticket cake pen bag game shirt cup lamp kite doll bike car pizza sandwich drink".split()
SYLLABLES = [a + b for a in "b d f g k l m n p r s t v z j dr kr br tr sh th".split() for b in "a e i o u".split()]


def invented_name(rng):
    """A name that is in no list: 'Dakri', 'Zun'."""
    syllables = [rng.choice(SYLLABLES) for _ in range(rng.choice([1, 2, 2, 3]))]
    return capitalize("".join(syllables) + rng.choice(["", "", "n", "r", "l", "s", "x"]))


def any_name(rng):
    return invented_name(rng) if rng.random() < 0.2 else NAMES.draw(rng)


@dataclass
class Person:
    """Who a problem is about: in the tale, in the question, in the answer, and the verb's form."""

    tale: str
    asked: str
    answer: str
    plural: bool  # whether the verb is the one of I and you
    he: str
    him: str


def draw_person(rng, first_person=True):
    kind = rng.random()
    if first_person and kind < 0.22:
        if rng.random() < 0.75:
            return Person("I", "I", "You", True, "I", "me")
        return Person("you", "you", "You", True, "you", "you")
    he, him = rng.choice([("he", "him"), ("she", "her")])
    if kind < 0.32:
        word = rng.choice(RELATIVES)
        return Person(f"my {word}", f"my {word}", f"Your {word}", False, he, him)
    if kind < 0.42:
        word = rng.choice(WORKERS)
        return Person(f"a {word}", f"the {word}", f"The {word}", False, he, him)
    name = any_name(rng)
    return Person(name, name, name, False, he, him)


def first_step(operation, a, b):
    """'a*b+c' -> '3*4'"""
    numbers = {"a": str(a), "b": str(b)}
    return "".join(numbers.get(sign, sign) for sign in operation[:3])


def draw_numbers(operation, rng):
    """Numbers for a family: whole results, nothing negative; one in eight is large."""
    large = 999 if rng.random() < 0.12 else 99
    small = rng.choice([12, 30])
    a = rng.randint(2, large)
    b = rng.randint(2, rng.choice([12, large]))
    c = rng.randint(2, 20)
    if "*" in operation:
        a = rng.randint(2, small)
        b = rng.randint(2, small)
    if operation.startswith("a/b"):
        b = rng.randint(2, 12)
        a = b * rng.randint(2, small)
    if operation in ("a*2", "a/2"):
        a = 2 * rng.randint(2, 50)
    if operation == "b-a":
        b += a
    if operation.startswith("a-b") and a <= b:
        a, b = b + 1, a
    if operation == "a-b-c" or operation.endswith("-c"):
        left = int(use_calculator(first_step(operation, a, b)))
        c = rng.randint(1, max(1, left - 1))
    return {"a": a, "b": b, "c": c}


def read_families(name):
    """{family: (operation, tales, questions, lines of the answer)}"""
    families = {}
    for line in (DATA / name).read_text(encoding="utf-8").splitlines():
        header = re.fullmatch(r"# (\w+) ([abc2*/+-]+)", line)
        if header:
            family = families[header[1]] = {"operation": header[2]}
        elif line[:2] in ("> ", "? "):
            family[line[0]] = line[2:].split(" / ")
        elif line[:2] == "< ":
            family["<"] = line[2:].split(" | ")
    return families


FAMILIES = read_families("problems.txt")
# What people ask most
PLAIN = ["get", "ifget", "both", "lose", "iflose", "groups", "holds", "share", "pronoun", "money", "twokinds"]
WEIGHTS = [3 if name in PLAIN else 1 for name in FAMILIES]


@dataclass
class Problem:
    """A question, the parts of its answer, the numbers that the question tells, and who is asked about."""

    question: str
    parts: list
    numbers: list
    name: str

    def row(self):
        return {"question": self.question, "answer": to_gsm8k(self.parts)}


def slots_for(x, y, z, thing, rng):
    """What fills a family's templates, but for the numbers."""
    past = rng.random() < 0.35
    form = 2 if past else (0 if x.plural else 1)
    get = rng.choice(GET).split()[form].replace("|", " ")
    lose = rng.choice(LOSE).split()[form].replace("|", " ")
    box, boxes = rng.choice(BOXES).split("/")
    does = "do" if x.plural else "does"
    verbs = {}
    for row in MORE_VERBS:
        forms = row.split()
        verbs[forms[1]] = forms[form]
    return verbs | {
        "n": thing,
        "m": THINGS.draw(rng),
        "one": rng.choice(ONE_THING),
        "spend": SPEND[form],
        "earn": EARN[form],
        "am": BE.get(x.tale, "is"),
        "y": y,
        "z": z,
        "has": HAVE[form],
        "yhas": "had" if past else "has",
        "get": get,
        "lose": lose,
        "does": does,
        "have": "have" if x.plural else "has",
        "he": x.he,
        "him": x.him,
        "box": box,
        "boxes": boxes,
        "be": "were" if past else "are",
    }


def in_sentences(text):
    """A capital at the start of each sentence, and for I."""
    text = re.sub(r"\b(i|monday|tuesday|wednesday)\b", lambda match: capitalize(match[0]), text)
    return re.sub(r"(^|[.?!] )([a-z])", lambda match: match[1] + match[2].upper(), text)


def draw_problem(rng, plain=False):
    """A Problem. plain: as a task asks it, without slips and hurry."""
    family = FAMILIES[rng.choices(list(FAMILIES), WEIGHTS)[0]]
    x = draw_person(rng)
    y, z = any_name(rng), any_name(rng)
    thing = THINGS.draw(rng)
    slots = slots_for(x, y, z, thing, rng)
    numbers = draw_numbers(family["operation"], rng)
    told = numbers
    if max(numbers.values()) <= 20 and rng.random() < 0.4:
        told = {name: number_word(number) for name, number in numbers.items()}

    # The question: x is "a farmer" when first met and "the farmer" from then on
    tale = expand(rng.choice(family[">"]), rng)
    if rng.random() < 0.08:  # a number that has nothing to do with it
        tale = "{y} is {k} years old. " + tale
    template = f"{tale} {expand(rng.choice(family['?']), rng)}"
    template = re.sub(r" +(?=[ ?])", "", template)  # where a choice was empty
    template = template.replace("{x}", "{first}", 1)
    hurried = not plain and rng.random() < 0.4
    if hurried and rng.random() < 0.1:
        template = misspell(template, rng)
    question = fill(template, first=x.tale, x=x.asked, k=rng.randint(3, 80), **slots, **told)
    question = hurry(question, rng) if hurried else in_sentences(question)

    # The answer: one calculation per line, the second one goes on from the first result
    names = {"X": x.answer, "x": "you" if x.answer == "You" else x.asked, "Y": y}
    if hurried:  # as they stand in the question, so that they can be copied
        names = {key: name if name in ("You", f"Your {name[5:]}") else name.lower() for key, name in names.items()}
    if "{first}" not in template:  # nobody has them
        names |= {"X": "There", "x": "there"}
        slots["have"] = "are"
    parts = solve_steps(family, numbers, slots | names)
    told_numbers = [str(numbers[key]) for key in re.findall(r"\{([abc])\}", template)]
    first_line = family["<"][0]
    name = next((names[key] for key in "XYx" if "{" + key + "}" in first_line), "")
    return Problem(question, parts, told_numbers, name)


def hurry(text, rng):
    """The problem in lower case, names and all, often without its question mark."""
    text = text.lower()
    if rng.random() < 0.5:
        text = text.rstrip("?")
    return text


def solve_steps(family, numbers, slots):
    operation = family["operation"]
    expression = first_step(operation, numbers["a"], numbers["b"])
    scope = slots | numbers
    steps = []
    result = None
    for line in family["<"]:
        before, _, after = line.partition("{calc}")
        if steps:
            before = f"\n{before}"
            expression = f"{result}{operation[3]}{numbers['c']}"
        step, result = calculated(before.format(**scope), expression, after.format(**scope))
        steps.append(step)
    return finish(steps, result)


def problem_exchange(rng):
    problem = draw_problem(rng)
    return [(problem.question, problem.parts)]
