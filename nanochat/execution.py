"""
Running what a model writes: a calculator for its tool calls, and a sandbox for whole programs (HumanEval).

The calculator evaluates no Python: it walks an `ast` allow-list in exact arithmetic, in any thread. The sandbox is a
child interpreter that walls itself in before it runs the program: resource limits, Landlock (files) and a seccomp list
of harmless system calls, by ctypes alone, root or not. This file is also the child's program, because setting walls
between fork and exec is unsafe where there are threads.

Left out, and known: a program can read the standard library and the names and sizes (not the contents) of other files;
it shares its interpreter with its own tests, so one that looks for a way to fake a pass will find it; a kernel bug is
a hole. Inside there are no threads, processes, sockets or sub-folders.
"""

import ctypes
import marshal
import os
import struct
import sys

if __name__ != "__main__":  # the child has no use for these, and starts 40 ms sooner without them
    import ast
    import itertools
    import re
    import secrets
    import signal
    import subprocess
    import tempfile
    import threading
    import time
    from contextlib import suppress
    from dataclasses import dataclass
    from fractions import Fraction

WALLS = ("limits", "landlock", "seccomp")
MAX_FOLDER_BYTES = 16 * 1024**2  # what a program may write: for each file by the kernel, for its folder by us
MAX_FOLDER_FILES = 1000
MAX_OPEN_FILES = 32
MAX_ERROR_BYTES = 2000
TIMED_OUT = "timed out"

# -----------------------------------------------------------------------------
# The child's side: raise the walls, run the program, say how it ended


def _libc(name, *arguments):
    """Call a libc function of the kind that returns -1 and errno; a refusal is an OSError. Numbers go as longs."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result = function(*[ctypes.c_long(value) if isinstance(value, int) else value for value in arguments])
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name} {arguments[0]} was refused")
    return result


def _set_limits(timeout, max_memory_bytes, parent_pid):
    if sys.platform == "linux":
        _libc("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS: the two other walls ask for it
        _libc("prctl", 4, 0)  # PR_SET_DUMPABLE: no core file, and nobody attaches
        _libc("prctl", 1, 9)  # PR_SET_PDEATHSIG, SIGKILL: die with the thread that started us
        if os.getppid() != parent_pid:  # it died before we asked to die with it
            os._exit(1)
    import resource  # POSIX only, hence not at the top
    for name, value in (("CORE", 0), ("NPROC", 1), ("NOFILE", MAX_OPEN_FILES), ("FSIZE", MAX_FOLDER_BYTES),
                        ("CPU", int(timeout) + 2), ("AS", max_memory_bytes)):  # AS last: macOS refuses it
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


# Landlock (linux/landlock.h): deny every right on files that this kernel knows, then grant a few below some folders.
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 1, 1 << 2, 1 << 3, 1 << 5, 1 << 8, 1 << 14


def _raise_landlock(folder):
    create_ruleset, add_rule, restrict_self = 444, 445, 446  # the same on every architecture
    abi = _libc("syscall", create_ruleset, None, 0, 1)
    known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(abi, 16)) - 1
    # the three words are files, TCP, and what reaches other processes (abstract sockets, signals)
    handled = struct.pack("QQQ", known, 3, 3)[:8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _libc("syscall", create_ruleset, handled, len(handled), 0)
    library = [*sys.path, sys.base_prefix + "/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    rights = {path: READ_FILE | READ_DIR for path in library} | {"/dev/null": READ_FILE | WRITE_FILE}
    # flat on purpose: without folders and links inside, its size is quickly added up
    rights[folder] = READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE
    for path, access in rights.items():
        if os.path.exists(path):
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            access &= known if os.path.isdir(path) else ~READ_DIR  # a folder's right on a file is an error
            _libc("syscall", add_rule, ruleset, 1, struct.pack("=Qi", access, fd), 0)
            os.close(fd)
    _libc("syscall", restrict_self, ruleset, 0)
    os.close(ruleset)


# The only system calls that a program may make: `name x86_64 aarch64`, `-` where the architecture has no such call.
# What Landlock does not see stays off the list: chmod, chown, utime, truncate, ioctl (file flags), setrlimit, kill.
SYSCALLS = """
read 0 63, write 1 64, open 2 -, close 3 57, stat 4 -, fstat 5 80, lstat 6 -, poll 7 -, lseek 8 62, mmap 9 222,
mprotect 10 226, munmap 11 215, brk 12 214, rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139,
pread64 17 67, pwrite64 18 68, readv 19 65, writev 20 66, access 21 -, pipe 22 -, select 23 -, sched_yield 24 124,
mremap 25 216, madvise 28 233, dup 32 23, dup2 33 -, pause 34 -, nanosleep 35 101, getitimer 36 102, alarm 37 -,
setitimer 38 103, getpid 39 172, sendfile 40 71, exit 60 93, uname 63 160, fsync 74 82, fdatasync 75 83,
ftruncate 77 46, getcwd 79 17, chdir 80 49, fchdir 81 50, rename 82 -, unlink 87 -, readlink 89 -, umask 95 166,
gettimeofday 96 169, getrusage 98 165, sysinfo 99 179, times 100 153, getuid 102 174, getgid 104 176,
geteuid 107 175, getegid 108 177, getppid 110 173, sigaltstack 131 132, gettid 186 178, time 201 -, futex 202 98,
sched_getaffinity 204 123, getdents64 217 61, restart_syscall 219 128, clock_gettime 228 113, clock_getres 229 114,
clock_nanosleep 230 115, exit_group 231 94, openat 257 56, newfstatat 262 79, unlinkat 263 35, renameat 264 38,
readlinkat 267 78, faccessat 269 48, pselect6 270 72, ppoll 271 73, dup3 292 24, pipe2 293 59, renameat2 316 276,
getrandom 318 278, statx 332 291, faccessat2 439 439
"""


def _seccomp_filter(machine):
    """The filter as BPF instructions (code, jump if true, jump if false, constant) over the kernel's seccomp_data:
    the call's number at byte 0, the architecture at 4, the arguments from 16 on, 8 bytes each."""
    column, arch, fcntl = {"x86_64": (1, 0xC000003E, 72), "aarch64": (2, 0xC00000B7, 25)}[machine]
    load, if_equal, if_at_least, answer = 0x20, 0x15, 0x35, 0x06
    allow, eperm, kill = 0x7FFF0000, 0x00050001, 0x80000000
    # another architecture's numbers (32-bit code by int 0x80) mean other calls; x32 sets bit 30: on no list, so EPERM
    program = [(load, 0, 0, 4), (if_equal, 1, 0, arch), (answer, 0, 0, kill), (load, 0, 0, 0)]
    for entry in SYSCALLS.replace("\n", " ").split(","):
        number = entry.split()[column]
        if number != "-":
            program += [(if_equal, 0, 1, int(number)), (answer, 0, 0, allow)]
    # fcntl up to F_SETLKW (7), and F_DUPFD_CLOEXEC (1030): F_SETOWN (8) would send signals to any process
    return program + [(if_equal, 0, 4, fcntl), (load, 0, 0, 24), (if_equal, 1, 0, 1030), (if_at_least, 1, 0, 8),
                      (answer, 0, 0, allow), (answer, 0, 0, eperm)]


