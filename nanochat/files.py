"""
Errors that end a script, and the folders of all files. Nothing here needs torch, whose import takes
seconds and half a gigabyte: `scripts.watch` does without.
"""

import os
import signal
import sys
from pathlib import Path

# stage -> folder of its checkpoints, below the base directory
STAGE_DIRS = {
    "base": "base_checkpoints",
    "mid": "mid_checkpoints",
    "sft": "chatsft_checkpoints",
    "rl": "chatrl_checkpoints",
}

# -----------------------------------------------------------------------------
# Errors that a user can cause, and how a script ends on one


class UserError(ValueError):
    """
    A wrong setting, file, row, checkpoint or environment. The message is one line with the thing,
    the value and what was needed; the hint has a command that works. `run_script` prints both and
    exits 2, without a traceback.
    """

    def __init__(self, message, hint=None):
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")


AT_FAILURE = []  # functions of the error, which run_script calls if main() ends in one


def note_failure(main):
    """main(). An error that ends it is first told to AT_FAILURE."""
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        for function in AT_FAILURE:
            function(error)
        raise


def run_script(main):
    """
    Run a script's main(). A user's mistake, or a file that cannot be read or written, ends in
    `error:` and `hint:` lines and exit code 2.
    """
    try:
        note_failure(main)
    except UserError as error:
        exit_with(error)
    except BrokenPipeError:  # for example by `| head`
        discard(sys.stdout)  # else the flush at exit fails once more
        sys.exit(128 + signal.SIGPIPE)
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for a GPU's memory, and for a CPU's a plain RuntimeError
        out_of_memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not out_of_memory and "can't allocate memory" not in str(error):
            raise
        first_line = str(error).partition("\n")[0] or "nothing is left"
        exit_with(UserError(
            f"out of memory: {first_line}",
            "take less at once or a smaller model: --device_batch_size, --max_seq_len, --depth"))
    except OSError as error:
        exit_with(UserError(
            str(error), "check that the path is right and writable and the disk not full: df -h"))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def discard(stream):
    """From now on, let what is written to a stream, such as sys.stdout, go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def exit_with(error):
    """Print a UserError and end the process, exit code 2."""
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


# -----------------------------------------------------------------------------
# Folders


def get_base_dir():
    """Where artifacts go: $NANOCHAT_BASE_DIR, default ~/.cache/nanochat. Created when missing."""
    base_dir = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat")
    try:
        base_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"NANOCHAT_BASE_DIR={base_dir} cannot be a folder: {error.strerror}",
            "export NANOCHAT_BASE_DIR=~/nanochat_files",
        ) from error
    return base_dir


def get_data_dir():
    """The local data mirror $NANOCHAT_DATA_DIR as a Path, or None when unset."""
    data_dir = os.environ.get("NANOCHAT_DATA_DIR")
    if not data_dir:
        return None
    if not Path(data_dir).is_dir():
        raise UserError(f"NANOCHAT_DATA_DIR={data_dir} is not a folder",
                        "unset it, or point it at a data mirror")
    return Path(data_dir)


def get_data_root():
    """
    The folder of the chat stages' files: the local mirror if there is one, else the base directory.
    """
    return get_data_dir() or get_base_dir()


def write_text(path, text):
    """
    Write a whole file or none, even if the process or the machine stops in between: under a
    temporary name, then renamed. Makes the folder.
    """
    # on the disk before the rename
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
