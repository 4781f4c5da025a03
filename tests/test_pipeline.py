"""The training scripts end to end on a tiny mirror: each runs, stops, resumes exactly, and says what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError
from nanochat.gpt import GPT
from nanochat.metrics_log import EVALUATION_KEYS, SAMPLE_KEYS, STEP_KEYS
from scripts import base_loss, base_train, chat_sft
from tests.stages import STAGES, curve, run_stage

ROOT = Path(__file__).parent.parent


pytestmark = pytest.mark.usefixtures("base_dir")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_saves_and_reports(stage, base_dir):
    assert CheckpointManager(get_checkpoint_dir(stage, "d1")).steps() == [2, 4]
    steps = [line for line in curve(stage) if "grad_norm" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4] and any(line["grad_norm"] > 0 for line in steps)
    sections = [json.loads(path.read_text())["section"] for path in (base_dir / "report").glob("*.json")]
    assert {"base": "Base model training", "mid": "Midtraining", "sft": "Chat SFT", "rl": "Chat RL"}[stage] in sections


def no_number(text):
    raise AssertionError(f"{text} in a log")


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_writes_the_same_documented_keys_for_a_step(stage, base_dir):
    text = (get_checkpoint_dir(stage, "d1") / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line, parse_constant=no_number) for line in text.splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 4 and all(list(line) == list(STEP_KEYS) for line in steps)
    others = {name.split("@")[0] for line in lines if line not in steps for name in line}
    documented = STEP_KEYS | EVALUATION_KEYS | SAMPLE_KEYS
    assert others <= {name.split("@")[0] for name in documented}
    sums = [(line["time"], line["train_s"], line["tokens"], line["flops"]) for line in steps]
    assert sums == sorted(sums) and steps[0]["tokens"] > 0 and steps[0]["flops"] > 1e4 * steps[0]["tokens"]
    rates = {name: steps[0][name] for name in STEP_KEYS if name.startswith("lr/")}
    assert rates.pop("lr/value") is None and all(rate > 0 for rate in rates.values())
    assert (steps[0]["reward"] is None) == (stage != "rl")


@pytest.mark.parametrize("stage, step", [("base", 4), ("rl", 2)])
def test_what_the_model_writes_is_logged(stage, step, base_dir):
    text = (get_checkpoint_dir(stage, "d1") / "metrics.jsonl").read_text(encoding="utf-8")
    (*_, last) = [line for line in map(json.loads, text.splitlines()) if "samples" in line]
    assert last["step"] == step and last["samples"] and last["samples"][0].keys() == {"prompt", "text"}


@pytest.mark.parametrize("stage", STAGES)
def test_resume_gives_exactly_the_losses_of_an_unbroken_run(stage, base_dir):
    manager = CheckpointManager(get_checkpoint_dir(stage, "d1"))
    unbroken = curve(stage)
    weights = manager.load_model(torch.device("cpu"), 4).state_dict()
    run_stage(stage, resume_from_step=2)
    assert curve(stage) == unbroken
    for name, weight in manager.load_model(torch.device("cpu"), 4).state_dict().items():
        assert torch.equal(weight, weights[name]), name


@pytest.mark.parametrize("stage", STAGES)
def test_the_micro_batch_does_not_change_the_losses(stage):
    unbroken = curve(stage)
    run_stage(stage, resume_from_step=2, device_batch_size=3)
    for ours, theirs in zip(curve(stage), unbroken, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=2e-4)


def test_sft_counts_every_conversation_once(base_dir, capsys):
    """All of an epoch at a context that cuts many of them: no NaN, no stall, every one used."""
    run_stage("sft", num_iterations=-1, eval_every=-1, examples_per_step=16)
    sft_report = json.loads(next((base_dir / "report").glob("*chat-sft.json")).read_text())
    printed = capsys.readouterr().out
    used, cut = sft_report["conversations"], sft_report["conversations cut to the context"]
    assert f"mixture: {used:,} conversations" in printed and 0 < cut < used


def test_sft_on_conversations_without_targets_trains_on(monkeypatch):
    """A context so short that the user's turn fills it: the loss is 0, not NaN, and the run ends."""
    def rows(dataset, indices, tokenizer, max_len):
        inputs, targets, cut = real(dataset, indices, tokenizer, max_len)
        return inputs, targets * 0 - 1, cut
    real = chat_sft.conversation_rows
    monkeypatch.setattr(chat_sft, "conversation_rows", rows)
    run_stage("sft", num_iterations=2, eval_every=-1, eval_examples=1)
    assert [line["train/loss"] for line in curve("sft") if "grad_norm" in line] == [0.0, 0.0]


