# SPDX-License-Identifier: MIT
"""Agreement with the public implementations, where they are right."""

import random

import pytest
import torch

import gradsurgery
from conftest import on_cpu
from inputs import hostile, normal

torchjd = pytest.importorskip("torchjd.aggregation")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

pytestmark = on_cpu


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("case", ["normal", "conflicting", "parallel", "zero row"])
def test_torchjd_pcgrad_with_the_same_orders(backend, tasks, case):
    rows = hostile(tasks)[case]
    torch.manual_seed(42)
    order = torch.stack([torch.randperm(tasks) for _ in range(tasks)])
    torch.manual_seed(42)
    expected = torchjd.PCGrad()(rows)
    weights = gradsurgery.pcgrad_weights(gradsurgery.gram(rows), order=order, backend=backend)
    torch.testing.assert_close(gradsurgery.combine(rows, weights), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("case", ["normal", "conflicting", "mixed scales", "more tasks than parameters"])
def test_torchjd_mgda_is_our_frank_wolfe(backend, tasks, case):
    rows = hostile(tasks)[case]
    gram = gradsurgery.gram(rows)
    theirs = torchjd.MGDAWeighting(epsilon=1e-3, max_iters=100)(gram)
    ours = gradsurgery.min_norm_weights(gram, solver="frank_wolfe", max_iter=100, tol=1e-3, backend=backend)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_our_exact_minimum_is_below_torchjds():
    gaps = []
    for seed in range(10):
        rows = normal(17, 30, seed=seed)
        gram = rows @ rows.T
        theirs, ours = torchjd.MGDAWeighting()(gram), gradsurgery.min_norm_weights(gram)
        gaps.append(float(theirs @ gram @ theirs / (ours @ gram @ ours)))
    assert min(gaps) >= 1 - 1e-12
    assert max(gaps) > 1.001  # theirs stops early


def made(make):
    """Return what ``make`` builds from TorchJD; skip the test if a package that TorchJD needs is missing."""
    try:
        return make()
    except ImportError as error:
        pytest.skip(str(error))


PARITY = {
    "upgrad": (lambda: torchjd.UPGradWeighting(), {}, 1e-12),
    "dualproj": (lambda: torchjd.DualProjWeighting(), {}, 1e-12),
    "imtl_g": (lambda: torchjd.IMTLGWeighting(), {}, 1e-12),
    "aligned_mtl": (lambda: torchjd.AlignedMTLWeighting(), {}, 1e-12),
    "aligned_mtl median": (lambda: torchjd.AlignedMTLWeighting(scale_mode="median"), {"scale_mode": "median"}, 1e-12),
    "aligned_mtl rmse": (lambda: torchjd.AlignedMTLWeighting(scale_mode="rmse"), {"scale_mode": "rmse"}, 1e-12),
    "fairgrad": (lambda: torchjd.FairGradWeighting(2.0), {"alpha": 2.0}, 1e-6),
    # Their solver, an interior-point method, stops at a relative error of about 1e-4.
    "cagrad": (lambda: torchjd.CAGradWeighting(c=0.4), {"c": 0.4}, 2e-3),
}


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("tasks", [2, 3, 8, 17])
@pytest.mark.parametrize("name", PARITY)
def test_torchjd_weights_of_independent_gradients(backend, tasks, name):
    make, options, tolerance = PARITY[name]
    weighting = made(make)
    rows = normal(tasks, 40) - 1.2 * normal(tasks, 40).mean(0)
    gram = gradsurgery.gram(rows)
    ours = gradsurgery.methods.get(name.split()[0], **options).weights(gram, backend=backend)
    theirs = weighting(gram)
    assert ((ours - theirs) @ rows).norm() <= tolerance * (theirs @ rows).norm()


@pytest.mark.parametrize("tasks", [2, 3, 17])
def test_torchjd_aggregators_of_independent_gradients(backend, tasks):
    rows = normal(tasks, 40) + 0.5 * normal(1, 40, seed=9)
    for name, make in (("config", torchjd.ConFIG), ("nash_mtl", lambda: torchjd.NashMTL(n_tasks=tasks))):
        ours, theirs = gradsurgery.aggregate(rows, name, backend=backend), made(make)
        assert (ours - theirs(rows)).norm() <= 1e-6 * ours.norm()


def test_torchjd_nash_mtl_may_end_far_from_its_equation():
    torch.manual_seed(0)
    rows = torch.randn(8, 40, dtype=torch.float64)
    rows -= 1.2 * rows.mean(0)
    residuals = []
    for direction in (made(lambda: torchjd.NashMTL(n_tasks=8))(rows), gradsurgery.aggregate(rows, "nash_mtl")):
        gains = rows @ direction
        weights = torch.linalg.lstsq(rows.T, direction[:, None]).solution[:, 0]
        products = gains * weights  # the same for all tasks in Nash's solution
        residuals.append(float(products.std() / products.mean().abs()))
    assert residuals[1] < 1e-9
    assert residuals[0] > 1e-2


@pytest.mark.parametrize("scale", [5e-4, 1e-8])
def test_torchjd_gives_up_on_small_gradients(scale):
    """TorchJD's thresholds are absolute; ours scale with the gradients."""
    rows = (normal(3, 40) - 1.2 * normal(3, 40).mean(0)) * scale
    gram = gradsurgery.gram(rows)
    assert gram.trace() < 1e-4
    for name, make in (("upgrad", torchjd.UPGradWeighting), ("dualproj", torchjd.DualProjWeighting)):
        theirs = made(make)
        torch.testing.assert_close(theirs(gram), torch.full((3,), 1 / 3, dtype=torch.float64))
        ours = gradsurgery.methods.get(name).weights(gram)
        torch.testing.assert_close(ours, gradsurgery.methods.get(name).weights(gram / scale**2))
        assert (ours > 0.334).any()
    assert made(lambda: torchjd.CAGradWeighting(c=0.5))(gram).tolist() == [0, 0, 0]
    assert (gradsurgery.methods.get("cagrad").weights(gram) > 0.3).all()


@pytest.mark.parametrize("name", ["AlignedMTL", "IMTLG"])
def test_torchjd_raises_where_ours_are_nan(name):
    rows = normal(3, 40)
    rows[1, 2] = torch.nan
    with pytest.raises(torch.linalg.LinAlgError):
        getattr(torchjd, name)()(rows)
    ours = {"AlignedMTL": "aligned_mtl", "IMTLG": "imtl_g"}[name]
    assert gradsurgery.aggregate(rows, ours).isnan().all()


@pytest.mark.parametrize("seed", range(5))
def test_pytorch_optimizer_pcgrad_with_two_tasks(seed):
    # With two tasks pytorch_optimizer's shuffle and its visit of j = i change nothing; one parameter means no heads.
    results = []
    for wrap in (
        lambda o: pytorch_optimizer.PCGrad(o, reduction="sum"),
        lambda o: gradsurgery.PCGrad(o, reduction="sum"),
    ):
        random.seed(seed)
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
        targets = torch.randn(2, 50, dtype=torch.float64)
        optimizer = wrap(torch.optim.SGD([weight], lr=0.1))
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.pc_backward([((targets[0] @ weight) - 1).square(), (targets[1] @ weight + weight.sum()).square()])
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[1], results[0])


def test_pytorch_optimizer_pcgrad_lets_heads_into_the_projection():
    torch.manual_seed(0)
    trunk, left, right = torch.nn.Linear(6, 4), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
    modules = torch.nn.ModuleList([trunk, left, right]).double()
    x = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(8, 6)

    def losses():
        z = trunk(x).tanh()
        return [(left(z) - 1).square().mean(), (right(z) + 1).square().mean()]

    (plain,) = torch.autograd.grad(losses()[0], [left.weight])
    found = []
    for wrap in (pytorch_optimizer.PCGrad, gradsurgery.PCGrad):
        modules.zero_grad()
        wrap(torch.optim.SGD(modules.parameters(), lr=0.1), reduction="mean").pc_backward(losses())
        found.append((trunk.weight.grad.clone(), left.weight.grad.clone()))
    (their_trunk, their_head), (trunk_grad, head) = found
    torch.testing.assert_close(head, plain)
    assert not torch.allclose(their_head, plain)
    assert not torch.allclose(their_trunk, trunk_grad)
