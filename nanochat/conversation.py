"""
The form of a conversation, and the one rule that brings the messages of the world into it. The API,
the terminal, files to train on, the tokenizer and the exported template all follow this rule.

    {"messages": [{"role": ROLE, "content": TEXT or [{"type": PART_TYPE, "text": TEXT}, ...]}, ...]}

A model knows two sides that speak in turns, the user's and the assistant's. `normalize_messages`
brings a list of messages into such turns:

    a message of                        becomes
    user, system, developer             text of the user's turn
    tool, function: what a tool gave    text of the user's turn
    assistant                           the assistant's turn; its tool calls are texts after its
                                        own, {"name": NAME, "arguments": ARGUMENTS}
    any role, with content null         nothing, unless it has tool calls

    neighbours of one side              one turn. Their texts are joined by a blank line; an empty
                                        text is left out
    the assistant's as the first        stays the first turn
    the assistant's as the last         stays the last turn, which a completion can continue
    "weight": 0 on an assistant's       it is not trained on, and nothing of the turn that it is in
    (or "train": false, "loss": false)

Only the assistant's messages have parts other than text. Errors name the message by its index.
"""

import json

from nanochat.common import UserError

# The types of a message's parts, and the special tokens around each. Text has none
PART_FENCES = {
    "text": (),
    "python": ("<|python_start|>", "<|python_end|>"),            # a call of the calculator
    "python_output": ("<|output_start|>", "<|output_end|>"),     # its result
}

# The same for a reader of tokens: special token -> type of the part that begins after it
PART_AFTER = {
    "<|python_start|>": "python",
    "<|python_end|>": "text",
    "<|output_start|>": "python_output",
    "<|output_end|>": "text",
}

# The roles of messages, all but the last one on the user's side
SYSTEM_ROLES = ("system", "developer")  # the second is OpenAI's newer name
TOOL_ROLES = ("tool", "function")       # the second is OpenAI's older name
ROLES = (*SYSTEM_ROLES, "user", *TOOL_ROLES, "assistant")

# Fields that say whether a message is trained on: of OpenAI's files, Axolotl's and ms-swift's
WEIGHT_FIELDS = ("weight", "train", "loss")

# -----------------------------------------------------------------------------
# The rule


def normalize_messages(messages):
    """
    The turns of a list of messages, by the rule above, as messages in one form:

        {"role": "user" or "assistant", "content": [{"type", "text"}, ...], "weight": 1 or 0}

    The two roles take turns. No text is empty, and no two texts are neighbours, so a user's turn
    has one text or none. The weight is 1 if the turn is trained on. The list itself is not
    changed, and its turns are their own normal form. Raises UserError.

    >>> system = {"role": "system", "content": "Be kind."}
    >>> user = {"role": "user", "content": "Hi"}
    >>> normalize_messages([system, user])
    [{'role': 'user', 'content': [{'type': 'text', 'text': 'Be kind.\\n\\nHi'}], 'weight': 0}]
    """
    # From a user's file it may be anything
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(f"messages need to be a non-empty list, got {messages!r:.80}")

    turns = []
    for index, message in enumerate(messages):
        turn = _read_message(message, index)
        if turn is None:  # it says nothing
            continue
        if turns and turns[-1]["role"] == turn["role"]:
            _join_turns(turns[-1], turn)
        else:
            turns.append(turn)
    if not turns:
        raise UserError("no message has a content, needed: one that has")
    return turns


def question_starts(messages):
    """
    Indices of the messages with which a question begins: of the user or the system, after one of
    the assistant or at the start. A conversation that is cut there loses whole exchanges.

    >>> roles = ["system", "user", "assistant", "tool", "assistant", "user"]
    >>> question_starts([{"role": role} for role in roles])
    [0, 5]
    """
    starts = []
    before = "assistant"
    for index, message in enumerate(messages):
        role = message["role"]
        if before == "assistant" and role in (*SYSTEM_ROLES, "user"):
            starts.append(index)
        before = role
    return starts


