# SPDX-License-Identifier: MIT
"""The methods of solvers for a G that float32 rounded, so that dependent gradients seem to have negative squares."""

import numpy as np
import pytest
import torch

import gradsurgery
from inputs import DEVICE, normal
from test_gram_methods import weigh


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("tasks", [2, 5, 9, 16])
def test_fairgrad_of_opposite_gradients_whose_gram_matrix_is_rounded(backend, tasks, alpha):
    """The function to minimize is not convex; it is with T 2^-23 or a few times as much on the cosines."""
    rows = normal(tasks, 40)
    rows[1:] = -torch.linspace(0.3, 0.9, tasks - 1, dtype=torch.float64)[:, None] * rows[0]
    for noise in (0, 1e-5):
        gram = gradsurgery.gram(rows).float().double()
        gram[1:, 1:] *= 1 - noise * (1 - torch.eye(tasks - 1))
        w = weigh("fairgrad", gram, backend, alpha=alpha)
        assert w.isfinite().all()
        assert (w > 0).all()
        norms = gram.diagonal().sqrt()
        cosines = (gram / norms[:, None] / norms).clamp(-1, 1)
        solved = False
        for ridge in (1e-12, *(tasks * 2.0**-23 * 8**k for k in range(3))):
            product = norms * ((cosines + ridge * torch.eye(tasks)) @ (norms * w))
            error = (product * w ** (1 / alpha) - 1).abs().max()
            solved |= bool(error <= 1e-8 + 4e-15 / ridge)  # and rounding, where terms cancel
        assert solved


@pytest.mark.parametrize("seed", range(31, 37))
def test_projections_by_a_gram_matrix_that_is_not_quite_positive(backend, seed):
    random = np.random.default_rng(seed)
    tasks = int(random.integers(3, 10))
    rows = random.standard_normal((tasks, int(random.integers(1, tasks)))).astype(np.float32)
    for case in (rows, either_sign(tasks, seed)):
        gram = torch.from_numpy(case @ case.T).double().to(DEVICE)
        for name, options in (("dualproj", {"reg_eps": 1e-12}), ("upgrad", {"reg_eps": 1e-9}), ("cagrad", {})):
            got, expected = weigh(name, gram, backend, **options), weigh(name, gram, "reference", **options)
            # Which ridge makes it positive depends on rounding, and what it is counts less.
            assert expected.norm() / 3 <= got.norm() <= 3 * expected.norm(), name


def either_sign(tasks, seed):
    """One vector with either sign, to four digits."""
    random = np.random.default_rng(seed)
    signs = random.choice([-1, 1], (tasks, 1))
    rows = signs * random.standard_normal((1, 200)) + 1e-4 * random.standard_normal((tasks, 200))
    return rows.astype(np.float32)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("tasks", "columns"), [(5, 1), (8, 1), (8, 3), (17, 1), (17, 3), (33, 16), (8, None)])
def test_cagrad_stays_in_its_ball_whatever_the_rounding(backend, tasks, columns, seed):
    """G in float32 of dependent gradients has errors that far out in the search for lambda are all there is."""
    if columns is None:
        rows = torch.from_numpy(either_sign(tasks, seed)).to(DEVICE)
    else:
        rows = normal(tasks, columns, torch.float32, seed)
    gram = (rows @ rows.T).double()
    w = weigh("cagrad", gram, backend, c=0.5)
    mean = rows.double().mean(0)
    assert (w @ rows.double() - mean).norm() <= 0.5 * mean.norm() * 1.01
