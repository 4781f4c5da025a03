"""What the training scripts share: derived settings, accumulation, stopping, the log."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.common import IGNORE, UserError
from nanochat.dataloader import shift
from nanochat.gpt import GPTConfig
from nanochat.horizon import (
    align_batch_size,
    batch_size_law,
    choose_device_batch_size,
    count_examples,
    derive_horizon,
    shuffled_indices,
    step_places,
)
from nanochat.metrics_log import MetricsLog
from nanochat.run_keeper import RunKeeper, attempt, is_due
from nanochat.stop_signal import StopSignal
from nanochat.training import accumulate_gradients, count_used, micro_batches, optimizer_step, used_columns
from tests.stages import small_stage
from tests.tiny import tiny_model

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


def test_derived_batch_is_the_published_one_at_d20_and_shrinks_with_the_run():
    assert batch_size_law(20 * 561e6) == 2**19
    sizes = [batch_size_law(tokens) for tokens in (1e6, 1e8, 1e10, 1e12)]
    assert sizes == sorted(sizes) and all(math.log2(size).is_integer() for size in sizes)


def test_the_first_positive_horizon_decides():
    model = tiny_model()
    flops, params = model.estimate_flops(), model.num_params()
    assert derive_horizon(7, 1e18, 20, 320, model) == (7, 320, "--num_iterations")
    assert derive_horizon(-1, flops * 320 * 9, 20, 320, model) == (9, 320, "--target_flops")
    assert derive_horizon(-1, -1, 20, 320, model) == (round(20 * params / 320), 320, "--target_param_data_ratio")
    with pytest.raises(UserError, match="no end"):
        derive_horizon(-1, -1, -1, 320, model)


def test_a_small_run_has_enough_steps_and_a_large_one_the_published_batch():
    model = tiny_model()
    steps, batch, _ = derive_horizon(-1, 6e6 * model.estimate_flops(), -1, -1, model)
    assert batch == 8192 and steps == round(6e6 / 8192)
    assert derive_horizon(-1, 1e10 * model.estimate_flops(), -1, -1, model)[1] == batch_size_law(1e10) == 2**19
    assert derive_horizon(-1, 1e4 * model.estimate_flops(), -1, -1, model)[1] == 4096


def test_a_batch_that_is_no_multiple_is_aligned_and_said(capsys):
    assert align_batch_size(1000, 512) == 1024
    assert "a batch of 1000 tokens" in capsys.readouterr().out
    assert align_batch_size(1024, 512) == 1024
    assert capsys.readouterr().out == ""


def test_guessed_micro_batch_is_a_power_of_two_within_the_step():
    for depth in (4, 20, 32):
        rows = choose_device_batch_size(-1, GPTConfig.from_depth(depth, 65536, 2048), CPU, max_rows=6)
        assert rows in (1, 2, 4)


@pytest.mark.parametrize("device_batch_size", [1, 2, 3, 5])
def test_gradients_do_not_depend_on_the_micro_batch(device_batch_size):
    model = tiny_model()
    rows = torch.randint(0, 100, (5, 33)).numpy()
    rows[0, 3:] = -1  # one row with few targets: a mean per micro-batch would weigh it wrongly
    targets = int((rows[:, 1:] >= 0).sum())
    x, y = torch.from_numpy(rows[:, :-1]).clamp(min=0), torch.from_numpy(rows[:, 1:])
    model(x, y).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loss, _ = accumulate_gradients(model, *shift(rows), targets, device_batch_size)
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(loss, model(x, y).detach(), atol=1e-5, rtol=1e-5)


def test_out_of_memory_halves_the_micro_batch_and_gives_the_same_gradient(monkeypatch):
    model = tiny_model()
    rows = torch.randint(0, 100, (8, 33)).numpy()
    accumulate_gradients(model, *shift(rows), rows[:, 1:].size, 8)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    forward = model.forward

    def small_device(idx, *args, **kwargs):
        if idx.size(0) > 2:
            raise torch.OutOfMemoryError("pretended")
        return forward(idx, *args, **kwargs)

    monkeypatch.setattr(model, "forward", small_device)
    _, size = accumulate_gradients(model, *shift(rows), rows[:, 1:].size, 8)
    assert size == 2
    for p, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, atol=1e-6, rtol=1e-4)


def test_memory_that_runs_out_in_the_backward_pass_is_free_again_for_the_next_try(monkeypatch):
    class Graph(torch.autograd.Function):
        """Stands for the activations; its backward pass does not fit more than 2 rows."""
        @staticmethod
        def forward(ctx, x, rows):
            ctx.rows, ctx.kept = rows, torch.zeros(3)
            alive.append(weakref.ref(ctx.kept))
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if ctx.rows > 2:
                raise torch.OutOfMemoryError("pretended")
            return grad, None

    def forward(idx, *args, **kwargs):
        assert not any(ref() is not None for ref in alive), "the failed try still holds its memory"
        return Graph.apply(real(idx, *args, **kwargs), idx.size(0))

    alive, model = [], tiny_model()
    real, rows = model.forward, torch.randint(0, 100, (8, 9)).numpy()
    monkeypatch.setattr(model, "forward", forward)
    _, size = accumulate_gradients(model, *shift(rows), rows[:, 1:].size, 8)
    assert size == 2 and len(alive) == 2 + 4


def test_a_rank_without_rows_takes_part_in_a_step_in_float16():
    model, scaler = tiny_model(), torch.amp.GradScaler("cpu")
    optimizers = model.setup_optimizers()
    before = [p.clone() for p in model.parameters()]
    rows = np.zeros((0, 8), dtype=np.int32)
    loss, _ = accumulate_gradients(model, rows, rows, 16, 4, scaler=scaler)
    assert optimizer_step(model, optimizers, scaler) == 0 and loss.item() == 0
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, request):
    keeper = RunKeeper(small_stage(tmp_path), 10, "")
    request.addfinalizer(keeper.close)
    with pytest.raises(UserError, match=r"(?s)step 7 is nan.*shard_3, row 3.*no.*earlier checkpoint.*start again"):
        keeper.check_finite(torch.tensor(math.nan), 7, "shard_3, row 3")
    keeper.stage.manager.save_model(tiny_model(), 5)
    with pytest.raises(UserError, match=r"(?s)last good checkpoint is step 5.*resume with"):
        keeper.check_finite(torch.tensor(math.nan), 7, "shard_3, row 3")
    assert keeper.check_finite(torch.tensor(2.5), 7, "") == 2.5


def test_an_evaluation_that_fails_costs_a_warning(capsys):
    def fail():
        raise torch.OutOfMemoryError("out of memory")
    assert attempt("the evaluation", fail) is None
    assert "warning: the evaluation failed" in capsys.readouterr().out
    assert attempt("the evaluation", lambda: 3) == 3


@pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_signals_ask_to_stop_and_a_second_interrupt_interrupts(before):
    """A background job of a shell script starts with SIGINT ignored."""
    ours = signal.signal(signal.SIGINT, before)
    stop = StopSignal(CPU)
    try:
        assert not stop.asked()
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        stop.restore()
        assert signal.signal(signal.SIGINT, ours) == before


def test_a_lost_connection_asks_to_stop_unless_nohup_ignores_it():
    before = signal.getsignal(signal.SIGHUP)
    try:
        for handler, asked in ((signal.SIG_DFL, True), (signal.SIG_IGN, False)):
            signal.signal(signal.SIGHUP, handler)
            stop = StopSignal(CPU)
            signal.raise_signal(signal.SIGHUP)
            assert stop.asked() == asked
            stop.restore()
            assert signal.getsignal(signal.SIGHUP) == handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_slurms_warning_asks_to_stop():
    stop = StopSignal(CPU)
    try:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.asked() and stop.received == signal.SIGUSR1
    finally:
        stop.restore()


@pytest.mark.parametrize("launcher, stops", [("torchrun", True), ("a shell", False)])
def test_the_end_of_torchrun_asks_to_stop_that_of_a_shell_does_not(launcher, stops, tmp_path):
    """A process whose parent is killed: it notices, or outlives it."""
    child = f"""
