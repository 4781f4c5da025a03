"""HumanEval: the code in an answer, and what is graded of it."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.execution import sandbox_walls
from tasks.humaneval import MAX_CHARS, HumanEval, build_program, extract_code

needs_walls = pytest.mark.skipif(len(sandbox_walls()) < 3, reason="this system has not all walls of the sandbox")

ADD = {"task_id": "T/0", "prompt": 'import math\n\n\ndef twice(x):\n    return 2 * x\n\n\ndef add(a, b):\n'
       '    """ The sum. """\n', "canonical_solution": "    return a + b\n", "entry_point": "add",
       "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(-1, twice(1)) == 1\n"}
DEF = "def add(a, b):\n    return a + b\n"
BODY = "    return a + b\n"


@pytest.fixture
def task(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    pq.write_table(pa.Table.from_pylist([ADD]), tmp_path / "tasks" / "humaneval_test.parquet")
    return HumanEval(timeout=20)


RIGHT = {
    "the body": BODY,
    "a body without indentation": "return a + b",
    "the function": DEF,
    "a fence": f"Here:\n```python\n{DEF}```\nIt adds.",
    "a fence cut off": "```python\nreturn a + b",
    "the second fence": f"```\nprint(1)\n```\nand\n```py\n{DEF}```",
    "tildes": f"Here:\n~~~python\n{DEF}~~~\nIt adds.",
    "four marks": f"````\n{DEF}````\n",
    "an indented fence": "1. Here:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n   It adds.",
    "an indented fence, tabs": "\t```\n\tdef add(a, b):\n\t\treturn a + b\n\t```",
    "an indented fence around a body": "  ```\n      return a + b\n  ```",
    "a lone closing fence": f"{DEF}```",
    "a lone closing fence after a body": f"{BODY}```\nThis adds the numbers.",
    "a lone closing fence, then an example": f"{DEF}```\n\nFor example:\n```python\nprint(add(1, 2))\n```",
    "a lone closing fence of tildes": f"{BODY}~~~\nThis adds.",
    "prose before": f"Here is the function that you asked for:\n\n{DEF}",
    "prose after": f"{DEF}\nThis adds the two numbers.",
    "prose around": f"Sure!\n\n{DEF}\nDone\n\nHope it helps: it's quick.",
    "prose before a body": f"The sum is easy:\n\n{BODY}\nIt adds.",
    "a word before a body": f"Sure\n{BODY}",
    "imports and prose": f"from the docstring we see that it adds:\nimport os\n{DEF}",
    "a future": f"from __future__ import annotations\n{DEF}",
    "a future in a fence": f"```python\nfrom __future__ import annotations\nx: Unknown = 1\n{DEF}```",
    "a main block": f"{DEF}\nif __name__ == '__main__':\n    print(add(int(input()), 1))\n",
    "a main block that leaves": f"```python\n{DEF}\nif __name__ == '__main__':\n    raise SystemExit(add(1, 2))\n```",
    "input in a fence": f"```python\n{DEF}\nprint(add(int(input('a')), int(input('b'))))\n```",
    "the prompt once more": "```python\n" + ADD["prompt"] + BODY + "```",
    "its imports": "    return math.floor(a + b)\n",
    "a helper before": f"def plus(a, b):\n    return a + b\n\nadd = None\n\n{DEF}",
    "a helper after": "def add(a, b):\n    return plus(a, b)\n\ndef plus(a, b):\n    return a + b\n",
    "a decorator": f"from functools import cache\n@cache\n{DEF}",
    "windows lines": DEF.replace("\n", "\r\n"),
    "a docstring with a fence": 'def add(a, b):\n    """\n    Sum: ~~ a + b ~~\n    """\n    return a + b\n',
}
WRONG = {
    "nothing": "", "blank": "   \n\n", "prose": "I do not know.", "another result": "    return a - b\n",
    "a stub": "def add(a, b):\n    ...\n", "leaves": "import os\nos._exit(0)",
    "half a function": "def add(a, b):\n    return (a +",
    "code only in prose": "def add is a function\nreturn a + b is its body",
    "an assertion of its own": f"```\n{DEF}assert False\n```",
    "a fence without code": "```\nThis adds.\n```", "another function": "def sub(a, b):\n    return a + b\n",
    "a name for it": '"""\ndef add(a, b):\n"""', "a null": "\0", "long": DEF + "#" * MAX_CHARS + "\n(",
}
TOO_DEEP = {"brackets": "(" * 5000, "many minus signs": "-" * 15000 + "1", "deep": "a" + ".a" * 9000}
WRONG |= TOO_DEEP


@needs_walls
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_function_is_found_in_whatever_stands_around_it(task, name):
    grade = task.grade(task[0], RIGHT[name])
    assert grade == {"correct": True, "error": None, "wall_hit": None}, build_program(ADD["prompt"], RIGHT[name], "add")


@needs_walls
@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_right_function_is_wrong(task, name):
    grade = task.grade(task[0], WRONG[name])
    assert not grade["correct"] and grade["error"]
    assert grade["wall_hit"] is None or name in TOO_DEEP  # Python's parser says so by a MemoryError
    assert task.evaluate(task[0], WRONG[name]) is False


@needs_walls
def test_an_answer_that_hits_a_wall_is_reported_as_such(task):
    grade = task.grade(task[0], "    import subprocess\n    return subprocess.run(['true']).returncode + a + b\n")
    assert grade["correct"] is False and grade["wall_hit"] == "files and system calls"
    assert grade["error"].startswith("PermissionError")


def test_the_prompt_and_a_whole_function_are_two_sources():
    assert build_program("PROMPT", f"```\n{DEF}```", "add") == ["PROMPT", DEF]
    assert build_program("PROMPT", BODY, "add") == [f"PROMPT\n{BODY}\n"]


def test_only_the_lines_of_the_function_are_taken_from_prose():
    assert extract_code(f"Yes\n\n{DEF}\nDone\n", "add") == DEF


def test_an_answers_odd_escapes_are_not_worth_a_warning(task):
    code = ("import tasks.humaneval as h\nh.load_rows = lambda *_: []\nh.HumanEval()\n"
            "print(repr(h.extract_code('def add(a, b):\\n    return \"\\\\d\"\\n', 'add')))")
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], cwd=root, capture_output=True, text=True)
    assert "\\\\d" in done.stdout and done.stderr == ""
