"""
Where the metrics of a run go: metrics.jsonl beside its checkpoints, wandb if the run has a name,
and the screen.
"""

import contextlib
import json
from pathlib import Path

from nanochat.common import UserError, get_dist_info, write_text

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
        if name in metrics:
            parts.append(text.format(metrics[name]))
    return " | ".join([*parts, f"eta: {eta_s / 60:.1f}m"])


def start_wandb(settings, run_id=None):
    """
    The wandb run that --run names, on rank 0; None without a name. run_id: of the run to go on
    with. Steps that it has already are ignored by wandb when they come again.
    """
    # "dummy" is the default: metrics.jsonl alone
    if settings["run"] in ("", "dummy") or get_dist_info()[0] != 0:
        return None
    # imported only here: it takes a second, and most runs do not use it
    try:
        import wandb
        # allow: go on with the run of that id, if there is one
        return wandb.init(
            project="nanochat",
            name=settings["run"],
            config=settings,
            id=run_id,
            resume="allow",
        )
    except Exception as error:  # no login, no network: its errors have no class in common
        raise UserError(
            f"wandb cannot begin the run --run={settings['run']}: {error}",
            "wandb login, or WANDB_MODE=offline, or leave --run at 'dummy'",
        ) from error


class MetricsLog:
    """
    metrics.jsonl, one JSON object a line, and the same to wandb if a run is given. Rank 0 writes.
    After a resume at `step`, lines that the resumed run will write again are dropped: those of
    later steps, and of the evaluation at that step, which comes after the checkpoint.
    """

    def __init__(self, path, wandb_run=None, step=0):
        self.path = Path(path)
        self._wandb = wandb_run
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
        metrics: {'step': int, name: number, ...}. On a full disk the line is lost, but the run goes
        on.
        """
        # flushed at once, so that a killed run leaves every line
        if self._file:
            try:
                self._file.write(json.dumps(metrics) + "\n")
                self._file.flush()
            except OSError as error:
                print(f"warning: {self.path} could not be written: {error}", flush=True)
        # wandb takes the step as an argument of its own
        if self._wandb:
            values = {name: value for name, value in metrics.items() if name != "step"}
            self._wandb.log(values, step=metrics["step"])

    def close(self):
        """Close the file and the run of wandb."""
        if self._file:
            with contextlib.suppress(OSError):  # a full disk again
                self._file.close()
        if self._wandb:
            self._wandb.finish()


def is_before(metrics, step):
    """Whether a line of the log was written before the checkpoint of `step`."""
    # a checkpoint is saved after the training line of its step and before its evaluation
    return metrics["step"] < step or (metrics["step"] == step > 0 and "train/loss" in metrics)
