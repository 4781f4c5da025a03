"""
The toy world: Dellbrook, a village small enough that a model of a few million parameters can know all of it.

Sixteen friends, each with six facts; a few facts about food colours, kinds and opposites; and grammars that turn
them into stories, fact sheets, questions, word problems and small talk. Everything is a pure function of a
`random.Random`, so `dev/gen_synthetic_data.py` can write the same bytes from the same seed.

A template is a string: `[one|two]` is a choice (choices nest), `{x.home}` a field of what `expand` is given:

    >>> expand("{x} [lives|sleeps] in the {x.home}.", random.Random(0), x=FRIENDS[0])
    'Mira sleeps in the mill.'

Two rules keep it learnable. Each fact has one value of one common word, so it is one token and one thing to learn.
And what a question asks is never hard: the calculator does the arithmetic, the model picks operation and numbers.
"""

import functools
import re
from dataclasses import dataclass

from tasks.common import render_mc
from tasks.mmlu import LETTERS

# -----------------------------------------------------------------------------
# Facts: the closed world


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

    def __post_init__(self):
        """The forms that templates use: `him`, `his`, `He`, `His`, and nouns with their article."""
        self.him, self.his = ("him", "his") if self.he == "he" else ("her", "her")
        self.He, self.His = self.he.capitalize(), self.his.capitalize()
        self.a_animal, self.a_job, self.a_thing = map(with_article, (self.animal, self.job, self.thing))

    def __str__(self):
        return self.name


