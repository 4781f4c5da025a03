"""
The CORE metric of the DCLM paper (arXiv 2406.11794): 22 tasks that a base model can be asked, in three forms.

    multiple_choice      one context, several continuations: which one has the lowest loss per token?
    schema               several contexts, one continuation: after which one does it have the lowest loss per token?
    language_modeling    one context, one continuation: does greedy decoding produce exactly it?

A task's accuracy is centred, (accuracy - baseline) / (1 - baseline), so that guessing counts 0 and perfection 1; CORE
is the mean over the tasks. Two baselines are more than a guess among the options gives (boolq 62%, commonsense_qa
40.3%), so the CORE of guessing is -0.026, and it is stated beside the model's. Few-shot examples are drawn per
question, from a seed of its own: they are the same for any number of questions, ranks and rows in a batch. Left out:
the average over categories, which the questions of jeopardy have.
"""

import csv
import json
import math
import os
import random
import shutil
import tempfile
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml

from nanochat.common import UserError, get_base_dir, get_data_dir, get_dist_info
from nanochat.distributed import barrier, gather_objects, rank, world_size
from nanochat.download import download_file, hold_lock

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
MAX_BUNDLE_BYTES = 4 << 30  # unpacked; more is not the bundle
NUM_TASKS = 22
CHUNK_QUESTIONS = 256  # tokenized and sorted by length at a time: enough for even batches, little to hold
FIELDS = {"multiple_choice": {"query", "choices", "gold"}, "schema": {"context_options", "continuation", "gold"},
          "language_modeling": {"context", "continuation"}}  # what a line of each kind of task must have

# -----------------------------------------------------------------------------
# The bundle: core.yaml (the tasks), eval_meta_data.csv (their baselines), eval_data/*.jsonl (their questions)


@dataclass(frozen=True)
class CoreTask:
    label: str
    kind: str         # a key of FIELDS
    rows: list        # of dicts, the lines of the task's file
    num_fewshot: int  # solved examples in front of each question
    delimiter: str    # between context and continuation
    baseline: float   # accuracy of guessing, 0..1


def get_eval_bundle(fetch=download_file) -> Path:
    """The bundle's folder: of the data mirror if there is one, else of the base directory, downloaded once."""
    data_dir = get_data_dir()
    if data_dir is not None:
        return data_dir / "eval_bundle"
    bundle_dir = get_base_dir() / "eval_bundle"
    if get_dist_info()[1] == 0 and not (bundle_dir / "core.yaml").exists():  # one process of each machine
        zip_path = fetch(BUNDLE_URL, get_base_dir() / "eval_bundle.zip")
        with hold_lock(zip_path.with_suffix(".lock")):  # they may share the folder
            if not (bundle_dir / "core.yaml").exists():
                _unpack(zip_path, bundle_dir)
    barrier()
    return bundle_dir


def _unpack(zip_path, bundle_dir):
    """Unpack beside the goal, then rename. `zipfile` itself drops `..` and roots from names and makes no links."""
    if not zipfile.is_zipfile(zip_path):
        raise UserError(f"{zip_path} is not a zip file", f"rm {zip_path}")
    with tempfile.TemporaryDirectory(dir=bundle_dir.parent) as folder, zipfile.ZipFile(zip_path) as archive:
        num_bytes = sum(member.file_size for member in archive.infolist())
        if num_bytes > MAX_BUNDLE_BYTES:
            raise UserError(f"{zip_path} unpacks to {num_bytes:,} bytes, at most {MAX_BUNDLE_BYTES:,} are expected")
        try:
            archive.extractall(folder)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{zip_path} is damaged: {error}", f"rm {zip_path}, and it is downloaded again") from error
        found = [path.parent for path in Path(folder).rglob("core.yaml")]
        if len(found) != 1:
            raise UserError(f"{zip_path} holds {len(found)} files core.yaml, exactly one is needed", f"rm {zip_path}")
        shutil.rmtree(bundle_dir, ignore_errors=True)
        os.replace(found[0], bundle_dir)


