"""
ARC: science questions of grades 3 to 9 (arXiv 1803.05457, huggingface.co/datasets/allenai/ai2_arc).
ARC-Easy: train 2,251, validation 570, test 2,376; ARC-Challenge: 1,119, 299, 1,172. Three to five choices each.
"""

from nanochat.common import UserError
from tasks.common import MultipleChoice, check_option
from tasks.hub import load_rows

NAMES = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}


class ARC(MultipleChoice):
    def __init__(self, subset="ARC-Easy", split="train", **kwargs):
        super().__init__(**kwargs)
        check_option(self, "subset", subset, tuple(NAMES))
        check_option(self, "split", split, ("train", "validation", "test"))
        self.rows = load_rows(NAMES[subset], split, {"question": str, "choices": dict, "answerKey": str})

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        row = self.rows[index]
        letters, choices = row["choices"].get("label"), row["choices"].get("text")  # some exams use 1, 2, 3, 4
        if not letters or not choices or len(letters) != len(choices) or row["answerKey"] not in letters:
            raise UserError(f"{self.rows.where(index)}: need a label for each text and one of them as answerKey, "
                            f"got {row!r:.200}")
        return self.conversation(row["question"], letters, choices, row["answerKey"])
