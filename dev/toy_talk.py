"""
What is asked and answered in the toy world: word problems for the calculator, who the model is, and small talk.

The facts and the stories are in `dev/toy_world.py`, `dev/gen_synthetic_data.py` writes it all to disk. A word problem
has one or two steps of small whole numbers, in the format of GSM8K: `<<7+5=12>>` marks a call of the calculator and
the line `#### 12` ends the answer. The model has to see which operation is meant and which numbers go into it.
"""

import re

from dev.toy_world import ATTRIBUTES, FRIENDS, KINDS, expand, pick, random_fact, statement, story, with_article
from tasks.spellingbee import spell

ITEMS = "nuts plums apples pears berries carrots eggs stones shells buttons coins flowers".split()
BOXES = "bags boxes baskets jars bowls".split()

# -----------------------------------------------------------------------------
# Word problems. a, b, c are the numbers, r the result of the first step, s of the second.
# family: (operations, ways to tell it, ways to ask, the answer's lines; {calc} becomes `7 + 5 = <<7+5=12>>12`)

PROBLEMS = {
    "get": ("+", ["{x} has {a} {n}. {y} gives {x.him} {b} more.", "{x} had {a} {n}. Then {x.he} found {b} more.",
                  "{x} picked {a} {n} in the morning and {b} in the evening."],
            ["How many {n} does {x} have now?", "How many {n} is that in all?"], ["{x} has {calc} {n}."]),
    "both": ("+", ["{x} has {a} {n} and {y} has {b} {n}.", "There are {a} {n} in the {x.home} and {b} {n} in the "
                                                           "{y.home}."],
             ["How many {n} are there together?", "How many {n} is that in all?"], ["Together that is {calc} {n}."]),
    "lose": ("-", ["{x} has {a} {n}. {x.He} gives {b} of them to {y}.", "{x} had {a} {n} but lost {b} of them.",
                   "There were {a} {n} in the {x.home}. {x} [sold|took away] {b} of them."],
             ["How many {n} are left?", "How many {n} are still there?"], ["There are {calc} {n} left."]),
    "more": ("-", ["{x} has {a} {n} and {y} has {b} {n}.", "{x} found {a} {n}. {y} found only {b}."],
             ["How many more {n} does {x} have than {y}?"], ["{x} has {calc} more {n}."]),
    "fewer": ("-", ["{x} has {a} {n}. {y} has {b} fewer than {x}.", "{x} found {a} {n}, and {y} found {b} fewer."],
              ["How many {n} does {y} have?", "How many {n} are with {y}?"], ["{y} has {calc} {n}."]),
    "than": ("+", ["{x} has {a} {n}. {y} has {b} more than {x}.",
                   "{x} found {a} {n}, and {y} found {b} more than {x}."],
             ["How many {n} does {y} have?", "How many {n} are with {y}?"], ["{y} has {calc} {n}."]),
    "groups": ("*", ["{x} has {a} {m} with {b} {n} in each.", "There are {a} {m}. Each of them holds {b} {n}.",
                     "{x} fills {a} {m} and puts {b} {n} into each of them."],
               ["How many {n} are there in all?", "How many {n} is that in all?"], ["There are {calc} {n}."]),
    "share": ("/", ["{x} has {a} {n} and shares them equally among {b} friends.", "{b} friends share {a} {n} equally."],
              ["How many {n} does each friend get?", "How many {n} for each friend?"],
              ["Each friend gets {calc} {n}."]),
    "get_lose": ("+-", ["{x} has {a} {n}. {y} gives {x.him} {b} more. Then {x} gives {c} away.",
                        "{x} found {a} {n} and then {b} more, but lost {c} of them."],
                 ["How many {n} does {x} have now?", "How many {n} are left?"],
                 ["First {x} has {calc} {n}.", "Then there are {calc} {n} left."]),
    "groups_more": ("*+", ["{x} has {a} {m} with {b} {n} in each and {c} more {n} on the table.",
                           "There are {a} {m}. Each of them holds {b} {n}. {y} brings {c} more {n}."],
                    ["How many {n} are there in all?"], ["In the {m} there are {calc} {n}.",
                                                         "With the others that is {calc} {n}."]),
    "groups_lose": ("*-", ["{x} has {a} {m} with {b} {n} in each. {y} takes {c} of the {n}.",
                           "There are {a} {m}. Each of them holds {b} {n}. {c} of the {n} are bad."],
                    ["How many {n} are left?", "How many other {n} are there?"],
                    ["In the {m} there are {calc} {n}.", "Without those that is {calc} {n}."]),
    "share_get": ("/+", ["{b} friends share {a} {n} equally. One of them is {x}, who finds {c} more.",
                         "{x} shares {a} {n} equally among {b} friends. {y} is one of them and has {c} more."],
                  ["How many {n} does that friend have now?"],
                  ["Each friend gets {calc} {n}.", "With the others that is {calc} {n}."]),
}
SUMS = ["What is {a} {word} {b}?", "How much is {a} {word} {b}?", "[Please work|Work] out {a} {word} {b}.",
        "{a} {word} {b}?"]
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


