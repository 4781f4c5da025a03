"""
The curves of one metrics.jsonl, read while it grows, and thinned out to what a screen can show.
"""

import json
import secrets
import time

MAX_BUCKETS = 1000      # per curve; more than a chart has pixels
CHUNK_BYTES = 2**20     # read at a time; no line is as long
TAIL_BYTES = 200        # kept of what was read, to see whether the file is still the same
MAX_SAMPLES = 10        # newest lines of samples to keep
LONG_BYTES = 2**25      # a longer file takes a second or more to read: it is first looked through
LARGEST = 1e300         # of the numbers that are drawn
# Keys that no chart shows
NOT_DRAWN = {
    "train_s", "flops", "epoch", "num_targets", "lrm", "dt_ms", "answer_tokens", "useful",
    "rollouts_per_sec", "stderr",
}


class LogReader:
    """
    Steps are divided into buckets of `width` of them, and a bucket has the lowest, the highest and
    the last value of every metric: no peak is lost. Once there are more than MAX_BUCKETS, the width
    doubles and each two of them become one. So a log of any length takes the same memory.

    `generation` is another number whenever buckets changed that were already handed out: where the
    file is another one, or the width doubled, or steps came again.

    While a long file is read for the first time, its curves are those of single lines from all over
    it: a whole picture at once, without the peaks.
    """

    def __init__(self, path):
        self.path = path
        self._clear()

    def _clear(self):
        # random, so that no other process ever gives the same
        self.generation = secrets.randbits(48)
        self.width = 1        # steps per bucket
        self.columns = {}     # metric -> one [low, high, last] per bucket, or None where it has no value
        self.samples = []     # newest last
        self.fraction = 0.0   # of the file that is read
        self._offset = 0      # bytes that are read
        self._tail = b""      # the last of them
        self._last_step = 0
        self._overview = None  # a LogReader of single lines, until all is read

    def read(self, seconds=0.2):
        """Read what is new, for about so long."""
        deadline = time.monotonic() + seconds
        try:
            file = open(self.path, "rb")
        except FileNotFoundError:
            self._clear()
            self.fraction = 1.0  # there is nothing more to read
            return
        with file:
            # A resumed run writes another file: then the last bytes do not stand where they did
            file.seek(self._offset - len(self._tail))
            if file.read(len(self._tail)) != self._tail:
                self._clear()
            size = file.seek(0, 2)
            if self._offset == 0 and size > LONG_BYTES:
                self._overview = self._look_through(file, size)
            while self._read_chunk(file, size) and time.monotonic() < deadline:
                pass
        if self.fraction == 1:
            self._overview = None

    def _look_through(self, file, size):
        """A LogReader of the lines at MAX_BUCKETS places of a file."""
        overview = LogReader(self.path)
        for i in range(MAX_BUCKETS):
            file.seek(i * size // MAX_BUCKETS)
            file.readline()  # the rest of one
            overview._add(file.readline())
        return overview

    def _read_chunk(self, file, size):
        """Read up to CHUNK_BYTES of whole lines. Returns whether there may be more."""
        file.seek(self._offset)
        data = file.read(CHUNK_BYTES)
        # the rest is a line that is still being written
        end = data.rfind(b"\n") + 1
        if len(data) == CHUNK_BYTES and end == 0:
            end = CHUNK_BYTES
        for line in data[:end].splitlines():
            self._add(line)
        self._offset += end
        self._tail = (self._tail + data[:end])[-TAIL_BYTES:]
        may_be_more = len(data) == CHUNK_BYTES
        self.fraction = self._offset / size if may_be_more else 1.0
        return may_be_more

    def _add(self, line):
        """Add a line of the log to the buckets."""
        # a crash may have cut it short
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return
        step = row.get("step") if isinstance(row, dict) else None
        if not isinstance(step, int) or step < 0:
            return

        # After an earlier step, those that follow it come again
        if step < self._last_step:
            self._forget_after(step)
        self._last_step = step
        while step >= MAX_BUCKETS * self.width:
            self._double_width()
        bucket = step // self.width

        if "samples" in row:
            self.samples = [*self.samples, row][-MAX_SAMPLES:]
            return
        for name, value in row.items():
            # null where a stage has no such number. The range refuses nan, which older logs may have
            if type(value) in (int, float) and name not in NOT_DRAWN and -LARGEST < value < LARGEST:
                self._put(name, bucket, value)

    def _put(self, name, bucket, value):
        column = self.columns.get(name)
        if column is None:
            column = self.columns[name] = []
        if len(column) <= bucket:
            column.extend([None] * (bucket - len(column)))
            column.append([value, value, value])
            return
        cell = column[bucket]
        if cell is None:
            column[bucket] = [value, value, value]
            return
        if value < cell[0]:
            cell[0] = value
        if value > cell[1]:
            cell[1] = value
        cell[2] = value

    def _forget_after(self, step):
        """Forget later steps, since they come again."""
        self.generation = secrets.randbits(48)
        for column in self.columns.values():
            del column[step // self.width + 1:]
        self.samples = [row for row in self.samples if row["step"] < step]

    def _double_width(self):
        self.generation = secrets.randbits(48)
        self.width *= 2
        for name, column in self.columns.items():
            self.columns[name] = [join(column[i: i + 2]) for i in range(0, len(column), 2)]

    def curves(self, generation=0, start=0):
        """
        The buckets from `start` on, for somebody who has those before it of this generation, as a
        dict for JSON; all buckets for somebody of another generation.
        """
        if self._overview is not None:
            return {**self._overview.curves(generation, start), "fraction": self.fraction}
        if generation != self.generation:
            start = 0
        columns = {}
        for name, column in self.columns.items():
            cells = column[start:]
            columns[name] = {
                "low": [shorten(cell and cell[0]) for cell in cells],
                "high": [shorten(cell and cell[1]) for cell in cells],
                "last": [cell and cell[2] for cell in cells],
            }
        return {
            "generation": self.generation,
            "start": start,
            "fraction": self.fraction,
            "columns": columns,
            "samples": self.samples,
        }


def join(cells):
    """
    The cell of one or two neighbouring buckets.

    >>> join([[1, 5, 2], [3, 9, 4]]), join([None, [3, 9, 4]])
    ([1, 9, 4], [3, 9, 4])
    """
    cells = [cell for cell in cells if cell is not None]
    if not cells:
        return None
    lows, highs, lasts = zip(*cells, strict=True)
    return [min(lows), max(highs), lasts[-1]]


def shorten(value):
    """A number with six digits, which are enough to draw it; None stays None."""
    return value if value is None else float(f"{value:.6g}")
