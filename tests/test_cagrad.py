# SPDX-License-Identifier: MIT
"""CAGrad: the conditions of its problem, and gradients that are Pareto-stationary or nearly so."""

import pytest
import torch

import gradsurgery
from inputs import DEVICE, HOSTILE, hostile, near_copies, normal
from test_gram_methods import TASKS, weigh


def assert_cagrad_is_optimal(gram: torch.Tensor, backend: str, c: float) -> None:
    """Assert that d is in the ball and closes the duality gap.

    max over the ball of min_t g_t . d = min over the simplex of g_x . g_0 + c |g_0| |g_x|.
    """
    tasks = len(gram)
    w = weigh("cagrad", gram, backend, c=c)
    mean = torch.full((tasks,), 1 / tasks, dtype=torch.float64)
    product = gram @ mean
    radius = c * (mean @ product).clamp(min=0).sqrt()
    moved = w - mean
    scale = gram.diagonal().max()
    assert (moved >= -1e-12 * w.abs().max()).all()
    assert (moved @ gram @ moved).clamp(min=0).sqrt() <= radius + 1e-7 * scale.sqrt()
    points = [moved / moved.sum() if moved.sum() > 0 else mean, gradsurgery.min_norm_weights(gram)]
    # The second point is for Pareto-stationary gradients: there g_x = 0, up to the square root of rounding.
    dual = min(x @ product + radius * (x @ gram @ x).clamp(min=0).sqrt() for x in points)
    tolerance = 1e-8 if points[1] @ gram @ points[1] > 1e-12 * scale else 1e-6
    if c > 0:
        assert abs((gram @ w).min() - dual) <= tolerance * scale


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_cagrad_closes_the_duality_gap(backend, tasks, case, c):
    gram = gradsurgery.gram(hostile(tasks)[case])
    assert_cagrad_is_optimal(gram, backend, c)
    w = weigh("cagrad", gram, backend, c=c)
    factors = [1, 1 / (1 + c * c), 1 / (1 + c)]
    for rescale, factor in enumerate(factors):
        torch.testing.assert_close(weigh("cagrad", gram, backend, c=c, rescale=rescale), w * factor)


@pytest.mark.not_interpreted
@pytest.mark.parametrize("seed", range(3))
def test_cagrad_of_near_copies(backend, seed):
    assert_cagrad_is_optimal(gradsurgery.gram(near_copies(64, seed)), backend, 0.5)


def test_cagrad_of_gradients_that_sum_to_rounding(backend):
    rows = normal(3, 50)
    rows[2] = -(rows[0] + rows[1]) * (1 + 1e-15)
    w = weigh("cagrad", gradsurgery.gram(rows), backend)
    torch.testing.assert_close(w, torch.full_like(w, 1 / 3))


@pytest.mark.parametrize(
    "rows",
    [
        [[-2, 2], [0, 3], [2, -3]],
        [[0, 3], [5, 0], [-2, -4]],
        [[-4, -1], [4, 2], [-5, -4], [-5, -2]],
        [[4, -5, -3], [3, -5, 3], [2, -5, 5], [-1, 3, -2], [-3, -2, -2]],
    ],
)
def test_cagrad_of_stationary_gradients_and_a_ball_that_just_holds_zero(backend, rows):
    rows = torch.tensor(rows, dtype=torch.float64)
    mean = rows.mean(0)
    for radius in (1.0, 1.0001):
        d = weigh("cagrad", gradsurgery.gram(rows), backend, c=radius) @ rows
        assert ((rows @ d) / rows.norm(dim=1)).min() > -1e-8
        assert (d - mean).norm() <= (1 + 1e-8) * radius * mean.norm()


def test_cagrad_of_nearly_stationary_gradients(backend):
    """|lambda g_x| hardly changes with lambda above the root that is sought, and falls fast below it."""
    rows = torch.tensor([[2.0, -7.0, -8.0], [9.0, 9.0, 8.0], [-50.999, -24.0, -16.0]], dtype=torch.float64)
    d = weigh("cagrad", gradsurgery.gram(rows), backend, c=1.0) @ rows
    assert ((rows @ d) / (rows.norm(dim=1) * d.norm())).min() > 0


@pytest.mark.parametrize("seed", [6, 29, 50, 54])
def test_cagrad_of_dependent_gradients_in_float32_keeps_its_weights_small(backend, seed):
    """G is indefinite by rounding, and weights that grow along its null space would be noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(9, 3, generator=generator, device="cpu") @ torch.randn(3, 40, generator=generator, device="cpu")
    gram = (rows @ rows.T).double().to(DEVICE)
    assert weigh("cagrad", (gram + gram.T) / 2, backend, c=3.0).abs().sum() < 10


def test_cagrad_does_not_take_a_short_gradient_for_zero(backend):
    for ratio in (10.0, 1e3, 5e6):
        for radius in (1.0, 2.0):
            gram = torch.tensor([[1.0, 0.0], [0.0, ratio**2]], dtype=torch.float64)
            w = weigh("cagrad", gram, backend, c=radius)
            # |d - g_0| = c |g_0|, and d - g_0 is nearly parallel to the short gradient.
            assert 0.4 * radius * ratio < w[0] < 0.6 * (1 + radius * ratio)


def test_cagrad_whose_multiplier_is_hard_to_bracket(backend):
    """As lambda grows past its root, a task leaves; there the slope of |lambda g_x|^2 in lambda^2 rises, not falls."""
    rows = [[1.35, -0.155, -1.27], [-0.459, -0.115, 0.0672], [-1.04, -0.196, 0.24], [0.88, -0.993, -0.863]]
    w = weigh("cagrad", gradsurgery.gram(torch.tensor(rows, dtype=torch.float64)), backend, c=0.422)
    expected = torch.tensor([0.25, 0.782494743271, 0.253565348325, 0.25], dtype=torch.float64)
    torch.testing.assert_close(w, expected, rtol=1e-9, atol=1e-9)
