"""
What surrounds the loop of a training script: saving, stopping on a signal, logging, the report.
"""

import math
import signal
import sys
import time

import torch

from nanochat.common import (
    AT_FAILURE,
    UserError,
    compute_cleanup,
    get_data_root,
    is_finite,
    peak_memory_bytes,
    print0,
    synchronize,
)
from nanochat.distributed import all_reduce_sum, find_drift
from nanochat.metrics_log import STEP_KEYS, MetricsLog, step_line
from nanochat.report import get_report
from nanochat.run_file import RunFile
from nanochat.stop_signal import StopSignal
from nanochat.trackers import start_tracker
from nanochat.training import Ema, get_rates

CHECK_RANKS_EVERY = 100  # steps; a check reads all parameters once
GRACE_S = 30  # between a request to stop and a kill: torchrun's, Slurm's and Kubernetes' default


def read_examples():
    """
    Messages that a model of this data answers well, for the web page: the lines of the data's
    examples.txt. An empty list without such a file.
    """
    path = get_data_root() / "examples.txt"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip()]


class RunKeeper:
    """
    Made when all else is set up, so that a run that cannot start moves no checkpoints. It then
      - moves the checkpoints of an older run aside, in a resumed run those of later steps;
      - refuses to resume a run past its end;
      - warns if the data of a resumed run changed. `data` is a line that describes them.
    """

    def __init__(self, stage, iterations, data):
        # Facts of the run
        self.stage = stage
        self.iterations = iterations
        self.data = data
        self._flops_per_token = stage.model.estimate_flops()

        # State of the loop
        self.stopping = False     # True after a signal
        self._saved_step = stage.step if stage.state else -1  # the last checkpoint's
        self._knows_save_s = False  # whether the time that a save takes was looked at
        self._start = 0.0         # time.perf_counter() when this step began
        self._step_s = Ema(0.95)  # seconds; forgets the first step, which compiles
        self._smooth_loss = Ema(*stage.state.get("smooth_loss", ()))

        # First what may fail: wandb may lack a login
        self._tracker = start_tracker(stage.settings, self._tracker_id(), stage.step)

        # No checkpoint of another run stays among those of this one
        if stage.state:
            self._check_resumed()
            for folder in stage.manager.move_aside_after(stage.step):
                print0(f"note: the checkpoint of a later step is now {folder}")
        else:
            moved = stage.manager.move_aside()
            if moved:
                print0(f"note: the checkpoints of an earlier run are now in {moved}")

        # From here on signals are noted, metrics are written, and the folder says how the run is
        self._signal = StopSignal(stage.device)
        self.metrics_path = stage.manager.checkpoint_dir / "metrics.jsonl"
        self.metrics_log = MetricsLog(self.metrics_path, self._tracker, stage.step)
        self.run_file = RunFile(stage, iterations)
        AT_FAILURE[:] = [self.run_file.note_failure]

    def _tracker_id(self):
        """What the tracker called the run that is resumed; None if that had another tracker."""
        # older checkpoints have the id of wandb alone
        state = self.stage.state
        tracker_then = state.get("settings", {}).get("tracker", "wandb")
        if tracker_then != self.stage.settings["tracker"]:
            return None
        return state.get("tracker_id") or state.get("wandb_id")

    def _check_resumed(self):
        # The horizon may have been changed
        step = self.stage.step
        planned = self.stage.state.get("iterations", self.iterations)
        if step > self.iterations:
            raise UserError(
                f"the checkpoint is at step {step}, the run ends at {self.iterations}",
                f"--num_iterations={step + 1000} goes on, an earlier --resume_from_step goes back")

        if step == self.iterations:
            print0(f"note: step {step} is the end of the run: nothing is left to train")
        elif step >= planned:
            print0(f"note: the run had come to its end, step {planned}, with the learning rates of a "
                   f"run's end; with {self.iterations} steps they rise again")
        elif planned != self.iterations:
            print0(f"note: the run was to end at step {planned}, now at {self.iterations}: the "
                   "learning rates follow the new end")

        # The files may have changed
        data_then = self.stage.state.get("data", self.data)
        if data_then != self.data:
            print0("warning: the data is not what the run began with "
                   f"({self.data} now, {data_then} then): from here on it sees other rows, "
                   "some perhaps twice")

    # -- saving

    def save_if_due(self, step, eval_due, **state):
        """
        Save a checkpoint, with `state` in its meta data, if it is time. `stopping` is True if a
        signal asked the run to stop. At the end of the run, and before a stop, the checkpoint is on
        the disk when this returns, or a UserError is raised. Collective.
        """
        self._look_at_last_save()
        # The last step is saved anyway: a signal then changes nothing
        last = step == self.iterations
        self.stopping = self._signal.asked() and not last
        if self.save_due(step, eval_due):
            self.save(step, **state)
        if self.stopping or last:
            self.stage.manager.finish_saving(self.stage.device)

    def save_due(self, step, eval_due):
        """
        Whether to save now: every save_every steps, before every evaluation, at the end, and before
        a stop.
        """
        if step == 0 or step == self._saved_step:
            return False
        last = step == self.iterations
        return last or self.stopping or eval_due or is_due(step, self.stage.settings["save_every"])

    def save(self, step, **state):
        """
        Begin to save a checkpoint in the background, with `state` in its meta data. If writing
        fails, the run goes on with a warning, since space may be freed before the next one. A
        parameter that is not finite raises: the step that spoils it may have a finite loss.
        Collective.
        """
        # A checkpoint with NaN, or of ranks that differ, would only be noticed when it is loaded
        self.check_ranks(step)
        stage = self.stage
        if not all(is_finite(p) for p in stage.model.parameters()):
            raise self._diverged(f"parameters are not finite after step {step}")

        # A resumed run needs this besides parameters and optimizers
        meta = {
            "settings": stage.settings,
            "iterations": self.iterations,
            "data": self.data,
            "scaler": stage.scaler.state_dict() or None,
            "progress": stage.progress,
            "smooth_loss": self._smooth_loss.state(),
            "tracker_id": self._tracker.id if self._tracker else None,
            "examples": read_examples(),
            **state,
        }
        stage.manager.start_saving(
            step,
            stage.model,
            stage.optimizers,
            stage.tokenizer,
            meta,
            stage.settings["keep_last"],
        )
        self._saved_step = step

    def check_ranks(self, step):
        """
        End the run if the ranks no longer hold the same parameters and loss scale. Every rank gets
        each parameter from the one that updated it, so only a fault can part them. Collective.
        """
        scale = torch.tensor(self.stage.scaler.get_scale(), device=self.stage.device)
        drift = find_drift([*self.stage.model.named_parameters(), ("the loss scale", scale)])
        if drift:
            saved = f"step {self._saved_step}" if self._saved_step >= 0 else "the start"
            raise UserError(
                f"after step {step} {drift}; nothing since {saved} was saved",
                "go on with --resume_from_step=-2; if it happens again, test the memory, the GPU "
                "and the network of that rank's machine")

    def _look_at_last_save(self):
        """
        Warn if the last save has failed. After the first one: say what it cost, and warn if a stop
        by a signal may not leave enough time for one.
        """
        manager = self.stage.manager
        manager.warn_of_failure()
        if self._knows_save_s or manager.save_s is None:
            return
        self._knows_save_s = True
        copied_mb = manager.copied_bytes() / 1e6
        print(f"a checkpoint takes {manager.save_s:.1f} s to write, in the background, and "
              f"{copied_mb:,.0f} MB of memory for the copy", flush=True)
        # a signal may come when a save has just begun: that one has to end before the last one
        if 2 * manager.save_s > GRACE_S:
            print(f"warning: torchrun, Slurm and Kubernetes kill a run {GRACE_S} s after they ask "
                  f"it to stop, and to save may take {2 * manager.save_s:.0f} s: the steps since "
                  "the last checkpoint may be lost; dev/cluster/README.md says how to get more "
                  "time", flush=True)

    def check_finite(self, loss, step, place):
        """
        The loss, summed over ranks, as a float. If it is not finite the run ends. `place` is the
        position of its rows in the data.
        """
        loss = all_reduce_sum(loss).item()
        if not math.isfinite(loss):
            raise self._diverged(f"the loss at step {step} is {loss}; its rows are from {place}")
        return loss

    def _diverged(self, what):
        """
        The UserError for a loss or parameters that are not finite. It names the last good
        checkpoint.
        """
        # There may be no checkpoint yet, or one on its way
        manager = self.stage.manager
        manager.warn_of_failure(wait=True)
        saved = manager.last_step()
        last = "nor is there an earlier checkpoint"
        way_on = "start again with a smaller --matrix_lr"
        if saved is not None:
            last = f"the last good checkpoint is step {saved} in {manager.checkpoint_dir}"
            way_on = "resume with --resume_from_step=-2 and a smaller --matrix_lr"
        return UserError(f"{what}; nothing of this step was saved, {last}",
                         f"{way_on}, or check that part of the data")

    # -- the log

    def log_evaluation(self, step, metrics):
        """Print and log the results {name: number} of an evaluation at `step`."""
        so_far = self._so_far()
        # metric names have a slash, for wandb's panels
        parts = [f"step: {step:05d}"]
        for name, value in metrics.items():
            parts.append(f"{name.replace('/', ' ')}: {value:.6f}")
        print0(" | ".join([*parts, f"train time: {so_far['train_s'] / 60:.2f}m"]))
        self.metrics_log.log({"step": step, **so_far, **metrics})

    def log_samples(self, step, samples):
        """Print and log texts [{prompt, text}] that the model has written at `step`."""
        for sample in samples:
            print0(f"sample: {sample['text']!r}")
        self.metrics_log.log({"step": step, "time": time.time(), "samples": samples})

    def _so_far(self):
        """What has been spent: the time, and sums over the steps."""
        tokens = self.stage.progress["tokens"]
        return {
            "time": time.time(),
            "train_s": self.stage.progress["train_s"],
            "tokens": tokens,
            "flops": self._flops_per_token * tokens,
        }

    def start_step(self):
        """Start the clock of a step. Returns time.perf_counter()."""
        # work that is still queued on a GPU is not this step's
        synchronize(self.stage.device)
        self._start = time.perf_counter()
        return self._start

    def finish_step(self, step, loss, tokens, lr_factor, grad_norm, **more):
        """
        Count, log and print an optimizer step. `step` includes it. tokens: those that all ranks
        trained on. more: further metrics of this stage, with names of STEP_KEYS. Returns the seconds
        that the step took.
        """
        # The step ends when the device has done it
        stage = self.stage
        synchronize(stage.device)
        if is_due(step, CHECK_RANKS_EVERY):
            self.check_ranks(step)
        dt_s = time.perf_counter() - self._start
        stage.progress["train_s"] += dt_s
        stage.progress["tokens"] += tokens

        # Everything to the file, the main figures to the screen
        metrics = dict.fromkeys(STEP_KEYS)
        metrics |= {
            "step": step,
            **self._so_far(),
            "train/loss": loss,
            "smooth_loss": self._smooth_loss.update(loss),
            "lrm": lr_factor,
            **get_rates(stage.optimizers),
            "grad_norm": grad_norm,
            "dt_ms": 1000 * dt_s,
            "tok_per_sec": tokens / dt_s,
            "memory_bytes": peak_memory_bytes(stage.device),
            **more,
        }
        if stage.peak_flops is not None:
            flops_per_s = self._flops_per_token * tokens / dt_s
            metrics["mfu"] = flops_per_s / (stage.peak_flops * stage.world_size)
        assert len(metrics) == len(STEP_KEYS), metrics.keys() - STEP_KEYS
        self.metrics_log.log(metrics)
        eta_s = self._step_s.update(dt_s) * (self.iterations - step)
        print0(step_line(metrics, self.iterations, eta_s))
        return dt_s

    # -- the end

    def finish(self, section, facts):
        """
        End a script: write its section of the report, leave the process group, close the log. Exits
        if a signal stopped the run.
        """
        # The facts that every stage has
        train_s = self.stage.progress["train_s"]
        memory_mib = peak_memory_bytes(self.stage.device) / 2**20
        print0(f"peak memory: {memory_mib:,.0f} MiB | train time: {train_s / 60:.2f}m")
        get_report().log(section, {
            "config": self.stage.settings,
            "curves": str(self.metrics_path),
            **facts,
            "training minutes": train_s / 60,
            "peak memory MiB": memory_mib,
        })

        # All ranks leave together, then rank 0 may still write
        compute_cleanup()
        self.close()

    def close(self):
        """
        Close the log. After a stop by a signal, print how to go on, and exit as if the signal had
        ended the process (128 + its number). So a shell script with further stages stops, too.
        """
        self.metrics_log.close()
        self._signal.restore()
        self.run_file.write("stopped" if self.stopping else "finished")
        AT_FAILURE.clear()
        if not self.stopping:
            return

        # Stopped by a signal: how to go on
        step = self.stage.manager.last_step()
        if step is not None:
            print0(f"stopped at step {step}; go on with --resume_from_step={step}")
        else:
            print0("stopped before the first step: nothing to save")
        sys.exit(128 + (self._signal.received or signal.SIGTERM))


def is_due(step, every):
    """Whether `step` is a multiple of `every`; never if that is <= 0."""
    return every > 0 and step % every == 0


def attempt(what, function):
    """function(), or None with a warning if it fails: an evaluation must never end the run."""
    try:
        return function()
    except Exception as error:  # of any kind
        print(f"warning: {what} failed and is skipped: {type(error).__name__}: {error}", flush=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None
