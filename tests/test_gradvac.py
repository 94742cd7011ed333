# SPDX-License-Identifier: MIT
"""Gradient Vaccine: its algorithm, its targets, its state."""

import math

import pytest
import torch

import gradsurgery
from conftest import USABLE
from inputs import DEVICE, HOSTILE, hostile, normal

methods = gradsurgery.methods
TASKS = (1, 2, 5, 33)


@pytest.fixture(params=[name for name in USABLE if name != "triton"])
def backend(request):
    """Every usable backend but Triton, which has no kernel for GradVac: it runs the reference's code."""
    return request.param


def explicit_gradvac(rows, order, beta, targets):
    """Algorithm 1 on the gradients themselves."""
    moved = rows.clone()
    for i, visits in enumerate(order.tolist()):
        for j in visits:
            p, other = moved[i], rows[j]
            if j == i or p.norm() == 0 or other.norm() == 0:
                continue
            rho = (p @ other / p.norm() / other.norm()).clamp(-1, 1)
            goal = targets[i, j].clamp(max=1 - 1e-8)
            if rho < goal:
                sine = (1 - goal**2).sqrt()
                moved[i] = p + other * p.norm() * (goal * (1 - rho**2).sqrt() - rho * sine) / (other.norm() * sine)
                cosine = moved[i] @ other / moved[i].norm() / other.norm()
                torch.testing.assert_close(cosine, goal, atol=1e-6, rtol=0)
            targets[i, j] = (1 - beta) * targets[i, j] + beta * rho
    return moved.sum(0)


@pytest.mark.parametrize("tasks", TASKS)
def test_gradvac_is_algorithm_1(backend, tasks):
    method = methods.get("gradvac", beta=0.3, seed=4)
    targets = torch.zeros(tasks, tasks, dtype=torch.float64, device="cpu")
    for step in range(4):
        rows = normal(tasks, 40, seed=step) + normal(1, 40, seed=9)
        order = gradsurgery.task_order(tasks, seed=4, step=step, device=DEVICE)
        got = method.weights(gradsurgery.gram(rows), backend=backend) @ rows
        expected = explicit_gradvac(rows.cpu(), order, 0.3, targets)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(method.state_dict()["targets"].cpu(), targets, rtol=1e-9, atol=1e-9)
    if tasks > 1:
        assert (targets > 0).any()
    bad = torch.full((tasks, tasks), torch.nan, dtype=torch.float64)
    assert method.weights(bad, backend=backend).isnan().all()
    torch.testing.assert_close(method.state_dict()["targets"].cpu(), targets, rtol=1e-9, atol=1e-9)


def test_gradvac_of_lengths_that_differ_beyond_measure(backend):
    """The squares of the ratios of these lengths overflow."""
    rows = normal(3, 8, seed=2) * torch.tensor([[2.0**300], [1.0], [2.0**-300]], dtype=torch.float64, device=DEVICE)
    targets = torch.full((3, 3), 0.9, dtype=torch.float64, device="cpu")
    for seed in range(4):
        method = methods.get("gradvac", beta=0.0, seed=seed)
        method.load_state_dict({**method.state_dict(), "targets": targets})
        order = gradsurgery.task_order(3, seed=seed, step=0, device=DEVICE)
        got = method.weights(gradsurgery.gram(rows), backend=backend) @ rows
        expected = explicit_gradvac(rows.cpu(), order, 0.0, targets)
        torch.testing.assert_close(got.cpu() / 2.0**300, expected / 2.0**300, rtol=1e-9, atol=1e-9)


