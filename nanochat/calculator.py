"""
The calculator behind a model's tool calls: the value of an arithmetic expression as text, or None.

No Python code is run. `ast` parses the expression, and only the nodes that `_evaluate` lists are
computed, as exact fractions. There are no signals and no shared state, so any thread may call it.
"""

import ast
import operator
import re
from fractions import Fraction

MAX_CHARS = 500         # of an expression
MAX_DEPTH = 50          # of its tree: a sum of n terms is n - 1 deep
MAX_MAGNITUDE = 10**15  # of every intermediate value

# A first filter, since the parser accepts much more: digits, operators, and strings without escapes
EXPRESSION = re.compile(r"""(?:[0-9 .,+\-*/()]|\.count|'[^'\\\n]*'|"[^"\\\n]*")+""")
# A number with thousands separators; or a whole string, whose commas must stay
THOUSANDS = re.compile(r"""'[^']*'|"[^"]*"|(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])""")

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def use_calculator(expression: str) -> str | None:
    """
    The value of an arithmetic expression as text. None for anything else, or if there is no value.

    Allowed are numbers, + - * / ( ), unary minus, commas as thousands separators, and
    'text'.count('x'). Arithmetic is exact. The result is rounded to 6 decimals and written without
    trailing zeros, as in the training data: `0.2*50` gives `10`, `0.1+0.2` gives `0.3`, `10/3`
    gives `3.333333`, `'a,b,c'.count(',')` gives `2`.
    """
    if len(expression) > MAX_CHARS or not EXPRESSION.fullmatch(expression):
        return None
    plain = THOUSANDS.sub(_remove_commas, expression)

    # MemoryError, RecursionError: the parser's own, for deep nesting
    try:
        tree = ast.parse(plain.strip(), mode="eval")
        value = _evaluate(tree.body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None

    # Six decimals, in integer arithmetic: floats would lose digits
    millionths = round(value * 10**6)
    whole, fraction = divmod(abs(millionths), 10**6)
    digits = f"{whole}.{fraction:06d}".rstrip("0").rstrip(".")
    return f"-{digits}" if millionths < 0 else digits


def _remove_commas(match):
    text = match[0]
    if text.startswith(("'", '"')):
        return text
    return text.replace(",", "")


def _evaluate(node, depth=0):
    """
    The exact value of a node. ValueError for nodes that are not listed, and beyond the bounds.
    """
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=int() | float() as number):
            value = Fraction(str(number))  # the decimal as written: 0.1 is a tenth
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_evaluate(operand, depth + 1)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            compute = OPERATORS[type(op)]
            value = compute(_evaluate(left, depth + 1), _evaluate(right, depth + 1))
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
                      args=[ast.Constant(value=str() as part)], keywords=[]):
            value = Fraction(text.count(part))
        case _:
            raise ValueError("not arithmetic")
    # bounds the time and memory that exact arithmetic takes
    if abs(value) > MAX_MAGNITUDE:
        raise ValueError("too large")
    return value
