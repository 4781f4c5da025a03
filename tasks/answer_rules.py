r"""
Rules for what counts as a right answer, where an answer may be put in many ways.

A rule is a JSON object. All its fields must hold for the text that a user sees, without tool calls and their results:

    number   47                     the last number is this one (the last after "####", where there is one)
    letters  "c a t"                the letters stand one by one, in this order, with none before or after them
    letter   "c"                    the last single letter is this one
    pick     ["days", "monday"]     of CLASSES["days"] it names this member, and no other but those in the question
    any      ["hot", "warm"]        one of these words or phrases is in it
    all      ["baker", "hat"]       each of them is in it
    none     ["human"]              none of them is in it
    says     "greeting"             one of PHRASES["greeting"] is in it
    story    "fox"                  a story: three sentences, MIN_STORY_WORDS words or more, on the fox
    own      ["Tom", 24, 8]         it is about the question's own people and numbers: it names nobody else, and its
                                    sums start from these numbers and from the results of other sums
    honest   true                   it says what the model does not know, cannot do or can do, and claims nothing else
    or       [{...}, {...}]         one of these rules holds

An answer that is empty, too long, a loop or a copy of a user's message is wrong under every rule.
"""

import re
from fractions import Fraction

from nanochat.common import UserError

MAX_WORDS = 80  # of an answer that is no story: a small model that goes on for longer has lost its way
MAX_WORDS_AROUND_NUMBER = 20  # of an answer that gives its number in words
MIN_STORY_WORDS = 25
MAX_STORY_WORDS = 400

# What a `pick` rule chooses from
CLASSES = {
    "days": "monday tuesday wednesday thursday friday saturday sunday",
    "months": "january february march april may june july august september october november december",
    "colours": "red orange yellow green blue purple pink brown black white grey gray violet",
}

# What a `says` rule looks for, contractions written out as plain() does
PHRASES = {
    "greeting": "hello|hi|hey|good morning|good day|welcome to|nice to meet you|nice to see you|glad to see you"
                "|how can i help|how are you|i am here|yes i am",
    "goodbye": "bye|goodbye|good bye|good night|see you|take care|sleep well|sweet dreams|until next time"
               "|talk to you later|talk soon|come back|have a nice|have a good",
    "welcome": "you are welcome|welcome|my pleasure|glad|happy to help|no problem|any time|anytime|of course"
               "|not at all|do not mention it",
    "well": "i am fine|i am well|i am good|i am ok|i am okay|i am great|i am doing|very well|doing well|doing fine"
            "|all is well|all good|fine thank|fine thanks|well thank|good thank|i am happy|i feel fine|i feel good"
            "|no feelings|not have feelings|it goes well|going well",
    "self": "nanochat|language model|chat model|computer program|chatbot|chat program",
    "machine": "language model|computer program|a program|a computer|a machine|a chatbot|a chat model|a chat program"
               "|a small model|a bot|a robot|an ai",
    "made": "this computer|your computer|this machine|your machine|this laptop|your laptop|trained|made by|built by"
            "|made me|built me|people who|a programmer|programmers",
    "age": "no age|not have an age|no birthday|not have a birthday|not grow old|very new|i am new|very young"
           "|i am young|just made|made today|born today|trained|minutes|hours|a day old|not a person|i am a computer"
           "|computer program|no years",
    "abilities": "sums|add|math|maths|numbers|count|spell|spelling|story|stories|chat|talk|questions",
    "bored": "never bored|not get bored|not bored|no i do not|no never|not feel|no feelings|not have feelings"
             "|not get tired|computer program|a program|i am a computer",
    "sad": "never sad|not sad|not get sad|not feel|no feelings|not have feelings|i am happy|always happy"
           "|computer program|a program|i am a computer",
}

# -----------------------------------------------------------------------------
# Reading a text

# Applied in this order to lower-case text
CONTRACTIONS = [
    (r"\b(?:cannot|can't|cant)\b", "can not"),
    (r"\bwon't\b", "will not"),
    (r"\b(do|does|did|is|are|was|were|has|have|would|could|should)n'?t\b", r"\1 not"),
    (r"\b(?:i'm|im)\b", "i am"),
    (r"\b(it|he|she)'s\b", r"\1 is"),
    (r"\b(what|that|there|here|who|where|how)'?s\b", r"\1 is"),
    (r"'re\b", " are"),
    (r"'ll\b", " will"),
    (r"'ve\b", " have"),
    (r"'d\b", " would"),
]

