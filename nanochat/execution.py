"""
The sandbox: runs the Python programs that a model writes, and grades the functions in them
(HumanEval).

Each program runs in a child interpreter that first restricts itself: resource limits, Landlock
(files) and a seccomp list of harmless system calls, also for root. That side is sandbox_child.py
and confinement.py. This side starts the child in a folder of its own with an empty environment.
It watches the clock, the output and the files, ends the child's process group and cleans up.

`grade_function` runs the tests in a second such child, which asks the program's process for values.
Only the tests' process can say that they passed, after the last of them, and no code of the program
ever runs in it; nor does the program hold the tests. So a pass cannot be forged; values are compared
that the program sent, and an object that equals everything is no value. What remains: answers that
are right for the tests' inputs alone; a right answer of a type of the program's own, or one that
changes its arguments, counts as wrong.

Known gaps: a program can read the standard library, and the names and sizes (not the contents) of
other files. That it ran to its end (`execute_code`) is said by its own interpreter, so a program
can lie about that. A kernel bug is a hole. Programs have threads, but no processes, sockets or
sub-folders.
"""

import marshal
import os
import secrets
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

from nanochat.confinement import MAX_FILE_BYTES, WALLS
from nanochat.sandbox_child import MAX_ERROR_BYTES

CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")
# All files together, also deleted ones that are still open; the kernel limits only each file
MAX_FOLDER_BYTES = MAX_FILE_BYTES
MAX_FOLDER_FILES = 1000
TIMED_OUT = "timed out"
TOO_FULL = f"wrote over {MAX_FOLDER_BYTES} bytes or {MAX_FOLDER_FILES} files"
STOPPED = (TIMED_OUT, TOO_FULL)  # why we end a program


@dataclass(frozen=True)
class ExecutionResult:
    success: bool  # True: the program ran to its end and raised nothing, or the tests passed
    stdout: str
    stderr: str
    error: str | None  # the exception that was raised, or the reason why the program was ended
    timeout: bool
    memory_exceeded: bool
    output_truncated: bool  # stdout or stderr was longer than max_output_bytes
    walls: tuple[str, ...]  # those of WALLS that stood around it
    wall_hit: str | None = None  # what the sandbox refused it, where that is the error


def execute_code(
    code: str,
    *,
    timeout: float = 5.0,
    max_memory_bytes: int = 256 * 1024**2,
    max_output_bytes: int = 64 * 1024,
    stdin: str = "",
    allow_unsafe: bool = False,
) -> ExecutionResult:
    """
    Run a Python program in the sandbox for at most `timeout` seconds, including the start (some 40
    ms). Any thread may call this, many at once. ValueError if the system lacks a wall, unless
    allow_unsafe accepts that. `execute_code("print(6 * 7)").stdout` is `"42\\n"`.
    """
    orders = {
        "part": "run",
        "sources": [code],
        "timeout": float(timeout),
        "max_memory_bytes": max_memory_bytes,
        "allow_unsafe": allow_unsafe,
    }
    return _execute(orders, stdin=stdin, max_output_bytes=max_output_bytes)


def grade_function(
    sources: list[str],
    entry_point: str,
    tests: str,
    *,
    setup: str = "",
    timeout: float = 5.0,
    max_memory_bytes: int = 256 * 1024**2,
    allow_unsafe: bool = False,
) -> ExecutionResult:
    """
    Do the tests pass for the function `entry_point` of a program? The program is its sources, run
    one after the other as a module. The tests are run after `setup`, trusted code that they may
    need; they call `entry_point`, too, with values of built-in types. timeout and max_memory_bytes
    hold for each of the two processes, stdout and stderr are the program's.

    >>> grade_function(["def add(a, b): return a + b"], "add", "assert add(1, 2) == 3").success
    True
    """
    calls_out, calls_in = os.pipe()
    answers_out, answers_in = os.pipe()
    orders = {
        "entry_point": entry_point,
        "timeout": float(timeout),
        "max_memory_bytes": max_memory_bytes,
        "allow_unsafe": allow_unsafe,
    }
    program = orders | {"part": "answer", "sources": sources, "channel": (calls_out, answers_in)}
    grader = orders | {
        "part": "grade",
        "sources": [setup, tests],
        "channel": (answers_out, calls_in),
    }
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(_execute, program)
        verdict = _execute(grader)
        program_result = running.result()
    if verdict.success:
        return replace(program_result, success=True, error=None, timeout=False, wall_hit=None)

    # If the program itself failed, that is the reason why the tests did
    reason = verdict if program_result.success else program_result
    return replace(reason, success=False, stdout=program_result.stdout, stderr=program_result.stderr)


