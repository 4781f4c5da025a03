"""The tasks on a small mirror written here; tests/test_task_data.py has their files, words and the real data."""

import doctest

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tasks.common
import tasks.final_answer
import tasks.gsm8k
import tasks.spellingbee
from nanochat.common import UserError
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSequence, render_mc
from tasks.gsm8k import GSM8K, solution_parts
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk


def mmlu_rows(split, count):
    return [{"question": f"{split} {i}?", "subject": "tests", "choices": [f"{split} {i} {c}" for c in "wxyz"],
             "answer": i % 4} for i in range(count)]


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A mirror with a few rows of each data set."""
    root = tmp_path_factory.mktemp("mirror")
    arc = {"id": "1", "question": "q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    files = {
        "tasks/gsm8k_train": [{"question": f"train {i}", "answer": f"so 2*{i}=<<2*{i}={2 * i}>>{2 * i}\n#### {2 * i}"}
                              for i in range(30)],
        "tasks/gsm8k_test": [{"question": f"test {i}", "answer": f"#### {i}"} for i in range(5)],
        "tasks/mmlu_auxiliary_train": mmlu_rows("auxiliary_train", 80), "tasks/mmlu_test": mmlu_rows("test", 8),
        "tasks/arc_easy_train": [arc],
    }
    for name, rows in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), root / f"{name}.parquet")
    return root


@pytest.fixture(autouse=True)
def use_mirror(mirror, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(mirror))


class Numbers(Task):
    """count conversations whose question is name:index."""

    def __init__(self, name, count, **kwargs):
        super().__init__(**kwargs)
        self.name, self.count = name, count

    def num_examples(self):
        return self.count

    def get_example(self, index):
        return f"{self.name}:{index}"


# -----------------------------------------------------------------------------
# Task, sequence, mixture


@pytest.mark.parametrize("kwargs", [{}, {"start": 3}, {"stop": 7}, {"start": 2, "stop": 99, "step": 3}, {"start": 50}])
def test_a_task_is_sliced_as_a_list_is(kwargs):
    rows = [f"n:{i}" for i in range(10)]
    cut = slice(kwargs.get("start"), kwargs.get("stop"), kwargs.get("step"))
    assert list(Numbers("n", 10, **kwargs)) == rows[cut]
    assert len(Numbers("n", 10, **kwargs)) == len(rows[cut])


@pytest.mark.parametrize("kwargs", [{"start": -1}, {"step": 0}, {"start": 5, "stop": 4}])
def test_a_slice_that_makes_no_sense_is_refused(kwargs):
    with pytest.raises(UserError, match=r"Numbers\(start="):
        Numbers("n", 10, **kwargs)


def test_a_sequence_holds_every_example_in_order():
    sequence = TaskSequence([Numbers("a", 3), Numbers("none", 0), Numbers("b", 2)])
    assert list(sequence) == ["a:0", "a:1", "a:2", "b:0", "b:1"]


def test_a_mixture_without_weights_holds_every_example_once():
    mixture = TaskMixture([Numbers("a", 30), Numbers("b", 20), Numbers("a", 30)])
    assert sorted(mixture) == sorted([*Numbers("a", 30), *Numbers("b", 20), *Numbers("a", 30)])


def test_a_mixture_depends_on_its_seed_alone():
    def mix(seed):
        return list(TaskMixture([Numbers("a", 30), Numbers("b", 20)], seed=seed))
    assert mix(1) == mix(1)
    assert mix(1) != mix(2) and mix(1) != mix(-1)


def test_a_mixture_puts_neighbours_from_different_tasks():
    names = [row[0] for row in TaskMixture([Numbers("a", 500), Numbers("b", 500)])]
    changes = sum(x != y for x, y in zip(names, names[1:], strict=False))
    assert 400 < changes < 600  # 1 in an unshuffled one; 500 expected, standard deviation 16


def count_names(mixture):
    names = [row[0] for row in mixture]
    return {name: names.count(name) for name in sorted(set(names))}


@pytest.mark.parametrize("weights, counts", [
    ([0.5, 0.5], {"a": 30, "b": 30}), ([1, 3], {"a": 30, "b": 90}), ([3, 1], {"a": 30, "b": 10}),
    ([0, 2], {"b": 100}), ([0.1, 0.2], {"a": 30, "b": 60})])
def test_weights_are_shares_and_nothing_repeats(weights, counts):
    mixture = TaskMixture([Numbers("a", 30), Numbers("b", 100)], weights=weights)
    assert count_names(mixture) == counts
    assert len(set(mixture)) == len(mixture) == sum(counts.values())


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [float("nan"), 1], [float("inf"), 1]])
def test_weights_that_make_no_sense_are_refused(weights):
    with pytest.raises(UserError, match="weights"):
        TaskMixture([Numbers("a", 3), Numbers("b", 3)], weights=weights)


def test_a_weight_on_an_empty_task_is_refused():
    with pytest.raises(UserError, match="empty"):
        TaskMixture([Numbers("a", 3), Numbers("b", 0)], weights=[1, 1])


def test_the_mixture_of_defaults_just_works():
    mixture = TaskMixture([GSM8K(), MMLU()], weights=[0.5, 0.5])
    assert len(mixture) == 60
    assert sum("letters" in conversation for conversation in mixture) == 30


# -----------------------------------------------------------------------------
# Questions and answers


def test_the_letter_of_the_prompt_and_of_the_answer_are_one_token(tokenizer):
    ids = tokenizer.encode(render_mc("Which?", "ABCD", ["one", "two", "3", "x y"]))
    for letter in "ABCD":
        (answer,) = tokenizer.encode(letter)
        assert ids.count(answer) == 1 + (letter == "A")  # A also begins the last line


@pytest.mark.parametrize("module", [tasks.common, tasks.final_answer, tasks.gsm8k, tasks.spellingbee])
def test_the_examples_in_the_docstrings_hold(module):
    failed, tried = doctest.testmod(module)
    assert tried and not failed


def test_gsm8k_pays_for_the_right_number_only():
    task = GSM8K()
    conversation = task[9]
    assert [task.reward(conversation, text) for text in ("#### 18.0", "#### 19", "18", "")] == [1.0, 0.0, 0.0, 0.0]


def test_a_calculator_call_becomes_a_call_and_its_output():
    assert solution_parts("He pays 12*3=$<<12*3=36>>36.\n#### 36") == [
        {"type": "text", "text": "He pays 12*3=$"}, {"type": "python", "text": "12*3"},
        {"type": "python_output", "text": "36"}, {"type": "text", "text": "36.\n#### 36"}]


def test_a_solution_is_whole_without_its_calls():
    assert solution_parts("4 < 5 << 6 >> 0") == [{"type": "text", "text": "4 < 5 << 6 >> 0"}]
    assert "".join(part["text"] for part in solution_parts("<<1+1=2>>2 <<2*2.4=4.80>>4.80")) == "1+122 2*2.44.84.80"


def test_multiple_choice_is_graded_by_its_letter():
    for task, right, wrong in ((MMLU("all", "test"), "A", "B"), (ARC(), "3", "1")):
        assert task.eval_type == "categorical" and right in task[0]["letters"]
        assert task.evaluate(task[0], right) and not task.evaluate(task[0], wrong)


def test_the_splits_of_mmlu_go_by_two_names():
    assert [c["messages"] for c in MMLU()] == [c["messages"] for c in MMLU("all", "auxiliary_train")]


@pytest.mark.parametrize("make", [lambda: GSM8K(split="val"), lambda: MMLU("all", "train"), lambda: ARC("ARC"),
                                  lambda: SmolTalk("dev"), lambda: GSM8K("socratic")])
def test_an_unknown_split_is_named_with_those_there_are(make):
    with pytest.raises(UserError, match="need '"):
        make()
