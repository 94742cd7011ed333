# SPDX-License-Identifier: MIT
"""The drop-in optimizers: which parameter gets which gradient."""

import copy

import pytest
import torch

import gradsurgery
from conftest import grads_of, two_losses, two_task_net

X = torch.linspace(-1, 1, 48).reshape(8, 6)


def task_gradients(net, losses, parameters):
    return [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "gradnorm"])
def test_shared_heads_and_untouched(method, backend):
    net = two_task_net(torch.float64)
    spare = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = gradsurgery.SurgeryOptimizer(
        torch.optim.SGD([*net.parameters(), spare], lr=0.1), method, backend=backend
    )
    losses = two_losses(net, X.double())
    trunk = list(net["trunk"].parameters())
    grads = task_gradients(net, losses, [*trunk, *net["a"].parameters(), *net["b"].parameters()])
    info = optimizer.backward(losses)
    flat = torch.stack([torch.cat([g.reshape(-1) for g in row[: len(trunk)]]) for row in grads])
    torch.testing.assert_close(info.gram, flat @ flat.T)
    expected = gradsurgery.combine(grads, info.weights)
    torch.testing.assert_close([p.grad for p in trunk], expected[: len(trunk)])
    # Plain gradients for the heads; GradNorm's first weights are 1.
    torch.testing.assert_close(net["a"].weight.grad, grads[0][len(trunk)])
    torch.testing.assert_close(net["b"].bias.grad, grads[1][-1])
    assert spare.grad is None


def test_loss_weighting_methods_weight_the_heads():
    net = two_task_net()
    optimizer = gradsurgery.GradNorm(torch.optim.SGD(net.parameters(), lr=0.1), lr=0.2)
    optimizer.backward(two_losses(net, X))
    optimizer.zero_grad()
    losses = two_losses(net, X)
    plain = torch.autograd.grad(losses[1], net["b"].weight, retain_graph=True)[0]
    info = optimizer.backward(losses)
    assert (info.weights - 1).abs().min() > 1e-3
    torch.testing.assert_close(net["b"].weight.grad, (info.weights[1] * plain).float())


def three_task_net():
    """Parameter 0 is reached by all three losses, 1 by two, 2 by one, 3 by none."""
    return [torch.nn.Parameter(torch.full((n,), 0.5)) for n in (3, 4, 2, 5)]


def three_losses(parameters):
    a, b, c, _ = parameters
    return {"x": (a.sum() - 2).square() + b[:2].sum(), "y": (a * a).sum() - 3 * b.sum(), "z": -5 * a[0] + c.prod()}


def test_partially_shared_parameters_count_as_zero_rows():
    parameters = three_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(parameters, lr=0.1), reduction="mean", seed=3)
    grads = task_gradients(None, three_losses(parameters).values(), parameters)
    assert grads[2][1] is None
    rows = torch.stack([torch.cat([row[0], torch.zeros(4) if row[1] is None else row[1]]) for row in grads]).double()
    info = optimizer.backward(three_losses(parameters))
    torch.testing.assert_close(info.gram, rows @ rows.T)
    weights = gradsurgery.pcgrad_weights(rows @ rows.T, reduction="mean", seed=3)
    torch.testing.assert_close(info.weights, weights)
    torch.testing.assert_close(torch.cat([p.grad for p in parameters[:2]]), (weights @ rows).float())
    torch.testing.assert_close(parameters[2].grad, grads[2][2])
    assert parameters[3].grad is None
    assert info.tasks == ["x", "y", "z"]


def test_shared_names_the_parameters():
    parameters = three_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(parameters, lr=0.1), shared=[parameters[0], parameters[2]])
    grads = task_gradients(None, three_losses(parameters).values(), parameters)
    optimizer.backward(three_losses(parameters))
    rows = torch.stack([torch.cat([row[0], torch.zeros(2) if row[2] is None else row[2]]) for row in grads]).double()
    direction = (gradsurgery.min_norm_weights(rows @ rows.T) @ rows).float()
    torch.testing.assert_close(torch.cat([parameters[0].grad, parameters[2].grad]), direction)
    torch.testing.assert_close(parameters[1].grad, grads[0][1] + grads[1][1])


