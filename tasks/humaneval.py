"""
HumanEval: 164 Python functions to write from their signature and docstring (arXiv 2107.03374,
huggingface.co/datasets/ openai/openai_humaneval). An answer is right if the problem's tests pass in
the sandbox of nanochat/execution.py.
"""

import re
import textwrap

from nanochat.common import UserError
from nanochat.execution import execute_code
from tasks.common import Task, exchange
from tasks.hub import load_rows

# a code block; one cut off by the token limit too
FENCED = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
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

    def get_example(self, index):
        row = self.rows[index]
        prompt = row["prompt"]
        return {
            "messages": exchange(prompt, prompt + row["canonical_solution"]),
            "test": row["test"],
            "entry_point": row["entry_point"],
        }

    def evaluate(self, conversation, completion):
        program = build_program(
            conversation["messages"][0]["content"],
            completion,
            conversation["test"],
            conversation["entry_point"],
        )
        try:
            result = execute_code(program, timeout=self.timeout, allow_unsafe=self.allow_unsafe)
        except ValueError as error:  # no sandbox on this system: that does not make an answer wrong
            hint = "leave HumanEval out, or evaluate on Linux 5.13 or newer"
            raise UserError(f"HumanEval: {error}", hint) from error
        return result.success


def build_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """
    The program to run: the prompt, the model's code, the tests. The code may go on where the prompt
    stopped (a function's body), or define the function anew: the prompt alone is a function that
    only has a docstring, and the later definition wins. The prompt's imports and helper functions
    are there in both cases.
    """
    code = extract_code(completion, entry_point)
    is_body = not defines(code, entry_point)
    if is_body and not code.lstrip("\n").startswith((" ", "\t")):
        code = textwrap.indent(code, "    ")  # a body that lost its indentation
    return f"{prompt}\n{code}\n\n{test}\n\ncheck({entry_point})\n"


def extract_code(completion: str, entry_point: str) -> str:
    """The first fenced block that defines the function, else the first one, else everything."""
    blocks = FENCED.findall(completion)
    for block in blocks:
        if defines(block, entry_point):
            return block
    return blocks[0] if blocks else completion


def defines(code: str, entry_point: str) -> bool:
    pattern = rf"^(?:async )?def {re.escape(entry_point)}\b"
    return re.search(pattern, code, re.MULTILINE) is not None