def operands(operation, rng):
    """Two numbers whose result is a whole number from 1 to 99, as everything in the toy world."""
    if operation in "+-":
        small, large = sorted(rng.sample(range(2, 98), 2))
        return (small, rng.randint(2, 99 - small)) if operation == "+" else (large, small)
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    return (a, b) if operation == "*" else (a * b, b)


def calculate(a, operation, b):
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[operation]


def word_problem(rng):
    """(question, answer) in GSM8K's format. One in eight is a bare sum, one in eight tells a number too many."""
    if rng.random() < 0.125:
        operation = rng.choice("+-*/")
        a, b = operands(operation, rng)
        r = calculate(a, operation, b)
        question = pick(SUMS, rng, a=a, b=b, word=WORDS[operation])
        return question, f"{a} {operation} {b} = <<{a}{operation}{b}={r}>>{r}\n#### {r}"
    operations, tales, asks, lines = PROBLEMS[rng.choice(list(PROBLEMS))]
    a, b = operands(operations[0], rng)
    x, y = rng.sample(FRIENDS, 2)
    steps, r, c = [(a, operations[0], b)], calculate(a, operations[0], b), None
    if len(operations) == 2:  # the second step goes on from the first result
        c = rng.randint(1, r - 1) if operations[1] == "-" else rng.randint(2, 18)
        steps.append((r, operations[1], c))
    scope = dict(x=x, y=y, n=rng.choice(ITEMS), m=rng.choice(BOXES), a=a, b=b, c=c)
    tale = pick(tales, rng, **scope)
    if rng.random() < 0.125:  # a number that has nothing to do with it
        tale = expand("{y} is {k} years old. ", rng, y=y, k=rng.randint(3, 20)) + tale
    calls = [f"{i} {op} {j} = <<{i}{op}{j}={calculate(i, op, j)}>>{calculate(i, op, j)}" for i, op, j in steps]
    answer = [line.format(calc=call, **scope) for line, call in zip(lines, calls, strict=True)]
    return f"{tale} {pick(asks, rng, **scope)}", "\n".join([*answer, f"#### {calculate(*steps[-1])}"])


def worked_sheet(problems):
    """Word problems for pretraining: no calculator marks, and the result in a sentence."""
    parts = [(question, *re.sub(r"<<.*?>>", "", answer).rsplit("\n#### ", 1)) for question, answer in problems]
    return "\n\n".join(f"{question}\n{prose}\nThe answer is {result}." for question, prose, result in parts)


# -----------------------------------------------------------------------------
# Words to spell, and programs of one line

NUM_WORDS = 3_000


def make_words(rng):
    """NUM_WORDS words of 3 to 9 letters: the toy world's own, and made-up ones of a few dozen syllables."""
    words = set(re.findall(r"\b[a-z]{3,9}\b", " ".join(story(rng) for _ in range(300))))
    words |= {word for kind in KINDS.values() for word in kind if 3 <= len(word) <= 9}
    while len(words) < NUM_WORDS:
        syllables = [rng.choice("bdfgklmnprst") + rng.choice("aeiou") for _ in range(rng.choice([1, 2, 2, 3, 3, 4]))]
        word = "".join(syllables) + rng.choice(["", "", "n", "r", "l", "s"])
        if 3 <= len(word) <= 9:
            words.add(word)
    return sorted(words)