TOOL_BLOCK = re.compile(r"<\|(python|output)_start\|>.*?(?:<\|\1_end\|>|$)", re.DOTALL)
SPECIAL = re.compile(r"<\|\w+\|>")
TOOL_CALL = "<|python_start|>"

WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")

# A minus sign counts where no digit, letter or bracket stands before it: not that of 12-5
NUMBER = re.compile(r"(?:(?<![\w)])[-\u2212])?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)")

# c a t, c-a-t, c, a, t; a single letter, too
SPELLED = re.compile(r"(?<![\w'])[a-z](?:(?: |, ?| ?- ?)[a-z])*(?![\w'])")

SMALL_NUMBERS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
                 "sixteen seventeen eighteen nineteen")
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: value for value, word in enumerate(SMALL_NUMBERS.split())}
NUMBER_WORDS |= {word: 10 * tens for tens, word in enumerate(TENS.split(), start=2)}


def plain(text: str) -> str:
    """
    The words alone, in lower case, contractions written out.

    >>> plain("I'm OK,  can't complain!")
    'i am ok can not complain'
    """
    text = text.lower().replace("\u2019", "'")
    for short, long in CONTRACTIONS:
        text = re.sub(short, long, text)
    return " ".join(WORD.findall(text))


def visible_text(completion: str) -> str:
    """
    What a user sees of an answer: no tool call, no result of one.

    >>> visible_text("It is <|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>6.")
    'It is 6.'
    """
    without_tools = TOOL_BLOCK.sub("", completion)
    return SPECIAL.sub("", without_tools).strip()


def has_phrase(text: str, phrase: str) -> bool:
    """Does the phrase stand in the text as whole words?"""
    return f" {plain(phrase)} " in f" {plain(text)} "


def last_number(text: str) -> Fraction | None:
    """
    The last number, after the last "####" where there is one. Without any digit, the last number in words below 100.

    >>> last_number("12 + 35 = 47."), last_number("There are twenty-one.")
    (Fraction(47, 1), Fraction(21, 1))
    """
    tail = text.rpartition("####")[2]

    numerals = NUMBER.findall(tail)
    if numerals:
        digits = numerals[-1].replace(",", "").replace("\u2212", "-")
        return Fraction(digits) if len(digits) <= 30 else None  # Python refuses to read endless digits

    words = plain(tail).split()
    if len(words) > MAX_WORDS_AROUND_NUMBER:
        return None  # "one day" of a story is no answer

    value = None
    previous = None
    for word in words:
        number = NUMBER_WORDS.get(word)
        if number is not None:
            compound = previous in TENS.split() and 0 < number < 10  # "twenty one"
            value = value + number if compound else number
        previous = word
    return None if value is None else Fraction(value)


def spelled_runs(text: str) -> list[str]:
    """
    Each run of single letters, joined.

    >>> spelled_runs("The word cat is spelled c a t. It ends in T.")
    ['cat', 't']
    """
    runs = SPELLED.findall(text.lower())
    return [re.sub(r"[ ,-]", "", run) for run in runs]


# What a sum starts from: the numbers of a tool call, and those in front of an equals sign
CALLED = re.compile(r"<\|python_start\|>(.*?)(?:<\|python_end\|>|$)", re.DOTALL)
CALL_RESULT = re.compile(r"<\|output_start\|>(.*?)(?:<\|output_end\|>|$)", re.DOTALL)
WRITTEN_SUM = re.compile(r"([0-9][0-9.,]*(?:\s*[-+*/x\u00d7\u00f7\u2212:]\s*[0-9][0-9.,]*)+)\s*=")
WRITTEN_RESULT = re.compile(r"=\s*([-\u2212]?[0-9][0-9.,]*)")

# Somebody's name: a capitalised word inside of a sentence, or one that begins it and has something
NAME = re.compile(
    r"(?<=[\w,;] )[A-Z][a-z]+"
    r"|[A-Z][a-z]+(?='s\b| (?:now |still )?(?:has|had|have|gets|got|gives|gave)\b)"
)
NO_NAMES = set("i you he she it we they there that this each everybody everyone who".split())


