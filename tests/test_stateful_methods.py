# SPDX-License-Identifier: MIT
"""The methods that average weights, keep gradients, or take several batches: explicit algorithms, state, optimizers."""

import itertools
import math

import pytest
import torch

import gradsurgery
from conftest import grads_of, two_losses, two_task_net
from gradsurgery.backends.simplex import project_on_simplex
from gradsurgery.functional import simplex_steps
from inputs import DEVICE, normal

methods = gradsurgery.methods
BUFFERED = ("db_mtl", "excess_mtl", "moco")
SIMPLEX = ("modo", "sdmgrad")
X = torch.linspace(-1, 1, 48).reshape(8, 6)


def steps(tasks, count, columns=30):
    """Gradients [T, N] and losses [T] of several steps."""
    for k in range(count):
        yield normal(tasks, columns, seed=20 + k), normal(1, tasks, seed=50 + k)[0].abs() + 0.1


@pytest.mark.parametrize("scale", [1e-3, 3, 1e10, 1e150])
@pytest.mark.parametrize("tasks", [1, 2, 5, 64])
def test_projection_on_the_simplex(backend, tasks, scale):
    x = scale * normal(4, tasks).reshape(2, 2, tasks)
    x[0, 0, -1] = x[0, 0, 0]
    x[1, 1] = 1e-9 * x[1, 1] - scale
    # One step from uniform weights w projects w - A w = x.
    w = torch.full_like(x, 1 / tasks)
    w = simplex_steps(torch.diag_embed(1 - tasks * x), w, 1.0, 0.0, 1, backend)
    torch.testing.assert_close(w, project_on_simplex(x), rtol=0, atol=1e-14)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]))
    # (x - w) . (v - w) <= 0 for every vertex v.
    off = x - w
    assert (off - (off * w).sum(-1, keepdim=True) <= 1e-12 * max(1, scale)).all()


def test_not_finite_steps_on_the_simplex(backend):
    matrices = torch.stack([torch.eye(3).double()] * 4)
    matrices[1, 0, 2], matrices[2, 1, 1], matrices[3] = torch.nan, -torch.inf, 1e300
    start = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    moved = simplex_steps(matrices, start, 1e100, 0.5, 2, backend)
    assert moved.isnan().any(-1).tolist() == [False, True, True, True]
    assert torch.equal(start, torch.full_like(start, 1 / 3))
    assert torch.equal(simplex_steps(matrices, start, 0.1, 0.5, 0, backend)[0], start[0])
    large = torch.diag(torch.tensor([1e300, 1.0, 1.0], dtype=torch.float64))  # lr v overflows
    assert simplex_steps(large, start[0], 1e10, 0.0, 1, backend).tolist() == [0, 0.5, 0.5]


@pytest.mark.parametrize("name", SIMPLEX)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_step_that_is_not_finite_leaves_the_weights(backend, name, bad):
    method, gram = methods.get(name), torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    method.weights(gram, backend=backend)
    before = method.state_dict()["weights"]
    # The products of two batches need not have a positive diagonal.
    for products, at in itertools.product((gram, -gram, 0 * gram), ((0, 0), (0, 1))):
        broken = products.clone()
        broken[at] = bad
        assert method.weights(broken, backend=backend).isnan().all()
        assert torch.equal(method.state_dict()["weights"], before)


def explicit_db_mtl(inputs, beta, sigma):
    averages = 0
    for k, (rows, losses) in enumerate(inputs, 1):
        keep = beta / k**sigma
        averages = keep * averages + (1 - keep) * rows / losses[:, None]
        norms = averages.norm(dim=1)
        yield (norms.max() / norms) @ averages


def explicit_moco(inputs, beta, gamma, rho):
    w = tracked = None
    for k, (rows, losses) in enumerate(inputs, 1):
        if w is None:
            w, tracked = torch.full_like(losses, 1 / len(losses)), torch.zeros_like(rows)
        tracked = tracked - beta / k**0.5 * (tracked - rows * (losses / rows.norm(dim=1))[:, None])
        w = project_on_simplex(w - gamma / k**0.5 * (tracked @ (w @ tracked) + rho * w))
        yield w @ tracked


def explicit_excess_mtl(inputs, eta):
    squares = first = 0
    for k, (rows, losses) in enumerate(inputs):
        squares = squares + rows.square()
        excess = (rows.square() / squares.sqrt()).sum(1)
        if k == 0:
            first, w = excess, torch.ones_like(losses)
        else:
            w = w * (eta * excess / first).exp()
            w = len(w) * w / w.sum()
        yield w @ rows


EXPLICIT = {
    "db_mtl": (explicit_db_mtl, {"beta": 0.7, "sigma": 0.3}),
    "moco": (explicit_moco, {"beta": 0.6, "gamma": 0.2, "rho": 0.05}),
    "excess_mtl": (explicit_excess_mtl, {"eta": 0.3}),
}


