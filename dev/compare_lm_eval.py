"""
Does lm-evaluation-harness find what we find? Bits per byte of whole documents, by `base_loss --per_document`, by its
`hf` on the exported folder and by its `local-completions` on our server; and the log-likelihoods of multiple-choice
answers (which of four continuations belongs to a document), by the latter two.

    uv pip install "lm-eval[hf,api]"
    python -m dev.compare_lm_eval --source=base --num=100
    python -m dev.compare_lm_eval --source=sft --data=my_texts.jsonl

The documents are the first of the validation split.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.checkpoint_manager import CheckpointManager, find_checkpoint_dir
from nanochat.common import UserError, run_script
from nanochat.configurator import Positive, override_from_cli
from nanochat.dataset import get_spans, read_documents

source: str = "base"          # stage of the model: base, mid, sft or rl
model_tag: str | None = None  # its tag; None = the one saved last
data: str | None = None       # file, folder or glob; None = the default corpus
num: Positive = 100           # documents

PROMPT_CHARS = 100  # of a document, before the continuations
ANSWER_CHARS = 60   # of a continuation

TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
"""
DOCUMENTS = TASK + """
task: documents
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: bits_per_byte}}]
"""
CONTINUATIONS = TASK + """
task: continuations
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: answers
doc_to_target: right
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def read_texts():
    """The first `num` documents of the validation split."""
    documents = itertools.chain.from_iterable(read_documents(span) for span in get_spans(data, "val"))
    return [text for _, text in itertools.islice(documents, num)]


def make_questions(texts):
    """[{prompt, answers, right}]: the continuation of a document among those of the three after it."""
    length = PROMPT_CHARS + ANSWER_CHARS
    texts = [text for text in texts if len(text) >= length]
    if len(texts) < 4:
        raise UserError(f"{len(texts)} documents have {length} characters, needed: 4", "--num=1000 reads more")
    answers = [text[PROMPT_CHARS:length] for text in texts]
    questions = []
    for place, text in enumerate(texts):
        choices = [answers[(place + step) % len(texts)] for step in range(4)]
        right = place % 4
        choices[0], choices[right] = choices[right], choices[0]
        questions.append({"prompt": text[:PROMPT_CHARS], "answers": choices, "right": right})
    return questions


def write_tasks(folder, texts):
    """The two tasks, and the documents once more as a corpus whose validation shard has them all."""
    for name, template, rows in (
        ("documents", DOCUMENTS, [{"text": text} for text in texts]),
        ("continuations", CONTINUATIONS, make_questions(texts)),
    ):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / f"{name}.yaml").write_text(template.format(path=path), encoding="utf-8")
    (folder / "corpus").mkdir()
    for index, part in enumerate((texts[:1], texts)):  # the last shard is for validation
        pq.write_table(pa.table({"text": part}), folder / "corpus" / f"shard_{index:05d}.parquet")


def run(*command):
    """The output of a Python module."""
    environment = {**os.environ, "NANOCHAT_PRECISION": "float32"}
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UserError(f"python -m {' '.join(command)} failed: {done.stderr[-2000:]}")
    return done.stdout


def lm_eval(folder, model, task, model_args):
    """(metrics, log-likelihoods) of a task by lm-evaluation-harness."""
    out = Path(tempfile.mkdtemp(dir=folder))
    run("lm_eval", "--model", model, "--model_args", model_args, "--tasks", task, "--include_path", str(folder),
        "--batch_size", "8", "--device", "cpu", "--output_path", str(out), "--log_samples")
    results = json.loads(next(out.rglob("results_*.json")).read_text(encoding="utf-8"))["results"][task]
    likelihoods = []
    samples = next(out.rglob("samples_*.jsonl")).read_text(encoding="utf-8").splitlines()
    for sample in sorted(map(json.loads, samples), key=lambda sample: sample["doc_id"]):
        for response in sample["filtered_resps"]:
            likelihoods.append(float(response[0] if isinstance(response, list) else response))
    return results, likelihoods


def start_server(folder, tag):
    """(process, URL) of chat_web with the model."""
    command = [sys.executable, "-m", "scripts.chat_web", "-i", source, "-g", tag, "-p", "0", "--device_type", "cpu"]
    environment = {**os.environ, "NANOCHAT_PRECISION": "float32", "PYTHONUNBUFFERED": "1"}
    log = folder / "server.log"
    with open(log, "w", encoding="utf-8") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    while server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:\d+", log.read_text(encoding="utf-8"))
        if found:
            return server, found[0]
        time.sleep(0.2)
    raise UserError(f"the server did not start: {log.read_text(encoding='utf-8')}", f"try it: {' '.join(command)}")


def compare(folder, tag, length):
    """Print both comparisons. length: of the model's context, in tokens."""
    model = folder / "model"
    run("scripts.export_hf", f"--source={source}", f"--model_tag={tag}", "--dtype=float32", f"--out={model}")
    ours = run("scripts.base_loss", f"--source={source}", f"--model_tag={tag}", f"--data={folder / 'corpus'}",
               "--per_document", "--eval_tokens=-1", "--device_type=cpu")
    print(f"bits per byte | base_loss --per_document: {re.search('val bpb: ([0-9.]+)', ours)[1]}", flush=True)

    hf_args = f"pretrained={model},dtype=float32,trust_remote_code=True"
    results, _ = lm_eval(folder, "hf", "documents", f"{hf_args},add_bos_token=False")
    print(f"bits per byte | hf: {results['bits_per_byte,none']:.6f}", flush=True)

    # The server generates one token after those that it scores, so local-completions cuts texts to
    # two tokens less than its max_length
    server, url = start_server(folder, tag)
    api_args = (f"model={source}-{tag},base_url={url}/v1/completions,tokenizer={model},max_length={length},"
                "trust_remote_code=True")
    hf_args += f",max_length={length - 2}"
    try:
        for task, metric, add_bos in (("documents", "bits_per_byte", False), ("continuations", "acc", True)):
            flag = f"add_bos_token={add_bos}"
            results, likelihoods = lm_eval(folder, "hf", task, f"{hf_args},{flag}")
            api_results, api_likelihoods = lm_eval(folder, "local-completions", task, f"{api_args},{flag}")
            differences = [abs(a - b) for a, b in zip(likelihoods, api_likelihoods, strict=True)]
            print(f"{task}, {flag} | {metric} by hf: {results[f'{metric},none']:.6f} | by local-completions: "
                  f"{api_results[f'{metric},none']:.6f} | {len(differences)} log-likelihoods, largest difference: "
                  f"{max(differences):.1e}", flush=True)
    finally:
        server.terminate()
        server.wait()


def main():
    checkpoint_dir = find_checkpoint_dir(source, model_tag)
    _, meta = CheckpointManager(checkpoint_dir).load_meta()
    with tempfile.TemporaryDirectory() as folder:
        texts = read_texts()
        write_tasks(Path(folder), texts)
        print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts):,} bytes")
        compare(Path(folder), checkpoint_dir.name, meta["model_config"]["sequence_len"])


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
