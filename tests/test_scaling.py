"""The scaling series: its plan, its resuming, what it prints; on stand-ins for the two scripts, and once for real."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.scaling_law import ModelSize, ScalingLaw

pytest.importorskip("scipy", reason="needs scipy: uv sync --group dev")

from dev import scaling, scaling_series  # noqa: E402
from dev.scaling_series import Run, Series, Speed, list_runs, plan_series, run_seconds  # noqa: E402

ROOT = Path(__file__).parent.parent
LAW = ScalingLaw(E=0.774, A=723.0, alpha=0.485, B=42.0, beta=0.28)
SIZES = [ModelSize.from_depth(depth, 4096, 512) for depth in (2, 3, 4, 6, 8)]
SPEEDS = {size.depth: Speed(1e11 + 1e9 * size.depth, 10.0) for size in SIZES}  # as one core


# -----------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("minutes, levels, seeds", [(60, 3, [1]), (180, 4, [1]), (600, 4, [1, 2, 3]), (3000, 5, [1])])
def test_a_plan_fills_the_time_at_the_measured_speed(minutes, levels, seeds):
    runs = plan_series(60 * minutes, levels, seeds, SIZES, SPEEDS, eval_tokens=100_000)
    size_of = {size.depth: size for size in SIZES}
    total = sum(run_seconds(run, size_of[run.depth], SPEEDS[run.depth], 100_000) for run in runs)
    assert 0.9 * 60 * minutes < total <= 60 * minutes
    assert len({run.tag for run in runs}) == len(runs)


def test_a_plan_has_every_depth_at_equal_flops_the_cheapest_first():
    runs = list_runs(8e15, 3, [42], SIZES)
    assert [run.flops for run in runs] == [2e15] * 5 + [4e15] * 5 + [8e15] * 5
    assert [run.depth for run in runs[:5]] == [2, 3, 4, 6, 8]
    assert [run.seed for run in list_runs(8e15, 1, [1, 2], SIZES[:1])] == [1, 2]


def test_a_depth_that_would_see_too_little_text_is_left_out():
    runs = list_runs(9e13, 2, [42], SIZES)
    assert {run.depth for run in runs} == {2, 3, 4, 6} and runs[-1].depth == 6
    for run in runs:
        size = next(size for size in SIZES if size.depth == run.depth)
        assert run.flops / size.flops_per_token >= scaling_series.MIN_TOKENS


def test_a_time_too_short_for_any_series_is_refused():
    with pytest.raises(UserError, match=r"the smallest series takes \d+ minutes, 3 are planned for"):
        plan_series(180, 4, [42], SIZES, SPEEDS, eval_tokens=100_000)


# -----------------------------------------------------------------------------
# Running, with a stand-in for base_train and base_loss that leaves what they leave


class Scripts:
    """Stands for the two scripts. calls: (module, tag) of each; fail_at: number of the call that fails."""

    def __init__(self, fail_at=None):
        self.calls = []
        self.fail_at = fail_at

    def __call__(self, folder, log, module, *flags):
        settings = dict(flag.removeprefix("--").split("=") for flag in flags if "=" in flag)
        tag = settings["model_tag"]
        self.calls.append((module, tag))
        if len(self.calls) == self.fail_at:
            raise UserError(f"{module} ended with code 1")
        log.parent.mkdir(parents=True, exist_ok=True)
        report = folder / "report"
        report.mkdir(exist_ok=True)
        if module == "scripts.base_loss":
            num_params, num_tokens = self.trained[tag]
            metric = {"value": float(LAW.loss(num_params, num_tokens)), "stderr": 0.004, "n": 99}
            section = {"config": {"model_tag": tag}, "metrics": {"bpb per document": metric}}
            (report / "19-base-model-loss-per-document.json").write_text(json.dumps(section))
            return
        size = ModelSize.from_depth(int(settings["depth"]), 4096, 512)
        num_tokens = 4096 * 4
        if "target_flops" in settings:
            num_tokens = round(float(settings["target_flops"]) / size.flops_per_token)
        checkpoints = folder / "base_checkpoints" / tag
        checkpoints.mkdir(parents=True)
        lines = [{"step": step, "epoch": 0, "dt_ms": 20 * step} for step in (1, 2, 3, 4)]
        (checkpoints / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        section = {"config": {"model_tag": tag}, "tokens": num_tokens, "steps": 4, "tokens per step": 4096,
                   "training minutes": 0.5}
        (report / "03-base-model-training.json").write_text(json.dumps(section))
        self.trained[tag] = (size.num_matrix_params, num_tokens)

    trained = {}


SETTINGS = {"data": "my_texts", "text_field": "text", "depths": [2, 3, 4], "levels": 3, "seeds": 1, "max_seq_len": 512,
            "eval_tokens": 10_000, "flags": ["--head_start=False"], "device_type": "cpu"}


def open_series(folder, scripts, **settings):
    return Series(folder, SETTINGS | settings, 4096, scripts)


def test_speeds_are_measured_once_and_the_plan_stays(tmp_path):
    scripts = Scripts()
    series = open_series(tmp_path, scripts)
    runs = series.plan(300)
    assert [tag for _, tag in scripts.calls] == ["speed-d2", "speed-d3", "speed-d4"]
    saved = json.loads((tmp_path / "series.json").read_text())
    size = ModelSize.from_depth(2, 4096, 512)
    # the median of the steps after the first: 40, 60 and 80 ms
    assert saved["speeds"]["2"]["flops_per_s"] == pytest.approx(4096 * size.flops_per_token / 0.06)
    assert not (tmp_path / "base_checkpoints" / "speed-d2").exists()
    again = Scripts()
    assert open_series(tmp_path, again).plan(600) == runs and again.calls == []


def test_finished_runs_are_not_run_again(tmp_path):
    scripts = Scripts(fail_at=9)  # 3 speeds, 2 runs of 2 commands, base_train of the third; its base_loss fails
    series = open_series(tmp_path, scripts)
    runs = series.plan(300)
    with pytest.raises(UserError, match="ended with code 1"):
        series.run_all(runs, 300)
    assert [line["tag"] for line in series.results()] == [run.tag for run in runs[:2]]
    # the third is trained again: base_train would find its checkpoint, which the stand-in has to do without
    for path in (tmp_path / "base_checkpoints").iterdir():
        (path / "metrics.jsonl").unlink()
        path.rmdir()
    rest = Scripts()
    series = open_series(tmp_path, rest)
    assert series.run_all(series.plan(300), 300) == []
    assert [tag for _, tag in rest.calls] == [run.tag for run in runs[2:] for _ in range(2)]
    assert [line["tag"] for line in series.results()] == [run.tag for run in runs]
    assert list((tmp_path / "base_checkpoints").iterdir()) == []  # the checkpoints would fill the disk
    assert {path.name for path in (tmp_path / "logs").glob("*.jsonl")} == {f"{run.tag}.jsonl" for run in runs}


def test_a_result_has_what_was_trained_and_measured(tmp_path):
    series = open_series(tmp_path, Scripts())
    run = series.plan(300)[0]
    line = series.run(run)
    size = ModelSize.from_depth(2, 4096, 512)
    assert (line["depth"], line["flops"], line["seed"]) == (run.depth, run.flops, 42)
    assert line["num_matrix_params"] == size.num_matrix_params and line["num_params"] == size.num_params
    assert line["num_tokens"] == pytest.approx(run.flops / size.flops_per_token, rel=1e-5)
    assert line["bpb"] == LAW.loss(size.num_matrix_params, line["num_tokens"]) and line["stderr"] == 0.004
    assert series.results() == [line]


def test_runs_that_no_longer_fit_the_minutes_are_left(tmp_path):
    series = open_series(tmp_path, Scripts())
    runs = series.plan(300)
    left = series.run_all(runs, 0.4)  # the stand-ins "train" for half a minute
    assert len(left) == len(runs)
    left = series.run_all(runs, 300)
    assert left == []


def test_a_series_keeps_its_settings(tmp_path):
    open_series(tmp_path, Scripts()).plan(300)
    with pytest.raises(UserError, match=r"--levels: 4 now, but the series in .* has 3"):
        open_series(tmp_path, Scripts(), levels=4).plan(300)


def test_a_script_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(UserError, match="tests.no_such_module ended with code 1.*No module named"):
        scaling_series.run_module(tmp_path, tmp_path / "logs" / "a.log", "tests.no_such_module")


# -----------------------------------------------------------------------------
# The command


@pytest.fixture
def command(tmp_path, tokenizer, monkeypatch, capsys):
    """command(**settings): the output of scaling.py in a base directory with a tokenizer."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    tokenizer.save(tmp_path / "base" / "tokenizer")
    handler = signal.getsignal(signal.SIGTERM)

    def run(**settings):
        for name, value in ({"repeats": 10} | settings).items():
            monkeypatch.setattr(scaling, name, value)
        scaling.main()
        return capsys.readouterr().out
    yield run
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def finished(tmp_path):
    """A base directory whose series has ten finished runs."""
    series = open_series(tmp_path / "base" / "scaling", Scripts(), depths=[2, 3, 4, 5])
    runs = series.plan(300)
    series.run_all(runs, 300)
    return series