def _execute(orders, stdin="", max_output_bytes=64 * 1024):
    """Run a child with these orders (see sandbox_child.py). Returns its ExecutionResult."""
    timeout = orders["timeout"]
    if timeout <= 0:
        raise ValueError(f"timeout={timeout}: must be above 0 seconds")

    # Run it
    word = secrets.token_bytes(32)  # marks the child's report, see sandbox_child.main
    channel = orders.get("channel", ())
    order_bytes = marshal.dumps(orders | {"word": word, "parent_pid": os.getpid()})
    home = os.path.realpath(tempfile.mkdtemp(prefix="nanochat-run-"))
    try:
        stdin_bytes = stdin.encode("utf-8", "replace")
        out, err, how = _run_child(
            order_bytes, stdin_bytes, home, channel, timeout, max_output_bytes + 1000
        )
    finally:
        _remove_folder(home)

    # The first line of stdout names the walls. Without it the child did not reach the program
    first_line, started, stdout = out.head.partition(b"\n")
    if not started and how not in STOPPED:
        reason = err.head.decode("utf-8", "replace")
        raise RuntimeError(f"the sandbox did not start ({how}): {reason}")
    walls = tuple(first_line.decode().split(",")) if first_line else ()
    if started and walls != WALLS and not orders["allow_unsafe"]:
        missing = ", ".join(wall for wall in WALLS if wall not in walls)
        raise ValueError(
            f"this system cannot wall a program in: no {missing} (needs Linux 5.13 or newer on "
            "x86_64 or aarch64); allow_unsafe=True runs the program all the same, with your rights "
            "to your files"
        )

    # The report after the word at the end of stderr; without it the program did not run to its end
    _, reported, report = err.tail.rpartition(word)
    success = bool(reported) and report == b"ended"
    error = how
    wall_hit = "disk" if how == TOO_FULL else ""
    if reported:
        _, _, raised = report.decode("utf-8", "replace").partition("\n")
        wall_hit, _, error = raised.partition("\n")
    stderr = err.head.partition(word)[0]
    return ExecutionResult(
        success=success,
        stdout=stdout[:max_output_bytes].decode("utf-8", "replace"),
        stderr=stderr[:max_output_bytes].decode("utf-8", "replace"),
        error=None if success else error,
        timeout=not reported and error == TIMED_OUT,
        memory_exceeded=error.startswith("MemoryError"),
        output_truncated=max(len(stdout), len(stderr)) > max_output_bytes,
        walls=walls,
        wall_hit=wall_hit or None,
    )


def sandbox_walls() -> list[str]:
    """
    The names of the walls that hold on this machine, found by raising them around an empty program.
    """
    return list(execute_code("", allow_unsafe=True).walls)


# -----------------------------------------------------------------------------
# The child process


class _Capture(threading.Thread):
    """
    Reads a pipe to its end and closes it. Keeps the first `limit` bytes, and the last few for the
    report, so that a program that prints without end costs no memory.
    """

    def __init__(self, pipe, limit):
        super().__init__(daemon=True)  # in unsafe mode an orphan can hold the pipe open for ever
        self.pipe = pipe
        self.limit = limit
        self.head = b""
        self.tail = b""
        self.start()

    def run(self):
        with self.pipe:
            # the pipe is empty for good when the child and its children have closed it
            while chunk := self.pipe.read(65536):
                self.head += chunk[:self.limit - len(self.head)]
                self.tail = (self.tail + chunk)[-2 * MAX_ERROR_BYTES:]


