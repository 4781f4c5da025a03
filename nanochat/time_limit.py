"""
Runs that end on time: `base_train --minutes=20`.

How many steps fit is known only when some of them are done, and a machine that does other work too
changes its speed. So a run begins with a guess, and goes on deciding: now and then, the time left
and the speed of the last steps give a new number of steps. Learning rate and weight decay follow
from step / number of steps, so they reach 0 whenever the run ends.

The number of steps is saved with each checkpoint, and so is the time that was spent. A resumed run
goes on with both. Up to its next decision it has exactly the losses of the unbroken run. After that
its length depends on the clock, as it must. A run with --num_iterations repeats exactly.
"""

import math
import statistics
import time
from collections import deque

from nanochat.common import UserError, ceil_div
from nanochat.horizon import batch_size_of_tokens
from nanochat.scaling_law import ModelSize, best_depth

# Of the device's peak FLOP/s, until the first steps are timed: 50 to 57% were measured (dev/LOG.md)
GUESSED_EFFICIENCY = 0.5
# Of the time, kept for the last checkpoint, the samples and the report
END_SHARE = 0.02
# An evaluation takes this part of the time of training on as many tokens: one pass of three, but
# without the fast path of the loss
EVAL_COST = 0.5
# There are three evaluations: at the start, after half of the run and at the end. Each takes this part
# of the run's tokens
EVAL_SHARE = 0.04
MAX_EVAL_TOKENS = 10485760
# The speed is the median of the last steps, so that a step which compiles, or during which the machine
# slept, changes nothing
MAX_TIMED = 32  # steps, at most
MIN_TIMED = 10  # before so many there is no decision
# Context: a step has 8 rows or more, and attention costs at most half as much as the matrices. In two
# minutes a d2 reached 2.04 bits per byte with 512 tokens, 2.17 with 2,048 (dev/LOG.md)
MIN_ROWS = 8
ATTENTION_SHARE = 0.5
MAX_CONTEXT = 2048
USUAL_CONTEXT = 512  # with which depths are compared; its attention costs little
# One row of each document in each epoch, where so many epochs are text enough: then a run meets more
# documents. In nine pairs of short runs that changed the loss by +0.001 to -0.037 bits per byte
# (dev/log/2026-11-30-packing.md)
MAX_CROPPED_EPOCHS = 2


class TimeLimit:
    """
    The time of a run. start: when it began, by the clock; of a resumed run as much earlier as the
    processes before this one ran. clock: seconds.
    """

    def __init__(self, minutes, start, clock=time.monotonic):
        self.minutes = minutes
        self._start = start
        self._clock = clock
        self._step_s = deque(maxlen=MAX_TIMED)

    def spent_s(self):
        return self._clock() - self._start

    def left_s(self):
        """For steps and evaluations: without what is kept for the end."""
        return (1 - END_SHARE) * 60 * self.minutes - self.spent_s()

    def guess_flops(self, peak_flops):
        """FLOPs that the devices, with peak_flops FLOP/s in all, can compute in the time left."""
        left_s = self.left_s()
        if left_s <= 0:
            raise UserError(f"--minutes={self.minutes:g}: nothing of it is left after a start of "
                            f"{self.spent_s():.0f} s", "--minutes=20")
        return left_s * GUESSED_EFFICIENCY * peak_flops

    def add_step(self, seconds):
        """Note how long a step of this process took."""
        self._step_s.append(seconds)

    def decision_due(self, step, iterations):
        """
        Whether the number of steps, up to now `iterations`, is decided again before `step`. Just
        before the end it stays: a run that always has a few more steps would never end.
        """
        if len(self._step_s) < MIN_TIMED:
            return False
        distance = decision_distance(step)
        return step % distance == 0 and iterations - step > distance

    def decide(self, step, batch_tokens, eval_tokens, eval_every):
        """
        How many steps the run has if it goes on from `step` with the speed of the last steps. If
        the time is up, a few more, in which the learning rate falls to 0.
        """
        step_s = statistics.median(self._step_s)
        # one evaluation at the end, the others as a part of each step
        eval_s = EVAL_COST * step_s * eval_tokens / batch_tokens
        if eval_every > 0:
            step_s += eval_s / eval_every
        steps_left = int((self.left_s() - eval_s) / step_s)
        return step + max(steps_left, decision_distance(step))


def decision_distance(step):
    """Steps between two decisions: a 32nd to a 64th of the steps so far."""
    largest_power = 2 ** (step.bit_length() - 1)
    return max(1, largest_power // 32)


def choose_sizes(flops, vocab_size, depth=None, sequence_len=None):
    """The settings depth and max_seq_len for a run of `flops`. What is given stays."""
    if depth is None:
        depth = best_depth(flops, vocab_size, sequence_len or USUAL_CONTEXT)
    if sequence_len is None:
        size = ModelSize.from_depth(depth, vocab_size, USUAL_CONTEXT)
        batch_tokens = batch_size_of_tokens(flops / size.flops_per_token)
        matrix_flops = 6 * size.num_matrix_params
        attention_flops = (size.flops_per_token - matrix_flops) / USUAL_CONTEXT  # for each position
        affordable = ATTENTION_SHARE * matrix_flops / attention_flops
        sequence_len = min(MAX_CONTEXT, batch_tokens // MIN_ROWS, 2 ** int(math.log2(affordable)))
    return {"depth": depth, "max_seq_len": sequence_len}


def choose_evaluations(iterations, batch_tokens):
    """The settings eval_every and eval_tokens for a run of so many steps."""
    eval_tokens = min(MAX_EVAL_TOKENS, int(EVAL_SHARE * iterations * batch_tokens))
    return {"eval_every": ceil_div(iterations, 2), "eval_tokens": max(batch_tokens, eval_tokens)}


def choose_crop(run_tokens, num_documents, sequence_len):
    """The setting crop for a run of so many tokens."""
    return {"crop": run_tokens <= MAX_CROPPED_EPOCHS * num_documents * sequence_len}
