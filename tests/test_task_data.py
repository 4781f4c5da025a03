"""Where the rows of the tasks come from and what a bad one says; the words; and real data, if NANOCHAT_DATA_DIR is."""

import doctest
import gzip
import json
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from nanochat.calculator import use_calculator
from nanochat.common import UserError
from nanochat.conversation import normalize_messages
from tasks import customjson
from tasks.arc import ARC
from tasks.customjson import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import COUNT_PHRASES, SPELL_PHRASES, SimpleSpelling, SpellingBee, is_test_word

needs_real = pytest.mark.skipif(not os.environ.get("NANOCHAT_DATA_DIR"), reason="NANOCHAT_DATA_DIR is not set")

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CHAT = [USER, ASSISTANT]
SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """An empty mirror."""
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "chat").mkdir()
    return tmp_path


def write_rows(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)


# -----------------------------------------------------------------------------
# Parquet files


def test_the_files_of_a_mirror_are_read_in_order(mirror):
    for i in (1, 0):
        chats = [{"messages": [{"role": "user", "content": f"{i}{j}"}, ASSISTANT]} for j in range(2)]
        write_rows(mirror / f"chat/train_0000{i}.parquet", chats)
    assert [c["messages"][0]["content"] for c in SmolTalk()] == ["00", "01", "10", "11"]


def test_a_bad_conversation_is_named_by_file_row_and_field(mirror):
    write_rows(mirror / "chat/train_00000.parquet", [{"messages": CHAT}] * 3)
    write_rows(mirror / "chat/train_00001.parquet", [{"messages": CHAT}, {"messages": [USER, USER]}])
    with pytest.raises(UserError, match="train_00001.parquet, row 1: the assistant says nothing that could be learned"):
        SmolTalk()[4]


def test_a_file_that_the_mirror_lacks_is_named(mirror):
    with pytest.raises(UserError, match="has no tasks/gsm8k_test.parquet"):
        GSM8K(split="test")


def test_a_column_that_a_file_lacks_is_named(mirror):
    write_rows(mirror / "tasks/gsm8k_train.parquet", [{"question": "q", "solution": "#### 1"}])
    with pytest.raises(UserError, match="gsm8k_train.parquet has no column 'answer'; it has question, solution"):
        GSM8K()


def test_a_value_of_the_wrong_type_is_named(mirror):
    write_rows(mirror / "tasks/gsm8k_train.parquet", [{"question": "q", "answer": None}])
    with pytest.raises(UserError, match="gsm8k_train.parquet, row 0, field answer: got None, need str"):
        GSM8K()[0]


@pytest.mark.parametrize("row", [{"choices": ["x"], "answer": 0}, {"choices": ["w", "x", "y", "z"], "answer": 4}])
def test_a_question_without_its_answer_is_named(mirror, row):
    write_rows(mirror / "tasks/mmlu_test.parquet", [{"question": "q", "subject": "s"} | row])
    with pytest.raises(UserError, match="mmlu_test.parquet, row 0: need 4 choices"):
        MMLU("all")[0]


def test_a_torn_file_is_named(mirror):
    write_rows(mirror / "tasks/gsm8k_train.parquet", [{"question": "q", "answer": "#### 1"}])
    path = mirror / "tasks/gsm8k_train.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="gsm8k_train.parquet is not a whole parquet file"):
        GSM8K()


# -----------------------------------------------------------------------------
# JSONL files


def write_lines(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_a_line_is_a_list_or_an_object_with_messages(tmp_path):
    call = {"role": "assistant", "content": [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}]}
    path = write_lines(tmp_path / "a.jsonl", CHAT, "", {"messages": [SYSTEM, *CHAT], "id": 7}, [USER, call, USER, call])
    task = CustomJSON(path)
    assert [c["messages"] for c in task] == [CHAT, [SYSTEM, *CHAT], [USER, call, USER, call]]
    assert len(CustomJSON(path, start=1)) == 2


