"""
Questions with right answers for a chat model: science and school exams, word problems, programs, spelling.

    python -m scripts.chat_eval -i sft                                      (every task, the newest SFT model)
    python -m scripts.chat_eval -i rl -a GSM8K -n 8 -t 1.0                  (8 samples a problem: pass@1, 2, 4, 8)
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i mid -a "ARC-Easy|MMLU"
    python -m scripts.chat_eval -i sft -x 20 -m 128 --device_type cpu       (a quick look: 20 problems a task)
    python -m scripts.chat_eval -i rl -a Strangers -t 0.6 -m 256            (as chat_cli answers; only where asked for)

Every answer goes to <base dir>/chat_eval/<stage>/<model>/<task>.jsonl, the table to the report. ChatCORE is the mean
of the six tasks' accuracies, each centred so that blind guesses give 0; it takes a run of all six.
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
from nanochat.engine import Engine
from nanochat.execution import WALLS, sandbox_walls
from nanochat.report import get_report
from tasks.evaluate import TASKS, available_tasks, centered, chat_core, evaluate_task, parse_names


def parse_args(argv=None):
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("-i", "--source", required=True, choices=STAGE_DIRS, help="stage of the model")
    parser.add_argument("-a", "--tasks", help='names of tasks, such as "ARC-Easy|GSM8K" (default: all but Strangers)')
    parser.add_argument("-g", "--model_tag", "--model-tag", help="model to load (default: the one saved last)")
    parser.add_argument("-s", "--step", type=int, help="step to load (default: the last)")
    parser.add_argument("-x", "--max_problems", "--max-problems", type=int, default=-1,
                        help="problems per task, the same ones each time (default: -1, all)")
    parser.add_argument("-b", "--batch_rows", "--batch-rows", type=int, default=32,
                        help="rows at once; halve it when memory runs out (default: 32)")
    written = parser.add_argument_group("tasks whose answers are written out")
    written.add_argument("-n", "--num_samples", "--num-samples", type=int, default=1, help="per problem (default: 1)")
    written.add_argument("-t", "--temperature", type=float, default=0.0, help="0 = always the likeliest (default: 0)")
    written.add_argument("-m", "--max_new_tokens", "--max-new-tokens", type=int, default=512,
                         help="of an answer (default: 512)")
    written.add_argument("-k", "--top_k", "--top-k", type=int, default=50, help="0 = off (default: 50)")
    parser.add_argument("--allow_unsafe", "--allow-unsafe", action="store_true",
                        help="run HumanEval's programs even where the system cannot wall them in")
    parser.add_argument("--device_type", "--device-type", default="", help="cuda, mps or cpu (default: detect)")
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv[1:] if argv[:1] == ["--"] else argv)  # torchrun passes its -- on
    for name, low in (("num_samples", 1), ("temperature", 0), ("max_new_tokens", 1), ("top_k", 0), ("batch_rows", 1)):
        if not getattr(args, name) >= low:
            raise UserError(f"--{name}={getattr(args, name)}: need {low} or more")
    if args.max_problems < 1 and args.max_problems != -1:
        raise UserError(f"--max_problems={args.max_problems}: need 1 or more, or -1 for all")
    if args.num_samples > 1 and args.temperature == 0:
        raise UserError(f"--num_samples={args.num_samples} at temperature 0 gives the same answer again and again",
                        f"-n {args.num_samples} -t 1.0")
    return args


def choose_names(asked, allow_unsafe, device, find_walls=sandbox_walls):
    """Names of the tasks. HumanEval runs what the model writes: within walls, on all ranks, or if the user says so."""
    names = available_tasks() if asked is None else parse_names(asked)
    if "HumanEval" in names and not allow_unsafe:
        walls = find_walls()
        absent = all_reduce_sum(torch.tensor([int(wall not in walls) for wall in WALLS], device=device)).tolist()
        missing = [wall for wall, num_ranks in zip(WALLS, absent, strict=True) if num_ranks]
        if missing:
            names.remove("HumanEval")
            print0(f"HumanEval is skipped: this system has no {', '.join(missing)} to wall in what a model writes "
                   "(needs Linux 5.13 or newer); --allow_unsafe runs it all the same, with your rights to your files")
            if not names:
                raise UserError("no task is left to evaluate", 'for example -a "ARC-Easy|GSM8K"')
    return names


def task_line(name, result):
    passes = "".join(f" | pass@{k}: {value:.4f}" for k, value in result["pass_at_k"].items() if k > 1)
    cut = f" | cut from the left: {result['truncated']}" if result["truncated"] else ""
    return (f"{name:<13} | accuracy: {result['accuracy']:.4f} ± {result['stderr']:.4f} | centered: "
            f"{centered(name, result['accuracy']):+.4f} | n: {result['n']:5d}{passes} | {result['seconds']:.1f}s{cut}")


def kind_rows(name, result):
    """For a task whose problems have kinds: a row of the report for each of them."""
    rows = []
    for kind, figures in result.get("by_kind", {}).items():
        rows.append({"task": name, "kind": kind, **{key: figures[key] for key in ("accuracy", "stderr", "n")}})
    return rows


def log_report(args, model_name, results, core):
    metrics = {name: {"value": result["accuracy"], "n": result["n"], "stderr": result["stderr"]}
               for name, result in results.items()}
    rows = [{"task": name, "accuracy": result["accuracy"], "stderr": result["stderr"], "n": result["n"],
             "centered": centered(name, result["accuracy"]), "cut from the left": result["truncated"],
             **{f"pass@{k}": value for k, value in result["pass_at_k"].items() if k > 1},
             "seconds": round(result["seconds"], 1)} for name, result in results.items()]
    tables = {"By task": rows}
    by_kind = [row for name, result in results.items() for row in kind_rows(name, result)]
    if by_kind:
        tables["By kind"] = by_kind
    get_report().log(f"Chat evaluation {args.source}", {
        "config": vars(args), "model": model_name, "metrics": metrics | ({"ChatCORE": core} if core else {}),
        "tables": tables})


def main():
    args = parse_args()
    rank, _, _, device = compute_init(args.device_type)
    names = choose_names(args.tasks, args.allow_unsafe, device)
    tag = find_checkpoint_dir(args.source, args.model_tag).name
    model, tokenizer, meta = load_checkpoint(args.source, device, tag, args.step)
    if compiles(device):
        model.compile_decoding()
    options = {"HumanEval": {"allow_unsafe": args.allow_unsafe}}
    tasks = {name: TASKS[name][0](**options.get(name, {})) for name in names}  # all first: a missing file shows now
    engine, model_name = Engine(model, tokenizer), f"{tag}_step_{meta['step']}"
    folder = get_base_dir() / "chat_eval" / args.source / model_name
    print0(f"{args.source} model {model_name} on {device}, context of {model.config.sequence_len} tokens; "
           f"tasks: {', '.join(tasks)}")

    results = {}
    for name, task in tasks.items():
        start = time.time()
        result, records = evaluate_task(task, engine, tokenizer, batch_rows=args.batch_rows,
                                        max_problems=args.max_problems, num_samples=args.num_samples,
                                        max_new_tokens=args.max_new_tokens, temperature=args.temperature,
                                        top_k=args.top_k)
        results[name] = result | {"seconds": time.time() - start}
        print0(task_line(name, results[name]))
        for row in kind_rows(name, result):
            print0(f"  {row['kind']:<11} | accuracy: {row['accuracy']:.4f} ± {row['stderr']:.4f} | n: {row['n']}")
        if rank == 0:
            part = f"_{args.max_problems}" if args.max_problems > 0 else ""  # a quick look replaces no full record
            lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
            write_text(folder / f"{name}{part}.jsonl", "".join(lines))

    # summary: ChatCORE, report
    core = chat_core(results)
    if core:
        print0(f"ChatCORE: {core['value']:.4f} ± {core['stderr']:.4f} | n: {core['n']}")
    elif args.tasks is None:
        print0("ChatCORE: not given, for it takes all six tasks")
    print0(f"Wrote the answers to {folder}")
    log_report(args, model_name, results, core)
    compute_cleanup()


if __name__ == "__main__":
    run_script(main)
