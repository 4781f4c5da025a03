"""
The CORE metric of a base model, our own or any of the Hugging Face hub.

    python -m scripts.base_eval                                     # the last base checkpoint
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval   # the same, shared by 8 GPUs
    python -m scripts.base_eval --model_tag=d4 --max_per_task=20    # a quick look, fine on a CPU
    python -m scripts.base_eval --hf_path=openai-community/gpt2     # against published figures

Writes <base dir>/base_eval/<model>.csv, one line per task, and <model>.jsonl, every single
prediction; CORE and the table go to the report.
"""

import csv
import io
import json
import re

import torch

from nanochat.checkpoint_manager import find_checkpoint_dir, load_checkpoint
from nanochat.common import (
    UserError,
    compute_cleanup,
    compute_init,
    get_base_dir,
    print0,
    run_script,
    write_text,
)
from nanochat.configurator import CountOrOff, Positive, get_settings, override_from_cli
from nanochat.core_bundle import NUM_TASKS, get_eval_bundle, load_tasks
from nanochat.core_eval import evaluate_core
from nanochat.report import get_report

hf_path: str = ""              # a model of the Hugging Face hub, or a folder of one; empty = our own checkpoint
model_tag: str | None = None   # which of our models, such as d20; None = the last one that was trained
model_step: int | None = None  # which of its checkpoints; None = the last
verify: bool = True            # compare it with its checksums
max_per_task: CountOrOff = -1  # questions per task, the same ones each time; -1 = all
batch_tokens: Positive = 16384  # most tokens in a forward pass; halve it when memory runs out
device_type: str = ""          # cuda, mps or cpu; empty = detect

REPORT_COLUMNS = ["task", "accuracy", "stderr", "centered", "n", "truncated"]
# the columns of the two tables
CSV_COLUMNS = ["task", "accuracy", "stderr", "n", "baseline"]
CSV_COLUMNS += ["centered", "centered_stderr", "truncated"]

# -----------------------------------------------------------------------------
# The two kinds of model


def load_own(device):
    """-> (model, tokenizer, longest input, name)"""
    # the tag of the last model, if none was given, for the name of the results
    tag = find_checkpoint_dir("base", model_tag).name
    model, tokenizer, meta = load_checkpoint("base", device, tag, model_step, verify)
    name = f"base_{tag}_step_{meta['step']}"
    return model, tokenizer, model.config.sequence_len, name


class HFTokenizer:
    """A tokenizer of transformers with the few methods of ours that core_eval needs."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decode = tokenizer.decode

    def get_bos_token_id(self):
        if self.tokenizer.bos_token_id is not None:
            return self.tokenizer.bos_token_id
        if self.tokenizer.eos_token_id is not None:  # some models begin a text with their eos
            return self.tokenizer.eos_token_id
        raise UserError(
            f"the tokenizer of {hf_path} has neither a bos nor an eos token, one of them is needed"
        )

    def __call__(self, texts, prepend):
        encoded = self.tokenizer(texts, add_special_tokens=False)
        return [[prepend, *ids] for ids in encoded["input_ids"]]


def load_hf(device):
    """-> (model, tokenizer, longest input, name), of a causal language model of transformers."""
    # a heavy package that nothing else here needs
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError(
            "--hf_path needs transformers, which is missing",
            "uv pip install transformers",
        ) from error
    # not there, not readable, or no causal language model
    try:
        tokenizer = AutoTokenizer.from_pretrained(hf_path)
        model = AutoModelForCausalLM.from_pretrained(hf_path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--hf_path={hf_path}: {reason}",
            "for example --hf_path=openai-community/gpt2, or a folder with config.json",
        ) from error
    # 16 bits halve the memory; on a CPU they may be slower
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = model.eval().to(device, dtype)
    # 2048: for models that state no limit
    max_seq_len = getattr(model.config, "max_position_embeddings", None) or 2048
    name = "hf_" + re.sub(r"\W+", "_", hf_path).strip("_")

    def forward(ids):
        return model(ids).logits

    return forward, HFTokenizer(tokenizer), max_seq_len, name


# -----------------------------------------------------------------------------
# Output


def task_line(result):
    parts = [
        f"{result['task']:<32}",
        f"accuracy: {result['accuracy']:.4f} ± {result['stderr']:.4f}",
        f"centered: {result['centered']:+.4f}",
        f"n: {result['n']:5d}",
        f"{result['seconds']:6.1f}s",
    ]
    if result["truncated"]:
        parts.append(f"cut from the left: {result['truncated']}")
    return " | ".join(parts)


def write_table(path, core):
    """CSV, a row a task, and CORE."""
    # the last row: CORE itself, with n and truncated over all tasks
    total = dict(core)
    total["task"] = "CORE"
    total["centered"] = core["core"]
    total["centered_stderr"] = core["stderr"]

    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, CSV_COLUMNS, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(core["tasks"])
    writer.writerow(total)
    write_text(path, table.getvalue())


def write_records(path, records):
    """JSONL, a line a prediction."""
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    write_text(path, "".join(lines))


def log_to_report(settings, name, core):
    # another model's CORE is not that of this run's base model, so it gets its own section
    title = f"Evaluation of {hf_path}" if hf_path else "Base model evaluation"
    # the figure for the table of all stages
    metric = {"value": core["core"], "stderr": core["stderr"], "n": core["n"]}
    # the details
    table = []
    for result in core["tasks"]:
        table.append({column: result[column] for column in REPORT_COLUMNS})
    get_report().log(title, {
        "config": settings,
        "model": name,
        "CORE of guessing": core["guessing"],
        "questions cut": core["truncated"],
        "metrics": {"CORE": metric},
        "tables": {"CORE by task": table},
    })


# -----------------------------------------------------------------------------


def main():
    settings = get_settings(globals())
    ddp_rank, _, _, device = compute_init(device_type)

    # tasks, model
    tasks = load_tasks(get_eval_bundle())
    load = load_hf if hf_path else load_own
    model, tokenizer, max_seq_len, name = load(device)
    # a mirror's bundle may hold fewer tasks; its mean is no CORE to compare
    whole = "" if len(tasks) == NUM_TASKS else f" of the metric's {NUM_TASKS}"
    print0(
        f"CORE of {name}: {len(tasks)} tasks{whole} on {device}, "
        f"inputs of up to {max_seq_len} tokens"
    )

    # evaluation
    file_name = name
    if max_per_task > 0:  # a quick look replaces no full record
        file_name += f"_{max_per_task}_per_task"
    folder = get_base_dir() / "base_eval"
    records = []  # of all tasks so far

    def on_task(result, task_records):
        print0(task_line(result))
        records.extend(task_records)
        if ddp_rank == 0:  # after each task, since all of them may take hours
            write_records(folder / f"{file_name}.jsonl", records)

    core = evaluate_core(
        model,
        tokenizer,
        device,
        tasks,
        max_seq_len=max_seq_len,
        max_per_task=max_per_task,
        batch_tokens=batch_tokens,
        on_task=on_task,
    )
    print0(" | ".join([
        f"CORE: {core['core']:.4f} ± {core['stderr']:.4f}",
        f"CORE of guessing: {core['guessing']:.4f}",
        f"questions: {core['n']:,}",
        f"cut from the left: {core['truncated']:,}",
    ]))

    # summary: files, report
    if ddp_rank == 0:
        write_table(folder / f"{file_name}.csv", core)
        print0(f"Wrote {folder / file_name}.csv and .jsonl")
    log_to_report(settings, file_name, core)
    compute_cleanup()


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