def test_memory_holds_the_messages_and_not_what_is_around_them(tmp_path):
    """Not the whole rows of a file, even while it is read."""
    rows = ({"messages": CHAT, "source": "x" * 20_000 + str(i)} for i in range(500))
    path = write_lines(tmp_path / "a.jsonl", *rows)
    tracemalloc.start()
    task = CustomJSON(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(task) == 500
    assert peak < path.stat().st_size / 3


def test_a_line_ends_where_json_says_not_where_unicode_does(tmp_path):
    chat = [USER, {"role": "assistant", "content": "one\u2028two\u0085three"}]
    (tmp_path / "a.jsonl").write_text(json.dumps(chat, ensure_ascii=False) + "\n", encoding="utf-8")
    assert CustomJSON(tmp_path / "a.jsonl")[0]["messages"] == chat


def test_the_examples_in_the_docstrings_of_customjson_are_right():
    assert doctest.testmod(customjson) == (0, 3)


def test_without_a_path_it_is_the_identity_file_of_the_mirror(mirror):
    write_lines(mirror / "identity_conversations.jsonl", CHAT)
    assert CustomJSON()[0] == {"messages": CHAT}


SHAPES = {
    "messages": ({"messages": CHAT, "id": 7}, CHAT),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, CHAT),
    "ShareGPT, with tools": (
        {"system": "Be brief.", "conversations": [
            {"from": "human", "value": "2+3?"}, {"from": "function_call", "value": "add(2, 3)"},
            {"from": "observation", "value": "5"}, {"from": "gpt", "value": "5."}]},
        [SYSTEM, {"role": "user", "content": "2+3?"}, {"role": "assistant", "content": "add(2, 3)"},
         {"role": "tool", "content": "5"}, {"role": "assistant", "content": "5."}]),
    "ShareGPT, role and content": ({"conversations": CHAT}, CHAT),
    "prompt and completion": ({"prompt": "Hi", "completion": "Hello"}, CHAT),
    "prompt and completion, lists": (
        {"prompt": [SYSTEM, *CHAT, USER], "completion": [ASSISTANT]},
        [SYSTEM, USER, {**ASSISTANT, "weight": 0}, USER, ASSISTANT]),
    "instruction": ({"instruction": "Hi", "output": "Hello"}, CHAT),
    "instruction and input": (
        {"instruction": "Add.", "input": "2+3", "output": "5", "history": [["Hi", "Hello"]], "system": "Be brief."},
        [SYSTEM, *CHAT, {"role": "user", "content": "Add.\n\n2+3"}, {"role": "assistant", "content": "5"}]),
    "instruction and empty input": ({"instruction": "Hi", "input": "", "output": "Hello", "system": None}, CHAT),
}


@pytest.mark.parametrize("row, messages", SHAPES.values(), ids=SHAPES.keys())
def test_the_shapes_of_files_to_train_on(tmp_path, row, messages):
    (rows,) = CustomJSON(write_lines(tmp_path / "a.jsonl", row))
    assert normalize_messages(rows["messages"]) == normalize_messages(messages)


def test_conversations_come_from_every_kind_of_file(tmp_path):
    rows = [{"messages": CHAT}, {"messages": [SYSTEM, *CHAT, {"role": "user", "content": "Bye"}]}]
    lines = "\n".join(map(json.dumps, rows)).encode()
    array = json.dumps(rows, indent=1).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "a.JSONL.zst").write_bytes(zstandard.ZstdCompressor().compress(lines))
    (tmp_path / "a.json").write_bytes(array)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(array))
    (tmp_path / "lines.json").write_bytes(lines)
    write_rows(tmp_path / "a.parquet", rows)
    for path in sorted(tmp_path.iterdir()):
        read = [conversation["messages"] for conversation in CustomJSON(path)]
        assert [normalize_messages(messages) for messages in read] == [
            normalize_messages(row["messages"]) for row in rows], path


def test_a_column_of_json_in_parquet_holds_messages(tmp_path):
    """As DuckDB writes what it has read as JSON."""
    if not hasattr(pa, "json_"):
        pytest.skip("this pyarrow cannot write a column of JSON")
    column = pa.array([json.dumps(CHAT)]).cast(pa.json_())
    pq.write_table(pa.table({"messages": column}), tmp_path / "a.parquet")
    assert CustomJSON(tmp_path / "a.parquet")[0]["messages"] == CHAT


