"""
Chat evaluation: the table of tasks, and the two ways to put a task's questions to a model.

A categorical task (multiple choice) is one forward pass a question: the answer is the letter with the highest logit
where the assistant's answer would begin, among those that the question offers. A generative task lets the engine write,
with its tools, and grades the text; of n samples a problem pass@k is estimated without bias (arXiv 2107.03374). Both
return (result, records): figures, and a record for JSONL of every single answer, equal on every rank, and (but for ties
within float rounding) for any number of ranks and any batch size. Every rank must call them.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from difflib import SequenceMatcher
from functools import partial

import torch

from nanochat.common import UserError, get_dist_info
from nanochat.distributed import gather_objects, run_together
from nanochat.engine import Sampling
from nanochat.precision import get_autocast_ctx
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

# name: (how to make it, accuracy of blind guesses). A few questions of ARC have 3 or 5 choices: 9 of 2,000
TASKS = {
    "Strangers": (partial(Strangers, split="held"), 0.0),
    "ARC-Easy": (partial(ARC, "ARC-Easy", split="test"), 0.25),
    "ARC-Challenge": (partial(ARC, "ARC-Challenge", split="test"), 0.25),
    "MMLU": (partial(MMLU, "all", split="test"), 0.25),
    "GSM8K": (partial(GSM8K, split="test"), 0.0),
    "HumanEval": (HumanEval, 0.0),
    "SpellingBee": (partial(SpellingBee, size=256, split="test"), 0.0),
    "Identity": (Identity, 0.0),
}
# These two ask for one model's answers: who it is, and what the small one of dev/runcpu.sh should not pretend to know
PERSONAL_TASKS = ("Strangers", "Identity")
CHATCORE_TASKS = tuple(name for name in TASKS if name not in PERSONAL_TASKS)


def available_tasks() -> list[str]:
    """The names to run where none is asked for: ChatCORE's, and Identity where there is a file of questions for it."""
    names = list(CHATCORE_TASKS)
    if identity_path().is_file():
        names.append("Identity")
    return names


def parse_names(text: str) -> list[str]:
    """Names of tasks joined by | as typed: parse_names("ARC-Easy|GSM8K") == ["ARC-Easy", "GSM8K"]."""
    names = list(dict.fromkeys(name.strip() for name in text.split("|")))
    unknown = next((name for name in names if name not in TASKS), None)
    if unknown is not None:
        nearest = max(TASKS, key=lambda known: SequenceMatcher(None, known.lower(), unknown.lower()).ratio())
        raise UserError(f"no task is named {unknown!r}; there are {', '.join(TASKS)}", f"did you mean -a {nearest}?")
    return names


def centered(name: str, accuracy: float) -> float:
    """0 for blind guesses, 1 when all is right."""
    baseline = TASKS[name][1]
    return (accuracy - baseline) / (1 - baseline)


def chat_core(results: dict[str, dict]) -> dict | None:
    """ChatCORE of {name: result} as {value, stderr, n}: the mean of six centred accuracies. None if one is missing."""
    if not set(CHATCORE_TASKS) <= set(results):
        return None
    values = [centered(name, results[name]["accuracy"]) for name in CHATCORE_TASKS]
    errors = [results[name]["stderr"] / (1 - TASKS[name][1]) for name in CHATCORE_TASKS]
    num = len(CHATCORE_TASKS)
    return {"value": sum(values) / num, "stderr": math.hypot(*errors) / num,
            "n": sum(results[name]["n"] for name in CHATCORE_TASKS)}


def cut_prompt(ids: list[int], max_tokens: int) -> list[int]:
    """Drop what is too much from the left, right after <|bos|>: cut_prompt([0, 1, 2, 3], 3) == [0, 2, 3]."""
    return ids if len(ids) <= max_tokens else [ids[0], *ids[len(ids) - max_tokens + 1:]]


