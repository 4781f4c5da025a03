"""
Remembering: what a user told about himself a few turns ago, asked again; and the honest answer when he did not tell.

`memory_conversation` weaves the telling and the asking between exchanges on other things.
"""

from dev.toyworld.grammar import DATA, expand, fill
from dev.toyworld.problems import any_name
from dev.toyworld.spelling import TRAIN_WORDS
from dev.toyworld.stories import ANIMALS
from dev.toyworld.typed import typed, typed_one

COLOURS = "red blue green yellow purple orange black white pink brown grey gold silver".split()
TOWNS = ("Paris/London/Berlin/Rome/Madrid/Vienna/Oslo/Boston/Chicago/Texas/Dublin/Tokyo/Delhi/Cairo/Leeds/York/"
         "Munich/Lyon/Porto/Milan/Sydney/Toronto/a small village/a big city/a town by the sea/the mountains/Spain/"
         "France/India/Canada/Bristol/Denver/Hamburg/Prague/Austin/Seattle/Lagos/Lima").split("/")
JOBS = ("teacher/doctor/nurse/farmer/baker/writer/student/driver/cook/builder/gardener/painter/singer/lawyer/pilot/"
        "engineer/dentist/tailor/programmer/musician/scientist").split("/")
FOODS = ("pizza/soup/rice/bread/cheese/cake/apples/honey/pasta/fish/chocolate/salad/pancakes/beans/ice cream/eggs/"
         "plums/noodles/sushi/curry/pie/cookies").split("/")
PETS = "dog cat rabbit hamster bird fish parrot horse turtle mouse goldfish snake pony".split()
OWNED = "car bike house hat coat dress cat dog bag shirt door phone boat room horse garden ball".split()
JOINTS = [". ", ", ", ". ", " and ", "! "]
MIXED = 0.5  # how often something else, or something more, stands between telling and asking


def invented_town(rng):
    return any_name(rng) + rng.choice(["ville", "ton", "burg", "field", ""])


def any_pet(rng):
    return rng.choice(PETS) if rng.random() < 0.7 else ANIMALS.draw(rng)


def any_town(rng):
    return rng.choice(TOWNS) if rng.random() < 0.7 else invented_town(rng)


def any_number(rng):
    largest = rng.choice([20, 99, 999])
    return str(rng.randint(2, largest))


DRAWERS = {
    "name": any_name,
    "petname": any_name,
    "friend": any_name,
    "age": lambda rng: str(rng.randint(4, 90)),
    "colour": lambda rng: rng.choice(COLOURS),
    "food": lambda rng: rng.choice(FOODS),
    "pet": any_pet,
    "town": any_town,
    "job": lambda rng: rng.choice(JOBS),
    "number": any_number,
    "word": lambda rng: rng.choice(TRAIN_WORDS),
    "thing": lambda rng: rng.choice(COLOURS),
}
WEIGHTS = {"name": 8, "colour": 3, "pet": 2, "petname": 3, "age": 3, "town": 2, "job": 2, "food": 2, "friend": 2,
           "number": 2, "word": 1, "thing": 2}


def read_matters():
    """{matter: {sign: its templates}}"""
    matters = {}
    for line in (DATA / "memory.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and line[2:].isalpha():
            matter = matters[line[2:]] = {}
        elif line[:2] in ("> ", "< ", "? ", "= ", "~ "):
            matter[line[0]] = line[2:].split(" / ")
    return matters


MATTERS = read_matters()


def draw_matter(rng, but=()):
    names = [name for name in MATTERS if name not in but]
    return rng.choices(names, [WEIGHTS[name] for name in names])[0]


def tell(matter, rng):
    """((what is told, what is said to it), slots)"""
    slots = {"v": DRAWERS[matter](rng), "animal": rng.choice(PETS)}
    if matter == "thing":
        slots["animal"] = rng.choice(OWNED)
    forms = MATTERS[matter]
    if rng.random() < 0.3:  # a name in lower case; from then on the answers have it so, too
        slots["v"] = slots["v"].lower()
    template = rng.choice(forms[">"]).replace("{v}", "{exact_v}")
    message = typed(template, rng, 0.4, exact_v=slots["v"], animal=slots["animal"])
    return (message, fill(expand(rng.choice(forms["<"]), rng), **slots)), slots


def recall(matter, slots, rng):
    """The question and its answer, told before."""
    forms = MATTERS[matter]
    return typed_one(forms["?"], rng, 0.7, animal=slots["animal"]), fill(forms["="][0], **slots)


def unknown_exchange(rng):
    """Asked without having been told."""
    matter = draw_matter(rng)
    return [not_told(matter, rng)]


def not_told(matter, rng):
    """The question and the honest answer, where nothing was said before."""
    animal = rng.choice(PETS)
    forms = MATTERS[matter]
    question = typed_one(forms["?"], rng, 0.7, animal=animal)
    return question, fill(forms["~"][0], animal=animal)


def join(told, question, rng):
    """What is told and a question back, in one message."""
    message = f"{told[0].rstrip('.!')}{rng.choice(JOINTS)}{question[0]}"
    greeting = told[1].replace(" How can I help you?", "")
    return message, f"{greeting} {question[1]}"


def memory_conversation(rng, other_exchange, ask_back):
    """
    One or two matters told, something else in between, then what was told is asked, and perhaps what was not.
    ask_back(rng) is what the user asks beside telling his name, and its answer.
    """
    first = draw_matter(rng)
    told = [first]
    if rng.random() < 0.35:
        told.append(draw_matter(rng, but=told))
    turns = []
    known = {}
    for matter in told:
        turn, known[matter] = tell(matter, rng)
        turns.append(turn)
    if first == "name" and rng.random() < 0.15:  # "i am Ann. what is your name?"
        turns[0] = join(turns[0], ask_back(rng), rng)
    if len(told) == 1 and rng.random() < 0.1:  # told and asked in one message
        message, answer = recall(first, known[first], rng)
        return [(f"{turns[0][0].rstrip('.!')}{rng.choice(JOINTS)}{message}", answer)]
    while rng.random() < MIXED and len(turns) < 5:
        turns += other_exchange(rng)
    rng.shuffle(told)
    for matter in told:
        turns.append(recall(matter, known[matter], rng))
    if first == "name" and rng.random() < 0.12:  # told anew
        turn, slots = tell("name", rng)
        turns += [turn, recall("name", slots, rng)]
    elif rng.random() < 0.15:
        absent = draw_matter(rng, but=told)
        turns.append(not_told(absent, rng))
    return turns
