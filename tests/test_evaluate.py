"""tasks/evaluate on stand-in tasks: letters against a plain forward pass, pass@k against counting, scripted engines."""

import math
from itertools import combinations

import pytest
import torch
from tiny import tiny_model

from nanochat import distributed
from nanochat.common import UserError
from nanochat.engine import Engine
from tasks.common import MultipleChoice, Task
from tasks.evaluate import (
    CHATCORE_TASKS,
    centered,
    chat_core,
    cut_prompt,
    evaluate_categorical,
    evaluate_generative,
    evaluate_task,
    gather_records,
    parse_names,
    pass_at_k,
    summarize,
)


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=128)


class Exam(MultipleChoice):
    """Questions of different lengths, with 2 to 5 letters; some use digits, as ARC does."""

    def num_examples(self):
        return 23

    def get_example(self, index):
        letters = ("12345" if index % 3 == 0 else "ABCDE")[: 2 + index % 4]
        return self.conversation("Why? " * (index % 7), letters, letters.lower(), letters[index % len(letters)])


class Echo(Task):
    """Right is what says the number of the question."""

    def num_examples(self):
        return 10

    def get_example(self, index):
        return {"messages": [{"role": "user", "content": f"Say {index}" + " please" * (index % 3)},
                             {"role": "assistant", "content": f"{index}!"}]}

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][1]["content"]


class ScriptedEngine(Engine):
    """Writes what `write(question index, sample)` says, and ends the rows in another order than they were given."""

    def __init__(self, model, tokenizer, write):
        super().__init__(model, tokenizer)
        self.write, self.seen = write, []

    def generate_rows(self, rows, num_rows=32):
        for row in reversed(rows):
            self.seen.append(row)
            _, index, sample = row.sampling.seed.split(":")
            row.tokens = self.write(int(index), int(sample))
            row.finish_reason = "stop" if row.tokens[-1] in self.stop_tokens else "length"
            yield row


def answers(tokenizer, right):
    """A `write` that is right where right(index, sample) says so."""
    end = tokenizer.encode_special("<|assistant_end|>")
    return lambda index, sample: [*tokenizer.encode(f"{index}!" if right(index, sample) else "Hm"), end]


# -----------------------------------------------------------------------------
# Letters


def test_the_letter_is_the_likeliest_of_those_offered_by_the_plain_forward_pass(model, tokenizer):
    _, records = evaluate_categorical(Exam(), model, tokenizer, batch_rows=5)
    for record, conversation in zip(records, Exam(), strict=True):
        logits = model(torch.tensor([tokenizer.render_for_completion(conversation)]))[0, -1].detach()
        values = {letter: float(logits[tokenizer.encode(letter)[0]]) for letter in conversation["letters"]}
        assert record["completion"] == max(values, key=values.get)
        assert record["correct"] == (record["completion"] == conversation["messages"][1]["content"])
    assert len({record["completion"] for record in records}) > 2  # not the same letter everywhere


@pytest.mark.parametrize("batch_rows", [1, 3, 100])
def test_letters_do_not_depend_on_the_batch_size(model, tokenizer, batch_rows):
    assert (evaluate_categorical(Exam(), model, tokenizer, batch_rows=batch_rows)
            == evaluate_categorical(Exam(), model, tokenizer, batch_rows=8))


def test_accuracy_is_the_share_of_right_letters(model, tokenizer):
    result, records = evaluate_categorical(Exam(), model, tokenizer)
    assert result["n"] == len(records) == 23 and result["truncated"] == 0
    assert result["accuracy"] == sum(record["correct"] for record in records) / 23


def test_a_prompt_too_long_for_the_model_is_cut_from_the_left_and_counted(tokenizer):
    small = tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=48)
    result, records = evaluate_categorical(Exam(), small, tokenizer)
    whole = [tokenizer.render_for_completion(conversation) for conversation in Exam()]
    assert 0 < result["truncated"] == sum(len(ids) > 48 for ids in whole) < 23
    for record, ids in zip(records, whole, strict=True):
        assert record["truncated"] == (len(ids) > 48)
        assert record["prompt"].startswith("<|bos|>") and record["prompt"].endswith("<|assistant_start|>")


def test_cut_prompt_keeps_the_first_id_and_the_last_ones():
    assert cut_prompt([9, 1, 2, 3], 4) == [9, 1, 2, 3]
    assert cut_prompt([9, 1, 2, 3], 3) == [9, 2, 3] and cut_prompt([9, 1, 2, 3], 1) == [9]


