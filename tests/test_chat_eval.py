"""scripts/chat_eval from a checkpoint and a small mirror to the table, JSONL and the report; the task Identity."""

import doctest
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import tiny_model

import tasks.identity
from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError, get_base_dir
from nanochat.engine import Engine
from nanochat.execution import WALLS, sandbox_walls
from scripts import chat_eval
from tasks.evaluate import CHATCORE_TASKS, available_tasks, parse_names
from tasks.identity import Identity, identity_path
from tasks.strangers import KINDS

needs_sandbox = pytest.mark.skipif(len(sandbox_walls()) < 3, reason="this system lacks parts of the sandbox")


def write_mirror(root):
    """A mirror with three questions of each data set."""
    choices = [f"choice {letter}" for letter in "ABCD"]
    arc = [{"question": f"Which is {i}?", "choices": {"text": choices, "label": list("ABCD")}, "answerKey": "ABCD"[i]}
           for i in range(3)]
    mmlu = [{"question": f"Why {i}?", "subject": "tests", "choices": choices, "answer": i} for i in range(3)]
    program = {"prompt": "def one():\n", "canonical_solution": "    return 1\n", "entry_point": "one",
               "test": "def check(candidate):\n    assert candidate() == 1\n"}
    files = {"arc_easy": arc, "arc_challenge": arc, "mmlu": mmlu, "humaneval": [program] * 3,
             "gsm8k": [{"question": f"{i}+{i}?", "answer": f"<<{i}+{i}={2 * i}>>\n#### {2 * i}"} for i in range(3)]}
    (root / "tasks").mkdir(parents=True)
    for name, rows in files.items():
        pq.write_table(pa.Table.from_pylist(rows), root / "tasks" / f"{name}_test.parquet")
    words = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "klmnprst"]
    (root / "words_alpha.txt").write_text("\n".join(words), "utf-8")


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    write_mirror(tmp_path / "mirror")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "mirror"))
    return tmp_path / "mirror"


