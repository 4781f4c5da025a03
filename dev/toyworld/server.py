"""
More varied identity conversations, from a model behind an OpenAI-compatible server.

Each request states what is true of the model (the persona), who asks, and about what. A reply is kept if it is a
well-formed conversation in which the model says its name, is new, and asks no held-out question.
"""

import json
import random
import re
import time
from collections import Counter

import requests

from dev.toyworld.draws import normalize, user_keys
from dev.toyworld.grammar import expand
from dev.toyworld.mirror import IDENTITY_FILE, to_jsonl
from dev.toyworld.persona import load_persona, self_intents
from nanochat.common import UserError, write_text
from tasks.common import read_jsonl

ADDED_FILE = "identity_added.jsonl"  # from which a later writing of the mirror takes them
BRIEF = """Write one short conversation between a user and {name}. What is true of {name}:
{facts}
The user is {user} and wants to know: {topic} Two to six messages in simple words, the user first, {name} last.
Reply with JSON only: a list of {{"role": "user" or "assistant", "content": "..."}}."""
USERS = ["a child", "a teacher", "a curious student", "in a hurry", "very polite", "a bit rude", "a poet",
         "an engineer", "someone who has never met a chatbot", "tired", "joking", "a farmer"]
MAX_BAD = 20  # replies in a row that are no use, before giving up


def make_brief(rng, persona=None):
    persona = persona or load_persona("toy")
    intents = self_intents()
    facts = [expand(rng.choice(intent["<"]), rng).format(**persona) for intent in intents]
    topic = expand(rng.choice(rng.choice(intents)[">"]), rng).format(**persona)
    return BRIEF.format(name=persona["name"], facts="\n".join(f"- {fact}" for fact in facts),
                        user=rng.choice(USERS), topic=f"{topic}?")


def ask_server(base_url, api_key, model, brief, timeout_s=120.0):
    """One chat completion, as text. ValueError: this reply is no use. UserError: no further one will be."""
    body = {"model": model, "messages": [{"role": "user", "content": brief}], "temperature": 1.0, "max_tokens": 800}
    headers = {"Content-Type": "application/json"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    try:
        url = f"{base_url.rstrip('/')}/chat/completions"
        response = requests.post(url, json=body, headers=headers, timeout=timeout_s)
    except requests.ConnectionError as error:
        raise UserError(f"--base_url={base_url} does not answer: {error}",
                        f"is the server up? try: curl {base_url}/models") from error
    except requests.RequestException as error:
        raise ValueError(f"no reply: {error}") from error
    if response.status_code in (400, 401, 403, 404):  # our address, key or model is wrong: asking again will not help
        raise UserError(f"--base_url={base_url} answers {response.status_code}: {response.text[:200]}",
                        "check --base_url (it ends in /v1), --api_key and --model")
    if response.status_code != 200:
        raise ValueError(f"status {response.status_code}")
    try:
        return response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"not a chat completion: {response.text[:80]!r}") from error


def parse_conversation(reply, name="nanochat"):
    """The messages in a reply, with or without a code fence around them; a ValueError says what is wrong with it."""
    found = re.search(r"\[.*\]", reply or "", re.DOTALL)
    messages = json.loads(found[0]) if found else None
    if not isinstance(messages, list) or not 2 <= len(messages) <= 8 or len(messages) % 2:
        raise ValueError("not a list of 2, 4, 6 or 8 messages")
    for i, message in enumerate(messages):
        role = ("user", "assistant")[i % 2]
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) or message.get("role") != role:
            raise ValueError(f"message {i} is not the {role}'s text")
        if not 1 <= len(content.strip()) <= 600 or "<|" in content:
            raise ValueError(f"message {i} is empty, too long or holds a special token")
    answers = " ".join(message["content"] for message in messages[1::2])
    if normalize(name) not in normalize(answers):
        raise ValueError(f"{name} never says its name")
    return [{"role": message["role"], "content": message["content"].strip()} for message in messages]


def whole_key(messages):
    return normalize(" ".join(message["content"] for message in messages))


def append_conversation(root, messages):
    """At once into both files: a stop costs one conversation at most."""
    for path in (root / ADDED_FILE, root / IDENTITY_FILE):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        write_text(path, before + to_jsonl([messages]))


def add_identity_conversations(root, num, ask, seed, wait_s=1.0):
    """Append `num` new conversations made by ask(brief) to the mirror; returns the number of bad replies by reason."""
    chats = [messages for _, messages in read_jsonl(root / IDENTITY_FILE)]
    seen = {whole_key(messages) for messages in chats}
    held = set()
    for _, row in read_jsonl(root / "tasks/identity_test.jsonl"):
        held.update(user_keys(row["messages"]))
    rng = random.Random(f"{seed}:server:{len(chats)}")
    bad = Counter()
    added = 0
    streak = 0  # bad replies since the last good one
    while added < num:
        try:
            messages = parse_conversation(ask(make_brief(rng)))
            if whole_key(messages) in seen or not held.isdisjoint(user_keys(messages)):
                raise ValueError("not new")
        except UserError:  # a ValueError too, but this one ends it
            raise
        except ValueError as error:
            bad[str(error)[:60]] += 1
            streak += 1
            if streak == MAX_BAD:
                raise UserError(f"{MAX_BAD} replies in a row were no use, {added} of {num} conversations added; "
                                f"the last: {error}", "try another --model") from error
            time.sleep(wait_s)
            continue
        seen.add(whole_key(messages))
        append_conversation(root, messages)
        added += 1
        streak = 0
    return bad