def _raise_seccomp():
    machine = os.uname().machine
    if machine not in ("x86_64", "aarch64") or struct.calcsize("P") != 8:
        raise OSError(f"no table of system calls for {machine}")
    instructions = [struct.pack("HBBI", *instruction) for instruction in _seccomp_filter(machine)]
    code = ctypes.create_string_buffer(b"".join(instructions))
    sock_fprog = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(code)))
    _libc("prctl", 22, 2, sock_fprog)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def _raise_walls(timeout, max_memory_bytes, parent_pid):
    """Put up what this system has; returns the names of the walls that stand (a subset of WALLS)."""
    steps = {"limits": lambda: _set_limits(timeout, max_memory_bytes, parent_pid)}
    if sys.platform == "linux":
        steps |= {"landlock": lambda: _raise_landlock(os.getcwd()), "seccomp": _raise_seccomp}
    walls = []
    for name, step in steps.items():
        try:
            step()
            walls.append(name)
        except (ImportError, OSError, ValueError):
            pass  # the parent learns it from the list
    return walls


def _run_program(code):
    """Run the program as `__main__`; returns what it raised as text, empty when it ran to its end. Leaving early is
    an error too, `sys.exit(0)` included: the tests at the end of the program would not have run."""
    program = sys.modules["__main__"] = type(sys)("__main__")
    sys.argv = ["program.py"]
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), program.__dict__)
    except BaseException as raised:
        try:
            return f"{type(raised).__name__}: {raised}".removesuffix(": ")
        except BaseException:  # a __str__ of the program's own
            return type(raised).__name__
    return ""


def _child_main(orders_bytes):
    """Takes its orders from stdin, the rest of which is the program's. Says which walls stand in a first line on
    stdout, before the program runs, and how it ended at the end of stderr, after a word that the program was not told.
    """
    orders = b""
    while len(orders) < orders_bytes:
        orders += os.read(0, orders_bytes - len(orders)) or sys.exit("the orders are cut short")
    word, parent_pid, code, timeout, max_memory_bytes, allow_unsafe = marshal.loads(orders)
    write, leave = os.write, os._exit  # the program may replace them
    os.environ.clear()
    walls = _raise_walls(timeout, max_memory_bytes, parent_pid)
    write(1, f"{','.join(walls)}\n".encode())
    if len(walls) == len(WALLS) or allow_unsafe:
        error = _run_program(code)
        write(2, word + error.encode("utf-8", "replace")[:MAX_ERROR_BYTES])
    leave(0)


