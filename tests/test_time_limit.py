"""Runs that end on time: how many steps fit, on machines of all moods, and `base_train --minutes` itself."""

import time

import pytest

from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from nanochat.common import UserError
from nanochat.scaling_law import ModelSize, ScalingLaw, best_depth
from nanochat.time_limit import MIN_TIMED, TimeLimit, choose_crop, choose_evaluations, choose_sizes
from nanochat.training import lr_multiplier
from scripts import base_train
from tests.stages import curve, run_stage

BATCH_TOKENS = 4096


def simulate(step_s, guess, minutes=20, eval_s=10.0, resume_at=None):
    """
    The loop of base_train on a machine where step i takes step_s(i) seconds and an evaluation eval_s. Returns (minutes
    that the run took, number of steps, learning rate factor of each step).
    """
    now = [0.0]
    limit = TimeLimit(minutes, start=0.0, clock=lambda: now[0])
    rates, step, iterations = [], 0, guess
    # as many tokens as an evaluation of that time has
    eval_tokens = 2 * BATCH_TOKENS * eval_s / step_s(1)
    eval_every = guess // 2
    while True:
        if step == resume_at:  # a new process, which has to time its own steps
            limit = TimeLimit(minutes, start=0.0, clock=lambda: now[0])
            resume_at = None
        if limit.decision_due(step, iterations):
            iterations = limit.decide(step, BATCH_TOKENS, eval_tokens, eval_every)
        last = step == iterations
        if last or step % eval_every == 0:
            now[0] += eval_s
        if last:
            return now[0] / 60, step, rates
        rates.append(lr_multiplier(step, iterations, 10, 0.5))
        now[0] += step_s(step)
        limit.add_step(step_s(step))
        step += 1


@pytest.mark.parametrize("guess", [60, 1000, 20000])
@pytest.mark.parametrize("mood, late", [
    (lambda step: 1.2, 0.0),                           # steady
    (lambda step: 60.0 if step == 0 else 1.2, 0.0),    # compiles
    (lambda step: 1.2 if step < 500 else 2.4, 0.01),   # other work begins
    (lambda step: 2.4 if step < 300 else 1.2, 0.0),    # other work ends
    (lambda step: 300.0 if step == 400 else 1.2, 0.0),  # a long pause
], ids=["steady", "compiles", "busier", "idler", "pause"])
def test_a_run_ends_on_time_with_a_learning_rate_of_0(guess, mood, late):
    taken, _, rates = simulate(mood, guess)
    assert 19.2 < taken < 20 * (1 + late)
    assert rates[-1] == pytest.approx(0, abs=0.02) and max(rates) == 1


