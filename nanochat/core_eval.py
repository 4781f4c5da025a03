"""
The CORE metric of the DCLM paper (arXiv 2406.11794): 22 tasks for a base model, of three kinds.

    multiple_choice      one context, several continuations: which has the lowest loss per token?
    schema               several contexts, one continuation: after which does it have the lowest
                         loss per token?
    language_modeling    one context, one continuation: does greedy decoding produce exactly it?

A task's accuracy is centred, (accuracy - baseline) / (1 - baseline), so that guessing is 0 and
perfection 1. CORE is the mean over the tasks. For two tasks the baseline is above chance (boolq
62%, commonsense_qa 40.3%). So the CORE of guessing is -0.026; it is printed beside the model's.

Few-shot examples are drawn for each question, from a seed of its own. So they are the same for any
number of questions, ranks and rows in a batch. Left out: jeopardy's average over the categories of
its questions.

core_bundle.py reads the tasks.
"""

import math
import random
import time
from dataclasses import dataclass
from itertools import chain, islice

import torch
import torch.nn.functional as F

from nanochat.distributed import gather_objects, rank, world_size
from nanochat.progress import show_progress

CHUNK_QUESTIONS = 256  # sorted by length at a time: enough for even batches, little to hold

# -----------------------------------------------------------------------------
# Text: which questions, which examples, which prompts


def pick_questions(task, max_per_task=-1):
    """
    Row numbers to ask: all, or the first ones of a shuffle that depends only on the task's name.
    """
    # one order of all rows, so that a larger number includes a smaller
    num_rows = len(task.rows)
    order = random.Random(task.label).sample(range(num_rows), num_rows)
    return order[:max_per_task] if max_per_task > 0 else order


def pick_fewshot(task, index):
    """
    Row numbers of the solved examples of question `index`: never the question, nor an equal row.
    """
    num_rows = len(task.rows)
    # four times as many as needed: enough to step over duplicates of the question
    num_drawn = min(num_rows, 4 * (task.num_fewshot + 1))
    drawn = random.Random(f"{task.label}:{index}").sample(range(num_rows), num_drawn)
    question = task.rows[index]
    others = [i for i in drawn if task.rows[i] != question]
    return others[: task.num_fewshot]  # a small task gives all it has


def get_options(row, kind):
    """The (context, continuation) pairs of a row: one per option; one for language modeling."""
    if kind == "multiple_choice":
        return [(row["query"], choice) for choice in row["choices"]]
    if kind == "schema":
        return [(context, row["continuation"]) for context in row["context_options"]]
    return [(row["context"].strip(), row["continuation"])]


def render_prompts(task, index):
    """
    The texts of question `index`, one per option, each ending in its continuation. The solved
    examples come first, with a blank line after each, then the question.

    Language modeling gets a second text, without the continuation. It does not end in white space,
    because a space belongs to the token of the word after it.
    """
    # the solved examples
    shots = ""
    for i in pick_fewshot(task, index):
        row = task.rows[i]
        context, continuation = get_options(row, task.kind)[row.get("gold", 0)]
        shots += f"{context}{task.delimiter}{continuation}\n\n"

    # the question
    texts = []
    options = get_options(task.rows[index], task.kind)
    for context, continuation in options:
        texts.append(f"{shots}{context}{task.delimiter}{continuation}")
    if task.kind == "language_modeling":
        context, _ = options[0]
        texts.append(f"{shots}{context}{task.delimiter}".rstrip())
    return texts


# -----------------------------------------------------------------------------
# Tokens: which of them count


@dataclass(frozen=True)
class Row:
    """
    A sequence for the model. Its loss counts on ids[start:]. The last id is a target, never an
    input.
    """
    ids: list   # of token ids, <|bos|> first
    start: int  # >= 1

    @property
    def inputs(self):
        return tuple(self.ids[:-1])

    @property
    def targets(self):
        return self.ids[self.start :]


def num_common_prefix(sequences):
    """How many leading ids all sequences share: num_common_prefix([[1, 2, 3], [1, 2, 4]]) == 2."""
    num_same = 0
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        num_same += 1
    return num_same


