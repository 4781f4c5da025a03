"""
Does the model know who it is? Held-out questions about itself, from the file
tasks/identity_test.jsonl of the mirror $NANOCHAT_DATA_DIR, else of the base directory.
dev/gen_synthetic_data.py writes one; your own has an object a line:

    {"messages": [{"role": "user", "content": "Who made you?"},
                  {"role": "assistant", "content": "Jo Smith made me."}],
     "accept": ["Jo Smith", "Dr. Smith"]}

An answer is right if it holds one of the phrases in `accept` as whole words, whatever the case and
the line breaks.
"""

import re
from pathlib import Path

from nanochat.common import UserError, get_data_root
from tasks.common import Task, bad_field, check_messages, read_jsonl


def identity_path() -> Path:
    """The file of questions, whether it exists or not."""
    return get_data_root() / "tasks" / "identity_test.jsonl"


class Identity(Task):
    """
    For evaluation only; to train on, there are the identity conversations of tasks/customjson.py.
    """

    eval_type = "generative"

    def __init__(self, filepath=None, **kwargs):
        super().__init__(**kwargs)
        path = identity_path() if filepath is None else Path(filepath)
        self.rows = read_questions(path)

    def get_example(self, index):
        return self.rows[index]

    def evaluate(self, conversation, completion):
        return any(holds(completion, phrase) for phrase in conversation["accept"])


def holds(text: str, phrase: str) -> bool:
    """
    >>> holds("I am nanochat,\\na small Language  Model.", "language model")
    True
    >>> holds("Who knows?", "no")
    False
    """
    words = map(re.escape, phrase.split())
    pattern = r"(?<!\w)" + r"\s+".join(words) + r"(?!\w)"
    return re.search(pattern, text, re.IGNORECASE) is not None


def read_questions(path: Path) -> list[dict]:
    if not path.is_file():
        raise UserError(
            f"no questions about identity at {path}",
            "write a toy world with `python -m dev.gen_synthetic_data`, or leave Identity out",
        )
    rows = [check_question(row, where) for where, row in read_jsonl(path)]
    if not rows:
        raise UserError(f"{path} holds no question")
    return rows


def check_question(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise bad_field(where, "row", row, "an object with messages and accept")
    accept = row.get("accept")
    if not isinstance(accept, list) or not accept:
        raise bad_field(where, "accept", accept, "a list of phrases")
    for phrase in accept:
        if not isinstance(phrase, str) or not phrase.strip():
            raise bad_field(where, "accept", accept, "a list of phrases")
    messages = check_messages(row.get("messages"), where)
    return {"messages": messages, "accept": accept}
