"""scripts/base_eval from a checkpoint, or a Hugging Face model, to CSV, JSONL and the report."""

import csv
import json
import sys

import pytest
from tiny import tiny_model

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError, get_base_dir
from scripts import base_eval

CORE_YAML = """
icl_tasks:
- {label: letters, dataset_uri: letters.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}
- {label: words, dataset_uri: words.jsonl, num_fewshot: [0], icl_task_type: language_modeling}
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A data mirror with a bundle of two tasks, and an empty base directory."""
    folder = tmp_path / "mirror" / "eval_bundle"
    (folder / "eval_data").mkdir(parents=True)
    (folder / "core.yaml").write_text(CORE_YAML, "utf-8")
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nletters,50\nwords,0\n", "utf-8")
    letters = [{"query": f"The {i}th letter is", "choices": ["A", "B"], "gold": i % 2} for i in range(8)]
    words = [{"context": f"After {i} comes", "continuation": f"{i + 1}"} for i in range(5)]
    for name, rows in (("letters", letters), ("words", words)):
        (folder / "eval_data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "mirror"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setattr(base_eval, "device_type", "cpu")


def read_results(name):
    folder = get_base_dir() / "base_eval"
    rows = list(csv.DictReader((folder / f"{name}.csv").read_text("utf-8").splitlines()))
    return rows, [json.loads(line) for line in (folder / f"{name}.jsonl").read_text("utf-8").splitlines()]


def test_a_checkpoint_is_evaluated_and_reported(world, tokenizer, capsys):
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), sequence_len=12)
    CheckpointManager(get_checkpoint_dir("base", "d2")).save(7, model, tokenizer=tokenizer)
    base_eval.main()
    rows, records = read_results("base_d2_step_7")
    assert [(row["task"], row["n"]) for row in rows] == [("letters", "8"), ("words", "5"), ("CORE", "13")]
    right = sum(record["correct"] for record in records if record["task"] == "letters")
    assert float(rows[0]["accuracy"]) == right / 8 and float(rows[0]["centered"]) == 2 * right / 8 - 1
    assert int(rows[0]["truncated"]) == 8 and "cut from the left: 8" in capsys.readouterr().out
    report = json.loads((get_base_dir() / "report" / "05-base-model-evaluation.json").read_text("utf-8"))
    assert report["metrics"]["CORE"]["value"] == float(rows[2]["centered"]) and report["metrics"]["CORE"]["n"] == 13


def test_without_a_checkpoint_the_next_command_is_named(world):
    with pytest.raises(UserError, match="python -m scripts.base_train"):
        base_eval.main()


def test_hf_path_without_transformers_says_so(world, monkeypatch):
    monkeypatch.setattr(base_eval, "hf_path", "some/model")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers"):
        base_eval.main()


@pytest.mark.slow  # imports transformers
def test_a_hugging_face_folder_is_evaluated(world, monkeypatch, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path / "hf"
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(["After 1 comes 2. The letter is A or B."], vocab_size=300, special_tokens=["<|end|>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|end|>").save_pretrained(folder)
    config = transformers.GPT2Config(vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    monkeypatch.setattr(base_eval, "hf_path", str(folder))
    base_eval.main()
    files = [path for path in (get_base_dir() / "base_eval").iterdir() if path.suffix == ".jsonl"]
    assert len(files) == 1 and len(files[0].read_text("utf-8").splitlines()) == 13
    assert not list((get_base_dir() / "report").glob("05-*"))  # another model's CORE is not that of this run's base


@pytest.mark.slow
def test_a_hugging_face_path_that_is_not_there_is_a_users_mistake(world, monkeypatch, tmp_path):
    pytest.importorskip("transformers")
    monkeypatch.setattr(base_eval, "hf_path", str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="nothing"):
        base_eval.main()
