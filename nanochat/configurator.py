"""
Command-line flags for a script's own globals.

A script declares its settings as annotated lower-case module globals, one per line. The annotation
says which values a setting may have, and the trailing comment is its help text:

    depth: Positive = 20             # number of layers; everything else follows from it
    eval_every: CountOrOff = 250     # steps between validation losses; -1 = at the end only
    source: Literal["mid", "base"] = "mid"    # stage to start from

and ends with

    if __name__ == "__main__":
        override_from_cli(globals(), prefix="--")
        run_script(main)

Then `--depth=4`, `--depth 4`, `--max-seq-len=512` and `--help` work. The answer to a typo is the
nearest name, and a value of a wrong type or out of range is refused in one line. There is no config
object: inside `main` the settings are plain globals. A test sets them on the imported module before
it calls `main()`, which checks them again by `get_settings(globals())`. Tools with short flags
(`-i`, `-p`) use `ArgumentParser`.
"""

import argparse
import difflib
import math
import re
import sys
import types
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

from nanochat.files import UserError, exit_with, run_script

# spellings on the command line
TRUE = {"true", "1", "yes", "on"}
FALSE = {"false", "0", "no", "off"}
NONE = {"none", "null"}

# -----------------------------------------------------------------------------
# Declarations


@dataclass(frozen=True)
class Range:
    """The numbers from low to high. or_off: also -1, which means off, all or derived."""
    low: float
    high: float = math.inf
    or_off: bool = False

    def __contains__(self, value):
        return self.low <= value <= self.high or (self.or_off and value == -1)

    def __str__(self):
        text = f"{self.low} to {self.high}"
        if self.high == math.inf:
            text = f"{self.low} or more"
        if self.or_off:
            text += ", or -1"
        return text


class Choices(tuple):
    """The values of a Literal, all of them str."""

    def __str__(self):
        return " or ".join(self)


# For declarations. In an ...OrOff setting -1 means off, all or derived, as its comment says
Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
CountOrOff = Annotated[int, Range(1, or_off=True)]
NonNegative = Annotated[float, Range(0)]
NonNegativeOrOff = Annotated[float, Range(0, or_off=True)]
Fraction = Annotated[float, Range(0, 1)]


class Kind(NamedTuple):
    """A declaration: Annotated[int, Range(1)] | None is Kind(int, True, Range(1))."""
    type: type
    optional: bool
    allowed: Range | Choices | None

    def __str__(self):
        text = self.type.__name__
        if self.optional:
            text += " | None"
        if self.allowed:
            text += f", {self.allowed}"
        return text


def read_annotation(annotation):
    """The Kind that an annotation declares."""
    # int | None: the type is the first part
    optional = get_origin(annotation) in (Union, types.UnionType)
    if optional:
        annotation = get_args(annotation)[0]

    # Literal["a", "b"], Annotated[int, Range(1)], or a plain type
    if get_origin(annotation) is Literal:
        return Kind(str, optional, Choices(get_args(annotation)))
    if get_origin(annotation) is Annotated:
        value_type, allowed = get_args(annotation)
        return Kind(value_type, optional, allowed)
    return Kind(annotation, optional, None)


def read_kinds(namespace):
    """
    {name: Kind} of a script's settings: annotated globals in lower case, without a leading
    underscore.
    """
    # Up to Python 3.13 the globals of a running script hold its annotations. From 3.14 on they hold
    # a function that evaluates them (PEP 649); 1 is annotationlib.Format.VALUE
    annotations = namespace.get("__annotations__", {})
    if "__annotate__" in namespace:
        annotations = namespace["__annotate__"](1)

    # Capitals are constants; an underscore is for the script alone
    kinds = {}  # in the order of the file
    for name, annotation in annotations.items():
        if name == name.lower() and not name.startswith("_"):
            kinds[name] = read_annotation(annotation)
    return kinds


def get_settings(namespace):
    """
    The settings of a script as a dict. UserError for a value that its declaration does not allow.
    """
    # tests and notebooks set globals, which the command line has not seen
    settings = {}
    for name, kind in read_kinds(namespace).items():
        settings[name] = namespace[name]
        check(name, settings[name], kind, f"leave --{name} out for its default")
    return settings


def check(name, value, kind, hint):
    """Raise UserError if a setting has a value that its declaration does not allow."""
    # None passes: only an optional setting can have it
    if kind.allowed and value is not None and value not in kind.allowed:
        raise UserError(f"--{name}={value}: need {kind.allowed}", hint)


