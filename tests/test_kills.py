"""Runs of all stages that are killed at any moment, again and again: they end with the losses of the unbroken run."""

import multiprocessing
import os
import random
import signal
import time

import pytest

from nanochat.checkpoint_folders import step_folder
from nanochat.checkpoint_manager import get_checkpoint_dir
from tests.stages import STAGES, curve, run_stage

KILLS = int(os.environ.get("KILLS", 3))  # of each stage
WAIT_S = 600  # on a busy machine
SETTINGS = dict(num_iterations=24, eval_every=8, save_every=1, keep_last=3)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="forks")]

# a process that has imported torch, and done nothing with it: runs are forked from it in a moment
FORKS = multiprocessing.get_context("forkserver" if os.name == "posix" else None)
FORKS.set_forkserver_preload(["tests.stages"])


def run(environment, stage, settings):
    os.environ.update(environment)
    run_stage(stage, **settings)


def start(stage, tag):
    """A run in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name.startswith("NANOCHAT")}
    settings = {**SETTINGS, "model_tag": tag, "auto_resume": True}
    process = FORKS.Process(target=run, args=(environment, stage, settings))
    process.start()
    return process


def num_logged(stage, tag):
    path = get_checkpoint_dir(stage, tag) / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("train/loss") if path.exists() else 0


def last_file(stage, tag, name):
    """The bytes of a file of the last checkpoint: names, shapes and every bit of its tensors."""
    folder = step_folder(get_checkpoint_dir(stage, tag), SETTINGS["num_iterations"])
    return (folder / name).read_bytes()


def wait_for_progress(process, stage, tag, logged):
    """Until the run has done more than `logged` steps, or has ended."""
    end = time.monotonic() + WAIT_S
    while process.is_alive() and num_logged(stage, tag) <= logged:
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_is_killed_again_and_again_has_the_losses_of_the_unbroken_one(stage, base_dir):
    rng = random.Random(stage)
    for source in list(STAGES)[: list(STAGES).index(stage)]:  # what a stage starts from, under both tags
        folder = get_checkpoint_dir(source, "d1")
        for tag in ("unbroken", "killed"):
            folder.with_name(tag).symlink_to(folder)
    unbroken = start(stage, "unbroken")
    unbroken.join(WAIT_S)
    assert unbroken.exitcode == 0

    num_kills = 0
    while num_kills < KILLS:
        process = start(stage, "killed")
        # somewhere in the next steps: in a step, a save, or an evaluation
        wait_for_progress(process, stage, "killed", num_logged(stage, "killed") if rng.random() < 0.7 else -1)
        time.sleep(rng.random() * 0.2)
        if not process.is_alive():
            assert process.exitcode == 0
            break
        process.kill()
        process.join()
        num_kills += 1
    last = start(stage, "killed")
    last.join(WAIT_S)
    assert last.exitcode == 0 and process.exitcode in (0, -signal.SIGKILL)
    print(f"{stage}: {num_kills} kills")
    assert curve(stage, "killed") == curve(stage, "unbroken")
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert last_file(stage, "killed", name) == last_file(stage, "unbroken", name), name
