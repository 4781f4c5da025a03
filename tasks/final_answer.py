r"""
Reading the number that ends a solution, "#### 18" (GSM8K, SpellingBee).

People and models write a number in many ways. All of it is read, or nothing: of "$9{,}500", "1e3" or
"1 1/2" the first digits alone would be another number. So the text is cut into the longest piece that
could belong to one number, and the piece must have one of the forms that are known.
"""

import re
from fractions import Fraction

MAX_CHARS = 100  # of a number: Python refuses to read endless digits

# Spaces that stand inside of a number: plain, without a break, narrow and thin; LaTeX's
SPACES = " \u00a0\u202f\u2009"
SEPARATOR = rf"(?:,|\{{,\}}|\\[,;:! ]|['_{SPACES}])"

# What may stand between two digits of one number, or of one expression
JOINT = re.compile(
    rf"""
      {SEPARATOR}(?=[0-9])
    | [.:] (?=[0-9])
    | [eE][+-]? (?=[0-9])
    | \s* (?: [-+*/^=x\u00d7\u00f7\u2212\u2013] | \*\* | \\times | \\cdot ) \s* (?=[0-9])
    """,
    re.VERBOSE,
)
DIGITS = re.compile(r"\.?[0-9]+")
BEGINS = re.compile(r"(?P<sign>[-+\u2212]?)[ $\u20ac\u00a3\\]*(?P<second>[-+\u2212]?)[ $\u20ac\u00a3]*$")

# A number that is only a part of something larger: the end of a square root or of LaTeX's fraction
# in front of it; a power, a fraction, a special digit behind it
PART_BEHIND = re.compile(r"(?:sqrt|frac|\u221a)[{(]?$")
PART_BEFORE = re.compile(r"\s*(?:\^|\*\*[({]|\\[dt]?frac)|[\u00b2\u00b3\u00b9\u00bc-\u00be\u2150-\u215e]|[kKMB]\b")

WHOLE = rf"[0-9]{{1,3}}(?:{SEPARATOR}[0-9]{{3}})+|[0-9]+"
DECIMAL = re.compile(rf"(?P<whole>{WHOLE})?(?P<decimals>\.[0-9]+)?(?:[eE](?P<exponent>[+-]?[0-9]{{1,2}}))?")
FRACTION = re.compile(rf"(?:(?P<whole>{WHOLE})[{SPACES}])?(?P<top>[0-9]+)/(?P<bottom>[0-9]+)")
SCALE = re.compile(rf"[{SPACES}]?(hundred|thousand|million|billion|trillion)\b", re.IGNORECASE)
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def parse_answer(text: str) -> Fraction | None:
    r"""
    The first number after the last "####", on its line, or None. By value, so 18, 18., 18.00 and
    $18 are equal.

    >>> parse_answer("Each costs 2+2 = 4.\n#### $4,000.00 in all")
    Fraction(4000, 1)
    >>> parse_answer("#### 1 1/2"), parse_answer("#### 2 million"), parse_answer("#### 3 * 6")
    (Fraction(3, 2), Fraction(2000000, 1), None)
    """
    _, marker, tail = text.rpartition("####")
    line = tail.split("\n")[0]
    first = DIGITS.search(line)
    if not marker or first is None:
        return None

    # The longest piece that could be one number, and what stands on its two sides
    end = first.end()
    while joint := JOINT.match(line, end):
        end = DIGITS.match(line, joint.end()).end()
    before = line[: first.start()]
    behind = line[end:]
    if PART_BEHIND.search(before) or PART_BEFORE.match(behind):
        return None

    value = read_number(line[first.start() : end])
    if value is None:
        return None
    scale = SCALE.match(behind)
    if scale:
        value *= 10 ** SCALES[scale[1].lower()]
    begin = BEGINS.search(before)
    is_negative = (begin["sign"] or begin["second"]) in ("-", "\u2212")
    return -value if is_negative else value


def read_number(text: str) -> Fraction | None:
    """
    A number without a sign, or None if this is none or more than one.

    >>> read_number("9 500"), read_number("1.5e3"), read_number("1,5")
    (Fraction(9500, 1), Fraction(1500, 1), None)
    """
    if len(text) > MAX_CHARS:
        return None
    found = FRACTION.fullmatch(text)
    if found:
        if int(found["bottom"]) == 0:
            return None
        return read_whole(found["whole"]) + Fraction(int(found["top"]), int(found["bottom"]))
    found = DECIMAL.fullmatch(text)
    if not found:
        return None
    value = read_whole(found["whole"]) + Fraction("0" + (found["decimals"] or ""))
    return value * Fraction(10) ** int(found["exponent"] or 0)


def read_whole(text: str | None) -> int:
    """Digits with or without separators; nothing is 0."""
    return int(re.sub("[^0-9]", "", text)) if text else 0
