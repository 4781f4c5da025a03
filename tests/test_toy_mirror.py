"""The toy world on disk: what `dev/gen_synthetic_data.py` writes is whole, the same for a seed, and held out well."""

import hashlib
import json
import re
import time

import pyarrow.parquet as pq
import pytest

from dev import gen_synthetic_data as gen
from dev.toyworld import problems, stories
from dev.toyworld.calculate import to_text
from dev.toyworld.draws import Draws
from dev.toyworld.grammar import Rng
from dev.toyworld.mirror import draw_bundle, draw_choices
from nanochat.core_bundle import load_tasks
from nanochat.core_eval import render_prompts
from tasks.common import check_messages
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
    """A mirror a fiftieth of the real size."""
    root = tmp_path_factory.mktemp("toy")
    gen.write_mirror(root, seed=42, scale=0.02)
    return root


def rows(mirror, name):
    return pq.read_table(mirror / f"{name}.parquet").to_pylist()


def lines(mirror, name):
    return [json.loads(line) for line in (mirror / name).read_text(encoding="utf-8").splitlines()]


def words_of(text):
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


# -----------------------------------------------------------------------------
# The mirror as files


def test_every_table_is_there_with_the_hubs_columns(mirror):
    for name, columns in PARQUET_COLUMNS.items():
        table = pq.read_table(mirror / f"{name}.parquet")
        assert table.column_names == columns and table.num_rows > 0, name


def test_a_seed_gives_the_same_bytes_and_another_seed_other_ones(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        gen.write_mirror(tmp_path / folder, seed, scale=0.005)
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


def test_the_whole_world_is_written_in_time():
    """A hundredth of everything takes less than a hundredth of forty seconds, here with room for a busy machine."""
    start = time.process_time()
    gen.draw_mirror(Draws(3, scale=0.01))
    assert time.process_time() - start < 2


def test_words_are_lower_case_and_distinct_and_some_are_held_out(mirror):
    words = (mirror / "words_alpha.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(words) == len(set(words)) > 3_000
    assert all(re.fullmatch("[a-z]{3,12}", word) for word in words)
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


def trained_choices(tables):
    names = ("mmlu_auxiliary_train", "arc_easy_train", "arc_challenge_train")
    return {item for name in names for item in tables(f"tasks/{name}")}


@pytest.mark.parametrize("task", ["mmlu", "arc_easy", "arc_challenge"])
def test_no_multiple_choice_test_item_is_in_any_training_set(mirror, task):
    trained = trained_choices(lambda name: choice_rows(mirror, name))
    assert trained.isdisjoint(choice_rows(mirror, f"tasks/{task}_test"))
    assert trained.isdisjoint(choice_rows(mirror, f"tasks/{task}_validation"))


def test_no_choice_of_the_core_bundle_is_in_any_training_set():
    """At a fifth of the size: in a smaller mirror chance alone keeps them apart."""
    draw = Draws(42, scale=0.2)
    bundle = draw_bundle(draw)
    tables = draw_choices(draw)
    trained = trained_choices(lambda name: map(choice_of, tables[f"{name}.parquet"]))
    asked = {(words_of(row["query"].removeprefix("Question: ")), frozenset(row["choices"]))
             for row in bundle["toy_choices"][-1]}
    assert asked and trained.isdisjoint(asked)


def test_no_multiple_choice_test_item_is_in_a_pretraining_quiz(mirror):
    quizzes = set()
    for shard in range(3):
        for row in rows(mirror, f"pretrain/shard_{shard:05d}"):
            for question, options in re.findall(r"^(.+)\n((?:- .+=[A-D]\n)+)Answer with", row["text"], re.MULTILINE):
                quizzes.add((words_of(question), frozenset(re.findall(r"- (.+)=[A-D]", options))))
    assert len(quizzes) > 10
    for task in ("mmlu", "arc_easy", "arc_challenge"):
        assert quizzes.isdisjoint(choice_rows(mirror, f"tasks/{task}_test"))


def user_messages(mirror):
    conversations = lines(mirror, "identity_conversations.jsonl")
    conversations += [row["messages"] for row in rows(mirror, "chat/train_00000")]
    for messages in conversations:
        for message in messages[::2]:
            yield to_text(message["content"])


def test_no_word_problem_of_a_test_is_in_training(mirror):
    trained = {words_of(row["question"]) for row in rows(mirror, "tasks/gsm8k_train")}
    trained |= set(map(words_of, user_messages(mirror)))
    documents = [row["text"] for shard in range(3) for row in rows(mirror, f"pretrain/shard_{shard:05d}")]
    read = "\n".join(words_of(line) for text in documents for line in text.split("\n"))
    for row in rows(mirror, "tasks/gsm8k_test"):
        question = words_of(row["question"])
        assert question not in trained
        assert f"\n{question}\n" not in read


def test_no_identity_prompt_of_the_test_is_in_training(mirror):
    trained = set(map(words_of, user_messages(mirror)))
    asked = {words_of(row["messages"][0]["content"]) for row in lines(mirror, "tasks/identity_test.jsonl")}
    assert asked and trained.isdisjoint(asked)


def test_no_chat_or_document_is_both_held_out_and_trained_on(mirror):
    chats = {json.dumps(row) for row in rows(mirror, "chat/train_00000")}
    assert chats.isdisjoint(json.dumps(row) for row in rows(mirror, "chat/test"))
    documents = [row["text"] for shard in range(3) for row in rows(mirror, f"pretrain/shard_{shard:05d}")]
    assert len(documents) == len(set(documents))
    assert set(documents).isdisjoint(row["text"] for row in rows(mirror, "pretrain/shard_00003"))


def test_training_spells_no_test_word(mirror):
    read = "\n".join(row["text"] for shard in range(4) for row in rows(mirror, f"pretrain/shard_{shard:05d}"))
    for row in rows(mirror, "chat/train_00000"):
        read += "\n".join(to_text(message["content"]) for message in row["messages"])
    spelled = re.findall(r"The word ([a-z]+) is spelled ([a-z](?: [a-z])*)\.", read)
    assert len(spelled) > 500
    assert all(" ".join(word) == letters and not is_test_word(word) for word, letters in spelled)


def test_the_test_split_has_names_things_animals_and_words_of_its_own():
    for pool in (problems.NAMES, problems.THINGS, stories.ANIMALS, stories.PEOPLE, stories.OBJECTS):
        assert len(pool.test) >= 3 and set(pool.test).isdisjoint(pool.train)
    told = set()
    for i in range(200):
        rng = Rng(i)
        rng.split = "test"
        told.add(problems.draw_problem(rng).question)
    names = "|".join(name for name in problems.NAMES.train)
    assert not any(re.search(rf"\b({names})\b", question) for question in told)


def test_conversations_alternate_and_end_with_the_model(mirror):
    for name in ("chat/train_00000", "chat/test"):
        for row in rows(mirror, name):
            assert check_messages(row["messages"], name)
            roles = [message["role"] for message in row["messages"]]
            assert roles == ["user", "assistant"] * (len(roles) // 2)
            assert all(to_text(message["content"]).strip() for message in row["messages"])
