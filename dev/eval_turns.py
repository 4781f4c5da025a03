"""
Does a chat model still answer after a question on another subject? Accuracy on held-out questions of each kind, asked
alone and as the second question of a conversation, after a first one of each kind with its right answer. Greedy.

    NANOCHAT_DATA_DIR=~/.cache/nanochat/toy_world python -m dev.eval_turns --source=rl      (after dev/runcpu.sh)
"""

import random

from nanochat.checkpoint_manager import load_checkpoint
from nanochat.common import compute_init, run_script
from nanochat.configurator import override_from_cli
from nanochat.engine import Engine, Sampling
from tasks.gsm8k import GSM8K
from tasks.identity import Identity
from tasks.mmlu import MMLU
from tasks.spellingbee import SpellingBee

source: str = "sft"           # stage of the model
model_tag: str | None = None  # its tag; None = the one saved last
num: int = 40                 # questions of each kind after each kind
max_tokens: int = 112         # tokens per answer, at most


def make_questions(task, earlier, tokenizer, max_prompt):
    """
    `num` pairs (conversation, prompt ids) of the task, as far as there are prompts of at most max_prompt tokens.
    earlier: a task; the first exchange of one of its conversations, drawn at random, comes before each question.
    """
    rng = random.Random(0)
    questions = []
    for i in range(50 * num):
        first = []
        if earlier is not None:
            first = earlier[int(len(earlier) * rng.random())]["messages"][:2]
        conversation = task[i % len(task)]
        messages = first + conversation["messages"][-2:]
        prompt = tokenizer.render_for_completion({"messages": messages})
        if len(prompt) <= max_prompt:
            questions.append((conversation, prompt))
        if len(questions) == num:
            break
    return questions


def evaluate(task, earlier, engine):
    """Accuracy as text, such as "85% (40)"."""
    tokenizer = engine.tokenizer
    max_prompt = engine.model.config.sequence_len - max_tokens
    questions = make_questions(task, earlier, tokenizer, max_prompt)

    # all answers in one batch
    rows = [engine.make_row(prompt, Sampling(0.0), max_tokens) for _, prompt in questions]
    for _ in engine.generate_rows(rows):
        pass

    num_right = 0
    for (conversation, _), row in zip(questions, rows, strict=True):
        text = tokenizer.decode(row.tokens).removesuffix("<|assistant_end|>")
        num_right += task.evaluate(conversation, text)
    return f"{100 * num_right / max(len(questions), 1):.0f}% ({len(questions)})"


def main():
    _, _, _, device = compute_init()
    model, tokenizer, _ = load_checkpoint(source, device, model_tag)
    engine = Engine(model, tokenizer)
    tasks = {
        "identity": Identity(),
        "multiple choice": MMLU("all", split="test"),
        "word problem": GSM8K(split="test"),
        "letters": SpellingBee(1000, "test"),
    }

    # a row per kind of question, a column per kind of the question before it
    columns = {"alone".rjust(9): None}
    columns |= {f"after {name}": task for name, task in tasks.items()}
    print(" | ".join(["right (of)".ljust(16), *columns]))
    for name, task in tasks.items():
        cells = [name.ljust(16)]
        for title, earlier in columns.items():
            cells.append(evaluate(task, earlier, engine).rjust(len(title)))
        print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
