"""
Chat evaluation: the table of tasks, and the two ways to ask a model a task's questions.

A categorical task (multiple choice) is one forward pass a question: the answer is the letter with
the highest logit where the assistant's answer would begin, among those that the question offers. A
generative task lets the engine write, with its tools, and grades the text; of n samples a problem
pass@k is estimated without bias (arXiv 2107.03374).

Both return (result, records): a dict of figures, and a record for JSONL of every single answer.
They are the same on every rank, for any number of ranks and any batch size, except for ties within
float rounding. All ranks must call them.
"""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from functools import partial
from operator import itemgetter

import torch

from nanochat.common import UserError, get_dist_info
from nanochat.distributed import gather_objects, run_together
from nanochat.engine import Sampling
from nanochat.precision import get_autocast_ctx
from nanochat.progress import show_progress
from tasks.arc import ARC
from tasks.common import shuffled
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.identity import Identity, identity_path
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee
from tasks.strangers import Strangers

# -----------------------------------------------------------------------------
# The table of tasks

# name: (function that makes the task, accuracy of blind guesses)
# (9 of 2,000 questions of ARC have 3 or 5 choices instead of 4)
TASKS = {
    "ARC-Easy": (partial(ARC, "ARC-Easy", split="test"), 0.25),
    "ARC-Challenge": (partial(ARC, "ARC-Challenge", split="test"), 0.25),
    "MMLU": (partial(MMLU, "all", split="test"), 0.25),
    "GSM8K": (partial(GSM8K, split="test"), 0.0),
    "HumanEval": (HumanEval, 0.0),
    "SpellingBee": (partial(SpellingBee, size=256, split="test"), 0.0),
    # the answers of one particular model: who it is, and what the small model of dev/runcpu.sh
    # should not pretend to know
    "Identity": (Identity, 0.0),
    "Strangers": (partial(Strangers, split="held"), 0.0),
}
# ChatCORE is the mean over these six and no others, so that its values can be compared over time
CHATCORE_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")


def available_tasks() -> list[str]:
    """The tasks to run by default: ChatCORE's six, and Identity where there is a file for it."""
    names = list(CHATCORE_TASKS)
    if identity_path().is_file():
        names.append("Identity")
    return names


def parse_names(text: str) -> list[str]:
    """
    The names in a text as typed by a user; a misspelled one is a UserError.

    >>> parse_names("ARC-Easy|GSM8K")
    ['ARC-Easy', 'GSM8K']
    """
    names = []
    lowered = {name.lower(): name for name in TASKS}
    for typed in text.split("|"):
        name = typed.strip()
        if name not in TASKS:
            nearest = get_close_matches(name.lower(), lowered, n=1, cutoff=0)
            raise UserError(
                f"no task is named {name!r}; there are {', '.join(TASKS)}",
                f"did you mean -a {lowered[nearest[0]]}?",
            )
        if name not in names:
            names.append(name)
    return names


def centered(name: str, accuracy: float) -> float:
    """0 for blind guesses, 1 when all is right."""
    _, baseline = TASKS[name]
    return (accuracy - baseline) / (1 - baseline)


def chat_core(results: dict[str, dict]) -> dict | None:
    """
    ChatCORE of {name: result} as {value, stderr, n}: the mean of the centred accuracies of
    CHATCORE_TASKS. None if one of them is missing.
    """
    if not set(CHATCORE_TASKS) <= set(results):
        return None
    value = 0.0
    variance = 0.0
    n = 0
    num_tasks = len(CHATCORE_TASKS)
    for name in CHATCORE_TASKS:
        result = results[name]
        _, baseline = TASKS[name]
        value += centered(name, result["accuracy"]) / num_tasks
        stderr = result["stderr"] / (1 - baseline) / num_tasks
        variance += stderr**2
        n += result["n"]
    return {"value": value, "stderr": math.sqrt(variance), "n": n}


# -----------------------------------------------------------------------------
# Questions and results


def cut_prompt(ids: list[int], max_tokens: int) -> list[int]:
    """
    The ids of a prompt, cut to max_tokens: the oldest go, except the first, which is <|bos|>.

    >>> cut_prompt([0, 1, 2, 3], 3)
    [0, 2, 3]
    """
    if len(ids) <= max_tokens:
        return ids
    num_last = max_tokens - 1
    return ids[:1] + ids[len(ids) - num_last :]


