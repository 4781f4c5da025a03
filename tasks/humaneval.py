"""
HumanEval: 164 Python functions to write from their signature and docstring (arXiv 2107.03374,
huggingface.co/datasets/openai/openai_humaneval). An answer is right if the problem's tests pass in
the sandbox of nanochat/execution.py.

What counts is what the function does. So the code is looked for in whatever text a model wrote
around it, and the program is loaded as a module: what it does only as a main program is not run.
"""

import ast
import re
import textwrap
import warnings

from nanochat.common import UserError
from nanochat.execution import grade_function
from tasks.common import Task, exchange
from tasks.hub import load_rows

# A code block, closed or cut off by the token limit; group 1 is the fence's indentation
FENCED = re.compile(r"^([ \t]*)(```+|~~~+)[^\n`]*\n(.*?)(?:\2|\Z)", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"^[ \t]*(?:```|~~~)", re.MULTILINE)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
SOURCE_NAME = "<answer>"  # of code that is parsed to see whether it is Python
MAX_CHARS = 20_000  # of an answer in which code is looked for
COLUMNS = {"prompt": str, "canonical_solution": str, "test": str, "entry_point": str}


class HumanEval(Task):
    """
    For evaluation only: it has no training split. allow_unsafe runs the programs where the system
    cannot confine them; timeout is in seconds a program.
    """

    eval_type = "generative"

    def __init__(self, timeout=5.0, allow_unsafe=False, **kwargs):
        super().__init__(**kwargs)
        self.timeout = timeout
        self.allow_unsafe = allow_unsafe
        self.rows = load_rows("humaneval", "test", COLUMNS)
        # An answer's "\d" is not worth a line on the screen
        warnings.filterwarnings("ignore", module=re.escape(SOURCE_NAME))

    def get_example(self, index):
        row = self.rows[index]
        prompt = row["prompt"]
        return {
            "messages": exchange(prompt, prompt + row["canonical_solution"]),
            "test": row["test"],
            "entry_point": row["entry_point"],
        }

    def evaluate(self, conversation, completion):
        return self.grade(conversation, completion)["correct"]

    def grade(self, conversation, completion):
        """
        {"correct", "error", "wall_hit"}: why an answer is not right, and which wall of the sandbox
        it ran into, which says that it was not allowed to go on, not that it is wrong.
        """
        prompt = conversation["messages"][0]["content"]
        entry_point = conversation["entry_point"]
        try:
            result = grade_function(
                build_program(prompt, completion, entry_point),
                entry_point,
                f"{conversation['test']}\n\ncheck({entry_point})\n",
                setup=prompt,  # some tests call the helper functions that it defines
                timeout=self.timeout,
                allow_unsafe=self.allow_unsafe,
            )
        except ValueError as error:  # no sandbox on this system: that does not make an answer wrong
            hint = "leave HumanEval out, or evaluate on Linux 5.13 or newer"
            raise UserError(f"HumanEval: {error}", hint) from error
        return {"correct": result.success, "error": result.error, "wall_hit": result.wall_hit}


def build_program(prompt: str, completion: str, entry_point: str) -> list[str]:
    """
    The sources to run one after the other. The model's code may define the function anew: the
    prompt, a function that only has a docstring, is run before it, so that its imports and helper
    functions are there. Or the code goes on where the prompt stopped, with the function's body.
    """
    code = extract_code(completion, entry_point)
    if defines(code, entry_point):
        return [prompt, code]
    if not code.lstrip("\n").startswith((" ", "\t")):
        code = textwrap.indent(code, "    ")  # a body that lost its indentation
    return [f"{prompt}\n{code}\n"]


def extract_code(completion: str, entry_point: str) -> str:
    """
    The code in an answer: the first piece of it that defines the function, else the first that is
    Python, else everything. Pieces are the fenced blocks, then the text in front of the first
    fence, which may be the end of a block that the prompt began.
    """
    if len(completion) > MAX_CHARS:
        return completion
    pieces = [unindent(block, len(indent)) for indent, _, block in FENCED.findall(completion)]
    pieces.append(find_python(FENCE.split(completion)[0], entry_point))
    for piece in pieces:
        if defines(piece, entry_point):
            return piece
    for piece in pieces:
        if piece.strip() and is_python(piece):
            return piece
    return completion


def unindent(text: str, width: int) -> str:
    """Take at most `width` spaces or tabs from the start of each line."""
    return re.sub(rf"^[ \t]{{1,{width}}}", "", text, flags=re.MULTILINE) if width else text


def find_python(text: str, entry_point: str) -> str:
    """
    The longest run of lines in a text that is Python, of those that define the function if there
    are any. What follows the last definition is left out: it may be one more sentence.
    """
    lines = text.split("\n")
    best = ""
    start = 0
    while start < len(lines):
        count = 0
        line = lines[start].strip()
        if line and not line.isidentifier():  # "Sure" would be Python
            count = count_python_lines(lines[start:])
        code = "\n".join(lines[start : start + count])
        better = (defines(code, entry_point), len(code)) > (defines(best, entry_point), len(best))
        best = code if better else best
        start += max(1, count)

    if defines(best, entry_point):
        tree = ast.parse(best, SOURCE_NAME)
        ends = [node.end_lineno for node in tree.body if isinstance(node, DEFINITIONS)]
        best = "\n".join(best.split("\n")[:max(ends, default=None)]) + "\n"
    return best


def count_python_lines(lines: list[str]) -> int:
    """How many of these lines, from the first one on, are Python together."""
    count = len(lines)
    while count > 0:
        error = syntax_error(lines[:count])
        if error is None:
            break
        # what stands before the line with the error may be whole
        count = min(error.lineno or 1, count) - 1
    return count


def is_python(code: str) -> bool:
    return syntax_error(code.split("\n")) is None


def syntax_error(lines: list[str]) -> SyntaxError | None:
    """The first error in lines that are a module, or a function's body. lineno counts from 1."""
    code = "\n".join(lines)
    # the lines of a body stay where they are: its function begins on the first of them
    is_body = code.lstrip("\n").startswith((" ", "\t"))
    header = "if True:\n" if is_body else ""
    try:
        ast.parse(header + code, SOURCE_NAME)
    except SyntaxError as error:
        if is_body and error.lineno is not None:
            error.lineno -= 1
        return error
    except (ValueError, RecursionError, MemoryError):  # a null character, or brackets without end
        return SyntaxError("cannot be read")
    return None


def defines(code: str, entry_point: str) -> bool:
    pattern = rf"^(?:async )?def {re.escape(entry_point)}\b"
    return re.search(pattern, code, re.MULTILINE) is not None
