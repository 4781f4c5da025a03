"""The evaluation bundle of CORE: found, downloaded, unpacked, read, and its mistakes named."""

import csv
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch

from nanochat.common import UserError
from nanochat.core_bundle import NUM_TASKS, CoreTask, get_eval_bundle, load_tasks
from nanochat.core_eval import evaluate_core

CORE_YAML = r"""
icl_tasks:
-
  label: toy  # ours
  dataset_uri: a/toy.jsonl
  num_fewshot: [3]
  icl_task_type: schema
  continuation_delimiter: "\nAnswer: "
"""
ROWS = [{"context_options": [f"ä{i}", "b"], "continuation": "\u2028 then", "gold": i % 2} for i in range(6)]


class Bytes:
    """A tokenizer of bytes: 0..255, and 256 = <|bos|>."""

    def get_bos_token_id(self):
        return 256

    def __call__(self, texts, prepend):
        return [[prepend, *text.encode()] for text in texts]

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")



@pytest.fixture
def bundle(tmp_path):
    """A bundle of one task, as files."""
    folder = tmp_path / "source" / "eval_bundle"
    (folder / "eval_data" / "a").mkdir(parents=True)
    (folder / "core.yaml").write_text(CORE_YAML, "utf-8")
    with open(folder / "eval_meta_data.csv", "w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows([["Eval Task", "Random baseline"], ["toy", "40.3"]])
    (folder / "eval_data" / "a" / "toy.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n", "utf-8")
    return folder


def test_bundle_is_read_as_written(bundle):
    assert load_tasks(bundle) == [CoreTask("toy", "schema", ROWS, 3, "\nAnswer: ", 40.3 / 100)]


@pytest.mark.parametrize("missing", ["core.yaml", "eval_meta_data.csv", "eval_data/a/toy.jsonl"])
def test_a_missing_file_is_named(bundle, missing):
    (bundle / missing).unlink()
    with pytest.raises(UserError, match=missing):
        load_tasks(bundle)


def test_a_bad_row_is_named_by_file_line_and_field(bundle):
    path = bundle / "eval_data" / "a" / "toy.jsonl"
    path.write_text('\n{"context_options": [], "gold": 0}\n', "utf-8")
    with pytest.raises(UserError, match=r"toy.jsonl:2 has no field \['continuation'\]"):
        load_tasks(bundle)


def test_bundle_is_downloaded_once_and_unpacked_inside_its_folder(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    urls, data = [], io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for path in bundle.rglob("*.*"):
            archive.write(path, Path("eval_bundle") / path.relative_to(bundle))
        archive.writestr("../../evil.txt", "outside")

    def fetch(url, path):
        urls.append(url)
        path.write_bytes(data.getvalue())
        return path

    folders = [get_eval_bundle(fetch) for _ in range(2)]
    assert len(urls) == 1 and folders[0] == folders[1] and load_tasks(folders[0]) == load_tasks(bundle)
    assert not list(tmp_path.rglob("evil.txt")) and not (tmp_path.parent / "evil.txt").exists()


def test_a_download_with_a_flipped_bit_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)

    def fetch(url, path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("eval_bundle/core.yaml", CORE_YAML)
        path.write_bytes(path.read_bytes().replace(CORE_YAML[:9].encode(), b"\xff" * 9, 1))
        return path

    with pytest.raises(UserError, match=r"(?s)eval_bundle.zip is damaged.*rm .*eval_bundle.zip"):
        get_eval_bundle(fetch)


def test_a_bundle_without_tasks_is_refused(bundle):
    (bundle / "core.yaml").write_text("icl_tasks: []\n", "utf-8")
    with pytest.raises(UserError, match="core.yaml lists no task"):
        load_tasks(bundle)


@pytest.mark.skipif("NANOCHAT_DATA_DIR" not in os.environ, reason="NANOCHAT_DATA_DIR is not set")
def test_every_task_of_the_real_bundle_runs():
    tasks = load_tasks(get_eval_bundle())
    table = torch.randn(257, 257, generator=torch.Generator().manual_seed(0))
    core = evaluate_core(table.__getitem__, Bytes(), torch.device("cpu"), tasks, max_seq_len=128, max_per_task=2)
    assert len(core["tasks"]) == NUM_TASKS and core["n"] == 2 * NUM_TASKS and core["truncated"] > 0
    assert core["guessing"] == pytest.approx(((0.25 - 0.403) / 0.597 + (0.5 - 0.62) / 0.38) / 22)  # the others are at 0
