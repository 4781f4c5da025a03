"""CORE: the words that are asked, the tokens that count, the sums, and models whose score is known beforehand."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from nanochat.common import compute_cleanup, compute_init
from nanochat.core_bundle import CoreTask
from nanochat.core_eval import (
    Row,
    cut_row,
    evaluate_core,
    evaluate_task,
    make_rows,
    num_common_prefix,
    pick_fewshot,
    pick_questions,
    render_prompts,
    score_rows,
)

CPU, V = torch.device("cpu"), 257
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
KINDS = ["multiple_choice", "schema", "language_modeling"]


class Bytes:
    """A tokenizer of bytes: 0..255, and 256 = <|bos|>."""

    def get_bos_token_id(self):
        return 256

    def __call__(self, texts, prepend):
        return [[prepend, *text.encode()] for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def make_task(kind, num_rows=24, num_fewshot=2, num_options=4, delimiter=" "):
    """Questions whose right answer is the option with a `!`; right options take all places equally often."""
    rows = []
    for i in range(num_rows):
        gold = i % num_options
        options = [f"{'!' if o == gold else '?'}{chr(97 + o)}{'z' * (o + i % 3)}" for o in range(num_options)]
        rows.append({"multiple_choice": {"query": f"Q{i}:", "choices": options, "gold": gold},
                     "schema": {"context_options": options, "continuation": f"then {i}", "gold": gold},
                     "language_modeling": {"context": f" Q{i}: ", "continuation": f"answer {i}"}}[kind])
    return CoreTask(f"toy_{kind}", kind, rows, num_fewshot, delimiter, 0 if kind == KINDS[2] else 1 / num_options)


def uniform_model(ids):
    return torch.zeros(*ids.shape, V)


def random_model(ids):
    """Causal, and different everywhere: the logits depend on the last id and on the sum of all ids so far."""
    return TABLE[ids] + TABLE[0] * (ids.cumsum(1) % 97)[..., None] / 40


def oracle_model(task):
    """Knows every prompt of the task that is right by heart: it gives its next byte all the weight."""
    successors = {}
    for index in range(len(task.rows)):
        text = render_prompts(task, index)[task.rows[index].get("gold", 0)]
        ids = [256, *text.encode()]
        for end in range(1, len(ids)):
            successors[tuple(ids[:end])] = ids[end]

    def model(ids):
        logits = torch.zeros(*ids.shape, V)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                logits[b, t, successors.get(tuple(row[:t + 1]), 0)] = 30.0
        return logits

    return model


def ask(task, model=random_model, max_seq_len=10_000, **kwargs):
    return evaluate_task(model, Bytes(), CPU, task, max_seq_len=max_seq_len, **kwargs)


# -----------------------------------------------------------------------------
# Words


@pytest.mark.parametrize("kind, texts", [
    ("multiple_choice", ["Q1:\nAnswer: !bzz\n\nQ0:\nAnswer: !a", "Q1:\nAnswer: !bzz\n\nQ0:\nAnswer: ?bz"]),
    ("schema", ["!bzz\nAnswer: then 1\n\n!a\nAnswer: then 0", "!bzz\nAnswer: then 1\n\n?bz\nAnswer: then 0"]),
    ("language_modeling", ["Q1:\nAnswer: answer 1\n\nQ0:\nAnswer: answer 0", "Q1:\nAnswer: answer 1\n\nQ0:\nAnswer:"]),
])
def test_prompt_is_solved_examples_then_the_question_with_each_option(kind, texts):
    task = make_task(kind, num_rows=2, num_options=2, num_fewshot=1, delimiter="\nAnswer: ")
    assert render_prompts(task, 0) == texts


def test_language_modeling_asks_without_space_at_the_end():
    task = make_task("language_modeling", num_fewshot=0)
    assert render_prompts(task, 5) == ["Q5: answer 5", "Q5:"]


@pytest.mark.parametrize("kind", KINDS)
def test_fewshot_examples_never_hold_the_question_or_its_twin(kind):
    task = make_task(kind, num_rows=12, num_fewshot=5)
    twins = CoreTask(task.label, kind, task.rows * 2, 5, " ", 0)  # every question stands there twice
    for index in range(24):
        shots = pick_fewshot(twins, index)
        assert len(set(shots)) == 5 and all(twins.rows[i] != twins.rows[index] for i in shots)


def test_fewshot_examples_differ_between_questions_and_tasks():
    task = make_task("schema", num_rows=200)
    assert len({tuple(pick_fewshot(task, i)) for i in range(50)}) > 40
    other = replace(task, label="other")
    assert [pick_fewshot(task, i) for i in range(9)] != [pick_fewshot(other, i) for i in range(9)]


def test_a_pool_smaller_than_the_shots_gives_what_it_has():
    task = make_task("multiple_choice", num_rows=3, num_fewshot=10)
    assert sorted(pick_fewshot(task, 1)) == [0, 2]


def test_limit_asks_a_part_of_the_questions_in_the_same_words():
    task = make_task("multiple_choice", num_rows=60)
    _, everything = ask(task)
    result, some = ask(task, max_per_task=7)
    assert result["n"] == 7 and all(record in everything for record in some)
    assert pick_questions(task, 7) == pick_questions(task, 20)[:7] and sorted(pick_questions(task)) == list(range(60))


# -----------------------------------------------------------------------------
# Tokens


@pytest.mark.parametrize("sequences, expected", [
    ([[1, 2, 3], [1, 2, 4]], 2), ([[1], [2]], 0), ([[1, 2], [1, 2, 3]], 2), ([[1, 2], [1, 2]], 2), ([[5]], 1),
    ([[], [1]], 0),
])
def test_common_prefix(sequences, expected):
    assert num_common_prefix(sequences) == expected


@pytest.mark.parametrize("kind, sequences, starts", [
    ("multiple_choice", [[9, 1, 2, 3], [9, 1, 2, 4, 5]], [3, 3]),
    ("multiple_choice", [[9, 1, 2], [9, 1, 2, 4]], [2, 2]),   # one option begins the other: both keep a token
    ("multiple_choice", [[9, 1], [9, 1]], [1, 1]),            # the same option twice
    ("schema", [[9, 1, 2, 7, 8], [9, 3, 7, 8]], [3, 2]),
    ("schema", [[9, 7, 8], [9, 7, 8]], [1, 1]),
    ("language_modeling", [[9, 1, 2, 3], [9, 1]], [2]),
    ("language_modeling", [[9, 1, 5, 3], [9, 1, 2]], [2]),    # the seam's tokens join: 5 = 2 and the next word
    ("language_modeling", [[9, 1, 2], [9, 1, 2]], [2]),       # an empty continuation
])
def test_spans(kind, sequences, starts):
    assert [row.start for row in make_rows(kind, sequences)] == starts


def test_a_long_row_loses_ids_after_bos_and_keeps_its_span():
    row = Row([256, 1, 2, 3, 4, 5], start=4)
    assert cut_row(row, 5) == (row, False)  # the last id is no input, so 6 ids need 5 places
    assert cut_row(row, 3) == (Row([256, 3, 4, 5], start=2), True)
    assert cut_row(row, 1) == (Row([256, 5], start=1), True)


def test_truncation_is_counted_and_the_model_never_sees_too_much():
    seen = []

    def model(ids):
        seen.append(ids.size(1))
        return random_model(ids)

    task = make_task("language_modeling")
    lengths = [len(render_prompts(task, i)[0]) for i in range(24)]  # bos in front, the last id no input: as many
    limit = sorted(lengths)[12]
    result, records = ask(task, model, max_seq_len=limit)
    assert result["truncated"] == sum(length > limit for length in lengths) > 0 and max(seen) == limit
    assert [record["truncated"] for record in records] == [length > limit for length in lengths]


def test_score_is_the_mean_loss_of_the_span_and_what_greedy_decoding_says():
    row = Row([256, 5, 6, 7], start=2)
    loss, greedy = score_rows(random_model, [row], CPU, 100)[0]
    logits = random_model(torch.tensor([row.ids]))[0]
    expected = -(logits[1].log_softmax(0)[6] + logits[2].log_softmax(0)[7]) / 2
    assert loss == pytest.approx(expected.item(), abs=1e-5)
    assert greedy == [logits[1].argmax().item(), logits[2].argmax().item()]


# -----------------------------------------------------------------------------
# Models whose score is known


@pytest.mark.parametrize("kind", KINDS)
def test_an_oracle_is_always_right(kind):
    task = make_task(kind)
    result, records = ask(task, oracle_model(task))
    assert result["accuracy"] == 1 and result["centered"] == 1 and result["stderr"] == 0
    assert [record["index"] for record in records] == list(range(24))


def test_an_oracle_of_other_questions_is_wrong():
    task, other = make_task("language_modeling", num_fewshot=0), make_task("language_modeling", 100, num_fewshot=0)
    other.rows[:24] = other.rows[24:48]
    assert ask(task, oracle_model(other))[0]["accuracy"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_knows_nothing_is_at_zero(kind):
    task = make_task(kind, num_rows=40)
    result, _ = ask(task, uniform_model)  # all options alike: the first is taken, right in 1 of 4
    assert result["centered"] == result["centered_guess"] == pytest.approx(0) and result["n"] == 40


def test_core_is_the_mean_of_centred_accuracies_with_its_error():
    tasks = [make_task(kind) for kind in KINDS]
    oracle, seen = oracle_model(tasks[0]), []
    core = evaluate_core(oracle, Bytes(), CPU, tasks, max_seq_len=10_000,
                         on_task=lambda result, records: seen.append((result["task"], len(records))))
    centered = [(r["accuracy"] - t.baseline) / (1 - t.baseline) for r, t in zip(core["tasks"], tasks, strict=True)]
    errors = [(r["accuracy"] * (1 - r["accuracy"]) / 24) ** 0.5 / (1 - t.baseline)
              for r, t in zip(core["tasks"], tasks, strict=True)]
    assert core["core"] == pytest.approx(sum(centered) / 3) and centered[0] == 1 and core["n"] == 72
    assert core["stderr"] == pytest.approx(sum(error**2 for error in errors) ** 0.5 / 3)
    assert seen == [(task.label, 24) for task in tasks]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_a_batch_do_not_change_results(kind):
    task = make_task(kind)
    assert ask(task, batch_tokens=1)[1] == ask(task, batch_tokens=400)[1] == ask(task, batch_tokens=10**6)[1]


def test_options_of_one_token_share_a_forward_pass():
    inputs = []

    def model(ids):
        inputs.extend(ids.tolist())
        return random_model(ids)

    rows = [{"query": f"{i}", "choices": list("ABCD"), "gold": 0} for i in range(5)]
    ask(CoreTask("letters", "multiple_choice", rows, 0, " ", 0.25), model)
    assert len(inputs) == 5


def _rank(rank, world, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    compute_init("cpu")
    result, records = ask(make_task("schema", num_rows=7), max_per_task=5)
    Path(folder, f"{rank}.json").write_text(json.dumps([result["accuracy"], records]), "utf-8")
    compute_cleanup()


@pytest.mark.slow  # two processes that import torch
def test_ranks_share_the_questions_and_agree_with_one_rank(tmp_path):
    port = random.Random(os.getpid()).randrange(20_000, 60_000)
    mp.spawn(_rank, args=(2, port, tmp_path), nprocs=2)
    result, records = ask(make_task("schema", num_rows=7), max_per_task=5)
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text("utf-8")) == [result["accuracy"], records]