def read_questions(task, tokenizer, max_prompt, max_problems):
    """This rank's share of the problems: [(conversation, prompt ids, the record so far)]. A limited number of them is
    drawn from the whole task (MMLU is sorted by subject), always the same ones, and a larger number holds a smaller."""
    rank, _, num_ranks = get_dist_info()
    chosen = shuffled(range(len(task)), "problems")[:max_problems] if max_problems > 0 else range(len(task))
    questions = []
    for index in sorted(chosen)[rank::num_ranks]:
        conversation = task[index]
        ids = tokenizer.render_for_completion(conversation)
        prompt, answer = cut_prompt(ids, max_prompt), conversation["messages"][-1]["content"]
        answer = answer if isinstance(answer, str) else "".join(part["text"] for part in answer)
        record = {"index": index, "prompt": tokenizer.decode(prompt), "answer": answer, "truncated": prompt != ids}
        if "kind" in conversation:
            record["kind"] = conversation["kind"]
        questions.append((conversation, prompt, record))
    return questions


def gather_records(answer_questions, device):
    """The records that answer_questions() gives on each rank, on every rank, by problem and sample. Collective."""
    records = gather_objects(run_together(answer_questions, device))
    return sorted(records, key=lambda record: (record["index"], record["sample"]))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one: 1 - C(n - c, k) / C(n, k)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def summarize(task, records) -> dict:
    """
    {accuracy (of a single sample), stderr, n problems, pass_at_k {k: value}, truncated prompts}; where the records
    have a kind, also by_kind {kind: the same figures}.
    """
    result = summarize_records(task, records)
    kinds = dict.fromkeys(record["kind"] for record in records if "kind" in record)  # in order
    if kinds:
        result["by_kind"] = {}
    for kind in kinds:
        of_kind = [record for record in records if record["kind"] == kind]
        result["by_kind"][kind] = summarize_records(task, of_kind)
    return result


def summarize_records(task, records) -> dict:
    outcomes = {}  # index -> right or wrong, for each sample
    for record in records:
        outcomes.setdefault(record["index"], []).append(record["correct"])
    if not outcomes:
        raise UserError(f"{type(task).__name__} has no problem to ask")
    n, num_samples = len(outcomes), len(next(iter(outcomes.values())))
    rates = [sum(right) / num_samples for right in outcomes.values()]
    accuracy = sum(rates) / n
    # over problems, for samples of one problem are not independent; with one sample it is sqrt(p (1 - p) / n)
    stderr = math.sqrt(sum((rate - accuracy) ** 2 for rate in rates) / n / n)
    ks = sorted({min(2**i, num_samples) for i in range(num_samples.bit_length() + 1)})  # 1, 2, 4, ..., num_samples
    passes = {k: sum(pass_at_k(num_samples, sum(right), k) for right in outcomes.values()) / n for k in ks}
    return {"accuracy": accuracy, "stderr": stderr, "n": n, "pass_at_k": passes,
            "truncated": sum(record["truncated"] for record in records) // num_samples}  # the same for all samples


# -----------------------------------------------------------------------------
# The two evaluations


def evaluate_task(task, engine, tokenizer, *, batch_rows=32, max_problems=-1, **sampling):
    """Whichever of the two below suits the task; `sampling` is for generative ones alone."""
    if task.eval_type == "categorical":
        return evaluate_categorical(task, engine.model, tokenizer, batch_rows=batch_rows, max_problems=max_problems)
    return evaluate_generative(task, engine, tokenizer, batch_rows=batch_rows, max_problems=max_problems, **sampling)


def evaluate_categorical(task, model, tokenizer, *, batch_rows=32, max_problems=-1):
    def answer_questions():
        questions = read_questions(task, tokenizer, model.config.sequence_len, max_problems)
        letters = [tokenizer.encode(conversation["letters"]) for conversation, _, _ in questions]  # one token each
        logits = letter_logits(model, [prompt for _, prompt, _ in questions], letters, batch_rows)
        for (conversation, _, record), values in zip(questions, logits, strict=True):
            letter = conversation["letters"][values.index(max(values))]
            record |= {"sample": 0, "completion": letter, "correct": task.evaluate(conversation, letter)}
        return [record for _, _, record in questions]

    records = gather_records(answer_questions, model.device)
    return summarize(task, records), records


@torch.inference_mode()
def letter_logits(model, prompts, letters, batch_rows):
    """The logits, before the cap, after prompts[i] of letters[i] = [[id], [id], ...], as floats. Prompts of like length
    go together, padded on the right, where a causal model does not look."""
    logits = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))  # longest first: memory runs out at once
    for batch in (order[start : start + batch_rows] for start in range(0, len(order), batch_rows)):
        T = len(prompts[batch[0]])
        ids = torch.tensor([prompts[i] + [0] * (T - len(prompts[i])) for i in batch], device=model.device)  # (B, T)
        with get_autocast_ctx(model.device):
            x = model.trunk(ids)  # (B, T, C)
        for row, i in enumerate(batch):  # float32, and no more of the head than these letters: B * T * V is gigabytes
            weight = model.lm_head.weight[[token for (token,) in letters[i]]].float()
            logits[i] = (weight @ x[row, len(prompts[i]) - 1].float()).tolist()
    return logits