@pytest.mark.parametrize("granularity", ["per_group", "per_tensor"])
def test_granularity(granularity, backend):
    net = two_task_net(torch.float64)
    trunk = list(net["trunk"].parameters())
    groups = [
        {"params": trunk[:1]},
        {"params": trunk[1:]},
        {"params": [*net["a"].parameters(), *net["b"].parameters()]},
    ]
    optimizer = gradsurgery.MGDA(torch.optim.SGD(groups, lr=0.1), granularity=granularity, backend=backend)
    losses = two_losses(net, X.double())
    grads = task_gradients(net, losses, trunk)
    info = optimizer.backward(losses)
    blocks = [[0], [1, 2, 3]] if granularity == "per_group" else [[0], [1], [2], [3]]
    assert info.gram.shape == (len(blocks), 2, 2)
    assert list(map(id, info.segments)) == list(map(id, [0, 1] if granularity == "per_group" else trunk))
    for s, block in enumerate(blocks):
        rows = torch.stack([torch.cat([row[p].reshape(-1) for p in block]) for row in grads])
        expected = gradsurgery.aggregate(rows, "mgda", backend="reference")
        torch.testing.assert_close(torch.cat([trunk[p].grad.reshape(-1) for p in block]), expected)
        torch.testing.assert_close(info.update_norm[s], expected.norm())


def test_gradients_accumulate_into_grad():
    net = two_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward(two_losses(net, X))
    once = [g.clone() for g in grads_of(net)]
    net["a"].bias.grad = None
    optimizer.backward(two_losses(net, X))
    for name, (parameter, before) in zip(
        dict(net.named_parameters()), zip(net.parameters(), once, strict=True), strict=True
    ):
        torch.testing.assert_close(parameter.grad, before if name == "a.bias" else 2 * before)


def test_micro_batches_are_summed_before_the_surgery():
    net, whole = two_task_net(torch.float64), None
    whole = copy.deepcopy(net)
    x = X.double()
    parts, together = (gradsurgery.PCGrad(torch.optim.SGD(n.parameters(), lr=0.1)) for n in (net, whole))
    for part in (x[:4], x[4:6], x[6:]):
        parts.collect([loss * len(part) for loss in two_losses(net, part)])
    assert all(g is None for g in grads_of(net))
    info = parts.combine()
    reference = together.backward([loss * 8 for loss in two_losses(whole, x)])
    torch.testing.assert_close(grads_of(net), grads_of(whole))
    torch.testing.assert_close(info.gram, reference.gram)
    # The last micro-batch may be passed to backward().
    parts.zero_grad()
    parts.collect([loss * 4 for loss in two_losses(net, x[:4])])
    parts.backward([loss * 4 for loss in two_losses(net, x[4:])])
    torch.testing.assert_close(grads_of(net), grads_of(whole))
    # zero_grad forgets what was collected.
    parts.collect(two_losses(net, x))
    parts.zero_grad()
    with pytest.raises(ValueError, match="nothing to combine"):
        parts.combine()


def test_kinds_of_losses():
    results = []
    for kind in (list, tuple, torch.stack, lambda pair: dict(zip(("left", "right"), pair, strict=True))):
        torch.manual_seed(1)
        net = two_task_net()
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
        info = optimizer.backward(kind(two_losses(net, X)))
        results.append(grads_of(net))
    assert info.tasks == ["left", "right"]
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


@pytest.mark.parametrize("method", gradsurgery.methods.available())
def test_one_task_is_a_multiple_of_the_plain_gradient(method):
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
    loss = two_losses(net, X)[0]
    expected = torch.autograd.grad(loss, net["a"].weight, retain_graph=True)[0]
    info = optimizer.backward([loss])
    got = net["a"].weight.grad
    torch.testing.assert_close(got / got.norm(), expected / expected.norm())
    if isinstance(optimizer.method, gradsurgery.methods.CoordinateMethod):
        torch.testing.assert_close(got, expected)
        return
    if method not in ("db_mtl", "moco"):  # their weights multiply averages of the gradients
        torch.testing.assert_close(got, expected * info.weights.float())
    assert info.weights > 0
    if optimizer.method.needs_gram:
        assert info.conflicts == 0
        assert info.norms > 0


def test_a_method_of_the_users_own():
    class Halves(gradsurgery.methods.Method):
        name = "halves"

        def weights(self, gram, *, losses=None):
            return torch.full_like(gram[..., 0], 0.5)

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([weight], lr=0.1), Halves())
    optimizer.backward([weight[0], 2 * weight[1]])
    assert torch.equal(weight.grad, torch.tensor([0.0, 0.0]) + torch.tensor([0.5, 1.0]))
    assert torch.equal(gradsurgery.aggregate(torch.eye(2), Halves()), torch.full((2,), 0.5))


@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def test_one_by_one_convolution_in_two_memory_formats():
    weight = torch.nn.Parameter(torch.randn(6, 3, 1, 1))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([weight], lr=0.1))
    x = torch.randn(2, 3, 4, 4)
    convolve = torch.nn.functional.conv2d
    losses = [convolve(x, weight).sum(), convolve(x.to(memory_format=torch.channels_last), weight).square().sum()]
    expected = [torch.autograd.grad(loss, weight, retain_graph=True)[0].reshape(1, -1) for loss in losses]
    info = optimizer.backward(losses)
    rows = torch.cat(expected).double()
    torch.testing.assert_close(info.gram, rows @ rows.T)