import os, time, torch
from nanochat.stop_signal import StopSignal
stop = StopSignal(torch.device("cpu"))
parent = os.getppid()
open({str(tmp_path / "ready")!r}, "w").close()
while os.getppid() == parent:
    time.sleep(0.01)
answer = str(stop.asked())
open({str(tmp_path / "part")!r}, "w").write(answer)
os.rename({str(tmp_path / "part")!r}, {str(tmp_path / "answer")!r})"""
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    env.pop("TORCHELASTIC_RUN_ID", None)
    if launcher == "torchrun":
        env["TORCHELASTIC_RUN_ID"] = "a run"
    process = subprocess.Popen([sys.executable, "-c", parent], env=env, cwd=ROOT)
    wait_for_file(tmp_path / "ready")
    process.kill()
    process.wait()
    wait_for_file(tmp_path / "answer")
    assert (tmp_path / "answer").read_text() == str(stops)


def wait_for_file(path):
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert path.exists()


def test_metrics_log_drops_what_a_resumed_run_writes_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(6):
        log.log({"step": step, "val/bpb": 0})
        log.log({"step": step + 1, "train/loss": 0})
    log.close()
    with open(path, "a", encoding="utf-8") as f:
        f.write('{"step": 6, "val')  # a line that a crash cut short
    log = MetricsLog(path, step=4)
    log.log({"step": 4, "val/bpb": 1})
    log.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert lines[-2:] == [{"step": 4, "train/loss": 0}, {"step": 4, "val/bpb": 1}]


def test_a_number_that_is_not_finite_is_null_in_the_log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.log({"step": 1, "train/loss": math.nan, "kl": math.inf, "mfu": None, "lrm": 0.5})
    log.close()
    line = '{"step": 1, "train/loss": null, "kl": null, "mfu": null, "lrm": 0.5}\n'
    assert (tmp_path / "metrics.jsonl").read_text() == line


def test_a_resumed_run_whose_data_changed_is_warned(tmp_path, capsys):
    stage = small_stage(tmp_path, state={"data": "3 documents"})
    RunKeeper(stage, 10, "3 documents").close()
    assert capsys.readouterr().out == ""
    RunKeeper(stage, 10, "4 documents").close()
    assert "warning: the data is not what the run began with (4 documents now" in capsys.readouterr().out


def test_a_run_is_saved_when_it_is_time(tmp_path):
    keeper = RunKeeper(small_stage(tmp_path), 12, "")
    try:
        assert [step for step in range(13) if keeper.save_due(step, eval_due=step == 8)] == [5, 8, 10, 12]
        keeper.save(10, loader={"row": 3})
        assert not keeper.save_due(10, eval_due=True)
        keeper.stage.manager.finish_saving(CPU)
        assert keeper.stage.manager.load_meta(10)[1]["loader"] == {"row": 3}
        signal.raise_signal(signal.SIGTERM)
        keeper.save_if_due(11, eval_due=False)
        assert keeper.stopping and keeper.stage.manager.last_step() == 11
    finally:
        with pytest.raises(SystemExit) as exit:  # as if the signal had ended it: a script's next stage does not run
            keeper.close()
    assert exit.value.code == 128 + signal.SIGTERM


def test_a_full_disk_costs_a_line_of_the_log_not_the_run(tmp_path, capsys):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log._file.close()
    log._file = open("/dev/full", "a", encoding="utf-8")
    log.log({"step": 1, "train/loss": 2.0})
    log.close()
    assert "metrics.jsonl could not be written: [Errno 28]" in capsys.readouterr().out


def test_a_save_that_fails_costs_a_warning_the_last_one_and_a_spoiled_model_are_errors(tmp_path, capsys):
    keeper = RunKeeper(small_stage(tmp_path), 10, "")
    try:
        (tmp_path / ".tmp_step_000005").write_text("in the way")  # no folder of that name can be made
        keeper.save_if_due(5, eval_due=False)
        printed = ""
        end = time.monotonic() + 30
        while "could not be written" not in printed and time.monotonic() < end:
            keeper.save_if_due(6, eval_due=False)  # a later step tells
            printed += capsys.readouterr().out
        assert "warning: checkpoint" in printed and "step_000005 could not be written" in printed
        (tmp_path / ".tmp_step_000010").write_text("in the way")
        with pytest.raises(UserError, match="step_000010 could not be written"):
            keeper.save_if_due(10, eval_due=False)
        keeper.stage.model.lm_head.weight.data[3, 0] = math.nan
        with pytest.raises(UserError, match="not finite after step 5; nothing of this step was saved"):
            keeper.save(5)
    finally:
        keeper.close()


def test_a_save_in_the_background_writes_the_state_of_its_step(tmp_path):
    """Although the loop goes on: parameters and counters change while the thread writes."""
    stage = small_stage(tmp_path)
    stage.optimizers = stage.model.setup_optimizers()
    keeper = RunKeeper(stage, 10, "")
    manager = stage.manager
    try:
        saved = {name: p.clone() for name, p in stage.model.state_dict().items()}
        stage.progress["tokens"] = 100
        keeper.save_if_due(5, eval_due=False)
        stage.progress["tokens"] = 200
        with torch.no_grad():
            for p in stage.model.parameters():
                p.zero_()
        keeper.save_if_due(7, eval_due=True)  # waits for the one of step 5
        assert manager.load_meta(5)[1]["progress"]["tokens"] == 100
        for name, p in manager.load_model(CPU, 5).state_dict().items():
            assert torch.equal(p, saved[name])
        keeper.save_if_due(10, eval_due=False)  # the last one is on the disk when this returns
        assert manager.steps() == [5, 7, 10] and manager.load_meta(7)[1]["progress"]["tokens"] == 200
        assert not any(p.any() for p in manager.load_model(CPU, 7).parameters())
    finally:
        keeper.close()


def test_a_save_that_takes_longer_than_a_stop_allows_is_said_once(tmp_path, capsys):
    keeper = RunKeeper(small_stage(tmp_path), 100, "")
    manager = keeper.stage.manager
    try:
        keeper.save_if_due(5, eval_due=False)
        manager.warn_of_failure(wait=True)
        manager.save_s = 16.0  # as on a slow disk: two of them take longer than 30 s
        for step in (6, 7):
            keeper.save_if_due(step, eval_due=False)
        printed = capsys.readouterr().out
        assert printed.count("a checkpoint takes 16.0 s to write") == 1
        assert printed.count("kill a run 30 s after they ask it to stop, and to save may take 32 s") == 1
    finally:
        keeper.close()


def test_one_overflowed_gradient_skips_the_step_of_every_optimizer():
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizers = [torch.optim.SGD([p], lr=1.0) for p in params]
    for optimizer in optimizers:
        optimizer.grad_sq = 0.0
    model, scaler = torch.nn.ParameterList(params), torch.amp.GradScaler("cpu", init_scale=4.0)
    model.device = CPU
    for bad in (float("inf"), 1.0):
        scaler.scale(params[0].sum() + bad * params[1].sum()).backward()
        optimizer_step(model, optimizers, scaler)
        assert [p.tolist() for p in params] == ([[1, 1], [1, 1]] if math.isinf(bad) else [[0, 0], [0, 0]])
    assert scaler.get_scale() == 2.0  # halved once


def test_examples_are_shuffled_passes_that_depend_on_the_seed_and_the_pass():
    passes = [shuffled_indices(range(start, start + 10), 10, seed=1) for start in (0, 10)]
    assert [sorted(indices) for indices in passes] == [[*range(10)]] * 2 and passes[0] != passes[1]
    assert shuffled_indices(range(7, 13), 10, seed=1) == (passes[0] + passes[1])[7:13]
    assert shuffled_indices(range(10), 10, seed=2) != passes[0]


def test_the_last_step_of_the_last_pass_may_be_short_but_not_one_of_a_number_of_steps():
    for num_iterations, expected in ((-1, [4, 4, 4, 4, 2]), (5, [4] * 5)):
        steps, run_examples = count_examples(num_iterations, num_epochs=2, examples_per_step=4, num_examples=9)
        places = [step_places(step, 4, run_examples) for step in range(steps)]
        assert [len(step) for step in places] == expected
        assert [place for step in places for place in step] == list(range(run_examples))


def test_what_is_never_due_is_not_due_at_step_0():
    assert [step for step in range(7) if is_due(step, 3)] == [0, 3, 6]
    assert not is_due(0, -1)


def test_the_time_left_forgets_the_first_step_which_compiles(tmp_path, monkeypatch, capsys):
    keeper = RunKeeper(small_stage(tmp_path), 101, "")
    clock = 0.0
    monkeypatch.setattr("nanochat.run_keeper.time.perf_counter", lambda: clock)
    for step in range(1, 102):
        keeper.start_step()
        clock += 60 if step == 1 else 1
        keeper.finish_step(step, 2.0, 100, 1.0, 0.5)
    keeper.close()
    lines = capsys.readouterr().out.splitlines()
    assert "dt: 60000ms" in lines[0] and "step: 00051/00101" in lines[50] and lines[50].endswith("eta: 1.0m")


def test_count_used_stops_at_the_last_target_of_each_row():
    targets = np.array([[5, IGNORE, IGNORE, IGNORE], [IGNORE, 1, 2, 3], [IGNORE] * 4, [0, 0, 0, 0]])
    assert count_used(targets) == 1 + 4 + 0 + 4


def test_columns_after_the_last_target_are_left_out_in_steps_of_32():
    targets = np.full((3, 100), -1)
    assert used_columns(targets).tolist() == [32, 32, 32]
    for column, used in ((0, 32), (31, 32), (32, 64), (95, 96), (96, 100)):
        targets[1, column] = 5
        assert used_columns(targets).tolist() == [32, used, 32]
    assert used_columns(targets[:, :20]).tolist() == [20, 20, 20]


def test_short_rows_go_many_at_a_time():
    targets = np.full((9, 128), -1)
    targets[range(9), [5, 9, 20, 25, 31, 60, 70, 127, 3]] = 1  # columns: 5 x 32, 64, 96, 128, 32
    rows = [(rows.start, rows.stop, int(columns)) for rows, columns in micro_batches(targets, 2)]
    assert rows == [(0, 5, 32), (5, 7, 96), (7, 9, 128)]
    whole = [(rows.start, rows.stop, int(columns)) for rows, columns in micro_batches(np.ones((7, 128), dtype=int), 3)]
    assert whole == [(0, 3, 128), (3, 6, 128), (6, 7, 128)]
    assert list(micro_batches(targets[:0], 2)) == []
