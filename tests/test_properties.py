# SPDX-License-Identifier: MIT
"""The properties that docs/methods.md states hold, and the page is the text generated from the classes."""

import math
from pathlib import Path

import pytest
import torch

import gradsurgery
from gradsurgery.backends import solvers
from gradsurgery.methods.__main__ import text
from inputs import hostile, normal

methods = gradsurgery.methods
NAMES = methods.available()
# Ridges so small that these methods must have the properties of their equations without a ridge.
OPTIONS = {"upgrad": {"reg_eps": 1e-10}, "dualproj": {"reg_eps": 1e-10}}


def direction(name, rows, losses=None):
    """The direction of the method's first step."""
    losses = torch.linspace(0.5, 1.5, len(rows), dtype=torch.float64) if losses is None else losses
    return gradsurgery.aggregate(rows, name, losses=losses, **OPTIONS.get(name, {}))


def with_value(attribute, *values):
    return [name for name in NAMES if getattr(methods.get(name), attribute) in values]


HELD = (
    'if normalization="none" or combine="normalized"',
    "up to reg_eps",
    "if T = 2",
    "if independent",
    "if not Pareto-stationary",
)


def conflicting(tasks, seed):
    rows = normal(tasks, 60, seed=seed)
    return rows - 1.3 * rows.mean(0) + 0.2 * normal(1, 60, seed=99)


def test_the_page_is_what_the_classes_say():
    assert (Path(__file__).parent.parent / "docs" / "methods.md").read_text() == text()


@pytest.mark.parametrize("tasks", [2, 3, 8, 20])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, OPTIONS.get(name, {})) for name in with_value("non_conflicting", *HELD)),
        ("cagrad", {"c": 1.0}),
        ("fairgrad", {"alpha": 20.0}),
        ("pcd", {"tau": 0.0}),
        *(("mgda", {"normalization": n, "combine": "normalized"}) for n in ("l2", "loss", "loss+")),
    ],
)
def test_conflicts_with_no_task(name, options, tasks):
    if methods.get(name).non_conflicting == "if T = 2" and tasks > 2:
        pytest.skip("for two tasks only")
    losses = torch.linspace(0.5, 1.5, tasks, dtype=torch.float64)
    for seed in range(5):
        rows = conflicting(tasks, seed)
        d = gradsurgery.aggregate(rows, name, losses=losses, **options)
        assert (rows @ d >= -1e-7 * rows.norm(dim=1) * d.norm()).all()


@pytest.mark.parametrize(("name", "cosine"), [("upgrad", -0.05), ("dualproj", -0.07)])
def test_a_ridge_lets_short_gradients_conflict(name, cosine):
    angle = math.radians(172)
    rows = torch.tensor([[1, 0], [0.1 * math.cos(angle), 0.1 * math.sin(angle)]], dtype=torch.float64)

    def found(**options):
        d = gradsurgery.aggregate(rows, methods.get(name, **options))
        return (rows[1] @ d / rows[1].norm() / d.norm()).item()

    assert found() == pytest.approx(cosine, abs=0.005)
    assert found(reg_eps=1e-8) > -1e-5


@pytest.mark.parametrize("length", [1e-3, 3e-3])
def test_config_takes_nearly_dependent_gradients_for_dependent(length):
    rows = torch.tensor([[1, 0, 0], [-0.5, 0.75**0.5, 0], [0, 0, 0]], dtype=torch.float64)
    rows[2] = -0.3 * rows[0] - 1.2 * rows[1]
    rows[2, 2] = length
    assert (rows @ gradsurgery.aggregate(rows, "config") > 0).all() == (length > 2e-3)