def read_questions(task, tokenizer, max_prompt, max_problems):
    """
    This rank's share of the problems: [(conversation, prompt ids, record)]. The record is the part
    of the result that is known before the model answers.

    max_problems > 0: problems drawn from the whole task, since MMLU is sorted by subject. They are
    always the same ones, and a larger number includes those of a smaller one.
    """
    rank, _, num_ranks = get_dist_info()
    chosen = range(len(task))
    if max_problems > 0:
        chosen = sorted(shuffled(chosen, "problems")[:max_problems])

    questions = []
    for index in show_progress(chosen[rank::num_ranks], "reading", "questions"):
        conversation = task[index]
        ids = tokenizer.render_for_completion(conversation)
        prompt = cut_prompt(ids, max_prompt)
        answer = conversation["messages"][-1]["content"]
        if not isinstance(answer, str):
            answer = "".join(part["text"] for part in answer)
        record = {
            "index": index,
            "prompt": tokenizer.decode(prompt),
            "answer": answer,
            "truncated": prompt != ids,
        }
        if "kind" in conversation:
            record["kind"] = conversation["kind"]
        questions.append((conversation, prompt, record))
    return questions


def gather_records(answer_questions, device):
    """
    The records of all ranks, sorted by problem and sample, on every rank. answer_questions() makes
    those of one rank. Collective.
    """
    records = gather_objects(run_together(answer_questions, device))
    return sorted(records, key=itemgetter("index", "sample"))


def pass_at_k(n: int, c: int, k: int) -> float:
    """
    The chance that k of n samples, c of them right, include a right one: 1 - C(n - c, k) / C(n, k).
    """
    num_all_wrong = math.comb(n - c, k)
    return 1 - num_all_wrong / math.comb(n, k)


def summarize(task, records) -> dict:
    """
    The figures of `summarize_records`. Where the records have a kind there is also "by_kind":
    {kind: the same figures of its records}. "wall_hits" are answers that are not right because the
    sandbox did not let them go on; there is none where it stopped nothing.
    """
    result = summarize_records(task, records)
    wall_hits = sum(record.get("wall_hit") is not None for record in records)
    if wall_hits:
        result["wall_hits"] = wall_hits
    by_kind = {}
    for record in records:
        if "kind" in record:
            by_kind.setdefault(record["kind"], []).append(record)
    if by_kind:
        result["by_kind"] = {kind: summarize_records(task, part) for kind, part in by_kind.items()}
    return result


def summarize_records(task, records) -> dict:
    """
    {accuracy (of a single sample), stderr, n problems, pass_at_k {k: value}, truncated prompts}
    """
    num_right = Counter()  # index -> right samples
    num_samples = Counter()
    truncated = set()
    for record in records:
        index = record["index"]
        num_samples[index] += 1
        num_right[index] += record["correct"]
        if record["truncated"]:
            truncated.add(index)
    n = len(num_samples)
    if n == 0:
        raise UserError(f"{type(task).__name__} has no problem to ask")
    samples = max(num_samples.values())  # the same for all problems

    # The error is over problems, since the samples of one problem are not independent. With one
    # sample it is the binomial sqrt(p (1 - p) / n).
    rates = [right / samples for right in num_right.values()]
    accuracy = sum(rates) / n
    variance = sum((rate - accuracy) ** 2 for rate in rates) / n

    # k = 1, 2, 4, ..., and the number of samples
    passes = {}
    k = 1
    while k < 2 * samples:
        k_or_all = min(k, samples)
        chances = [pass_at_k(samples, right, k_or_all) for right in num_right.values()]
        passes[k_or_all] = sum(chances) / n
        k *= 2
    return {
        "accuracy": accuracy,
        "stderr": math.sqrt(variance / n),
        "n": n,
        "pass_at_k": passes,
        "truncated": len(truncated),
    }


# -----------------------------------------------------------------------------
# The two evaluations


def evaluate_task(task, engine, tokenizer, *, batch_rows=32, max_problems=-1, **sampling):
    """Whichever of the two below suits the task; `sampling` is for generative ones alone."""
    limits = {"batch_rows": batch_rows, "max_problems": max_problems}
    if task.eval_type == "categorical":
        return evaluate_categorical(task, engine.model, tokenizer, **limits)
    return evaluate_generative(task, engine, tokenizer, **limits, **sampling)


def evaluate_categorical(task, model, tokenizer, *, batch_rows=32, max_problems=-1):
    def answer_questions():
        questions = read_questions(task, tokenizer, model.config.sequence_len, max_problems)
        prompts = [prompt for _, prompt, _ in questions]
        letter_ids = []
        for conversation, _, _ in questions:
            encoded = tokenizer.encode(conversation["letters"])
            letter_ids.append([token for (token,) in encoded])  # each letter is one token
        logits = letter_logits(model, prompts, letter_ids, batch_rows)

        records = []
        for (conversation, _, record), values in zip(questions, logits, strict=True):
            best = values.index(max(values))
            letter = conversation["letters"][best]
            record["sample"] = 0
            record["completion"] = letter
            record["correct"] = task.evaluate(conversation, letter)
            records.append(record)
        return records

    records = gather_records(answer_questions, model.device)
    return summarize(task, records), records


