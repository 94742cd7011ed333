# SPDX-License-Identifier: MIT
"""Priority-constrained descent: its optimality conditions, its averages, and its result where no direction exists."""

import numpy as np
import pytest
import torch

import gradsurgery
from conftest import on_cpu
from gradsurgery import methods
from inputs import DTYPES, HOSTILE, hostile, normal


def problem(seed, tasks, columns):
    """Gradients of different lengths that conflict, and averages of their squares."""
    rows = normal(tasks, columns, seed=seed)
    rows = (rows - 0.7 * rows.mean(0)) * normal(tasks, 1, seed=seed + 1).exp()
    return rows, normal(tasks, 1, seed=seed + 2)[:, 0].exp()


def normalised(rows, averages):
    return rows / averages.sqrt()[:, None]


def with_averages(averages, **options):
    method = methods.get("pcd", **options)
    method.load_state_dict({"averages": averages})
    method.beta = 1.0  # a step does not move them
    return method


@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("tasks", [2, 3, 5, 8])
def test_the_conditions_of_its_problem(backend, tasks, tau):
    for seed in range(5):
        rows, averages = problem(seed, tasks, 30)
        weights = with_averages(averages, tau=tau).weights(rows @ rows.T, backend=backend)
        n = normalised(rows, averages)
        # d = |g_1| x / |x|, x = n_1 + sum_t mu_t n_t: the weights determine mu, which is 1 for the first task.
        scaled = weights * averages.sqrt()
        mu = scaled / scaled[0]
        x = mu @ n
        torch.testing.assert_close((weights @ rows).norm(), rows[0].norm())
        slack = (n @ x - tau * n.square().sum(1))[1:]
        assert (slack >= -1e-9 * n.norm(dim=1).max() * x.norm()).all()
        assert (mu[1:] >= 0).all()
        assert (mu[1:] * slack).abs().max() <= 1e-8 * x.square().sum()


@pytest.mark.parametrize(("tasks", "columns"), [(8, 5), (16, 8), (32, 20), (16, 4000)])
def test_a_gram_matrix_of_float32_that_is_singular(backend, tasks, columns):
    # The other tasks' gradients have a common part; otherwise no x would meet the constraints.
    rows = normal(tasks, 4) @ normal(4, columns, seed=7) if columns > 1000 else normal(tasks, columns)
    rows = (torch.nn.functional.normalize(rows) + torch.nn.functional.normalize(rows[1:].mean(0), dim=0)).float()
    rows[0] = -rows[1:].mean(0) + 0.1 * rows[0]
    exact = rows.double()
    expected = gradsurgery.aggregate(exact, "pcd", tau=0.3, backend="reference")
    got = gradsurgery.aggregate(rows, "pcd", tau=0.3, backend=backend).double()
    assert expected.norm() > 0.5 * exact[0].norm()
    assert (got - expected).norm() <= 1e-4 * expected.norm()


def test_two_tasks_in_closed_form(backend):
    method, beta = methods.get("pcd", tau=0.3, beta=0.5), 0.5
    squares = torch.zeros(2, dtype=torch.float64)
    for step in range(1, 5):
        rows = normal(2, 6, seed=step) * torch.tensor([[1.0], [7.0]])
        squares = beta * squares + (1 - beta) * rows.square().sum(1)
        n = normalised(rows, squares / (1 - beta**step))
        x = n[0] + ((0.3 * n[1].square().sum() - n[0] @ n[1]) / n[1].square().sum()).clamp(min=0) * n[1]
        direction = gradsurgery.aggregate(rows, method, backend=backend)
        torch.testing.assert_close(direction, x * rows[0].norm() / x.norm())


def test_there_is_no_direction_where_nothing_is_left_of_opposites(backend):
    row = normal(1, 50)
    for rows in (torch.cat([row, -row]), torch.cat([row, -row, 2 * row]), torch.cat([row, -(1 - 1e-12) * row])):
        weights = methods.get("pcd", tau=0.0).weights(rows @ rows.T, backend=backend)
        assert weights.tolist() == [0.0] * len(rows)


@on_cpu
@pytest.mark.parametrize("tau", [0.0, 0.02, 1.0, [0.1, 0.7, 0.0]])
@pytest.mark.parametrize("case", HOSTILE)
def test_torchjd_without_its_absolute_epsilon(case, tau):
    torchjd = pytest.importorskip("torchjd.aggregation")
    theirs = torchjd.PCD(torch.tensor(tau, dtype=torch.float64) if isinstance(tau, list) else tau, eps=0.0)
    ours = methods.get("pcd", tau=tau)
    for step in range(3):
        rows = hostile(4)[case] * (1 + step)
        rows[step] *= 3
        expected = theirs(rows)
        error = (gradsurgery.aggregate(rows, ours) - expected).norm()
        assert error <= 1e-9 * rows[0].norm()