if __name__ == "__main__":
    _child_main(int(sys.argv[1]))  # never returns

# -----------------------------------------------------------------------------
# The parent's side: start the child, watch the clock and its output, clean up


@dataclass(frozen=True)
class ExecutionResult:
    success: bool  # the program ran to its end and raised nothing
    stdout: str
    stderr: str
    error: str | None  # what it raised, or what ended it
    timeout: bool
    memory_exceeded: bool
    output_truncated: bool  # stdout or stderr was longer than max_output_bytes
    walls: tuple[str, ...]  # those of WALLS that stood around it


def execute_code(code: str, *, timeout: float = 5.0, max_memory_bytes: int = 256 * 1024**2,
                 max_output_bytes: int = 64 * 1024, stdin: str = "", allow_unsafe: bool = False) -> ExecutionResult:
    """Run a Python program in the sandbox, at most `timeout` seconds with the start (some 40 ms). Any thread may call
    this, many at once. Where the system lacks a wall it is a ValueError, unless allow_unsafe accepts what there is.
    `execute_code("print(6 * 7)").stdout` is `"42\\n"`."""
    if timeout <= 0:
        raise ValueError(f"timeout={timeout}: must be above 0 seconds")
    word = secrets.token_bytes(32)
    orders = marshal.dumps((word, os.getpid(), code, float(timeout), max_memory_bytes, allow_unsafe))
    home = tempfile.mkdtemp(prefix="nanochat-run-")
    try:
        sent = orders + stdin.encode("utf-8", "replace")
        out, err, end, exit_code = _run_child(len(orders), sent, home, timeout, max_output_bytes + 1000)
    finally:
        _remove_folder(home)
    first_line, started, stdout = out.head.partition(b"\n")
    if not started and end is None:
        raise RuntimeError(f"the sandbox did not start (exit code {exit_code}): {err.head.decode('utf-8', 'replace')}")
    walls = tuple(first_line.decode().split(",")) if first_line else ()
    if started and walls != WALLS and not allow_unsafe:
        missing = ", ".join(wall for wall in WALLS if wall not in walls)
        raise ValueError(f"this system cannot wall a program in: no {missing} (needs Linux 5.13 or newer on x86_64 or "
                         "aarch64); allow_unsafe=True runs the program all the same, with your rights to your files")
    _, ended, error = err.tail.rpartition(word)
    error = error.decode("utf-8", "replace")
    if not ended:
        error = end or (f"killed by signal {-exit_code} ({signal.strsignal(-exit_code)})" if exit_code < 0 else
                        f"ended early with exit code {exit_code}")
    outputs = stdout, err.head.partition(word)[0]
    stdout, stderr = [output[:max_output_bytes].decode("utf-8", "replace") for output in outputs]
    return ExecutionResult(
        success=not error, stdout=stdout, stderr=stderr, error=error or None, walls=walls,
        timeout=not ended and end == TIMED_OUT, memory_exceeded=error.startswith("MemoryError"),
        output_truncated=any(len(output) > max_output_bytes for output in outputs))


def sandbox_walls() -> list[str]:
    """The walls that hold on this machine, of WALLS, found by putting them up around an empty program."""
    return list(execute_code("", allow_unsafe=True).walls)


class _Capture(threading.Thread):
    """Reads a pipe to its end and closes it. Keeps the first `limit` bytes and the last few: a flood costs nothing."""

    def __init__(self, pipe, limit):
        super().__init__(daemon=True)  # in unsafe mode an orphan can hold the pipe open for ever
        self.pipe, self.limit, self.head, self.tail = pipe, limit, b"", b""
        self.start()

    def run(self):
        with self.pipe:
            while chunk := self.pipe.read(65536):
                self.head += chunk[:self.limit - len(self.head)]
                self.tail = (self.tail + chunk)[-2 * MAX_ERROR_BYTES:]


def _feed(pipe, data):
    with suppress(OSError), pipe:  # the child need not read it, and may be gone
        while data:  # an unbuffered pipe may take less than it is given
            data = data[pipe.write(data):]


