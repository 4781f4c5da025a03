"""
The start of a training stage: it sets up the process, then begins a new run or resumes an old one.
"""

from dataclasses import dataclass

import torch

from nanochat.checkpoint_manager import CheckpointManager
from nanochat.common import UserError, compute_init, print0
from nanochat.device_speed import get_peak_flops
from nanochat.gpt import GPT
from nanochat.precision import (
    describe_precision,
    get_precision,
    get_precision_dtype,
    settle_precision,
)
from nanochat.tokenizer import RustBPETokenizer
from nanochat.training import NO_SCALING, make_scaler

# How long a run that resumes by itself waits for the run before it to save and end. A server of NFS
# gives the locks of a lost machine back after 90 s
CLAIM_WAIT_S = 150
# Settings that do not make another run; the precision is no flag, see open_stage
NOT_COMPARED = ("resume_from_step", "auto_resume", "verify", "precision")


@dataclass
class Stage:
    """A training stage: where it runs, and the model it starts from. `open_stage` makes it."""
    settings: dict
    # Where it runs
    device: torch.device
    rank: int
    world_size: int
    peak_flops: float | None             # of one device; None = not measured
    # The run
    manager: CheckpointManager           # of this stage's own checkpoints
    step: int                            # steps that are done
    state: dict                          # meta data of the checkpoint to resume; {} for a new run
    progress: dict                       # counters of the loop; saved with every checkpoint
    # The model in training; base_train makes that of a new run itself
    model: GPT | None = None
    tokenizer: RustBPETokenizer | None = None
    optimizers: tuple = ()
    scaler: torch.amp.GradScaler = NO_SCALING

    def load_optimizers(self, optimizers):
        """
        Take new optimizers, and load their saved state if the run is resumed. Returns the loss
        scaler, new or restored.
        """
        if self.state:
            self.manager.load_optimizers(optimizers, self.step)
        self.optimizers = optimizers
        self.scaler = make_scaler(self.device, self.state.get("scaler"))
        return self.scaler


def open_stage(
    settings,
    manager,
    source=None,
    fixed=(),
    progress=None,
    fp8=False,
    mfu=True,
    width=None,
    chosen=(),
):
    """
    Set this process up and load the model that the stage starts from: its own checkpoint if
    --resume_from_step asks for it, else the model of `source`, the CheckpointManager of an earlier
    stage.

    One run at a time may write to the manager's folder. One that resumes by itself waits for the
    run before it, whose processes may still be saving.

    fixed: settings that a resumed run cannot change. chosen: those that are None until the stage
    has chosen them; in a resumed run they get their saved values. progress: the loop's counters at
    the start of a new run. fp8: whether the stage can train in 8 bits. mfu: whether to find the
    device's peak FLOP/s. width: of the model that a new run without a source will make.
    """
    # Device, ranks
    rank, _, world_size, device = compute_init(settings["device_type"], settings["seed"])

    # A new run, or the state of the one to resume. Claimed first: the run before may still be saving
    manager.verify = settings["verify"]
    manager.claim(device, CLAIM_WAIT_S if settings["auto_resume"] else 0)
    step, state = resume_step(manager, settings, device, fixed, chosen)
    counted = {"train_s": 0.0, "tokens": 0}  # by the RunKeeper
    progress = {**counted, **(progress or {}), **state.get("progress", {})}
    stage = Stage(
        settings, device, rank, world_size,
        peak_flops=None,  # measured below
        manager=manager, step=step, state=state, progress=progress)

    # Model and tokenizer; a resumed run has them in its own checkpoint
    if state:
        load_source(stage, manager, step)
    elif source is not None:
        source.verify = settings["verify"]
        source_step, _ = source.load_meta(settings["model_step"])
        load_source(stage, source, source_step)
    if stage.model is not None:
        width = stage.model.config.n_embd

    # Precision. It joins the settings: a resumed run computes as it began
    saved = state.get("settings", {}).get("precision")
    measured = settle_precision(device, width, saved=saved)
    settings["precision"] = get_precision(device.type)
    described = describe_precision(device.type, fp8, measured)
    print0(f"device: {device} x {world_size} | precision: {described}")

    # For MFU. Now, because the thread of a loader would disturb a measurement
    if mfu:
        dtype = get_precision_dtype(device.type)
        stage.peak_flops, origin = get_peak_flops(device, dtype, width)
        print0(f"peak of one device: {stage.peak_flops:.3e} FLOP/s ({origin})")
    return stage


def load_source(stage, source, step):
    """Give the stage the model and tokenizer of a step of `source`, a CheckpointManager."""
    stage.tokenizer = source.load_tokenizer(step)
    stage.model = source.load_model(stage.device, step)
    folder = source.checkpoint_dir
    print0(f"model: {folder.parent.name}/{folder.name}, step {step} | "
           f"parameters: {stage.model.num_params():,}")


def resume_step(manager, settings, device, fixed=(), chosen=()):
    """
    (step, meta data) of the checkpoint to resume from; (0, {}) for a new run. Settings in `chosen`
    that are None get their saved values. Others that differ from the saved run's are printed. Those
    in `fixed` are refused, since another value would make it another run. Collective.
    """
    step = choose_step(manager, settings["resume_from_step"], settings["auto_resume"], device)
    if step is None:
        return 0, {}
    step, meta = manager.load_meta(step)
    if "settings" not in meta:
        raise UserError(f"step {step} in {manager.checkpoint_dir} holds a model alone and cannot "
                        "be resumed", "resume from another step, or start a new run")

    # Compare the settings
    for name in chosen:
        if settings[name] is None:
            settings[name] = meta["settings"].get(name)
    for name, saved in meta["settings"].items():
        now = settings.get(name)
        if name in NOT_COMPARED or now == saved:
            continue
        if name in fixed:
            raise UserError(
                f"--{name}={now}, but the run that is resumed has {saved}",
                f"resume with --{name}={saved}, or leave --resume_from_step and --auto_resume out "
                "for a new run")
        print0(f"note: --{name}={now} now, {saved} in the run that is resumed")
    return step, meta


def choose_step(manager, resume_from_step, auto_resume, device):
    """
    The step to resume from, or None for a new run. --resume_from_step: a step, -2 for the latest
    whole checkpoint, or -1 for a new run. --auto_resume: the latest whole one whose files are as
    they were saved, or a new run if there is no checkpoint. Collective.
    """
    if auto_resume:
        if resume_from_step != -1:
            raise UserError(
                f"--auto_resume=True and --resume_from_step={resume_from_step} contradict each other",
                "leave one of them out",
            )
        step = manager.find_intact_step(device)
        if step is not None:
            manager.wait_until_visible(step)
            print0(f"resuming step {step} of {manager.checkpoint_dir}")
        return step
    if resume_from_step == -1:
        return None
    if resume_from_step < -2:
        raise UserError(f"--resume_from_step={resume_from_step}: need a step, -2 for the latest "
                        "checkpoint, or -1 for a new run", "--resume_from_step=-2")
    if resume_from_step == -2:
        step, _ = manager.load_meta()
        return step
    return resume_from_step