def test_optional_evaluations_off_still_save_and_resume():
    run_stage("base", eval_every=-1, sample_every=-1, save_every=-1, model_tag="plain")
    assert CheckpointManager(get_checkpoint_dir("base", "plain")).steps() == [4]
    run_stage("base", eval_every=-1, sample_every=-1, save_every=-1, model_tag="plain", resume_from_step=-2)


def test_a_run_with_a_head_start_resumes_without_another(capsys):
    run_stage("base", model_tag="counted", value_embeds=True, head_start=True)
    assert "head start: 160/160" in capsys.readouterr().out
    unbroken, plain = curve("base", "counted"), curve("base")
    assert unbroken[0]["val/bpb"] < plain[0]["val/bpb"] - 0.5
    # at the same rates, unsaid
    run_stage("base", model_tag="counted", value_embeds=True, head_start=True, resume_from_step=2)
    out = capsys.readouterr().out
    assert curve("base", "counted") == unbroken
    assert "head start:" not in out and "learning rates: embedding 0.01, head 0.0003" in out


def test_an_evaluation_that_fails_does_not_cost_the_run(monkeypatch, capsys):
    def fail(*args):
        raise torch.OutOfMemoryError("pretended")
    monkeypatch.setattr(base_train, "evaluate_bpb", fail)
    monkeypatch.setattr(base_train, "complete_prompts", fail)
    run_stage("base", model_tag="unlucky")
    assert CheckpointManager(get_checkpoint_dir("base", "unlucky")).steps() == [2, 4]
    assert "the evaluation failed and is skipped" in capsys.readouterr().out


def test_a_signal_saves_and_the_resumed_run_goes_on_as_if_nothing_was(monkeypatch):
    run_stage("base", model_tag="whole", eval_every=-1)
    whole = curve("base", "whole")
    real = base_train.optimizer_step

    def step_and_signal(*args):
        norm = real(*args)
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return norm
    calls = []
    monkeypatch.setattr(base_train, "optimizer_step", step_and_signal)
    with pytest.raises(SystemExit):
        run_stage("base", model_tag="stopped", eval_every=-1)
    assert CheckpointManager(get_checkpoint_dir("base", "stopped")).steps() == [3]
    run_stage("base", model_tag="stopped", eval_every=-1, resume_from_step=-2)
    assert curve("base", "stopped") == whole


def test_resuming_with_other_settings_says_so(capsys):
    run_stage("base", resume_from_step=2, num_iterations=4, save_every=7)
    assert "note: --save_every=7 now, 1000 in the run that is resumed" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_resumed_run_cannot_change_which_examples_a_step_has(stage):
    with pytest.raises(UserError, match="--examples_per_step=3, but the run that is resumed has"):
        run_stage(stage, resume_from_step=2, examples_per_step=3)