def test_expanded_grad_and_frozen_parameters():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(1).expand(3)
    optimizer = gradsurgery.MGDA(torch.optim.SGD([weight], lr=0.1))
    optimizer.backward([weight.sum(), 2 * weight.sum()])
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    weight.requires_grad_(False)
    other = torch.ones(2, requires_grad=True)
    info = optimizer.backward([other[0], other[1]])
    assert torch.equal(weight.grad, torch.full((3,), 2.0))
    assert torch.equal(info.gram, torch.zeros(2, 2).double())


def test_a_view_with_gaps_is_added_to_where_it_is():
    net = two_task_net(torch.float64)
    weight, head = net["trunk"][0].weight, net["a"].weight
    shared, own = torch.ones(16, 12, dtype=torch.float64), torch.ones(1, 16, dtype=torch.float64)
    weight.grad, head.grad = shared[:, ::2], own[:, 1::2]
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=1.0))
    optimizer.backward(two_losses(net, X.double()))
    added = [shared - 1, own - 1]
    optimizer.zero_grad()
    optimizer.backward(two_losses(net, X.double()))
    torch.testing.assert_close(added[0], torch.stack([weight.grad, torch.zeros(16, 6)], 2).flatten(1))
    torch.testing.assert_close(added[1], torch.stack([torch.zeros(1, 8), head.grad], 2).flatten(1))


def test_a_first_loss_of_zero_does_not_freeze_gradnorm():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurgery.GradNorm(torch.optim.SGD([weight], lr=0.1))
    for factor in (0.0, 1.0, 2.0):
        info = optimizer.backward([weight.square().sum(), factor * (3 * weight).square().sum()])
    assert info.weights.isfinite().all()
    assert info.weights[0] != 1


def test_gradnorm_norm_parameters():
    net = two_task_net(torch.float64)
    last = list(net["trunk"][2].parameters())
    optimizer = gradsurgery.GradNorm(torch.optim.SGD(net.parameters(), lr=0.0), norm_parameters=last, alpha=0.7, lr=0.1)
    initial = torch.stack(two_losses(net, X.double())).detach()
    weights = torch.ones(2).double()
    for step in range(3):
        x = X.double() + 0.3 * step
        losses = two_losses(net, x)
        grads = task_gradients(net, losses, list(net["trunk"].parameters()))
        norms = torch.stack([torch.cat([g.reshape(-1) for g in row[2:]]).norm() for row in grads])
        optimizer.zero_grad()
        info = optimizer.backward(losses)
        torch.testing.assert_close(info.weights, weights)
        # G in the info is over all shared parameters.
        torch.testing.assert_close(info.norms[0], torch.cat([g.reshape(-1) for g in grads[0]]).norm())
        torch.testing.assert_close(net["trunk"][0].bias.grad, weights[0] * grads[0][1] + weights[1] * grads[1][1])
        values = torch.stack(losses).detach()
        weights = gradsurgery.gradnorm_update(weights, norms, values, initial, alpha=0.7, lr=0.1)
    assert (weights - 1).abs().min() > 1e-3


def test_sparse_head_gradient_outside_the_surgery():
    table, net = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 2)
    optimizer = gradsurgery.PCGrad(
        torch.optim.SGD([*net.parameters(), *table.parameters()], lr=0.1), shared=net.parameters()
    )
    losses = net(table(torch.tensor([1, 2]))).mean(0)
    optimizer.backward(losses, retain_graph=True)
    expected = torch.autograd.grad(losses.sum(), table.weight, retain_graph=True)[0]
    assert table.weight.grad.is_sparse
    optimizer.backward([losses[0], losses[1] + table.weight.sum()])
    assert not table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad, 2 * expected.to_dense() + 1)
    table.weight.grad = expected.clone()
    optimizer.backward(net(table(torch.tensor([1, 2]))).mean(0))
    assert table.weight.grad.is_sparse
    torch.testing.assert_close(table.weight.grad.to_dense(), 2 * expected.to_dense())
    optimizer.step()