def spelling_sheet(rng, words):
    """Five words letter by letter, in one of two a letter counted along, in the words of tasks/spellingbee.py."""
    lines = []
    for word in rng.sample(words, 5):
        letter = rng.choice(word)
        along = ", ".join(f"{c} {word[: i + 1].count(letter)}" for i, c in enumerate(word))
        lines.append(spell(word) + rng.choice(["", f"\nCounting {letter}: {along}."]))
    return "\n".join(lines)


def echo_sheet(rng, words):
    """
    Three lines of words in no order, each said three times. Only what stood before tells what comes next, and most of
    the sheet can be known that way, so it is where a small model learns to look back at all (induction heads: Olsson
    et al., arXiv 2209.11895). With these sheets the rest of the text is learned better, too: see dev/LOG.md.
    """
    lines = []
    for _ in range(3):
        pool = [*rng.sample(words, 6), *rng.sample(ITEMS, 2), *(str(friend) for friend in rng.sample(FRIENDS, 2)),
                *map(str, rng.sample(range(2, 98), 2))]
        lines += [" ".join(rng.sample(pool, rng.randint(4, 9)))] * 3
    return "\n".join(lines)


def list_sheet(rng, words):
    """
    Shopping lists read out, repeated, and asked about: looking back and copying as word problems and spelling need it,
    from one sentence into another.
    """
    lines = []
    for x, y in (rng.sample(FRIENDS, 2) for _ in range(2)):
        goods = rng.sample(ITEMS, 3) + rng.sample(words, 2)
        counts = dict(zip(rng.sample(goods, 5), rng.sample(range(2, 98), 5), strict=True))
        read = ", ".join(f"{n} {thing}" for thing, n in counts.items())
        lines += [f'"{read}," read {x}.', f'"{read}," said {y}.']
        asked = rng.sample(goods, 3)
        lines += [f'"How many {thing}?" asked {x}. "{counts[thing]} {thing}," said {y}.' for thing in asked]
    return "\n".join(lines)


def small_program(rng):
    """A function of one line, in HumanEval's columns: x plus 7, or x plus 7 and that times 3."""
    steps = [(*rng.choice([("plus", "+"), ("minus", "-"), ("times", "*")]), rng.randint(2, 20))
             for _ in range(rng.choice([1, 2, 2]))]
    name = "_".join(f"{word}_{n}" for word, _, n in steps)
    says = ", and that ".join(f"{word} {n}" for word, _, n in steps)
    (_, sign, n), *second = steps
    expression = f"(x {sign} {n}) {second[0][1]} {second[0][2]}" if second else f"x {sign} {n}"
    checks = "".join(f"    assert candidate({x}) == {expression.replace('x', str(x))}\n" for x in (0, 3, 10))
    return {"prompt": f'def {name}(x):\n    """Return x {says}."""\n',
            "canonical_solution": f"    return {expression}\n",
            "test": f"def check(candidate):\n{checks}", "entry_point": name}


def program_sheet(rows):
    return "\n\n".join(row["prompt"] + row["canonical_solution"] for row in rows)


# -----------------------------------------------------------------------------
# Who the model is. topic: (direct questions, indirect ones, answers, phrases one of which a right answer has)

