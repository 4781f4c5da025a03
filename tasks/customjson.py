"""
Your own conversations, from a JSONL file: each line a list of messages, or an object with such a list as "messages".

    [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "I am nanochat."}]

Every line is read and checked when the task is made, so that a bad one shows before training begins, not during it.
"""

from pathlib import Path

from nanochat.common import UserError, get_data_root
from tasks.common import Task, check_messages, read_jsonl

IDENTITY = "identity_conversations.jsonl"  # who the model says it is


class CustomJSON(Task):
    """filepath None: the identity conversations of the mirror $NANOCHAT_DATA_DIR, else of the base directory."""

    def __init__(self, filepath=None, **kwargs):
        super().__init__(**kwargs)
        path = Path(filepath) if filepath is not None else get_data_root() / IDENTITY
        self.conversations = read_conversations(path)

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, index):
        return {"messages": self.conversations[index]}


def read_conversations(path: Path) -> list[list[dict]]:
    """The messages of each line; a file without any is as wrong as one that is not there."""
    if not path.is_file():
        raise UserError(f"no file of conversations at {path}",
                        "put one there, a JSON list of {role, content} messages a line, or name another file")
    conversations = [check_messages(data.get("messages") if isinstance(data, dict) else data, where)
                     for where, data in read_jsonl(path)]
    if not conversations:
        raise UserError(f"{path} holds no conversation")
    return conversations