def _run_child(orders_bytes, sent, home, timeout, kept_bytes):
    """Returns the captured stdout and stderr, why we ended the child (None: it ended), and its exit code."""
    folder = os.path.join(home, "work")
    os.mkdir(folder)
    # alone, without site-packages, .pyc files and buffers: what was printed before a crash or the deadline is kept
    command = [sys.executable, "-I", "-S", "-B", "-u", "-X", "utf8", os.path.abspath(__file__), str(orders_bytes)]
    # what an interpreter may need to start; the child clears it
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "SYSTEMROOT") if name in os.environ}
    process = subprocess.Popen(command, cwd=folder, env=environment, bufsize=0, start_new_session=True,
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        threading.Thread(target=_feed, args=(process.stdin, sent), daemon=True).start()
        captures = [_Capture(process.stdout, kept_bytes), _Capture(process.stderr, kept_bytes)]
        end = _wait(captures, folder, time.monotonic() + timeout)
    finally:
        # the group, and before its leader is reaped: until then its number cannot be anyone else's
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        exit_code = process.wait()
    for capture in captures:
        capture.join(1.0)
    return *captures, end, exit_code


def _wait(captures, folder, deadline):
    """Until both pipes are closed, which the child's end does at once: None. Else why it must be ended."""
    while running := [capture for capture in captures if capture.is_alive()]:
        left = deadline - time.monotonic()
        if left <= 0:
            return TIMED_OUT
        running[0].join(min(left, 0.05))
        with suppress(OSError), os.scandir(folder) as entries:
            sizes = [entry.stat(follow_symlinks=False).st_size for entry in itertools.islice(entries, MAX_FOLDER_FILES)]
            if len(sizes) == MAX_FOLDER_FILES or sum(sizes) > MAX_FOLDER_BYTES:
                return f"wrote over {MAX_FOLDER_BYTES} bytes or {MAX_FOLDER_FILES} files"


def _remove_folder(home):
    """Delete `home` and all below. Folders found inside are first moved up to `home`, so that no depth and no length
    of a path stops it; links are removed, never followed. `home` itself holds only what we put there."""
    numbers = itertools.count()
    todo = [home]
    for path in todo:  # grows on the way
        for entry in list(os.scandir(path)):
            if entry.is_dir(follow_symlinks=False):
                todo.append(os.path.join(home, f"moved-{next(numbers)}"))
                os.chmod(entry.path, 0o700)
                os.rename(entry.path, todo[-1])
            else:
                os.unlink(entry.path)
    for path in reversed(todo):
        os.rmdir(path)


# -----------------------------------------------------------------------------
# The calculator

MAX_EXPRESSION_CHARS = 500
MAX_DEPTH = 50  # a sum of n terms is n - 1 deep
MAX_MAGNITUDE = 10**15  # of every number on the way
EXPRESSION = re.compile(r"""(?:[0-9 .,+\-*/()]|\.count|'[^'\\\n]*'|"[^"\\\n]*")+""")
THOUSANDS = re.compile(r"""'[^']*'|"[^"]*"|(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])""")  # or a string, to skip


def use_calculator(expression: str) -> str | None:
    """The value of an arithmetic expression as text, None for anything else or without a value.

    Numbers, + - * / ( ), unary minus, commas as thousands separators, and 'text'.count('x'). Arithmetic is exact; the
    result is rounded to 6 decimals and written without trailing zeros, as the training data has it:
    `0.2*50` gives `10`, `0.1+0.2` gives `0.3`, `10/3` gives `3.333333`, `'a,b,c'.count(',')` gives `2`.
    """
    if len(expression) > MAX_EXPRESSION_CHARS or not EXPRESSION.fullmatch(expression):
        return None
    plain = THOUSANDS.sub(lambda match: match[0] if match[0][0] in "'\"" else match[0].replace(",", ""), expression)
    try:
        value = _evaluate(ast.parse(plain.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    millionths = round(value * 10**6)
    whole, fraction = divmod(abs(millionths), 10**6)
    return "-" * (millionths < 0) + f"{whole}.{fraction:06d}".rstrip("0").rstrip(".")


def _evaluate(node, depth=0):
    """The exact value of a node of the allow-list; ValueError for every other node, and past the bounds."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    match node:
        case ast.Constant(value=int() | float() as number):
            value = Fraction(str(number))  # the decimal as written: 0.1 is a tenth
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            value = -_evaluate(operand, depth + 1)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div() as op, right=right):
            a, b = _evaluate(left, depth + 1), _evaluate(right, depth + 1)
            value = {ast.Add: a.__add__, ast.Sub: a.__sub__, ast.Mult: a.__mul__, ast.Div: a.__truediv__}[type(op)](b)
        case ast.Call(func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
                      args=[ast.Constant(value=str() as part)], keywords=[]):
            value = Fraction(text.count(part))
        case _:
            raise ValueError("not arithmetic")
    if abs(value) > MAX_MAGNITUDE:
        raise ValueError("too large")
    return value