# -----------------------------------------------------------------------------
# Generated answers


@pytest.mark.parametrize("batch_rows", [1, 4])
def test_generated_answers_do_not_depend_on_the_batch_size(model, tokenizer, batch_rows):
    def run(batch_rows):
        return evaluate_generative(Echo(), Engine(model, tokenizer), tokenizer, num_samples=2, temperature=1.0,
                                   max_new_tokens=8, batch_rows=batch_rows)[1]
    records = run(batch_rows)
    assert records == run(32) and len({record["completion"] for record in records}) == 20  # every sample its own


def test_an_engine_that_knows_the_answers_gets_them_all_right(model, tokenizer):
    engine = ScriptedEngine(model, tokenizer, answers(tokenizer, lambda index, sample: True))
    result, records = evaluate_generative(Echo(), engine, tokenizer)
    assert (result["accuracy"], result["stderr"], result["n"], result["pass_at_k"]) == (1.0, 0.0, 10, {1: 1.0})
    assert [(r["index"], r["completion"], r["answer"], r["finish_reason"]) for r in records] == [
        (i, f"{i}!", f"{i}!", "stop") for i in range(10)]


def test_pass_at_k_is_the_mean_over_problems(model, tokenizer):
    # problem i has min(i, 6) right samples of 6
    engine = ScriptedEngine(model, tokenizer, answers(tokenizer, lambda index, sample: sample < index))
    result, records = evaluate_generative(Echo(), engine, tokenizer, num_samples=6, temperature=1.0)
    assert len(records) == 60 and list(result["pass_at_k"]) == [1, 2, 4, 6]
    assert result["pass_at_k"][1] == pytest.approx(result["accuracy"]) == pytest.approx((15 + 4 * 6) / 60)
    assert result["pass_at_k"][6] == pytest.approx(9 / 10)  # all but problem 0


@pytest.mark.parametrize("n, c, k", [(6, 0, 3), (6, 2, 1), (6, 2, 3), (6, 2, 5), (6, 6, 2), (1, 1, 1)])
def test_pass_at_k_counts_the_subsets_that_hold_a_right_sample(n, c, k):
    subsets = list(combinations(range(n), k))  # samples 0 .. c - 1 are the right ones
    assert pass_at_k(n, c, k) == pytest.approx(sum(min(subset) < c for subset in subsets) / len(subsets))


def test_tool_calls_and_their_results_are_part_of_the_text(model, tokenizer):
    parts = [{"type": "python", "text": "2*3"}, {"type": "python_output", "text": "6"}, {"type": "text", "text": "!"}]
    ids, mask = tokenizer.render_conversation({"messages": [{"role": "user", "content": "?"},
                                                            {"role": "assistant", "content": parts}]})
    engine = ScriptedEngine(model, tokenizer, lambda index, sample: ids[mask.index(1):])
    _, records = evaluate_generative(Echo(stop=1), engine, tokenizer)
    assert records[0]["completion"] == "<|python_start|>2*3<|python_end|><|output_start|>6<|output_end|>!"


def test_a_long_prompt_leaves_a_quarter_of_the_context_to_the_answer(tokenizer):
    small = tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=16)
    engine = ScriptedEngine(small, tokenizer, lambda index, sample: tokenizer.encode("x"))
    result, records = evaluate_generative(Echo(), engine, tokenizer, num_samples=2, temperature=1.0)
    cut = [len(tokenizer.render_for_completion(conversation)) > 12 for conversation in Echo()]
    assert max(len(row.prompt) for row in engine.seen) == 12
    assert result["truncated"] == sum(cut) > 0  # problems, not samples
    assert {record["finish_reason"] for record in records} == {"length"}


def test_answers_that_the_sandbox_stopped_are_counted_and_recorded(model, tokenizer):
    class Walled(Echo):
        def grade(self, conversation, completion):
            right = self.evaluate(conversation, completion)
            return {"correct": right, "error": None if right else "no", "wall_hit": None if right else "memory"}
    engine = ScriptedEngine(model, tokenizer, answers(tokenizer, lambda index, sample: index > 2))
    result, records = evaluate_generative(Walled(), engine, tokenizer)
    assert result["accuracy"] == 0.7 and result["wall_hits"] == 3
    assert [record["wall_hit"] for record in records] == ["memory"] * 3 + [None] * 7
    assert "wall_hits" not in evaluate_generative(Echo(), engine, tokenizer)[0]