def with_article(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


FRIENDS = [Friend(*row.split()) for row in """
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
    Juna she hare burrow dancer berries ball white
    Dax he badger castle doctor porridge clock green
    Vela she deer tent painter pears mirror yellow
    Ned he pig wagon farmer apples hat black
    Anka she otter lighthouse writer rice pen purple
    Kito he mouse treehouse gardener cake bucket orange
""".strip().splitlines()]

FOOD_COLOURS = {"plums": "purple", "carrots": "orange", "corn": "yellow", "beans": "green", "berries": "blue",
                "apples": "red", "rice": "white", "honey": "yellow"}
OPPOSITES = dict(pair.split("/") for pair in ("hot/cold big/small up/down happy/sad fast/slow old/new day/night "
                                              "full/empty open/closed wet/dry near/far early/late").split())
PLACES = "forest river hill lake market bridge meadow orchard".split()
KINDS = {"animal": [f.animal for f in FRIENDS], "food": [f.food for f in FRIENDS], "job": [f.job for f in FRIENDS],
         "colour": sorted({f.colour for f in FRIENDS}), "home": [f.home for f in FRIENDS]}

# attribute: (what a choice looks like, statements, questions, full answer, questions that ask who)
# {x} the friend, {v} the value as it stands in a choice.
ATTRIBUTES = {
    "animal": ("{x.a_animal}", ["{x} is {v}.", "{x} the {x.animal} is a friend.", "Our friend {x} is {v}."],
               ["What [kind of animal|animal] is {x}?", "{x} is what kind of animal?", "Which animal is {x}?"],
               "{x} is {v}.", ["[Who|Which friend] is {v}?", "What is the name of the {x.animal}?"]),
    "home": ("the {x.home}", ["{x} lives in {v}.", "The home of {x} is {v}.", "{x} sleeps in {v} at night."],
             ["Where does {x} live?", "Where is the home of {x}?", "In which place does {x} live?",
              "What is the home of {x}?"],
             "{x} lives in {v}.", ["[Who|Which friend] lives in {v}?", "Whose home is {v}?"]),
    "job": ("{x.a_job}", ["{x} works as {v}.", "{x} is {v}.", "The job of {x} is {x.job}."],
            ["What is the job of {x}?", "What does {x} work as?", "What work does {x} do?", "Which job does {x} have?"],
            "{x} works as {v}.", ["[Who|Which friend] works as {v}?", "What is the name of the {x.job}?"]),
    "food": ("{x.food}", ["{x} likes to eat {v}.", "The favourite food of {x} is {v}.", "{x} loves {v}."],
             ["What does {x} like to eat?", "What is the favourite food of {x}?", "Which food does {x} love?",
              "What food does {x} like best?"],
             "{x} likes to eat {v}.", ["[Who|Which friend] [likes to eat|loves] {v}?", "Whose favourite food is {v}?"]),
    "thing": ("{x.a_thing}", ["{x} owns {v}.", "{x} has {v}.", "The treasure of {x} is {v}."],
              ["What does {x} own?", "What is the treasure of {x}?", "Which thing does {x} own?",
               "What thing does {x} have?"],
              "{x} owns {v}.", ["[Who|Which friend] owns {v}?", "Whose treasure is {v}?"]),
    "colour": ("{x.colour}", ["The favourite colour of {x} is {v}.", "{x} likes the colour {v}.", "{x} loves {v}."],
               ["What is the favourite colour of {x}?", "Which colour does {x} like best?",
                "What colour does {x} love?"],
               "The favourite colour of {x} is {v}.", []),
}


def expand(template, rng, **scope):
    """Pick one of every `[a|b]` of a template, then fill in its `{fields}` from the scope."""
    return _choose(_parse(template), rng).format(**scope)


@functools.cache
def _parse(template):
    """'a[b|c]' -> ('a', [('b',), ('c',)]): text, and lists of alternatives that are templates themselves."""
    stack = [[[]]]  # for each open bracket its alternatives, each a list of parts
    for piece in re.split(r"([\[\]|])", template):
        if piece == "[":
            stack.append([[]])
        elif piece == "]":
            alternatives = [tuple(parts) for parts in stack.pop()]
            stack[-1][-1].append(alternatives)
        elif piece == "|":
            stack[-1].append([])
        elif piece:
            stack[-1][-1].append(piece)
    return tuple(stack[0][0])


def _choose(parts, rng):
    return "".join(part if isinstance(part, str) else _choose(rng.choice(part), rng) for part in parts)


def pick(templates, rng, **scope):
    return expand(rng.choice(templates), rng, **scope)


@dataclass(frozen=True)
class Fact:
    """A question, its short answer, wrong answers of the same kind, and the answer as a sentence."""
    subject: str
    question: str
    answer: str
    others: tuple
    sentence: str


def random_fact(rng, subjects=None):
    """Draw a fact: (seven times in ten) about a friend, either way round; else a colour, a kind, an opposite."""
    subject = rng.choice(subjects or ["friends"] * 4 + ["names"] * 3 + ["colours", "kinds", "opposites"])
    return {"friends": _friend_fact, "names": _name_fact, "colours": _colour_fact, "kinds": _kind_fact,
            "members": _member_fact, "opposites": _opposite_fact}[subject](rng)


def _friend_fact(rng):
    x, attribute = rng.choice(FRIENDS), rng.choice(list(ATTRIBUTES))
    form, _, questions, sentence, _ = ATTRIBUTES[attribute]
    v = form.format(x=x)
    others = sorted({form.format(x=other) for other in FRIENDS} - {v})
    return Fact(attribute, pick(questions, rng, x=x), v, tuple(others), sentence.format(x=x, v=v))


def _name_fact(rng):
    x, attribute = rng.choice(FRIENDS), rng.choice([key for key, row in ATTRIBUTES.items() if row[4]])
    form, _, _, sentence, questions = ATTRIBUTES[attribute]
    v = form.format(x=x)
    others = tuple(other.name for other in FRIENDS if other != x)
    return Fact("names", pick(questions, rng, x=x, v=v), x.name, others, sentence.format(x=x, v=v))


def _colour_fact(rng):
    food, colour = rng.choice(list(FOOD_COLOURS.items()))
    be = "is" if food in ("corn", "rice", "honey") else "are"
    question = expand("[What|Which] colour {be} {food}?", rng, be=be, food=food)
    others = tuple(other for other in KINDS["colour"] if other != colour)
    return Fact("colours", question, colour, others, f"{food} {be} {colour}.".capitalize())


def _kind_fact(rng):
    kind = rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    question = expand("[What is|What kind of word is|What do we call] {word}?", rng, word=word)
    return Fact("kinds", question, with_article(kind), tuple(with_article(k) for k in KINDS if k != kind),
                f"{word} is {with_article(kind)}.".capitalize())


def _member_fact(rng):
    """The same the other way round: only the choices tell which word is asked for."""
    kind = rng.choice(list(KINDS))
    word, be = rng.choice(KINDS[kind]), with_article(kind)
    others = [w for other, words in KINDS.items() if other != kind for w in words]
    question = pick(["Which [of these|of these words|word|one] is {be}?", "One of these is {be}. Which?"], rng, be=be)
    return Fact("members", question, word, tuple(others), f"{word} is {be}.".capitalize())


def _opposite_fact(rng):
    pair = rng.choice(list(OPPOSITES.items()))
    word, answer = rng.sample(pair, 2)
    others = tuple(sorted({w for p in OPPOSITES.items() for w in p} - set(pair)))
    question = expand("[What is|Which word is] the opposite of {word}?", rng, word=word)
    return Fact("opposites", question, answer, others, f"The opposite of {word} is {answer}.")


CHOICES = {key: sorted({row[0].format(x=x) for x in FRIENDS}) for key, row in ATTRIBUTES.items()} | {
    "names": [friend.name for friend in FRIENDS], "kinds": [with_article(kind) for kind in KINDS],
    "opposites": sorted(OPPOSITES.keys() | OPPOSITES.values())}


def choice_item(rng, subjects=None, ease=0.0):
    """
    A multiple-choice item: (subject, question, four choices in any order, index of the right one). Wrong choices are of
    the right one's kind; each with the probability `ease` of another: to "Where does Mira live?", a baker. From these a
    tiny model learns to look for the answer among the choices at all (dev/LOG.md).
    """
    fact = random_fact(rng, subjects)
    wrong = rng.sample(fact.others, 3)
    if ease:
        pool = {choice for kind in CHOICES.values() if fact.answer not in kind for choice in kind} - set(wrong)
        strange = rng.sample(sorted(pool), 3)
        wrong = [other if rng.random() < ease else choice for choice, other in zip(wrong, strange, strict=True)]
    choices = rng.sample([*wrong, fact.answer], 4)
    return fact.subject, fact.question, choices, choices.index(fact.answer)


def statement(rng, x, attribute):
    """One fact about a friend in one of its wordings."""
    form, statements = ATTRIBUTES[attribute][:2]
    return pick(statements, rng, x=x, v=form.format(x=x))


# -----------------------------------------------------------------------------
# What pretraining reads about the facts: sheets of statements, of questions, of multiple-choice questions


def fact_sheet(rng):
    """All about one friend, in any order and with pronouns; or one kind of fact about six friends."""
    if rng.random() < 0.5:
        x = rng.choice(FRIENDS)
        lines = [statement(rng, x, attribute) for attribute in rng.sample(list(ATTRIBUTES), len(ATTRIBUTES))]
        lines[1:] = [re.sub(f"^{x} (?!the)", f"{x.He} ", line) if rng.random() < 0.3 else line for line in lines[1:]]
    else:
        attribute = rng.choice(list(ATTRIBUTES))
        lines = [statement(rng, x, attribute) for x in rng.sample(FRIENDS, 6)]
    return " ".join(lines)


def question_sheet(rng):
    """Five questions with their answers, or talk between friends who know them."""
    facts = [random_fact(rng, ["friends", "friends", "names", "colours", "opposites"]) for _ in range(5)]
    if rng.random() < 0.5:
        return "\n".join(f"Question: {fact.question}\nAnswer: {fact.sentence}" for fact in facts)
    talk = [(fact, *rng.sample(FRIENDS, 2)) for fact in facts]
    return "\n".join(f'"{fact.question}" asked {x}. "{fact.sentence[:-1]}," said {y}.' for fact, x, y in talk)


def quiz_sheet(items):
    """Multiple-choice items as the tasks ask them, with their answers, the first one with its choice written out."""
    quizzes = []
    for i, (_, question, choices, answer) in enumerate(items):
        reply = f"{choices[answer]}={LETTERS[answer]}" if i == 0 else LETTERS[answer]
        quizzes.append(f"{render_mc(question, LETTERS, choices)}\n{reply}")
    return "\n\n".join(quizzes)


def marked_item(rng, subjects):
    """(subject, question, four choices, index of the right one, index of the one that its sheet leaves out)."""
    return *choice_item(rng, subjects, ease=0.25), rng.randrange(4)


def marked_sheet(items):
    """
    Questions of which each choice is marked right or wrong. One of four choices is left out, now and then the right
    one, or the last mark would be known from the others. Whoever has learned these marks learns to name the letter of
    the right choice much sooner (dev/LOG.md).
    """
    return "\n\n".join("\n".join([question, *(f"- {choice}={'yes' if i == answer else 'no'}"
                                              for i, choice in enumerate(choices) if i != left_out)])
                       for _, question, choices, answer, left_out in items)


# -----------------------------------------------------------------------------
# Stories. x is the hero, y helps, z is the friend at the end of the road; p and q are places.

WHEN = ("[One [morning|day|evening]|On a [sunny|cold|windy|quiet|warm|grey] [morning|afternoon|day]|Early one "
        "morning|One day in [spring|summer|autumn|winter]|After [breakfast|lunch]]")

INTROS = [
    "[Once upon a time, there|There once] was {x.a_animal} [called|named] {x}. {x.He} [lived in the {x.home}|worked as "
    "{x.a_job} in Dellbrook|liked {x.food} more than any other food|was {x.a_job} and lived in the {x.home}].",
    "{x} was {x.a_animal} who [lived in the {x.home}|worked as {x.a_job}|liked to eat {x.food}|owned {x.a_thing}].",
    "In the {x.home} lived {x.a_animal} [called|named] {x}. {x.He} [was a good {x.job}|owned {x.a_thing}|loved "
    "{x.food}].",
    "Everyone in Dellbrook knew {x} the {x.animal}, who [lived in the {x.home}|worked as {x.a_job}|loved {x.food}].",
    "{x} the {x.animal} was [a busy|a good|a kind] {x.job}[.| and a good friend.] {x.He} lived in the {x.home}.",
]

# goal: (what the hero wants and why, how it ends well)
GOALS = [
    ("{x} wanted to bring some {z.food} to {z}, [because {z} liked to eat {z.food}|because {z.food} was the favourite "
     "food of {z}]. {x.He} [packed a bag|filled a big bag] and set out for the {z.home}.",
     "{z} [smiled|laughed|was very happy] when {z.he} saw the {z.food}. They [ate it all together|shared it and talked "
     "until it was dark]."),
    ("it was the birthday of {z} the {z.animal}. {x} had made [a hat|a scarf|a ball|a kite|a blanket] for {z.him}. It "
     "was {z.colour}, because {z.colour} was the favourite colour of {z}. {x} set out for the {z.home}.",
     '"Oh, it is {z.colour}!" [said|cried] {z}. "[It is the best gift of all|That is what I like best|I love it]!"'),
    ("{x} found {z.a_thing} near the {p}. {x.He} knew that {z} owned {z.a_thing}. So {x} [set out for|walked "
     "to|started on the way to] the {z.home} to give it back.",
     '"My {z.thing}!" [cried|said] {z}. "I [looked for it everywhere|thought I had lost it]. [Thank you|You are very '
     'kind], {x}!"'),
    ("{x} needed some {x.food} for supper. {x.He} took a [basket|bag] and set out for the {z.home}, where {z} had more "
     "than enough.",
     "{z} gave {x.him} some {x.food} and [asked for nothing|would not take a coin]. That evening {x} made a "
     "[fine|good|big] supper."),
    ("{x} had promised to meet {z} at the {z.home}. They wanted to [look at the stars|fly a kite|play a game|sing "
     "songs|read a book] together, and {x} did not want to be late.",
     '{z} was still waiting. "[I knew you would come|There you are|I am glad to see you], {x}!" {z.he} said. [It was a '
     'lovely evening|They had a very good time|They laughed and played until night].'),
    ("{x} had a letter for {z} the {z.animal}. The letter was important, so {x} [put it in a bag|held it tight] and "
     "walked [fast|as fast as {x.he} could] to the {z.home}.",
     '{z} opened the letter and read it. "[There will be a party at the {p}|My sister is coming home|There is good '
     'news]!" {z.he} said. [{x} was happy too|Both of them were glad].'),
    ('{x} wanted to learn something new. {z} worked as {z.a_job}, so {x} [thought|said], "{z} can teach me." {x.He} '
     'set out for the {z.home}.',
     "{z} showed {x} how to work as {z.a_job}. It was [hard|not easy] at first, but {x} [tried again and again|did not "
     "give up], and in the end {x.he} could do it."),
    ("{x} heard that {z} was ill. {x.He} made some {z.food}, because {z} loved {z.food}, and took it to the {z.home}.",
     '{z} sat up in bed and ate a little. "[I feel better already|That is very good|You are a true friend]," {z.he} '
     'said.'),
]

# obstacle: (what goes wrong, the hero fails alone, what the hero says, what the helper does, and then)
OBSTACLES = [
    ("the bridge over the river was broken", "{x} tried to jump, but the river was too wide.",
     "I cannot cross the river", "laid a long board over the water",
     "{x} walked over the board, one step at a time."),
    ("a thick fog came down and the path was gone", "{x} walked for an hour and came back to the same [tree|stone].",
     "I cannot find the path", "[lit a lamp|took a bright lamp] and led the way", "Soon the fog was behind them."),
    ("the wheel of the cart sank into the mud", "{x} pulled and pulled, but the cart did not move.", "My cart is stuck",
     "[pushed from behind|brought a strong rope]", "With one great pull the cart came free."),
    ("dark clouds came and it began to rain hard", "{x} hid under a tree, but {x.he} was soon wet and cold.",
     "I am wet and cold", "made a fire in a dry place", "They sat by the fire until the rain stopped."),
    ("a big tree had fallen across the road", "{x} tried to climb over it, but it was too [high|wet].",
     "I cannot get past this tree", "showed {x.him} a small path behind the [hill|stones]",
     "The small path was [short|easy]."),
    ("an angry goose stood on the road and let nobody pass", "{x} said please, but the goose only hissed.",
     "The goose will not let me pass", "gave the goose some [corn|bread]", "The goose ate it and forgot about them."),
    ("a dark forest lay ahead, and {x} was afraid", "{x} took three steps and ran back.",
     "I am afraid of the dark",
     "took {x.him} by the hand and sang a song", "The forest did not seem so dark any more."),
    ("{x} stepped on a [sharp stone|thorn] and hurt {x.his} foot", "{x} tried to walk on, but it hurt too much.",
     "My foot hurts", "washed the foot and tied a cloth around it", "[Soon|After a rest] {x} could walk again."),
]

HELPERS = [
    "[Just then|Then|After a while] {y} the {y.animal} came [along|by|down the road].",
    "{y}, who lived in the {y.home}, [heard the noise and came out|was walking by].",
    "[Luckily|By good luck], {y} the {y.job} was on the way to the {y.home}.",
    "Then {x} saw {y} the {y.animal}, who was [eating {y.food} by the road|on the way to buy {y.food}].",
]

ENDINGS = [
    "From that day on, {x} and {y} were [good|best|close] friends.",
    "That night {x} slept well in the {x.home}.",
    "{x} [never forgot|always remembered] how {y} had helped {x.him}.",
    "On the way home {x} thanked {y} again and gave {y.him} some {y.food}.",
    "And {x} learned that [it is good to ask for help|a friend makes every road shorter|nobody has to do everything "
    "alone].",
    "[The next day|Later] {x} told everyone at the {p} [about it|what had happened], and they all [laughed|clapped].",
]

# Stories without a road: each slot is a list of ways to say it.
SCENES = [
    [["{x} and {y} found [a ball|a kite|an old drum|a little boat] by the {p}."],
     ['"I saw it first!" said {x}. "No, I did!" said {y}.', "Both of them [pulled at it|wanted it], and neither would "
                                                            "let go."],
     ['{z} the {z.animal} [shook {z.his} head|came over]. "[You can take turns|You can share it]," {z.he} said.'],
     ['{x} looked at {y}, and {y} looked at {x}. "I am sorry," said {x}. "[I am sorry too|So am I]," said {y}.'],
     ["They played [together|in turns] until [it was dark|the sun went down], and it was [much better|more fun] than "
      "playing alone."]],
    [['{x} and {y} [wanted to see|could not agree] who was faster. "Let us race to the {p}," said {x}.'],
     ["{z} the {z.job} [counted to three|rang a bell], and off they ran.",
      '{z} came to watch. "One, two, three, go!" {z.he} shouted.'],
     ["{x} was in front, but then {y} fell over a [stone|root] and [cried out|hurt {y.his} leg]."],
     ['{x} stopped at once and ran back. "Are you hurt?" {x.he} asked. "[Only a little|Not much]," said {y}.'],
     ['They walked the rest of the way side by side. "You both win," said {z}, and gave them some {z.food}.']],
    [["{x} could not find {x.his} {x.thing}. {x.He} looked under the bed, [behind the door|on the shelf], and even on "
      "the roof."],
     ['{x.He} went to the {p} and asked {y} the {y.animal}. "I have not seen the {x.thing}," said {y}, "but I will '
      'help you look."'],
     ["They looked by the {q} and found only [an old shoe|a blue button|a cold pie].",
      "They asked {z} at the {z.home}, but {z} did not know."],
     ['Then {y} began to laugh. "What is that on your [back|head]?" {y.he} asked. It was the {x.thing}!'],
     ["{x} laughed too, and they [went home to eat {x.food}|shared some {x.food}]."]],
    [["{x} put a small [black|brown|white] seed into the ground near the {x.home} and gave it water every day."],
     ["One week went by, and then another, but nothing grew. {x} was sad.",
      "Nothing grew for a long time, and {x} wanted to give up."],
     ['"[You have to wait|A seed needs time]," said {y}, who worked as {y.a_job}. "[Give it sun and water|Do not give '
      'up]."'],
     ["Then, one morning, there was a little green leaf. [Before long|Soon] it was as tall as {y}."],
     ["It had [red|yellow|blue|white] flowers, and {x} gave the first one to {y}."]],
    [["{x} sat alone by the {p} and looked at the water. {x.He} felt sad, because {x.he} had nobody to play with."],
     ['{y} the {y.animal} [saw {x.him} and sat down|came and sat down next to {x.him}]. "Why are you so quiet?" asked '
      '{y}.'],
     ['"[I have no one to play with|I feel a little lonely]," said {x}. "Then play with me and {z}," said {y}.'],
     ["They played hide and seek. {x} hid [behind a tree|in a bush|under the bridge], and it took {z} a long time to "
      "find {x.him}."],
     ["[After that|From then on], {x} was never lonely again, for {y} and {z} [came every day|were {x.his} friends]."]],
]


def story(rng, hero=None):
    """One story of 8 to 14 sentences in two or three paragraphs; the hero is random unless given."""
    x, y, z = rng.sample(FRIENDS, 3)
    if hero is not None:
        x, y, z = [hero] + rng.sample([friend for friend in FRIENDS if friend != hero], 2)
    p, q = rng.sample(PLACES, 2)
    scope = dict(x=x, y=y, z=z, p=p, q=q)
    start = pick(INTROS, rng, **scope)
    if rng.random() < 0.4:  # a scene at one place
        middle = [pick(slot, rng, **scope) for slot in rng.choice(SCENES)]
        return f"{start}\n{expand(WHEN, rng)}, {' '.join(middle)}"
    (want, reached), (trouble, attempt, says, deed, after) = rng.choice(GOALS), rng.choice(OBSTACLES)
    road = [f"{expand(WHEN, rng)}, " + expand(want, rng, **scope),
            expand("[But|But on the way] " + trouble + ". ", rng, **scope) + expand(attempt, rng, **scope)]
    meeting = [pick(HELPERS, rng, **scope),
               expand('"[What is the matter|What is wrong|Can I help you]?" asked {y}.', rng, **scope),
               f'"{says}," said {x}.',
               expand('[{y} thought for a moment|"Do not worry," said {y}|"We can do it together," said {y}]. Then '
                      '{y.he} '
                      + deed + ". " + after, rng, **scope)]
    if rng.random() < 0.5:
        meeting.append(expand('"Thank you[, {y}| very much|]!" said {x}. "[You are welcome|I am glad to help]," said '
                              '{y}.', rng, **scope))
    end = [expand("[At last|In the end|Soon] {x} [came to|reached] the {z.home}. ", rng, **scope) + expand(reached, rng,
                                                                                                           **scope),
           pick(ENDINGS, rng, **scope)]
    return "\n".join([f"{start} {' '.join(road)}", " ".join(meeting), " ".join(end)])