def load_tasks(bundle_dir) -> list[CoreTask]:
    """All tasks of the bundle with their questions. A wrong or missing file is a UserError that names it."""
    bundle_dir = Path(bundle_dir)
    for name in ("core.yaml", "eval_meta_data.csv"):
        if not (bundle_dir / name).is_file():
            raise UserError(f"no evaluation bundle: {bundle_dir / name} is missing",
                            f"put the contents of {BUNDLE_URL} there, or unset NANOCHAT_DATA_DIR to download it")
    if get_data_dir() is None:
        again = f"rm -r {bundle_dir} {bundle_dir}.zip, and it is downloaded again"
    else:
        again = f"restore it from {BUNDLE_URL}"
    try:
        with open(bundle_dir / "eval_meta_data.csv", encoding="utf-8", newline="") as f:
            baselines = {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in csv.DictReader(f)}
        entries = [(entry["label"], entry["icl_task_type"], entry["dataset_uri"], int(entry["num_fewshot"][0]),
                    entry.get("continuation_delimiter", " "))
                   for entry in yaml.safe_load((bundle_dir / "core.yaml").read_text("utf-8"))["icl_tasks"]]
    except (ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"core.yaml or eval_meta_data.csv in {bundle_dir} is damaged: {type(error).__name__}: "
                        f"{' '.join(str(error).split())}", again) from error
    if not entries:
        raise UserError(f"{bundle_dir / 'core.yaml'} lists no task", again)
    tasks = []
    for label, kind, path, num_fewshot, delimiter in entries:
        if kind not in FIELDS or label not in baselines:
            raise UserError(f"{bundle_dir}: task {label} of type {kind} has no such type or no random baseline", again)
        rows = _read_rows(bundle_dir / "eval_data" / path, FIELDS[kind], again)
        tasks.append(CoreTask(label, kind, rows, num_fewshot, delimiter, baselines[label]))
    return tasks


