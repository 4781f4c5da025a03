"""
What every stage needs: where files live, which device and rank this process is, how rank 0 speaks, the few
collectives, downloads, and the schedules. Importing this module does nothing; `compute_init` sets a process up.
"""

import os
import sys
from pathlib import Path

# -----------------------------------------------------------------------------
# Errors a user can cause, and how a script ends on one


class UserError(ValueError):
    """A wrong setting, file, row, checkpoint or environment: one line that names the thing, the value, what was
    needed, and a hint with a command that works. `run_script` prints it and exits 2, without a traceback."""

    def __init__(self, message, hint=None):
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")


def run_script(main):
    """Run a script's main(); a mistake of the user's ends in `error:` and `hint:` lines and exit code 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


# -----------------------------------------------------------------------------
# Places


def get_base_dir():
    """Where artifacts go: $NANOCHAT_BASE_DIR, default ~/.cache/nanochat. Created when missing."""
    base_dir = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    base_dir.mkdir(parents=True, exist_ok=True)
    return base_dir


def get_data_dir():
    """The local data mirror $NANOCHAT_DATA_DIR as a Path (shared layout: README.md), or None when unset."""
    data_dir = os.environ.get("NANOCHAT_DATA_DIR")
    if not data_dir:
        return None
    if not Path(data_dir).is_dir():
        raise UserError(f"NANOCHAT_DATA_DIR={data_dir} is not a folder", "unset it to use downloads, or point it at a mirror")
    return Path(data_dir)


# -----------------------------------------------------------------------------
# Ranks: torchrun sets RANK, LOCAL_RANK, WORLD_SIZE; without it this is rank 0 of 1


def get_dist_info():
    """(ddp_rank, ddp_local_rank, ddp_world_size) of this process."""
    return tuple(int(os.environ.get(name, default)) for name, default in
                 (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))


def print0(*args, **kwargs):
    """Print on rank 0 only."""
    if get_dist_info()[0] == 0:
        print(*args, **kwargs, flush=True)