@torch.inference_mode()
def letter_logits(model, prompts, letter_ids, batch_rows):
    """
    The logits, before the cap, of the tokens letter_ids[i] after prompts[i], as a list of floats
    for each prompt. Prompts of similar length go together, padded on the right, where a causal
    model does not look.
    """
    logits = [None] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    # longest first: memory runs out at once
    order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
    for start in show_progress(range(0, len(order), batch_rows), "choosing", "batches"):
        batch = order[start : start + batch_rows]
        ids = torch.zeros(len(batch), lengths[batch[0]], dtype=torch.long)  # (B, T)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = torch.tensor(prompts[i])
        with get_autocast_ctx(model.device):
            x = model.trunk(ids.to(model.device))  # (B, T, C)
        for row, i in enumerate(batch):
            # float32, and only the head's rows of these letters: logits of B * T * V are gigabytes
            weight = model.lm_head.weight[letter_ids[i]].float()
            hidden = x[row, lengths[i] - 1].float()
            logits[i] = (weight @ hidden).tolist()
    return logits


def evaluate_generative(
    task,
    engine,
    tokenizer,
    *,
    num_samples=1,
    max_new_tokens=512,
    temperature=0.0,
    top_k=50,
    batch_rows=32,
    max_problems=-1,
    seed=42,
):
    """
    A prompt may fill the model's context except for max_new_tokens, or a quarter of it if that is
    less. A conversation with "later_turns" goes on with these user messages, one after each reply
    of the model; only the last reply is graded.
    """
    context = engine.model.config.sequence_len
    max_prompt = context - min(max_new_tokens, context // 4)

    def make_row(prompt, record, turn):
        # seeded by problem, sample and turn, so that it does not matter which rank asks
        row_seed = f"{seed}:{record['index']}:{record['sample']}"
        if turn > 0:
            row_seed += f":{turn}"
        return engine.make_row(prompt, Sampling(temperature, top_k, seed=row_seed), max_new_tokens)

    def answer_questions():
        waiting = []  # (conversation, prompt, record)
        questions = read_questions(task, tokenizer, max_prompt, max_problems)
        for conversation, prompt, record in questions:
            for sample in range(num_samples):
                waiting.append((conversation, prompt, record | {"sample": sample}))

        records = []
        outcomes = []
        turn = 0
        with ThreadPoolExecutor(4) as pool:  # the programs of HumanEval run beside the model
            while waiting:
                rows = [make_row(prompt, record, turn) for _, prompt, record in waiting]
                asked = {id(row): item for row, item in zip(rows, waiting, strict=True)}
                waiting = []
                finished = engine.generate_rows(rows, batch_rows)
                for row in show_progress(finished, "answering", "answers", total=len(rows)):
                    conversation, _, record = asked[id(row)]
                    later_turns = conversation.get("later_turns", [])
                    if turn < len(later_turns):
                        ids = next_prompt(tokenizer, row, later_turns[turn])
                        prompt = cut_prompt(ids, max_prompt)
                        record["prompt"] = tokenizer.decode(prompt)
                        record["truncated"] |= prompt != ids
                        waiting.append((conversation, prompt, record))
                        continue
                    completion = tokenizer.decode(reply_tokens(row))  # with tool calls and results
                    record["completion"] = completion
                    record["finish_reason"] = row.finish_reason
                    records.append(record)
                    outcomes.append(pool.submit(task.grade, conversation, completion))
                turn += 1
        graded = zip(records, outcomes, strict=True)
        for record, outcome in show_progress(graded, "grading", "answers", total=len(records)):
            record.update(outcome.result())
        return records

    records = gather_records(answer_questions, engine.model.device)
    return summarize(task, records), records


def reply_tokens(row):
    """The tokens of a finished row without the one that ended it."""
    return row.tokens[:-1] if row.finish_reason == "stop" else row.tokens


def next_prompt(tokenizer, row, message: str) -> list[int]:
    """The ids that ask a further user message after the reply that `row` has written."""
    ids = tokenizer.render_for_completion({"messages": [{"role": "user", "content": message}]})
    end = tokenizer.encode_special("<|assistant_end|>")
    return [*row.prompt, *reply_tokens(row), end, *ids[1:]]  # without a second <|bos|>
