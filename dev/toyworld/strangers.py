"""
Keeping the evaluation honest: nothing that the model trains on is a near copy of a held-out message of
tasks/strangers.jsonl. Nobody has to look at these messages for it.
"""

import functools

from nanochat.progress import show_progress
from tasks.near_copies import NearCopies
from tasks.strangers import read_items


@functools.cache
def held_out():
    return NearCopies(["\n".join(item["turns"]) for item in read_items("held")])


@functools.cache
def is_near_copy(text):
    return bool(held_out().find(text))


def drop_near_copies(items, texts_of):
    """The items without those that hold a near copy; texts_of(item) are the messages of an item."""
    items = show_progress(items, "looking for near copies", "items")
    return [item for item in items if not any(map(is_near_copy, texts_of(item)))]


def dialogue_lines(document):
    """What the users of a pretraining document say: its lines that begin with `>`."""
    text, _ = document
    return [line[2:] for line in text.splitlines() if line.startswith("> ")]


def question(row):
    return [row["question"]]
