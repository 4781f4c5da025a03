"""The toy world: what `dev/gen_synthetic_data.py` writes is whole, the same for a seed, right, and held out well."""

import ast
import hashlib
import json
import re
from collections import Counter
from random import Random

import pyarrow.parquet as pq
import pytest

from dev import gen_synthetic_data as gen
from dev import toy_talk
from dev.toy_world import ATTRIBUTES, FRIENDS, KINDS, choice_item, expand, marked_item, marked_sheet, random_fact, story
from nanochat.core_bundle import load_tasks
from nanochat.core_eval import render_prompts
from tasks.spellingbee import is_test_word

PARQUET_COLUMNS = {
    "pretrain/shard_00000": ["text"], "pretrain/shard_00003": ["text"], "chat/train_00000": ["messages"],
    "chat/test": ["messages"], "tasks/gsm8k_train": ["question", "answer"], "tasks/gsm8k_test": ["question", "answer"],
    "tasks/mmlu_auxiliary_train": ["question", "subject", "choices", "answer"],
    "tasks/mmlu_test": ["question", "subject", "choices", "answer"],
    "tasks/mmlu_validation": ["question", "subject", "choices", "answer"],
    "tasks/mmlu_dev": ["question", "subject", "choices", "answer"],
    "tasks/arc_easy_train": ["id", "question", "choices", "answerKey"],
    "tasks/arc_easy_test": ["id", "question", "choices", "answerKey"],
    "tasks/arc_easy_validation": ["id", "question", "choices", "answerKey"],
    "tasks/arc_challenge_train": ["id", "question", "choices", "answerKey"],
    "tasks/arc_challenge_test": ["id", "question", "choices", "answerKey"],
    "tasks/arc_challenge_validation": ["id", "question", "choices", "answerKey"],
    "tasks/humaneval_test": ["task_id", "prompt", "canonical_solution", "test", "entry_point"],
}


@pytest.fixture(scope="module")
def mirror(tmp_path_factory):
    """A mirror a thirtieth of the real size."""
    root = tmp_path_factory.mktemp("toy")
    gen.write_mirror(root, seed=42, scale=0.03)
    return root


def rows(mirror, name):
    return pq.read_table(mirror / f"{name}.parquet").to_pylist()


def lines(mirror, name):
    return [json.loads(line) for line in (mirror / name).read_text(encoding="utf-8").splitlines()]


def words_of(text):
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


# -----------------------------------------------------------------------------
# The mirror as files


def test_every_table_is_there_with_the_hubs_columns(mirror):
    for name, columns in PARQUET_COLUMNS.items():
        table = pq.read_table(mirror / f"{name}.parquet")
        assert table.column_names == columns and table.num_rows > 0, name