def _read_rows(path, fields, again):
    if not path.is_file():
        raise UserError(f"{path} of the evaluation bundle is missing", again)
    rows = []
    for number, line in enumerate(path.read_text("utf-8").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                missing = sorted(fields - row.keys())
            except (ValueError, AttributeError):
                raise UserError(f"{path}:{number} is not a JSON object: {line[:80]!r}", again) from None
            if missing:
                raise UserError(f"{path}:{number} has no field {missing}", again)
            rows.append(row)
    if not rows:
        raise UserError(f"{path} of the evaluation bundle is empty", again)
    return rows


# -----------------------------------------------------------------------------
# Which questions, which examples, which words


def pick_questions(task, max_per_task=-1):
    """Row numbers to ask: all, or the first ones of a shuffle that depends on the task's name alone."""
    order = random.Random(task.label).sample(range(len(task.rows)), len(task.rows))
    return order[:max_per_task] if max_per_task > 0 else order


def pick_fewshot(task, index):
    """Row numbers of the solved examples of question `index`: never the question, nor a row that says the same."""
    spare = 4 * (task.num_fewshot + 1)  # more than enough to step over every twin of the question
    drawn = random.Random(f"{task.label}:{index}").sample(range(len(task.rows)), min(len(task.rows), spare))
    return [i for i in drawn if task.rows[i] != task.rows[index]][:task.num_fewshot]  # a small pool gives all it has


def _options(row, kind):
    """The (context, continuation) pairs of a row: one per option, a single one for language modeling."""
    if kind == "multiple_choice":
        return [(row["query"], choice) for choice in row["choices"]]
    if kind == "schema":
        return [(context, row["continuation"]) for context in row["context_options"]]
    return [(row["context"].strip(), row["continuation"])]


def render_prompts(task, index):
    """
    The texts of question `index`, one per option, each ending in its continuation: the solved examples with a blank
    line after each, then the question. Language modeling gets a second text, that without the continuation; it ends in
    no white space, because a space belongs to the token of the word that follows it.
    """
    shots = ""
    for i in pick_fewshot(task, index):
        context, continuation = _options(task.rows[i], task.kind)[task.rows[i].get("gold", 0)]
        shots += f"{context}{task.delimiter}{continuation}\n\n"
    options = _options(task.rows[index], task.kind)
    texts = [f"{shots}{context}{task.delimiter}{continuation}" for context, continuation in options]
    if task.kind == "language_modeling":
        texts.append(f"{shots}{options[0][0]}{task.delimiter}".rstrip())
    return texts


# -----------------------------------------------------------------------------
# Tokens: which of them count


@dataclass(frozen=True)
class Row:
    """A sequence for the model. Its loss counts on ids[start:]; the last id is only ever a target, never an input."""
    ids: list   # of token ids, <|bos|> first
    start: int  # >= 1


def num_common_prefix(sequences):
    """How many leading ids all sequences share: num_common_prefix([[1, 2, 3], [1, 2, 4]]) == 2."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def make_rows(kind, sequences):
    """The token ids of `render_prompts`' texts -> Rows. Every row keeps one id in front of, and one id in, its span."""
    shortest = min(map(len, sequences))
    if kind == "multiple_choice":  # from where the options part
        start = min(num_common_prefix(sequences), shortest - 1)
        return [Row(ids, start) for ids in sequences]
    if kind == "schema":           # from where they have come together for good
        num_shared = min(num_common_prefix([ids[::-1] for ids in sequences]), shortest - 1)
        return [Row(ids, len(ids) - num_shared) for ids in sequences]
    full, context = sequences      # tokens may join across the seam: what the context alone does not give is asked for
    return [Row(full, min(num_common_prefix([full, context]), len(full) - 1))]


def cut_row(row, max_seq_len):
    """Drop what does not fit into the model from the left, right after <|bos|>; -> (row, whether it was cut)."""
    num_dropped = len(row.ids) - 1 - max_seq_len
    if num_dropped <= 0:
        return row, False
    return Row([row.ids[0], *row.ids[num_dropped + 1:]], max(1, row.start - num_dropped)), True


# -----------------------------------------------------------------------------
# The forward passes


@torch.no_grad()
def score_rows(model, rows, device, batch_tokens):
    """
    -> per row (mean loss over its span, ids that greedy decoding gives in its span). Rows of one length go together,
    padded on the right, where a causal model does not look; rows with the same input (options of one token) share one.
    """
    groups = {}  # input ids -> numbers of the rows that have them
    for i, row in enumerate(rows):
        groups.setdefault(tuple(row.ids[:-1]), []).append(i)
    inputs, scores = sorted(groups, key=len, reverse=True), [None] * len(rows)  # longest first: memory runs out at once
    while inputs:
        size = max(1, batch_tokens // len(inputs[0]))  # inputs[0] is the longest that is left
        batch, inputs = inputs[:size], inputs[size:]
        ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)  # (B, T)
        for b, sequence in enumerate(batch):
            ids[b, :len(sequence)] = torch.tensor(sequence)
        members = [(b, i) for b, sequence in enumerate(batch) for i in groups[sequence]]
        # each target of a span, and the place in (B, T) whose logits predict it: one to the left
        places = torch.tensor([(b, t - 1, rows[i].ids[t]) for b, i in members
                               for t in range(rows[i].start, len(rows[i].ids))]).to(device)  # (K, 3)
        # (B, T, V) -> (K, V): only what counts goes on, which is far less than all
        logits = model(ids.to(device))[places[:, 0], places[:, 1]]
        losses = F.cross_entropy(logits.float(), places[:, 2], reduction="none").tolist()
        greedy = logits.argmax(dim=-1).tolist()
        end = 0  # of the span that was taken from losses and greedy last
        for _, i in members:
            begin, end = end, end + len(rows[i].ids) - rows[i].start
            scores[i] = (sum(losses[begin:end]) / (end - begin), greedy[begin:end])
    return scores


# -----------------------------------------------------------------------------
# Evaluation


def _ask(model, tokenizer, device, task, indices, max_seq_len, batch_tokens):
    """Put the questions to the model -> one record (a dict for JSON) per question."""
    bos, texts = tokenizer.get_bos_token_id(), [render_prompts(task, index) for index in indices]
    # all texts of the chunk in one call, which tokenizes on several threads; then back to one group a question
    sequences = iter(tokenizer([text for options in texts for text in options], prepend=bos))
    questions = [make_rows(task.kind, [next(sequences) for _ in options]) for options in texts]
    cut = [[cut_row(row, max_seq_len) for row in rows] for rows in questions]
    scores = iter(score_rows(model, [row for rows in cut for row, _ in rows], device, batch_tokens))
    records = []
    for index, rows in zip(indices, cut, strict=True):
        losses, greedy = zip(*(next(scores) for _ in rows), strict=True)
        record = {"task": task.label, "index": index, "fewshot": pick_fewshot(task, index),
                  "truncated": any(was_cut for _, was_cut in rows), "losses": [round(loss, 5) for loss in losses]}
        if task.kind == "language_modeling":
            target = rows[0][0].ids[rows[0][0].start:]  # right only if greedy decoding gives every id of it
            record |= {"gold": tokenizer.decode(target), "prediction": tokenizer.decode(greedy[0]),
                       "correct": greedy[0] == target}
        else:
            gold, prediction = task.rows[index]["gold"], min(range(len(losses)), key=losses.__getitem__)
            record |= {"gold": gold, "prediction": prediction, "correct": prediction == gold}
        records.append(record)
    return records


def evaluate_task(model, tokenizer, device, task, *, max_seq_len, max_per_task=-1, batch_tokens=16384):
    """One task, shared by the ranks -> (result dict, records of all questions), the same on every rank."""
    begin = time.time()
    indices, records = pick_questions(task, max_per_task)[rank()::world_size()], []
    for i in range(0, len(indices), CHUNK_QUESTIONS):
        records += _ask(model, tokenizer, device, task, indices[i:i + CHUNK_QUESTIONS], max_seq_len, batch_tokens)
    records = sorted(gather_objects(records), key=lambda record: record["index"])
    n, scale = len(records), 1 / (1 - task.baseline)
    accuracy = sum(record["correct"] for record in records) / n
    stderr = math.sqrt(accuracy * (1 - accuracy) / n)
    guess = 0 if task.kind == "language_modeling" else sum(1 / len(record["losses"]) for record in records) / n
    result = {"task": task.label, "accuracy": accuracy, "stderr": stderr, "n": n, "baseline": task.baseline,
              "centered": (accuracy - task.baseline) * scale, "centered_stderr": stderr * scale,
              "centered_guess": (guess - task.baseline) * scale,
              "truncated": sum(record["truncated"] for record in records), "seconds": time.time() - begin}
    return result, records


def evaluate_core(model, tokenizer, device, tasks, *, max_seq_len, max_per_task=-1, batch_tokens=16384, on_task=None):
    """
    CORE of `model`, any causal callable: ids (B, T) int64 -> logits (B, T, V). `max_seq_len` is the longest T that it
    takes, `batch_tokens` the largest B x T (float32 logits take 4 V bytes each), `on_task(result, records)` is called
    after each task. -> {"core", "stderr", "guessing" (the CORE of blind guesses), "n", "truncated", "tasks": [result
    dicts]}. Every rank must call this.
    """
    results = []
    for task in tasks:
        result, records = evaluate_task(model, tokenizer, device, task, max_seq_len=max_seq_len,
                                        max_per_task=max_per_task, batch_tokens=batch_tokens)
        results.append(result)
        if on_task is not None:
            on_task(result, records)
    centered, guesses = [result["centered"] for result in results], [result["centered_guess"] for result in results]
    return {"core": sum(centered) / len(results), "guessing": sum(guesses) / len(results),
            "stderr": math.sqrt(sum(result["centered_stderr"] ** 2 for result in results)) / len(results),
            "n": sum(result["n"] for result in results), "truncated": sum(result["truncated"] for result in results),
            "tasks": results}
