"""
How far a long loop is, on stderr: a bar on a terminal, elsewhere a line now and then.

    for row in show_progress(rows, "scoring", "rows"):
        ...

The bar shows after BAR_AFTER_S seconds, and goes when the loop ends: what the loop found is printed
after it. In a file or a pipe there is a line every LINE_EVERY_S seconds, and one at the end of a
loop that has shown any. So a short loop shows nothing, and stdout keeps what scripts print. Only
rank 0 shows its loops, and only those of its main thread: a thread in the background (a loader, a
checkpoint that is written) would speak between the lines of the training steps.

TQDM_DISABLE=1 switches it off, as in other programs that use tqdm.
"""

import os
import sys
import threading

from tqdm import tqdm

from nanochat.common import get_dist_info

BAR_AFTER_S = 2
LINE_EVERY_S = 10


class Bar(tqdm):
    """tqdm without the thread that watches over its bars: some processes are forked later."""
    monitor_interval = 0


# tqdm's own lock also holds between processes, and on some systems starts one for itself
Bar.set_lock(threading.RLock())


class Lines:
    """
    A stream for tqdm that makes a line of each state of a bar, which tqdm would write over the
    state before.
    """

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        text = text.strip()
        if text:
            self.stream.write(f"{text}\n")

    def flush(self):
        self.stream.flush()


def is_shown():
    """Whether this thread of this process shows its progress."""
    rank, _, _ = get_dist_info()
    is_off = os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return rank == 0 and not is_off and threading.current_thread() is threading.main_thread()


def show_progress(items=None, what="", unit="", total=None, stream=None):
    """
    The items, to iterate over once. `what` says what is done, `unit` what is counted: "rows", or
    "B" for bytes. total: how many there are, if items has no length; without it neither a share nor
    the remaining time can be shown. stream: None = stderr.

    Without items it is a bar to be told by update(n), and to be used in a `with`.
    """
    stream = stream or sys.stderr
    settings = {
        "iterable": items,
        "desc": what,
        "total": total,
        "unit": unit if unit == "B" else f" {unit}",
        "unit_scale": unit == "B",
        "miniters": 1,  # look at the clock after each item: some take a minute
        "disable": not is_shown(),
    }
    if stream.isatty():
        return Bar(**settings, file=stream, delay=BAR_AFTER_S, mininterval=0.2, leave=False)
    return Bar(
        **settings,
        file=Lines(stream),
        delay=LINE_EVERY_S,
        mininterval=LINE_EVERY_S,
        ncols=0,     # the figures without a bar
        position=0,  # tqdm moves the cursor for a bar inside another one
    )