def test_an_error_of_the_grader_is_not_a_wrong_answer(model, tokenizer):
    class Broken(Echo):
        def evaluate(self, conversation, completion):
            raise UserError("no walls")
    engine = ScriptedEngine(model, tokenizer, answers(tokenizer, lambda index, sample: True))
    with pytest.raises(UserError, match="no walls"):
        evaluate_generative(Broken(), engine, tokenizer)


# -----------------------------------------------------------------------------
# Both


def test_evaluate_task_chooses_by_the_kind_of_task(model, tokenizer):
    engine = ScriptedEngine(model, tokenizer, answers(tokenizer, lambda index, sample: True))
    assert evaluate_task(Exam(), engine, tokenizer, max_new_tokens=3) == evaluate_categorical(Exam(), model, tokenizer)
    assert evaluate_task(Echo(), engine, tokenizer)[0]["accuracy"] == 1.0


def test_a_limit_draws_from_the_whole_task_and_a_larger_one_holds_a_smaller(model, tokenizer):
    def asked(max_problems):
        records = evaluate_categorical(Exam(), model, tokenizer, max_problems=max_problems)[1]
        return [record["index"] for record in records]
    assert set(asked(4)) < set(asked(9)) and len(asked(4)) == 4 and max(asked(4)) > 9
    assert asked(-1) == asked(100) == list(range(23))


def test_a_task_without_problems_is_refused(model, tokenizer):
    with pytest.raises(UserError, match="Exam has no problem"):
        evaluate_categorical(Exam(stop=0), model, tokenizer)


def test_the_error_of_one_sample_a_problem_is_the_binomial_one():
    records = [{"index": i, "sample": 0, "correct": i < 3, "truncated": False} for i in range(12)]
    assert summarize(Exam(), records)["stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 12))


def test_more_samples_of_the_same_answer_do_not_shrink_the_error():
    records = [{"index": i, "sample": s, "correct": i < 3, "truncated": False} for i in range(12) for s in range(8)]
    assert summarize(Exam(), records)["stderr"] == pytest.approx(math.sqrt(0.25 * 0.75 / 12))


def test_records_come_back_in_order_with_their_letters_whole():
    records = [{"index": 2, "sample": 0, "completion": "žluť \ud800"}, {"index": 1, "sample": 0, "completion": "\n"}]
    assert gather_records(lambda: records, "cpu") == records[::-1]


def test_an_error_on_one_rank_ends_the_evaluation_on_all(monkeypatch):
    """The first all-reduce says how many ranks failed: this one did not, another one did."""
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda failed: failed + 1)
    with pytest.raises(UserError, match="failed on another rank"):
        gather_records(lambda: [], "cpu")


# -----------------------------------------------------------------------------
# Names and ChatCORE


def test_blind_guesses_are_centred_to_0_and_full_marks_to_1():
    assert [centered(name, 0.25) for name in ("ARC-Easy", "ARC-Challenge", "MMLU")] == [0, 0, 0]
    assert centered("GSM8K", 0.25) == 0.25 and all(centered(name, 1.0) == 1 for name in CHATCORE_TASKS)


def test_chatcore_is_the_mean_of_six_centred_accuracies_with_its_error():
    accuracies = dict(zip(CHATCORE_TASKS, (0.4, 0.25, 0.25, 0.3, 0.0, 1.0), strict=True))
    results = {name: {"accuracy": accuracy, "stderr": 0.03, "n": 50} for name, accuracy in accuracies.items()}
    results["Identity"] = {"accuracy": 0.0, "stderr": 0.5, "n": 9}  # is not part of it
    core = chat_core(results)
    assert core["value"] == pytest.approx((0.2 + 0.3 + 1.0) / 6) and core["n"] == 300
    assert core["stderr"] == pytest.approx(math.sqrt(3 * 0.04**2 + 3 * 0.03**2) / 6)


def test_chatcore_needs_all_six_tasks():
    assert chat_core({name: {"accuracy": 1.0, "stderr": 0.0, "n": 1} for name in CHATCORE_TASKS[1:]}) is None


@pytest.mark.parametrize("typed, meant", [("GSMK8", "GSM8K"), ("arc easy", "ARC-Easy"), ("gsm8k", "GSM8K")])
def test_an_unknown_name_is_answered_with_the_nearest(typed, meant):
    with pytest.raises(UserError, match=f"did you mean -a {meant}"):
        parse_names(f"MMLU|{typed}")