def test_constraints_that_nothing_meets_are_dropped(backend):
    first, second = normal(2, 20)
    for seed in range(3):
        rows = torch.stack([first, second, -2 * second + 1e-9 * normal(1, 20, seed=seed)[0]])
        direction = gradsurgery.aggregate(rows, "pcd", backend=backend)
        torch.testing.assert_close(direction, first, rtol=1e-12, atol=0)
    # With tau = 0 an x at right angles to both gradients meets both constraints.
    direction = gradsurgery.aggregate(rows, "pcd", tau=0.0, backend=backend)
    assert (direction @ second).abs() <= 1e-6 * second.norm() * first.norm()
    torch.testing.assert_close(direction.norm(), first.norm())


def test_no_direction(backend):
    g = normal(1, 20)[0]
    for rows in (torch.stack([0 * g, g]), torch.stack([g, -3 * g]), torch.stack([0 * g, 0 * g])):
        assert gradsurgery.aggregate(rows, "pcd", tau=0.0, backend=backend).abs().max() == 0
    torch.testing.assert_close(gradsurgery.aggregate(g[None], "pcd", backend=backend), g)
    # A small share for a task whose gradient opposes the first task's reverses the direction.
    against = gradsurgery.aggregate(torch.stack([g, -3 * g]), "pcd", tau=0.02, backend=backend)
    torch.testing.assert_close(against, -g)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scaling_the_gradients_scales_the_direction(dtype, scale):
    if dtype == torch.float16 and scale != 1:
        pytest.skip("float16 holds no such numbers")
    rows = problem(0, 5, 40)[0].to(dtype)
    expected = gradsurgery.aggregate(rows.double(), "pcd")
    got = gradsurgery.aggregate(rows * scale, "pcd").double() / scale
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 3 * torch.finfo(dtype).eps)
    assert (got - expected).norm() <= tolerance * expected.norm()


def test_a_step_that_is_not_finite_counts_nothing(backend):
    one, other = methods.get("pcd"), methods.get("pcd")
    grams = torch.stack([rows @ rows.T for rows in (problem(seed, 4, 9)[0] for seed in range(3))])
    bad = grams.clone()
    bad[1, 2, 3] = torch.nan
    for method, given in ((one, grams), (other, bad)):
        first = method.weights(given, backend=backend)
        assert first.isfinite().all(-1).tolist() == given.isfinite().flatten(1).all(-1).tolist()
    one.weights(grams, backend=backend)
    other.weights(grams, backend=backend)
    a, b = one.state_dict()["averages"], other.state_dict()["averages"]
    assert torch.equal(a[[0, 2]], b[[0, 2]])
    torch.testing.assert_close(b[1], a[1] / (1 - 0.999**2) * (1 - 0.999))


def test_a_share_for_each_task():
    rows = problem(3, 3, 12)[0]
    alike, each = (gradsurgery.aggregate(rows, "pcd", tau=tau) for tau in (0.4, [0.4, 0.4]))
    assert torch.equal(alike, each)
    assert torch.equal(gradsurgery.aggregate(rows, "pcd", tau=np.array([0.4, 0.4])), each)
    assert not torch.allclose(gradsurgery.aggregate(rows, "pcd", tau=[0.4, 0.9]), each)
    with pytest.raises(ValueError, match="tau must hold 3 numbers, one for each task but the first, got 2"):
        gradsurgery.aggregate(normal(4, 5), "pcd", tau=[0.1, 0.2])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": -0.1}, ValueError, "tau must be >= 0 and <= 1, got -0.1"),
        (
            {"tau": [0.5, 1.5]},
            ValueError,
            r"tau must be T - 1 numbers >= 0 and <= 1, got \[0.5, 1.5\]",
        ),
        ({"tau": "much"}, TypeError, "tau must be T - 1 numbers >= 0 and <= 1, got 'much'"),
        ({"beta": 1.0}, ValueError, "beta must be >= 0 and < 1, got 1.0"),
    ],
)
def test_options_out_of_range(options, error, message):
    with pytest.raises(error, match=message):
        methods.get("pcd", **options)
