"""The sandbox from its user's side: what a program gets, what comes back, threads, and systems that lack a wall."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat import confinement, execution, sandbox_child
from nanochat.execution import WALLS, execute_code, sandbox_walls

walled = pytest.mark.skipif(tuple(sandbox_walls()) != WALLS, reason=f"this system has only {sandbox_walls()}")
ROOT = Path(execution.__file__).parents[1]


@pytest.fixture(autouse=True)
def cells(tmp_path, monkeypatch):
    """Where the programs' folders are made; every test must leave it empty."""
    folder = tmp_path / "cells"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid):
    """Whether there is such a process; one that ended and waits to be reaped is not alive."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def without(tmp_path, *walls):
    """The module on a system that lacks these walls: the kernel does not know the calls that the child makes."""
    broken = {"landlock": ('"syscall", 44', '"syscall", 944'), "seccomp": ('"prctl", 22,', '"prctl", 9922,'),
              "limits": ("import resource", "import resource_of_posix")}
    source = Path(confinement.__file__).read_text(encoding="utf-8")
    for old, new in (broken[wall] for wall in walls):
        assert old in source
        source = source.replace(old, new)
    (tmp_path / "confinement.py").write_text(source, encoding="utf-8")
    shutil.copy(sandbox_child.__file__, tmp_path)
    path = shutil.copy(execution.__file__, tmp_path / "execution_without.py")  # runs the child that lies beside it
    spec = importlib.util.spec_from_file_location("execution_without", path)
    module = sys.modules["execution_without"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -----------------------------------------------------------------------------
# What a program gets, and what comes back


@walled
def test_a_program_that_runs_to_its_end_is_a_success():
    result = execute_code("import sys; print(6 * 7); print('é', file=sys.stderr)")
    assert result == execution.ExecutionResult(True, "42\n", "é\n", None, False, False, False, WALLS)


@walled
@pytest.mark.parametrize("program, error", [
    ("def f(:", "SyntaxError: invalid syntax (<program>, line 1)"), ("a\0b", "null bytes"), ("1 / 0", "ZeroDivision"),
    ("assert 1 == 2, 'no'", "AssertionError: no"), ("raise KeyError", "KeyError"), ("\udcff", "UnicodeEncodeError"),
    ("raise ValueError('x' * 10**6)", "ValueError: xxx"), ("raise ValueError('\\udcff')", "ValueError: ?"),
])
def test_what_it_raises_is_told(program, error):
    result = execute_code(program)
    assert not result.success and error in result.error and len(result.error) <= 2000


@walled
def test_it_is_a_main_program_with_the_standard_library_and_a_folder_of_its_own():
    assert execute_code("""