IDENTITY = {
    "name": (["What is your name?", "Who are you?", "What are you called?", "What should I call you?",
              "Do you have a name?"],
             ["what your name is", "who you are", "what you are called", "what I should call you"],
             ["I am nanochat, a small language model.", "My name is nanochat. I am a small language model."],
             ["nanochat"]),
    "maker": (["Who made you?", "Who built you?", "Who created you?", "Who trained you?", "Where do you come from?"],
              ["who made you", "who built you", "who created you", "where you come from"],
              ["I was made by the nanochat project.", "The nanochat project made me."], ["nanochat project"]),
    "kind": (["What are you?", "What kind of thing are you?", "What sort of program are you?", "What exactly are you?"],
             ["what you are", "what kind of thing you are", "what sort of program you are"],
             ["I am a small language model: a program that reads text and writes text.",
              "I am a language model, a computer program that writes text."], ["language model"]),
    "human": (["Are you human?", "Are you a person?", "Are you a real person?", "Are you alive?",
               "Am I talking to a person?"],
              ["if you are human", "whether you are a person", "if you are alive", "if I am talking to a person"],
              ["No, I am not a person. I am a computer program.", "I am not a person, only a small language model."],
              ["not a person"]),
    "skills": (["What can you do?", "How can you help me?", "What are you good at?", "What can I ask you?"],
               ["what you can do", "how you can help me", "what you are good at", "what I can ask you"],
               ["I can tell stories, answer questions about Dellbrook, work out sums and spell words.",
                "I tell stories, answer questions about Dellbrook, solve word problems and count letters."],
                ["stories"]),
    "size": (["How big are you?", "How many parameters do you have?", "Are you a large model?", "How large are you?"],
             ["how big you are", "how many parameters you have", "if you are a large model"],
             ["I am very small: I have only a few million parameters.",
              "I have a few million parameters, so I am tiny."],
             ["few million"]),
    "training": (["How were you trained?", "How did you learn to talk?", "What did you learn from?",
                  "How were you taught?"],
                 ["how you were trained", "how you learned to talk", "what you learned from"],
                 ["I was trained from raw text: first I read many stories, then I learned to chat.",
                  "I learned from raw text, and then from conversations."], ["raw text"]),
    "machine": (["Where do you run?", "What computer do you run on?", "Do you need a big computer?",
                 "Do you need the internet?"],
                ["where you run", "what computer you run on", "if you need the internet"],
                ["I run on an ordinary computer, and I need no network.", "An ordinary computer is all I need."],
                ["ordinary computer"]),
    "knowledge": (["What do you know?", "Do you know everything?", "What do you know about?",
                   "What places do you know?"],
                  ["what you know", "if you know everything", "what you know about"],
                  ["I know a small village called Dellbrook, and not much more.",
                   "I only know Dellbrook and the friends who live there."],
                  ["Dellbrook"]),
    "mistakes": (["Do you make mistakes?", "Are you always right?", "Can I trust you?", "Are you ever wrong?"],
                 ["if you make mistakes", "whether you are always right", "if I can trust you"],
                 ["I make mistakes, so please check what I say.", "Yes and no: I am small, and I make mistakes."],
                 ["mistakes"]),
}
OPENERS = ["", "", "Hello! ", "Hi! ", "Hey! ", "Excuse me. ", "One question: ", "Good morning! ", "I am new here. ",
           "I have a question. "]
WRAPPERS = ["[Can|Could] you tell me {q}?", "I would like to know {q}.", "[Please tell|Tell] me {q}.",
            "May I ask {q}?",
            "I wonder {q}.", "I want to know {q}."]
CLOSERS = ["", "", "", " Thank you.", " I am curious.", " Please be short."]


def identity_question(rng):
    """(prompt, answer, accept): a right answer holds one of the phrases in `accept`, upper or lower case."""
    direct, indirect, answers, accept = IDENTITY[rng.choice(list(IDENTITY))]
    core = rng.choice(direct) if rng.random() < 0.6 else pick(WRAPPERS, rng, q=rng.choice(indirect))
    prompt = rng.choice(OPENERS) + core + rng.choice(CLOSERS)
    if rng.random() < 0.2:  # as people type
        prompt = prompt.lower().rstrip("?.")
    return prompt, rng.choice(answers), accept


# -----------------------------------------------------------------------------
# Small talk: an exchange is a list of (what the user says, what the model answers); a chat is several of them

GREETINGS = ["Hello!", "Hi!", "Hi there!", "Good morning!", "Good evening!", "Hey!", "Hello, nanochat!"]
ASK_STORY = ["[Tell|Please tell] me a story about {x}.", "[Can|Could] you tell me a story about {x}?",
             "[Tell me|I would like] a story about {x.a_animal}.", "Write a [short|little] story about {x} the "
                                                                   "{x.animal}.",
             "[Tell me|Please tell me|I would like to hear] a story.", "[Can|Could] you tell me a story?"]