@pytest.mark.interpreted(1)
@pytest.mark.parametrize("form", ["flat", "lists"])
@pytest.mark.parametrize("tasks", [1, 2, 7])
@pytest.mark.parametrize("name", BUFFERED)
def test_kept_gradients_are_those_of_the_explicit_algorithm(backend, name, tasks, form):
    explicit, options = EXPLICIT[name]
    method = methods.get(name, **options)
    for (rows, losses), expected in zip(steps(tasks, 5), explicit(steps(tasks, 5), **options), strict=True):
        grads = rows if form == "flat" else [[row[:12].view(3, 4), None, row[12:]] for row in rows]
        got = gradsurgery.aggregate(grads, method, losses=losses, backend=backend)
        if form == "lists":
            assert got[1] is None
            got = torch.cat([got[0].reshape(-1), got[2]])
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", BUFFERED)
def test_absent_gradients_count_as_zero(name):
    method, whole = methods.get(name), methods.get(name)
    for rows, losses in steps(3, 4):
        rows[1, :12] = 0
        lists = [[None if t == 1 else row[:12].clone(), row[12:].clone()] for t, row in enumerate(rows)]
        got = torch.cat(gradsurgery.aggregate(lists, method, losses=losses))
        torch.testing.assert_close(got, gradsurgery.aggregate(rows, whole, losses=losses))
        out = torch.empty_like(got)
        assert gradsurgery.aggregate(rows, methods.get(name), losses=losses, out=out) is out


@pytest.mark.parametrize("bad", ["gradient", "loss"])
@pytest.mark.parametrize("name", BUFFERED)
def test_a_step_that_is_not_finite_leaves_the_state(name, bad):
    if name == "excess_mtl" and bad == "loss":
        pytest.skip("reads no losses")
    method = methods.get(name)
    inputs = list(steps(3, 3))
    gradsurgery.aggregate(inputs[0][0], method, losses=inputs[0][1])
    state = method.state_dict()
    rows, losses = inputs[1][0].clone(), inputs[1][1].clone()
    if bad == "gradient":
        rows[1, 4] = torch.inf
    else:
        losses[2] = torch.nan
    assert gradsurgery.aggregate(rows, method, losses=losses).isnan().all()
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)
    assert gradsurgery.aggregate(inputs[2][0], method, losses=inputs[2][1]).isfinite().all()


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize("name", BUFFERED)
def test_factors_on_all_gradients(name, scale):
    base, scaled = methods.get(name), methods.get(name)
    for rows, losses in steps(4, 3):
        expected = gradsurgery.aggregate(rows, base, losses=losses)
        got = gradsurgery.aggregate(scale * rows, scaled, losses=losses)
        torch.testing.assert_close(got, expected * (1 if name == "moco" else scale), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [*BUFFERED, *SIMPLEX, "cr_mogm"])
def test_a_checkpoint_continues_bit_for_bit(name, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        net = two_task_net()
        return net, gradsurgery.SurgeryOptimizer(torch.optim.Adam(net.parameters(), lr=0.02), name)

    def train(net, optimizer, start):
        for step in range(start, start + 3):
            optimizer.zero_grad()
            optimizer.backward(two_losses(net, X + 0.1 * step))
            optimizer.step()

    net, optimizer = make(0)
    train(net, optimizer, 0)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(net, optimizer, 3)
    resumed, other = make(1)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["net"])
    other.load_state_dict(checkpoint["optimizer"])
    train(resumed, other, 3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))
    torch.testing.assert_close(optimizer.method.state_dict(), other.method.state_dict(), rtol=0, atol=0)
    other.load_state_dict(checkpoint["optimizer"])  # in place, over a state
    torch.testing.assert_close(other.method.state_dict(), checkpoint["optimizer"]["surgery"][name], rtol=0, atol=0)
    fresh = methods.get(name)
    other.method.load_state_dict(fresh.state_dict())
    torch.testing.assert_close(other.method.state_dict(), fresh.state_dict())


@pytest.mark.parametrize("name", BUFFERED)
def test_a_scaler_changes_nothing_but_the_scale(name):
    results = []
    for scaler in (None, torch.amp.GradScaler(DEVICE, init_scale=1024.0)):
        torch.manual_seed(2)
        net = two_task_net(torch.float64)
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), name)
        for step in range(3):
            optimizer.zero_grad()
            info = optimizer.backward(two_losses(net, X.double()), scaler=scaler)
            if scaler is not None:
                scaler.unscale_(optimizer)
                scaler.update(16.0 * 4**step)
            optimizer.step()
        results.append([*grads_of(net), info.gram, info.weights])
    torch.testing.assert_close(results[0], results[1])


