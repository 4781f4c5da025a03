"""The trackers besides wandb, each by a stand-in of its module that writes down what it hears, as in test_wandb.py."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from nanochat.common import UserError
from nanochat.run_keeper import RunKeeper
from nanochat.trackers import start_tracker
from tests.stages import small_stage


def stand_in(monkeypatch, name, **attributes):
    module = ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """What the stand-ins of trackio, mlflow and torch's SummaryWriter were called with."""
    calls = []

    def note(name, result=None):
        return lambda *args, **kwargs: calls.append((name, *args, *kwargs.values())) or result

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    run = SimpleNamespace(name="my-run", log=note("log"), finish=note("finish"))
    stand_in(monkeypatch, "trackio", init=lambda **kwargs: calls.append(("init", kwargs)) or run)
    active = SimpleNamespace(info=SimpleNamespace(run_id="abc"))
    stand_in(monkeypatch, "mlflow", set_experiment=note("experiment"), start_run=note("start", active),
             log_params=note("params"), log_metrics=note("log"), end_run=note("finish"),
             flush_async_logging=note("flush"))
    writer = SimpleNamespace(add_scalar=note("scalar"), add_text=note("text"), close=note("finish"))
    stand_in(monkeypatch, "torch.utils.tensorboard", SummaryWriter=note("init", writer))
    return calls


def keep_a_run(folder, tracker, step=0, state=None):
    keeper = RunKeeper(small_stage(folder, step, state, run="my-run", tracker=tracker), 10, "")
    keeper.metrics_log.log({"step": step + 1, "train/loss": 2.5, "mfu": None})
    keeper.metrics_log.log({"step": step + 1, "pass@1": 0.5, "stderr": float("nan")})
    keeper.log_samples(step + 1, [{"prompt": "a", "text": "ab"}])
    return keeper


def resume(folder, tracker, calls, other=None):
    """Save a run at step 5 and go on with it, perhaps with another tracker. Returns what was heard since."""
    keeper = keep_a_run(folder, tracker)
    keeper.save_if_due(5, eval_due=False)
    keeper.stage.manager.finish_saving(torch.device("cpu"))
    keeper.close()
    step, state = keeper.stage.manager.load_meta()
    calls.clear()
    keep_a_run(folder, other or tracker, step, state).close()
    return calls


def test_trackio_hears_numbers_and_is_resumed_under_its_name(tmp_path, calls):
    keep_a_run(tmp_path / "run", "trackio").close()
    begun = calls[0][1]
    assert begun["project"] == "nanochat" and begun["name"] == "my-run" and begun["resume"] == "never"
    logged = [call for call in calls if call[0] == "log"]
    assert logged[:2] == [("log", {"train/loss": 2.5}, 1), ("log", {"pass@1": 0.5}, 1)] and calls[-1] == ("finish",)
    assert resume(tmp_path / "other", "trackio", calls)[0][1]["resume"] == "must"


def test_mlflow_hears_numbers_and_is_resumed_by_its_id(tmp_path, calls):
    keep_a_run(tmp_path / "run", "mlflow").close()
    assert [call[0] for call in calls][:3] == ["experiment", "start", "params"] and calls[-1] == ("finish",)
    assert calls[1] == ("start", None, "my-run")
    assert calls[3:5] == [("log", {"train/loss": 2.5}, 1, False), ("log", {"pass_at_1": 0.5}, 1, False)]
    again = resume(tmp_path / "other", "mlflow", calls)
    assert again[1] == ("start", "abc", "my-run") and "params" not in [call[0] for call in again]


def test_tensorboard_writes_each_run_to_a_folder_and_a_resumed_one_to_the_same(tmp_path, calls):
    folder = tmp_path / "base" / "tensorboard"
    (folder / "my-run").mkdir(parents=True)
    keep_a_run(tmp_path / "run", "tensorboard").close()
    assert calls[0] == ("init", folder / "my-run-2", None)
    scalars = [call[1:] for call in calls if call[0] == "scalar"]
    assert scalars[:2] == [("train/loss", 2.5, 1), ("pass@1", 0.5, 1)]
    (folder / "my-run-2").mkdir()
    assert resume(tmp_path / "other", "tensorboard", calls)[0] == ("init", folder / "my-run-3", 6)


def test_a_run_that_is_resumed_with_another_tracker_begins_anew_there(tmp_path, calls):
    assert resume(tmp_path, "trackio", calls, other="mlflow")[1] == ("start", None, "my-run")


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "mlflow", "tensorboard"])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(tracker, monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, tracker, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match=f"package {tracker} is not installed\nhint: uv pip install {tracker}"):
        start_tracker({"run": "my-run", "tracker": tracker})


def test_a_tracker_needs_a_name_for_the_run():
    with pytest.raises(UserError, match="--tracker=mlflow needs a name for the run\nhint: --run=NAME"):
        start_tracker({"run": "dummy", "tracker": "mlflow"})


def test_a_tracker_that_fails_costs_a_warning_and_no_line_of_the_log(tmp_path, calls, monkeypatch, capsys):
    def fail(numbers, step, synchronous):
        raise OSError("the server is gone")
    monkeypatch.setattr(sys.modules["mlflow"], "log_metrics", fail)
    keep_a_run(tmp_path / "run", "mlflow").close()
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 1 and "OSError: the server is gone" in printed
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
