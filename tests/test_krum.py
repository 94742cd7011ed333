# SPDX-License-Identifier: MIT
"""Krum and multi-Krum."""

import pytest
import torch

import gradsurgery
from inputs import DEVICE, normal


def explicit(rows: torch.Tensor, byzantine: int, selected: int) -> torch.Tensor:
    """Compute Krum's direction as in the paper, from the gradients themselves."""
    tasks = len(rows)
    scores = []
    for i in range(tasks):
        distances = sorted((rows[i] - rows[j]).square().sum().item() for j in range(tasks) if j != i)
        scores.append(sum(distances[: tasks - byzantine - 2]))
    best = sorted(range(tasks), key=lambda i: scores[i])[:selected]
    return rows[best].mean(0)


@pytest.mark.parametrize(("byzantine", "selected"), [(0, 1), (1, 1), (1, 4), (2, 3), (4, 7)])
@pytest.mark.parametrize("scale", [1e-12, 1, 1e12])
def test_equals_the_paper(byzantine, selected, scale):
    rows = normal(7, 40) * scale
    got = gradsurgery.aggregate(rows, "krum", num_byzantine=byzantine, num_selected=selected)
    torch.testing.assert_close(got, explicit(rows, byzantine, selected))


def test_outliers_are_left_out():
    rows = torch.ones(6, 50, dtype=torch.float64, device=DEVICE) + 0.01 * normal(6, 50)
    rows[1], rows[4] = 1e6, -1e3
    weights = gradsurgery.methods.get("krum", num_byzantine=2, num_selected=3).weights(rows @ rows.T)
    assert weights[[1, 4]].tolist() == [0, 0]
    assert (weights > 0).sum() == 3


def test_torchjd_selects_the_same_where_squares_do_not_matter():
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = torch.ones(6, 50, dtype=torch.float64, device=DEVICE) + 0.01 * normal(6, 50)
    rows[1] = 1e6
    theirs = aggregation.KrumWeighting(1, 5)(rows @ rows.T)
    torch.testing.assert_close(
        gradsurgery.methods.get("krum", num_byzantine=1, num_selected=5).weights(rows @ rows.T), theirs
    )


def test_torchjd_sums_distances_that_are_not_squared():
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = torch.tensor([[15.0], [14.0], [16.0], [8.0], [1.0], [17.0]], dtype=torch.float64, device=DEVICE)
    gram = rows @ rows.T
    # Distances from 15: 1, 1, 2, 7; from 14: 1, 2, 3, 6. The squares sum to 55 and 50.
    assert gradsurgery.methods.get("krum").weights(gram).tolist() == [0, 1, 0, 0, 0, 0]
    assert aggregation.KrumWeighting(0, 1)(gram).tolist() == [1, 0, 0, 0, 0, 0]


def test_equal_scores_go_to_the_first_tasks():
    for tasks in (1, 2, 3, 64):
        rows = torch.ones(tasks, 5, dtype=torch.float64, device=DEVICE)
        weights = gradsurgery.methods.get("krum").weights(rows @ rows.T)
        assert weights.tolist() == [1.0] + [0.0] * (tasks - 1)


def test_a_batch_is_its_problems():
    method = gradsurgery.methods.get("krum", num_byzantine=1, num_selected=2)
    rows = torch.stack([normal(5, 9, seed=s) for s in range(6)])
    grams = (rows @ rows.mT).view(2, 3, 5, 5)
    grams[1, 1, 0, 0] = torch.nan
    got = method.weights(grams)
    for b in range(2):
        for c in range(3):
            torch.testing.assert_close(got[b, c], method.weights(grams[b, c]), equal_nan=True, rtol=0, atol=0)
    assert got[1, 1].isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_byzantine": -1}, "num_byzantine must be an int >= 0"),
        ({"num_selected": 0}, "num_selected must be an int >= 1"),
        ({"num_byzantine": 3}, "needs at least 6 tasks, got 5"),
        ({"num_selected": 6}, "needs at least 6 tasks, got 5"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        gradsurgery.methods.get("krum", **options).weights(torch.eye(5, dtype=torch.float64, device=DEVICE))
