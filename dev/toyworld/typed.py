"""
How people type: lower case, no question mark, contractions, slips of the finger, politeness around the wish.

`typed` turns a template in plain lower case into such a message. Only the template's own words suffer slips; what fills
its slots (names, numbers, words to spell) stays as it is, since the answer has to copy it.
"""

import re

from dev.toyworld.grammar import Slots, capitalize, expand, repair

QUESTION_WORDS = ("what who whom whose which where when why how is are am was were do does did can could will would "
                  "should shall may has have had if whats whos hows wheres isn't aren't").split()
REQUEST_WORDS = ("tell give say name list write show make spell count sing repeat calculate compute find explain "
                 "define describe add multiply divide subtract solve work translate draw help sound read teach").split()

OPENINGS = ("hey, |hi, |ok, |ok |so |so, |well, |um, |hmm, |please |now |now, |and |excuse me, |one question: |"
            "quick question: |question: |hello, |hey {name}, |{name}, |listen, |i wonder, |just curious, |oh, |"
            "yo |good, |great, |alright, |sorry, |hello {name}, |right, |dear {name}, |next question: |"
            "another question: |i have a question: |hey there, |ah, |my question is: |say, |cool, |"
            "i am curious: |can i ask, |let me ask you this: |i was wondering, |i have to ask, |real quick, |"
            "a quick one: |for school: |my homework: |my son asks: |my daughter wants to know, |my friend asks, |"
            "sorry to bother you, |help me out, |i need your help. |i have a question. |excuse me. |"
            "hello there. |good day. |i want to ask something. |just one thing: ").split("|")
ENDINGS = (" please| please|, please| for me| then| now| thanks|, thanks| thank you| {name}|, {name}| again|"
           " if you can| :)| today| i wonder| my friend| do you know|, just curious| if you know|, tell me|"
           " lol| haha|, ok| bro| right now|, my friend| quickly").split("|")
STATEMENT_OPENINGS = "well, |hey, |oh, |ok, |hmm, |hi, |yes, |you know, |so, |honestly, |to be honest, ".split("|")

CONTRACTIONS = {
    "what is": "what's", "who is": "who's", "where is": "where's", "how is": "how's", "i am": "i'm", "it is": "it's",
    "that is": "that's", "you are": "you're", "do not": "don't", "does not": "doesn't", "did not": "didn't",
    "cannot": "can't", "is not": "isn't", "are not": "aren't", "i would": "i'd", "let us": "let's",
    "there is": "there's", "we are": "we're", "will not": "won't", "they are": "they're", "i will": "i'll",
}
CONTRACTED = re.compile(rf"\b({'|'.join(CONTRACTIONS)})\b(?=[^.?!,]*\w)")
SHORT_FORMS = {"you": "u", "are": "r", "your": "ur", "please": "pls", "thanks": "thx", "want to": "wanna",
               "going to": "gonna", "give me": "gimme", "because": "cuz", "about": "abt"}
PROPER = re.compile(r"\b(i|i'm|i'd|i've|i'll|monday|tuesday|wednesday|thursday|friday|saturday|sunday|january|february|"
                    r"march|april|june|july|august|september|october|november|december|dellbrook|english|french|"
                    r"spanish|german|london|paris|google|python|christmas|easter|europe|africa)\b")


def is_question(text):
    return text.split(" ", 1)[0].split("'")[0].strip(",") in QUESTION_WORDS


def is_request(text):
    return text.split(" ", 1)[0].strip(",") in REQUEST_WORDS


def slip(word, rng):
    """One finger wrong: two letters swapped, one left out, one doubled or one hit beside."""
    i = rng.randrange(1, len(word) - 1)
    before = word[:i]
    letter = word[i]
    after = word[i + 1:]
    kind = rng.randrange(4)
    if kind == 0:
        return before + after[0] + letter + after[1:]
    if kind == 1:
        return before + after
    if kind == 2:
        return before + letter + letter + after
    return before + rng.choice("aeioutnsrl") + after


def contract(text, rng):
    """Some of the contractions, some of them without their apostrophe."""
    def shorter(match):
        chance = rng.random()
        if chance > 0.6:
            return match[0]
        short = CONTRACTIONS[match[0]]
        return short.replace("'", "") if chance < 0.18 else short

    return CONTRACTED.sub(shorter, text)


def shorten(text):
    """'your' -> 'ur', as in a text message."""
    for long, short in SHORT_FORMS.items():
        text = re.sub(rf"\b{long}\b", short, text)
    return text


def misspell(text, rng):
    """A slip in one of the words of four letters or more, if there is one."""
    places = [match for match in re.finditer(r"(?<![{\w])[a-z]{4,}(?![}\w])", text)]
    if not places:
        return text
    match = rng.choice(places)
    return text[: match.start()] + slip(match[0], rng) + text[match.end():]


def decorate(text, rng, frame):
    """Words of no weight before and behind."""
    asks = is_question(text) or is_request(text)
    openings = OPENINGS if asks else STATEMENT_OPENINGS
    if rng.random() < 0.2 * frame:
        text = rng.choice(openings) + text
    if asks and rng.random() < 0.13 * frame:
        text += rng.choice(ENDINGS)
    return text


def punctuate(text, mark, rng):
    if text.endswith((".", "!", "?", ":)", "=")):
        return text
    ends = [mark, mark, mark, ""] if mark == "?" else [".", "", "", "!"]
    return text + rng.choice(ends) + ("?" if mark == "?" and rng.random() < 0.03 else "")


def typed(template, rng, frame=1.0, **slots):
    """
    A message as somebody may type it. frame: how often words of no weight stand around it, 0 for never.

    Lower-case messages have lower-case slots, so that "paris" is as well known as "Paris"; a slot whose name begins
    with `exact` stays as it is.
    """
    text = decorate(expand(template, rng), rng, frame)
    mark = "?" if is_question(text) or is_question(re.sub(r"^[^,:]*[,:] ", "", text)) else "."
    text = contract(text, rng)
    if rng.random() < 0.03:
        text = shorten(text)
    if rng.random() < 0.07:
        text = misspell(text, rng)
    style = rng.random()
    if style < 0.42:  # in a hurry
        text = text.replace(", ", " ") if rng.random() < 0.4 else text
    else:
        text = punctuate(text, mark, rng)
    slots.setdefault("name", "nanochat")
    if style < 0.62:
        slots = {key: value if key.startswith("exact") else str(value).lower() for key, value in slots.items()}
    else:
        text = PROPER.sub(lambda match: capitalize(match[0]), text)
        text = capitalize_start(text)
    text = repair(text.format_map(Slots(slots)))
    if style > 0.99 and not any(key.startswith("exact") for key in slots):
        text = text.upper()
    return text


def typed_one(templates, rng, frame=1.0, **slots):
    """One of the templates, as somebody may type it."""
    return typed(rng.choice(templates), rng, frame, **slots)


def capitalize_start(text):
    """'what is' -> 'What is', '{thing} is' -> '{Thing} is'"""
    if text.startswith("{exact"):
        return text
    if text.startswith("{"):
        return "{" + text[1].upper() + text[2:]
    return capitalize(text)
