"""
Answers that call the calculator: parts in a chat, and the same in the notation of GSM8K's data.

    calculated("There are ", "12+35", " apples.")  ->  text "There are 12 + 35 = ", python "12+35", output "47",
                                                       text "47 apples.\\n#### 47"
"""

import re

from nanochat.calculator import use_calculator

NUMBER_WORDS = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
                "seventeen eighteen nineteen twenty").split()
TENS = {30: "thirty", 40: "forty", 50: "fifty", 60: "sixty", 70: "seventy", 80: "eighty", 90: "ninety",
        100: "a hundred"}


def number_word(number):
    """7 -> 'seven', as far as words are known; else the digits."""
    if number < len(NUMBER_WORDS):
        return NUMBER_WORDS[number]
    return TENS.get(number, str(number))


def spaced(expression):
    """'12+35' -> '12 + 35'"""
    return re.sub(r"(?<=[\d)])([-+*/])", r" \1 ", expression)


def calculated(before, expression, after=""):
    """One step: parts of an answer, and its result as text."""
    result = use_calculator(expression)
    parts = [{"type": "text", "text": f"{before}{spaced(expression)} = "},
             {"type": "python", "text": expression},
             {"type": "python_output", "text": result},
             {"type": "text", "text": f"{result}{after}"}]
    return parts, result


def finish(steps, result):
    """All steps as one answer, which ends in the line `#### result`. Adjacent texts are joined."""
    parts = []
    for step in steps:
        for part in step:
            if parts and parts[-1]["type"] == part["type"] == "text":
                parts[-1] = {"type": "text", "text": parts[-1]["text"] + part["text"]}
            else:
                parts.append(part)
    parts[-1] = {"type": "text", "text": f"{parts[-1]['text']}\n#### {result}"}
    return parts


def solve(before, expression, after=""):
    """An answer of one step."""
    parts, result = calculated(before, expression, after)
    return finish([parts], result)


def to_gsm8k(parts):
    """The parts in GSM8K's notation: a call and its output become <<12+35=47>>."""
    pieces = []
    for part in parts:
        if part["type"] == "python":
            pieces.append(f"<<{part['text']}=")
        elif part["type"] == "python_output":
            pieces.append(f"{part['text']}>>")
        else:
            pieces.append(part["text"])
    return "".join(pieces)


def to_text(content):
    """An answer as plain text, without its calls: for pretraining, and to compare."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def result_of(parts):
    """What stands behind ####, as text."""
    return parts[-1]["text"].rpartition("#### ")[2]
