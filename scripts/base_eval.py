"""
The CORE metric of a base model, our own or any of the Hugging Face hub.

    python -m scripts.base_eval                                        # the last base checkpoint, all questions
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval      # the same, shared by 8 GPUs
    python -m scripts.base_eval --model_tag=d4 --max_per_task=20       # a quick look, fine on a CPU
    python -m scripts.base_eval --hf_path=openai-community/gpt2        # to check against published numbers

Writes <base dir>/base_eval/<model>.csv, one line per task, and <model>.jsonl, every single prediction; CORE and the
table go to the report.
"""

import csv
import io
import json
import re

import torch

from nanochat.checkpoint_manager import find_checkpoint_dir, load_checkpoint
from nanochat.common import UserError, compute_cleanup, compute_init, get_base_dir, print0, run_script, write_text
from nanochat.configurator import CountOrOff, Positive, get_settings, override_from_cli
from nanochat.core_eval import NUM_TASKS, evaluate_core, get_eval_bundle, load_tasks
from nanochat.report import get_report

hf_path: str = ""              # a model of the Hugging Face hub, or a folder of one; empty = our own checkpoint
model_tag: str | None = None   # which of our models, such as d20; None = the last one that was trained
model_step: int | None = None  # which of its checkpoints; None = the last
max_per_task: CountOrOff = -1  # questions per task, the same ones each time; -1 = all
batch_tokens: Positive = 16384  # most tokens in a forward pass; halve it when memory runs out
device_type: str = ""          # cuda, mps or cpu; empty = detect

# -----------------------------------------------------------------------------
# The two kinds of model


def load_own(device):
    """-> (model, tokenizer, longest input, name)"""
    tag = find_checkpoint_dir("base", model_tag).name
    model, tokenizer, meta = load_checkpoint("base", device, tag, model_step)
    return model, tokenizer, model.config.sequence_len, f"base_{tag}_step_{meta['step']}"


class HFTokenizer:
    """A tokenizer of transformers with the few methods of ours that core_eval needs."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decode = tokenizer.decode

    def get_bos_token_id(self):
        ids = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)  # some models begin a text with their eos
        found = next((token for token in ids if token is not None), None)
        if found is None:
            raise UserError(f"the tokenizer of {hf_path} has neither a bos nor an eos token, one of them is needed")
        return found

    def __call__(self, texts, prepend):
        return [[prepend, *ids] for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]


def load_hf(device):
    """-> (model, tokenizer, longest input, name), of a causal language model of transformers."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("--hf_path needs transformers, which is missing", "uv pip install transformers") from error
    try:
        tokenizer, model = AutoTokenizer.from_pretrained(hf_path), AutoModelForCausalLM.from_pretrained(hf_path)
    except (OSError, ValueError) as error:
        raise UserError(f"--hf_path={hf_path}: {str(error).splitlines()[0]}",
                        "for example --hf_path=openai-community/gpt2, or a folder with config.json") from error
    model = model.eval().to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    longest = getattr(model.config, "max_position_embeddings", None) or 2048
    name = "hf_" + re.sub(r"\W+", "_", hf_path).strip("_")
    return lambda ids: model(ids).logits, HFTokenizer(tokenizer), longest, name


# -----------------------------------------------------------------------------
# Output


def task_line(result):
    cut = f" | cut from the left: {result['truncated']}" if result["truncated"] else ""
    return (f"{result['task']:<32} | accuracy: {result['accuracy']:.4f} ± {result['stderr']:.4f} "
            f"| centered: {result['centered']:+.4f} | n: {result['n']:5d} | {result['seconds']:6.1f}s{cut}")


def write_table(path, core):
    """CSV, a row a task, and CORE."""
    columns = ["task", "accuracy", "stderr", "n", "baseline", "centered", "centered_stderr", "truncated"]
    total = {"task": "CORE", "centered": core["core"], "centered_stderr": core["stderr"], **core}
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows([*core["tasks"], total])
    write_text(path, table.getvalue())


def write_records(path, records):
    """JSONL, a line a prediction."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


# -----------------------------------------------------------------------------


def main():
    settings = get_settings(globals())
    ddp_rank, _, _, device = compute_init(device_type)
    tasks = load_tasks(get_eval_bundle())
    model, tokenizer, max_seq_len, name = load_hf(device) if hf_path else load_own(device)
    whole = "" if len(tasks) == NUM_TASKS else f" of the metric's {NUM_TASKS}"
    print0(f"CORE of {name}: {len(tasks)} tasks{whole} on {device}, inputs of up to {max_seq_len} tokens")

    if max_per_task > 0:  # a quick look replaces no full record
        name += f"_{max_per_task}_per_task"
    records, path = [], get_base_dir() / "base_eval" / name

    def on_task(result, task_records):
        print0(task_line(result))
        records.extend(task_records)
        if ddp_rank == 0:  # what is there so far: the tasks may take hours
            write_records(path.with_name(f"{name}.jsonl"), records)

    core = evaluate_core(model, tokenizer, device, tasks, max_seq_len=max_seq_len, max_per_task=max_per_task,
                         batch_tokens=batch_tokens, on_task=on_task)
    print0(f"CORE: {core['core']:.4f} ± {core['stderr']:.4f} | CORE of guessing: {core['guessing']:.4f}"
           f" | questions: {core['n']:,} | cut from the left: {core['truncated']:,}")

    # summary: files, report
    if ddp_rank == 0:
        write_table(path.with_name(f"{name}.csv"), core)
        print0(f"Wrote {path}.csv and .jsonl")
    columns = ["task", "accuracy", "stderr", "centered", "n", "truncated"]
    get_report().log(f"Evaluation of {hf_path}" if hf_path else "Base model evaluation", {
        "config": settings, "model": name, "CORE of guessing": core["guessing"], "questions cut": core["truncated"],
        "metrics": {"CORE": {"value": core["core"], "stderr": core["stderr"], "n": core["n"]}},
        "tables": {"CORE by task": [{column: result[column] for column in columns} for result in core["tasks"]]}})
    compute_cleanup()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
