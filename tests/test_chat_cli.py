"""The terminal chat: one answer on stdout and nothing else, a conversation with commands, text of a base model."""

import sys

import pytest

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError
from scripts import chat_cli
from tests.tiny import tiny_model


@pytest.fixture
def run(tmp_path, monkeypatch, tokenizer):
    """chat_cli.main() with flags, on a tiny model that is there as a base and as an SFT checkpoint."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_PRECISION", "float32")
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


def test_one_answer_goes_to_stdout_alone_and_repeats_by_seed(run, capsys):
    run("-p", "Hello", "--seed", "3")
    first = capsys.readouterr()
    run("-p", "Hello", "--seed", "3")
    assert capsys.readouterr().out == first.out and first.err == ""
    assert "Assistant" not in first.out and "<|" not in first.out


def test_a_base_model_continues_the_text(run, capsys):
    run("-i", "base", "-p", "Once upon a time", "-t", "0")
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_a_conversation_with_commands_multi_line_input_and_a_full_context(run, capsys):
    run(typed=["/system Be kind.", '"""first line', 'second line"""', "and then?", "more", "more", "/clear",
               "/nonsense", "", "word " * 200, "/quit", "never read"])
    out = capsys.readouterr().out
    assert out.count("Assistant: ") == 4 and "are forgotten" in out and out.count("(new conversation)") == 2
    assert "fit: shorten it" in out


def test_a_prompt_beyond_the_context_is_refused(run):
    with pytest.raises(UserError, match="-p does not fit"):
        run("-p", "word " * 200)


def test_a_bad_setting_is_refused(run):
    with pytest.raises(UserError, match="temperature=-1"):
        run("-p", "Hello", "-t", "-1")