def test_gradvac_starts_as_pcgrad(backend):
    gram = gradsurgery.gram(hostile(8)["conflicting"] + 0.1 * normal(8, 37, seed=3))
    got = methods.get("gradvac", beta=0.0, seed=2).weights(gram, backend=backend)
    torch.testing.assert_close(got, gradsurgery.pcgrad_weights(gram, seed=2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("tasks", TASKS)
def test_gradvac_of_hostile_gradients_is_finite(backend, tasks, case):
    method, gram = methods.get("gradvac", beta=0.5), gradsurgery.gram(hostile(tasks)[case])
    for _ in range(2):
        assert method.weights(gram, backend=backend).isfinite().all()


def test_what_cancels_to_rounding_has_no_cosine(backend):
    rows = torch.tensor([[1.0, -1], [-2, 2], [3, 0]], dtype=torch.float64, device=DEVICE)
    gram, method = gradsurgery.gram(rows), methods.get("gradvac", beta=0.5)
    for step in range(4):
        # Rows 0 and 1 are opposite: if the first visit of one is to the other, its vector is 0 afterwards.
        order = gradsurgery.task_order(3, seed=0, step=step).tolist()
        first = [next(j for j in row if j != i) for i, row in enumerate(order)]
        before = method.state_dict()["targets"]
        method.weights(gram, backend=backend)
        after = method.state_dict()["targets"]
        for i in (0, 1):
            if first[i] == 1 - i and (before is None or before[i, 1 - i] <= 0):
                assert after[i, 2] == (0 if before is None else before[i, 2])


def test_a_zero_gradient_moves_no_target(backend):
    method, targets = methods.get("gradvac"), torch.full((2, 2), 0.3, dtype=torch.float64)
    method.load_state_dict({"targets": targets, "seed": 0, "step": torch.tensor(0)})
    method.weights(torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)), backend=backend)
    after = method.state_dict()["targets"]
    assert (after[0, 1], after[1, 0]) == (0.3, 0.3)


def test_targets_end_just_below_one(backend):
    """With the target r = 1 - 1e-8 both weights are 1 + (r sqrt(1 - rho^2) - rho sqrt(1 - r^2)) / sqrt(1 - r^2)."""
    method, target, rho = methods.get("gradvac"), 1 - 1e-8, -0.5
    ones = torch.ones(2, 2, dtype=torch.float64)
    method.load_state_dict({"targets": ones, "seed": 0, "step": torch.tensor(0)})
    weights = method.weights(torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64), backend=backend)
    sine = math.sqrt((1 - target) * (1 + target))
    expected = 1 + (target * math.sqrt(1 - rho**2) - rho * sine) / sine
    torch.testing.assert_close(weights, torch.full_like(weights, expected), rtol=1e-7, atol=0)


def test_gradvac_of_targets_of_one(backend):
    method = methods.get("gradvac", beta=1.0)
    method.weights(torch.ones(4, 4, dtype=torch.float64), backend=backend)
    assert method.state_dict()["targets"].sum() == 12
    assert method.weights(gradsurgery.gram(normal(4, 20)), backend=backend).isfinite().all()


def test_gradvac_state(backend):
    grams = torch.stack([gradsurgery.gram(normal(4, 20, seed=s)) for s in range(6)]).view(2, 3, 4, 4)
    first, second = methods.get("gradvac", beta=0.5, seed=1), methods.get("gradvac")
    first.weights(grams, backend=backend)
    second.load_state_dict(first.state_dict())
    second.beta = 0.5
    got, again = first.weights(grams, backend=backend), second.weights(grams, backend=backend)
    assert torch.equal(got, again)
    fresh = methods.get("gradvac")
    fresh.load_state_dict(methods.get("gradvac", seed=7).state_dict())
    assert fresh.state_dict()["targets"] is None
    assert fresh.seed == 7
    with pytest.raises(ValueError, match=r"is for weights of shape \(2, 3, 4\), got \(4,\)"):
        first.weights(grams[0, 0], backend=backend)
    with pytest.raises(ValueError, match=r"targets must be a tensor .*, got a tensor of shape \(3,\)"):
        fresh.load_state_dict({"targets": torch.ones(3), "seed": 0, "step": torch.tensor(0)})
    with pytest.raises(ValueError, match="step must be"):
        fresh.load_state_dict({"targets": torch.ones(2, 2), "seed": 0, "step": 0})
    assert fresh.state_dict() == {"targets": None, "seed": 7, "step": torch.tensor(0)}
