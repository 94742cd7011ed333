# SPDX-License-Identifier: MIT
"""Surgery on the gradients of features, with one backward pass below them, against plain vector-Jacobian products."""

import copy
import weakref

import pytest
import torch

import gradsurgery
from conftest import grads_of, two_task_net
from gradsurgery import methods
from gradsurgery.backends import choose
from gradsurgery.methods._buffered import BufferedMethod
from gradsurgery.methods._coordinate import CoordinateMethod
from inputs import DEVICE, normal
from test_hidden import step as hidden_step

X = normal(8, 6, torch.float64)
OPTIONS = {"constant": {"task_weights": [0.5, 2.0]}, "krum": {"num_selected": 2}}
TAKEN = [name for name in methods.available() if not isinstance(methods.get(name), BufferedMethod)]


def new(name):
    return methods.get(name, **OPTIONS.get(name, {}))


def wrap(net, method, **arguments):
    return gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method, **arguments)


def features_and_losses(net):
    z = net["trunk"](X).tanh()
    return z, [(net["a"](z) - 1).square().mean(), 3 * (net["b"](z) + 1).square().mean()]


def by_hand(net, name, features, losses):
    """The gradients of all parameters, and the weights, if the method has any."""
    method, trunk = new(name), [*net["trunk"].parameters()]
    rows = [torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True) for loss in losses]
    matrix = torch.stack(
        [
            torch.cat([torch.zeros_like(f) if g is None else g for f, g in zip(features, row, strict=True)])
            for row in rows
        ]
    ).flatten(1)
    weights = None
    if isinstance(method, CoordinateMethod):
        direction = gradsurgery.aggregate(matrix, method)
    else:
        values = torch.stack([loss.detach() for loss in losses])
        weights = method.weights(matrix @ matrix.T, losses=values)
        direction = weights @ matrix
    parts = direction.reshape(-1, features[0].shape[-1]).split([len(f) for f in features])
    heads = [weights[t] if weights is not None and method.weights_losses else 1.0 for t in range(len(losses))]
    below = torch.autograd.grad(features, trunk, parts, retain_graph=True)
    above = [
        factor * torch.autograd.grad(loss, p, retain_graph=True)[0]
        for head, factor, loss in zip("ab", heads, losses, strict=True)
        for p in net[head].parameters()
    ]
    return [*below, *above], weights


@pytest.mark.parametrize("name", TAKEN)
def test_every_method_that_keeps_no_gradients(name):
    net = two_task_net(torch.float64)
    z, losses = features_and_losses(net)
    grads, weights = by_hand(net, name, [z], losses)
    info = wrap(net, new(name)).backward(losses, features=z, mode="representation")
    torch.testing.assert_close(grads_of(net), grads)
    assert info.segments is None
    if weights is not None:
        torch.testing.assert_close(info.weights, weights)


@pytest.mark.parametrize("name", ["mgda", "gradnorm", "graddrop"])
def test_several_features_of_which_tasks_use_some(name):
    net = two_task_net(torch.float64)
    features = [net["trunk"](x).tanh() for x in (X[:3], X[3:])]
    losses = [net["a"](features[0]).square().mean(), (net["b"](features[0]).sum() - net["b"](features[1]).sum()).abs()]
    grads, _ = by_hand(net, name, features, losses)
    wrap(net, new(name)).backward(losses, features=features, mode="representation")
    torch.testing.assert_close(grads_of(net), grads)


def test_on_each_backend(backend, monkeypatch):
    net, chosen = two_task_net(torch.float64), []
    z, losses = features_and_losses(net)
    grads, _ = by_hand(net, "mgda", [z], losses)

    def recorded(name, device, num_tasks):
        chosen.append(name)
        return choose(name, device, num_tasks)

    for module in (gradsurgery._operate, gradsurgery._step, gradsurgery.functional):
        monkeypatch.setattr(module, "choose", recorded)
    wrap(net, "mgda", backend=backend).backward(losses, features=z, mode="representation")
    torch.testing.assert_close(grads_of(net), grads)
    assert len(chosen) >= 3
    assert set(chosen) == {backend}


@pytest.mark.parametrize("name", ["nash_mtl", "gradnorm"])
def test_a_scaler_scales_what_comes_out_alone(name):
    net, other = two_task_net(torch.float64), two_task_net(torch.float64)
    other.load_state_dict(net.state_dict())
    z, losses = features_and_losses(net)
    plain = wrap(net, name).backward(losses, features=z, mode="representation")
    z, losses = features_and_losses(other)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    scaled = wrap(other, name).backward(losses, features=z, mode="representation", scaler=scaler)
    torch.testing.assert_close([scaled.gram, scaled.weights], [plain.gram, plain.weights])
    torch.testing.assert_close(grads_of(other), [8 * grad for grad in grads_of(net)])


