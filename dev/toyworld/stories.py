"""
Short stories on request: about a given animal, person, thing or name, in the plots of data/stories.txt.

The hero is whatever was asked for, a word of a long list or a name that nobody has, so that the model learns to put
the word of the question into the story.
"""

from dev.toyworld.grammar import DATA, Pool, capitalize, expand, fill, read_words, repair, with_article
from dev.toyworld.problems import any_name
from dev.toyworld.typed import typed_one

ANIMALS = Pool(read_words("animals.txt"), keep=50)
PEOPLE = Pool(read_words("people.txt"), keep=20)
OBJECTS = Pool(read_words("objects.txt"), keep=20)
MASSES = [word.strip() for word in (DATA / "masses.txt").read_text(encoding="utf-8").split(";")]
ADJECTIVES = ("little big small brave happy sad lonely clever funny lazy kind old young angry magic white black red "
              "tiny hungry sleepy friendly shy proud poor rich silly blue green flying lost").split()
ADDED = ("who can fly/who is afraid/who likes cake/who is lost/that can talk/who wants to sing/who loves music/"
         "who lives in a tree/who goes to school/in the forest/at the sea/on the moon/with a red hat/in winter/"
         "who finds a friend/who cannot sleep/in space/who wants to be a king/and a lost key/"
         "who saved the day").split("/")
PLACES = ("the river/the forest/the hill/the lake/the market/the bridge/the meadow/the old mill/the sea/the big tree/"
          "the village/the castle/the farm/the mountain").split("/")
FOUND = ("a golden ring/a red ball/a little key/an old map/a bag of coins/a kite/a blue stone/a small drum/"
         "a lamp").split("/")


def read_plots():
    """{"plot": plots, "mass": plots, "ask": requests, "any": requests}"""
    plots = {}
    for line in (DATA / "stories.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and " " not in line[2:]:
            part = line[2:]
            plots[part] = []
        elif line.startswith("> ") and part in ("ask", "any"):
            plots[part] = line[2:].split(" / ")
        elif line.startswith("> "):
            plots[part].append(line[2:].replace(" / ", " "))
    return plots


PLOTS = read_plots()


def story(rng, hero=None, friend=None, mass=None):
    """A story of four to six sentences. hero and friend: a noun ("fox") or a name; mass: what a story may be about."""
    friend = friend or ANIMALS.draw(rng)
    hero = hero or ANIMALS.draw(rng)
    while friend == hero:
        friend = ANIMALS.draw(rng)
    named = hero[0].isupper()
    slots = {
        "x": hero if named else f"the {hero}",
        "a": with_name(hero, rng) if named else f"a {hero}",
        "y": friend if friend[0].isupper() else f"the {friend}",
        "ay": with_article(friend),
        "place": rng.choice(PLACES),
        "q": rng.choice(FOUND),
        "t": mass,
    }
    plot = rng.choice(PLOTS["mass" if mass else "plot"])
    return capitalize(fill(expand(plot, rng), **slots))


def with_name(name, rng):
    """How a person with a name is first met."""
    return rng.choice([f"a girl named {name}", f"a boy named {name}", f"a child named {name}"])


def draw_hero(rng):
    """An animal mostly; else a person, a thing, a name."""
    kind = rng.random()
    if kind < 0.5:
        return ANIMALS.draw(rng)
    if kind < 0.7:
        return PEOPLE.draw(rng)
    if kind < 0.87:
        return OBJECTS.draw(rng)
    return any_name(rng)


def describe(hero, rng):
    """How the hero is asked for: 'a brave fox', 'foxes', 'a fox who can fly'."""
    kind = rng.random()
    if hero[0].isupper():
        return hero if kind > 0.35 else expand(f"a [boy|girl|child] [named|called] {hero}", rng)
    if kind < 0.08:
        return repair(f"{hero}s")
    if kind < 0.12:
        return repair(expand(f"[two|three|some|the] {hero}s", rng))
    if kind < 0.3:
        return with_article(f"{rng.choice(ADJECTIVES)} {hero}")
    if kind < 0.38:
        return f"{with_article(hero)} {rng.choice(ADDED)}"
    if kind < 0.43:
        return f"{rng.choice(['my', 'the', 'your'])} {hero}"
    if kind < 0.46:
        return hero
    return with_article(hero)


def story_exchange(rng):
    """A request and the story; often with one hero, sometimes with two, with none, or about a matter."""
    kind = rng.random()
    if kind < 0.12:
        return [(typed_one(PLOTS["any"], rng), story(rng))]
    if kind < 0.22:
        mass = rng.choice(MASSES)
        return [(typed_one(PLOTS["ask"], rng, h=mass), story(rng, mass=mass))]
    hero = draw_hero(rng)
    if kind < 0.34:
        friend = draw_hero(rng)
        heroes = f"{with_article(hero)} and {with_article(friend)}"
        question = typed_one(PLOTS["ask"], rng, h=heroes)
        return [(question, story(rng, hero, friend if friend != hero else None))]
    return [(typed_one(PLOTS["ask"], rng, h=describe(hero, rng)), story(rng, hero))]
