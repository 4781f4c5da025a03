"""
Drawing without overlap. An item has keys; nothing drawn later shares a key with one that is held out.
"""

import re

from dev.toyworld.grammar import Rng
from nanochat.progress import show_progress


def normalize(text):
    """What makes two texts the same: their letters and digits."""
    return " ".join(re.findall(r"[^\W_]+", text.lower())) or text


def message_keys(message):
    return [normalize(message)]


def user_keys(messages):
    """The keys of what the user says in a conversation."""
    return [normalize(message["content"]) for message in messages if message["role"] == "user"]


def choice_keys(item):
    """A multiple-choice item is its question with its choices in any order."""
    _, question, choices, *_ = item
    return " / ".join([normalize(question), *sorted(map(normalize, choices))])


class Draws:
    """
    Draws items from the seed. It remembers the keys of the held-out ones, and makes `scale` times as many items as it
    is asked for (a test wants a small mirror).
    """

    def __init__(self, seed, scale=1.0):
        self.seed = seed
        self.scale = scale
        self.held = set()

    def rng(self, part, split="train"):
        rng = Rng(f"{self.seed}:{part}")
        rng.split = split
        return rng

    def __call__(self, part, count, make, keys, split="train", hold=None):
        """
        `count` different items, each made by make(rng) from a generator of its own, none with a held-out key.
        hold(item) are the keys that nothing drawn later may share.
        """
        count = max(8, round(count * self.scale))
        items = []
        seen = set()
        for attempt in show_progress(range(count * 50), f"drawing {part}", "draws", total=count):
            item = make(self.rng(f"{part}:{attempt}", split))
            item_keys = tuple(keys(item))
            if item_keys in seen or not self.held.isdisjoint(item_keys):
                continue
            seen.add(item_keys)
            items.append(item)
            if len(items) == count:
                break
        if len(items) < count:
            raise RuntimeError(f"{part}: only {len(items)} of {count} different items in {count * 50} draws")
        if hold is not None:
            for item in items:
                self.held.update(hold(item))
        return items
