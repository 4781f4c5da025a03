"""Grading a function: what passes, what crosses between the two processes, and programs that try to forge a pass."""

import math
import subprocess
import sys
import threading
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest

from nanochat import execution
from nanochat.execution import WALLS, ExecutionResult, grade_function, sandbox_walls
from nanochat.sandbox_child import NotPlain, from_plain, read_literal, to_plain

pytestmark = pytest.mark.skipif(tuple(sandbox_walls()) != WALLS, reason=f"this system has only {sandbox_walls()}")
ROOT = Path(execution.__file__).parents[1]

RIGHT = "def add(a, b): return a + b"
WRONG = "def add(a, b): return 0"
TESTS = "def check(candidate):\n assert candidate(1, 2) == 3\n assert candidate(-1, 1) == 0\ncheck(add)"


def grade(*sources, tests=TESTS, **limits):
    return grade_function(list(sources), "add", tests, **limits)


# -----------------------------------------------------------------------------
# What passes, and what is told of the rest


def test_a_function_that_its_tests_accept_passes():
    assert grade(RIGHT) == ExecutionResult(True, "", "", None, False, False, False, WALLS)


@pytest.mark.parametrize("program, error", [
    (WRONG, "AssertionError"), ("def add(a, b): return 1 / 0", "ZeroDivisionError: division by zero"),
    ("def add(a, b", "SyntaxError: '(' was never closed (<program>, line 1)"), ("", "AttributeError: module 'program' "
    "has no attribute 'add'"), ("raise KeyError", "KeyError"), ("def add(a, b):\n while True: pass", "timed out"),
    ("def add(a): return a", "TypeError: add() takes 1 positional argument but 2 were given"),
    ("add = 3", "TypeError: 'int' object is not callable"),
    ("def add(a, b): return object()", "NotPlain: a value of the type object cannot be graded"),
    ("import os\ndef add(a, b): os._exit(0)", "ended early with exit code 0"),
])
def test_what_is_wrong_is_told(program, error):
    result = grade(program, timeout=1.5 if error == "timed out" else 10)
    assert (result.success, result.error) == (False, error) and result.timeout == (error == "timed out")


def test_the_output_of_the_program_is_kept():
    result = grade(RIGHT + "\nimport sys; print('one'); sys.stderr.write('two')")
    assert result.success and (result.stdout, result.stderr) == ("one\n", "two")


def test_sources_share_a_module_and_each_may_have_its_own_future():
    assert grade("import math\ndef add(a, b): ...", "from __future__ import annotations\n"
                 "def add(a: Unknown, b): return math.floor(a + b)").success


def test_the_tests_find_their_helpers_and_the_function_by_name():
    setup = "def twice(x): return 2 * x\ndef add(a, b): return 'the stub'"
    assert grade_function([RIGHT], "add", "assert add(1, b=twice(1)) == 3", setup=setup).success


def test_tests_may_expect_an_error():
    tests = "try: add(1, 'x')\nexcept TypeError as error: assert 'unsupported' in str(error)\nelse: assert False"
    assert grade(RIGHT, tests=tests).success
    assert not grade("def add(a, b): raise KeyError(1)", tests=tests).success


@pytest.mark.parametrize("program", [
    "import threading\ndef add(a, b):\n found = []\n thread = threading.Thread(target=lambda: found.append(a + b))\n"
    " thread.start(); thread.join()\n return found[0]",
    "from concurrent.futures import ThreadPoolExecutor\ndef add(a, b):\n"
    " with ThreadPoolExecutor(8) as pool: return sum(pool.map(int, [a, b]))",
    "import tempfile\ndef add(a, b):\n with tempfile.TemporaryFile('w+') as f:\n  f.write(str(a + b)); f.seek(0)\n"
    "  return int(f.read())",
    "import tempfile\ndef add(a, b):\n with tempfile.NamedTemporaryFile() as f:\n  f.write(bytes(4)); return a + b",
    "import sys\ndef add(a, b): return a + b\nassert sys.stdin.read() == ''",
    "def add(a, b): return a + b\nprint(add(int(input()), int(input())))",
    "def add(a, b): return a + b\nif __name__ == '__main__': print(add(*map(int, input().split())))",
    "def add(a, b): return a + b\nif __name__ == '__main__': raise SystemExit(main())",
    "from dataclasses import dataclass\n@dataclass\nclass P:\n x: int\ndef add(a, b): return P(a + b).x",
], ids=["thread", "pool", "TemporaryFile", "NamedTemporaryFile", "stdin", "input", "main input", "main exit", "class"])
def test_a_right_answer_passes_whatever_means_it_takes(program):
    result = grade(program)
    assert result.success, result


