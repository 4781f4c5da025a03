"""
Where the metrics of a run go: metrics.jsonl beside its checkpoints, a tracker if the run has a
name (trackers.py), and the screen.
"""

import contextlib
import json
import math
from pathlib import Path

from nanochat.common import get_dist_info, write_text

# The keys of metrics.jsonl. A line of a step has all of these, in every stage. A value is null
# where the stage has no such number, or where it is not finite
STEP_KEYS = {
    "step": "optimizer steps done, this one included",
    "time": "when the step was done: seconds since 1970",
    "train_s": "seconds of all steps so far, without evaluations and saves",
    "tokens": "tokens of this stage that the model was trained on so far, over all ranks",
    "flops": "FLOPs of training on them: those of a token, in a row of full length, times tokens",
    "epoch": "passes over the data that are done",
    # the loss
    "train/loss": "of the step, before the update: nats per target token (RL: times advantage)",
    "smooth_loss": "its moving average over about the last 10 steps",
    "num_targets": "tokens of the step that have a loss",
    # the optimizers
    "lrm": "factor on all learning rates",
    "lr/embedding": "learning rate of the token embedding (Adam)",
    "lr/unembedding": "learning rate of the output head (Adam)",
    "lr/value": "learning rate of the value embeddings (Adam)",
    "lr/matrix": "learning rate of the matrices of the blocks (Muon)",
    "grad_norm": "norm of the gradient of the step, over all parameters",
    # speed and memory
    "dt_ms": "milliseconds of the step",
    "tok_per_sec": "tokens of the step per second, over all ranks",
    "mfu": "FLOPs of the step per second, as a fraction of what the devices can do",
    "memory_bytes": "most memory that rank 0 has taken so far",
    # reinforcement learning
    "reward": "mean over the answers of the step, 0 to 1",
    "kl": "KL divergence to the model at the start: nats per token",
    "entropy": "of the sampled tokens: nats per token",
    "answer_tokens": "mean length of the answers",
    "useful": "fraction of the answers whose question was answered both right and wrong",
    "rollouts_per_sec": "answers sampled per second",
}
# A line of an evaluation has step, time, train_s, tokens and flops, and some of these
EVALUATION_KEYS = {
    "val/bpb": "bits per byte of held-out text",
    "val/bpb_stderr": "its standard error, over documents",
    "val/loss": "nats per target token of held-out conversations",
    "pass@k": "fraction of held-out questions with a right answer among k",
    "stderr": "standard error of pass@1",
}
# A line of samples has step, time and this
SAMPLE_KEYS = {
    "samples": "[{prompt, text}], what the model wrote",
}

# The metrics in a step's line on the screen, in this order; no stage has all of them
SHOWN = {
    "train/loss": "loss: {:.5f}",
    "reward": "reward: {:.4f}",
    "kl": "kl: {:.4f}",
    "entropy": "entropy: {:.4f}",
    "answer_tokens": "tokens: {:.1f}",
    "lrm": "lrm: {:.3f}",
    "dt_ms": "dt: {:.0f}ms",
    "tok_per_sec": "tok/s: {:,.0f}",
    "rollouts_per_sec": "rollouts/s: {:.1f}",
    "mfu": "mfu: {:.1%}",
}


def step_line(metrics, iterations, eta_s):
    """The line of one training step, `key: value` joined by |."""
    # progress comes first, the remaining time last
    step = metrics["step"]
    parts = [f"step: {step:05d}/{iterations:05d} ({step / iterations:.1%})"]
    for name, text in SHOWN.items():
        if metrics.get(name) is not None:
            parts.append(text.format(metrics[name]))
    return " | ".join([*parts, f"eta: {eta_s / 60:.1f}m"])


class MetricsLog:
    """
    metrics.jsonl, one JSON object a line, and its numbers to a tracker if there is one. Rank 0
    writes.

    After a resume at `step`, lines that the resumed run will write again are dropped: those of
    later steps, and of the evaluation at that step, which comes after the checkpoint.
    """

    def __init__(self, path, tracker=None, step=0):
        self.path = Path(path)
        self._tracker = tracker
        self._file = None

        # Rewrite the file with the lines before the checkpoint, then append
        if get_dist_info()[0] == 0:
            kept = ""
            for metrics in self._read():
                if is_before(metrics, step):
                    kept += json.dumps(metrics) + "\n"
            write_text(self.path, kept)
            self._file = open(self.path, "a", encoding="utf-8")

    def _read(self):
        """The metrics of the run so far, without lines that a crash cut short."""
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            # ValueError: not JSON
            with contextlib.suppress(ValueError):
                metrics = json.loads(line)
                if isinstance(metrics, dict) and isinstance(metrics.get("step"), int):
                    yield metrics

    def log(self, metrics):
        """
        metrics: {'step': int, name: number, ...}. A number that is not finite becomes null. On a
        full disk the line is lost, but the run goes on.
        """
        # JSON has no NaN
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isfinite(value):
                metrics = {**metrics, name: None}
        # flushed at once, so that a killed run leaves every line
        if self._file:
            try:
                self._file.write(json.dumps(metrics) + "\n")
                self._file.flush()
            except OSError as error:
                print(f"warning: {self.path} could not be written: {error}", flush=True)
        if self._tracker:
            self._track(metrics)

    def _track(self, metrics):
        """Send the numbers to the tracker. If it fails, the run goes on without it."""
        # it takes the step as an argument of its own, and notes the time itself
        numbers = {}
        for name, value in metrics.items():
            if isinstance(value, int | float) and name not in ("step", "time"):
                numbers[name] = value
        if not numbers:
            return
        try:
            self._tracker.log(numbers, step=metrics["step"])
        except Exception as error:  # a server that is gone, a full disk
            print(f"warning: the tracker failed and gets no more numbers, {self.path.name} has them "
                  f"all: {type(error).__name__}: {error}", flush=True)
            self._tracker = None

    def close(self):
        """Close the file and the run of the tracker."""
        if self._file:
            with contextlib.suppress(OSError):  # a full disk again
                self._file.close()
        if self._tracker:
            self._tracker.finish()


def is_before(metrics, step):
    """Whether a line of the log was written before the checkpoint of `step`."""
    # a checkpoint is saved after the training line of its step and before its evaluation
    return metrics["step"] < step or (metrics["step"] == step > 0 and "train/loss" in metrics)
