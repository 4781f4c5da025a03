"""The terminal chat: one answer on stdout, a conversation with commands, a text that a base model continues."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError
from nanochat.engine import Engine
from scripts import chat_cli
from tests.servers import QUESTION, TOOL_ANSWER, Scripted, tool_script
from tests.tiny import tiny_model

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch, tokenizer):
    """chat_cli.main() with flags, on a tiny model saved as a base and as an SFT checkpoint; `typed`: lines of input."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=64)
    for stage in ("base", "sft"):
        CheckpointManager(get_checkpoint_dir(stage, "d2")).save(1, model, tokenizer=tokenizer)

    def run(*flags, typed=()):
        lines = iter(typed)

        def read(prompt=""):
            try:
                return next(lines)
            except StopIteration:
                raise EOFError from None
        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys, "argv", ["chat_cli", "--device_type", "cpu", "-n", "8", *flags])
        chat_cli.main()
    return run


def test_one_answer_is_all_of_stdout_and_repeats_with_its_seed(run, capsys):
    run("-p", "Hello", "--seed", "3")
    first = capsys.readouterr()
    run("-p", "Hello", "--seed", "3")
    assert capsys.readouterr().out == first.out and first.err == ""
    assert "Assistant" not in first.out and "<|" not in first.out


def test_several_prompts_are_answered_each_on_its_own_below_its_prompt(run, capsys):
    answers = {}
    for prompt in ("Hello", "Bye"):
        run("-p", prompt)
        answers[prompt] = capsys.readouterr().out
    run("-p", "Hello", "-p", "Bye")
    assert capsys.readouterr().out == f"> Hello\n{answers['Hello']}> Bye\n{answers['Bye']}"


def test_a_base_model_continues_the_text(run, capsys):
    run("-i", "base", "-p", "Once upon a time", "-t", "0")
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_a_conversation_with_commands_multi_line_input_and_a_full_context(run, capsys):
    run(typed=["/system Be kind.", '"""first line', 'second line"""', "and then?", "more", "more", "/clear",
               "/nonsense", "", "word " * 200, "/quit", "never read"])
    out = capsys.readouterr().out
    assert out.count("Assistant: ") == 4 and "are forgotten" in out and out.count("(new conversation)") == 2
    assert "fit: shorten it" in out


@pytest.mark.parametrize("typed, asked", [
    (["quit smoking: how?", "exit strategy?", "/quit now"], ["quit smoking: how?", "exit strategy?"]),
    (['"""/etc/hosts', 'is a file."""', '"""quit"""'], ["/etc/hosts\nis a file.", "quit"]),
    (['"""', "  one", '""" ', '"""Hi""" he said', '"""open', "to the end"],
     ["one", '"""Hi""" he said', "open\nto the end"]),
    (["half a", KeyboardInterrupt, '"""half', KeyboardInterrupt, "whole", "quit", "never read"], ["half a", "whole"]),
])
def test_which_lines_are_messages_and_which_end_the_program(tokenizer, monkeypatch, capsys, typed, asked):
    lines = iter(typed)
    asked_for = []

    def read(prompt):
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "argv", ["chat_cli"])
    monkeypatch.setattr(chat_cli, "answer", lambda *_, **__: ("Yes.", False))
    fit_conversation = chat_cli.fit_conversation

    def record(tokenizer, messages, max_prompt):
        asked_for.append(messages[-1]["content"])
        return fit_conversation(tokenizer, messages, max_prompt)

    monkeypatch.setattr(chat_cli, "fit_conversation", record)
    chat_cli.chat(Engine(tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=512), tokenizer),
                  chat_cli.parse_args())
    assert asked_for == asked


@pytest.mark.parametrize("show", [False, True])
def test_a_terminal_gets_no_control_characters_and_ctrl_c_is_an_exit_status(run, monkeypatch, capsys, tokenizer, show):
    def generate(*_, **__):
        for token in tokenizer.encode("a\x1b[2Jb\n"):
            yield (token,), None
        raise KeyboardInterrupt
    monkeypatch.setattr(Engine, "generate", generate)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: show)
    with pytest.raises(SystemExit) as ended:
        run("-p", "Hello")
    assert ended.value.code == 130
    assert capsys.readouterr().out == ("a\ufffd[2Jb\n\n" if show else "a\x1b[2Jb\n\n")


def test_a_system_message_for_a_base_model_is_refused(run):
    with pytest.raises(UserError, match="--system: a base model"):
        run("-i", "base", "-p", "Hello", "--system", "Be kind.")


def test_a_prompt_beyond_the_context_is_refused(run):
    with pytest.raises(UserError, match="-p does not fit"):
        run("-p", "word " * 200)


def test_a_bad_setting_is_refused(run):
    with pytest.raises(UserError, match="temperature=-1"):
        run("-p", "Hello", "-t", "-1")


@pytest.mark.parametrize("max_tokens", ["0", "-3"])
def test_an_answer_of_no_tokens_is_refused(run, max_tokens):
    with pytest.raises(UserError, match=f"max_tokens={max_tokens}: need 1 or more"):
        run("-p", "Hello", "-n", max_tokens)


@pytest.mark.parametrize("show_tools", [False, True])
def test_the_model_reads_its_own_tool_call_as_it_wrote_it(tokenizer, monkeypatch, capsys, show_tools):
    lines = iter([QUESTION["content"], "Sure?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr(sys, "argv", ["chat_cli"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: show_tools)
    model = Scripted(tool_script(tokenizer), tokenizer)
    chat_cli.chat(Engine(model, tokenizer), chat_cli.parse_args())
    shown = "Let me add them: \033[2m[2+3] \033[0m\033[2m= 5 \033[0mIt is **five**.\033[0m\n"
    assert capsys.readouterr().out.endswith(shown if show_tools else "Let me add them: It is **five**.\n")
    second = tokenizer.render_for_completion({"messages": [
        QUESTION, {"role": "assistant", "content": TOOL_ANSWER}, {"role": "user", "content": "Sure?"}]})
    assert model.read[-len(tool_script(tokenizer)) - len(second) + 1:][:len(second)] == second


def test_a_terminal_has_arrow_keys_a_history_and_multi_line_input(run, tmp_path):
    pytest.importorskip("readline", reason="this Python has no readline")
    master, terminal = pytest.importorskip("pty", reason="needs a pseudo-terminal").openpty()
    command = [sys.executable, "-m", "scripts.chat_cli", "--device_type", "cpu", "-n", "4"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, cwd=ROOT,
                               env={**os.environ, "TERM": "xterm"})
    seen = ""

    def expect(text):
        nonlocal seen
        while text not in seen:
            assert select.select([master], [], [], 60)[0], seen
            seen += os.read(master, 4096).decode(errors="replace")
        seen = seen.partition(text)[2]

    up, left, done = "\033[A", "\033[D", "(new conversation)"
    try:
        for prompt, typed, answer in [("User: ", "/clear", done), ("User: ", up, done), ("User: ", '"""one', "\n"),
                                      ("... ", 'two"""', "Assistant: "), ("User: ", f"/qut{left}i", "\n")]:
            expect(prompt)
            os.write(master, f"{typed}\r".encode())
            expect(answer)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(master)
        os.close(terminal)
