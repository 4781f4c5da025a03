"""
SmolTalk: general conversations, made for models under 1B parameters (huggingface.co/datasets/HuggingFaceTB/
smol-smoltalk: train 460,341, test 24,229; 1 GB in memory). From a mirror: whatever conversations chat/ holds.
"""

from tasks.common import Task, check_messages, check_option
from tasks.hub import load_rows


class SmolTalk(Task):
    """For training: what a good answer to small talk is cannot be computed."""

    def __init__(self, split="train", **kwargs):
        super().__init__(**kwargs)
        check_option(self, "split", split, ("train", "test"))
        self.rows = load_rows("smoltalk", split, {"messages": list})

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        return {"messages": check_messages(self.rows[index]["messages"], self.rows.where(index))}
