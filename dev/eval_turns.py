"""
Does a chat model still answer when the talk was about something else? Accuracy on held-out questions of each kind,
alone and as the second question of a conversation whose first one, of each kind, was answered rightly. Greedy.

    NANOCHAT_DATA_DIR=~/.cache/nanochat/toy_world python -m dev.eval_turns --source=rl      (after dev/runcpu.sh)
"""

import random
from itertools import islice

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
max_tokens: int = 112         # of an answer


def questions(task, earlier, tokenizer, room):
    """(conversation, prompt): the task's questions behind one of `earlier`, if given, that fit in `room`."""
    rng = random.Random(0)
    for i in range(50 * num):
        first = [] if earlier is None else earlier[int(len(earlier) * rng.random())]["messages"][:2]
        conversation = task[i % len(task)]
        prompt = tokenizer.render_for_completion({"messages": first + conversation["messages"][-2:]})
        if len(prompt) <= room:
            yield conversation, prompt


def main():
    device = compute_init()[3]
    model, tokenizer, _ = load_checkpoint(source, device, model_tag)
    engine = Engine(model, tokenizer)
    tasks = {"identity": Identity(), "multiple choice": MMLU("all", split="test"), "word problem": GSM8K(split="test"),
             "letters": SpellingBee(1000, "test")}
    print(" | ".join(["right (of)".ljust(16), "alone".rjust(9), *(f"after {name}" for name in tasks)]))
    for name, task in tasks.items():
        cells = []
        for earlier in (None, *tasks.values()):
            asked = list(islice(questions(task, earlier, tokenizer, model.config.sequence_len - max_tokens), num))
            rows = [engine.make_row(prompt, Sampling(0.0), max_tokens) for _, prompt in asked]
            for _ in engine.generate_rows(rows):
                pass
            texts = [tokenizer.decode(row.tokens).removesuffix("<|assistant_end|>") for row in rows]
            right = [task.evaluate(conversation, text) for (conversation, _), text in zip(asked, texts, strict=True)]
            cells.append(f"{100 * sum(right) / max(len(right), 1):.0f}% ({len(right)})")
        widths = [9, *(len(f"after {other}") for other in tasks)]
        print(" | ".join([name.ljust(16), *(cell.rjust(w) for cell, w in zip(cells, widths, strict=True))]), flush=True)


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
