"""
Evaluate a chat model on questions with known answers: exams, word problems, programs, spelling.

    python -m scripts.chat_eval -i sft                                      (the newest SFT model)
    python -m scripts.chat_eval -i rl -a GSM8K -n 8 -t 1.0                  (8 samples per problem: pass@1, 2, 4, 8)
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i mid -a "ARC-Easy|MMLU"
    python -m scripts.chat_eval -i sft -x 20 -m 128 --device_type cpu       (a quick look: 20 problems per task)
    python -m scripts.chat_eval -i rl -a Strangers -t 0.6 -m 256            (as chat_cli answers)

Every answer is written to <base dir>/chat_eval/<stage>/<model>/<task>.jsonl, the table to the report. ChatCORE is the
mean accuracy of six tasks (CHATCORE_TASKS in tasks/evaluate.py), each centred so that blind guesses give 0. It needs a
run of all six.
"""

import json
import sys
import time

import torch

from nanochat.checkpoint_manager import STAGE_DIRS, find_checkpoint_dir, load_checkpoint
from nanochat.common import (
    UserError,
    compiles,
    compute_cleanup,
    compute_init,
    get_base_dir,
    print0,
    run_script,
    write_text,
)
from nanochat.configurator import ArgumentParser
from nanochat.distributed import all_reduce_sum
from nanochat.engine import Engine, answer_messages
from nanochat.execution import WALLS, sandbox_walls
from nanochat.inference import compile_decoding
from nanochat.report import get_report
from tasks.evaluate import (
    CHATCORE_TASKS,
    TASKS,
    available_tasks,
    centered,
    chat_core,
    evaluate_task,
    parse_names,
)

# For the report's samples, where the model's data names no examples
MESSAGES = ("Who are you?", "Why is the sky blue?", "What is 12 + 35?")


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    add = parser.add_argument
    # the model and the tasks
    add("-i", "--source", required=True, choices=STAGE_DIRS, help="stage of the model")
    add("-a", "--tasks", help='names of tasks, such as "ARC-Easy|GSM8K" (default: ChatCORE, and Identity)')
    add("-g", "--model_tag", "--model-tag", help="model to load (default: the one saved last)")
    add("-s", "--step", type=int, help="step to load (default: the last)")
    # how much at once
    add("-x", "--max_problems", "--max-problems", type=int, default=-1,
        help="problems per task, the same ones each time (default: -1, all)")
    add("-b", "--batch_rows", "--batch-rows", type=int, default=32,
        help="rows per batch; halve it when memory runs out (default: 32)")
    # where
    add("--allow_unsafe", "--allow-unsafe", action="store_true",
        help="run HumanEval's programs even where the system cannot isolate them")
    add("--device_type", "--device-type", default="", help="cuda, mps or cpu (default: detect)")
    add = parser.add_argument_group("tasks with generated answers").add_argument
    add("-n", "--num_samples", "--num-samples", type=int, default=1, help="per problem (default: 1)")
    add("-t", "--temperature", type=float, default=0.0, help="0 = greedy (default: 0)")
    add("-m", "--max_new_tokens", "--max-new-tokens", type=int, default=512, help="per answer (default: 512)")
    add("-k", "--top_k", "--top-k", type=int, default=50, help="0 = off (default: 50)")

    # torchrun passes its own separator on
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["--"]:
        argv = argv[1:]
    args = parser.parse_args(argv)

    # the settings that cannot work
    require(args, "num_samples", 1)
    require(args, "temperature", 0)
    require(args, "max_new_tokens", 1)
    require(args, "top_k", 0)
    require(args, "batch_rows", 1)
    if args.max_problems != -1 and args.max_problems < 1:
        raise UserError(f"--max_problems={args.max_problems}: need 1 or more, or -1 for all")
    if args.num_samples > 1 and args.temperature == 0:
        raise UserError(f"--num_samples={args.num_samples} at temperature 0 gives the same answer again and again",
                        f"-n {args.num_samples} -t 1.0")
    return args


def require(args, name, low):
    """UserError unless the argument is `low` or more."""
    value = getattr(args, name)
    if not value >= low:  # nan is refused, too
        raise UserError(f"--{name}={value}: need {low} or more")


def choose_names(asked, allow_unsafe, device, find_walls=sandbox_walls):
    """
    Names of the tasks to run. HumanEval runs programs that the model wrote, so it is left out if the sandbox is
    incomplete on any rank, unless the user allows it. Collective.
    """
    names = available_tasks() if asked is None else parse_names(asked)
    if "HumanEval" not in names or allow_unsafe:
        return names

    # on how many ranks each part of the sandbox is missing; all ranks must decide alike
    walls = find_walls()
    absent = torch.tensor([int(wall not in walls) for wall in WALLS], device=device)
    num_ranks = all_reduce_sum(absent).tolist()
    missing = [wall for wall, count in zip(WALLS, num_ranks, strict=True) if count]
    if missing:
        names.remove("HumanEval")
        print0(f"HumanEval is skipped: this system has no {', '.join(missing)} to isolate the programs that a model "
               "writes (needs Linux 5.13 or newer); --allow_unsafe runs them all the same, with your rights to your "
               "files")
    if not names:
        raise UserError("no task is left to evaluate", 'for example -a "ARC-Easy|GSM8K"')
    return names