def test_a_seed_gives_the_same_bytes_and_another_seed_other_ones(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        gen.write_mirror(tmp_path / folder, seed, scale=0.01)
    names = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    same = [(tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names]
    assert all(same) and len(same) > 20
    a, c = ((tmp_path / folder / "pretrain/shard_00000.parquet").read_bytes() for folder in "ac")
    assert a != c


def test_the_manifest_comes_last_and_its_hashes_are_those_of_the_files(mirror):
    manifest = json.loads((mirror / gen.MANIFEST).read_text(encoding="utf-8"))
    written = {str(path.relative_to(mirror)) for path in mirror.rglob("*") if path.is_file()}
    assert written == set(manifest["sha256"]) | {gen.MANIFEST}  # no temporary file is left either
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((mirror / name).read_bytes()).hexdigest() == digest
    newest = max(path.stat().st_mtime_ns for path in mirror.rglob("*") if path.is_file())
    assert (mirror / gen.MANIFEST).stat().st_mtime_ns == newest


def test_words_are_lower_case_three_to_nine_letters_and_distinct(mirror):
    words = (mirror / "words_alpha.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(words) == len(set(words)) == toy_talk.NUM_WORDS
    assert all(re.fullmatch("[a-z]{3,9}", word) for word in words)
    assert 0.05 < sum(map(is_test_word, words)) / len(words) < 0.15


def test_the_core_bundle_loads_and_its_answers_are_among_the_choices(mirror):
    tasks = load_tasks(mirror / "eval_bundle")
    assert {task.kind for task in tasks} == {"multiple_choice", "language_modeling", "schema"}
    for task in tasks:
        assert render_prompts(task, 0)
        assert all(0 <= row["gold"] < 4 for row in task.rows if "gold" in row)


# -----------------------------------------------------------------------------
# Held out: recomputed here from the files, with another normalization than the generator's


def choice_of(row):
    choices = row["choices"]
    return words_of(row["question"]), frozenset(choices["text"] if isinstance(choices, dict) else choices)


def choice_rows(mirror, name):
    return map(choice_of, rows(mirror, name))


@pytest.mark.parametrize("task", ["mmlu", "arc_easy", "arc_challenge"])
def test_no_multiple_choice_test_item_is_in_any_training_set(mirror, task):
    trained = {item for name in ("mmlu_auxiliary_train", "arc_easy_train", "arc_challenge_train")
               for item in choice_rows(mirror, f"tasks/{name}")}
    assert trained.isdisjoint(choice_rows(mirror, f"tasks/{task}_test"))
    assert trained.isdisjoint(choice_rows(mirror, f"tasks/{task}_validation"))


def test_no_choice_of_the_core_bundle_is_in_any_training_set():
    """At a fifth of the size: in a smaller mirror chance alone keeps them apart."""
    bundle, tables = gen.draw_questions(gen.Draws(42, scale=0.2))
    trained = {item for name in ("mmlu_auxiliary_train", "arc_easy_train", "arc_challenge_train")
               for item in map(choice_of, tables[f"tasks/{name}.parquet"])}
    asked = {(words_of(row["query"].removeprefix("Question: ")), frozenset(row["choices"]))
             for row in bundle["toy_choices"][-1]}
    assert asked and trained.isdisjoint(asked)


def test_no_multiple_choice_test_item_is_in_a_pretraining_quiz(mirror):
    quizzes = set()
    for shard in range(3):
        for row in rows(mirror, f"pretrain/shard_{shard:05d}"):
            for question, options in re.findall(r"^(.+)\n((?:- .+=[A-D]\n)+)Answer with", row["text"], re.MULTILINE):
                quizzes.add((words_of(question), frozenset(re.findall(r"- (.+)=[A-D]", options))))
    assert len(quizzes) > 100
    for task in ("mmlu", "arc_easy", "arc_challenge"):
        assert quizzes.isdisjoint(choice_rows(mirror, f"tasks/{task}_test"))


def test_no_word_problem_or_program_of_a_test_is_in_training_text(mirror):
    text = "\n".join(words_of(row["text"]) for shard in range(3) for row in rows(mirror, f"pretrain/shard_{shard:05d}"))
    trained = {words_of(row["question"]) for row in rows(mirror, "tasks/gsm8k_train")}
    told = [row for row in rows(mirror, "tasks/gsm8k_test") if len(row["question"]) > 40]  # not "2 plus 3?"
    assert len(told) > 5
    for row in told:
        assert words_of(row["question"]) not in trained and words_of(row["question"]) not in text
    chats = "\n".join(message["content"] for row in rows(mirror, "chat/train_00000") for message in row["messages"])
    for row in rows(mirror, "tasks/humaneval_test"):
        assert row["prompt"] not in chats and words_of(row["prompt"]) not in text


def test_no_identity_prompt_of_the_test_is_in_training(mirror):
    trained = {words_of(message["content"]) for chat in lines(mirror,
                                                              "identity_conversations.jsonl") for message in chat}
    trained |= {words_of(message["content"]) for row in rows(mirror, "chat/train_00000") for message in row["messages"]}
    assert trained.isdisjoint(words_of(row["messages"][0]["content"]) for row in lines(mirror,
                                                                                       "tasks/identity_test.jsonl"))


def test_no_chat_or_document_is_both_held_out_and_trained_on(mirror):
    chats = {json.dumps(row) for row in rows(mirror, "chat/train_00000")}
    assert chats.isdisjoint(json.dumps(row) for row in rows(mirror, "chat/test"))
    docs = [row["text"] for shard in range(3) for row in rows(mirror, f"pretrain/shard_{shard:05d}")]
    assert len(docs) == len(set(docs))
    assert set(docs).isdisjoint(row["text"] for row in rows(mirror, "pretrain/shard_00003"))


def test_pretraining_spells_no_test_word(mirror):
    text = "\n".join(row["text"] for shard in range(4) for row in rows(mirror, f"pretrain/shard_{shard:05d}"))
    spelled = re.findall(r"The word ([a-z]+) is spelled ([a-z ]+)\.", text)
    assert len(spelled) > 100
    assert all(" ".join(word) == letters and not is_test_word(word) for word, letters in spelled)
    assert all(total == str(letters.count(letter)) for letter, letters, total in
               ((letter, re.findall(r"[a-z]", along), re.findall(r"\d", along)[-1])
                for letter, along in re.findall(r"Counting ([a-z]): ([a-z0-9, ]+)\.", text)))


# -----------------------------------------------------------------------------
# Right answers


def test_word_problems_evaluate_to_what_they_say():
    for i in range(500):
        question, answer = toy_talk.word_problem(Random(i))
        calls = re.findall(r"<<(.+?)=(\d+)>>(\d+)", answer)
        for expression, result, copied in calls:
            assert eval(compile(ast.parse(expression, mode="eval"), "", "eval")) == int(result) == int(copied)
        assert answer.endswith(f"\n#### {calls[-1][1]}") and 0 < int(calls[-1][1]) <= 99
        numbers = set(re.findall(r"\d+", question)) | {result for _, result, _ in calls}
        assert all(set(re.findall(r"\d+", expression)) <= numbers for expression, _, _ in calls)  # only copied


def test_choices_are_four_and_exactly_one_is_right():
    """Checked against the table of facts, for every question that names a friend."""
    for i in range(500):
        subject, question, choices, answer = choice_item(Random(i), ["friends"])
        x = next(friend for friend in FRIENDS if re.search(rf"\b{friend}\b", question))
        value = getattr(x, subject)
        assert len(set(choices)) == 4
        assert [choice.split()[-1] == value for choice in choices] == [k == answer for k in range(4)]


def test_marks_say_yes_to_the_right_choice_alone_and_cannot_be_had_by_elimination():
    counts = Counter()
    for i in range(400):
        item = marked_item(Random(i), ["friends", "names"])
        _, question, choices, answer, _ = item
        first, *lines = marked_sheet([item]).split("\n")
        marks = dict(re.fullmatch(r"- (.+)=(yes|no)", line).groups() for line in lines)
        assert first == question and len(marks) == 3 and set(marks) < set(choices)
        assert all((mark == "yes") == (choice == choices[answer]) for choice, mark in marks.items())
        counts[Counter(marks.values())["yes"]] += 1
    assert 60 < counts[0] < 140 and counts[0] + counts[1] == 400  # a quarter has none that is right


def test_answers_stand_equally_often_at_each_letter():
    counts = Counter(choice_item(Random(i))[3] for i in range(2000))
    assert all(420 < counts[k] < 580 for k in range(4))


@pytest.mark.parametrize("field", ["name", "animal", "home", "job", "food", "thing"])
def test_no_two_friends_share_what_a_backward_question_asks_for(field):
    assert len({getattr(friend, field) for friend in FRIENDS}) == len(FRIENDS)


def test_a_word_is_of_one_kind_only():
    words = [word for kind in KINDS.values() for word in set(kind)]
    assert len(words) == len(set(words))


def test_programs_pass_their_own_checks():
    for i in range(50):
        row, space = toy_talk.small_program(Random(i)), {}
        exec(row["prompt"] + row["canonical_solution"] + row["test"], space)
        space["check"](space[row["entry_point"]])


def test_every_identity_answer_holds_an_accepted_phrase():
    for topic, (_, _, answers, accept) in toy_talk.IDENTITY.items():
        for answer in answers:
            assert any(phrase.lower() in answer.lower() for phrase in accept), topic


# -----------------------------------------------------------------------------
# Language


def test_expand_nests_choices_and_fills_fields():
    found = {expand("[a|b[c|]] {x.home}", Random(i), x=FRIENDS[0]) for i in range(50)}
    assert found == {"a mill", "bc mill", "b mill"}


def test_stories_are_whole_and_varied():
    stories = [story(Random(i)) for i in range(1000)]
    assert len(set(stories)) == 1000
    for text in stories:
        assert not re.search(r"[\[\]{}|]|\.\.|  | ,|\ba [aeiou]|\ban (?!hour)[^aeiou]", text), text
        assert text.count('"') % 2 == 0 and text[-1] in '.!"'
        assert all(re.match(r'[A-Z"]', sentence) for sentence in re.split(r'(?<=[.!?]) |\n', text)
                   if not re.match(r"(asked|said|cried|he|she)\b", sentence)), text


def test_a_story_asked_for_has_that_hero_and_no_one_twice():
    for i, friend in enumerate(FRIENDS * 5):
        names = re.findall("|".join(f.name for f in FRIENDS), story(Random(i), hero=friend))
        assert names[0] == friend.name and len(set(names)) <= 3


def test_every_fact_is_stated_in_pretraining(mirror):
    """At a thirtieth of the size each of the 96 facts about friends stands there as a sentence."""
    text = "\n".join(row["text"] for shard in range(3) for row in rows(mirror, f"pretrain/shard_{shard:05d}"))
    for friend in FRIENDS:
        for attribute, (form, statements, *_) in ATTRIBUTES.items():
            v = form.format(x=friend)
            assert sum(text.count(s.format(x=friend, v=v)[:-1]) for s in statements) >= 1, (friend.name, attribute)


def test_an_echo_sheet_can_be_known_from_its_first_readings(mirror):
    words = (mirror / "words_alpha.txt").read_text(encoding="utf-8").split()
    sheets = [toy_talk.echo_sheet(Random(i), words).split("\n") for i in range(100)]
    assert all(lines == [line for line in lines[::3] for _ in range(3)] and len(set(lines)) == 3 for lines in sheets)
    assert len({line for lines in sheets for line in lines}) == 300  # and nothing else tells what they say


def test_chats_alternate_and_end_with_the_assistant(mirror):
    for row in rows(mirror, "chat/train_00000"):
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message["content"].strip() for message in row["messages"])


def test_facts_are_asked_as_questions():
    assert all(random_fact(Random(i), ["friends", "names", "colours", "opposites"]).question.endswith("?")
               for i in range(300))
