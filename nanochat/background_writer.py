"""
Writing in the background: a copy of the tensors, for which the caller waits, and a thread that
writes the copy, for which it does not.
"""

from concurrent.futures import ThreadPoolExecutor

import torch


class BackgroundWriter:
    """
    At most one thing is written at a time.

        copy = {name: writer.copy(name, tensor) for name, tensor in tensors.items()}
        writer.start(lambda: write(copy))
        ...
        writer.finish()    # or failure() now and then

    The copies stay in memory for the next time: pages that exist are written several times as fast
    as new ones. So wait for one writing to end before copying for the next.
    """

    def __init__(self):
        self._memory = {}     # name -> the last copy
        self._writing = None  # the Future of what was started and not yet seen to end

    def copy(self, name, tensor):
        """A copy of the tensor on the CPU, in the memory of the last copy of this name."""
        memory = self._memory.get(name)
        if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
            memory = torch.empty(tensor.shape, dtype=tensor.dtype)
            self._memory[name] = memory
        return memory.copy_(tensor.detach())

    def copied_bytes(self):
        """The memory that the copies take."""
        return sum(tensor.nbytes for tensor in self._memory.values())

    def start(self, write):
        """Call write() in a thread. It ends with its work, and the process does not end before."""
        assert self._writing is None, "the writing before is not done"
        executor = ThreadPoolExecutor(max_workers=1)
        self._writing = executor.submit(write)
        executor.shutdown(wait=False)

    def failure(self, wait=False):
        """
        The exception of what was started, once; None if there is none, or if it still runs. wait:
        until it ends.
        """
        if self._writing is None or not (wait or self._writing.done()):
            return None
        error = self._writing.exception()
        self._writing = None
        return error

    def finish(self):
        """Wait for what was started, and free the copies. Raises what it raised."""
        error = self.failure(wait=True)
        self._memory = {}
        if error is not None:
            raise error
