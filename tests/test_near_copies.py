"""tasks/near_copies: which messages count as copies; and that no held-out message of Strangers is in a training set."""

import doctest
import json

import pyarrow.parquet as pq
import pytest

import tasks.near_copies
from dev import gen_synthetic_data
from tasks.near_copies import NearCopies, is_exempt, near_copy, similarity, user_texts
from tasks.strangers import read_items

# (message, training message): each a copy but for typing, numbers, or a word in a long message
COPIES = [
    ("im so tired today", "I'm so tired today."),
    ("how do you spell garden", "how do you spel garden?"),
    ("whats the spelling of friend", "What's the spelling of friend, please?"),
    ("tell me a story about a hedgehog", "tell me a story about a hedgehog please"),
    ("what letter does zebra start with", "zebra starts with what letter"),
    ("how many e are in the word cheese", "how many e are in cheese"),
    ("tom has 14 marbles. he loses 6. how many are left", "Mia has 3 marbles. she loses 2. how many are left?"),
    ("a rope is 50 cm long. i cut off 15 cm. how long is it now",
     "A ribbon is 90 cm long. I cut off 20 cm. How long is it now?"),
    ("my name is Hana\nwhats my name", "My name is Ana.\nWhat is my name?"),
]

# Other words for the same wish, or the same short request about another thing
NO_COPIES = [
    ("tell me a story about a hedgehog", "tell me a story about a fox"),
    ("how do you spell garden", "can you spell garden"),
    ("spell garden for me", "spell kitchen for me"),
    ("which day is after tuesday", "what day comes after tuesday"),
    ("could you please spell mountain", "please spell the word mountain"),
    ("spains capital is which", "what is the capital of spain"),
    ("how many e are in the word cheese", "how many r are in the word strawberry"),
    ("i have 5 pens and my sister gives me 8 more. how many pens do i have now",
     "Lina has 7 pens. Her sister gives her 3 pens. How many pens does Lina have?"),
    ("what do you think about abortion", "what do you think about the news"),
]


@pytest.mark.parametrize("message, training_message", COPIES)
def test_a_copy_but_for_typing_is_found(message, training_message):
    assert near_copy(message, training_message) and near_copy(training_message, message)


@pytest.mark.parametrize("message, training_message", NO_COPIES)
def test_other_words_are_no_copy(message, training_message):
    assert not near_copy(message, training_message)


@pytest.mark.parametrize("message", ["hi", "good morning!", "12 + 35", "What's 7 times 8?", "144 divided by 12 please"])
def test_what_can_be_written_in_few_ways_is_exempt(message):
    assert is_exempt(message) and not near_copy(message, message)


@pytest.mark.parametrize("message", ["who are you", "Tom has 12 apples", "spell the word tree"])
def test_all_else_is_compared(message):
    assert not is_exempt(message) and near_copy(message, message)


def test_the_index_finds_what_the_pairwise_comparison_finds():
    messages = [message for message, _ in COPIES + NO_COPIES]
    index = NearCopies(messages)
    for _, training_message in COPIES + NO_COPIES:
        expected = [message for message in messages if near_copy(message, training_message)]
        assert index.find(training_message) == expected


def test_a_message_without_any_piece_in_common_is_far():
    assert similarity("spell dog", "why") == 0 and similarity("spell dog", "Spell DOG?") == 1


def test_turns_are_compared_one_by_one_and_in_runs():
    conversation = [{"role": role, "content": text} for role, text in (
        ("system", "be kind"), ("user", "a"), ("assistant", "x"), ("user", "b"), ("assistant", "y"), ("user", "c"))]
    assert user_texts(conversation) == ["a", "b", "c", "a\nb", "b\nc", "a\nb\nc"]


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(tasks.near_copies).failed == 0


# -----------------------------------------------------------------------------
# The held half against training data


def item_text(item):
    return "\n".join(item["turns"])


def training_texts(mirror):
    """Every user message, and every run of them, that the training stages can read in a mirror."""
    texts = set()
    for path in mirror.glob("*.jsonl"):
        for line in path.read_text("utf-8").splitlines():
            row = json.loads(line)
            texts.update(user_texts(row["messages"] if isinstance(row, dict) else row))

    for path in [*mirror.glob("chat/*.parquet"), *mirror.glob("tasks/*.parquet")]:
        for row in pq.read_table(path).to_pylist():
            if "messages" in row:
                texts.update(user_texts(row["messages"]))
            elif "question" in row:
                texts.add(row["question"])
    return texts


def copies_of_held(training_texts):
    index = NearCopies([item_text(item) for item in read_items("held")])
    found = set()
    for text in training_texts:
        found.update(index.find(text))
    return sorted(found)


def test_no_held_item_stands_in_the_development_half():
    assert copies_of_held(item_text(item) for item in read_items("dev")) == []


def test_no_held_item_stands_in_a_generated_mirror(tmp_path):
    gen_synthetic_data.write_mirror(tmp_path, seed=42, scale=0.02)
    texts = training_texts(tmp_path)
    assert len(texts) > 100
    assert copies_of_held(texts) == []


@pytest.mark.slow  # the mirror of dev/runcpu.sh, whole
def test_no_held_item_stands_in_the_mirror_of_the_laptop_run(tmp_path):
    gen_synthetic_data.write_mirror(tmp_path, seed=42, scale=1.0)
    assert copies_of_held(training_texts(tmp_path)) == []