def _run_child(orders, stdin, home, channel, timeout, kept_bytes):
    """
    Run the child with these orders (bytes) in a new folder below `home`, until it ends or must be
    stopped. `channel` are open files that it takes over. Returns the captured stdout and stderr,
    and in words how it ended.
    """
    folder = os.path.join(home, "work")
    try:
        os.mkdir(folder)
        process = _start_child(folder, len(orders), channel)
    finally:
        # The child alone holds them now: when it ends, whoever waits at the other end notices
        for fd in channel:
            os.close(fd)
    try:
        # Threads, because a pipe that is full stops whoever writes to it
        threading.Thread(target=_feed, args=(process.stdin, orders + stdin), daemon=True).start()
        captures = [_Capture(process.stdout, kept_bytes), _Capture(process.stderr, kept_bytes)]
        how = _wait(captures, folder, process.pid, time.monotonic() + timeout)
    finally:
        # The group, and before its leader is reaped: until then its number cannot be anyone else's
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        exit_code = process.wait()
    for capture in captures:
        capture.join(1.0)

    # How it ended, if we did not stop it; subprocess gives the number of a signal as a negative
    # exit code
    if how is None and exit_code < 0:
        how = f"killed by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    return *captures, how or f"ended early with exit code {exit_code}"


def _start_child(folder, orders_bytes, channel):
    # -I -S -B: isolated, without site-packages and .pyc files; -u: what it printed before a crash
    # is kept
    command = [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", CHILD, str(orders_bytes)]
    # An interpreter may need these to start; the child clears them
    environment = {"MALLOC_ARENA_MAX": "1"}  # glibc: one for each thread would use up the memory limit
    for name in ("LD_LIBRARY_PATH", "SYSTEMROOT"):
        if name in os.environ:
            environment[name] = os.environ[name]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        bufsize=0,
        pass_fds=channel,
        start_new_session=True,  # its own process group, to be killed as a whole
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _feed(pipe, data):
    with suppress(OSError), pipe:  # the child need not read it, and may be gone
        while data:  # an unbuffered pipe may take less than it is given
            data = data[pipe.write(data):]


def _wait(captures, folder, pid, deadline):
    """Wait until the child has closed both pipes: None. If it must be stopped: one of STOPPED."""
    for capture in captures:
        while capture.is_alive():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return TIMED_OUT
            capture.join(min(left_s, 0.05))
            if _is_too_full(folder, pid):
                return TOO_FULL
    return None


def _is_too_full(folder, pid):
    # the child cannot make folders, so one level is all
    num_files = 0
    num_bytes = _deleted_bytes(folder, pid)
    with suppress(OSError), os.scandir(folder) as entries:  # a file may be removed while we look
        for entry in entries:
            num_files += 1
            num_bytes += entry.stat(follow_symlinks=False).st_size
    return num_files >= MAX_FOLDER_FILES or num_bytes > MAX_FOLDER_BYTES


def _deleted_bytes(folder, pid):
    """
    Bytes of the files that a process holds, open or mapped, though they were deleted. On Linux,
    where /proc shows them; elsewhere 0.
    """
    sizes = {}  # number of the file in its file system -> bytes
    with suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with suppress(OSError):  # it was closed while we look
                status = entry.stat()  # of the file that the link stands for
                if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                    sizes[status.st_ino] = status.st_size
    with suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as mappings:
        for line in mappings:
            if line.endswith(" (deleted)\n") and folder in line:
                inode = int(line.split(maxsplit=5)[4])
                sizes.setdefault(inode, MAX_FILE_BYTES)  # closed: how large it is cannot be seen
    return sum(sizes.values())


def _remove_folder(home):
    """
    Delete `home` and everything below. Folders found inside are first moved up to `home`, so that
    neither depth nor length of a path is a problem. Links are removed, never followed. `home`
    itself holds only our own folder.
    """
    folders = [home]  # grows in the loop
    for folder in folders:
        for entry in list(os.scandir(folder)):
            # A folder may have lost its permissions; moved up, it waits for its turn in this loop
            if entry.is_dir(follow_symlinks=False):
                moved = os.path.join(home, f"moved-{len(folders)}")
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, moved)
                folders.append(moved)
            else:
                os.unlink(entry.path)
    for folder in reversed(folders):
        os.rmdir(folder)