@pytest.mark.parametrize("first, fields", [
    ({"question": "q", "answer": "a"}, "the fields question, answer"), ({"text": "a"}, "the fields text"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "the fields prompt, chosen, rejected"),
    (7, "a value of type int"), ({}, "no fields")])
def test_a_file_of_another_shape_is_named_as_such(tmp_path, first, fields):
    path = write_lines(tmp_path / "a.jsonl", first, first)
    with pytest.raises(UserError) as caught:
        CustomJSON(path)
    assert str(caught.value) == (
        f"{path} holds rows of another shape: {fields}\nhint: needed: rows with messages, or conversations, or prompt "
        "and completion, or instruction and output")


@pytest.mark.parametrize("line, message", [
    ("7", "line 2: a value of type int, needed: rows with messages"), ("{}", "line 2: no fields, needed"),
    ({"messages": None}, "line 2: the fields messages, needed"),
    ([], "line 2: messages need to be a non-empty list"), ([USER], "line 2: the assistant says nothing that could be"),
    ([USER, {**ASSISTANT, "weight": 0}], "the assistant says nothing"), ([USER, {**ASSISTANT, "content": ""}], "says"),
    (["hi", "ho"], "line 2: message 0 needs a role"), ([USER, {"role": "bot", "content": "a"}], "message 1 needs a"),
    ([USER, {"role": "assistant"}], "line 2: message 1 has no content"),
    ([{"role": "user", "content": 3}, ASSISTANT], "line 2: message 0 has content of type int"),
    ([{"role": "user", "content": [{"type": "python", "text": "1"}]}, ASSISTANT], r"message 0 \(user\) needs a type"),
    ({"conversations": [{"from": "human"}]}, r"line 2: the fields conversations in another form \(KeyError"),
    ({"conversations": [{"from": "bot", "value": "a"}]}, "line 2: message 0 needs a role"),
    ({"prompt": 3, "completion": "a"}, "the fields prompt, completion in another form"),
    ({"instruction": "a", "output": "b", "history": ["ab", "c"]}, "the fields instruction, output, history in another"),
    ({"messages": CHAT, "tools": [{"name": "add"}]}, "line 2: the field tools is not supported"),
])
def test_a_bad_line_is_named_by_file_line_and_message(tmp_path, line, message):
    with pytest.raises(UserError, match=r"1 of 2 conversations cannot be used: .*a\.jsonl, .*" + message):
        CustomJSON(write_lines(tmp_path / "a.jsonl", CHAT, line))


def test_all_bad_lines_are_counted_and_the_first_named(tmp_path):
    with pytest.raises(UserError) as caught:
        CustomJSON(write_lines(tmp_path / "a.jsonl", *[[USER]] * 5, CHAT))
    text = str(caught.value)
    assert "5 of 6 conversations cannot be used" in text and "line 3: " in text and "line 4: " not in text


def test_a_line_that_is_not_json_is_named(tmp_path):
    with pytest.raises(UserError, match="a.jsonl, line 2: not JSON"):
        CustomJSON(write_lines(tmp_path / "a.jsonl", CHAT, "{"))
    (tmp_path / "b.jsonl").write_bytes(b'[{"role": "caf\xe9"}]')
    with pytest.raises(UserError, match="b.jsonl, line 1: not UTF-8 text"):
        CustomJSON(tmp_path / "b.jsonl")


def test_a_missing_or_empty_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no file of conversations at .*none.jsonl"):
        CustomJSON(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="holds no conversation"):
        CustomJSON(write_lines(tmp_path / "a.jsonl", "", ""))


# -----------------------------------------------------------------------------
# Words


@pytest.fixture
def words(mirror):
    """200 words with a vowel after each consonant, and some that are no words to ask about."""
    vowels, consonants = "aeiou", "bdfglmnprt"
    words = [c + v + d + "e" for c in consonants for v in vowels[:4] for d in consonants[:5]]
    write_lines(mirror / "words_alpha.txt", *words, "it", "A1", "don't", "élan", "", "x" * 16)
    return set(words)


