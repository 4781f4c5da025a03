"""
The form of a conversation: its roles, the parts of a message, the special tokens around each part.

    {"messages": [{"role": ROLE, "content": TEXT or [{"type": PART_TYPE, "text": TEXT}, ...]}, ...]}

An optional system message comes first, then user and assistant in turns. Only the assistant's
messages have parts other than text. tokenizer.py turns a conversation into tokens.
"""

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


def check_conversation(conversation):
    """
    The turns of a conversation as they are rendered: [(role, [(part type, text), ...]), ...]. A
    system message is put in front of the first user message. Raises UserError, with the index of
    the message, if the form is wrong.

    >>> system = {"role": "system", "content": "Be kind."}
    >>> user = {"role": "user", "content": "Hi"}
    >>> check_conversation({"messages": [system, user]})
    [('user', [('text', 'Be kind.\\n\\nHi')])]
    """
    # The list of messages: a conversation comes from a user's file, so it may be anything
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, (list, tuple)) or not messages:
        raise UserError(
            f"a conversation needs a non-empty list under 'messages', got {messages!r:.80}"
        )
    turns = [_parse_message(message, index) for index, message in enumerate(messages)]

    # Its roles, in their order
    first = 1 if turns[0][0] == "system" else 0  # index of the first user message
    if len(turns) == first:
        raise UserError("message 0 is a system message, and no user message follows it")
    for index in range(first, len(turns)):
        role = turns[index][0]
        needed = "user" if (index - first) % 2 == 0 else "assistant"
        if role != needed:
            raise UserError(
                f"message {index} has role {role!r}, needed {needed!r}: an optional system "
                "message, then user and assistant in turns"
            )

    # The system message becomes the start of the first user message
    if first == 1:
        system = _join(turns[0][1])
        user = _join(turns[1][1])
        turns[:2] = [("user", [("text", f"{system}\n\n{user}")])]
    return turns


def _parse_message(message, index):
    """(role, [(part type, text), ...]) of message number `index`. UserError if it is malformed."""
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant"):
        raise UserError(
            f"message {index} needs a role, one of system, user, assistant: {message!r:.80}"
        )

    # A str is one part
    content = message.get("content")
    if isinstance(content, str):
        return role, [("text", content)]
    if not isinstance(content, (list, tuple)):
        kind = type(content).__name__
        raise UserError(f"message {index} has content of type {kind}, needed: str or list of parts")

    # Other keys of a part are ignored
    allowed = list(PART_FENCES) if role == "assistant" else ["text"]
    parts = []
    for part_index, part in enumerate(content):
        match part:
            case {"type": part_type, "text": str(text)} if part_type in allowed:
                parts.append((part_type, text))
            case _:
                types = ", ".join(allowed)
                raise UserError(
                    f"part {part_index} of message {index} ({role}) needs a type, one of {types}, "
                    f"and a text: {part!r:.80}"
                )

    # Joined before they are encoded, so that the borders of the parts leave no trace
    if role != "assistant":
        parts = [("text", _join(parts))]
    return role, parts


def _join(parts):
    return "".join(text for _, text in parts)