@pytest.fixture
def chat_model(mirror, tokenizer, tmp_path, monkeypatch):
    """An SFT checkpoint d2, step 7, in an empty base directory."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=96)
    CheckpointManager(get_checkpoint_dir("sft", "d2")).save(7, model, tokenizer=tokenizer)


@pytest.fixture
def run(monkeypatch):
    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["chat_eval", "--device_type", "cpu", "-i", "sft", "-m", "6", *argv])
        chat_eval.main()
    return run


def read_records(name, folder="sft/d2_step_7"):
    return [json.loads(line) for line in (get_base_dir() / "chat_eval" / folder / f"{name}.jsonl").open("rb")]


def read_report():
    return json.loads((get_base_dir() / "report" / "10-chat-evaluation-sft.json").read_text("utf-8"))


# -----------------------------------------------------------------------------
# The script


@needs_sandbox
def test_all_tasks_give_a_table_every_answer_chatcore_and_a_section_of_the_report(chat_model, run, capsys):
    run("-x", "2", "-b", "3")
    out, report = capsys.readouterr().out, read_report()
    assert [line.split("|")[0].strip() for line in out.splitlines() if "accuracy:" in line] == list(CHATCORE_TASKS)
    assert list(report["metrics"]) == [*CHATCORE_TASKS, "ChatCORE"] and "ChatCORE: " in out
    for name in CHATCORE_TASKS:
        records, metric = read_records(f"{name}_2"), report["metrics"][name]  # _2: of a partial run
        assert metric["n"] == len(records) == 2
        assert metric["value"] == sum(record["correct"] for record in records) / 2
        assert all(record["prompt"].startswith("<|bos|>") and record["answer"] for record in records)
    assert report["metrics"]["ChatCORE"]["n"] == 12 and report["config"]["max_problems"] == 2


def test_only_the_chosen_tasks_run_and_then_there_is_no_chatcore(chat_model, run):
    run("-a", "ARC-Easy|GSM8K")
    assert list(read_report()["metrics"]) == ["ARC-Easy", "GSM8K"]
    assert len(read_records("ARC-Easy")) == 3 and not (get_base_dir() / "chat_eval/sft/d2_step_7/MMLU.jsonl").exists()


def test_strangers_gives_a_line_and_a_row_of_the_report_for_each_kind(chat_model, run, capsys):
    run("-a", "Strangers", "-m", "3")
    rows = read_report()["tables"]["By kind"]
    assert [(row["task"], row["kind"]) for row in rows] == [("Strangers", kind) for kind in KINDS]
    assert sum(row["n"] for row in rows) == read_report()["metrics"]["Strangers"]["n"] == len(read_records("Strangers"))
    out = capsys.readouterr().out
    assert all(f"  {kind:<11} | accuracy: 0." in out for kind in KINDS)


def test_every_sample_is_recorded_and_they_give_pass_at_k(chat_model, run, capsys):
    run("-a", "GSM8K", "-n", "3", "-t", "1.0")
    assert [(r["index"], r["sample"]) for r in read_records("GSM8K")] == [(i, s) for i in range(3) for s in range(3)]
    assert "pass@2: 0.0000 | pass@3: 0.0000" in capsys.readouterr().out
    assert read_report()["tables"]["By task"][0]["pass@3"] == 0.0


def test_the_line_of_a_task_counts_prompts_that_were_cut(chat_model, run, capsys, tokenizer):
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=24)
    CheckpointManager(get_checkpoint_dir("sft", "short")).save(1, model, tokenizer=tokenizer)
    run("-a", "MMLU", "-g", "short")
    assert "cut from the left: 3" in capsys.readouterr().out
    assert all(record["truncated"] for record in read_records("MMLU", "sft/short_step_1"))


def test_the_report_has_the_greedy_answers_to_the_messages_that_the_data_names(chat_model, run, tokenizer):
    run("-a", "ARC-Easy")
    samples = read_report()["samples"]
    assert tuple(sample["prompt"] for sample in samples) == chat_eval.MESSAGES
    # the same as generation alone gives, on every run; a prompt that fills the context is left out
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=96)
    examples = ["What is 2 + 2?", "too long " * 200]
    CheckpointManager(get_checkpoint_dir("sft", "d2")).save(8, model, tokenizer=tokenizer, meta={"examples": examples})
    run("-a", "ARC-Easy")
    prompt = tokenizer.render_for_completion({"messages": [{"role": "user", "content": examples[0]}]})
    (sequence,), _ = Engine(model, tokenizer).generate_batch(prompt, max_tokens=6, temperature=0)
    assert read_report()["samples"] == [{"prompt": examples[0], "text": tokenizer.decode(sequence[len(prompt):])}]


@pytest.mark.parametrize("argv, message", [
    (["-a", "MMLU|Humaneval"], "did you mean -a HumanEval"), (["-n", "4"], "-n 4 -t 1.0"),
    (["-n", "0"], "num_samples=0"), (["-t", "-1"], "temperature=-1.0"), (["-t", "nan"], "temperature=nan"),
    (["-b", "0"], "batch_rows=0"), (["-s", "8", "-a", "MMLU"], "there are the steps 7")])
def test_a_mistake_in_the_arguments_is_named(chat_model, run, argv, message):
    with pytest.raises(UserError, match=message):
        run(*argv)


def test_without_a_checkpoint_the_next_command_is_named(mirror, tmp_path, monkeypatch, run):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    with pytest.raises(UserError, match="python -m scripts.chat_sft"):
        run("-a", "MMLU")


def test_humaneval_is_skipped_where_the_sandbox_is_incomplete_unless_the_user_accepts_it(mirror, capsys):
    def choose(asked, allow_unsafe=False):
        return chat_eval.choose_names(asked, allow_unsafe, torch.device("cpu"), lambda: ["limits", "seccomp"])
    assert choose(None) == [name for name in CHATCORE_TASKS if name != "HumanEval"]
    assert "HumanEval is skipped: this system has no landlock" in capsys.readouterr().out
    assert choose(None, allow_unsafe=True) == list(CHATCORE_TASKS)
    with pytest.raises(UserError, match="no task is left"):
        choose("HumanEval")


def test_humaneval_runs_where_the_sandbox_is_complete(mirror):
    assert chat_eval.choose_names("HumanEval", False, torch.device("cpu"), lambda: list(WALLS)) == ["HumanEval"]


@pytest.mark.slow  # four processes that import torch
def test_two_ranks_give_the_results_of_one(chat_model):
    def evaluate(launcher, *extra):
        command = [sys.executable, *launcher, "-m", "scripts.chat_eval", *extra, "-i", "sft", "-a", "MMLU|GSM8K",
                   "-m", "6", "-n", "2", "-t", "1.0", "--device_type", "cpu"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=env, cwd=Path(__file__).parent.parent, timeout=300)
        return read_records("MMLU"), read_records("GSM8K"), read_report()["metrics"]
    one = evaluate([])
    assert evaluate(["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"], "--") == one


# -----------------------------------------------------------------------------
# Names, and the task Identity


@pytest.mark.parametrize("typed", ["ARC-Easy|GSM8K", " ARC-Easy | GSM8K|ARC-Easy"])
def test_names_are_joined_by_a_bar(typed):
    assert parse_names(typed) == ["ARC-Easy", "GSM8K"]


def write_identity(**changes):
    row = {"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "nanochat"}],
           "accept": ["nanochat", "small language model"]}
    identity_path().write_text(json.dumps(row | changes) + "\n\n", "utf-8")


def test_identity_is_available_where_its_file_is(mirror):
    assert available_tasks() == list(CHATCORE_TASKS)
    write_identity()
    assert available_tasks() == [*CHATCORE_TASKS, "Identity"]


@pytest.mark.parametrize("completion, right", [
    ("I am NanoChat.", True), ("a Small\nlanguage  model", True), ("nanochats", False), ("a language model", False)])
def test_an_identity_answer_holds_one_of_the_phrases(mirror, completion, right):
    write_identity()
    task = Identity()
    assert len(task) == 1 and task.evaluate(task[0], completion) == right


@pytest.mark.parametrize("changes, named", [
    ({"accept": []}, ", accept"), ({"accept": "nanochat"}, ", accept"), ({"accept": [" "]}, ", accept"),
    ({"messages": [{"role": "user", "content": "?"}]}, ": the assistant says nothing")])
def test_a_bad_line_of_the_identity_file_is_named(mirror, changes, named):
    write_identity(**changes)
    with pytest.raises(UserError, match=f"identity_test.jsonl, line 1{named}"):
        Identity()


def test_identity_without_its_file_names_the_command_that_writes_it(mirror):
    with pytest.raises(UserError, match="python -m dev.gen_synthetic_data"):
        Identity()


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(tasks.identity).failed == 0