def parts_of(conversation):
    return [part["text"] for part in conversation["messages"][1]["content"]]


def word_and_letter(conversation):
    word, letter = parts_of(conversation)[1].split(".count")
    return word.strip('"'), letter.strip('()"')


def test_no_word_is_in_both_splits(words):
    seen = {split: {word_and_letter(c)[0] for c in SpellingBee(2000, split)} for split in ("train", "test")}
    spelled = {split: {c["messages"][1]["content"].split()[2] for c in SimpleSpelling(2000, split)} for split in seen}
    assert seen["train"] | seen["test"] == words == spelled["train"] | spelled["test"]
    assert not (seen["train"] | spelled["train"]) & (seen["test"] | spelled["test"])
    assert all(is_test_word(word) for word in seen["test"])


def test_the_count_is_what_the_calculator_says(words):
    for conversation in SpellingBee(300):
        _, call, output, answer = parts_of(conversation)
        word, letter = word_and_letter(conversation)
        assert use_calculator(call) == output == answer.removeprefix("\n#### ") == str(word.count(letter))


def test_the_count_by_hand_is_right_at_every_letter(words):
    for conversation in SpellingBee(300):
        word, letter = word_and_letter(conversation)
        steps = parts_of(conversation)[0].split("Counting ")[1].split(": ")[1].split(".\n")[0].split(", ")
        assert [step[0] for step in steps] == list(word)
        assert [int(step[2:]) for step in steps] == [word[: i + 1].count(letter) for i in range(len(word))]


def test_a_larger_task_begins_as_a_smaller_one(words):
    assert list(SpellingBee(50)) == list(SpellingBee(100, stop=50))
    assert list(SpellingBee(50)) != list(SpellingBee(50, "test"))


def test_the_answer_to_a_spelling_task_is_graded(words):
    bee, spelling = SpellingBee(1), SimpleSpelling(1)
    answer = int(parts_of(bee[0])[2])
    assert bee.evaluate(bee[0], f"It has\n#### {answer}.") and not bee.evaluate(bee[0], f"#### {answer + 1}")
    right = spelling[0]["messages"][1]["content"]
    assert spelling.evaluate(spelling[0], right + "\n") and not spelling.evaluate(spelling[0], right[:-2])


def test_questions_are_phrased_in_many_ways(words):
    assert len(set(COUNT_PHRASES)) == len(COUNT_PHRASES) > 50 and len(set(SPELL_PHRASES)) == len(SPELL_PHRASES)
    for phrase in COUNT_PHRASES:  # both are named in every one
        assert "Q" in phrase.format(word="Q", letter="") and "Q" in phrase.format(word="", letter="Q")
    assert len({c["messages"][0]["content"] for c in SpellingBee(300)}) > 250


def test_a_list_without_words_is_an_error(mirror):
    write_lines(mirror / "words_alpha.txt", "it", "is")
    with pytest.raises(UserError, match="no words for the train split"):
        SpellingBee()


def test_a_mirror_without_a_list_says_what_to_put_there(mirror):
    with pytest.raises(UserError, match="has no words_alpha.txt"):
        SimpleSpelling()


# -----------------------------------------------------------------------------
# Real data


@needs_real
@pytest.mark.slow
@pytest.mark.parametrize("train, test", [
    (lambda: GSM8K(), lambda: GSM8K(split="test")), (lambda: MMLU(), lambda: MMLU("all")),
    (lambda: ARC(), lambda: ARC(split="test")), (lambda: SmolTalk(), lambda: SmolTalk("test"))])
def test_real_splits_share_no_conversation(train, test):
    train, test = ({json.dumps(c["messages"]) for c in task()} for task in (train, test))
    assert len(test) > 400 and not train & test


@needs_real
@pytest.mark.slow
def test_every_real_solution_is_graded_as_right():
    for task in (GSM8K(), GSM8K(split="test"), ARC(), ARC("ARC-Challenge", "test"), MMLU("all"), MMLU(),
                 HumanEval(), SpellingBee(split="test"), SimpleSpelling()):
        for conversation in task:
            content = conversation["messages"][1]["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            assert task.reward(conversation, text) == 1.0
