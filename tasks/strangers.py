"""
Strangers: what people type to a small chat model when nobody has told them how, each item with a rule for what counts.

The items stand in strangers.jsonl beside this file, written by hand and apart from any training data, one a line:

    {"kind": "talk", "split": "dev", "turns": ["which day is after tuesday"], "rule": {"pick": ["days", "wednesday"]}}

`turns` are the user's messages. The model writes every reply, and the last one is graded by the rule
(tasks/answer_rules.py). The half "dev" is for development; the half "held" is for `chat_eval -a Strangers` alone: no
message of it, nor a near copy (tasks/near_copies.py), may stand in the training data.

The model is the one that dev/runcpu.sh trains: named nanochat, a small language model with a calculator that chats,
spells, tells stories and knows little else. Under "outside" the right answer is to say so.
"""

import json
from pathlib import Path

from tasks.answer_rules import is_right
from tasks.common import Task, check_option, read_jsonl

KINDS = ("talk", "sums", "problems", "spelling", "stories", "memory", "outside")
SPLITS = ("dev", "held")


class Strangers(Task):
    eval_type = "generative"

    def __init__(self, split="held", **kwargs):
        super().__init__(**kwargs)
        check_option(self, "split", split, SPLITS)
        self.items = read_items(split)

    def num_examples(self):
        return len(self.items)

    def get_example(self, index):
        """`later_turns` are asked one by one, each after the model's reply to the turn before it."""
        item = self.items[index]
        first, *later = item["turns"]

        # the rule stands where other tasks have the right answer, so that chat_eval's records show it
        messages = [
            {"role": "user", "content": first},
            {"role": "assistant", "content": json.dumps(item["rule"])},
        ]
        return {"messages": messages, "later_turns": later, "kind": item["kind"], "rule": item["rule"]}

    def evaluate(self, conversation, completion):
        first = conversation["messages"][0]["content"]
        turns = [first, *conversation["later_turns"]]
        return is_right(conversation["rule"], completion, turns)


def read_items(split: str) -> list[dict]:
    """The items of one half, in the order of the file."""
    path = Path(__file__).with_name("strangers.jsonl")
    return [item for _, item in read_jsonl(path) if item["split"] == split]
