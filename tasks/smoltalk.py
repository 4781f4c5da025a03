"""
SmolTalk: general conversations, made for models under 1B parameters
(huggingface.co/datasets/HuggingFaceTB/ smol-smoltalk: train 460,341, test 24,229). From a mirror:
whatever conversations chat/ holds.
"""

from tasks.common import Task, check_messages, check_option
from tasks.hub import load_rows


class SmolTalk(Task):
    """For training only: no rule says what a good answer to small talk is."""

    def __init__(self, split="train", **kwargs):
        super().__init__(**kwargs)
        check_option(self, "split", split, ("train", "test"))
        self.rows = load_rows("smoltalk", split, {"messages": list})

    def get_example(self, index):
        messages = self.rows[index]["messages"]
        check_messages(messages, self.rows.where(index))
        return {"messages": messages}