def test_a_weight_of_excess_mtl_that_became_0_grows_again():
    method = methods.get("excess_mtl", eta=1e3)
    gradients = torch.eye(2)
    gradsurgery.aggregate(gradients, method)
    for long in (0, 1, 1):
        gradients = torch.eye(2)
        gradients[long] *= 10
        gradsurgery.aggregate(gradients, method)
        assert method.state_dict()["w"][long] > 1.9


def test_excess_mtl_weighs_the_heads_and_the_others_do_not():
    for name in BUFFERED:
        torch.manual_seed(2)
        net = two_task_net()
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.0), name)
        for _ in range(2):
            optimizer.zero_grad()
            info = optimizer.backward(two_losses(net, X))
        plain = torch.autograd.grad(two_losses(net, X)[0], net["a"].weight)[0]
        factor = info.weights[0].float() if name == "excess_mtl" else 1
        torch.testing.assert_close(net["a"].weight.grad, factor * plain)


@pytest.mark.parametrize("name", BUFFERED)
def test_kept_gradients_belong_to_one_set_of_parameters(name):
    method, losses = methods.get(name), torch.ones(2, dtype=torch.float64)
    gradsurgery.aggregate(normal(2, 10), method, losses=losses)
    with pytest.raises(ValueError, match="is for 2 tasks and 1 shared parameters of other shapes, got 3 and 1"):
        gradsurgery.aggregate(normal(3, 10), method, losses=torch.ones(3))
    with pytest.raises(ValueError, match="of other shapes"):
        gradsurgery.aggregate(normal(2, 11), method, losses=losses)
    with pytest.raises(ValueError, match="keeps gradients of one segment, got segments"):
        gradsurgery.aggregate(normal(2, 10), method, losses=losses, segments=[0, 4, 10])
    with pytest.raises(ValueError, match="needs granularity 'global', got 'per_tensor'"):
        gradsurgery.SurgeryOptimizer(torch.optim.SGD([torch.ones(2)]), name, granularity="per_tensor")
    with pytest.raises(ValueError, match=r"keeps: use gradsurgery.aggregate or SurgeryOptimizer"):
        methods.get(name).weights(torch.eye(2, dtype=torch.float64))
    no_gradient = gradsurgery.aggregate([[None], [None]], methods.get(name), losses=losses)
    assert no_gradient == [None]


def collected(net, optimizer, batches):
    for batch in batches:
        optimizer.collect(two_losses(net, batch))
    return optimizer.combine()


@pytest.mark.parametrize("name", SIMPLEX)
def test_three_batches_make_a_step(name):
    torch.manual_seed(2)
    net = two_task_net(torch.float64)
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), name)
    by_hand = methods.get(name)
    trunk = list(net["trunk"].parameters())
    for step in range(3):
        batches = [(X + 0.3 * step + 0.1 * b).double() for b in range(3)]
        rows = [
            torch.stack([torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, trunk)]) for loss in losses])
            for losses in ([two_losses(net, x)[t] for t in range(2)] for x in batches)
        ]
        heads = [torch.autograd.grad(two_losses(net, x)[0], net["a"].weight)[0] for x in batches]
        optimizer.zero_grad()
        info = collected(net, optimizer, batches)
        expected = by_hand.weights(rows[0] @ rows[1].T)
        torch.testing.assert_close(info.weights, expected)
        torch.testing.assert_close(info.gram, rows[2] @ rows[2].T)
        torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in trunk]), expected @ rows[2])
        torch.testing.assert_close(net["a"].weight.grad, sum(heads) / 3)
        optimizer.step()
    optimizer.collect(two_losses(net, X.double()))
    optimizer.collect(two_losses(net, X.double()))
    with pytest.raises(ValueError, match=f"a step of method '{name}' has 1 or 3 batches, got 2"):
        optimizer.combine()
    optimizer.collect(two_losses(net, X.double()))
    with pytest.raises(ValueError, match="has at most 3 batches"):
        optimizer.collect(two_losses(net, X.double()))


def test_modo_is_its_equation(backend):
    method = methods.get("modo", gamma=0.05, rho=0.2)
    w = torch.full((4,), 0.25, dtype=torch.float64)
    for k in range(4):
        c = normal(4, 6, seed=k) @ normal(4, 6, seed=9 + k).T
        w = project_on_simplex(w - 0.05 * (c @ w + 0.2 * w))
        torch.testing.assert_close(method.weights(c, backend=backend), w)


