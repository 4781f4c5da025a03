"""
What asks a training loop to save and end: signals, and the end of torchrun or of the output's reader.
"""

import os
import signal
import sys

import torch

from nanochat.common import discard
from nanochat.distributed import all_reduce_sum


class StopSignal:
    """
    SIGTERM, SIGINT (Ctrl-C), SIGHUP (a lost connection) and SIGUSR1 (Slurm's warning) ask the loop
    to save and end. So does the end of torchrun, if that was killed and could not pass a signal on,
    and the end of who reads the output. A second SIGINT interrupts at once. `received` is the
    number of the first signal, or 0.
    """

    def __init__(self, device):
        self.received = 0
        self._device = device
        # Only torchrun's processes end with their parent: nohup's and a shell's outlive theirs
        self._parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        # A background job of a shell script starts with SIGINT ignored: here it is not. SIGHUP
        # stays ignored under nohup, whose purpose that is. Windows has neither SIGHUP nor SIGUSR1.
        numbers = [signal.SIGTERM, signal.SIGINT]
        if hasattr(signal, "SIGUSR1"):
            numbers.append(signal.SIGUSR1)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._receive) for number in numbers}
        self._stdout = sys.stdout
        sys.stdout = Output(sys.stdout, self._lose_reader)

    def _lose_reader(self):
        self.received = self.received or getattr(signal, "SIGPIPE", signal.SIGTERM)

    def _receive(self, number, frame):
        # the first signal only sets a flag, which the loop reads between steps
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def asked(self):
        """
        Whether any rank received a signal or lost its torchrun. Collective, so that all ranks leave
        the loop at the same step.
        """
        # a process whose parent ends gets another one
        if self._parent is not None and os.getppid() != self._parent and not self.received:
            self.received = signal.SIGTERM
            print("warning: torchrun is gone: saving, then ending", flush=True)
        # one flag per rank
        received = torch.tensor(float(self.received > 0), device=self._device)
        return all_reduce_sum(received).item() > 0

    def restore(self):
        """Give the signals back to their earlier handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        sys.stdout = self._stdout


class Output:
    """
    A stream whose reader may end before us: Ctrl-C reaches both sides of `| tee log`. What is
    written from then on goes nowhere, and on_loss() is called.
    """

    def __init__(self, stream, on_loss):
        self._stream = stream
        self._on_loss = on_loss

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._try(self._stream.write, text)
        return len(text)

    def flush(self):
        self._try(self._stream.flush)

    def _try(self, function, *args):
        try:
            function(*args)
        except BrokenPipeError:
            discard(self._stream)
            self._on_loss()
