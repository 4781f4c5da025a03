"""
ARC: science questions of grades 3 to 9 (arXiv 1803.05457, huggingface.co/datasets/allenai/ai2_arc).
Three to five choices each.

ARC-Easy: train 2,251, validation 570, test 2,376
ARC-Challenge: train 1,119, validation 299, test 1,172
"""

from nanochat.common import UserError
from tasks.common import MultipleChoice, check_option
from tasks.hub import load_rows

NAMES = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}
COLUMNS = {"question": str, "choices": dict, "answerKey": str}


class ARC(MultipleChoice):
    def __init__(self, subset="ARC-Easy", split="train", **kwargs):
        super().__init__(**kwargs)
        check_option(self, "subset", subset, tuple(NAMES))
        check_option(self, "split", split, ("train", "validation", "test"))
        self.rows = load_rows(NAMES[subset], split, COLUMNS)

    def get_example(self, index):
        row = self.rows[index]
        choices = row["choices"].get("text") or []
        letters = row["choices"].get("label") or []  # some exams use 1, 2, 3, 4
        answer = row["answerKey"]
        if len(letters) != len(choices) or answer not in letters:
            raise UserError(
                f"{self.rows.where(index)}: got {row!r:.200}",
                "need a label for each text and one of them as answerKey",
            )
        question = row["question"]
        return self.conversation(question, letters, choices, answer)