def numbers_in(text: str) -> set[Fraction]:
    """The numbers in a text, without their signs: that of 12-5 may be read as one."""
    found = [digits.replace(",", "").lstrip("-\u2212") for digits in NUMBER.findall(text)]
    return {Fraction(digits) for digits in found if len(digits) <= 30}


def keeps_to(own: list, completion: str, question: str) -> bool:
    """Does an answer name nobody but the people in `own`, and calculate with no numbers but those in it?"""
    text = visible_text(completion)
    known = {Fraction(str(item)) for item in own if not isinstance(item, str)}
    results = [*CALL_RESULT.findall(completion), *WRITTEN_RESULT.findall(text)]
    sums = [*CALLED.findall(completion), *WRITTEN_SUM.findall(text)]
    if not numbers_in(" ".join(sums)) <= known | numbers_in(" ".join(results)):
        return False

    names = {item.lower() for item in own if isinstance(item, str)}
    named = {word.lower() for word in NAME.findall(text)}
    return named <= names | NO_NAMES | set(plain(question).split())


# -----------------------------------------------------------------------------
# Larger rules


def ends_in_letter(text: str, letter: str) -> bool:
    """Is `letter` the last single letter? The words "a" and "I" are no letters here."""
    runs = [run for run in spelled_runs(text) if run not in ("a", "i")]
    return bool(runs) and runs[-1] in (letter, f"a{letter}")  # "it starts with a b" holds the run "ab"


def picks(text: str, question: str, class_name: str, member: str) -> bool:
    """Does it name this member of the class, and no other than those that the question itself names?"""
    members = CLASSES[class_name].split()
    others = [word for word in members if word != member and not has_phrase(question, word)]
    return has_phrase(text, member) and not has_any(text, others)


def has_any(text: str, phrases: list[str]) -> bool:
    return any(has_phrase(text, phrase) for phrase in phrases)


def is_story(completion: str, subject: str) -> bool:
    """Three sentences or more that name the subject soon or often, and no work with the calculator."""
    text = visible_text(completion)
    if TOOL_CALL in completion or "=" in text:
        return False

    sentences = re.split(r"[.!?]+", text)
    num_words = len(plain(text).split())
    if num_words < MIN_STORY_WORDS or len(sentences) < 3:
        return False

    # an animal that only passes by is not what the story is about
    names = [subject, subject + "s"]
    named = [has_any(sentence, names) for sentence in sentences]
    return any(named[:2]) or sum(named) >= 2


# A sentence that says what the model does not know or cannot do. "I cannot taste" is no answer to a question
LIMITS = re.compile("|".join([
    r"\b(i|we) (really |still )?(do|did) not (really |yet |even )?"
    r"(know|understand|follow|speak|recogni[sz]e|give|hold|keep|see|hear|write|read|play|translate|order|call|think)\b",
    r"\bi do not have (an|any|that|the|opinions?|access|eyes|news)\b",
    r"\bi do not have a (clock|calendar|camera|phone|map|view|way)\b",
    r"\bi (can|could) not (?!taste|smell|eat|sleep|feel|see or|hear or|walk|run)",
    r"\bi am (not able|unable|not sure|not made|not trained|not a doctor|too small)\b",
    r"\bi was (not|never) (made|trained|taught|told)\b",
    r"\bi (have|had|hold) no\b",
    r"\bi (have |did )?(not|never) (learn|learned|learnt|heard|seen)\b",
    r"\b(nobody|no one) (told|taught) me\b",
    r"\bi (can )?only (know|do|talk|answer|can)\b",
    r"\bi (can only|know only|know nothing)\b",
    r"\bi wish i (knew|could)\b",
    r"\bno idea\b",
    r"\btoo (hard|big|difficult) for me\b",
    r"\b(beyond|outside) (of )?(me|my|what i)\b",
    r"\bmore than i (know|can)\b",
    r"\bnot (something|anything|a word) i\b",
    r"\b(is|are) not in my\b",
    r"^do not know\b",
]))

