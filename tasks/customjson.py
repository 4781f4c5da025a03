"""
Your own conversations, from a JSONL file: each line a list of messages, or an object with such a
list as "messages".

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am nanochat."}]

Every line is read and checked when the task is made, so that a bad one shows before training
begins, not during it.
"""

from pathlib import Path

from nanochat.common import UserError, get_data_root
from tasks.common import Task, check_messages, read_jsonl

IDENTITY = "identity_conversations.jsonl"  # who the model says it is


class CustomJSON(Task):
    """
    Without a filepath: the identity conversations, from the mirror $NANOCHAT_DATA_DIR if it is set,
    else from the base directory.
    """

    def __init__(self, filepath=None, **kwargs):
        super().__init__(**kwargs)
        path = get_data_root() / IDENTITY if filepath is None else Path(filepath)
        self.rows = read_conversations(path)

    def get_example(self, index):
        return {"messages": self.rows[index]}


def read_conversations(path: Path) -> list[list[dict]]:
    """The messages of each line. A file without any is as wrong as one that is not there."""
    if not path.is_file():
        raise UserError(
            f"no file of conversations at {path}",
            "put one there, a JSON list of {role, content} messages a line, or name another file",
        )
    conversations = []
    for where, data in read_jsonl(path):
        messages = data.get("messages") if isinstance(data, dict) else data
        conversations.append(check_messages(messages, where))
    if not conversations:
        raise UserError(f"{path} holds no conversation")
    return conversations
