"""
What the tasks share: `Task`, the two ways to join tasks, the form of a conversation and of a multiple-choice question,
the reading of a final answer. Where a task's rows come from is tasks/hub.py.

A task is a sized, indexable set of conversations: the user's question and the right answer. The same object serves
training (index it) and evaluation (`evaluate` grades a model's answer).
"""

import json
import random
import re
from bisect import bisect_right
from fractions import Fraction
from itertools import accumulate

from nanochat.common import UserError, ceil_div

# -----------------------------------------------------------------------------
# Task


class Task:
    """
    A subclass sets `eval_type` and defines `num_examples`, `get_example` and, if it can be graded, `evaluate`.
    start, stop, step show a slice of it, as rows[start:stop:step] would: GSM8K(stop=100) and GSM8K(start=100) share
    no problem. A stop past the end means the end.
    """

    # "generative": evaluate() gets the text that the model wrote; "categorical": the letter that it finds likeliest
    eval_type = "generative"

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop < start):
            raise UserError(f"{type(self).__name__}(start={start}, stop={stop}, step={step}): "
                            "need 0 <= start <= stop and step >= 1")
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self) -> int:
        """How many there are before start, stop and step."""
        raise NotImplementedError

    def get_example(self, index: int) -> dict:
        """The conversation at 0 <= index < num_examples(); the same one at every call."""
        raise NotImplementedError

    def evaluate(self, conversation: dict, completion: str) -> bool:
        """Is `completion` a right answer to this conversation's question?"""
        raise NotImplementedError(f"{type(self).__name__} is for training only, it cannot grade an answer")

    def reward(self, conversation: dict, completion: str) -> float:
        """What reinforcement learning pays for the completion: 1 if right, else 0."""
        return float(self.evaluate(conversation, completion))

    def _indices(self):
        return range(self.num_examples())[self.start : self.stop : self.step]

    def __len__(self):
        return len(self._indices())

    def __getitem__(self, index):
        return self.get_example(self._indices()[index])  # the range raises the IndexError that ends a for loop


def check_option(task, name, value, allowed):
    """A setting of a task that is none of the allowed values is the caller's mistake."""
    if value not in allowed:
        raise UserError(f"{type(task).__name__}({name}={value!r}): need {' or '.join(map(repr, allowed))}")


# -----------------------------------------------------------------------------
# Tasks joined


class TaskSequence(Task):
    """All examples of all tasks, one task after the other (a curriculum). A task listed twice is seen twice."""

    def __init__(self, tasks, **kwargs):
        super().__init__(**kwargs)
        self.tasks = list(tasks)
        self.ends = list(accumulate(len(task) for task in self.tasks))  # task t holds [ends[t-1], ends[t])

    def num_examples(self):
        return self.ends[-1] if self.ends else 0

    def get_example(self, index):
        t = bisect_right(self.ends, index)
        return self.tasks[t][index - (self.ends[t - 1] if t else 0)]


class TaskMixture(TaskSequence):
    """
    The tasks shuffled together, in an order that depends on the seed alone.

    Without weights every example appears once. weights are the shares of the tasks in the mixture, at any scale: the
    total is then the largest that repeats no example, e.g. weights=[0.5, 0.5] over 7,473 and 99,842 examples draws
    7,473 of each. `size` asks for another total; a task that is too small for its share starts over, each pass in a
    new order. Shares are rounded down, so the total may fall short of size by less than one example a task.
    """

    def __init__(self, tasks, weights=None, seed=42, size: int | None = None, **kwargs):
        super().__init__(tasks, **kwargs)
        lens = [len(task) for task in self.tasks]
        counts = lens if weights is None and size is None else share_out(lens, weights, size)
        order = []  # the mixture's i-th example is the sequence's order[i]-th
        for t, count in enumerate(counts):
            for lap in range(ceil_div(count, lens[t]) if count else 0):  # passes over the task, the last one cut short
                deck = shuffled(range(self.ends[t] - lens[t], self.ends[t]), f"{seed}:{t}:{lap}")
                order += deck[: count - lap * lens[t]]
        self.order = shuffled(order, f"{seed}")

    def num_examples(self):
        return len(self.order)

    def get_example(self, index):
        return super().get_example(self.order[index])


class TaskChain(Task):
    """
    `size` conversations of two to four examples one after the other, each of any of the tasks: a talk that changes its
    subject. A small model to which a kind of question always came alone does not know it later in a talk: there it goes
    on with the first subject. Example i depends on the seed and i alone.
    """

    def __init__(self, tasks, size, seed=42, **kwargs):
        super().__init__(**kwargs)
        self.tasks, self.size, self.seed = [task for task in tasks if len(task)], size, seed

    def num_examples(self):
        return self.size if self.tasks else 0

    def get_example(self, index):
        rng = random.Random(f"{self.seed}:{index}")
        messages = []
        for _ in range(2 + int(3 * rng.random())):
            task = self.tasks[int(len(self.tasks) * rng.random())]
            example = task[int(len(task) * rng.random())]
            messages += [message for message in example["messages"] if message["role"] != "system"]
        return {"messages": messages}


