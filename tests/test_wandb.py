"""A run with a name is also told to wandb: a stand-in of that module writes down what it hears."""

import sys
from types import SimpleNamespace

import pytest
import torch

from nanochat.run_keeper import RunKeeper
from tests.stages import small_stage


@pytest.fixture
def calls(monkeypatch):
    """What a stand-in of the module `wandb` was called with."""
    calls = []
    run = SimpleNamespace(id="abc123", log=lambda metrics, step: calls.append(("log", step, metrics)),
                          finish=lambda: calls.append(("finish",)))
    wandb = SimpleNamespace(init=lambda **kwargs: calls.append(("init", kwargs)) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return calls


def keep_a_run(folder, name, step=0, state=None):
    stage = small_stage(folder, step, state, run=name, depth=4)
    keeper = RunKeeper(stage, 10, "3 documents")
    keeper.metrics_log.log({"step": step + 1, "train/loss": 2.5, "mfu": 0.4})
    keeper.metrics_log.log({"step": step + 1, "val/bpb": 1.5})
    keeper.close()
    return stage.settings


def test_wandb_hears_the_settings_every_metric_and_the_end(tmp_path, calls):
    settings = keep_a_run(tmp_path, "my-run")
    begun = {"project": "nanochat", "name": "my-run", "config": settings, "id": None, "resume": "allow"}
    assert calls == [("init", begun),
                     ("log", 1, {"train/loss": 2.5, "mfu": 0.4}), ("log", 1, {"val/bpb": 1.5}), ("finish",)]


def test_a_resumed_run_goes_on_at_its_step_in_the_run_that_its_checkpoint_names(tmp_path, calls):
    keeper = RunKeeper(small_stage(tmp_path, run="my-run"), 10, "3 documents")
    keeper.save_if_due(5, eval_due=False)
    keeper.stage.manager.finish_saving(torch.device("cpu"))
    keeper.close()
    step, state = keeper.stage.manager.load_meta()
    calls.clear()
    keep_a_run(tmp_path, "my-run", step, state)
    assert calls[0][1]["id"] == "abc123" and calls[0][1]["resume"] == "allow"
    assert [call[1] for call in calls if call[0] == "log"] == [6, 6]


@pytest.mark.parametrize("name, rank", [("dummy", "0"), ("", "0"), ("my-run", "1")])
def test_wandb_hears_nothing_of_a_run_without_a_name_or_of_other_ranks(name, rank, tmp_path, calls, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    keep_a_run(tmp_path, name)
    assert calls == []


def test_the_log_is_written_all_the_same(tmp_path, calls):
    keep_a_run(tmp_path, "my-run")
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == [
        '{"step": 1, "train/loss": 2.5, "mfu": 0.4}', '{"step": 1, "val/bpb": 1.5}']
