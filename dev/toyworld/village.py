"""
Dellbrook, the village that the model knows by heart: twelve friends with six facts each, asked by every question word.

Each fact has one value of one common word, so it is one token and one thing to learn. A question about anybody else has
the honest answer that the model does not know.
"""

from dataclasses import dataclass

from dev.toyworld.grammar import Pool, capitalize, expand, fill, read_phrases, read_words
from dev.toyworld.typed import typed, typed_one

PHRASES = read_phrases("village")


@dataclass(eq=False)
class Friend:
    """One character. Each field is one fact; only `colour` and `he` are shared by several friends."""

    name: str
    he: str      # "he" or "she"
    animal: str
    home: str
    job: str
    food: str
    thing: str   # what this friend owns and treasures
    colour: str  # favourite colour

    def __str__(self):
        return self.name


ROWS = """
    Mira she fox mill baker honey kite red
    Tobi he bear cave fisher soup drum blue
    Luma she owl tower teacher nuts lamp white
    Rolo he goat barn builder carrots ladder green
    Suri she duck boat sailor corn map yellow
    Hugo he dog inn cook pie bell black
    Nell she hen cottage weaver bread basket purple
    Fenn he frog hut singer beans flute orange
    Bela she cat attic tailor cheese scarf red
    Oslo he mole cellar potter plums spade blue
    Vela she deer tent painter pears mirror yellow
    Kito he mouse treehouse gardener cake bucket green
"""
FRIENDS = [Friend(*row.split()) for row in ROWS.strip().splitlines()]
NAMES = [friend.name for friend in FRIENDS]

# attribute: (its value in a sentence, statements, questions, answer, questions that ask who); {v} is the value
ATTRIBUTES = {
    "animal": ("a {animal}",
               ["{x} is {v}.", "{x} the {animal} is a friend.", "Our friend {x} is {v}."],
               "what [kind of animal|animal] is {x} / {x} is what kind of animal / which animal is {x} / "
               "@tell what animal {x} is / what sort of animal is {x} / is {x} a person",
               "{x} is {v}.",
               "[who|which friend] is {v} / what is the name of the {animal} / what is the {animal} called / "
               "who is the {animal} in dellbrook"),
    "home": ("the {home}",
             ["{x} lives in {v}.", "The home of {x} is {v}.", "{x} sleeps in {v} at night."],
             "where does {x} live / where is the home of {x} / in which place does {x} live / "
             "what is the home of {x} / where can i find {x} / where does {x} sleep / where is {x} / "
             "@tell where {x} lives / what does {x} live in / where is {x}'s house",
             "{x} lives in {v}.",
             "[who|which friend] lives in {v} / whose home is {v} / who sleeps in {v} / whose house is {v}"),
    "job": ("a {job}",
            ["{x} works as {v}.", "{x} is {v}.", "The job of {x} is {job}."],
            "what is the job of {x} / what does {x} work as / what work does {x} do / which job does {x} have / "
            "what does {x} do / what is {x}'s job / @tell what {x} works as / what does {x} do for work",
            "{x} works as {v}.",
            "[who|which friend] works as {v} / what is the name of the {job} / who is the {job} / "
            "who is the {job} in dellbrook / who is the {job} in the village"),
    "food": ("{food}",
             ["{x} likes to eat {v}.", "The favourite food of {x} is {v}.", "{x} loves {v}."],
             "what does {x} like to eat / what is the favourite food of {x} / which food does {x} love / "
             "what food does {x} like best / what does {x} eat / what is {x}'s favourite food / "
             "@tell what {x} likes to eat / what should i cook for {x}",
             "{x} likes to eat {v}.",
             "[who|which friend] [likes to eat|loves] {v} / whose favourite food is {v} / who likes {v} / "
             "who eats {v}"),
    "thing": ("a {thing}",
              ["{x} owns {v}.", "{x} has {v}.", "The treasure of {x} is {v}."],
              "what does {x} own / what is the treasure of {x} / which thing does {x} own / "
              "what thing does {x} have / what does {x} have / @tell what {x} owns / what is {x}'s treasure",
              "{x} owns {v}.",
              "[who|which friend] owns {v} / whose treasure is {v} / who has {v} / whose is the {thing}"),
    "colour": ("{colour}",
               ["The favourite colour of {x} is {v}.", "{x} likes the colour {v}.", "{x} likes {v} best."],
               "what is the favourite colour of {x} / which colour does {x} like best / what colour does {x} love / "
               "what is {x}'s favourite colour / what color does {x} like / what is {x}'s favorite color / "
               "@tell the favourite colour of {x}",
               "The favourite colour of {x} is {v}.", ""),
}
QUESTIONS = {key: row[2].split(" / ") for key, row in ATTRIBUTES.items()}
BACKWARD = {key: row[4].split(" / ") for key, row in ATTRIBUTES.items() if row[4]}