def share_out(lens, weights, size):
    """How many examples to draw from each task. weights None: in proportion to their sizes."""
    weights = lens if weights is None else list(weights)
    if len(weights) != len(lens) or not all(0 <= w < float("inf") for w in weights) or not sum(weights) > 0:
        raise UserError(f"TaskMixture(weights={weights}) of {len(lens)} tasks: need a weight >= 0 for each, not all 0")
    shares = [Fraction(w) / sum(map(Fraction, weights)) for w in weights]  # exact: nothing is lost to float rounding
    if any(share and not n for share, n in zip(shares, lens, strict=True)):
        raise UserError(f"TaskMixture(weights={weights}): a task with a weight is empty, the sizes are {lens}")
    if size is None:
        size = min(int(n / share) for share, n in zip(shares, lens, strict=True) if share)
    return [int(size * share) for share in shares]


def shuffled(items, seed: str):
    """A shuffled list. Of an rng only random() is promised to be the same in every Python, hence no rng.shuffle."""
    rng = random.Random(seed)  # seeded by text, for Random(-1) and Random(1) are the same generator
    return sorted(items, key=lambda _: rng.random())


# -----------------------------------------------------------------------------
# The form of questions and answers


def read_jsonl(path):
    """("<path>, line <n>", value) of each line of a JSONL file. Skips blank lines; names one that is no JSON."""
    with open(path, encoding="utf-8-sig") as lines:  # -sig: some editors put a mark at the start of a file
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text: {error}") from error
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not JSON: {error}") from error


def check_messages(messages, where: str):
    """`messages` back if they are a conversation to learn from: an optional system message, then user and assistant
    in turns, text or parts. Else a UserError that begins with `where` and names the field."""
    def need(ok, field, got, what):
        if not ok:
            raise UserError(f"{where}, {field}: got {got!r:.60}, need {what}")

    need(isinstance(messages, list) and messages, "messages", messages, "a list of messages")
    first = int(isinstance(messages[0], dict) and messages[0].get("role") == "system")
    need(len(messages) >= first + 2, "messages", messages, "a user's and an assistant's message")
    for i, message in enumerate(messages):
        field = f"messages[{i}]"
        need(isinstance(message, dict), field, message, "an object with role and content")
        role = "system" if i < first else ("user", "assistant")[(i - first) % 2]
        need(message.get("role") == role, f"{field}.role", message.get("role"), repr(role))
        content = message.get("content")
        need(isinstance(content, (str, list)), f"{field}.content", content, "text or a list of parts")
        kinds = ("text", "python", "python_output") if role == "assistant" else ("text",)
        for part in content if isinstance(content, list) else []:
            ok = isinstance(part, dict) and part.get("type") in kinds and isinstance(part.get("text"), str)
            need(ok, f"{field}.content", part, f"parts with a text and a type ({', '.join(kinds)})")
    return messages


class MultipleChoice(Task):
    """Graded by which of conversation["letters"] the model finds likeliest as the first token of its answer."""

    eval_type = "categorical"

    def conversation(self, question, letters, choices, answer):
        messages = [{"role": "user", "content": render_mc(question, letters, choices)},
                    {"role": "assistant", "content": answer}]
        return {"messages": messages, "letters": list(letters)}

    def evaluate(self, conversation, completion):
        return completion == conversation["messages"][-1]["content"]


def render_mc(question: str, letters, choices) -> str:
    """
    A multiple-choice question as text. The letter stands last, where a small model finds it more easily, and has no
    space before it, for " A" is another token than the "A" which opens the answer.

    >>> print(render_mc("What do cows drink?", ["A", "B"], ["Milk", "Water"]))
    What do cows drink?
    - Milk=A
    - Water=B
    Answer with the letter only.
    """
    lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([question, *lines, "Answer with the letter only."])


# a sign, a currency, digits with or without commas and decimals, or a fraction. [0-9]: \d knows other scripts too
NUMBER = re.compile(r"([-+\u2212]?)[ $€£]*([-+\u2212]?)([0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?|\.[0-9]+)")


def parse_answer(text: str) -> Fraction | None:
    r"""
    The first number after the last "####", on its line, or None. By value, so 18, 18., 18.00 and $18 are equal.

    >>> parse_answer("Each costs 2+2 = 4.\n#### $4,000.00 in all")
    Fraction(4000, 1)
    """
    _, marker, tail = text.rpartition("####")
    found = NUMBER.search(tail.partition("\n")[0]) if marker else None
    if found is None or len(found[3]) > 100:  # Python refuses to read endless digits
        return None
    sign = -1 if (found[1] or found[2]) in ("-", "\u2212") else 1
    try:
        return sign * Fraction(found[3].replace(",", ""))
    except (ValueError, ZeroDivisionError):  # "#### 1/0", "#### 1.5/2"
        return None