def test_sdmgrad_is_torchs_sgd_with_projections(backend):
    for pref in (None, [0.1, 0.2, 0.3, 0.4]):
        method = methods.get("sdmgrad", lam=0.4, lr=2.0, momentum=0.3, num_iter=7, pref=pref)
        p = torch.tensor(pref or [0.25] * 4, dtype=torch.float64)
        w = torch.full((4,), 0.25, dtype=torch.float64, requires_grad=True)
        for k in range(3):
            c = normal(4, 6, seed=k) @ normal(4, 6, seed=9 + k).T + 3 * torch.eye(4)
            scale = c.diagonal().clamp(min=0).sqrt().mean() ** 2
            sgd = torch.optim.SGD([w], lr=2.0, momentum=0.3)
            for _ in range(7):
                w.grad = (c @ (w + 0.4 * p) / scale).detach()
                sgd.step()
                w.data = project_on_simplex(w.data)
            torch.testing.assert_close(method.weights(c, backend=backend), ((w + 0.4 * p) / 1.4).detach())
            torch.testing.assert_close(method.state_dict()["weights"], w.detach())


@pytest.mark.parametrize("name", ["MoDo", "SDMGrad"])
def test_torchjd_takes_the_same_steps(name):
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs, ours = {
        "MoDo": lambda: (aggregation.MoDoWeighting(gamma=0.1, rho=0.1), methods.MoDo(gamma=0.1, rho=0.1)),
        "SDMGrad": lambda: (aggregation.SDMGradWeighting(lr=5.0), methods.SDMGrad()),
    }[name]()
    for k in range(4):
        c = normal(4, 6, seed=k) @ normal(4, 6, seed=9 + k).T + torch.eye(4)
        torch.testing.assert_close(ours.weights(c), theirs(c), rtol=1e-6, atol=1e-8)


def test_torchjd_smooths_the_same_weights():
    aggregation = pytest.importorskip("torchjd.aggregation")
    theirs = aggregation.CRMOGMWeighting(aggregation.UPGradWeighting(), alpha=0.7)
    ours = methods.get("cr_mogm", method="upgrad", alpha=0.7)
    for k in range(4):
        gram = gradsurgery.gram(normal(3, 9, seed=k))
        torch.testing.assert_close(ours.weights(gram), theirs(gram))


def test_cr_mogm_takes_after_the_other_method():
    averaged = methods.get("cr_mogm", method="gradnorm", alpha=0.5)
    assert averaged.needs_losses
    assert averaged.weights_losses
    assert not methods.get("cr_mogm", method="uw").needs_gram
    assert methods.get("cr_mogm", method="modo").num_batches == 3
    averaged = methods.get("cr_mogm", method=methods.MGDA(), alpha=0.5)
    good, other = (gradsurgery.gram(normal(3, 9, seed=k)) for k in range(2))
    first, then = (methods.MGDA().weights(gram) for gram in (good, other))
    torch.testing.assert_close(averaged.weights(good), first)
    assert averaged.weights(good * torch.nan).isnan().all()
    torch.testing.assert_close(averaged.weights(other), (first + then) / 2)
    with pytest.raises(ValueError, match=r"is for weights of shape \(3,\), got \(4,\)"):
        averaged.weights(gradsurgery.gram(normal(4, 9)))


@pytest.mark.parametrize("name", SIMPLEX)
def test_batches_and_hostile_grams(name):
    method = methods.get(name)
    grams = torch.stack([gradsurgery.gram(normal(3, 9, seed=s)) for s in range(6)]).view(2, 3, 3, 3)
    grams[1, 2] = torch.nan
    grams[0, 0] = 0
    first, second = method.weights(grams), method.weights(grams)
    assert first[1, 2].isnan().all()
    for b, c in ((0, 0), (0, 1), (1, 1)):
        one = methods.get(name)
        torch.testing.assert_close(one.weights(grams[b, c]), first[b, c])
        torch.testing.assert_close(one.weights(grams[b, c]), second[b, c])
    with pytest.raises(ValueError, match=r"state of method .* is for weights of shape \(2, 3, 3\)"):
        method.weights(grams[0])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("modo", {"gamma": 0.0}, "gamma must be positive"),
        ("modo", {"rho": -1.0}, "rho must be >= 0 and finite, got -1.0"),
        ("sdmgrad", {"momentum": 1.0}, "momentum must be >= 0 and < 1, got 1.0"),
        ("sdmgrad", {"pref": [0.5, 0.6]}, r"pref must be T numbers that sum to 1, got \[0.5, 0.6\]"),
        ("sdmgrad", {"lam": math.inf}, "lam must be >= 0 and finite, got inf"),
        ("sdmgrad", {"num_iter": 0}, "num_iter must be an int >= 1, got 0"),
        ("moco", {"beta": 0.0}, "beta must be > 0 and <= 1, got 0.0"),
        ("db_mtl", {"beta": 1.0}, "beta must be >= 0 and < 1, got 1.0"),
        ("excess_mtl", {"eta": 0.0}, "eta must be positive"),
        ("cr_mogm", {"alpha": 1.5}, "alpha must be >= 0 and <= 1, got 1.5"),
        ("cr_mogm", {"method": "moco"}, "must have weights from G or losses alone, got 'moco'"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        methods.get(name, **options)