def task_line(name, result):
    """One task's result, as it is printed."""
    parts = [
        f"{name:<13}",
        f"accuracy: {result['accuracy']:.4f} ± {result['stderr']:.4f}",
        f"centered: {centered(name, result['accuracy']):+.4f}",
        f"n: {result['n']:5d}",
    ]
    for k, value in result["pass_at_k"].items():
        if k > 1:  # pass@1 is the accuracy
            parts.append(f"pass@{k}: {value:.4f}")
    parts.append(f"{result['seconds']:.1f}s")
    if result["truncated"]:
        parts.append(f"cut from the left: {result['truncated']}")
    if "wall_hits" in result:
        parts.append(f"stopped by the sandbox: {result['wall_hits']}")
    return " | ".join(parts)


def table_row(name, result):
    """One task's result, as a row of the report's table."""
    row = {
        "task": name,
        "accuracy": result["accuracy"],
        "stderr": result["stderr"],
        "n": result["n"],
        "centered": centered(name, result["accuracy"]),
        "cut from the left": result["truncated"],
    }
    for k, value in result["pass_at_k"].items():
        if k > 1:
            row[f"pass@{k}"] = value
    if "wall_hits" in result:
        row["stopped by the sandbox"] = result["wall_hits"]
    row["seconds"] = round(result["seconds"], 1)
    return row


def kind_rows(name, result):
    """Rows of the report for a task whose problems have kinds, one for each kind."""
    rows = []
    for kind, figures in result.get("by_kind", {}).items():
        row = {"task": name, "kind": kind}
        for key in ("accuracy", "stderr", "n"):
            row[key] = figures[key]
        rows.append(row)
    return rows


def main():
    # init
    args = parse_args()
    rank, _, _, device = compute_init(args.device_type)

    # tasks and model: a missing file shows before any task has run
    names = choose_names(args.tasks, args.allow_unsafe, device)
    tasks = {}
    for name in names:
        make_task, _ = TASKS[name]
        tasks[name] = make_task(allow_unsafe=args.allow_unsafe) if name == "HumanEval" else make_task()
    tag = find_checkpoint_dir(args.source, args.model_tag).name
    model, tokenizer, meta = load_checkpoint(args.source, device, tag, args.step)
    if compiles(device):
        compile_decoding(model)
    engine = Engine(model, tokenizer)
    model_name = f"{tag}_step_{meta['step']}"
    print0(f"{args.source} model {model_name} on {device}, context of {model.config.sequence_len} tokens; "
           f"tasks: {', '.join(tasks)}")

    # evaluate one task after the other
    folder = get_base_dir() / "chat_eval" / args.source / model_name
    suffix = f"_{args.max_problems}" if args.max_problems > 0 else ""  # a quick look replaces no full record
    results = {}
    for name, task in tasks.items():
        start = time.time()
        result, records = evaluate_task(
            task,
            engine,
            tokenizer,
            batch_rows=args.batch_rows,
            max_problems=args.max_problems,
            num_samples=args.num_samples,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_k=args.top_k,
        )
        results[name] = result | {"seconds": time.time() - start}
        print0(task_line(name, results[name]))
        for row in kind_rows(name, result):
            print0(f"  {row['kind']:<11} | accuracy: {row['accuracy']:.4f} ± {row['stderr']:.4f} | n: {row['n']}")
        if rank == 0:
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            write_text(folder / f"{name}{suffix}.jsonl", "".join(lines))

    # summary: ChatCORE, the centred mean, if all of its tasks have run
    metrics = {}
    for name, result in results.items():
        metrics[name] = {"value": result["accuracy"], "n": result["n"], "stderr": result["stderr"]}
    core = chat_core(results)
    if core:
        metrics["ChatCORE"] = core
        print0(f"ChatCORE: {core['value']:.4f} ± {core['stderr']:.4f} | n: {core['n']}")
    elif args.tasks is None:
        print0(f"ChatCORE: not given, since it needs all of {', '.join(CHATCORE_TASKS)}")
    print0(f"Wrote the answers to {folder}")

    # what it says to the messages that its data names, on rank 0; a base model has not learned to answer
    samples = []
    if rank == 0 and args.source != "base":
        samples = answer_messages(engine, meta.get("examples") or MESSAGES, args.max_new_tokens)

    # the report's section of this stage
    tables = {"By task": [table_row(name, result) for name, result in results.items()]}
    by_kind = []
    for name, result in results.items():
        by_kind += kind_rows(name, result)
    if by_kind:
        tables["By kind"] = by_kind
    get_report().log(f"Chat evaluation {args.source}", {
        "config": vars(args),
        "model": model_name,
        "metrics": metrics,
        "samples": samples,
        "tables": tables,
    })
    compute_cleanup()


if __name__ == "__main__":
    run_script(main)