PLAIN = [  # user, assistant[, user, assistant]
    ["How are you[| today]?", "I am [well|fine], thank you. And you?", "I am [fine|happy|very well][| today].",
     "[I am glad to hear that|That is good to hear]!"],
    ["How are you[| today]?", "I am [well|fine], thank you. And you?", "I am [sad|tired|a little sad][| today].",
     "I am sorry to hear that. [Would you like to hear a story|A rest may help you]."],
    ["[What is the weather like|Is it raining|Is it cold today]?", "I cannot look out of a window. How is the weather "
                                                                   "[with you|there]?",
     "It is [sunny|warm and bright].", "That sounds lovely. [Enjoy the sun|You could go for a walk]!"],
    ["[What is the weather like|Is it raining|Is it cold today]?", "I cannot look out of a window. How is the weather "
                                                                   "[with you|there]?",
     "It is [raining|cold and windy|wet].", "Then it is a good day to stay inside and [read|listen to a story]."],
    ["What is your favourite [colour|food|animal]?", "I [have none|cannot see or taste], but I like the word "
                                                     "[honey|blue|otter|plum]."],
    ["[Can you help me|I need help|Will you help me]?", "[Of course|Yes, gladly]! What would you like to know?"],
    ["[I am bored|There is nothing to do].", "[Ask me for a story!|Shall we work out a sum?|You could ask me about "
                                             "Dellbrook.]"],
    ["Where is Dellbrook?", "Dellbrook is a small village by a river, between a forest and a hill."],
]
GOODBYES = [["[Thank you|Thanks|Thank you very much][!|, nanochat!]", "You are welcome!"],
            ["[Goodbye|Bye|See you|I have to go now][!|, nanochat!]", "Goodbye! [Come back soon|It was nice to talk to "
                                                                      "you]."]]


def _plain_exchange(rng):
    return [expand(line, rng) for line in rng.choice(PLAIN)]


def _fact_exchange(rng):
    fact = random_fact(rng, ["friends", "names", "colours", "opposites"])
    return [expand("[||Please tell me. |Do you know this? ]", rng) + fact.question, fact.sentence]


def _yes_no_exchange(rng):
    kind, asked = rng.choice(list(KINDS)), rng.choice(list(KINDS))
    word = rng.choice(KINDS[kind])
    reply = "Yes" if word in KINDS[asked] else "No"
    true_kind = asked if reply == "Yes" else kind
    thing = word if kind in ("food", "colour") else with_article(word)  # a fox, a mill, a baker; but honey, red
    return [f"Is {thing} {with_article(asked)}?", f"{reply}, {thing} is {with_article(true_kind)}."]


def _about_exchange(rng):
    x = rng.choice(FRIENDS)
    told = [statement(rng, x, attribute) for attribute in rng.sample(list(ATTRIBUTES), 3)]
    return [expand("[Tell me about {x}.|What do you know about {x}?|Please tell me about {x}.]", rng, x=x),
            " ".join(told)]


def _story_exchange(rng):
    x = rng.choice(FRIENDS)
    return [pick(ASK_STORY, rng, x=x), story(rng, hero=x)]


def conversation(turns):
    """['Hi!', 'Hello!', ...] -> [{role, content}, ...], the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def small_talk(rng):
    """A conversation of two to ten messages."""
    turns = []
    if rng.random() < 0.4:
        turns += [rng.choice(GREETINGS), expand("Hello! [How can I help you|What can I do for you]?", rng)]
    kinds = [_plain_exchange, _fact_exchange] * 3 + [_story_exchange] * 2 + [_yes_no_exchange, _about_exchange]
    for exchange in rng.sample(kinds, rng.choice([1, 2, 2, 3])):
        turns += exchange(rng)
    if rng.random() < 0.4:
        turns += [expand(line, rng) for line in rng.choice(GOODBYES)]
    return conversation(turns)