@pytest.fixture
def dirty(tmp_path):
    """A file of 40 rows with the field `story`. Rows 5 and 38, one of the two held out, hold none."""
    rows = [{"story": f"Tom went to the market {i} times. " * 9, "text": "not this"} for i in range(40)]
    rows[5]["story"] = rows[38]["story"] = None
    (tmp_path / "dirty.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return dict(data=str(tmp_path / "dirty.jsonl"), text_field="story", model_tag="dirty")


def test_a_run_goes_past_rows_without_text_and_names_them(dirty, capsys):
    run_stage("base", **dirty, num_iterations=12, total_batch_size=512)
    out = capsys.readouterr().out
    assert f"rows without text: 2 skipped, first in each file: {dirty['data']}:6: field story is missing" in out
    assert CheckpointManager(get_checkpoint_dir("base", "dirty")).steps()[-1] == 12


def test_strict_stops_before_training_starts(dirty, capsys):
    with pytest.raises(UserError, match=r"dirty.jsonl:6: field story is missing or null"):
        run_stage("base", **dirty, strict=True)
    assert "step" not in capsys.readouterr().out.replace("steps", "")
    assert not get_checkpoint_dir("base", "dirty").exists()


@pytest.mark.parametrize("stage", ["mid", "sft"])
def test_own_conversations_of_another_shape_are_trained_on(stage, tmp_path, capsys):
    rows = [{"conversations": [{"from": "human", "value": f"Say {i}"}, {"from": "gpt", "value": str(i)}]}
            for i in range(30)]
    (tmp_path / "sharegpt.json").write_text(json.dumps(rows), encoding="utf-8")
    sizes = []
    for data in (None, str(tmp_path / "sharegpt.json")):
        run_stage(stage, num_iterations=1, data=data)
        printed = capsys.readouterr().out.partition("mixture: ")[2]
        sizes.append(int(printed.split(" conversations")[0].replace(",", "")))
    assert sizes[1] == sizes[0] + 30


def test_base_loss_scores_both_splits(monkeypatch, capsys):
    monkeypatch.setattr(base_loss, "eval_tokens", 300)
    monkeypatch.setattr(base_loss, "model_tag", "d1")
    base_loss.main()
    out = capsys.readouterr().out
    assert "train bpb: " in out and "val bpb: " in out and "sample: " in out


def test_base_loss_reads_another_field_and_names_rows_without_text(monkeypatch, dirty, capsys):
    for name, value in {"eval_tokens": -1, **dirty, "model_tag": "d1"}.items():
        monkeypatch.setattr(base_loss, name, value)
    base_loss.main()
    train, val = [line for line in capsys.readouterr().out.splitlines() if "rows without text" in line]
    assert "1 skipped" in train and "dirty.jsonl:6: field story" in train
    assert "1 skipped" in val and "dirty.jsonl:39: field story" in val


def test_base_loss_scores_whole_documents(monkeypatch, capsys, tmp_path):
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"Text number {n}. " * n}) + "\n" for n in range(1, 31)))
    for name, value in {"data": str(data), "model_tag": "d1", "per_document": True, "eval_tokens": -1}.items():
        monkeypatch.setattr(base_loss, name, value)
    base_loss.main()
    out = capsys.readouterr().out
    # 30 documents, of which one is held out
    assert re.search(r"train bpb: \d\.\d{6} ± 0\.\d{6} \| documents: 29 \|", out)
    assert re.search(r"val bpb: \d\.\d{6} \| documents: 1 \|", out)  # one alone has no standard error


def test_base_loss_scores_one_split_in_pieces_and_without_samples(monkeypatch, capsys, base_dir):
    """Documents longer than the context (64 tokens) give another figure if each piece starts with <|bos|>."""
    bpb = {}
    for cut in ("windows", "pieces"):
        for name, value in {"model_tag": "d1", "per_document": True, "cut": cut, "eval_tokens": 3000, "split": "val",
                            "sample": False}.items():
            monkeypatch.setattr(base_loss, name, value)
        base_loss.main()
        out = capsys.readouterr().out
        assert "train bpb" not in out and "sample:" not in out
        report = json.loads(next((base_dir / "report").glob("*-base-model-loss-per-document.json")).read_text())
        bpb[cut] = report["metrics"]["bpb per document"]
    assert bpb["pieces"]["n"] == bpb["windows"]["n"] > 3
    assert bpb["pieces"]["value"] != bpb["windows"]["value"]


def test_the_final_loss_has_a_standard_error_in_the_report(base_dir):
    sections = (("base", "base-model-training", "bpb"), ("mid", "midtraining", "bpb of conversations"))
    for stage, section, metric in sections:
        run_stage(stage, eval_tokens=4000, num_iterations=1, eval_every=-1)
        report = json.loads(next((base_dir / "report").glob(f"*-{section}.json")).read_text())
        assert report["metrics"][metric]["stderr"] > 0 and report["metrics"][metric]["n"] > 2
    last = [line for line in curve("base") if "val/bpb" in line][-1]
    assert 0 < last["val/bpb_stderr"] < last["val/bpb"]