@pytest.mark.parametrize("name", ["mgda", "uw"])
def test_passes_and_what_was_there_before(name):
    net = two_task_net(torch.float64)
    z, losses = features_and_losses(net)
    optimizer, passes = wrap(net, name), []
    for part in ("trunk", "a", "b"):
        next(net[part].parameters()).register_hook(lambda _, part=part: passes.append(part))
    optimizer.backward(losses, features=z, mode="representation", retain_graph=True)
    assert sorted(passes) == ["a", "b", "trunk"]
    once = [grad.clone() for grad in grads_of(net)]
    other = copy.deepcopy(optimizer.method.state_dict())
    optimizer.method.load_state_dict({key: None for key in other})
    optimizer.backward(losses, features=z, mode="representation")
    torch.testing.assert_close(grads_of(net), [2 * grad for grad in once])
    for freed in (losses[0], z.sum()):
        with pytest.raises(RuntimeError, match="second time"):
            freed.backward()


def test_losses_of_16_bits_are_not_multiplied_by_weights():
    net = two_task_net(torch.bfloat16)
    z = net["trunk"](X.bfloat16()).tanh()
    losses = [net["a"](z).square().mean(), net["b"](z).square().mean()]
    info = wrap(net, methods.Constant([1.0, 0.0])).backward(losses, features=z, mode="representation")
    assert info.weights.tolist() == [1, 0]
    assert net["b"].weight.grad.abs().max() == 0


@pytest.mark.parametrize("method", ["mgda", "gradnorm"])
@pytest.mark.parametrize("place", [0, 1])
def test_parts_of_a_stack_that_are_constant(method, place):
    found = []
    for mode in ("sequential", "representation"):
        net = two_task_net(torch.float64)
        net.load_state_dict({name: torch.full_like(p, 0.1) for name, p in net.state_dict().items()})
        z, losses = features_and_losses(net)
        losses[place] = torch.ones((), dtype=torch.float64)
        info = wrap(net, new(method)).backward(torch.stack(losses), features=z, mode=mode)
        found.append([*(g for g in grads_of(net) if g is not None), info.weights])
    if method == "gradnorm":  # in representation mode MGDA puts all weight on the zero gradient
        torch.testing.assert_close(*found)
    assert len(found[0]) == len(found[1])
    assert len(found[1][-1]) == 2


def test_a_loss_that_depends_on_nothing_beside_one_that_does():
    net = two_task_net(torch.float64)
    z, (a, _) = features_and_losses(net)
    expected = torch.autograd.grad(a, [*net["trunk"].parameters()], retain_graph=True)
    nothing = torch.zeros((), dtype=torch.float64, requires_grad=True)
    wrap(net, "pcgrad").backward([a, nothing], features=z, mode="representation")
    torch.testing.assert_close([p.grad for p in net["trunk"].parameters()], [*expected])


def test_one_loss_alone():
    net = two_task_net(torch.float64)
    z, (a, _) = features_and_losses(net)
    expected = torch.autograd.grad(a, [*net["trunk"].parameters(), *net["a"].parameters()], retain_graph=True)
    wrap(net, "pcgrad").backward([a], features=z, mode="representation")
    found = [p.grad for part in ("trunk", "a") for p in net[part].parameters()]
    torch.testing.assert_close(found, [*expected])


def test_the_most_tasks_of_a_backend():
    tasks = 256
    trunk, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, tasks)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=0.1))
    z = trunk(torch.randn(5, 3))
    optimizer.backward(head(z).mean(0), features=z, mode="representation")
    assert trunk.weight.grad.isfinite().all()


def test_gradients_of_features_are_freed_before_the_last_pass(monkeypatch):
    net, seen = two_task_net(torch.float64), []
    z, losses = features_and_losses(net)
    alive, parse = [], gradsurgery._operate.parse

    def watching(rows, segments):
        alive.extend(weakref.ref(row[0]) for row in rows)
        return parse(rows, segments)

    monkeypatch.setattr(gradsurgery._operate, "parse", watching)
    net["trunk"][0].weight.register_hook(lambda _: seen.append([reference() is None for reference in alive]))
    wrap(net, "mgda").backward(losses, features=z, mode="representation")
    assert seen == [[True, True]]


def test_tasks_are_remembered():
    net = two_task_net(torch.float64)
    optimizer = wrap(net, "gradnorm")
    z, losses = features_and_losses(net)
    optimizer.backward(dict(zip("ab", losses, strict=True)), features=z, mode="representation")
    z, losses = features_and_losses(net)
    with pytest.raises(ValueError, match="every step must have the same tasks"):
        optimizer.backward(dict(zip("ba", losses, strict=True)), features=z, mode="representation")


def test_steps_of_it_are_surgery(recwarn):
    net = two_task_net(torch.float64)
    optimizer = wrap(net, "pcgrad")
    for _ in range(3):
        z, losses = features_and_losses(net)
        optimizer.backward(losses, features=z, mode="representation")
        optimizer.step()
    assert not recwarn.list