@pytest.mark.parametrize("body, wall", [
    ("open('/etc/passwd')", "files and system calls"), ("import os; os.fork()", "files and system calls"),
    ("import os; os.mkdir('d')", "files and system calls"),
    ("import socket; socket.socket()", "files and system calls"),
    ("x = [0] * 10**10", "memory"), ("open('x', 'wb').write(bytes(1 << 25))", "size of a file"),
    ("x = [open(str(i), 'w') for i in range(99)]", "open files"),
    ("try: open('/etc/passwd')\n except OSError: raise ValueError('no file')", "files and system calls"),
    ("import os\n for i in range(99): f = open(str(i), 'wb'); f.write(bytes(1 << 20))\n while True: pass", "disk"),
    ("import threading, time\n while True: threading.Thread(target=time.sleep, args=(9,)).start()", "threads"),
    ("return a - b", None), ("raise ValueError", None), ("open('none')", None),
])
@pytest.mark.parametrize("where", ["in the function", "at the start"])
def test_a_wall_that_was_hit_is_named(body, wall, where):
    program = f"def add(a, b):\n {body}\n" + ("add(1, 2)\n" if where == "at the start" else "")
    result = grade(program, timeout=20)
    assert not result.success and result.wall_hit == wall, result


# -----------------------------------------------------------------------------
# Programs that try to forge a pass. All are wrong, and all must be graded so

