"""
What a run writes about itself beside its metrics and checkpoints: run.json, and the errors of
ranks. run_status.py reads them.
"""

import contextlib
import json
import time
import traceback

from nanochat.common import UserError, write_text
from nanochat.run_facts import get_command


class RunFile:
    """
    run.json: how the run is ("running", "finished", "stopped" by a signal, or "failed"), the step
    where it ends, its command. Rank 0 writes it. A rank that fails writes its error to
    error_rank<n>.txt. A process that is killed can write neither.
    """

    def __init__(self, stage, iterations):
        self.folder = stage.manager.checkpoint_dir
        self.rank = stage.rank
        self.facts = {
            "started": time.time(),     # seconds since 1970
            "first_step": stage.step,   # more than 0 in a resumed run
            "iterations": iterations,   # the step at which the run ends
            "world_size": stage.world_size,
            "run": stage.settings["run"],
            "command": get_command(stage.world_size),
        }
        # errors of an earlier try
        if self.rank == 0:
            for path in self.folder.glob("error_rank*.txt"):
                path.unlink(missing_ok=True)
        self.write("running")

    def write(self, state):
        """Write run.json. On a full disk, the old one stays."""
        if self.rank == 0:
            text = json.dumps({"state": state, **self.facts}, indent=1)
            with contextlib.suppress(OSError):
                write_text(self.folder / "run.json", text)

    def note_failure(self, error):
        """Write the error of this rank, its first line a summary."""
        text = f"{type(error).__name__}: {error}"
        if not isinstance(error, UserError):
            text += "\n\n" + "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):
            write_text(self.folder / f"error_rank{self.rank}.txt", text)
        self.write("failed")
