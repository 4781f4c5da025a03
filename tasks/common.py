"""
What the tasks share: `Task`, the ways to join tasks, the check of conversations read from files,
and the text of a multiple-choice question. Where a task's rows come from is tasks/hub.py, how the
number that ends a solution is read is tasks/final_answer.py.

A task is a sized, indexable set of conversations: a user's question and the right answer. The same
object serves training (index it) and evaluation (`evaluate` grades a model's answer).
"""

import json
import random
from bisect import bisect_right
from itertools import accumulate

from nanochat.common import UserError
from nanochat.conversation import normalize_messages
from nanochat.documents import read_lines

# -----------------------------------------------------------------------------
# Task


class Task:
    """
    A subclass sets `eval_type` and `rows` (or defines `num_examples`), and defines `get_example`
    and, if it can be graded, `evaluate`. start, stop, step show a slice of it, as
    rows[start:stop:step] would: GSM8K(stop=100) and GSM8K(start=100) share no problem. A stop past
    the end means the end.
    """

    # "generative": evaluate() gets the text that the model wrote; "categorical": the letter it
    # finds most likely
    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(
                f"{type(self).__name__}(start={start}, stop={stop}, step={step}): "
                "need 0 <= start <= stop and step >= 1"
            )
        self.start = start
        self.stop = stop
        self.step = step

    def num_examples(self) -> int:
        """The number of examples before start, stop and step."""
        return len(self.rows)

    def get_example(self, index: int) -> dict:
        """The conversation at 0 <= index < num_examples(); the same one at every call."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Is `completion` a right answer to this conversation's question?"""
        name = type(self).__name__
        raise NotImplementedError(f"{name} is for training only, it cannot grade an answer")

    def grade(self, conversation: dict, completion: str) -> dict:
        """{"correct": ...}, and what else the record of an answer should say about it."""
        return {"correct": bool(self.evaluate(conversation, completion))}

    def reward(self, conversation: dict, completion: str) -> float:
        """The reward of the completion in reinforcement learning: 1 if it is right, else 0."""
        return float(self.evaluate(conversation, completion))

    def _indices(self):
        return range(self.num_examples())[self.start : self.stop : self.step]

    def __len__(self):
        return len(self._indices())

    def __getitem__(self, index):
        # the range raises the IndexError that ends a for loop
        return self.get_example(self._indices()[index])


def check_option(task, name, value, allowed):
    """Raise a UserError if a task's setting is none of the allowed values."""
    if value not in allowed:
        choices = " or ".join(map(repr, allowed))
        raise UserError(f"{type(task).__name__}({name}={value!r}): need {choices}")


def shuffled(items, seed: str):
    """
    A shuffled list. Python promises only of random() that it never changes, hence no rng.shuffle.
    """
    rng = random.Random(seed)  # seeded by a text, since Random(-1) and Random(1) are the same
    return sorted(items, key=lambda _: rng.random())


def pick(rng, items):
    """As rng.choice, from random() alone: see shuffled."""
    return items[int(rng.random() * len(items))]


# -----------------------------------------------------------------------------
# Tasks joined


class TaskSequence(Task):
    """All examples of all tasks, one task after the other. A task listed twice is seen twice."""

    def __init__(self, tasks, **kwargs):
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        # task t holds [ends[t-1], ends[t])
        self.ends = list(accumulate(len(task) for task in self.tasks))

    def num_examples(self):
        return self.ends[-1] if self.ends else 0

    def get_example(self, index):
        t = bisect_right(self.ends, index)
        task = self.tasks[t]
        return task[index - self.ends[t] + len(task)]


class TaskMixture(TaskSequence):
    """
    The tasks shuffled together, in an order that depends on the seed alone.

    Without weights every example appears once. weights are the shares of the tasks in the mixture,
    at any scale; the mixture is then as large as it can be without repeating an example:
    weights=[0.5, 0.5] over 7,473 and 99,842 examples draws 7,473 of each.
    """

    def __init__(self, tasks, weights=None, seed=42, **kwargs):
        super().__init__(tasks, **kwargs)
        counts = [len(task) for task in self.tasks]
        if weights is not None:
            counts = share_out(counts, weights)

        # order[i]: the place in the sequence of the mixture's example i
        order = []
        begin = 0
        for t, end in enumerate(self.ends):
            places = shuffled(range(begin, end), f"{seed}:{t}:0")
            order += places[: counts[t]]
            begin = end
        self.order = shuffled(order, str(seed))

    def num_examples(self):
        return len(self.order)

    def get_example(self, index):
        return super().get_example(self.order[index])


def share_out(sizes, weights):
    """
    Numbers of examples to draw from each task: in proportion to the weights, and as many in all as
    the smallest task allows.
    """
    total = sum(weights)
    if len(weights) != len(sizes) or min(weights) < 0 or not 0 < total < float("inf"):
        raise UserError(
            f"TaskMixture(weights={weights}) of {len(sizes)} tasks",
            "need a weight >= 0 for each, not all 0",
        )
    scale = min(
        size / weight
        for size, weight in zip(sizes, weights, strict=True)
        if weight > 0
    )
    if scale == 0:
        raise UserError(
            f"TaskMixture(weights={weights}): a task with a weight is empty",
            f"the sizes are {sizes}",
        )
    # 1e-6: rounding may give 29.999999 for 30
    return [int(weight * scale + 1e-6) for weight in weights]


# -----------------------------------------------------------------------------
# Conversations from files


def read_jsonl(path):
    """
    Yield ("<path>, line <n>", value) for each line of a JSONL file, which may end in .gz or .zst.
    Blank lines are skipped.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 text: {error}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON: {error}") from error


def check_messages(messages, where: str):
    """
    Return `messages` if they are a conversation to learn from, by the rule of
    nanochat/conversation.py, in which the assistant says something that is trained on. Else raise a
    UserError that begins with `where` and names the message.
    """
    try:
        turns = normalize_messages(messages)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    if not any(turn["weight"] and turn["content"] for turn in turns):
        raise UserError(f"{where}: the assistant says nothing that could be learned")
    return messages


def bad_field(where, field, got, need):
    return UserError(f"{where}, {field}: got {got!r:.60}, need {need}")


# -----------------------------------------------------------------------------
# Questions and answers


def exchange(question, answer) -> list[dict]:
    """The messages of a conversation of one question and one answer."""
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]


class MultipleChoice(Task):
    """
    Multiple choice. The model's answer is the one of conversation["letters"] that it finds most
    likely as the first token.
    """

    eval_type = "categorical"

    def conversation(self, question, letters, choices, answer):
        prompt = render_mc(question, letters, choices)
        return {"messages": exchange(prompt, answer), "letters": list(letters)}

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"]


def render_mc(question: str, letters, choices) -> str:
    """
    A multiple-choice question as text. The letter stands last, where a small model finds it more
    easily, and has no space before it, since " A" is another token than the "A" that begins the
    answer.

    >>> print(render_mc("What do cows drink?", ["A", "B"], ["Milk", "Water"]))
    What do cows drink?
    - Milk=A
    - Water=B
    Answer with the letter only.
    """
    lines = [question]
    for letter, choice in zip(letters, choices, strict=True):
        lines.append(f"- {choice}={letter}")
    lines.append("Answer with the letter only.")
    return "\n".join(lines)
