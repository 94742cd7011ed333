# SPDX-License-Identifier: MIT
"""Methods whose weights a solver computes from G: golden values, the conditions of their problems, hostile inputs."""

import math

import numpy as np
import pytest
import torch

import gradsurgery
from conftest import USABLE
from gradsurgery.backends import problems, reference, spectral
from inputs import DEVICE, HOSTILE, hostile, normal

methods = gradsurgery.methods
TASKS = (1, 2, 5, 33)
SOLVED = ("upgrad", "dualproj", "cagrad", "nash_mtl", "fairgrad", "imtl_g", "config", "aligned_mtl")
# The matrix with which TorchJD's tests pin the values of its aggregators.
GOLDEN = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
GOLDEN_VALUES = {
    "upgrad": ([1.1109, 0.7894], [0.2929, 1.9004, 1.9004]),
    "dualproj": ([0.6109, 0.5], [0.5563, 1.1109, 1.1109]),
    "cagrad": ([0.7041, 0.5], [0.1835, 1.2041, 1.2041]),
    "nash_mtl": ([0.5915 / 2**0.5, 0.4071 / 2**0.5], [0.0542, 0.7061, 0.7061]),
    "imtl_g": ([0.5923, 0.4077], [0.0767, 1.0, 1.0]),
    "config": (None, [0.1588, 2.0706, 2.0706]),
    "aligned_mtl": ([0.5591, 0.4083], [0.2133, 0.9673, 0.9673]),
}


def weigh(name, gram, backend=None, **options):
    return methods.get(name, **options).weights(gram, backend=backend)


