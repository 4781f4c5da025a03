"""
The thread of one device: it steps the schedulers of all models there, so that an event loop never
waits for a model. It also limits how many requests wait, all in all and of one client.
"""

import ctypes
import threading
import time
from collections import Counter

from nanochat.scheduler import ShuttingDown

IDLE_S = 5  # seconds without work after which memory is given back


class QueueFull(Exception):
    """Requests are refused: too many are waiting, or the server is stopping."""


class Batcher(threading.Thread):
    """
    The thread that decodes for all models of one device. It calls `load()`, which returns {name:
    Scheduler}, and `deliver(events)` with lists of events. Any thread may call `submit` and `stop`.

    At most max_waiting requests wait. A client may have as many of them as there are free places
    left: half of all when it is alone, a third when another has as many, and so on. So there is
    always a place for somebody new (the dynamic threshold of Choudhury and Hahne, 1998).
    """

    def __init__(self, load, deliver, max_waiting, idle_s=IDLE_S):
        super().__init__(name="batcher", daemon=True)
        self.load = load
        self.deliver = deliver
        self.max_waiting = max_waiting
        self.idle_s = idle_s
        self.schedulers = {}
        self.inbox = []              # [(model name, request)] that no scheduler has yet
        self.waiting_of = Counter()  # client -> its requests that wait, as of the last step
        self.loaded = threading.Event()
        self.error = None            # why loading failed
        self.deadline = None         # set by `stop`: work goes on until then
        self._changed = threading.Condition()

    @property
    def num_running(self):
        return sum(len(scheduler.running) for scheduler in self.schedulers.values())

    @property
    def num_waiting(self):
        return self.waiting_of.total()

    @property
    def num_rows(self):
        return sum(scheduler.num_rows for scheduler in self.schedulers.values())

    @property
    def most_at_once(self):
        """How many requests can be submitted together when nobody waits."""
        return max(1, self.max_waiting // 2)

    def submit(self, name, requests):
        """Queue requests of one client for a model, all or none. Raises QueueFull."""
        client = requests[0].client
        with self._changed:
            if self.deadline is not None:
                raise QueueFull
            num_free = self.max_waiting - self.num_waiting - len(requests)
            num_own = self.waiting_of[client] + len(requests)
            # the last place is for anybody who has none
            if num_free < 0 or num_own > max(1, num_free):
                raise QueueFull
            self.waiting_of[client] = num_own
            self.inbox.extend((name, request) for request in requests)
            self._changed.notify()

    def stop(self, grace_s):
        """
        Go on for at most grace_s seconds with the requests there are, then end. Does not wait.
        """
        with self._changed:
            self.deadline = time.monotonic() + grace_s
            self._changed.notify()

    def run(self):
        try:
            self.schedulers = self.load()
        except Exception as error:  # reported by those who wait for `loaded`
            self.error = error
        self.loaded.set()

        while self._take_work():
            for scheduler in self.schedulers.values():
                if scheduler.busy:
                    self._step(scheduler)

        for scheduler in self.schedulers.values():
            scheduler.end_all(ShuttingDown("the server is shutting down"))
            self.deliver(scheduler.take_events())

    @property
    def _busy(self):
        return any(scheduler.busy for scheduler in self.schedulers.values())

    def _take_work(self):
        """Sleep until there is work, and give it to the schedulers. False: it is time to end."""
        with self._changed:
            self.waiting_of = self._count_waiting()
        # nobody waits meanwhile
        while not self._wait(self.idle_s):
            for scheduler in self.schedulers.values():
                scheduler.shrink()
            release_free_memory()

        with self._changed:
            for name, request in self.inbox:
                self.schedulers[name].waiting.append(request)
            self.inbox.clear()

        # after `stop` work goes on while there is some and time is left
        if self.deadline is None:
            return True
        return self._busy and time.monotonic() < self.deadline

    def _count_waiting(self):
        counts = Counter(request.client for _, request in self.inbox)
        for scheduler in self.schedulers.values():
            counts += scheduler.num_waiting()
        return counts

    def _wait(self, timeout_s):
        """Sleep until there is work or the order to stop. Returns whether that came in time."""
        def is_due():
            return bool(self.inbox) or self._busy or self.deadline is not None

        # `submit` and `stop` wake this thread up
        with self._changed:
            return self._changed.wait_for(is_due, timeout_s)

    def _step(self, scheduler):
        try:
            scheduler.admit()
            scheduler.pick()
            # clients get this step's text while the model computes the next logits
            self.deliver(scheduler.take_events())
            scheduler.forward()
        except Exception as error:  # out of memory, for example
            scheduler.fail_batch(error)
            self.deliver(scheduler.take_events())


def release_free_memory():
    """
    Let the C library return what was freed to the system. glibc keeps the pieces of a heap that lie
    between others until it is asked; others do without being asked, or cannot.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    trim(0)
