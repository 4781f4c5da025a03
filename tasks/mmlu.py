"""
MMLU: four-way questions from 57 school subjects (arXiv 2009.03300,
huggingface.co/datasets/cais/mmlu). Training uses the auxiliary set of 99,842 questions from other
exams; `all` has the benchmark: test 14,042, validation 1,531, dev 285.
"""

from nanochat.common import UserError
from tasks.common import MultipleChoice, check_option
from tasks.hub import load_rows

LETTERS = ("A", "B", "C", "D")
SPLITS = {  # the first one is the default
    "auxiliary_train": ("train",),
    "all": ("test", "validation", "dev", "auxiliary_train"),
}
COLUMNS = {"question": str, "subject": str, "choices": list, "answer": int}


class MMLU(MultipleChoice):
    def __init__(self, subset="auxiliary_train", split=None, **kwargs):
        super().__init__(**kwargs)
        check_option(self, "subset", subset, tuple(SPLITS))
        if split is None:
            split = SPLITS[subset][0]
        check_option(self, "split", split, SPLITS[subset])
        if split == "train":
            split = "auxiliary_train"  # its name on the hub and in a mirror
        self.rows = load_rows("mmlu", split, COLUMNS)

    def get_example(self, index):
        row = self.rows[index]
        choices = row["choices"]
        answer = row["answer"]
        if len(choices) != len(LETTERS) or answer not in range(len(LETTERS)):
            where = self.rows.where(index)
            raise UserError(f"{where}: need 4 choices and an answer from 0 to 3, got {row!r:.200}")
        conversation = self.conversation(row["question"], LETTERS, choices, LETTERS[answer])
        conversation["subject"] = row["subject"]  # for results by subject
        return conversation
