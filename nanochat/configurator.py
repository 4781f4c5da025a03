"""
Command-line flags over a script's own globals.

A script declares its settings as annotated lower-case module globals, one per line, with the default and, in
a trailing comment, the help text:

    depth: int = 20                  # number of layers; everything else follows from it
    num_iterations: int | None = None  # optimizer steps; None = derived from the horizon

and ends with

    if __name__ == "__main__":
        override_from_cli(globals(), prefix="--")
        run_script(main)

`--depth=4`, `--depth 4`, `--max-seq-len=512` and `--help` then work, a typo is answered with the nearest name,
and a value of the wrong type is refused in one line. There is no config object: inside `main` the settings are
plain globals, and a test sets them on the imported module before it calls `main()`. Tools with short flags (`-i`, `-p`)
use `ArgumentParser`.
"""

import argparse
import difflib
import io
import math
import re
import sys
import tokenize

_TRUE, _FALSE, _NONE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}, {"none", "null"}


def get_settings(namespace):
    """The settings of a script as a dict: its annotated globals without a capital or a leading underscore."""
    names = namespace.get("__annotations__", {})
    return {name: namespace[name] for name in names if name == name.lower() and not name.startswith("_")}


def override_from_cli(namespace, argv=None, prefix="--"):
    """
    Overwrite the settings in `namespace` (a script's `globals()`) from `argv` (default: the process's arguments).
    Returns all settings as a dict. `--help` prints every setting and exits 0; a mistake prints `error:` and
    `hint:` on stderr and exits 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    types = {name: _type_name(namespace["__annotations__"][name]) for name in get_settings(namespace)}
    if argv and argv[0] == prefix:  # torchrun hands over the `--` that separates its own flags from ours
        argv.pop(0)
    while argv:
        arg = argv.pop(0)
        if arg in ("-h", prefix + "help"):
            print(_help_text(namespace, types, prefix))
            sys.exit(0)
        if not arg.startswith(prefix):
            _fail(f"unexpected argument {arg!r}", f"settings are given as {prefix}name=value; {prefix}help lists them")
        name, has_value, value = arg[len(prefix):].partition("=")
        name = name.replace("-", "_")
        if name not in types:
            nearest = difflib.get_close_matches(name, types, n=1, cutoff=0.5)
            _fail(f"unknown setting {prefix}{name}",
                  f"did you mean {prefix}{nearest[0]}?" if nearest else f"{prefix}help lists the settings")
        if not has_value:
            alone = not argv or argv[0].startswith(prefix)
            if alone and not types[name].startswith("bool"):
                _fail(f"{prefix}{name} needs a value ({types[name]})", f"for example {prefix}{name}={namespace[name]}")
            value = "true" if alone else argv.pop(0)
        try:
            namespace[name] = _cast(value, types[name])
        except (ValueError, OverflowError):
            _fail(f"{prefix}{name}={value} is not of type {types[name]}",
                  f"for example {prefix}{name}={namespace[name]}")
    return get_settings(namespace)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, for tools with short flags. A mistake here ends in `error:` and `hint:` lines, too."""

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = unknown and difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
        _fail(message.removeprefix("argument "), f"did you mean {near[0]}?" if near else "--help lists the options")


def _type_name(annotation):
    """`int`, `int | None` or a string of the same (postponed annotations) -> 'int', 'int | None'."""
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _cast(value, type_name):
    """Turn the text of a flag into the declared type. `int` takes 1_000 and 1e6; `float` takes 1."""
    options = [option.strip() for option in type_name.split("|")]
    if "None" in options and value.lower() in _NONE:
        return None
    option = options[0]
    if option == "bool":
        if value.lower() not in _TRUE | _FALSE:
            raise ValueError(value)
        return value.lower() in _TRUE
    if option == "int":
        if re.fullmatch(r"[+-]?\d[\d_]*", value):
            return int(value)
        number = float(value)
        if number != int(number):
            raise ValueError(value)
        return int(number)
    if option == "float":
        if not math.isfinite(float(value)):  # no setting means anything at nan or inf
            raise ValueError(value)
        return float(value)
    return value


def _help_text(namespace, types, prefix):
    """The script's docstring, then every setting with its type, default and comment, in the order of the file."""
    with open(namespace["__file__"], encoding="utf-8") as f:
        source = f.read()
    comments = {}
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        match = token.type == tokenize.COMMENT and re.match(r"(\w+)\s*:", lines[token.start[0] - 1])
        if match:
            comments.setdefault(match.group(1), token.string.lstrip("# "))
    rows = [f"  {prefix}{name}={namespace[name]}  ({kind})  {comments.get(name, '')}" for name, kind in types.items()]
    return "\n".join([(namespace.get("__doc__") or "").strip(), "", "settings:", *rows])


def _fail(error, hint):
    print(f"error: {error}\nhint: {hint}", file=sys.stderr)
    sys.exit(2)
