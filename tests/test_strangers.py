"""tasks/strangers: the file is whole, nonsense does not pass by accident, later turns follow the model's replies."""

import json
from collections import Counter

import pytest
from tiny import tiny_model

from nanochat.common import UserError
from nanochat.engine import Engine
from tasks.answer_rules import CLASSES, PHRASES, is_right
from tasks.common import Task
from tasks.evaluate import TASKS, available_tasks, evaluate_generative
from tasks.strangers import KINDS, SPLITS, Strangers, read_items

ITEMS = read_items("dev") + read_items("held")
FIELDS = {"number", "letters", "letter", "pick", "any", "all", "none", "says", "story", "own", "honest", "or"}


def count_right(answer_to):
    """Per kind, how many items the answers pass."""
    return Counter(item["kind"] for item in ITEMS if is_right(item["rule"], answer_to(item), item["turns"]))


# -----------------------------------------------------------------------------
# The file


def test_the_halves_are_balanced_by_kind():
    counts = Counter((item["kind"], item["split"]) for item in ITEMS)
    assert set(counts) == {(kind, split) for kind in KINDS for split in SPLITS}
    assert all(counts[kind, "dev"] == counts[kind, "held"] >= 25 for kind in KINDS)
    assert len(ITEMS) >= 340


def test_no_item_stands_twice():
    turns = [tuple(item["turns"]) for item in ITEMS]
    assert len(set(turns)) == len(turns)


def test_items_of_memory_and_only_they_have_several_turns():
    for item in ITEMS:
        assert (2 <= len(item["turns"]) <= 4) == (item["kind"] == "memory")
        assert all(turn.strip() == turn != "" for turn in item["turns"])


def test_rules_use_known_fields_and_lists():
    for item in ITEMS:
        for rule in [item["rule"], *item["rule"].get("or", [])]:
            assert rule and set(rule) <= FIELDS
            assert rule.get("says", "self") in PHRASES
            class_name, member = rule.get("pick", ["days", "monday"])
            assert member in CLASSES[class_name].split()


def plain_answer(rule):
    """A right answer that follows from the rule alone."""
    if "or" in rule:
        return plain_answer(rule["or"][0])
    words = " ".join([*rule.get("all", []), *rule.get("any", [])[:1], *rule.get("pick", [])[1:]])
    if "number" in rule:
        return f"The answer is {rule['number']}."
    if "story" in rule:
        return (f"Once there was a {rule['story']}. {words}. It went out to play, and the rain came down on the hill. "
                "Then a friend came with a big leaf, and both stayed dry under it. They were happy and went home.")
    if "honest" in rule:
        return "I do not know that. I can do sums and spell words."
    if "says" in rule:
        return PHRASES[rule["says"]].split("|")[0]
    return f"It is {words}{rule.get('letters', '')}{rule.get('letter', '')}."


def test_every_item_has_a_right_answer():
    wrong = [item for item in ITEMS if not is_right(item["rule"], plain_answer(item["rule"]), item["turns"])]
    assert wrong == []


# -----------------------------------------------------------------------------
# Nonsense


@pytest.mark.parametrize("answer", [
    "I do not know that. I can do sums and spell words.", "I don't know.", "Sorry, I cannot do that."])
def test_an_honest_sentence_is_right_outside_the_world_alone(answer):
    right = count_right(lambda item: answer)
    assert right["outside"] == 52 and right.total() <= 54


@pytest.mark.parametrize("answer", [
    "", "yes", "no", "2", "8", "#### 9", "There are 3.", "I am nanochat, a small language model.", "Yes, I can.",
    "Hello! How can I help you?", "I am fine, thank you. And you?", "You are welcome!", "Goodbye! See you soon.",
    "No, I am not a person. I am a computer program.", "I cannot see or taste, but I like the word pl.", "I am happy.",
    "The word kind is spelled l a l e. The word kind is spelled l a l e.", "Dax has 12 + 7 = 19 apples.",
    "12+35+35+12+35+35+12 more is. I e r y.", "Paris is the capital of France.", "Your name is Hana.",
    " ".join(CLASSES["days"].split()), " ".join(map(str, range(70))),
    "Once upon a time there was a fox. The fox lived in a wood and liked to sing. One day it met a cat. They played "
    "until the sun went down. Then they went home and were happy."])
def test_one_answer_to_all_is_right_for_a_few_items_at_most(answer):
    assert count_right(lambda item: answer).total() <= 9