def test_a_finished_series_is_fitted_predicted_and_drawn(finished, command, tmp_path):
    out = command(minutes=0.0)
    for title in ("Runs", "N = matrices", "What N counts", "Compute-optimal tokens", "Predicted at 20 tokens"):
        assert title in out
    saved = json.loads((tmp_path / "base" / "scaling" / "law.json").read_text())
    assert saved["law"]["alpha"] == pytest.approx(LAW.alpha, rel=0.01) and len(saved["bootstrap"]) == 10
    size = ModelSize.from_depth(20, 65536, 2048)
    expected = LAW.loss(size.num_matrix_params, 20 * size.num_params)
    row = next(line for line in out.splitlines() if line.startswith("| d20 "))
    assert f"{expected:.3f}" in row
    svg = (tmp_path / "base" / "scaling" / "scaling.svg").read_text()
    assert "equal FLOPs" in svg and "d32" in svg
    section = json.loads(next((tmp_path / "base" / "report").glob("*-scaling-law.json")).read_text())
    assert len(section["tables"]["Runs"]) == len(finished.results())


@pytest.mark.parametrize("name, depth", [("largest", 5), ("d5", 5), ("4", 4)])
def test_runs_left_out_are_predicted_by_the_others(finished, command, name, depth):
    out = command(minutes=0.0, leave_out=name).partition(f"Left out: {name}")[2]
    rows = [line for line in out.splitlines() if line.startswith(f"| d{depth}-")]
    errors = [float(row.split("|")[-2].strip(" %")) for row in rows]
    assert len(errors) == sum(line["depth"] == depth for line in finished.results()) > 0
    assert max(map(abs, errors)) < 0.1  # the stand-ins follow a law exactly


