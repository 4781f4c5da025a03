"""
Locks between processes, on a file: one run writes to a folder, one process downloads a file. The
system gives a lock back when its process ends, whatever ends it.
"""

import errno
import os
from contextlib import nullcontext
from pathlib import Path

from filelock import FileLock

# What file systems without locks answer, besides ENOSYS, which filelock knows: NFS without its lock
# service, some FUSE mounts
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)


def hold_lock(path: Path, wait_s: float = -1, once_per_process: bool = False):
    """
    A context in which no other process holds the lock file `path`; it also ends when the returned
    object does. Makes the folder. Waits for the lock, at most wait_s seconds if that is not
    negative; then filelock.Timeout. once_per_process: the same process may take it again.

    Where the file system has no locks, goes on without one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=once_per_process)
    try:
        return lock.acquire(timeout=wait_s)
    except NotImplementedError:
        return nullcontext()
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return nullcontext()


def is_locked(path: Path):
    """
    Whether another process holds the lock file `path`: looks, without taking it for longer than
    that. True also where it cannot be told: on Windows, or a file system without locks.
    """
    try:
        import fcntl  # POSIX only
    except ImportError:
        return True
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(descriptor)  # which gives it back
