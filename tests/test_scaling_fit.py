"""The fit of the scaling law on made-up losses, whose law is known."""

import numpy as np
import pytest

from nanochat.common import UserError
from nanochat.scaling_law import ModelSize, ScalingLaw

pytest.importorskip("scipy", reason="needs scipy: uv sync --group dev")

from dev.scaling_fit import (  # noqa: E402
    Objective,
    Points,
    bootstrap,
    fit_law,
    interval,
    optimal_split,
    relative_errors,
)

TRUTH = ScalingLaw(E=0.774, A=723.0, alpha=0.485, B=42.0, beta=0.28)
SIZES = [ModelSize.from_depth(depth, 16384, 512) for depth in (2, 3, 4, 5, 6)]
LARGE = ModelSize.from_depth(12, 16384, 512)


def made_up(noise=0.0, seed=0, law=TRUTH, count="num_matrix_params"):
    """Runs of five sizes at four amounts of FLOPs, as scaling.py plans them; noise: standard deviation of log L."""
    num_params, num_tokens, sizes = [], [], []
    for size in SIZES:
        for flops in (2e13, 4e13, 8e13, 1.6e14):
            sizes.append(getattr(size, count))
            num_params.append(size.num_matrix_params)
            num_tokens.append(flops / size.flops_per_token)
    num_tokens = np.array(num_tokens)
    losses = law.loss(np.array(sizes, dtype=float), num_tokens)
    losses *= np.exp(np.random.default_rng(seed).normal(0, noise, len(losses)))
    return Points(np.array(num_params, dtype=float), num_tokens, losses)


@pytest.mark.parametrize("law", [
    TRUTH,
    ScalingLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28),
    ScalingLaw(E=0.5, A=30, alpha=0.2, B=4000, beta=0.6),
])
def test_without_noise_the_law_is_found_again(law):
    found = fit_law(made_up(law=law))
    for name in ("E", "alpha", "beta"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=1e-3), name
    for name in ("A", "B"):
        assert getattr(found, name) == pytest.approx(getattr(law, name), rel=0.02), name


def test_exponents_can_be_kept():
    points = made_up(noise=0.002)
    exponents = (TRUTH.alpha, TRUTH.beta)
    law = fit_law(points, exponents=exponents)
    laws = bootstrap(points, law, 20, exponents=exponents)
    assert {(other.alpha, other.beta) for other in [law, *laws]} == {exponents}
    assert law.E == pytest.approx(TRUTH.E, rel=0.05)

    # what is known needs no runs: the loss of a larger model is known better
    def width(some_laws):
        low, high = interval([other.loss(LARGE.num_matrix_params, 1e9) for other in some_laws])
        return high - low
    assert width(laws) < 0.7 * width(bootstrap(points, fit_law(points), 20))


def test_the_gradient_is_that_of_the_value():
    points = made_up(noise=0.01)
    objective = Objective(points)
    x = np.array(objective.coordinates(ScalingLaw(E=0.7, A=50.0, alpha=0.3, B=100.0, beta=0.35)))
    _, gradient = objective(x)
    for place in range(5):
        step = np.zeros(5)
        step[place] = 1e-6
        slope = (objective(x + step)[0] - objective(x - step)[0]) / 2e-6
        assert slope == pytest.approx(gradient[place], rel=1e-4)


def test_one_run_that_went_wrong_moves_little():
    points = made_up()
    points.losses[3] *= 1.3
    error = relative_errors(fit_law(points), made_up())
    assert np.abs(error).max() < 0.003


def test_with_noise_the_truth_lies_within_the_intervals():
    """Ten series with the noise of seeds: a 90% interval misses some of them, rarely more than three."""
    true_loss = TRUTH.loss(LARGE.num_matrix_params, 20 * LARGE.num_params)
    inside = {"loss": 0, "alpha": 0, "beta": 0}
    for seed in range(10):
        points = made_up(noise=0.003, seed=seed)
        laws = bootstrap(points, fit_law(points), repeats=60, seed=seed)
        low, high = interval([law.loss(LARGE.num_matrix_params, 20 * LARGE.num_params) for law in laws])
        inside["loss"] += low <= true_loss <= high
        for name in ("alpha", "beta"):
            low, high = interval([getattr(law, name) for law in laws])
            inside[name] += low <= getattr(TRUTH, name) <= high
    assert min(inside.values()) >= 7
    assert high - low > 0.05  # and they are intervals, not points


def test_a_size_left_out_is_predicted_within_a_percent():
    points = made_up(noise=0.003, seed=1)
    largest = points.num_params == points.num_params.max()
    law = fit_law(points.take(~largest))
    assert np.abs(relative_errors(law, points.take(largest))).max() < 0.01


def test_the_right_count_of_parameters_fits_best():
    """Losses that follow all parameters, or those of the blocks alone, fit worse by those of the matrices."""
    for count in ("num_params", "num_block_params"):
        points = made_up(count=count)
        right = Points(np.repeat([float(getattr(size, count)) for size in SIZES], 4), points.num_tokens, points.losses)
        errors = [np.abs(relative_errors(fit_law(p), p)).max() for p in (right, points)]
        assert errors[0] < 1e-5 < errors[1]


def test_the_optimal_split_is_the_best_of_its_neighbours():
    for flops in (1e14, 1e19):
        num_params, num_tokens = optimal_split(TRUTH, flops)
        assert 6 * num_params * num_tokens == pytest.approx(flops)
        best = TRUTH.loss(num_params, num_tokens)
        for factor in (0.9, 1.1):
            assert TRUTH.loss(factor * num_params, num_tokens / factor) > best


@pytest.mark.parametrize("places", [slice(0, 5), slice(0, 8), [0] * 20])
def test_too_few_runs_or_sizes_are_refused(places):
    with pytest.raises(UserError, match="cannot determine a law of five parameters"):
        fit_law(made_up().take(places))