def make_rows(kind, sequences):
    """
    The token ids of `render_prompts`' texts -> Rows. Each has at least one id before its start and
    one after.
    """
    # an option may be the beginning of another, or the same
    longest_start = min(map(len, sequences)) - 1
    if kind == "multiple_choice":  # from where the options differ
        start = min(num_common_prefix(sequences), longest_start)
        return [Row(ids, start) for ids in sequences]
    if kind == "schema":           # from where they are the same up to the end
        backwards = [ids[::-1] for ids in sequences]
        num_shared = min(num_common_prefix(backwards), longest_start)
        return [Row(ids, len(ids) - num_shared) for ids in sequences]
    # language modeling: a token may hold the end of the context and the start of the continuation,
    # so all ids count that differ from those of the context alone
    full, context = sequences
    start = min(num_common_prefix([full, context]), len(full) - 1)
    return [Row(full, start)]


def cut_row(row, max_seq_len):
    """
    Drop ids right after <|bos|> until the row fits into the model. Returns (row, whether it was
    cut).
    """
    num_dropped = len(row.ids) - 1 - max_seq_len
    if num_dropped <= 0:
        return row, False
    ids = row.ids[:1] + row.ids[num_dropped + 1 :]
    return Row(ids, max(1, row.start - num_dropped)), True


# -----------------------------------------------------------------------------
# The forward passes


@torch.no_grad()
def score_rows(model, rows, device, batch_tokens):
    """
    For each row: (mean loss over its targets, ids that greedy decoding gives in their place). Rows
    of similar length go together, padded at the end, where a causal model does not look. Rows with
    the same input (options of one token) share one forward pass.
    """
    # which rows share an input
    members = {}  # input ids -> numbers of the rows that have them
    for i, row in enumerate(rows):
        members.setdefault(row.inputs, []).append(i)
    inputs = sorted(members, key=len, reverse=True)  # longest first: memory runs out at once

    # as many inputs at a time as fit when padded to the longest
    scores = {}  # number of the row -> its score
    while inputs:
        size = max(1, batch_tokens // len(inputs[0]))
        batch = inputs[:size]
        inputs = inputs[size:]
        numbers = flatten(members[ids] for ids in batch)
        batch_scores = score_batch(model, batch, [rows[i] for i in numbers], device)
        scores.update(zip(numbers, batch_scores, strict=True))
    return [scores[i] for i in range(len(rows))]


def score_batch(model, batch, rows, device):
    """Score `rows` in one forward pass over `batch`, their input ids, longest first."""
    # padded with id 0, which nobody looks at
    ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)  # (B, T)
    for b, sequence in enumerate(batch):
        ids[b, : len(sequence)] = torch.tensor(sequence)
    logits = model(ids.to(device))  # (B, T, V)

    # the logits that predict a target are one to its left. Only these are kept: (K, V)
    places = {sequence: b for b, sequence in enumerate(batch)}
    logits = torch.cat([
        logits[places[row.inputs], row.start - 1 : len(row.inputs)]
        for row in rows
    ])

    # loss and greedy choice of all targets at once: (K,) each
    targets = torch.tensor(flatten(row.targets for row in rows), device=device)
    losses = F.cross_entropy(logits.float(), targets, reduction="none").tolist()
    greedy = logits.argmax(dim=-1).tolist()

    # back to one group a row
    spans = [row.targets for row in rows]
    scores = zip(split_like(losses, spans), split_like(greedy, spans), strict=True)
    return [(sum(row_losses) / len(row_losses), row_greedy) for row_losses, row_greedy in scores]


# -----------------------------------------------------------------------------
# Evaluation


def ask_questions(model, tokenizer, device, task, indices, max_seq_len, batch_tokens):
    """Ask the model the questions `indices`. Returns one record (a dict for JSON) per question."""
    # all texts in one call, which tokenizes on several threads; then back to one group a question
    prompts = [render_prompts(task, index) for index in indices]
    ids = tokenizer(flatten(prompts), prepend=tokenizer.get_bos_token_id())
    rows = [make_rows(task.kind, group) for group in split_like(ids, prompts)]

    # the same for the model
    cut_rows = [cut_row(row, max_seq_len) for row in flatten(rows)]
    scores = score_rows(model, [row for row, _ in cut_rows], device, batch_tokens)
    answers = zip(indices, split_like(cut_rows, rows), split_like(scores, rows), strict=True)
    return [make_record(task, tokenizer, *answer) for answer in answers]


