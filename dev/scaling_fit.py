"""
Fitting the scaling law to runs, with intervals; used by scaling.py.

The fit is Hoffmann et al.'s (arXiv 2203.15556, appendix D.3): Huber's loss of the difference of log L, minimised by
L-BFGS from several starts. The intervals are a bootstrap's: the law is fitted again to runs that are drawn with
replacement from all runs.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from nanochat.common import UserError
from nanochat.scaling_law import ScalingLaw

# Differences of log L beyond this count linearly, so that a run that went wrong moves little
HUBER = 1e-3
INTERVAL = (5, 95)  # percentiles: a 90% interval
MIN_RUNS = 6        # one more than the law has parameters
MIN_SIZES = 3       # different N, and different D
EXPONENTS = (0.01, 2.0)  # alpha and beta lie between

# -----------------------------------------------------------------------------
# The fit


@dataclass(frozen=True)
class Points:
    """Runs as arrays (R,): parameters, tokens, bits per byte."""
    num_params: np.ndarray
    num_tokens: np.ndarray
    losses: np.ndarray

    def __len__(self):
        return len(self.losses)

    def take(self, places):
        return Points(self.num_params[places], self.num_tokens[places], self.losses[places])

    def determine_a_law(self):
        """Whether they are enough, and differ enough, for five parameters."""
        runs = len(set(zip(self.num_params, self.num_tokens, self.losses, strict=True)))
        sizes = min(len(set(self.num_params)), len(set(self.num_tokens)))
        return runs >= MIN_RUNS and sizes >= MIN_SIZES


class Objective:
    """
    Huber's loss of points and its gradient, of x = (alpha, beta, log E, log of the N-term, log of the D-term). The
    two terms are those at the geometric means of N and D, where they can be told from their exponents.
    """

    def __init__(self, points):
        log_params = np.log(points.num_params)
        log_tokens = np.log(points.num_tokens)
        self.mean_n = log_params.mean()
        self.mean_d = log_tokens.mean()
        self.n = log_params - self.mean_n  # (R,)
        self.d = log_tokens - self.mean_d  # (R,)
        self.log_losses = np.log(points.losses)

    def __call__(self, x):
        """(value, gradient (5,))."""
        alpha, beta, log_e, log_a, log_b = x
        terms = np.exp([log_a - alpha * self.n, log_b - beta * self.d, np.full_like(self.n, log_e)])  # (3, R)
        losses = terms.sum(axis=0)
        error = np.log(losses) - self.log_losses
        slope = np.clip(error, -HUBER, HUBER)  # the derivative of Huber's loss
        value = np.sum(slope * (error - slope / 2))

        # the derivatives of the log of a sum are the shares of its terms
        by_n, by_d, by_e = terms / losses * slope
        gradient = np.array([-by_n @ self.n, -by_d @ self.d, by_e.sum(), by_n.sum(), by_d.sum()])
        # L-BFGS stops at changes of 1e-9, which are large for losses of 1e-6
        return value / HUBER**2, gradient / HUBER**2

    def law(self, x):
        alpha, beta, log_e, log_a, log_b = x
        return ScalingLaw(
            E=float(np.exp(log_e)),
            A=float(np.exp(log_a + alpha * self.mean_n)),
            alpha=float(alpha),
            B=float(np.exp(log_b + beta * self.mean_d)),
            beta=float(beta),
        )

    def coordinates(self, law):
        """x of a law."""
        log_a = np.log(law.A) - law.alpha * self.mean_n
        log_b = np.log(law.B) - law.beta * self.mean_d
        return [law.alpha, law.beta, np.log(law.E), log_a, log_b]


def fit_law(points, start=None, exponents=None):
    """
    The ScalingLaw of least loss, from several starts, or from the law `start` alone. exponents: (alpha, beta) to keep;
    None = fit them too. UserError if the points cannot determine a law.
    """
    if not points.determine_a_law():
        raise UserError(
            f"{len(points)} runs cannot determine a law of five parameters",
            f"needed: {MIN_RUNS} runs of {MIN_SIZES} depths and {MIN_SIZES} horizons: go on with the series",
        )
    objective = Objective(points)
    starts = usual_starts(points)
    if start is not None:
        starts = [objective.coordinates(start)]
    least = points.losses.min()
    largest = np.log(100 * points.losses.max())
    exponent_bounds = [EXPONENTS, EXPONENTS]
    if exponents is not None:
        exponent_bounds = [(exponent, exponent) for exponent in exponents]
    bounds = [*exponent_bounds, (np.log(1e-3 * least), np.log(least)), (-20, largest), (-20, largest)]
    results = []
    for x in starts:
        results.append(minimize(objective, x, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 2000}))
    best = min(results, key=lambda result: result.fun)
    return objective.law(best.x)


def usual_starts(points):
    """Exponents and shares of E in all combinations; the rest of the loss is half N's, half D's."""
    least = points.losses.min()
    starts = []
    for alpha, beta, share in itertools.product((0.2, 0.5, 0.9), (0.2, 0.5, 0.9), (0.2, 0.5, 0.8)):
        rest = np.log((points.losses.mean() - share * least) / 2)
        starts.append([alpha, beta, np.log(share * least), rest, rest])
    return starts


def bootstrap(points, law, repeats, seed=0, exponents=None):
    """
    Laws of `repeats` draws with replacement. A draw that cannot determine a law is drawn again. exponents: see fit_law.
    """
    rng = np.random.default_rng(seed)
    laws = []
    while len(laws) < repeats:
        drawn = points.take(rng.integers(len(points), size=len(points)))
        if drawn.determine_a_law():
            laws.append(fit_law(drawn, law, exponents))
    return laws


# -----------------------------------------------------------------------------
# What follows from it


def interval(values):
    """(low, high) of the values of all laws of a bootstrap."""
    low, high = np.percentile(values, INTERVAL)
    return float(low), float(high)


def relative_errors(law, points):
    """Predicted / measured - 1, (R,)."""
    return law.loss(points.num_params, points.num_tokens) / points.losses - 1


def optimal_split(law, flops):
    """
    (N, D) of least loss with 6 N D = flops, by the law's closed form (Hoffmann et al., eq. 4): attention is left out.
    """
    total = law.alpha + law.beta
    ratio = (law.alpha * law.A / (law.beta * law.B)) ** (1 / total)
    num_params = ratio * (flops / 6) ** (law.beta / total)
    return num_params, flops / 6 / num_params
