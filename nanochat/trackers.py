"""
The tracker that a run with a name (--run=NAME) sends its numbers to, besides metrics.jsonl:
--tracker=wandb, trackio, tensorboard or mlflow. Each is imported only when it is asked for.

A tracker has an `id`, which the checkpoints keep, so that a resumed run goes on in the same place;
`log(numbers, step)`, where a step may come twice: a step's line and its evaluation's; `finish()`.
"""

from typing import Literal

from nanochat.common import UserError, get_base_dir, get_dist_info

PROJECT = "nanochat"  # under this name all of them file the runs
Tracker = Literal["wandb", "trackio", "tensorboard", "mlflow"]
# What to do if one cannot begin
HINTS = {
    "wandb": "wandb login, or WANDB_MODE=offline, or leave --run at 'dummy'",
    "trackio": "leave --run at 'dummy': metrics.jsonl has the same numbers",
    "tensorboard": "leave --run at 'dummy': metrics.jsonl has the same numbers",
    "mlflow": "MLFLOW_TRACKING_URI names another server, or leave --run at 'dummy'",
}


def start_tracker(settings, run_id=None, step=0):
    """
    The tracker that --tracker names for the run that --run names, on rank 0; None without a name.
    run_id: `id` of the tracker of the run to go on with, from `step` on. UserError if it cannot
    begin.
    """
    # "dummy" is the default: metrics.jsonl alone
    name = settings["tracker"]
    if settings["run"] in ("", "dummy"):
        if name != "wandb":
            raise UserError(f"--tracker={name} needs a name for the run", f"--run=NAME --tracker={name}")
        return None
    if get_dist_info()[0] != 0:
        return None
    try:
        return START[name](settings, run_id, step)
    except ModuleNotFoundError as error:
        raise UserError(f"--tracker={name}: the package {error.name} is not installed",
                        f"uv pip install {error.name}") from None
    except Exception as error:  # no login, no network: its errors have no class in common
        raise UserError(f"{name} cannot begin the run --run={settings['run']}: {error}",
                        HINTS[name]) from error


def start_wandb(settings, run_id, step):
    """A run of wandb. Steps that it has already are ignored by it when they come again."""
    import wandb
    # allow: go on with the run of that id, if there is one
    return wandb.init(
        project=PROJECT, name=settings["run"], config=settings, id=run_id, resume="allow")


class Trackio:
    """
    A run of trackio, in a file of this machine; `trackio show` opens its page. It is resumed by its
    name: of several runs with one name, the newest.
    """

    def __init__(self, settings, run_id, step):
        import trackio
        self._run = trackio.init(
            project=PROJECT, name=run_id or settings["run"], config=settings,
            resume="must" if run_id else "never")
        self.id = self._run.name

    def log(self, numbers, step):
        self._run.log(numbers, step=step)

    def finish(self):
        self._run.finish()


class TensorBoard:
    """Event files below the base directory; `tensorboard --logdir` shows them. id: their folder."""

    def __init__(self, settings, run_id, step):
        from torch.utils.tensorboard import SummaryWriter
        folder = get_base_dir() / "tensorboard"
        self.id = run_id or new_name(folder, settings["run"])
        # later steps, which come again, are not shown twice
        self._writer = SummaryWriter(folder / self.id, purge_step=step + 1 if run_id else None)
        self._writer.add_text("settings", "\n\n".join(f"{k}: {v}" for k, v in settings.items()))

    def log(self, numbers, step):
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def finish(self):
        self._writer.close()


class MLflow:
    """
    A run of mlflow: in a file of the working folder, or on the server $MLFLOW_TRACKING_URI. It keeps
    both values of a step that comes again.
    """

    def __init__(self, settings, run_id, step):
        import mlflow
        self._mlflow = mlflow
        mlflow.set_experiment(PROJECT)
        self.id = mlflow.start_run(run_id=run_id, run_name=settings["run"]).info.run_id
        if not run_id:  # parameters cannot be changed
            mlflow.log_params(settings)

    def log(self, numbers, step):
        # its names take no @; in a thread of its own, since a line may take a tenth of a second
        named = {name.replace("@", "_at_"): value for name, value in numbers.items()}
        self._mlflow.log_metrics(named, step, synchronous=False)

    def finish(self):
        self._mlflow.flush_async_logging()
        self._mlflow.end_run()


def new_name(folder, name):
    """`name`, or with the first number that makes it new among the files of a folder."""
    number = 1
    candidate = name
    while (folder / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


START = {
    "wandb": start_wandb,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
    "mlflow": MLflow,
}