# -----------------------------------------------------------------------------
# The command line


def override_from_cli(namespace, argv=None, prefix="--"):
    """
    Overwrite the settings in `namespace` (a script's `globals()`) from `argv` (default: the
    arguments of this process). Returns all settings as a dict. `--help` prints every setting and
    exits 0. A mistake prints `error:` and `hint:` on stderr and exits 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    # torchrun passes on the `--` that separates its own flags from ours
    if argv[:1] == [prefix]:
        argv.pop(0)

    # Flag by flag; if a name comes twice the last one counts
    kinds = read_kinds(namespace)
    try:
        while argv:
            arg = argv.pop(0)
            if arg in ("-h", prefix + "help"):
                text = help_text(namespace, kinds, prefix)
                run_script(partial(print, text, flush=True))  # the reader may be `| head`
                sys.exit(0)
            if not arg.startswith(prefix):
                raise UserError(
                    f"unexpected argument {arg!r}",
                    f"settings are given as {prefix}name=value; {prefix}help lists them")

            # --max-seq-len=512 -> max_seq_len, 512
            name, has_value, text = arg.removeprefix(prefix).partition("=")
            name = name.replace("-", "_")
            if name not in kinds:
                raise UserError(f"unknown setting {prefix}{name}", suggest(name, kinds, prefix))

            # Without "=" the value is the next word; a bool that stands alone is true
            kind = kinds[name]
            example = f"for example {prefix}{name}={namespace[name]}"
            if not has_value and argv and not argv[0].startswith(prefix):
                text = argv.pop(0)
            elif not has_value and kind.type is bool:
                text = "true"
            elif not has_value:
                raise UserError(f"{prefix}{name} needs a value ({kind})", example)
            namespace[name] = cast(name, text, kind, example)
    except UserError as error:
        exit_with(error)
    return get_settings(namespace)


def suggest(name, known, prefix=""):
    """A hint with the name that is most like `name`."""
    # cutoff: half of the letters agree
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {prefix}{nearest[0]}?" if nearest else "--help lists them"


def cast(name, text, kind, hint):
    """The text of a flag as a value of its kind, or UserError."""
    # "none" is the value None
    if kind.optional and text.lower() in NONE:
        return None
    try:
        value = CASTS[kind.type](text)
    except (ValueError, OverflowError):
        raise UserError(f"--{name}={text} is not of type {kind}", hint) from None
    check(name, value, kind, hint)
    return value


def cast_bool(text):
    # bool("false") would be True
    text = text.lower()
    if text not in TRUE | FALSE:
        raise ValueError(text)
    return text in TRUE


def cast_int(text):
    """1000, 1_000 and 1e3."""
    # not through float, which would round large numbers
    if "e" not in text.lower():
        return int(text)
    number = float(text)
    if number != int(number):
        raise ValueError(text)
    return int(number)


def cast_float(text):
    number = float(text)
    if not math.isfinite(number):  # no setting means anything at nan or inf
        raise ValueError(text)
    return number


CASTS = {bool: cast_bool, int: cast_int, float: cast_float, str: str}


def help_text(namespace, kinds, prefix):
    """
    The script's docstring, then every setting with its kind, default and comment, in file order.
    """
    # a setting's comment stands on its line
    with open(namespace["__file__"], encoding="utf-8") as f:
        comments = dict(re.findall(r"^(\w+):.*?\s# *(.*)", f.read(), re.MULTILINE))
    text = (namespace.get("__doc__") or "").strip() + "\n\nsettings:"
    for name, kind in kinds.items():
        text += f"\n  {prefix}{name}={namespace[name]}  ({kind})  {comments.get(name, '')}"
    return text


def switch(text):
    """`cast_bool` as the type of an argparse option: --verify=false."""
    try:
        return cast_bool(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false") from None


class ArgumentParser(argparse.ArgumentParser):
    """
    argparse's, for tools with short flags. A mistake ends in `error:` and `hint:` lines here, too.
    """

    def __init__(self, **settings):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def print_help(self, file=None):
        run_script(partial(print, self.format_help(), file=file, flush=True))

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)

        # argparse itself does not look for the nearest option
        name = unknown[1] if unknown else ""
        hint = suggest(name, self._option_string_actions)
        exit_with(UserError(message.removeprefix("argument "), hint))