def test_on_a_steady_machine_the_learning_rate_falls_without_jumps():
    _, steps, rates = simulate(lambda step: 1.2, 1000)
    later = rates[-steps // 3:]
    changes = [after - before for before, after in zip(later, later[1:], strict=False)]
    assert -0.01 < min(changes) < 0 and max(changes) < 0.01


def test_a_resumed_run_goes_on_with_the_time_that_is_left():
    taken, _, rates = simulate(lambda step: 1.2, 1000, resume_at=500)
    assert 19.2 < taken < 20 and rates[-1] < 0.02


def test_a_machine_that_slept_past_the_end_still_lets_the_learning_rate_fall():
    taken, steps, rates = simulate(lambda step: 5000.0 if step == 400 else 1.2, 1000)
    assert taken > 20 and 401 + 8 <= steps < 401 + 16
    assert rates[-1] < 0.02 and rates[400] == 1


def test_decisions_come_at_fixed_steps_and_not_just_before_the_end():
    limit = TimeLimit(20, start=0.0)
    assert not limit.decision_due(0, 5000)
    for _ in range(MIN_TIMED):
        limit.add_step(1.0)
    steps = [step for step in range(1, 5000) if limit.decision_due(step, 5000)]
    assert steps[:3] == [1, 2, 3] and 512 in steps and 528 in steps and 513 not in steps
    gaps = [later / step - 1 for step, later in zip(steps, steps[1:], strict=False) if step >= 32]
    assert max(gaps) <= 1 / 32
    assert limit.decision_due(512, 529) and not limit.decision_due(512, 528)


def test_the_law_at_work():
    law = ScalingLaw(E=1.0, A=100.0, alpha=0.5, B=1000.0, beta=0.5)
    assert law.loss(1e4, 1e6) == pytest.approx(1 + 1 + 1)
    depths = [best_depth(flops, 4096, 512, law) for flops in (1e13, 1e15, 1e17, 1e19)]
    assert depths == sorted(depths) and depths[0] < depths[-1]
    # the neighbours of the best depth are worse
    def predict(depth):
        size = ModelSize.from_depth(depth, 4096, 512)
        return law.loss(size.num_matrix_params, 1e17 / size.flops_per_token)
    assert predict(depths[2]) <= min(predict(depths[2] - 1), predict(depths[2] + 1))


def test_the_size_of_a_depth_is_that_of_the_model():
    size = ModelSize.from_depth(20, 65536, 2048)
    assert size.num_params == 560_988_160  # d20 of the README
    assert size.num_params - size.num_matrix_params == 65536 * 1280
    assert size.num_block_params == 20 * 12 * 1280**2
    assert size.flops_per_token == 6 * size.num_matrix_params + 12 * 20 * 1280 * 2048


@pytest.mark.parametrize("depth, expected", [(2, 512), (4, 1024), (12, 2048)])
def test_a_small_model_has_a_context_that_it_can_afford(depth, expected):
    """However many tokens a step has: attention over more would cost more than half of the matrices."""
    assert choose_sizes(1e17, 4096, depth=depth) == {"depth": depth, "max_seq_len": expected}


def test_sizes_grow_with_the_time_and_what_is_given_stays():
    small, large = (choose_sizes(flops, 4096) for flops in (1e13, 1e19))
    assert small["depth"] < large["depth"] and small["max_seq_len"] == 512 and large["max_seq_len"] == 2048
    assert choose_sizes(1e13, 4096, depth=7, sequence_len=96) == {"depth": 7, "max_seq_len": 96}
    assert choose_sizes(1e13, 4096, sequence_len=96)["max_seq_len"] == 96
    assert choose_evaluations(1000, 4096) == {"eval_every": 500, "eval_tokens": 163840}
    assert choose_evaluations(10**6, 2**19)["eval_tokens"] == 10485760


def test_long_documents_are_cropped_where_that_is_text_enough():
    """11,155 documents, T = 512: two rows of each are 11.4M tokens."""
    assert choose_crop(11_000_000, 11_155, 512) == {"crop": True}
    assert choose_crop(12_000_000, 11_155, 512) == {"crop": False}
    assert choose_crop(1_000_000, 3, 512) == {"crop": False}  # three books


# -----------------------------------------------------------------------------
# The script

MINUTES = dict(minutes=0.2, depth=None, max_seq_len=None, eval_every=None, eval_tokens=None, num_iterations=-1,
               total_batch_size=512, device_batch_size=-1)


@pytest.fixture
def short(base_dir, monkeypatch):
    """All sizes are open but the batch: with 20 steps at least, larger ones would take a busy machine too long."""
    monkeypatch.setattr("nanochat.time_limit.GUESSED_EFFICIENCY", 0.02)
    return MINUTES


@pytest.mark.slow
def test_a_run_of_some_seconds_ends_on_time_and_is_saved_as_chosen(short, capsys):
    start = time.monotonic()
    run_stage("base", **short)
    taken = time.monotonic() - start
    assert 9 < taken < 18  # of 12; the evaluation and the samples at the end may meet a busy moment
    steps = [line for line in curve("base", "minutes0.2") if "grad_norm" in line]
    assert steps[-1]["lrm"] < 0.2 and len(steps) > 10
    step, meta = CheckpointManager(get_checkpoint_dir("base", "minutes0.2")).load_meta()
    assert step == len(steps) == meta["iterations"]
    settings, config = meta["settings"], meta["model_config"]
    assert settings["depth"] == config["n_layer"] and settings["max_seq_len"] == config["sequence_len"]
    assert settings["eval_tokens"] >= meta["batch_tokens"] and settings["eval_every"] > 1
    out = capsys.readouterr().out
    assert "(from --minutes)" in out and "of 0.2 minutes" in out


@pytest.mark.slow
def test_a_broken_run_goes_on_with_its_size_and_its_time(short, monkeypatch):
    """Half of the time is over when it breaks; the size would be chosen otherwise now."""
    run_stage("base", **short, save_every=10, keep_last=-1)
    manager = CheckpointManager(get_checkpoint_dir("base", "minutes0.2"))
    steps = manager.steps()
    middle = next(step for step in steps if manager.load_meta(step)[1]["progress"]["spent_s"] > 6)
    _, before = manager.load_meta(middle)
    unbroken = curve("base", "minutes0.2")
    monkeypatch.setattr("scripts.base_train.choose_sizes", None)
    start = time.monotonic()
    run_stage("base", **short, resume_from_step=middle)
    assert time.monotonic() - start < 11
    _, meta = manager.load_meta()
    for name in ("crop", "depth", "max_seq_len", "eval_tokens", "eval_every"):
        assert meta["settings"][name] == before["settings"][name]
    assert meta["batch_tokens"] == before["batch_tokens"] and meta["progress"]["spent_s"] > 9
    resumed = curve("base", "minutes0.2")
    assert resumed[: middle] == unbroken[: middle]
    assert [row for row in resumed if "val/bpb" in row][-1]["val/bpb"] > 0


def test_where_decisions_do_not_differ_a_resumed_run_repeats_exactly(base_dir, monkeypatch):
    monkeypatch.setattr("scripts.base_train.TimeLimit.decide", lambda self, step, *_: max(28, step + 1))
    monkeypatch.setattr("scripts.base_train.choose_horizon", lambda stage, flops: (
        stage.state.get("iterations", 24), 256, "--minutes"))
    settings = MINUTES | dict(minutes=5.0, depth=1, max_seq_len=64, total_batch_size=256, eval_tokens=300, eval_every=8,
                              keep_last=-1)
    run_stage("base", **settings, model_tag="whole")
    whole = curve("base", "whole")
    last_step = [row for row in whole if "lrm" in row][-1]
    assert last_step["step"] == 28 and last_step["lrm"] == pytest.approx(1 / 14)
    run_stage("base", **settings, model_tag="whole", resume_from_step=16)
    assert curve("base", "whole") == whole


@pytest.mark.parametrize("settings, message", [
    (dict(num_iterations=100), "--minutes=0.2 and --num_iterations=100 contradict each other"),
    (dict(target_flops=1e12), r"--minutes=0.2 and --target_flops=1e\+12 contradict"),
    (dict(minutes=0.0), "--minutes=0: nothing of it is left after a start of"),
    (dict(minutes=-1.0), "minutes=-1.0: need 0 or more"),
])
def test_a_wrong_setting_is_named(settings, message, short):
    with pytest.raises(UserError, match=message):
        run_stage("base", **(short | settings))
    assert not get_checkpoint_dir("base", "minutes0.2").exists()


def test_without_minutes_the_defaults_are_the_published_ones():
    assert base_train.DEFAULTS == {
        "crop": False, "depth": 20, "max_seq_len": 2048, "eval_every": 250, "eval_tokens": 10485760}
    assert base_train.minutes is None and base_train.choose_tag() == "d20"