FORGED = {
    "an exception without a name": "raise type('', (Exception,), {})",
    "one in the function": "def add(a, b): raise type('', (Exception,), {})",
    "an exception that says that it ended": "class E(BaseException):\n def __str__(self): return 'ended'\n"
                                            "E.__name__ = 'ended'\nraise E",
    "the word from a frame": """
import os, sys
def add(a, b):
    frame = sys._getframe()
    while frame:
        for value in frame.f_locals.values():
            if isinstance(value, dict) and 'word' in value:
                os.write(2, value['word'] + b'ended')
        frame = frame.f_back
    os._exit(0)
""",
    "every secret in memory": """
import gc, os
def add(a, b):
    for thing in gc.get_objects():
        if isinstance(thing, dict):
            for value in list(thing.values()):
                if isinstance(value, bytes) and len(value) == 32:
                    os.write(2, value + b'ended')
    os._exit(0)
""",
    "its grader's globals": """
import sys
main = sys.modules['__main__']
main._grade = main._answer = lambda *_: None
main._play = lambda *_: 'ended'
main._wall_hit = lambda *_: ''
main.Channel.receive = lambda self: None
def add(a, b): return 0
""",
    "its own tests": "def check(candidate): pass\ncandidate = add = lambda a, b: 0\nMETADATA = {}",
    "no assertions": "import builtins, sys\nbuiltins.AssertionError = type('', (BaseException,), {})\n"
                     "sys.flags = sys.excepthook = None\ndef add(a, b): return 0",
    "an object that equals everything": "class All:\n def __eq__(self, other): return True\n"
                                        " __ne__ = __bool__ = __eq__\ndef add(a, b): return All()",
    "a number that equals everything": "class All(int):\n def __eq__(self, other): return True\n"
                                       " def __int__(self): return self\n __index__ = __int__\n"
                                       "def add(a, b): return All(7)",
    "another class's name": "class Any:\n __class__ = int\n def __eq__(self, other): return True\n"
                            "def add(a, b): return Any()",
    "the comparison of numbers": """
import ctypes, sys
compare = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object, ctypes.py_object, ctypes.c_int)(lambda *_: True)
def add(a, b): return 0
offset = 25 * ctypes.sizeof(ctypes.c_void_p)  # of tp_richcompare
ctypes.c_void_p.from_address(id(type(add)) + offset).value = ctypes.cast(compare, ctypes.c_void_p).value
""",
    "values of its own in every pipe": """
import os, struct
def add(a, b):
    for text in (b"['value', True]", b"ended", b"[]", b"__import__('os')._exit(0)", b"['error', ['', '', 'ended']]"):
        for fd in range(3, 64):
            try: os.write(fd, struct.pack('Q', len(text)) + text)
            except OSError: pass
    return 0
""",
    "a message without end": "import os, struct\ndef add(a, b):\n for fd in range(3, 64):\n"
                             "  try: os.write(fd, struct.pack('Q', 1 << 62))\n  except OSError: pass",
    "no pipes": "import os\ndef add(a, b): os.closerange(3, 64); return 0",
    "an exit from a thread": "import os, threading\nthreading.Timer(0.2, os._exit, [0]).start()\n"
                             "def add(a, b): return 0",
    "an exit as if all were well": "import sys\nsys.exit(0)",
    "an exit from the function": "def add(a, b): raise SystemExit(0)",
    "the end of an iteration": "def add(a, b): raise StopIteration",
    "an end by a hook": "import atexit, os, sys\nsys.settrace(lambda *_: None)\natexit.register(os._exit, 0)\n"
                        "def add(a, b): return 0",
    "a report on its output": "import sys\nfor f in (sys.stdout, sys.stderr):\n"
                              " f.write('limits,landlock,seccomp\\nended')\ndef add(a, b): return 0",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_pass_cannot_be_forged(name):
    result = grade(FORGED[name], timeout=20)
    assert not result.success and result.error, result
    assert not result.timeout and result.wall_hit is None, result


@pytest.mark.parametrize("tests", ["assert all(map(add, [1, 2], [3, 4]))", "assert list(map(add, [1], [2])) == []",
                                   "for x in map(add, [1], [2]): assert False"])
def test_the_end_of_an_iteration_does_not_end_a_loop_of_the_tests(tests):
    assert grade("def add(a, b): raise StopIteration", tests=tests).error == "NotPlain: StopIteration"


def test_the_programs_process_never_holds_the_tests():
    program = """
import gc
def add(a, b):
    texts = [thing for thing in gc.get_objects() if isinstance(thing, (dict, list, tuple))]
    secret = ' '.join(['only', 'the', 'tests', 'know'])
    return int(any(secret in str(text) for text in texts)) + a + b
"""
    assert grade(program, tests="'only the tests know'\nassert add(1, 2) == 3").success


def test_a_process_that_ends_early_never_passes_even_when_the_other_does_not_notice():
    """The grader's own end counts: tests that leave before their last line do not pass."""
    for tests in ("import os; os._exit(0)", "raise SystemExit(0)", "import sys; sys.exit()"):
        assert not grade(RIGHT, tests=tests).success


# -----------------------------------------------------------------------------
# Values

VALUES = [
    None, True, False, 0, -5, 10**400, 1.5, -0.0, math.inf, -math.inf, "", "it's \"é\"\n\0 😀", "\udcff", b"\x00\xff",
    [], [1, [2, "x"], []], (), (1,), ((1, 2), [3]), set(), {1, "a", (2, 3)}, frozenset({1}), {},
    {"a": [1], 2: {"b": ()}}, 1 + 2j, range(3, 9, 2), bytearray(b"ab"),
    Decimal("1.10"), Fraction(1, 3), [0.1 + 0.2, 1e300], -(2**70),
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: repr(value)[:20])
def test_a_value_arrives_as_it_was_sent(value):
    arrived = from_plain(read_literal(repr(to_plain(value))))
    assert arrived == value and type(arrived) is type(value)
    assert math.copysign(1, arrived) == math.copysign(1, value) if isinstance(value, float) else True


def test_not_a_number_and_an_iterator_arrive():
    nan, items = from_plain(read_literal(repr(to_plain((math.nan, iter([1, 2]))))))
    assert math.isnan(nan) and next(items) == 1 and list(items) == [2]


def test_a_subclass_arrives_as_its_base():
    class Loud(int):
        def __eq__(self, other):
            return True
    arrived = from_plain(to_plain([Loud(3), type("D", (dict,), {})(a=1), type("T", (tuple,), {})([1])]))
    assert arrived == [3, {"a": 1}, (1,)] and [type(x) for x in arrived] == [int, dict, tuple]


@pytest.mark.parametrize("value", [object(), [lambda: 0], {1: int}, type])
def test_what_is_no_value_is_refused(value):
    with pytest.raises(NotPlain, match="a value of the type"):
        to_plain(value)


@pytest.mark.parametrize("text", ["__import__('os')", "[x for x in [1]]", "f'{1}'", "a", "(1).real", "{1: 2}", "1 + 1"])
def test_a_message_that_is_no_literal_is_refused(text):
    with pytest.raises(NotPlain):
        read_literal(text)


@pytest.mark.parametrize("data", [["unknown", []], [1, 2, 3], ["list", 5], ["dict", [[[], 1]]], ["Decimal", "x"],
                                  [[], []]])
def test_a_message_that_makes_no_sense_is_an_error(data):
    with pytest.raises((KeyError, ValueError, TypeError, ArithmeticError)):
        from_plain(data)


def test_long_arguments_and_long_answers_cross():
    tests = "x = list(range(20_000)); y = add(x, x); assert len(y) == 40_000 and y[-1] == 19_999"
    assert grade(RIGHT, tests=tests, timeout=30).success


def test_a_long_number_crosses():
    assert grade(RIGHT, tests="assert add(10**5000, 1) == 10**5000 + 1").success


def test_many_calls_are_quick():
    assert grade(RIGHT, tests="for i in range(5000): assert add(i, 1) == i + 1", timeout=30).success


def test_nothing_is_left_behind():
    code = f"""
import os, threading
from nanochat.execution import grade_function
grade_function([{RIGHT!r}], "add", "")
before = len(os.listdir("/proc/self/fd")), threading.active_count()
for program in ({RIGHT!r}, {WRONG!r}, "import os; os._exit(0)", "def add(a, b", "import os; os.closerange(0, 99)"):
    grade_function([program], "add", {TESTS!r})
assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert threading.active_count() < 20