@pytest.mark.parametrize(("name", "options"), [("nash_mtl", {"max_norm": math.inf}), ("fairgrad", {})])
def test_opposite_gradients_add_nothing_to_what_the_others_gain(name, options):
    rows = torch.tensor([[1, 0, 0], [-3, 0, 0], [0, 1, 0], [0, 0, 100]], dtype=torch.float64)
    d = gradsurgery.aggregate(rows, methods.get(name, **options))
    torch.testing.assert_close(d, torch.tensor([0.0, 1, 1], dtype=torch.float64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_mgda_with_original_gradients_may_conflict(normalization):
    scales, losses = (torch.logspace(0, 2, 5, dtype=torch.float64).roll(k) for k in (0, 1))
    rows = scales[:, None] * conflicting(5, 1)
    assert (rows @ gradsurgery.aggregate(rows, "mgda", losses=losses, normalization=normalization)).min() < 0


def test_every_claim_is_known():
    assert set(NAMES) == set(with_value("non_conflicting", "no", *HELD, "if c >= 1", "if tau = 0, without opposites"))
    assert set(NAMES) == set(with_value("linear", True, False, "up to reg_eps"))


def directions(name, factors):
    """The directions of four steps with factors on the gradients."""
    method, losses = methods.get(name, **OPTIONS.get(name, {})), torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    steps = range(1, 5)
    return torch.stack([gradsurgery.aggregate(factors * conflicting(5, k), method, losses=losses / k) for k in steps])


@pytest.mark.parametrize("name", with_value("linear", True, "up to reg_eps"))
def test_linear_in_factors_on_the_gradients(name):
    a, b = 0.3, 1.7
    first, second = (0.5 + normal(1, 5, seed=s)[0].abs()[:, None] for s in (3, 4))
    both, apart = directions(name, a * first + b * second), a * directions(name, first) + b * directions(name, second)
    torch.testing.assert_close(both, apart)


@pytest.mark.parametrize("name", with_value("linear", False))
def test_not_linear_in_factors_on_the_gradients(name):
    first = torch.linspace(0.2, 6, 5, dtype=torch.float64)[:, None]
    second = first.flip(0)
    apart = directions(name, first) + directions(name, second)
    assert (directions(name, first + second) - apart).norm() > 1e-6 * apart.norm()


@pytest.mark.parametrize("name", ["nash_mtl", "config", "famo", "gls", "scale_invariant", "stch"])
def test_factors_on_losses_do_not_turn_the_direction(name):
    rows, losses = conflicting(5, 1), torch.linspace(0.5, 1.5, 5, dtype=torch.float64)
    factors = torch.tensor([1.0, 10.0, 0.1, 3.0, 100.0], dtype=torch.float64)
    one, other = direction(name, rows, losses), direction(name, factors[:, None] * rows, factors * losses)
    torch.testing.assert_close(one / one.norm(), other / other.norm())


@pytest.mark.parametrize(
    ("name", "rows"),
    [("imtl_g", [[1, 0.2, 0], [1, -0.2, 0], [1, 0, 0.05]]), ("config", [[1, 0], [-0.9, 0.1], [-0.9, -0.4]])],
)
def test_factors_on_losses_may_reverse_the_direction(name, rows):
    """ConFIG's direction may be reversed only if the gradients are dependent."""
    rows = torch.tensor(rows, dtype=torch.float64)
    one, other = direction(name, rows), direction(name, torch.tensor([[1.0], [1.0], [0.01]]).double() * rows)
    torch.testing.assert_close(one / one.norm(), -other / other.norm())
    if name == "imtl_g":
        assert (rows @ one > 0).all()
        assert (rows @ other < 0).all()


@pytest.mark.parametrize("granularity", ["per_group", "per_tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_methods_with_several_gram_matrices(name, granularity):
    method, sgd = methods.get(name), torch.optim.SGD([torch.nn.Parameter(torch.ones(2))])
    if method.weights_losses or "buffers" in method.state_dict():
        with pytest.raises(ValueError, match="which needs granularity 'global'"):
            gradsurgery.SurgeryOptimizer(sgd, method, granularity=granularity)
    else:
        gradsurgery.SurgeryOptimizer(sgd, method, granularity=granularity)


def test_pcgrad_without_conflicts_is_the_sum():
    rows = normal(4, 30).abs()
    torch.testing.assert_close(direction("pcgrad", rows), rows.sum(0))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "cagrad"])
def test_nothing_is_read_on_the_host(name):
    """Tensors on "meta" have no values, so reading one raises an error. test_cuda.py tests the compiled backends."""
    method = methods.get(name)
    losses = torch.ones(2, dtype=torch.float64, device="meta")
    grads = [[torch.ones(7, device="meta")] for _ in range(2)]
    for _ in range(2 if method.state_dict() else 1):
        gradsurgery.aggregate(grads, method, losses=losses)
    assert all(value.is_meta for value in method.state_dict().values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_hostile_gradients_have_a_direction_and_a_nan_is_one(name, tasks):
    losses = torch.linspace(0.5, 1.5, tasks, dtype=torch.float64)
    for case, rows in hostile(tasks).items():
        method = methods.get(name)
        for _ in range(2):
            assert gradsurgery.aggregate(rows, method, losses=losses).isfinite().all(), case
        rows[-1, 0] = torch.nan
        assert gradsurgery.aggregate(rows, method, losses=losses).isnan().any(), case


def test_cagrad_reads_nothing_on_the_host(monkeypatch):
    """CAGrad's many min-norm problems are left out: the test above covers one, as mgda."""
    monkeypatch.setattr(solvers, "wolfe", lambda gram, start: torch.ones_like(gram[..., 0]))
    gram, out = torch.ones(3, 3, dtype=torch.float64, device="meta"), torch.ones(3, dtype=torch.float64, device="meta")
    solvers.solve(gram, "cagrad", None, 0.5, float("inf"), out)


SCALES = {"sum": 1.0, "mean": 0.25, "mean, times 1 + c": 0.25 * 1.5}


@pytest.mark.parametrize("name", with_value("scale", *SCALES))
def test_scale_of_orthogonal_gradients(name):
    rows = 3 * torch.eye(4, 9, dtype=torch.float64)
    torch.testing.assert_close(direction(name, rows), SCALES[methods.get(name).scale] * rows.sum(0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", with_value("scale", "sums to 1", "sums to T"))
def test_sums_of_weights(name):
    rows, losses = conflicting(6, 2), torch.linspace(0.5, 1.5, 6, dtype=torch.float64)
    # An extra column for each task, 0 for all others, shows its weight; MoCo's weight is that of beta L_t g_t / |g_t|.
    marked = torch.cat([rows, torch.eye(6, dtype=torch.float64)], 1)
    weights = gradsurgery.aggregate(marked, name, losses=losses)[60:]
    if name == "moco":
        weights = weights * marked.norm(dim=1) / losses / methods.get(name).beta
    torch.testing.assert_close(float(weights.sum()), 1.0 if methods.get(name).scale == "sums to 1" else 6.0)