def test_info():
    net = two_task_net(torch.float64)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    losses = two_losses(net, X.double())
    grads = task_gradients(net, losses, list(net["trunk"].parameters()))
    a, b = (torch.cat([g.reshape(-1) for g in row]) for row in grads)
    info = optimizer.backward(losses)
    torch.testing.assert_close(info.norms, torch.stack([a.norm(), b.norm()]))
    torch.testing.assert_close(info.cosines[0, 1], torch.nn.functional.cosine_similarity(a, b, dim=0))
    assert info.conflicts == float(a @ b < 0)
    similarity = 2 * a.norm() * b.norm() / (a.norm() ** 2 + b.norm() ** 2)
    torch.testing.assert_close(info.magnitude_similarity[1, 0], similarity)
    flat = torch.cat([p.grad.reshape(-1) for p in net["trunk"].parameters()])
    torch.testing.assert_close(info.update_norm, flat.norm())
    result = info.to_dict()
    assert result["tasks"] == ["0", "1"]
    assert result["finite"] is True
    torch.testing.assert_close(torch.tensor(result["cosines"]).double(), info.cosines)
    zero = gradsurgery.SurgeryInfo(["a", "b"], torch.zeros(2, 2), torch.ones(2))
    assert torch.equal(zero.cosines, torch.zeros(2, 2))
    assert torch.equal(zero.magnitude_similarity, torch.ones(2, 2))
    assert zero.conflicts == 0
    three = gradsurgery.SurgeryInfo(["a", "b", "c"], torch.tensor([[1.0, -1, 1], [-1, 1, 1], [1, 1, 1]]), torch.ones(3))
    assert three.conflicts.item() == 1 / 3
    assert gradsurgery.SurgeryInfo(["a", "b"], torch.full((2, 2), torch.nan), torch.ones(2)).conflicts.isnan()


def test_losses_that_share_nothing(backend):
    for method in ("pcgrad", "mgda"):
        a, b, c = (torch.nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0, 3.0))
        optimizer = gradsurgery.SurgeryOptimizer(
            torch.optim.SGD([a, b, c], lr=0.1), method, shared=[c], backend=backend
        )
        for losses in ([(a * a).sum(), (b * b).sum()], [(a * a).sum() + (b * b).sum(), (b * b).sum()]):
            optimizer.zero_grad()
            expected = torch.autograd.grad(sum(losses), [a, b], retain_graph=True)
            info = optimizer.backward(losses)
            torch.testing.assert_close([a.grad, b.grad], list(expected))
            assert c.grad is None
            assert torch.equal(info.gram, torch.zeros(2, 2).double())


def test_a_step_with_another_number_of_tasks():
    a, b = (torch.nn.Parameter(torch.full((2,), value)) for value in (1.0, 2.0))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([a, b], lr=0.1))
    for losses in (
        lambda: [(a * a).sum() + (b * b).sum()],
        lambda: [(a * a).sum(), (b * b).sum()],
        lambda: [(a * a).sum() + (b * b).sum()],
    ):
        optimizer.zero_grad()
        optimizer.backward(losses())
        torch.testing.assert_close([a.grad, b.grad], [2 * a.detach(), 2 * b.detach()])


def test_one_wrapper_for_several_optimizers():
    """The wrapper is around an optimizer of all parameters that never steps; optimizers of their parts step instead."""
    results = []
    for apart in (False, True):
        torch.manual_seed(0)
        net = two_task_net()
        heads = [*net["a"].parameters(), *net["b"].parameters()]
        stepped = [torch.optim.SGD(net.parameters(), lr=0.1)]
        wrapped = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.0) if apart else stepped[0])
        if apart:
            stepped = [torch.optim.SGD(net["trunk"].parameters(), lr=0.1), torch.optim.SGD(heads, lr=0.1)]
        for _ in range(3):
            wrapped.zero_grad()
            wrapped.backward(two_losses(net, torch.linspace(-1, 1, 48).reshape(8, 6)))
            for optimizer in stepped:
                optimizer.step()
        results.append(list(net.parameters()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_a_vector_of_which_each_loss_takes_an_element_is_shared():
    scales = torch.nn.Parameter(torch.tensor([2.0, 3.0]))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([scales], lr=0.1))
    info = optimizer.backward([scales[0].square(), scales[1].square()])
    assert info.gram.tolist() == [[16.0, 0.0], [0.0, 36.0]]


def test_weights_of_ones_own_count():
    class Sum(gradsurgery.methods.PCGrad):
        def weights(self, gram, **_):
            return torch.ones_like(gram[..., 0])

    changed = gradsurgery.methods.MGDA()
    changed.weights = lambda gram, **_: torch.ones_like(gram[..., 0])
    rows = torch.tensor([[1.0, -2.0], [-1.0, 1.0]])
    for method in (Sum(), changed):
        assert torch.equal(gradsurgery.aggregate(rows, method), rows.sum(0))
        assert torch.equal(gradsurgery.aggregate([[row] for row in rows], method)[0], rows.sum(0))


def test_an_error_amid_writing_leaves_nothing_to_combine_again(monkeypatch):
    """By then directions have been written over the collected gradients."""
    net = two_task_net()
    optimizer = gradsurgery.GradNorm(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.collect(two_losses(net, X))
    before = grads_of(net)

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(gradsurgery.distributed, "assign_grads", fail)
    with pytest.raises(MemoryError):
        optimizer.combine()
    assert grads_of(net) == before
    monkeypatch.undo()
    with pytest.raises(ValueError, match="nothing to combine"):
        optimizer.combine()