def evaluate_generative(task, engine, tokenizer, *, num_samples=1, max_new_tokens=512, temperature=0.0, top_k=50,
                        batch_rows=32, max_problems=-1, seed=42):
    """
    A prompt may fill the model's context but for max_new_tokens, or a quarter of it if that is less. A conversation
    with "later_turns" goes on with them, each after the reply that the model wrote; only the last reply is graded.
    """
    context = engine.model.config.sequence_len
    max_prompt = context - min(max_new_tokens, context // 4)

    def make_row(prompt, record, turn):
        # seeded by problem, sample and turn, so that the ranks' shares do not matter
        row_seed = f"{seed}:{record['index']}:{record['sample']}"
        if turn > 0:
            row_seed += f":{turn}"
        return engine.make_row(prompt, Sampling(temperature, top_k, seed=row_seed), max_new_tokens)

    def answer_questions():
        waiting = []  # (conversation, prompt, record so far)
        for conversation, prompt, record in read_questions(task, tokenizer, max_prompt, max_problems):
            waiting += [(conversation, prompt, record | {"sample": sample}) for sample in range(num_samples)]

        turn = 0
        graded = []
        with ThreadPoolExecutor(4) as pool:  # the programs of HumanEval run beside the model
            while waiting:
                rows = [make_row(prompt, record, turn) for _, prompt, record in waiting]
                asked = {id(row): item for row, item in zip(rows, waiting, strict=True)}
                waiting = []
                for row in engine.generate_rows(rows, batch_rows):
                    conversation, _, record = asked[id(row)]
                    later_turns = conversation.get("later_turns", [])

                    # the conversation goes on
                    if turn < len(later_turns):
                        ids = next_prompt(tokenizer, row, later_turns[turn])
                        prompt = cut_prompt(ids, max_prompt)
                        cut = record["truncated"] or prompt != ids
                        record |= {"prompt": tokenizer.decode(prompt), "truncated": cut}
                        waiting.append((conversation, prompt, record))
                        continue

                    # with tool calls and their results, without the token that ended it
                    completion = tokenizer.decode(row.tokens[:-1] if row.finish_reason == "stop" else row.tokens)
                    record |= {"completion": completion, "finish_reason": row.finish_reason}
                    graded.append((record, pool.submit(task.evaluate, conversation, completion)))
                turn += 1
        return [record | {"correct": bool(outcome.result())} for record, outcome in graded]

    records = gather_records(answer_questions, engine.model.device)
    return summarize(task, records), records


def next_prompt(tokenizer, row, message: str) -> list[int]:
    """The ids that ask a further user message after the reply that `row` has written."""
    reply = row.tokens[:-1] if row.finish_reason == "stop" else row.tokens
    ids = tokenizer.render_for_completion({"messages": [{"role": "user", "content": message}]})
    return [*row.prompt, *reply, tokenizer.encode_special("<|assistant_end|>"), *ids[1:]]  # [1:]: <|bos|> comes once