STRANGER = [*PHRASES["who"][:11], *QUESTIONS["home"], *QUESTIONS["job"], *QUESTIONS["food"], *QUESTIONS["colour"],
            "how old is {x}", "what is the animal of {x}", "when was {x} born", "is {x} nice"]
OTHER_NAMES = Pool([name for name in read_words("names.txt") if name not in NAMES], keep=40)


def value(x, attribute):
    """How the fact stands in a sentence: 'an owl', 'the mill', 'honey'."""
    return fill(ATTRIBUTES[attribute][0], **vars(x))


def sentence(x, attribute):
    """The fact as an answer."""
    return ATTRIBUTES[attribute][3].format(x=x, v=value(x, attribute))


def statement(rng, x, attribute):
    """The fact in one of its wordings."""
    return fill(rng.choice(ATTRIBUTES[attribute][1]), x=x, v=value(x, attribute), **vars(x))


def about(x):
    """Who a friend is, in two sentences that are always the same."""
    he = capitalize(x.he)
    return f"{x} is {value(x, 'animal')}. {he} lives in {value(x, 'home')} and works as {value(x, 'job')}."


# -----------------------------------------------------------------------------
# Asked in a chat: each returns a list of (user, assistant)


def ask_fact(rng):
    x = rng.choice(FRIENDS)
    attribute = rng.choice(list(ATTRIBUTES))
    slots = {**vars(x), "x": x.name, "v": value(x, attribute)}
    slots.pop("name")
    if attribute in BACKWARD and rng.random() < 0.4:
        return [(typed_one(BACKWARD[attribute], rng, **slots), sentence(x, attribute))]
    return [(typed_one(QUESTIONS[attribute], rng, **slots), sentence(x, attribute))]


def ask_who(rng):
    x = rng.choice(FRIENDS)
    return [(typed_one(PHRASES["who"], rng, x=x.name), about(x))]


def ask_yes_no(rng):
    """Is it so? Half of the time it is not, and the answer says what is."""
    x = rng.choice(FRIENDS)
    attribute = rng.choice(["animal", "home", "job", "food", "thing"])
    other = x if rng.random() < 0.5 else rng.choice([friend for friend in FRIENDS if friend != x])
    forms = {"animal": "is {x} {v}", "home": "does {x} live in {v}", "job": "[is {x} {v}|does {x} work as {v}]",
             "food": "does {x} like [|to eat ]{v}", "thing": "does {x} [own|have] {v}"}
    reply = "Yes" if other == x else "No"
    question = typed(forms[attribute], rng, x=x.name, v=value(other, attribute))
    return [(question, f"{reply}, {sentence(x, attribute)}")]


def ask_unknown(rng):
    """A stranger, or what nobody has told about a friend."""
    answer = expand("@dunno", rng)
    if rng.random() < 0.6:
        return [(typed_one(STRANGER, rng, x=OTHER_NAMES.draw(rng)), answer)]
    return [(typed_one(PHRASES["unknown"], rng, x=rng.choice(NAMES)), answer)]


def village_exchange(rng):
    """Any of these, and now and then a second question about the same friend, who is only called he or she."""
    ask = rng.choices([ask_fact, ask_who, ask_yes_no, ask_unknown], [6, 2, 2, 3])[0]
    if rng.random() < 0.88:
        return ask(rng)
    x = rng.choice(FRIENDS)
    attribute = rng.choice(["home", "job", "food", "thing"])
    follow = {"home": "where does {he} live", "job": "what does {he} do", "food": "what does {he} eat",
              "thing": "what does {he} own"}[attribute]
    first = (typed_one(PHRASES["who"], rng, x=x.name), about(x))
    return [first, (typed("[|and ]" + follow, rng, he=x.he), sentence(x, attribute))]


def fact_sheet(rng):
    """All about one friend, or one kind of fact about six friends: for pretraining."""
    if rng.random() < 0.5:
        x = rng.choice(FRIENDS)
        lines = [statement(rng, x, attribute) for attribute in rng.sample(list(ATTRIBUTES), len(ATTRIBUTES))]
    else:
        attribute = rng.choice(list(ATTRIBUTES))
        lines = [statement(rng, x, attribute) for x in rng.sample(FRIENDS, 6)]
    return " ".join(lines)
