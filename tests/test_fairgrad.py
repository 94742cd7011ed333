# SPDX-License-Identifier: MIT
"""FairGrad where weights differ by hundreds of orders of magnitude: large alpha, and norms that differ."""

import pytest
import torch

import gradsurgery
from conftest import INTERPRETED
from inputs import DEVICE, normal
from test_gram_methods import weigh


def test_a_weight_that_is_all_but_nothing(backend):
    """The expected values were computed with 300 digits."""
    rows = torch.tensor([[-1.0, 1, 2], [100, -200, -300], [-3000, -2000, 2000]], dtype=torch.float64, device=DEVICE)
    w = weigh("fairgrad", gradsurgery.gram(rows), backend, alpha=50.0)
    expected = torch.tensor([4.559, 0.02932], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(w[:2], expected, rtol=2e-4, atol=0)
    assert 1e-196 < w[2] < 1e-195
    d = w @ rows
    cosines = rows @ d / rows.norm(dim=1) / d.norm()
    expected = torch.tensor([0.188, 0.00136, 0.935], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(cosines, expected, rtol=5e-3, atol=0)


def test_steps_that_lead_away_at_first(backend):
    """Some steps increase the equation's error at first; a solver that shortened them would run out of steps."""
    rows = torch.tensor([[-1.0, 4, -2], [-400, -400, -800], [10, 40, 0]], dtype=torch.float64, device=DEVICE)
    gram = gradsurgery.gram(rows)
    w = weigh("fairgrad", gram, backend, alpha=50.0)
    torch.testing.assert_close((gram @ w) * w ** (1 / 50), torch.ones_like(w), rtol=1e-9, atol=0)


def test_problems_of_many_steps(backend):
    """Eight gradients in four dimensions. After 100 steps |d| was 121; the expected value is that after 5,000."""
    if INTERPRETED and backend == "triton":
        pytest.skip("takes a quarter of a minute")
    rows = torch.tensor([[3, -2.5, -3.5, -2], [-2, 6, -1, -8], [-0.75, 0.5, 1.5, 1]], dtype=torch.float64) * 1024
    small = [[144, -96, 112, -128], [1 / 8, -1 / 2, -3 / 4, 3 / 8], [-1, 1 / 4, -5 / 4, -7 / 4]]
    least = [[5 / 1024, -1 / 1024, 3 / 1024, 3 / 1024], [1 / 16, -1 / 128, -5 / 128, 3 / 128]]
    rows = torch.cat([rows, torch.tensor(small + least, dtype=torch.float64)]).to(DEVICE)
    d = weigh("fairgrad", gradsurgery.gram(rows), backend, alpha=50.0) @ rows
    assert d.norm().item() == pytest.approx(70.2451, rel=1e-3)


@pytest.mark.parametrize("alpha", [1.0, 5.0, 50.0, 100.0])
@pytest.mark.parametrize("tasks", [2, 5, 8])
def test_the_equation_holds_for_norms_that_differ(backend, tasks, alpha):
    rows = []
    for seed in range(1 if INTERPRETED and backend == "triton" else 20):
        ratio = 10.0 ** (seed % 4 if alpha > 50 else seed % 7)
        lengths = ratio ** torch.linspace(0, 1, tasks, dtype=torch.float64, device=DEVICE)
        rows.append(lengths[:, None] * normal(tasks, tasks + 1 + seed, seed=seed))
    weights = weigh("fairgrad", torch.stack([gradsurgery.gram(each) for each in rows]), backend, alpha=alpha)
    for each, w in zip(rows, weights, strict=True):
        lengths, product = each.norm(dim=1), gradsurgery.gram(each) @ w
        # Where w_t g_t is far below the rounding error of d, the computed (G w)_t cannot be right.
        counts = w * lengths > 1e-200 * (w @ each).norm()
        solved = (product * w ** (1 / alpha))[counts]
        torch.testing.assert_close(solved, torch.ones_like(solved), rtol=1e-6, atol=0)
        assert (product > -1e-9 * lengths * (w @ each).norm()).all()