def test_the_seed_moves_the_initialisation_and_the_order_of_the_data():
    """Learning rates of 0 keep the weights of the start."""
    still = dict(embedding_lr=0.0, unembedding_lr=0.0, matrix_lr=0.0, num_iterations=1, eval_every=-1)
    weights = []
    for tag, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_stage("base", **still, seed=seed, model_tag=tag)
        model = CheckpointManager(get_checkpoint_dir("base", tag)).load_model(torch.device("cpu"), 1)
        weights.append(model.transformer.wte.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])

    # from equal weights: whatever differs then is the data
    def equal_start(config, device):
        torch.manual_seed(0)
        return real(config, device)
    real = GPT.create
    norms = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GPT, "create", equal_start)
        for tag, seed in (("a", 1), ("b", 1), ("c", 2)):
            run_stage("base", seed=seed, model_tag=tag, num_iterations=1, eval_every=-1)
            norms.append([line["grad_norm"] for line in curve("base", tag) if "grad_norm" in line])
    assert norms[0] == norms[1] != norms[2]


@pytest.mark.parametrize("settings, message", [
    (dict(num_iterations=-1, target_param_data_ratio=-1.0), "no end"),
    (dict(data="/nowhere"), "/nowhere"),
    (dict(device_type="tpu"), "device_type=tpu"),
    (dict(model_tag="d1", resume_from_step=77), "no whole checkpoint of step 77.*\n.*--resume_from_step=-2"),
    (dict(model_tag="d1", resume_from_step=-3), "resume_from_step=-3: need a step, -2 for the latest"),
    (dict(model_tag="d1", resume_from_step=4, num_iterations=3), "at step 4, the run ends at 3"),
    (dict(model_tag="d1", resume_from_step=4, max_seq_len=32), "--max_seq_len=32, but the run.*has 64"),
    (dict(depth=0), "depth=0: need 1 or more"), (dict(eval_tokens=0), "eval_tokens=0: need 1 or more, or -1"),
    (dict(keep_last=0), "keep_last=0: need 1 or more, or -1"), (dict(matrix_lr=-0.02), "matrix_lr=-0.02: need 0 or"),
    (dict(warmdown_ratio=1.5), "warmdown_ratio=1.5: need 0 to 1"),
])
def test_a_wrong_setting_is_named(settings, message):
    with pytest.raises(UserError, match=message):
        run_stage("base", **({"model_tag": "wrong"} | settings))


@pytest.mark.slow
def test_kill_at_random_moments_loses_nothing(tmp_path):
    """kill -9 ten times, also while saving (every step saves): the losses equal those of an unbroken run."""
    settings = dict(num_iterations=60, save_every=1, eval_every=-1)
    run_stage("base", **settings, model_tag="unbroken")
    manager, delays = CheckpointManager(get_checkpoint_dir("base", "killed")), iter(range(100))
    kills = 0
    while manager.last_step() != 60:
        resumed = settings | {"model_tag": "killed", "resume_from_step": -2 if manager.steps() else -1}
        command = [sys.executable, "-m", "tests.stages", "base", json.dumps(resumed)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: a norm's sum depends on the number of threads
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL)
        before, deadline = manager.last_step() or 0, time.time() + 120
        while process.poll() is None and (manager.last_step() or 0) < before + 3 and time.time() < deadline:
            time.sleep(0.002)
        if kills < 10:
            time.sleep(next(delays) * 0.007 % 0.05)  # another moment of a step each time
            process.kill()
            kills += 1
        process.wait()
    assert kills == 10 and curve("base", "killed") == curve("base", "unbroken")


@pytest.mark.parametrize("stage, wrong", [
    ("base", dict(data="/nowhere")), ("mid", dict(run="mine")), ("rl", dict(temperature=0.0)), ("rl", dict(top_k=-1)),
    ("rl", dict(num_samples=1))])
def test_a_run_that_cannot_start_moves_no_checkpoints(stage, wrong, monkeypatch):
    def no_login(**kwargs):
        raise OSError("no login")
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=no_login))
    with pytest.raises(UserError, match=next(iter(wrong))):
        run_stage(stage, **wrong)
    assert CheckpointManager(get_checkpoint_dir(stage, "d1")).steps() == [2, 4]


@pytest.mark.parametrize("stage, source", [("mid", "base"), ("sft", "mid")])
def test_a_stage_is_resumed_without_the_one_it_began_with(stage, source):
    folder = get_checkpoint_dir(source, "d1").parent
    away, unbroken = folder.rename(folder.with_name("away")), curve(stage)
    try:
        run_stage(stage, resume_from_step=2)
    finally:
        away.rename(folder)
    assert curve(stage) == unbroken
