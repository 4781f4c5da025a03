"""Tools with short flags answer a wrong flag with two lines, `error:` and `hint:`, and exit code 2."""

import pytest

from nanochat import dataset, report
from scripts import chat_cli, chat_eval, chat_web


@pytest.mark.parametrize("tool, flags, error, hint", [
    (chat_web.parse_args, ["--max_tokns=5"], "unrecognized arguments: --max_tokns=5", "did you mean --max_tokens?"),
    (chat_web.parse_args, ["-p", "http"], "-p/--port: invalid int value: 'http'", "--help lists"),
    (chat_web.parse_args, ["-z"], "unrecognized arguments: -z", "--help lists"),
    (chat_cli.parse_args, ["--temprature", "1"], "--temprature", "did you mean --temperature?"),
    (chat_cli.parse_args, ["-i", "bse"], "-i/--source: invalid choice: 'bse'", "--help lists"),
    (chat_cli.parse_args, ["Why?"], "unrecognized arguments: Why?", "--help lists"),
    (chat_cli.parse_args, ["--verify=maybe"], "--verify: 'maybe' is neither true nor false", "--help lists"),
    (chat_eval.parse_args, [], "the following arguments are required: -i/--source", "--help lists"),
    (chat_eval.parse_args, ["-i", "sft", "--qqqqqq"], "--qqqqqq", "--help lists"),
    (dataset.main, ["-n", "few"], "-n: invalid int value: 'few'", "--help lists"),
    (report.main, ["generate", "--gpu_rate=3"], "--gpu_rate=3", "did you mean --gpu_hourly_rate?"),
])
def test_a_wrong_flag_is_two_lines_and_exit_code_2(monkeypatch, capsys, tool, flags, error, hint):
    monkeypatch.setattr("sys.argv", ["tool", *flags])
    with pytest.raises(SystemExit) as end:
        tool()
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 2
    assert lines[0].startswith("error: ") and error in lines[0]
    assert lines[1].startswith("hint: ") and hint in lines[1]


@pytest.mark.parametrize("tool", [chat_cli, chat_eval, chat_web])
def test_the_impatient_load_without_checksums(tool):
    assert tool.parse_args(["-i", "base"]).verify is True
    assert tool.parse_args(["-i", "base", "--verify=false"]).verify is False


def test_help_keeps_the_lines_of_the_docstring(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        chat_web.parse_args(["--help"])
    assert end.value.code == 0 and chat_web.__doc__.strip() in capsys.readouterr().out