import collections, dataclasses, decimal, functools, hashlib, itertools, json, math, os, pickle, random, re, sys, time
assert __name__ == "__main__" and sys.argv == ["program.py"]
@dataclasses.dataclass
class Point: x: int
assert pickle.loads(pickle.dumps(Point(3))) == Point(3)
assert hashlib.md5(b"").hexdigest() == "d41d8cd98f00b204e9800998ecf8427e" and 0 <= random.random() < 1
assert os.listdir() == []
with open("notes.txt", "w") as f: f.write("hello")
with open("notes.txt", "a") as f: f.write(" world")
os.rename("notes.txt", "kept.txt")
assert open("kept.txt").read() == "hello world" and os.listdir() == ["kept.txt"]
os.remove("kept.txt")
with open(os.devnull, "w") as f: print("nothing", file=f)
time.sleep(0.01)
""").error is None


@walled
@pytest.mark.parametrize("program", ["print(input(), input())", "import sys; print(*sys.stdin.read().split())",
                                     "print(*open(0).read().split())"])
def test_stdin_reaches_the_program(program):
    assert execute_code(program, stdin="één\ntwo").stdout == "één two\n"


@walled
def test_a_long_program_and_a_long_stdin_that_is_not_read():
    program = "x = 0\n" + "x += 1\n" * 50_000 + "print(x)"
    assert execute_code(program, stdin="x" * 10**7, timeout=20).stdout == "50000\n"


@walled
@pytest.mark.parametrize("size, cut", [(999, False), (1000, False), (1001, True), (5000, True), (10**6, True)])
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_cut_at_its_limit_and_the_program_goes_on(stream, size, cut):
    result = execute_code(f"import sys; sys.{stream}.write('x' * {size})", max_output_bytes=1000)
    assert result.success and result.output_truncated == cut
    assert getattr(result, stream) == "x" * min(size, 1000)


@walled
def test_what_was_printed_before_the_deadline_or_a_crash_is_kept():
    assert execute_code("print('on the way')\nwhile True: pass", timeout=0.5).stdout == "on the way\n"
    assert execute_code("import os; print('on the way'); os.abort()").stdout == "on the way\n"


@walled
def test_the_memory_limit_is_the_one_asked_for():
    program = "x = bytes(200 * 1024**2)"
    assert execute_code(program, max_memory_bytes=128 * 1024**2).memory_exceeded
    assert execute_code(program, max_memory_bytes=512 * 1024**2).success


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_a_timeout_of_nothing_is_refused(timeout):
    with pytest.raises(ValueError, match="timeout"):
        execute_code("", timeout=timeout)


@walled
def test_a_start_that_fails_is_an_error_and_not_a_failed_program(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="did not start"):
        execute_code("print(1)")


# -----------------------------------------------------------------------------
# Threads and processes


@walled
def test_many_threads_at_once_get_each_their_own():
    programs = [f"print({i})" if i % 4 else f"import time; print({i}, flush=True); time.sleep(60)" for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda code: execute_code(code, timeout=1.5 if "sleep" in code else 20), programs))
    assert [result.stdout for result in results] == [f"{i}\n" for i in range(24)]
    assert [result.timeout for result in results] == [i % 4 == 0 for i in range(24)]


@walled
def test_no_thread_and_no_file_is_left_open():
    execute_code("")
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for program in ("print(1)", "1 / 0", "import os; os.abort()", "import os; os.closerange(0, 99)"):
        execute_code(program, stdin="x" * 10**6)
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before


@walled
def test_the_program_dies_with_its_starter(cells):
    program = "import os; open('pid', 'w').write(str(os.getpid()))\nwhile True: pass"
    starter = subprocess.Popen(
        [sys.executable, "-c", f"import tempfile; tempfile.tempdir = {str(cells)!r}\n"
         f"from nanochat.execution import execute_code; execute_code({program!r}, timeout=60)"], cwd=ROOT)
    wait_until(lambda: any(path.stat().st_size for path in cells.rglob("pid")))
    home, = cells.iterdir()
    pid = int((home / "work" / "pid").read_text())
    assert is_alive(pid)
    starter.kill()
    starter.wait()
    wait_until(lambda: not is_alive(pid))
    execution._remove_folder(str(home))  # nobody was left to do it


# -----------------------------------------------------------------------------
# The walls, and systems that lack one


@pytest.mark.parametrize("missing", [["landlock"], ["seccomp"], ["limits"], ["landlock", "seccomp"]])
@walled
def test_a_system_without_a_wall_asks_for_the_flag(tmp_path, missing):
    module = without(tmp_path, *missing)
    assert module.sandbox_walls() == [wall for wall in WALLS if wall not in missing]
    with pytest.raises(ValueError, match=f"no {', '.join(missing)} .*allow_unsafe=True"):
        module.execute_code(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()  # it was not run and then complained about
    assert module.execute_code("print(1)", allow_unsafe=True).stdout == "1\n"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_without_walls_the_deadline_still_ends_the_whole_group_and_all_folders_go(tmp_path):
    (tmp_path / "precious").write_text("kept")
    module = without(tmp_path, *[wall for wall in WALLS if wall in sandbox_walls()])
    result = module.execute_code(f"""
import os, time
os.symlink({str(tmp_path)!r}, "link")
os.makedirs("a/b/c"); open("a/b/c/file", "w"); os.mkdir("locked", 0); os.chmod("a/b", 0o500); os.chmod("a", 0)
for _ in range(1200): os.mkdir("d"); os.chdir("d")
for _ in range(3):
    if pid := os.fork(): print(pid)
    else: time.sleep(60)
time.sleep(60)
""", timeout=2.0, allow_unsafe=True)
    assert result.timeout and result.walls == () and len(result.stdout.split()) == 3
    assert (tmp_path / "precious").read_text() == "kept"
    wait_until(lambda: not any(is_alive(int(pid)) for pid in result.stdout.split()))


def test_importing_it_needs_nothing_of_posix_and_its_child_little_at_all():
    program = "import sys\nfor name in ('resource', 'pwd', 'grp', 'termios', 'pty'): sys.modules[name] = None\n" \
              "import nanochat.execution"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
    names = set()
    for module in (sandbox_child, confinement):
        top = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        names |= {alias.name for node in top for alias in getattr(node, "names", [])}
    assert names == {"ctypes", "marshal", "os", "struct", "sys"}