def test_a_plan_for_a_budget(finished, command):
    command(minutes=0.0)
    out = command(plan=True, budget=100.0)
    # 100 / (3 x 8) hours, three quarters of them
    assert "$100 at $3.00 an hour and GPU: 4.2 hours of 8 x H100, 3.1 of them for pretraining" in out
    flops = 0.75 * 100 / 24 * 3600 * 8 * 0.53 * 989e12
    assert f"{flops:.2e} FLOPs at 53% of 989 TFLOP/s" in out
    table = out.partition("All depths take this time")[2].partition("The time of d20")[0]
    rows = [line for line in table.splitlines() if line.startswith("| d") and "depth" not in line]
    best = next(row for row in rows if "(best)" in row)
    assert "+0.0000 to +0.0000" in best and len(rows) == 7
    depth = int(best.split()[1].removeprefix("d"))

    def predict(some_depth):
        size = ModelSize.from_depth(some_depth, 65536, 2048)
        return LAW.loss(size.num_matrix_params, flops / size.flops_per_token)
    assert predict(depth) <= min(predict(depth - 1), predict(depth + 1))
    # the run script's own depth stands beside the best for its FLOPs
    below = out.partition("The time of d20 at 20 tokens per parameter: ")[2]
    assert "| d20 " in below and "(best)" in below and "20.0" in below
    # d20: 561M parameters of 4 bytes; twice as much again for Adam's, once for Muon's
    assert scaling.checkpoint_bytes(ModelSize.from_depth(20, 65536, 2048)) == (2_243_952_640, 5_158_993_920)