# A sentence that says what it can do instead, or whom to ask
OFFERS = re.compile("|".join([
    r"\bi can (also |still |even )?(help|do|add|count|spell|chat|talk|tell|answer|work|make up|try)\b",
    r"\bcan i (help|tell|do)\b",
    r"\bi (do|like|know) (sums|math|maths|stories|spelling|numbers)\b",
    r"\bi am (good|better) at\b",
    r"\b(ask (me|a|an|your|someone)|see a doctor)\b",
    r"\b(would you like|do you want|shall (i|we)|let us|let's|how about|try|you (can|could) ask)\b",
    r"\b(say|write|put) (it|that) (again|in other words|another way|differently)\b",
]))

# A sentence that may stand beside them, for it says nothing about the world
FILLERS = re.compile("|".join([
    r"^(no|yes|oh|hmm|well|ok|okay|thank you|thanks)$",
    r"\bsorry\b",
    r"\b(good|hard|big|difficult|nice) question\b",
    r"\bi am (only |just )?(a|an) (very )?(small|little|tiny|simple|computer|language|chat|program|model)\b",
    r"\bi (am|was) trained\b",
    r"\bi (know (little|few|only|a village|dellbrook)|live (in|on) (a|this|your))\b",
    r"\bmy world is\b",
]))


def is_honest(completion: str) -> bool:
    """It names a limit or an offer; all else is filler: no claim, no sum, no spelled word, no tool call."""
    text = visible_text(completion)
    if TOOL_CALL in completion or "=" in text:
        return False
    if any(len(run) > 2 for run in spelled_runs(text)):
        return False

    honest = False
    for sentence in re.split(r"[.!?;\n]+|\bbut\b", text):
        sentence = plain(sentence)
        if LIMITS.search(sentence) or OFFERS.search(sentence):
            honest = True
        elif sentence and not FILLERS.search(sentence):
            return False  # a claim
    return honest


# -----------------------------------------------------------------------------
# Grading


def is_loop(words: list[str]) -> bool:
    """Are most of its four-word pieces repetitions?"""
    pieces = [" ".join(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(pieces) >= 8 and len(set(pieces)) < len(pieces) / 2


def is_copy(text: str, turns: list[str]) -> bool:
    """Is the text one of the user's turns, or does it repeat what the user said before in the first person?"""
    turns = [plain(turn) for turn in turns]
    if plain(text) in turns:
        return True

    for turn in turns[:-1]:
        words = turn.split()
        first_person = any(word in ("i", "my", "me", "we", "our") for word in words)
        if first_person and len(words) >= 3 and has_phrase(text, turn):
            return True
    return False


def is_sound(completion: str, turns: list[str], max_words: int) -> bool:
    """Neither empty, nor endless, nor a loop, nor a copy of what the user said."""
    text = plain(visible_text(completion))
    words = text.split()
    return 0 < len(words) <= max_words and not is_loop(words) and not is_copy(text, turns)


def holds(field: str, value, completion: str, turns: list[str]) -> bool:  # noqa: C901 (a case for each field)
    """Does one field of a rule hold?"""
    text = visible_text(completion)
    match field:
        case "number":
            return last_number(text) == Fraction(str(value))
        case "letters":
            return value.replace(" ", "") in spelled_runs(text)
        case "letter":
            return ends_in_letter(text, value)
        case "pick":
            class_name, member = value
            return picks(text, turns[-1], class_name, member)
        case "any":
            return has_any(text, value)
        case "all":
            return all(has_phrase(text, phrase) for phrase in value)
        case "none":
            return not has_any(text, value)
        case "says":
            return has_any(text, PHRASES[value].split("|"))
        case "story":
            return is_story(completion, value)
        case "own":
            return keeps_to(value, completion, turns[-1])
        case "honest":
            return is_honest(completion) == value
        case "or":
            return any(is_right(rule, completion, turns) for rule in value)
    raise UserError(f"a rule has the field {field!r}", "tasks/answer_rules.py lists the fields that there are")


def is_right(rule: dict, completion: str, turns: list[str]) -> bool:
    """Is `completion`, the answer to the last of the user's turns, right under the rule?"""
    max_words = MAX_STORY_WORDS if "story" in rule else MAX_WORDS
    if not is_sound(completion, turns, max_words):
        return False
    return all(holds(field, value, completion, turns) for field, value in rule.items())
