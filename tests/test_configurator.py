"""Settings from the command line."""

import pytest

from nanochat.common import UserError
from nanochat.configurator import get_settings, override_from_cli

SOURCE = '''"""A script."""
from typing import Literal
from nanochat.configurator import CountOrOff, Fraction, NonNegative, Positive
depth: int = 20            # number of layers
lr: float = 0.5
run: str = "dummy"         # name of the run
steps: int | None = None
flag: bool = False
maybe: bool | None = None
Constant: int = 3
_hidden: int = 4
layers: Positive = 12      # of the model
every: CountOrOff = 250
share: Fraction = 0.5
rate: NonNegative | None = None
source: Literal["mid", "base"] = "mid"
'''


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SOURCE, encoding="utf-8")
    namespace = {"__file__": str(path)}
    exec(compile(SOURCE, str(path), "exec"), namespace)
    return namespace


@pytest.mark.parametrize("argv, expected", [
    (["--depth=4"], {"depth": 4}),
    (["--depth", "4"], {"depth": 4}),
    (["--", "--depth=4"], {"depth": 4}),
    (["--lr=1"], {"lr": 1.0}),
    (["--lr=-1e-3"], {"lr": -1e-3}),
    (["--depth=1e3"], {"depth": 1000}),
    (["--depth=1_000"], {"depth": 1000}),
    (["--depth=-1"], {"depth": -1}),
    (["--run=123"], {"run": "123"}),
    (["--run", "dummy2"], {"run": "dummy2"}),
    (["--run=a=b"], {"run": "a=b"}),
    (["--steps=5"], {"steps": 5}),
    (["--steps=none"], {"steps": None}),
    (["--flag"], {"flag": True}),
    (["--flag", "--depth=2"], {"flag": True, "depth": 2}),
    (["--flag=0"], {"flag": False}),
    (["--maybe", "--depth=2"], {"maybe": True, "depth": 2}),
    (["--maybe=none"], {"maybe": None}),
    (["--layers=1", "--every=-1", "--share=1", "--rate=0"], {"layers": 1, "every": -1, "share": 1.0, "rate": 0.0}),
    (["--rate=none", "--source=base"], {"rate": None, "source": "base"}),
])
def test_flags_are_cast_by_declared_type(script, argv, expected):
    settings = override_from_cli(script, argv)
    assert {name: settings[name] for name in expected} == expected
    assert {name: script[name] for name in expected} == expected
    assert all(type(settings[name]) is type(value) for name, value in expected.items())


def test_settings_are_the_annotated_lower_case_globals(script):
    assert list(get_settings(script)) == ["depth", "lr", "run", "steps", "flag", "maybe", "layers", "every", "share",
                                          "rate", "source"]


def test_annotations_that_are_evaluated_late_are_the_same(script):
    """Python 3.14 leaves a function behind in a module's globals, and no `__annotations__` (PEP 649)."""
    annotations = script.pop("__annotations__", None) or script["__annotate__"](1)
    late = script | {"__annotate__": lambda format: annotations, "__conditional_annotations__": {0, 1}}
    assert list(get_settings(late)) == list(annotations)[:6] + list(annotations)[8:]
    assert override_from_cli(late, ["--depth=4", "--layers=3"])["layers"] == late["layers"] == 3


@pytest.mark.parametrize("name, value, need", [
    ("layers", 0, "1 or more"), ("every", 0, "1 or more, or -1"), ("share", 1.5, "0 to 1"), ("rate", -0.1, "0 or more"),
    ("source", "sft", "mid or base")])
def test_a_setting_that_a_test_or_a_notebook_set_is_checked_by_its_declaration(script, name, value, need):
    script[name] = value
    with pytest.raises(UserError, match=f"--{name}={value}: need {need}\n.*leave --{name} out"):
        get_settings(script)


@pytest.mark.parametrize("argv, error, hint", [
    (["--dept=4"], "unknown setting --dept", "did you mean --depth?"),
    (["--zzzz=4"], "unknown setting --zzzz", "--help lists"),
    (["--depth=four"], "--depth=four is not of type int", "--depth=20"),
    (["--depth=2.5"], "--depth=2.5 is not of type int", "--depth=20"),
    (["--depth=1e400"], "--depth=1e400 is not of type int", "--depth=20"),
    (["--lr=nan"], "--lr=nan is not of type float", "--lr=0.5"), (["--lr=inf"], "--lr=inf is not", "--lr=0.5"),
    (["--flag=maybe"], "--flag=maybe is not of type bool", "--flag"),
    (["--depth"], "--depth needs a value", "--depth=20"),
    (["depth=4"], "unexpected argument 'depth=4'", "--name=value"),
    (["--layers=0"], "--layers=0: need 1 or more", "--layers=12"),
    (["--layers=2.5"], "--layers=2.5 is not of type int, 1 or more", "--layers=12"),
    (["--every=0"], "--every=0: need 1 or more, or -1", "--every=250"),
    (["--share=1.5"], "--share=1.5: need 0 to 1", "--share=0.5"),
    (["--rate=-1"], "--rate=-1.0: need 0 or more", "--rate=None"),
    (["--source=sft"], "--source=sft: need mid or base", "--source=mid"),
])
def test_a_mistake_is_two_lines_and_exit_code_2(script, capsys, argv, error, hint):
    with pytest.raises(SystemExit) as exit_info:
        override_from_cli(script, argv)
    err = capsys.readouterr().err
    assert exit_info.value.code == 2 and err.count("\n") == 2
    assert error in err and hint in err and "Traceback" not in err


def test_help_shows_every_setting_with_default_and_comment(script, capsys):
    with pytest.raises(SystemExit) as exit_info:
        override_from_cli(script, ["--help"])
    out = capsys.readouterr().out
    assert exit_info.value.code == 0
    assert "--depth=20  (int)  number of layers" in out and "--steps=None  (int | None)" in out and "A script." in out
    assert "--layers=12  (int, 1 or more)  of the model" in out and "--every=250  (int, 1 or more, or -1)" in out
    assert "--rate=None  (float | None, 0 or more)" in out and "--source=mid  (str, mid or base)" in out