def make_record(task, tokenizer, index, cut_rows, scores):
    """
    The result of question `index`, from its rows, (row, whether it was cut) each, and their scores.
    """
    losses = [loss for loss, _ in scores]
    if task.kind == "language_modeling":
        # one row: right only if greedy decoding gives every target
        row, _ = cut_rows[0]
        _, greedy = scores[0]
        gold = tokenizer.decode(row.targets)
        prediction = tokenizer.decode(greedy)
        correct = greedy == row.targets
    else:
        # the option with the lowest loss
        gold = task.rows[index]["gold"]
        prediction = losses.index(min(losses))
        correct = prediction == gold
    return {
        "task": task.label,
        "index": index,
        "fewshot": pick_fewshot(task, index),
        "truncated": any(was_cut for _, was_cut in cut_rows),
        "losses": [round(loss, 5) for loss in losses],
        "gold": gold,
        "prediction": prediction,
        "correct": correct,
    }


def flatten(groups):
    """flatten([[1], [2, 3]]) == [1, 2, 3]"""
    return list(chain.from_iterable(groups))


def split_like(items, groups):
    """
    Split a list into parts as long as the groups.

    >>> split_like("abc", [[1], [2, 3]])
    [['a'], ['b', 'c']]
    """
    rest = iter(items)
    return [list(islice(rest, len(group))) for group in groups]


def evaluate_task(
    model,
    tokenizer,
    device,
    task,
    *,
    max_seq_len,
    max_per_task=-1,
    batch_tokens=16384,
):
    """
    One task, shared by the ranks. Returns (result dict, records of all questions) on every rank.
    """
    start_time = time.time()
    # this rank's questions
    indices = pick_questions(task, max_per_task)[rank() :: world_size()]
    records = []
    starts = range(0, len(indices), CHUNK_QUESTIONS)
    for i in show_progress(starts, task.label, "chunks"):
        chunk = indices[i : i + CHUNK_QUESTIONS]
        records += ask_questions(model, tokenizer, device, task, chunk, max_seq_len, batch_tokens)
    # those of all ranks, in an order that does not depend on how they were shared
    records = sorted(gather_objects(records), key=lambda record: record["index"])

    # statistics; the standard error is the binomial one
    n = len(records)
    accuracy = sum(record["correct"] for record in records) / n
    stderr = math.sqrt(accuracy * (1 - accuracy) / n)
    # language modeling cannot be guessed
    guess = 0.0  # accuracy of choosing blindly among the options
    if task.kind != "language_modeling":
        guess = sum(1 / len(record["losses"]) for record in records) / n
    scale = 1 / (1 - task.baseline)
    result = {
        "task": task.label,
        "accuracy": accuracy,
        "stderr": stderr,
        "n": n,
        "baseline": task.baseline,
        "centered": (accuracy - task.baseline) * scale,
        "centered_stderr": stderr * scale,
        "centered_guess": (guess - task.baseline) * scale,
        "truncated": sum(record["truncated"] for record in records),
        "seconds": time.time() - start_time,
    }
    return result, records


def evaluate_core(
    model,
    tokenizer,
    device,
    tasks,
    *,
    max_seq_len,
    max_per_task=-1,
    batch_tokens=16384,
    on_task=None,
):
    """
    CORE of `model`, any causal callable: ids (B, T) int64 -> logits (B, T, V). `max_seq_len` is its
    longest T, `batch_tokens` the largest B x T (float32 logits take 4 V bytes each).
    `on_task(result, records)` is called after each task.

    Returns {"core", "stderr", "guessing" (the CORE of blind guesses), "n", "truncated", "tasks":
    [result dicts]}. Collective.
    """
    results = []
    for task in tasks:
        result, records = evaluate_task(
            model,
            tokenizer,
            device,
            task,
            max_seq_len=max_seq_len,
            max_per_task=max_per_task,
            batch_tokens=batch_tokens,
        )
        results.append(result)
        # all tasks may take hours: the caller shows and saves each
        if on_task is not None:
            on_task(result, records)

    def total(key):
        return sum(result[key] for result in results)

    # the tasks are independent, so the variances of their accuracies add up
    num_tasks = len(results)
    variance = sum(result["centered_stderr"] ** 2 for result in results)
    return {
        "core": total("centered") / num_tasks,
        "guessing": total("centered_guess") / num_tasks,
        "stderr": math.sqrt(variance) / num_tasks,
        "n": total("n"),
        "truncated": total("truncated"),
        "tasks": results,
    }