@pytest.mark.parametrize("echo", [
    lambda item: item["turns"][-1], lambda item: item["turns"][0].upper() + "?", lambda item: " ".join(item["turns"]),
    lambda item: f"You said: {item['turns'][-1]}"])
def test_a_repetition_of_the_question_is_no_answer(echo):
    assert count_right(echo).total() <= 7


def test_the_answer_to_another_item_is_wrong():
    items = [item for item in ITEMS if item["kind"] != "outside"]
    num_right = 0
    for item, other in zip(items, items[13:] + items[:13], strict=True):
        num_right += is_right(item["rule"], plain_answer(other["rule"]), item["turns"])
    assert num_right <= 0.05 * len(items)


# -----------------------------------------------------------------------------
# The task and its evaluation


def test_a_half_that_is_none_is_refused():
    with pytest.raises(UserError, match="'dev' or 'held'"):
        Strangers(split="test")


def test_the_task_is_the_held_half_and_runs_only_where_it_is_asked_for():
    task = TASKS["Strangers"][0]()
    assert [conversation["messages"][0]["content"] for conversation in task] == [
        item["turns"][0] for item in read_items("held")]
    assert "Strangers" not in available_tasks()


def test_an_example_holds_its_rule_and_grades_by_it():
    task = Strangers(split="dev")
    for conversation, item in zip(task, read_items("dev"), strict=True):
        assert json.loads(conversation["messages"][-1]["content"]) == item["rule"]
        assert task.evaluate(conversation, plain_answer(item["rule"])) and not task.evaluate(conversation, "")


class Talk(Task):
    """Two conversations of one and of three turns."""

    def num_examples(self):
        return 2

    def get_example(self, index):
        messages = [{"role": "user", "content": f"turn {index}.0"}, {"role": "assistant", "content": "fine"}]
        return {"messages": messages, "later_turns": ["one", "two"] * index, "kind": ("short", "long")[index]}

    def evaluate(self, conversation, completion):
        return completion == "reply 2"


class CountingEngine(Engine):
    """Writes "reply n", n the number of user turns in the prompt but one, and keeps the prompts."""

    def generate_rows(self, rows, num_rows=32):
        for row in reversed(rows):
            text = self.tokenizer.decode(row.prompt)
            row.tokens = self.tokenizer.encode(f"reply {text.count('<|user_start|>') - 1}")
            row.finish_reason = "length"
            if "one" in text:  # an answer that ended by itself
                row.tokens.append(self.tokenizer.encode_special("<|assistant_end|>"))
                row.finish_reason = "stop"
            yield row


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=128)


def test_later_turns_follow_the_replies_of_the_model(model, tokenizer):
    result, records = evaluate_generative(Talk(), CountingEngine(model, tokenizer), tokenizer)
    expected = [{"role": "user", "content": "turn 1.0"}, {"role": "assistant", "content": "reply 0"},
                {"role": "user", "content": "one"}, {"role": "assistant", "content": "reply 1"},
                {"role": "user", "content": "two"}]
    assert records[1]["prompt"] == tokenizer.decode(tokenizer.render_for_completion({"messages": expected}))
    assert [record["completion"] for record in records] == ["reply 0", "reply 2"]
    assert [record["correct"] for record in records] == [False, True]
    assert {kind: (figures["accuracy"], figures["n"]) for kind, figures in result["by_kind"].items()} == {
        "short": (0.0, 1), "long": (1.0, 1)}


def test_a_conversation_that_outgrows_the_context_loses_its_beginning_and_is_counted(tokenizer):
    small = tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=40)
    result, records = evaluate_generative(Talk(), CountingEngine(small, tokenizer), tokenizer)
    assert result["truncated"] == 1 and records[1]["truncated"] and not records[0]["truncated"]
    assert records[1]["prompt"].startswith("<|bos|>") and records[1]["prompt"].endswith("<|assistant_start|>")


@pytest.mark.parametrize("batch_rows", [1, 5])
def test_generated_conversations_do_not_depend_on_the_batch_size(model, tokenizer, batch_rows):
    def run(batch_rows):
        return evaluate_generative(Talk(), Engine(model, tokenizer), tokenizer, num_samples=3, temperature=1.0,
                                   max_new_tokens=8, batch_rows=batch_rows)[1]
    records = run(batch_rows)
    assert records == run(32) and [record["sample"] for record in records] == [0, 1, 2] * 2
