"""
The sandbox: runs the Python programs that a model writes (HumanEval).

Each program runs in a child interpreter that first restricts itself: resource limits, Landlock
(files) and a seccomp list of harmless system calls, also for root. That side is sandbox_child.py.
This side starts the child in a folder of its own with an empty environment. It watches the clock,
the output and the files, ends the child's process group and cleans up.

Known gaps: a program can read the standard library, and the names and sizes (not the contents) of
other files. It shares its interpreter with its own tests, so it can find a way to fake a pass. A
kernel bug is a hole. Programs have no threads, processes, sockets or sub-folders.
"""

import marshal
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

from nanochat.sandbox_child import MAX_ERROR_BYTES, MAX_FILE_BYTES, WALLS

CHILD = os.path.join(os.path.dirname(os.path.abspath(__file__)), "sandbox_child.py")
MAX_FOLDER_BYTES = MAX_FILE_BYTES  # all files together; the kernel limits only each file
MAX_FOLDER_FILES = 1000
TIMED_OUT = "timed out"
TOO_FULL = f"wrote over {MAX_FOLDER_BYTES} bytes or {MAX_FOLDER_FILES} files"
STOPPED = (TIMED_OUT, TOO_FULL)  # why we end a program


@dataclass(frozen=True)
class ExecutionResult:
    success: bool  # True: the program ran to its end and raised nothing
    stdout: str
    stderr: str
    error: str | None  # the exception that it raised, or the reason why it was ended
    timeout: bool
    memory_exceeded: bool
    output_truncated: bool  # stdout or stderr was longer than max_output_bytes
    walls: tuple[str, ...]  # those of WALLS that stood around it


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
    if timeout <= 0:
        raise ValueError(f"timeout={timeout}: must be above 0 seconds")

    # Run it
    word = secrets.token_bytes(32)  # marks the child's report, see sandbox_child.main
    orders = marshal.dumps((
        word,
        os.getpid(),
        code,
        float(timeout),
        max_memory_bytes,
        allow_unsafe,
    ))
    home = tempfile.mkdtemp(prefix="nanochat-run-")
    try:
        stdin_bytes = stdin.encode("utf-8", "replace")
        out, err, how = _run_child(orders, stdin_bytes, home, timeout, max_output_bytes + 1000)
    finally:
        _remove_folder(home)

    # The first line of stdout names the walls. Without it the child did not reach the program
    first_line, started, stdout = out.head.partition(b"\n")
    if not started and how not in STOPPED:
        reason = err.head.decode("utf-8", "replace")
        raise RuntimeError(f"the sandbox did not start ({how}): {reason}")
    walls = tuple(first_line.decode().split(",")) if first_line else ()
    if started and walls != WALLS and not allow_unsafe:
        missing = ", ".join(wall for wall in WALLS if wall not in walls)
        raise ValueError(
            f"this system cannot wall a program in: no {missing} (needs Linux 5.13 or newer on "
            "x86_64 or aarch64); allow_unsafe=True runs the program all the same, with your rights "
            "to your files"
        )

    # The report after the word at the end of stderr; without it the program did not run to its end
    _, reported, report = err.tail.rpartition(word)
    error = report.decode("utf-8", "replace") if reported else how
    stderr = err.head.partition(word)[0]
    return ExecutionResult(
        success=not error,
        stdout=stdout[:max_output_bytes].decode("utf-8", "replace"),
        stderr=stderr[:max_output_bytes].decode("utf-8", "replace"),
        error=error or None,
        timeout=not reported and error == TIMED_OUT,
        memory_exceeded=error.startswith("MemoryError"),
        output_truncated=max(len(stdout), len(stderr)) > max_output_bytes,
        walls=walls,
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


def _run_child(orders, stdin, home, timeout, kept_bytes):
    """
    Run the child with these orders (bytes) in a new folder below `home`, until it ends or must be
    stopped. Returns the captured stdout and stderr, and in words how it ended.
    """
    folder = os.path.join(home, "work")
    os.mkdir(folder)
    process = _start_child(folder, len(orders))
    try:
        # Threads, because a pipe that is full stops whoever writes to it
        threading.Thread(target=_feed, args=(process.stdin, orders + stdin), daemon=True).start()
        captures = [_Capture(process.stdout, kept_bytes), _Capture(process.stderr, kept_bytes)]
        how = _wait(captures, folder, time.monotonic() + timeout)
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


def _start_child(folder, orders_bytes):
    # -I -S -B: isolated, without site-packages and .pyc files; -u: what it printed before a crash
    # is kept
    command = [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", CHILD, str(orders_bytes)]
    # An interpreter may need these to start; the child clears them
    environment = {}
    for name in ("LD_LIBRARY_PATH", "SYSTEMROOT"):
        if name in os.environ:
            environment[name] = os.environ[name]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        bufsize=0,
        start_new_session=True,  # its own process group, to be killed as a whole
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def _feed(pipe, data):
    with suppress(OSError), pipe:  # the child need not read it, and may be gone
        while data:  # an unbuffered pipe may take less than it is given
            data = data[pipe.write(data):]


def _wait(captures, folder, deadline):
    """Wait until the child has closed both pipes: None. If it must be stopped: one of STOPPED."""
    for capture in captures:
        while capture.is_alive():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return TIMED_OUT
            capture.join(min(left_s, 0.05))
            if _is_too_full(folder):
                return TOO_FULL
    return None


def _is_too_full(folder):
    # the child cannot make folders, so one level is all
    num_files = 0
    num_bytes = 0
    with suppress(OSError), os.scandir(folder) as entries:  # a file may be removed while we look
        for entry in entries:
            num_files += 1
            num_bytes += entry.stat(follow_symlinks=False).st_size
            if num_files >= MAX_FOLDER_FILES or num_bytes > MAX_FOLDER_BYTES:
                return True
    return False


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
