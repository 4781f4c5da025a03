"""The four training stages in this process, tiny, for the tests that run whole scripts; also a program (see below)."""

import json
import signal
import sys

import pytest
import torch

from nanochat import packing, run_keeper
from nanochat import stage as stage_module
from nanochat.checkpoint_manager import CheckpointManager, get_checkpoint_dir
from scripts import base_train, chat_rl, chat_sft, mid_train
from tasks.gsm8k import GSM8K
from tests.tiny import tiny_model

BASE = dict(depth=1, max_seq_len=64, total_batch_size=256, device_batch_size=2, eval_tokens=300, eval_every=2,
            num_iterations=4, device_type="cpu")
MID = dict(total_batch_size=256, num_iterations=4, eval_tokens=300, eval_every=2, spelling_size=20, spellingbee_size=20,
           device_batch_size=2, device_type="cpu")
SFT = dict(examples_per_step=4, num_iterations=4, eval_examples=4, eval_every=2, smoltalk_size=20, spelling_size=5,
           spellingbee_size=5, device_batch_size=2, device_type="cpu")
RL = dict(num_iterations=4, examples_per_step=2, num_samples=2, max_new_tokens=8, eval_every=2, eval_examples=4,
          device_batch_size=2, device_type="cpu")
STAGES = {"base": (base_train, BASE), "mid": (mid_train, MID), "sft": (chat_sft, SFT), "rl": (chat_rl, RL)}


def odd_length(task, conversation, completion):
    """A reward that a model without a right answer gets now and then: without one RL has nothing to learn from."""
    return float(len(completion) % 2)


def run_stage(stage, **settings):
    """main() of a stage with these settings; the script's own, and the signal handlers, are put back afterwards."""
    script, defaults = STAGES[stage]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(GSM8K, "reward", odd_length)
            # takes half a second a run, in 16 bits five
            patch.setattr(stage_module, "get_peak_flops", lambda device, dtype, width: (1e12, "not measured"))
            # 10 rows each, so that 4 steps of 4 rows go through several; the usual half a million tokens take long
            patch.setattr(packing, "BLOCK_TOKENS", 650)
            for name, value in (defaults | settings).items():
                patch.setattr(script, name, value)
            script.main()
    finally:  # a run that ends in an error leaves its own behind, which in a process of its own does not matter
        for number, handler in handlers.items():
            signal.signal(number, handler)


def small_stage(folder, step=0, state=None, **settings):
    """A Stage as `open_stage` makes it, of a tiny model."""
    settings = {"run": "dummy", "tracker": "wandb", "save_every": 5, "keep_last": -1, **settings}
    return stage_module.Stage(settings, torch.device("cpu"), rank=0, world_size=1, peak_flops=1e12,
                              manager=CheckpointManager(folder), step=step, state=state or {},
                              progress={"train_s": 0.0, "tokens": 0}, model=tiny_model())


def curve(stage, tag="d1"):
    """The numbers of a run that do not depend on the clock."""
    lines = (get_checkpoint_dir(stage, tag) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    other = ("dt_ms", "per_sec", "mfu", "time", "train_s", "memory", "samples")
    kept = []
    for line in lines:
        items = json.loads(line).items()
        kept.append({k: v for k, v in items if v is not None and not any(word in k for word in other)})
    return kept


if __name__ == "__main__":  # one rank of a run: python -m tests.stages rl '{"num_iterations": 2}'
    run_keeper.CHECK_RANKS_EVERY = 1
    run_stage(sys.argv[1], **json.loads(sys.argv[2]))
