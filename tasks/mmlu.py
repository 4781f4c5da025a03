"""
MMLU: four-way questions from 57 school subjects (arXiv 2009.03300, huggingface.co/datasets/cais/mmlu). Training uses
the auxiliary set of 99,842 questions from other exams; `all` has the benchmark: test 14,042, validation 1,531, dev 285.
"""

from nanochat.common import UserError
from tasks.common import MultipleChoice, check_option
from tasks.hub import load_rows

LETTERS = ("A", "B", "C", "D")
SPLITS = {"auxiliary_train": ("train",), "all": ("test", "validation", "dev", "auxiliary_train")}


class MMLU(MultipleChoice):
    def __init__(self, subset="auxiliary_train", split=None, **kwargs):
        """split None: `train` of auxiliary_train, `test` of all."""
        super().__init__(**kwargs)
        check_option(self, "subset", subset, tuple(SPLITS))
        split = SPLITS[subset][0] if split is None else split
        check_option(self, "split", split, SPLITS[subset])
        split = "auxiliary_train" if split == "train" else split  # the name of these rows on the hub and in a mirror
        self.rows = load_rows("mmlu", split, {"question": str, "subject": str, "choices": list, "answer": int})

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        row = self.rows[index]
        if len(row["choices"]) != len(LETTERS) or not 0 <= row["answer"] < len(LETTERS):
            raise UserError(f"{self.rows.where(index)}: need 4 choices and an answer from 0 to 3, got {row!r:.200}")
        conversation = self.conversation(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
        return conversation | {"subject": row["subject"]}  # for results by subject
