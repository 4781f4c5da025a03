"""The number that ends a solution: all of it, or none."""

from fractions import Fraction

import pytest

from tasks.final_answer import parse_answer

ANSWERS = [  # completion, value
    ("#### 18", 18), ("#### 18.", 18), ("#### $18", 18), ("#### 1,234", 1234), ("#### 18.00", 18), ("####18", 18),
    ("#### -5", -5), ("#### -$5", -5), ("#### $-5", -5), ("#### \u22125", -5), ("#### - 5", -5), ("#### +5", 5),
    ("#### 18 dollars", 18), ("#### 50%", 50), ("#### 12 km/h", 12), ("#### .5", Fraction(1, 2)),
    ("#### 3/4", Fraction(3, 4)), ("#### 1,234,567.50", Fraction(2469135, 2)), ("#### **18**", 18),
    ("#### \\boxed{18}", 18), ("#### x = 18", 18),
    ("He has 3.\n#### 18\nThat is all, 20.", 18), ("#### 18\n#### 20", 20), ("#### 18 or 20", 18), ("#### €7", 7),
    ("#### (9)", 9), ("#### 0", 0), ("#### 007", 7), ("#### 18.0 and more.", 18), ("##### 6", 6),
    ("The answer is 18", None), ("", None), ("####", None), ("#### eighteen", None), ("#### 18\n####", None),
    ("####\n18", None), ("#### 1/0", None), ("#### " + "9" * 5000, None), ("#### \u0661\u0662", None), ("# 18", None),
]


@pytest.mark.parametrize("completion, value", ANSWERS)
def test_the_final_answer_is_read_in_the_forms_that_models_write(completion, value):
    assert parse_answer(completion) == value


WRITTEN = [  # as people and models write one number, value
    ("$9{,}500", 9500), ("\\$9{,}500", 9500), ("9\\,500", 9500), ("9 500", 9500), ("9\u00a0500", 9500),
    ("9\u202f500", 9500), ("9'500", 9500), ("9_500", 9500), ("1 234 567", 1234567),
    ("1,234,567.5", Fraction(2469135, 2)),
    ("1e3", 1000), ("1E3", 1000), ("1.5e3", 1500), ("2e+2", 200), ("25e-1", Fraction(5, 2)),
    ("1 1/2", Fraction(3, 2)), ("-1 1/2", Fraction(-3, 2)), ("1 000 1/2", Fraction(2001, 2)), ("10/4", Fraction(5, 2)),
    ("2 million", 2000000), ("1.5 million dollars", 1500000), ("3 thousand", 3000), ("4 hundred", 400),
    ("$\\boxed{9{,}500}$", 9500), ("9 500 km", 9500), ("5 apples", 5), ("18 (3 * 6)", 18), ("18, 20", 18),
    ("18. 20 more", 18), ("18%", 18), ("18 x", 18), ("5-year", 5), ("12 km/h", 12), ("1st", 1), ("-$9{,}500", -9500),
]
NOT_ONE = [  # the first digits alone would be another number
    "1,5", "1,23", "1,2345", "12,34,567", "9.500,00", "1.234.567", "9 50", "12 5", "9 5000", "10^3", "10**3", "2^{10}",
    "2.5x10^3", "2 \u00d7 10^3", "3 * 6", "3+4 = 7", "3 - 4", "5-3", "18-20", "18 \u2013 20", "10:30", "2024-05-01",
    "\\frac{1}{2}", "1\\frac{1}{2}", "\\dfrac{3}{4}", "1\u00bd", "10\u00b2", "\\sqrt{16}", "\u221a16", "0x10",
    "18k", "5M", "1e999", "1 1/0", "3 \\times 6", "3 \\cdot 6", "1/2/3",
]


@pytest.mark.parametrize("written, value", WRITTEN)
def test_a_number_is_read_whole(written, value):
    assert parse_answer(f"so it is\n#### {written}") == value


@pytest.mark.parametrize("written", NOT_ONE)
def test_digits_that_are_a_part_of_something_else_are_none(written):
    assert parse_answer(f"#### {written}") is None
