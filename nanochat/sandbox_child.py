"""
The child process of the sandbox (execution.py): it restricts itself, then plays one of three parts.

    run     run a program
    answer  load a program, and call its function as often as another process asks
    grade   run tests of a function whose calls are answered by another process

A function is graded by the last two together. Between them go plain values alone, so nothing that a
program does in its own process reaches the tests.

It is run by path, in an interpreter of its own: to restrict a process between fork and exec is
unsafe where the parent has threads. It imports little, which makes it start 40 ms sooner.
"""

import marshal
import os
import struct
import sys

MAX_ERROR_BYTES = 2000            # of the report on how the program ended
MAX_MESSAGE_BYTES = 16 * 1024**2  # of a call's arguments, or of its answer


# -----------------------------------------------------------------------------
# Plain values between two processes: None, bool, int, float, str and bytes as they are, all others
# as [name of the type, content]. They are sent as Python literals, which the interpreter's own
# parser reads: to import json or ast takes longer than most programs run

PARSE_ONLY = 0x400  # ast.PyCF_ONLY_AST


class NotPlain(Exception):
    """A value of another type, or a message that makes no sense."""


def to_plain(value):
    """`(1, {2})` is `["tuple", [1, ["set", [2]]]]`. A subclass counts as its base."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, float):
        is_finite = value - value == 0
        return float(value) if is_finite else ["float", repr(float(value))]
    if isinstance(value, complex):
        return ["complex", [to_plain(value.real), to_plain(value.imag)]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    for kind in (list, tuple, set, frozenset, bytearray):
        if isinstance(value, kind):
            return [kind.__name__, [to_plain(item) for item in value]]
    if isinstance(value, dict):
        pairs = [[to_plain(key), to_plain(item)] for key, item in value.items()]
        return ["dict", pairs]
    if hasattr(type(value), "__next__"):
        return ["iterator", [to_plain(item) for item in value]]
    name = type(value).__name__
    if name in ("Decimal", "Fraction"):
        return [name, str(value)]
    raise NotPlain(f"a value of the type {name} cannot be graded")


def from_plain(data):
    """What `to_plain` was given; an iterator over the same items for an iterator."""
    if not isinstance(data, list):
        return data
    name, content = data
    if name == "Decimal":
        from decimal import Decimal
        return Decimal(content)
    if name == "Fraction":
        from fractions import Fraction
        return Fraction(content)
    if name == "float":
        return float(content)
    if name == "dict":
        return {from_plain(key): from_plain(value) for key, value in content}
    items = [from_plain(item) for item in content]
    if name in ("complex", "range"):
        return {"complex": complex, "range": range}[name](*items)
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    kinds |= {"bytearray": bytearray, "iterator": iter}
    return kinds[name](items)


def read_literal(text):
    """The lists, texts and numbers whose `repr` is this text. Nothing in it is run."""
    tree = compile(text, "<values>", "eval", PARSE_ONLY)
    return _literal(tree.body)


def _literal(node):
    kind = type(node).__name__
    if kind == "Constant":
        return node.value
    if kind == "List":
        return [_literal(item) for item in node.elts]
    if kind == "UnaryOp" and type(node.op).__name__ == "USub":
        return -_literal(node.operand)
    raise NotPlain(f"{kind} in a message")


class Channel:
    """Messages over two pipes: the one to read from, and the one to write to."""

    def __init__(self, read_fd, write_fd):
        self.read_fd = read_fd
        self.write_fd = write_fd
        if hasattr(sys, "set_int_max_str_digits"):
            sys.set_int_max_str_digits(0)  # an answer may be a long number

    def send(self, message):
        """Send lists of plain values: their length in bytes, then their text."""
        data = repr(message).encode()
        data = struct.pack("Q", len(data)) + data
        while data:
            data = data[os.write(self.write_fd, data):]

    def receive(self):
        """The next message, or None if the other process has closed its end."""
        head = self._read(8)
        if head is None:
            return None
        (num_bytes,) = struct.unpack("Q", head)
        if num_bytes > MAX_MESSAGE_BYTES:
            raise NotPlain(f"a message of {num_bytes} bytes, over {MAX_MESSAGE_BYTES}")
        data = self._read(num_bytes)
        return None if data is None else read_literal(data.decode())

    def _read(self, num_bytes):
        data = bytearray()
        while len(data) < num_bytes:
            chunk = os.read(self.read_fd, num_bytes - len(data))
            if not chunk:
                return None
            data += chunk
        return bytes(data)


# -----------------------------------------------------------------------------
# The three parts


def _new_module(name):
    module = type(sys)(name)
    sys.modules[name] = module
    sys.argv = ["program.py"]
    return module


def _execute(sources, module):
    """Run the sources one after the other as one module."""
    for source in sources:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)


def _answer(sources, entry_point, channel):
    """
    Load a program as a module of another name than "__main__", since its function is what is asked
    for. Then answer calls until there are no more.
    """
    module = _new_module("program")
    try:
        _execute(sources, module)
    except EOFError:  # it reads what a user types, and there is none; its function may be right
        pass
    function = getattr(module, entry_point)

    while True:
        call = channel.receive()
        if call is None:
            return
        args, kwargs = from_plain(call)
        try:
            answer = ["value", to_plain(function(*args, **kwargs))]
        except Exception as error:
            answer = ["error", [type(error).__name__, _text_of(error), _wall_hit(error)]]
        channel.send(answer)


def _grade(sources, entry_point, channel):
    """
    Run tests. The last of the sources finds under the name `entry_point` a function whose calls
    are answered by the program's process.
    """
    def candidate(*args, **kwargs):
        channel.send(to_plain((args, kwargs)))
        answer = channel.receive()
        if answer is None:
            raise NotPlain("the program ended before it answered")
        kind, content = answer
        if kind == "value":
            return from_plain(content)
        raise _remote_error(*content)

    *before, tests = sources
    module = _new_module("__main__")
    _execute(before, module)
    setattr(module, entry_point, candidate)
    _execute([tests], module)


def _remote_error(name, text, wall):
    """
    An error of the program's as the tests see it: a built-in exception if it was one, except those
    that would end a loop of the tests as if all were well.
    """
    import builtins
    kind = getattr(builtins, str(name), None)
    is_error = isinstance(kind, type) and issubclass(kind, Exception)
    if not is_error or issubclass(kind, (StopIteration, StopAsyncIteration, GeneratorExit)):
        kind = NotPlain
        text = text if name == "NotPlain" else f"{name}: {text}".removesuffix(": ")
    try:
        error = kind(str(text))
    except TypeError:  # UnicodeDecodeError takes more than a text
        error = NotPlain(f"{name}: {text}")
    error.wall = wall
    return error


# -----------------------------------------------------------------------------
# Start, and report how it ended


def _text_of(error):
    try:
        return str(error)
    except BaseException:  # raised by the program's own __str__
        return ""


def _wall_hit(error):
    """Which wall an exception, or one that led to it, speaks of; "" if none."""
    for _ in range(10):
        if error is None:
            break
        if isinstance(error, MemoryError):
            return "memory"
        if isinstance(error, PermissionError):
            return "files and system calls"
        if isinstance(error, OSError) and error.errno in (12, 24, 27):  # ENOMEM, EMFILE, EFBIG
            return {12: "memory", 24: "open files", 27: "size of a file"}[error.errno]
        if isinstance(error, RuntimeError) and _text_of(error).startswith("can't start new thread"):
            return "threads"
        wall = getattr(error, "wall", "")  # see _remote_error
        if isinstance(wall, str) and wall:
            return wall
        error = error.__cause__ or error.__context__
    return ""


def _play(orders):
    """
    Play one part. Returns the report: "ended" if it came to its end, else "raised", the wall that
    it hit, and what it raised, a line each. Leaving early is an error too, even by `sys.exit(0)`.
    """
    sources = orders["sources"]
    try:
        if orders["part"] == "run":
            _execute(sources, _new_module("__main__"))
        else:
            part = {"answer": _answer, "grade": _grade}[orders["part"]]
            part(sources, orders["entry_point"], Channel(*orders["channel"]))
    except BaseException as error:
        name = type(error).__name__
        text = f"{name}: {_text_of(error)}".removesuffix(": ")
        return f"raised\n{_wall_hit(error)}\n{text or 'an exception without a name'}"
    return "ended"


def _read_orders(num_bytes):
    """
    Read the orders, which come first on stdin. The rest belongs to the program, so not a byte more
    is read.
    """
    data = b""
    while len(data) < num_bytes:
        chunk = os.read(0, num_bytes - len(data))
        if not chunk:
            sys.exit("the orders are cut short")
        data += chunk
    return marshal.loads(data)


def main():
    """
    Print the names of the walls as the first line of stdout, before the program runs. At the end,
    write a secret word and the report as the last thing on stderr.
    """
    # The walls are in the file beside this one, whose folder the program is not to read
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from confinement import WALLS, raise_walls
    sys.path.pop()

    orders = _read_orders(int(sys.argv[1]))
    # the program may replace these
    write = os.write
    leave = os._exit
    os.environ.clear()
    walls = raise_walls(orders["timeout"], orders["max_memory_bytes"], orders["parent_pid"])
    write(1, f"{','.join(walls)}\n".encode())
    if len(walls) == len(WALLS) or orders["allow_unsafe"]:
        report = _play(orders)
        write(2, orders["word"] + report.encode("utf-8", "replace")[:MAX_ERROR_BYTES])
    leave(0)


if __name__ == "__main__":
    main()  # never returns