def test_warns_of_losses_that_train_nothing():
    net = two_task_net(torch.float64)
    others = torch.nn.Linear(2, 2)
    z, losses = features_and_losses(net)
    with pytest.warns(UserWarning, match="depend on no parameter of the optimizer"):
        wrap(others, "pcgrad").backward(losses, features=z, mode="representation")


@pytest.mark.parametrize("hidden", ["1", "2", "a"])
def test_functions_that_hide_parameters(hidden):
    found = [hidden_step(h, features=True, mode="representation")[1] for h in (hidden, None)]
    torch.testing.assert_close(*found)


def test_an_embedding_with_sparse_gradients():
    table, head = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 2)
    parameters = [*table.parameters(), *head.parameters()]
    optimizer = gradsurgery.MGDA(torch.optim.SGD(parameters, lr=0.1))
    z = table(torch.tensor([0, 2]))
    a, b = head(z).square().mean(0)
    info = optimizer.backward([a, b], features=z, mode="representation")
    assert table.weight.grad.is_sparse
    z = table(torch.tensor([0, 2]))
    a, b = head(z).square().mean(0)
    below = torch.autograd.grad(info.weights[0].float() * a + info.weights[1].float() * b, table.weight)[0]
    torch.testing.assert_close(table.weight.grad.to_dense(), below.to_dense())


def test_a_gradient_that_is_not_finite_leaves_the_state():
    net = two_task_net(torch.float64)
    optimizer = wrap(net, "pcd")
    z, losses = features_and_losses(net)
    optimizer.backward(losses, features=z, mode="representation")
    before = optimizer.method.state_dict()
    z, (a, b) = features_and_losses(net)
    optimizer.backward([a, b * torch.inf], features=z, mode="representation")
    assert net["trunk"][0].weight.grad.isnan().all()
    torch.testing.assert_close(optimizer.method.state_dict(), before)


class Fault(Exception):
    pass


@pytest.mark.parametrize("stage", ["parse", "combine_of", "add_all"])
def test_a_failure_changes_nothing(monkeypatch, stage):
    net = two_task_net(torch.float64)
    optimizer = wrap(net, "pcd")
    z, losses = features_and_losses(net)
    optimizer.backward(losses, features=z, mode="representation")
    grads, state = [grad.clone() for grad in grads_of(net)], optimizer.method.state_dict()

    def fails(*_, **__):
        raise Fault

    monkeypatch.setattr(gradsurgery._operate, stage, fails)
    z, losses = features_and_losses(net)
    with pytest.raises(Fault):
        optimizer.backward(losses, features=z, mode="representation")
    torch.testing.assert_close(grads_of(net), grads, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.method.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        *((name, {}, f"method '{name}' keeps gradients") for name in sorted(set(methods.available()) - set(TAKEN))),
        ("pcgrad", {"granularity": "per_group"}, "needs granularity 'global', got 'per_group'"),
    ],
)
def test_methods_that_cannot(method, arguments, message):
    net = two_task_net(torch.float64)
    z, losses = features_and_losses(net)
    with pytest.raises(ValueError, match=message):
        wrap(net, method, **arguments).backward(losses, features=z, mode="representation")
    sum(losses).backward()  # the error came before any pass, so the graph is still there


def test_wrong_calls():
    net = two_task_net(torch.float64)
    z, losses = features_and_losses(net)
    measured = methods.GradNorm(norm_parameters=net["trunk"].parameters())
    with pytest.raises(ValueError, match="method 'gradnorm' reads the G of parameters of its own"):
        wrap(net, measured).backward(losses, features=z, mode="representation")
    optimizer = wrap(net, methods.UPGrad([1.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="pref must hold one number for each of 2 tasks"):
        optimizer.backward(losses, features=z, mode="representation")
    optimizer = wrap(net, "pcgrad")
    own = [net["trunk"](x) for x in (X[:3], X[3:])]
    with pytest.raises(ValueError, match="each feature belongs to one loss alone"):
        optimizer.backward([net["a"](own[0]).sum(), net["b"](own[1]).sum()], features=own, mode="representation")
    twisted = torch.view_as_complex(net["trunk"](X).view(8, 4, 2))
    with pytest.raises(TypeError, match="takes real features, got complex ones"):
        optimizer.backward([twisted.abs().sum(), twisted.real.sum()], features=twisted, mode="representation")
    with pytest.raises(ValueError, match="operates on the gradients of features: name them by features="):
        optimizer.backward(losses, mode="representation")
    with pytest.raises(ValueError, match=r"is for backward\(\), whose last pass needs the weights"):
        optimizer.collect(losses, features=z, mode="representation")
    with pytest.raises(ValueError, match="chunk_size is for mode="):
        optimizer.backward(losses, features=z, mode="representation", chunk_size=1)
    optimizer.collect(losses, retain_graph=True)
    with pytest.raises(ValueError, match=r"does not add to what was collected: call combine\(\) first"):
        optimizer.backward(losses, features=z, mode="representation")
    optimizer.combine()