@pytest.mark.parametrize("method", GOLDEN_VALUES)
def test_golden_values(backend, method):
    weights, direction = GOLDEN_VALUES[method]
    got = weigh(method, gradsurgery.gram(GOLDEN), backend)
    if weights:
        torch.testing.assert_close(got, torch.tensor(weights).double(), atol=1e-4, rtol=0)
    got = gradsurgery.aggregate(GOLDEN, method, backend=backend)
    torch.testing.assert_close(got, torch.tensor(direction), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", [*SOLVED, "krum", "mgda", "pcgrad"])
def test_weights_of_the_longest_and_shortest_gradients(backend, method):
    """Scaling the gradients, up to squared lengths of 2^-900 or 2^1000, may change only the size of the weights."""
    gram = gradsurgery.gram(normal(4, 8, torch.float64))
    expected = torch.nn.functional.normalize(weigh(method, gram, backend), dim=0)
    squares = gram.diagonal()
    for power in (-900 - squares.min().log2().floor(), 1000 - squares.max().log2().ceil()):
        scaled = torch.ldexp(gram, 2 * torch.div(power, 2, rounding_mode="trunc"))
        got = weigh(method, scaled, backend)
        torch.testing.assert_close(got / got.abs().max(), expected / expected.abs().max(), rtol=1e-9, atol=1e-9)


def assert_dualproj_is_optimal(gram, backend, ridge):
    """Assert the optimality conditions: v >= u, H v >= 0, (v - u) . (H v) = 0."""
    tasks = len(gram)
    u = torch.linspace(0.5, 1.5, tasks, dtype=torch.float64) / tasks
    v = weigh("dualproj", gram, backend, pref=u, reg_eps=ridge)
    h = torch.where(gram.trace() > 0, gram / gram.trace(), 0) + ridge * torch.eye(tasks)
    slack, size = h @ v, (v @ h @ v).sqrt()
    assert (v >= u).all()
    assert (slack >= -1e-8 * size).all()
    assert ((v - u) * slack).abs().max() <= 1e-8 * (v - u).max() * size


@pytest.mark.parametrize("ridge", [1e-4, 1e-8])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_dualproj_is_optimal(backend, tasks, case, ridge):
    assert_dualproj_is_optimal(gradsurgery.gram(hostile(tasks)[case]), backend, ridge)


@pytest.mark.parametrize("conflict", [1e-2, 1e-4, 1e-6])
def test_dualproj_of_a_slight_conflict(backend, conflict):
    product = -1 / 3 * (1 + conflict)  # at -1/3, sum_t u_t g_t is orthogonal to g_1, as u = (1/4, 3/4)
    gram = torch.tensor([[1, product], [product, 4]], dtype=torch.float64, device=DEVICE)
    assert_dualproj_is_optimal(gram, backend, 1e-12)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("tasks", [16, 33, 64])
def test_dualproj_where_pivots_go_round(backend, tasks, seed):
    """With about twice as many tasks as parameters, block pivoting mostly cycles and never ends."""
    assert_dualproj_is_optimal(gradsurgery.gram(normal(tasks, tasks // 2 + 1, seed=seed)), backend, 1e-8)


@pytest.mark.parametrize("method", ["upgrad", "dualproj"])
def test_a_ridge_that_rounding_swallows(backend, method):
    rows = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-3.0, 0.5]], dtype=torch.float64)
    d = weigh(method, gradsurgery.gram(rows), backend, reg_eps=1e-17) @ rows
    expected = weigh(method, gradsurgery.gram(rows), backend, reg_eps=1e-9) @ rows
    torch.testing.assert_close(d, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_upgrad_is_the_sum_of_projections(backend, tasks, case):
    gram = gradsurgery.gram(hostile(tasks)[case])
    pref = torch.linspace(0.5, 1.5, tasks, dtype=torch.float64)
    parts = [weigh("dualproj", gram, backend, pref=pref[t] * torch.eye(tasks)[t].double()) for t in range(tasks)]
    got = weigh("upgrad", gram, backend, pref=pref)
    torch.testing.assert_close(got, torch.stack(parts).sum(0), rtol=1e-9, atol=1e-11)


def test_a_negative_preference_of_upgrad_counts_as_0(backend):
    gram = gradsurgery.gram(normal(3, 8, torch.float64))
    got, expected = (weigh("upgrad", gram, backend, pref=[first, 1.0, 0.5]) for first in (-2.0, 0.0))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_upgrad_of_two_tasks_is_pcgrad(backend):
    for seed in range(10):
        gram = gradsurgery.gram(normal(2, 5, seed=seed))
        got = weigh("upgrad", gram, backend, pref=[1, 1], reg_eps=1e-12)
        torch.testing.assert_close(got, gradsurgery.pcgrad_weights(gram), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_fairgrad_solves_its_equation(backend, tasks, case, alpha):
    gram = gradsurgery.gram(hostile(tasks)[case])
    w = weigh("fairgrad", gram, backend, alpha=alpha)
    norms = gram.diagonal().sqrt()
    assert w.isfinite().all()
    assert torch.equal(w > 0, norms > 0)
    kept = norms > 0
    if not kept.any():
        return
    cosines = (gram / norms[:, None] / norms)[kept][:, kept]
    shortest = gradsurgery.min_norm_weights(cosines)
    if shortest @ cosines @ shortest > 1e-8:  # else there is no solution
        product = (gram @ w)[kept]
        ridge = 2e-12 * (gram.abs() @ w)[kept] / product  # the solver's, and rounding where terms cancel
        assert ((product * w[kept] ** (1 / alpha) - 1).abs() <= 1e-8 + ridge).all()
    elif alpha == 1:
        assert (w @ gram @ w).clamp(min=0).sqrt() <= math.sqrt(tasks) + 1e-6


@pytest.mark.interpreted_whole
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_nash_mtl_is_fairgrad_on_a_leash(backend, tasks, case):
    gram = gradsurgery.gram(hostile(tasks)[case])
    free = weigh("fairgrad", gram, backend)
    assert torch.equal(weigh("nash_mtl", gram, backend, max_norm=math.inf), free)
    for max_norm in (1.0, 100.0):
        w = weigh("nash_mtl", gram, backend, max_norm=max_norm)
        factor = w.sum() / free.sum() if gram.trace() > 0 else 1
        torch.testing.assert_close(w, factor * free)
        # |d| is sqrt(T), or less if there is no solution, up to the rounding of large weights.
        norm = (free @ gram @ free).clamp(min=0).sqrt()
        error = 1e-7 * (free * gram.diagonal().sqrt()).sum()
        assert norm <= math.sqrt(tasks) + error
        assert (w @ gram @ w).clamp(min=0).sqrt() <= max_norm + error
        assert factor == 1 or factor * norm >= max_norm * (1 - 1e-9) - error


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_imtl_g_and_config_solve_the_cosines(backend, tasks, case):
    gram = gradsurgery.gram(hostile(tasks)[case]).cpu()
    norms = gram.diagonal().sqrt()
    kept = norms > 0
    cosines = torch.zeros_like(gram)
    cosines[kept[:, None] & kept] = (gram / norms[:, None] / norms)[kept[:, None] & kept]
    pref = torch.linspace(0.5, 1.5, tasks, dtype=torch.float64, device="cpu")
    for name, p in (("imtl_g", torch.ones_like(pref)), ("config", pref)):
        options = {"pref": pref} if name == "config" else {}
        w = weigh(name, gram.to(DEVICE), backend, **options).cpu()
        c = torch.linalg.pinv(cosines, hermitian=True, rtol=2.0**-23 * tasks) @ p
        u = torch.where(kept, c / norms, 0)
        # If p has no part in the range of the matrix of cosines, no direction exists: the weights are 0.
        solvable = (cosines @ c).norm() > 1e-9
        if name == "imtl_g":
            expected = u / u.sum() if solvable and u.sum().abs() > 1e-12 * u.abs().sum() else 0 * u
        else:
            unit = u / (c @ cosines @ c).sqrt() if solvable else 0 * u
            expected = (gram @ unit).sum() * unit
        error, size = w - expected, (expected @ gram @ expected).clamp(min=0).sqrt()
        assert (error @ gram @ error).clamp(min=0).sqrt() <= 1e-6 * size + 1e-12 * norms.max()
        if case == "normal" and tasks <= 5:
            product = gram @ w / norms
            torch.testing.assert_close(product / product.mean(), p / p.mean(), rtol=1e-8, atol=0)
            assert name == "config" or abs(w.sum() - 1) < 1e-12


# If pivots are mere rounding errors, exchanges leave noise in place of the inverse. Its trace does not show that.
@pytest.mark.parametrize("seed", [43, pytest.param(101, marks=pytest.mark.interpreted_whole)])
def test_cosines_of_half_as_many_dimensions(backend, seed):
    random = np.random.default_rng(seed)
    rows = torch.from_numpy(random.standard_normal((32, int(random.integers(1, 32))))).to(DEVICE)
    gram = rows @ rows.mT
    direction = weigh("config", gram.cpu(), "reference").to(DEVICE) @ rows
    torch.testing.assert_close(
        weigh("config", gram, backend) @ rows, direction, rtol=1e-6, atol=1e-6 * direction.norm().item()
    )


def test_lengths_whose_squares_are_subnormal(backend):
    """Compared with the others, the first gradient counts as 0: the other two get weights as if alone."""
    rows = torch.tensor([[1, 2, 0], [3, 0, 1], [0, 1, 2]], dtype=torch.float64, device=DEVICE)
    rows[0] *= 1e-160
    weights = weigh("aligned_mtl", gradsurgery.gram(rows), backend)
    expected = 2 / 3 * weigh("aligned_mtl", gradsurgery.gram(rows[1:]), backend)
    torch.testing.assert_close(weights, torch.cat([torch.zeros_like(weights[:1]), expected]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["imtl_g", "config"])
def test_opposite_gradients_have_no_common_angle(backend, name):
    rows = normal(6, 40)
    both = torch.cat([rows, -torch.linspace(0.3, 3, 6, dtype=torch.float64)[:, None] * rows])
    assert (weigh(name, gradsurgery.gram(both), backend) == 0).all()


@pytest.mark.parametrize("least", [1e-6, 2e-5, 6e-5, 1e-4, 1e-2])
@pytest.mark.parametrize("tasks", [3, 16])
def test_cosines_near_the_cutoff(backend, tasks, least):
    """Two almost equal gradients give one small eigenvalue, here below or above T 2^-23 times the largest."""
    rows = (1 - 0.1 * (tasks - 1) / tasks) ** 0.5 * torch.ones(tasks, 1, dtype=torch.float64)
    rows = torch.cat([rows, 0.3 * torch.eye(tasks, dtype=torch.float64)], 1)
    rows[-1] = rows[-2]
    rows[-1, -1] += (2 * least) ** 0.5
    rows = rows * torch.logspace(-2, 2, tasks, dtype=torch.float64)[:, None]
    gram, pref = rows @ rows.T, normal(1, tasks)[0].abs() + 0.1
    norms = gram.diagonal().sqrt()
    cosines = gram / norms[:, None] / norms
    values = torch.linalg.eigvalsh(cosines)
    assert 0.5 * least < values[0] < 2 * least
    c = torch.linalg.pinv(cosines, hermitian=True, rtol=2.0**-23 * tasks) @ pref
    a = c / norms / (c @ cosines @ c).sqrt()
    expected = (gram @ a).sum() * a
    torch.testing.assert_close(weigh("config", gram, backend, pref=pref.tolist()), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_aligned_mtl_makes_components_equally_long(backend, tasks, case, mode):
    """B G B = s P: column t of B has the weights for ``pref`` = e_t, P projects on the eigenvectors that count."""
    gram = gradsurgery.gram(hostile(tasks)[case]).cpu()
    eye = torch.eye(tasks, dtype=torch.float64, device="cpu")
    columns = [weigh("aligned_mtl", gram.to(DEVICE), backend, pref=row, scale_mode=mode).cpu() for row in eye]
    b = torch.stack(columns, 1)
    values, vectors = torch.linalg.eigh(gram)
    kept = values > 2.0**-23 * tasks * values.max()
    if not kept.any():
        assert torch.equal(b, eye)
        return
    counted = values[kept]
    scale = {"min": counted.min(), "median": counted.median(), "rmse": counted.mean()}[mode]
    projection = vectors[:, kept] @ vectors[:, kept].T
    # The least eigenvalues are known to 1e-16 of the largest one.
    error = 1e-12 * values.max() / counted.min()
    torch.testing.assert_close(b @ gram @ b, scale * projection, rtol=0, atol=float(scale * (1e-9 + error)))


def test_the_median_of_equal_eigenvalues(backend):
    values = torch.tensor([1.0, 1.0, 2.0, 9.0], dtype=torch.float64, device=DEVICE)
    expected = 0.25 / values.sqrt()  # of an even number of values, the median is the lower middle one
    torch.testing.assert_close(weigh("aligned_mtl", values.diag(), backend, scale_mode="median"), expected)


@pytest.mark.parametrize(("tasks", "columns"), [(130, 60), (130, 300), (256, 1000)])
@pytest.mark.parametrize("method", ["aligned_mtl", "config", "imtl_g"])
def test_eigenvalues_of_many_tasks(method, tasks, columns):
    gram = gradsurgery.gram(normal(tasks, columns))
    torch.testing.assert_close(weigh(method, gram), weigh(method, gram, "reference"), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e6, 1e20])
@pytest.mark.parametrize("method", [*SOLVED, "gradvac"])
@pytest.mark.parametrize("tasks", [2, 5])
def test_scaling_the_gradients_scales_the_direction(backend, tasks, method, scale):
    rows = hostile(tasks)["conflicting"] + 0.1 * normal(tasks, 37, seed=9)
    options = {"alpha": 2.0} if method == "fairgrad" else {}
    power = {"nash_mtl": 0, "fairgrad": (1 - 2) / (1 + 2)}.get(method, 1)
    base = gradsurgery.aggregate(rows, method, backend=backend, **options)
    scaled = gradsurgery.aggregate(rows * scale, method, backend=backend, **options) / scale**power
    assert (scaled - base).norm() <= 1e-9 * base.norm()


@pytest.mark.not_interpreted
@pytest.mark.parametrize("method", [*SOLVED, "gradvac"])
def test_a_batch_is_its_problems(backend, method):
    tasks = 5
    grams = torch.stack([gradsurgery.gram(rows) for rows in list(hostile(tasks).values()) * 2])
    grams = grams[:24].reshape(4, 6, tasks, tasks)
    grams[1, 2, 0, 0] = torch.nan
    grams[3, 1, 0, 1] = torch.inf
    batched = weigh(method, grams, backend)
    assert batched.shape == grams.shape[:-1]
    for index in torch.cartesian_prod(torch.arange(4), torch.arange(6)).tolist():
        gram, got = grams[tuple(index)], batched[tuple(index)]
        one = weigh(method, gram, backend)
        assert one.isfinite().all() == gram.isfinite().all()
        if backend == "reference":  # batched matrix products may sum in another order
            error = torch.nan_to_num(one - got)
            norm = torch.nan_to_num(gram).diagonal().max()
            assert (error @ torch.nan_to_num(gram) @ error).abs() <= 1e-9 * max(norm, 1)
        else:
            torch.testing.assert_close(got, one, rtol=0, atol=0, equal_nan=True)
    assert weigh(method, grams[:0, 0], backend).shape == (0, tasks)


@pytest.mark.parametrize("method", [*SOLVED, "gradvac"])
@pytest.mark.parametrize("tasks", [1, 2, 64])
def test_any_number_of_tasks(method, tasks):
    rows = normal(tasks, 100)
    weights = weigh(method, gradsurgery.gram(rows))
    assert weights.isfinite().all()
    if tasks == 1:
        expected = {"nash_mtl": 1 / rows.norm(), "fairgrad": 1 / rows.norm(), "cagrad": 1.5}.get(method, 1.0)
        torch.testing.assert_close(float(weights), float(expected), rtol=1e-3, atol=0)


@pytest.mark.skipif("triton" not in USABLE, reason="Triton is not usable here")
@pytest.mark.parametrize("method", [*SOLVED, "gradvac", "krum"])
def test_triton_has_the_reference(method):
    gram = gradsurgery.gram(hostile(3)["conflicting"] + 0.1 * normal(3, 37, seed=9))
    torch.testing.assert_close(weigh(method, gram, "triton"), weigh(method, gram, "reference"))


@pytest.mark.parametrize("method", ["mgda", "upgrad", "cagrad", "nash_mtl", "pcd", "aligned_mtl", "krum"])
def test_the_reference_iterates_where_values_are_at_hand(monkeypatch, method):
    gram, seen = torch.eye(5, dtype=torch.float64, device=DEVICE), []
    options = {"num_byzantine": 1} if method == "krum" else {}
    want = gradsurgery.aggregate(gram, method, backend="reference", **options)
    monkeypatch.setattr(reference, "at_hand", lambda gram: seen.append(gram) or gram.cpu())
    got = gradsurgery.aggregate(gram, method, backend="reference", **options)
    assert torch.equal(got, want)
    assert len(seen) == (method != "krum")


@pytest.mark.parametrize("why", [None, "capturing", "is_watched"])
def test_values_are_at_hand_unless_a_graph_is_captured(monkeypatch, why):
    class OnGpu:
        device = torch.device("cuda")

        def cpu(self):
            return "on the host"

    for name in ("capturing", "is_watched"):
        monkeypatch.setattr(problems, name, lambda *_, name=name: name == why)
    gram = OnGpu()
    assert problems.at_hand(gram) == (gram if why else "on the host")
    here = torch.eye(2)
    assert problems.at_hand(here) is here


@pytest.mark.parametrize("tasks", [1, 2, 3, 9])
def test_jacobi_is_an_eigendecomposition(tasks):
    """The reference uses it on a GPU, where ``torch.linalg.eigh`` would synchronise."""
    grams = torch.stack([gradsurgery.gram(rows) for name, rows in hostile(tasks).items() if name not in ("huge",)])
    grams = grams / grams.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-300)[:, None, None]
    values, rows = spectral.jacobi(grams)
    torch.testing.assert_close((rows.mT * values[:, None]) @ rows, grams, rtol=0, atol=1e-13)
    expected = torch.linalg.eigvalsh(grams).clamp(min=0)
    torch.testing.assert_close(values.sort(-1).values, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("upgrad", {"reg_eps": 0.0}, "reg_eps must be positive and finite, got 0.0"),
        ("dualproj", {"reg_eps": math.inf}, "reg_eps must be positive and finite, got inf"),
        ("dualproj", {"pref": [1.0, math.nan]}, "pref must be T finite numbers"),
        ("config", {"pref": [[1.0, 2.0]]}, "pref must be T finite numbers"),
        ("cagrad", {"c": -1.0}, "c must be >= 0 and finite, got -1.0"),
        ("cagrad", {"c": 1e31}, r"c must be at most 1e30, got 1e\+31"),
        ("cagrad", {"rescale": 3}, "rescale must be one of 0, 1, 2, got 3"),
        ("nash_mtl", {"max_norm": 0.0}, "max_norm must be > 0, got 0.0"),
        ("fairgrad", {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
        ("aligned_mtl", {"scale_mode": "max"}, "scale_mode must be one of min, median, rmse, got 'max'"),
        ("gradvac", {"beta": 1.5}, "beta must be >= 0 and <= 1, got 1.5"),
    ],
)
def test_options_that_cannot_be(method, options, message):
    with pytest.raises(ValueError, match=message):
        methods.get(method, **options)


def test_a_preference_for_another_number_of_tasks():
    with pytest.raises(ValueError, match="pref must hold one number for each of 2 tasks, got 3"):
        weigh("upgrad", torch.eye(2, dtype=torch.float64), pref=[1, 2, 3])
