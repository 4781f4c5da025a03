"""The calculator: what it must answer, what it must refuse, and that threads do not disturb it."""

import math
import random
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from nanochat.calculator import use_calculator

RIGHT = {
    "2+2": "4", "2 + 2": "4", " 7*6 ": "42", "10-15": "-5", "-5": "-5", "--5": "5", "-(3+4)*2": "-14", "2*-3": "-6",
    "(1+2)*(3+4)": "21", "((((1))))": "1", "48/2": "24", "7/2": "3.5", "1/8": "0.125", "10/3": "3.333333",
    "2/3": "0.666667", "-2/3": "-0.666667", "1/10000000": "0", "-1/10000000": "0", "0/5": "0", "0.2*50": "10",
    "0.1+0.2": "0.3", "0.3-0.1*3": "0", "1.1*1.1": "1.21", ".5*8": "4", "5.*2": "10", "2.50+2.50": "5", "1.20*4": "4.8",
    "0.29*100": "29", "1,234 * 2": "2468", "1,234,567+1": "1234568", "1,000.50*2": "2001", "12,345-345": "12000",
    "999999999*999999": "999998999000001", "100000-0.1": "99999.9", "1-2-3": "-4", "8/4/2": "1", "2+3*4": "14",
    "'strawberry'.count('r')": "3", '"strawberry".count("r")': "3", "'a,b,c'.count(',')": "2",
    "'1,234'.count(',')": "1", "'1,234'.count('1234')": "0", "'banana'.count('an')*10": "20", "'x'.count('y')": "0",
    "'naïve'.count('ï')+1": "2", '"it\'s".count("\'")': "1", "('abc').count('a')": "1", "'(2+2)'.count('2')": "2",
}

REFUSED = [
    "", " ", "()", "2+", "*2", "2 2", "08+1", "1,23", "1,2345", "1,234,5", "3,", "1/0", "5/(2-2)", "0/0",
    "2**3", "7//2", "7%2", "1<2", "1==1", "1 if 1 else 2", "not 1", "1 and 2", "1|2", "1<<9", "+5", "2j", "1e3",
    "1e999", "0x10", "1_000", "inf", "nan", "True", "None", "x", "__import__('os')", "abs(-1)", "(1).real",
    "'a'", "'a'+'b'", "'a'*3", "'a'.count", "'a'.count()", "'aa'.count('a', 1)", "'a'.count(1)", "'abc'.upper()",
    "'a'.count('a').real", "f'{1}'.count('1')", "b'a'.count(b'a')", "r'a'.count('a')", "['a'].count('a')",
    "(1, 2)", "[1]", "{1}", "lambda: 1", "(x:=1)", "1;2", "1\n+2", "1 # 2", "'\\n'.count('n')", "'a'.count('a'",
    "٣+1", "9" * 16, "1000000000*1000000000", "1000000*1000000*1000000", "2*" * 300 + "2", "(" * 249 + "1" + ")" * 249,
    "-" * 99 + "1", "1+" * 99 + "1", "'" + "a" * 600 + "'.count('a')", "9" * 5000,
]


@pytest.mark.parametrize("expression", RIGHT)
def test_it_gives_the_value(expression):
    assert use_calculator(expression) == RIGHT[expression]


@pytest.mark.parametrize("expression", REFUSED, ids=lambda text: repr(text[:30]))
def test_it_refuses(expression):
    assert use_calculator(expression) is None


def random_expression(rng, depth):
    """(text, exact value) of a random tree of numbers and operators."""
    if depth == 0:
        text = rng.choice([str(rng.randint(0, 99)), f"{rng.randint(0, 99)}.{rng.randint(0, 99):02d}"])
        return text, Fraction(text)
    (a, x), (b, y) = random_expression(rng, depth - 1), random_expression(rng, depth - 1)
    sign = rng.choice("+-*/")
    if sign == "/" and y == 0:
        sign = "+"
    value = {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y}[sign]()
    return f"({a}){sign}({b})", value


def test_random_trees_agree_with_exact_fractions_to_six_decimals():
    rng = random.Random(0)
    for _ in range(300):
        text, value = random_expression(rng, rng.randint(0, 4))
        answer = use_calculator(text)
        assert answer is not None and abs(Fraction(answer) - value) <= Fraction(1, 2 * 10**6), text
        assert math.isclose(float(answer), float(value), rel_tol=1e-9, abs_tol=5.01e-7)  # and with Python's floats


def test_it_works_in_many_threads_at_once():
    rng = random.Random(1)
    expressions = [random_expression(rng, 3)[0] for _ in range(200)] + list(RIGHT) + REFUSED[:40]
    alone = [use_calculator(expression) for expression in expressions]
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(use_calculator, expressions * 5)) == alone * 5


def test_the_worst_of_its_length_is_answered_at_once(recwarn):
    start = time.perf_counter()
    for text in ("'" * 500, "(" * 500, "1." * 250, ".count" * 83, "'a'.count('a')+" * 33 + "1", "1,111," * 83, "1if 2"):
        use_calculator(text)
    assert time.perf_counter() - start < 1
    assert not recwarn.list  # the parser's own warnings would reach a server's log