def _join_turns(turn, other):
    """Add what `other` says to `turn`, after a blank line."""
    if turn["content"] and other["content"]:
        _add_part(turn["content"], "text", "\n\n")
    for part in other["content"]:
        _add_part(turn["content"], part["type"], part["text"])
    turn["weight"] = min(turn["weight"], other["weight"])


def _add_part(parts, part_type, text):
    """Add a part to the end. Texts grow together, so that their border leaves no trace."""
    if part_type != "text":
        parts.append({"type": part_type, "text": text})
    elif parts and parts[-1]["type"] == "text":
        parts[-1]["text"] += text
    elif text:
        parts.append({"type": "text", "text": text})


# -----------------------------------------------------------------------------
# One message


def _read_message(message, index):
    """The message as a turn of its own, None if it says nothing. UserError if it is malformed."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise UserError(
            f"message {index} needs a role, one of {', '.join(ROLES)}: {message!r:.80}"
        )
    side = "assistant" if role == "assistant" else "user"
    calls = _read_calls(message, index) if role == "assistant" else []

    # Null is what a client sends, and a table stores, where there is nothing to say
    content = message.get("content")
    if content is None and not calls:
        if "content" not in message:
            raise UserError(f"message {index} has no content: {message!r:.80}")
        return None

    turn = {"role": side, "content": _read_content(content, role, index)}
    turn["weight"] = _read_weight(message, index)
    for call in calls:
        call_text = {"type": "text", "text": call}
        _join_turns(turn, {"content": [call_text], "weight": turn["weight"]})
    return turn


def _read_content(content, role, index):
    """A message's content as a list of parts."""
    parts = []
    if content is None:
        return parts
    if isinstance(content, str):
        _add_part(parts, "text", content)
        return parts
    if not isinstance(content, (list, tuple)):
        kind = type(content).__name__
        raise UserError(f"message {index} has content of type {kind}, needed: str or list of parts")

    # Other keys of a part are left out
    allowed = list(PART_FENCES) if role == "assistant" else ["text"]
    for part_index, part in enumerate(content):
        match part:
            case {"type": part_type, "text": str(text)} if part_type in allowed:
                _add_part(parts, part_type, text)
            case _:
                types = ", ".join(allowed)
                raise UserError(
                    f"part {part_index} of message {index} ({role}) needs a type, one of {types}, "
                    f"and a text: {part!r:.80}"
                )
    return parts


def _read_weight(message, index):
    """1 if the message is trained on: by default if it is the assistant's."""
    is_assistant = message["role"] == "assistant"
    for field in WEIGHT_FIELDS:
        weight = message.get(field)
        if weight is None:
            continue
        if is_assistant and weight not in (0, 1):
            raise UserError(f"message {index} has {field} {weight!r:.20}, needed: 0 or 1")
        if not is_assistant and weight != 0:
            raise UserError(
                f"message {index} ({message['role']}) has {field} {weight!r:.20}, needed: 0 or none, "
                "since only the assistant's are trained on"
            )
        return int(weight)
    return int(is_assistant)


def _read_calls(message, index):
    """The texts of an assistant message's tool calls, in the two forms that OpenAI has had."""
    calls = message.get("tool_calls") or []
    if message.get("function_call") and not calls:
        calls = [{"function": message["function_call"]}]
    texts = []
    try:
        for call in calls:
            function = call["function"]
            arguments = function["arguments"]
            # Text is taken as it is; templates of other servers parse it first
            if not isinstance(arguments, str):
                arguments = json.dumps(arguments, ensure_ascii=False)
            texts.append(f'{{"name": "{function["name"]}", "arguments": {arguments}}}')
    except (KeyError, TypeError) as error:
        raise UserError(
            f"message {index} has tool calls of another form ({error!r:.80}), needed: a list of "
            '{"function": {"name": NAME, "arguments": JSON}}'
        ) from error
    return texts
