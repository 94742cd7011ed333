# SPDX-License-Identifier: MIT
"""The TorchJD integration, against the real package."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gradsurgery
from conftest import grads_of, on_cpu, two_losses, two_task_net
from gradsurgery import methods
from inputs import DEVICE, DTYPES, HOSTILE, hostile, normal

pytest.importorskip("torchjd")
from torchjd import Stateful, aggregation
from torchjd.aggregation import CRMOGMWeighting, GramianWeightedAggregator, UPGradWeighting, Weighting
from torchjd.autogram import Engine
from torchjd.autojac import backward, jac_to_grad, mtl_backward
from torchjd.linalg import Matrix, PSDMatrix

from gradsurgery.integrations.torchjd import FromTorchJD, SurgeryAggregator, SurgeryWeighting
from gradsurgery.methods._buffered import BufferedMethod

OURS = [
    name
    for name in methods.available()
    if not (method := methods.get(name)).needs_losses
    and not isinstance(method, (BufferedMethod, methods.CoordinateMethod))
]
ROOT = Path(__file__).parent.parent
X = torch.linspace(-1, 1, 48).reshape(8, 6)


def saved(state):
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def check_theirs_is_ours(method, rows, backend=None):
    gram = gradsurgery.gram(rows, backend=backend)
    weights = methods.get(method).weights(gram, backend=backend)
    expected = gradsurgery.combine(rows, weights, backend=backend)
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(SurgeryWeighting(method, backend=backend)(gram), weights, **exactly)
    torch.testing.assert_close(SurgeryAggregator(method, backend=backend)(rows), expected, **exactly)
    torch.testing.assert_close(SurgeryAggregator(method, backend=backend)(rows.mT.contiguous().mT), expected, **exactly)


@pytest.mark.interpreted(0)
@pytest.mark.parametrize("tasks", [2, 5])
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
def test_ours_in_their_interfaces_are_ours(backend, method, case, tasks):
    check_theirs_is_ours(method, hostile(tasks)[case], backend)


@pytest.mark.parametrize("method", OURS)
def test_every_method_of_g_has_their_interfaces(method):
    for tasks in (1, 4):
        check_theirs_is_ours(method, hostile(tasks)["conflicting"])


def test_ours_equals_theirs_where_the_order_does_not_matter():
    rows = hostile(2)["conflicting"]
    torch.testing.assert_close(SurgeryAggregator("pcgrad")(rows), aggregation.PCGrad()(rows))
    theirs = GramianWeightedAggregator(SurgeryWeighting("pcgrad"))(rows)
    torch.testing.assert_close(theirs, aggregation.PCGrad()(rows))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_in_is_dtype_out(dtype):
    rows = normal(3, 40, dtype)
    direction = SurgeryAggregator("pcgrad")(rows)
    assert direction.dtype == SurgeryWeighting("pcgrad")(rows @ rows.T).dtype == dtype
    # On a GPU a direction computed in one launch has other bits than one computed stage by stage.
    tolerance = {"rtol": 0, "atol": 0} if DEVICE == "cpu" else {}
    torch.testing.assert_close(direction, gradsurgery.aggregate(rows, "pcgrad"), **tolerance)


def test_g_is_not_taken_in_the_precision_of_j():
    rows = normal(2, 40, torch.float32)
    expected = aggregation.PCGrad()(rows)
    # TorchJD's products of these gradients are infinite, ours are not.
    torch.testing.assert_close(SurgeryAggregator("pcgrad")(rows * 1e25) / 1e25, expected)
    assert not torch.allclose(aggregation.PCGrad()(rows * 1e25) / 1e25, expected)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("method", ["pcgrad", "mgda", "mean"])
def test_mtl_backward_gives_what_our_optimizer_gives(method, optimized):
    ours, theirs = two_task_net(torch.float64), two_task_net(torch.float64)
    theirs.load_state_dict(ours.state_dict())
    chosen = methods.get(method)
    chosen.weights_losses = False  # in mtl_backward the heads have no weights
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(ours.parameters()), chosen)
    info = optimizer.backward(two_losses(ours, X.double()))

    z = theirs["trunk"](X.double()).tanh()
    losses = [(theirs["a"](z) - 1).square().mean(), 3 * (theirs["b"](z) + 1).square().mean()]
    mtl_backward(losses, z, shared_params=theirs["trunk"].parameters())
    aggregator = SurgeryAggregator(method)
    weights = jac_to_grad(theirs["trunk"].parameters(), aggregator, optimize_gramian_computation=optimized)
    torch.testing.assert_close(weights, info.weights)
    torch.testing.assert_close(grads_of(theirs), grads_of(ours))


def test_the_engine_gives_what_the_jacobian_gives():
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    backward(list((net(X)[:, 0] - 1).square()))
    jac_to_grad(net.parameters(), SurgeryAggregator("pcgrad", seed=4))
    expected = grads_of(net)
    net.zero_grad()
    engine = Engine(net, batch_dim=0)
    losses = (net(X)[:, 0] - 1).square()
    losses.backward(SurgeryWeighting("pcgrad", seed=4)(engine.compute_gramian(losses)))
    torch.testing.assert_close(grads_of(net), expected, rtol=1e-4, atol=1e-5)


def test_training_with_their_loop():
    net = two_task_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    aggregator = SurgeryAggregator("mgda")
    history = []
    for _ in range(30):
        losses = two_losses(net, X)
        history.append(torch.stack(losses).detach())
        backward(losses)
        jac_to_grad(net.parameters(), aggregator)
        optimizer.step()
        optimizer.zero_grad()
    assert (history[-1] < history[0]).all()


def test_results_are_constants_and_nan_stays():
    rows = normal(3, 10).requires_grad_()
    bad = rows.detach().clone()
    bad[1, 2] = torch.nan
    for method in OURS:
        assert not SurgeryAggregator(method)(rows).requires_grad
        assert not SurgeryWeighting(method)(rows @ rows.T).requires_grad
        assert SurgeryAggregator(method)(bad).isnan().all()
        assert SurgeryWeighting(method)(bad @ bad.T).isnan().all()


def test_their_state_dict_and_reset_carry_our_state():
    rows = normal(8, 30)
    one = SurgeryAggregator("pcgrad", seed=3)
    assert isinstance(one, Stateful)
    first, second = one(rows), one(rows)
    state = saved(one.state_dict())
    twin = copy.deepcopy(one)
    third = one(rows)
    assert not torch.equal(second, third)
    other = SurgeryAggregator("pcgrad", seed=9)
    other.load_state_dict(state)
    assert torch.equal(other(rows), third)
    assert torch.equal(twin(rows), third)
    one.reset()
    assert torch.equal(one(rows), first)
    one.reset()
    assert torch.equal(one(rows), first)


def test_an_option_that_is_named_as_the_method_is():
    assert SurgeryAggregator("cr_mogm", method="upgrad").gramian_weighting.method.method.name == "upgrad"


def test_their_modifier_on_our_method():
    grams = [rows @ rows.T for rows in (normal(5, 9, seed=s) for s in range(3))]
    modified, plain = CRMOGMWeighting(SurgeryWeighting("pcgrad"), alpha=0.5), methods.get("pcgrad")
    expected = plain.weights(grams[0])
    for gram in grams:
        got = modified(gram)
        expected = expected if gram is grams[0] else 0.5 * expected + 0.5 * plain.weights(gram)
        torch.testing.assert_close(got, expected)
    modified.reset()
    torch.testing.assert_close(modified(grams[1]), methods.get("pcgrad").weights(grams[1]))


def test_errors_of_ours_in_their_interfaces():
    gram = torch.eye(3, dtype=torch.float64, device=DEVICE)
    for name in ("excess_mtl", "graddrop"):
        with pytest.raises(ValueError, match=rf"{name}' takes no weights from the Gramian: use gradsurgery\.aggregate"):
            SurgeryWeighting(name)
    with pytest.raises(ValueError, match=r"'gradnorm' needs the losses.*use gradsurgery\.SurgeryOptimizer"):
        SurgeryAggregator("gradnorm")
    with pytest.raises(ValueError, match="method must be one of"):
        SurgeryWeighting("nothing")
    with pytest.raises(ValueError, match="go with a method's name"):
        SurgeryWeighting(methods.get("sum"), seed=1)
    for wrong in (gram[:2], gram.expand(3, 3, 3), gram[:0, :0]):
        with pytest.raises(ValueError, match=r"gramian must be \[T, T\] with T >= 1, got shape"):
            SurgeryWeighting("mean")(wrong)
    with pytest.raises(TypeError, match=r"gramian must be a real floating-point tensor, got torch\.int64"):
        SurgeryWeighting("mean")(gram.long())
    theirs = FromTorchJD(aggregation.MGDAWeighting())
    assert theirs.weights(gram.float()).dtype == torch.float64
    with pytest.raises(ValueError, match="backend must be one of"):
        theirs.weights(gram, backend="nothing")


THEIRS = {
    "AlignedMTL": aggregation.AlignedMTL,
    "Constant": lambda: aggregation.Constant(torch.tensor([1.0, 0.5, -2.0, 4.0], dtype=torch.float64)),
    "CRMOGM": lambda: GramianWeightedAggregator(CRMOGMWeighting(UPGradWeighting())),
    "DualProj": aggregation.DualProj,
    "GradVac": aggregation.GradVac,
    "IMTLG": aggregation.IMTLG,
    "Krum": lambda: aggregation.Krum(1, 2),
    "Mean": aggregation.Mean,
    "MGDA": aggregation.MGDA,
    "PCD": aggregation.PCD,
    "PCGrad": aggregation.PCGrad,
    "Random": aggregation.Random,
    "Sum": aggregation.Sum,
    "UPGrad": aggregation.UPGrad,
}


@on_cpu
@pytest.mark.parametrize("case", ["normal", "zero row", "duplicate", "parallel", "conflicting", "one parameter"])
@pytest.mark.parametrize("name", THEIRS)
def test_theirs_as_our_method_are_theirs(name, case):
    rows = hostile(4)[case]
    theirs, method = THEIRS[name](), FromTorchJD(THEIRS[name]())
    for seed in range(3):
        torch.manual_seed(seed)
        expected = theirs(rows)
        torch.manual_seed(seed)
        # Both get the same bits of G, because Krum's choice among equal scores depends on them.
        weights = method.weights(rows @ rows.T)
        torch.testing.assert_close(gradsurgery.combine(rows, weights), expected, rtol=1e-9, atol=1e-9)


@on_cpu
def test_our_optimizer_with_their_weighting():
    ours, theirs = two_task_net(torch.float64), two_task_net(torch.float64)
    theirs.load_state_dict(ours.state_dict())
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(ours.parameters(), lr=0.1), FromTorchJD(UPGradWeighting()))
    first = [loss.item() for loss in two_losses(ours, X.double())]
    for _ in range(10):
        optimizer.zero_grad()
        optimizer.backward(two_losses(ours, X.double()))
        optimizer.step()
        z = theirs["trunk"](X.double()).tanh()
        mtl_backward([(theirs["a"](z) - 1).square().mean(), 3 * (theirs["b"](z) + 1).square().mean()], z)
        jac_to_grad(theirs["trunk"].parameters(), aggregation.UPGrad())
        torch.testing.assert_close(grads_of(ours), grads_of(theirs), rtol=1e-5, atol=1e-9)
        with torch.no_grad():
            for p in theirs.parameters():
                p -= 0.1 * p.grad
                p.grad = None
    assert all(loss < before for loss, before in zip(two_losses(ours, X.double()), first, strict=True))


@on_cpu
def test_a_batch_is_its_problems_and_nan_gives_nan_weights():
    rows = torch.stack([normal(4, 9, seed=s) for s in range(6)])
    grams = (rows @ rows.mT).view(2, 3, 4, 4)
    grams[1, 1, 0, 0] = torch.nan
    weighting = aggregation.AlignedMTLWeighting()
    with pytest.raises(torch.linalg.LinAlgError):
        weighting(grams[1, 1])
    got = FromTorchJD(weighting).weights(grams)
    assert got[1, 1].isnan().all()
    for b, c in [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)]:
        assert torch.equal(got[b, c], weighting(grams[b, c]))
    assert FromTorchJD(weighting).weights(grams[:0]).shape == (0, 3, 4)
    with pytest.raises(ValueError, match="GradVacWeighting has state for one problem, got 6: use granularity='global'"):
        FromTorchJD(aggregation.GradVac()).weights(grams)


@on_cpu
@pytest.mark.parametrize("name", ["GradVac", "PCD", "CRMOGM"])
def test_the_state_of_theirs_is_in_our_state_dict(name):
    grams = [rows @ rows.T for rows in (normal(4, 9, seed=s) for s in range(4))]
    one, other = FromTorchJD(THEIRS[name]()), FromTorchJD(THEIRS[name]())

    def last(method):
        torch.manual_seed(1)
        return method.weights(grams[3])

    initial = saved(one.state_dict())
    for gram in grams[:3]:
        one.weights(gram)
    state = one.state_dict()
    file = saved(state)
    one.weights(torch.full_like(grams[0], torch.nan))  # leaves the state as it is
    expected = last(one)
    other.load_state_dict(file)
    assert torch.equal(last(other), expected)
    other.load_state_dict(initial)
    first = last(other)
    assert torch.equal(first, last(FromTorchJD(THEIRS[name]())))
    assert not torch.allclose(first, expected)
    one.load_state_dict(state)  # the saved state has not changed with the weighting
    assert torch.equal(last(one), expected)


@on_cpu
def test_their_state_in_the_optimizers_checkpoint():
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters()), FromTorchJD(aggregation.PCD()))
    optimizer.backward(two_losses(net, X))
    state = saved(optimizer.state_dict())
    assert state["surgery"]["torchjd"]["weighting"]["_n_steps"] == 1
    other = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters()), FromTorchJD(aggregation.PCD()))
    other.load_state_dict(state)
    assert other.method.state_dict()["weighting"]["_n_steps"] == 1
    vac = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters()), FromTorchJD(aggregation.GradVac()))
    with pytest.raises(ValueError, match="state must be that of GradVacWeighting, got another weighting's"):
        vac.load_state_dict(state)
    assert vac.method.state_dict() == FromTorchJD(aggregation.GradVac()).state_dict()
    assert FromTorchJD(UPGradWeighting()).state_dict() == {}


class Rows(Weighting[Matrix]):
    def forward(self, matrix: Tensor, /) -> Tensor:
        return matrix.sum(1)


class Diagonal(Weighting[PSDMatrix]):
    def forward(self, gramian: Tensor, /) -> Tensor:
        return gramian.diagonal()


def test_what_a_gramian_does_not_determine_is_refused():
    refused = {
        "ConFIG": aggregation.ConFIG(),
        "GradDrop": aggregation.GradDrop(),
        "TrimmedMean": aggregation.TrimmedMean(1),
        "ExcessMTLWeighting": aggregation.ExcessMTL(),
        "MoDoWeighting": aggregation.MoDoWeighting(gamma=0.1, rho=0.0),
        "SDMGradWeighting": CRMOGMWeighting(aggregation.SDMGradWeighting()),
        "Rows": Rows(),
        "_Composition": Diagonal() << torch.exp,
        "str": "UPGrad",
    }
    for name, given in refused.items():
        with pytest.raises(TypeError, match=rf"Weighting\[PSDMatrix\].* sees only the Gramian; got {name}"):
            FromTorchJD(given)
    gram = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64, device=DEVICE))
    assert FromTorchJD(Diagonal()).weights(gram).tolist() == [1, 4]


@on_cpu
def test_torchjd_is_imported_only_for_its_integration():
    code = """
import sys, gradsurgery
assert "torchjd" not in sys.modules
sys.modules["torchjd"] = None
try:
    import gradsurgery.integrations.torchjd
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "needs TorchJD 0.18 or later: pip install -U torchjd" in result.stdout
