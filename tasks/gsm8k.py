r"""
GSM8K: grade-school word problems, train 7,473, test 1,319.
Source: arXiv 2110.14168, huggingface.co/datasets/openai/gsm8k.

A solution calls a calculator as it goes, "He pays 12*3=$<<12*3=36>>36.\n#### 36". The call becomes
a python part and its result a python_output part, as the engine does it while the model writes.
"""

import re

from nanochat.calculator import use_calculator
from tasks.common import Task, check_option, exchange
from tasks.final_answer import parse_answer
from tasks.hub import load_rows

COLUMNS = {"question": str, "answer": str}
CALL = re.compile(r"<<([^<>]*)=([^<>=]*)>>")  # <<expression=result>>


class GSM8K(Task):
    eval_type = "generative"

    def __init__(self, subset="main", split="train", **kwargs):
        super().__init__(**kwargs)
        check_option(self, "subset", subset, ("main",))
        check_option(self, "split", split, ("train", "test"))
        self.rows = load_rows("gsm8k", split, COLUMNS)

    def get_example(self, index):
        row = self.rows[index]
        answer = solution_parts(row["answer"])
        return {"messages": exchange(row["question"], answer)}

    def evaluate(self, conversation, completion):
        """Are the numbers after the last #### equal? No number is wrong."""
        last_part = conversation["messages"][-1]["content"][-1]
        right = parse_answer(last_part["text"])
        if right is None:
            return False
        return parse_answer(completion) == right


def solution_parts(solution: str) -> list[dict]:
    """
    >>> [part["text"] for part in solution_parts("so 2*2.4=<<2*2.4=4.80>>4.80")]
    ['so 2*2.4=', '2*2.4', '4.8', '4.80']
    """
    parts = []
    done = 0
    for call in CALL.finditer(solution):
        expression, result = call.groups()
        # Our calculator's own result where it has one, since the model will read that later: 3%
        # differ in form (4.8, not 4.80), and it cannot do 11 of the 10,618 calls in the first 2,000
        # training and all test problems.
        output = use_calculator(expression) or result
        parts += [
            {"type": "text", "text": solution[done : call.start()]},
            {"type": "python", "text": expression},
            {"type": "python_output", "text": output},
        ]
        done = call.end()
    parts.append({"type": "text", "text": solution[done:]})
    return [part for part in parts if part["text"]]
