"""
Your own conversations, from one file: .jsonl, .json (one array), both also as .gz or .zst, or
.parquet. A row is a list of messages, or an object of one of these shapes:

    messages              [{role, content}, ...]
    conversations         the same, or ShareGPT's [{from, value}, ...]
    prompt, completion    texts, or lists of messages; only the completion is trained on
    instruction, output   texts, perhaps with `input` after the instruction, and `history`:
                          earlier [instruction, output] pairs

An object may also have a text `system`, which comes first. nanochat/conversation.py says what
becomes of the messages, and what "weight": 0 means.

Every row is read and checked when the task is made, so that bad ones show before training begins.
"""

import json
from pathlib import Path

from nanochat.common import UserError, get_data_root
from nanochat.documents import iter_parquet, read_lines
from nanochat.progress import show_progress
from tasks.common import Task, check_messages, exchange, read_jsonl

IDENTITY = "identity_conversations.jsonl"  # who the model says it is
MAX_NAMED = 3  # of the bad rows, in an error

# ShareGPT's names of the roles, and those that were added to it
FROM = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

# Fields that tell the model what it can call: without them it would learn to call out of the blue
TOOL_FIELDS = ("tools", "functions")


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
    """
    The messages of each row. UserError for a file of another shape, or one that names the first bad
    rows. A file without any row is as wrong as one that is not there.
    """
    if not path.is_file():
        raise UserError(
            f"no file of conversations at {path}",
            "put one there, a JSON list of {role, content} messages a line, or name another file",
        )
    # One row at a time: memory holds the messages alone, not what is around them
    conversations = []
    problems = []
    num_rows = 0
    first = None         # row of the file, to describe it
    known_shape = False  # has any row one?
    for where, row in show_progress(read_rows(path), f"reading {path.name}", "rows"):
        num_rows += 1
        if num_rows == 1:
            first = row
        known_shape = known_shape or find_shape(row) is not None
        try:
            conversations.append(read_row(row, where))
        except UserError as error:
            problems.append(str(error))
    if num_rows == 0:
        raise UserError(f"{path} holds no conversation")
    if not known_shape:
        raise UserError(f"{path} holds rows of another shape: {describe(first)}", f"needed: {NEED}")
    if problems:
        named = "; ".join(problems[:MAX_NAMED])
        raise UserError(
            f"{len(problems)} of {num_rows} conversations cannot be used: {named}",
            "mend or delete those rows",
        )
    return conversations


# -----------------------------------------------------------------------------
# Rows of a file


def read_rows(path):
    """Yield ("<path>, line or row <n>", value) for each row of a file."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in (".gz", ".zst")]
    kind = suffixes[-1] if suffixes else ""
    if kind == ".parquet":
        for number, row in enumerate(iter_parquet(path)):
            yield f"{path}, row {number}", row
        return
    if kind != ".json":
        yield from read_jsonl(path)
        return

    # Some files of this name hold an array, some a row on each line
    try:
        value = json.loads(b"".join(read_lines(path)))
    except (ValueError, RecursionError):
        yield from read_jsonl(path)
        return
    rows = value if isinstance(value, list) else [value]
    for number, row in enumerate(rows):
        yield f"{path}, row {number}", row


def read_row(row, where):
    """The messages of a row, checked. UserError that begins with `where`."""
    shape = find_shape(row)
    if shape is None:
        raise UserError(f"{where}: {describe(row)}, needed: {NEED}")
    if isinstance(row, list):
        return check_messages(row, where)

    for field in TOOL_FIELDS:
        if row.get(field):
            raise UserError(
                f"{where}: the field {field} is not supported, needed: a system message that says "
                "what can be called"
            )
    try:
        messages = shape(row)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"{where}: {describe(row)} in another form ({error!r})") from error
    system = row.get("system")
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    return check_messages(messages, where)


def describe(row):
    if isinstance(row, dict) and not row:
        return "no fields"
    if isinstance(row, dict):
        return f"the fields {', '.join(row)}"
    return f"a value of type {type(row).__name__}"


# -----------------------------------------------------------------------------
# Shapes of a row


def from_messages(row):
    return list(row["messages"])


def from_conversations(row):
    """
    >>> from_conversations({"conversations": [{"from": "human", "value": "Hi"}]})
    [{'role': 'user', 'content': 'Hi'}]
    """
    messages = []
    for turn in row["conversations"]:
        if "from" in turn:
            turn = dict(turn)
            sender = turn.pop("from")
            turn["role"] = FROM.get(sender, sender)
            turn["content"] = turn.pop("value")
        messages.append(turn)
    return messages


def from_completion(row):
    """
    >>> from_completion({"prompt": "2+3?", "completion": "5"})
    [{'role': 'user', 'content': '2+3?', 'weight': 0}, {'role': 'assistant', 'content': '5'}]
    """
    messages = as_messages(row["prompt"], "user")
    messages = [{**message, "weight": 0} for message in messages]
    return messages + as_messages(row["completion"], "assistant")


def as_messages(value, role):
    return [{"role": role, "content": value}] if isinstance(value, str) else list(value)


def from_instruction(row):
    """
    >>> from_instruction({"instruction": "Add.", "input": "2+3", "output": "5"})
    [{'role': 'user', 'content': 'Add.\\n\\n2+3'}, {'role': 'assistant', 'content': '5'}]
    """
    messages = []
    for instruction, output in row.get("history") or []:
        messages += exchange(instruction, output)
    question = row["instruction"]
    if row.get("input"):
        question = f"{question}\n\n{row['input']}"
    return messages + exchange(question, row["output"])


# Fields -> the function that reads a row with them as messages; the first that fits is taken
SHAPES = {
    ("messages",): from_messages,
    ("conversations",): from_conversations,
    ("prompt", "completion"): from_completion,
    ("instruction", "output"): from_instruction,
}
NEED = "rows with " + ", or ".join(" and ".join(fields) for fields in SHAPES)


def find_shape(row):
    """The function that reads a row of this shape as messages, None for any other shape."""
    if isinstance(row, list):
        return list
    if not isinstance(row, dict):
        return None
    for fields, read in SHAPES.items():
        if all(row.get(field) is not None for field in fields):
            return read
    return None