def test_a_plan_without_a_fit_says_so(command):
    out = command(plan=True)
    assert "so this is the law of nanochat/scaling_law.py, without intervals" in out and "(best)" in out


@pytest.mark.parametrize("settings, message", [
    (dict(minutes=0.0), "has no finished run\nhint: --minutes=180"),
    (dict(depths="2,3"), "--depths=2,3: need three depths or more"),
    (dict(depths="two,3,4"), "--depths=two,3,4: need three depths"),
    (dict(plan=True, gpu="Abacus"), "--gpu=Abacus is not known"),
])
def test_a_wrong_setting_is_named(settings, message, command):
    with pytest.raises(UserError, match=message):
        command(**settings)


def test_a_depth_that_has_no_run_cannot_be_left_out(finished, command):
    with pytest.raises(UserError, match="--leave_out=d9: no run has that depth"):
        command(minutes=0.0, leave_out="d9")


@pytest.mark.slow
def test_a_tiny_series_for_real_broken_off_and_resumed(tmp_path, tokenizer, story):
    """Six runs of d1 to d3, by the scripts themselves; a SIGTERM falls into the second one."""
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": f"{n} {story}"}) + "\n" for n in range(40)), encoding="utf-8")
    base = tmp_path / "base"
    folder = base / "scaling"
    for where in (base, folder):
        tokenizer.save(where / "tokenizer")
    flags = ["--head_start=False", "--save_every=5", "--total_batch_size=256"]
    settings = {"data": str(data), "text_field": "text", "depths": [1, 2, 3], "levels": 2, "seeds": 1,
                "max_seq_len": 64, "eval_tokens": 2000, "flags": flags, "device_type": "cpu"}
    series = Series(folder, settings, 512)
    speed = series.measure_speed(series.sizes[0])
    assert 1e6 < speed.flops_per_s < 1e13 and speed.start_s > 0.5

    runs = []
    for steps, size in zip((20, 30, 25, 40, 50, 45), 2 * series.sizes, strict=True):
        runs.append(Run(size.depth, float(steps * 256 * size.flops_per_token), 42))
    plan = {"settings": settings, "runs": [asdict(run) for run in runs], "expected_s": {run.tag: 1.0 for run in runs}}
    (folder / "series.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "dev.scaling", f"--data={data}", "--depths=1,2,3", "--levels=2", "--repeats=5",
               "--max_seq_len=64", "--eval_tokens=2000", "--minutes=100", "--device_type=cpu",
               f"--flags={' '.join(flags)}"]
    env = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "NANOCHAT_PRECISION": "float32"}
    env.pop("NANOCHAT_DATA_DIR", None)
    log = tmp_path / "first.log"
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=file, stderr=file)
    end = time.monotonic() + 600
    while process.poll() is None and time.monotonic() < end and not (folder / "runs.jsonl").exists():
        time.sleep(0.1)
    time.sleep(1)
    process.terminate()
    assert process.wait(120) == 128 + signal.SIGTERM, log.read_text()
    first = series.results()
    assert 1 <= len(first) < 6

    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = series.results()
    assert lines[: len(first)] == first and [line["tag"] for line in lines] == [run.tag for run in runs]
    assert [line["steps"] for line in lines] == [20, 30, 25, 40, 50, 45]
    assert all(line["documents"] >= 1 and 0.01 < line["bpb"] < 8 for line in lines)  # d3 learns it by heart
    assert "Compute-optimal tokens" in done.stdout and (folder / "scaling.svg").is_file()
