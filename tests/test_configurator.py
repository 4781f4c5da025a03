"""Settings from the command line."""

import pytest

from nanochat.configurator import get_settings, override_from_cli

SOURCE = '''"""A script."""
depth: int = 20            # number of layers
lr: float = 0.5
run: str = "dummy"         # name of the run
steps: int | None = None
flag: bool = False
maybe: bool | None = None
Constant: int = 3
_hidden: int = 4
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
])
def test_flags_are_cast_by_declared_type(script, argv, expected):
    settings = override_from_cli(script, argv)
    assert {name: settings[name] for name in expected} == expected
    assert {name: script[name] for name in expected} == expected
    assert all(type(settings[name]) is type(value) for name, value in expected.items())


def test_settings_are_the_annotated_lower_case_globals(script):
    assert list(get_settings(script)) == ["depth", "lr", "run", "steps", "flag", "maybe"]


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
