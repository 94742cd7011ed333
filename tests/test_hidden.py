# SPDX-License-Identifier: MIT
"""Functions whose backward calls ``backward`` itself: what is inside them is not in the graph."""

import pytest
import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils.checkpoint import checkpoint

import gradsurgery
from conftest import grads_of, on_cpu
from gradsurgery._graph import Graph, Root

pytestmark = on_cpu
X = torch.linspace(-1, 1, 48).reshape(8, 6)


class Hiding(torch.autograd.Function):
    """A checkpoint like those of reversible layers and some packages: its backward calls another backward pass."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            return block(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(x)
        torch.autograd.backward(y, grad)
        return None, x.grad


class Net(torch.nn.ModuleDict):
    """A trunk of two layers and two heads; ``hidden`` names the layer that runs in ``Hiding``, if any."""

    def __init__(self, hidden):
        super().__init__(
            {name: torch.nn.Linear(6, outputs) for name, outputs in (("1", 6), ("2", 6), ("a", 1), ("b", 1))}
        )
        self.hidden = hidden
        with torch.no_grad():
            for number, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-1, 1, p.numel()).sin().roll(number).reshape(p.shape))

    def at(self, name, x):
        if name != self.hidden:
            return self[name](x)
        # The function needs an input that requires grad, and the first layer's input X does not.
        return Hiding.apply(self[name], x if x.requires_grad else x.clone().requires_grad_())

    def features(self):
        return self.at("2", self.at("1", X).tanh()).tanh()

    def losses(self, z):
        a, b = self.at("a", z), self.at("b", z)
        return [(a - 1).square().mean(), 3 * (b + 1).square().mean()]


def step(hidden, method="mgda", features=False, steps=1, **options):
    net = Net(hidden)
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
    for _ in range(steps):
        z = net.features()
        info = optimizer.backward(net.losses(z), **({"features": z} if features else {}), **options)
        optimizer.step()
    return info, grads_of(net)


@pytest.mark.parametrize("hidden", ["1", "2", "a"])
@pytest.mark.parametrize("method", ["mgda", "pcgrad", "uw", "m_config"])
def test_gradients_are_those_of_the_open_network(hidden, method):
    info, grads = step(hidden, method, steps=2)  # the second step adds to .grad
    expected, theirs = step(None, method, steps=2)
    torch.testing.assert_close(info.weights, expected.weights)
    torch.testing.assert_close(grads, theirs)


@pytest.mark.parametrize("hidden", ["1", "2", "a"])
def test_by_way_of_features(hidden):
    torch.testing.assert_close(step(hidden, features=True)[1], step(None)[1])


def test_a_layer_that_is_open_elsewhere():
    found = []
    for hidden in ("1", None):
        net = Net(hidden)
        z = net["2"]((net.at("1", X) + net["1"](X.flip(0))).tanh()).tanh()
        gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)).backward(net.losses(z))
        found.append(grads_of(net))
    torch.testing.assert_close(*found)


def test_a_branch_beside_the_features():
    found = []
    for hidden in ("2", None):
        net = Net(hidden)
        z = net["1"](X).tanh()
        losses = [(net["a"](z) + net.at("2", X).mean()).square().mean(), net["b"](z).square().mean()]
        gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)).backward(losses, features=z)
        found.append(grads_of(net))
    torch.testing.assert_close(*found)


def test_a_layer_below_the_features_that_is_hidden_above_them():
    net = Net(None)
    z = net["1"](X).tanh()
    losses = net.losses(Hiding.apply(net["1"], z))
    with pytest.raises(ValueError, match=r"parameters \[0, 1\] are used above and below the features"):
        gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)).backward(losses, features=z)
    assert not any(p.grad is not None for p in net.parameters())


def test_hidden_functions_between_features():
    net = Net(None)
    left, right = net["1"](X).tanh().chunk(2, 1)
    hidden = Hiding.apply(torch.nn.Linear(3, 3), right)
    with pytest.raises(ValueError, match="feature 0 comes out of a function on which feature 1 depends"):
        gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)).backward(
            net.losses(torch.cat([left, hidden], 1)), features=[left, hidden]
        )


def test_a_hidden_branch_from_what_a_feature_depends_on():
    found = []
    for hidden in ("2", None):
        net = Net(hidden)
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))

        def backward(branch, net=net, optimizer=optimizer):
            x = 2 * X.clone().requires_grad_()
            z = net["1"](x).tanh()
            optimizer.backward(net.losses(z + net.at("2", branch(x))), features=z)

        if hidden:
            with pytest.raises(ValueError, match=r"feature 0, .* or on the input of a function in Python"):
                backward(lambda x: x)
        backward(lambda x: x.view_as(x))
        found.append(grads_of(net))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("features", [False, True])
def test_nothing_but_what_is_hidden(features):
    found = []
    for hidden in ("1", None):
        net = Net(hidden)
        z = net.at("1", X).tanh()
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net["1"].parameters(), lr=0.1))  # must not warn
        optimizer.backward(net.losses(z), **({"features": z} if features else {}))
        found.append(grads_of(net))
    torch.testing.assert_close(*found)


class Rounded(torch.autograd.Function):
    """A function that hides nothing, with an attribute of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.name = "rounded"
        return x.round(decimals=2)

    @staticmethod
    def backward(ctx, grad):
        return grad


WAYS = [{}, {"mode": "batched"}, {"features": True}, {"features": True, "mode": "batched"}]


@pytest.mark.parametrize("way", WAYS, ids=["sequential", "batched", "features", "batched features"])
def test_functions_that_hide_nothing_have_no_side_effects(way):
    found = []
    for function in (Rounded.apply, lambda x: x + (x.round(decimals=2) - x).detach()):
        net, x, outside, grads = Net(None), X.clone().requires_grad_(), torch.nn.Linear(6, 6), []
        outside.load_state_dict(net["1"].state_dict())
        outside.weight.register_post_accumulate_grad_hook(grads.append)
        optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
        for _ in range(2):
            z = net["2"](net["1"](function(outside(function(x)))).tanh()).tanh()
            optimizer.backward(net.losses(z), **{**way, **({"features": z} if "features" in way else {})})
        assert grads == []
        assert x.grad is outside.weight.grad is None
        found.append(grads_of(net))
    torch.testing.assert_close(*found)


def test_functions_of_torch_need_not_run():
    net, outside, calls = Net(None), torch.nn.Linear(6, 6), []
    outside.register_full_backward_hook(lambda *found: calls.append(found))
    x, y = (X.clone().requires_grad_() for _ in range(2))
    z = net["1"](outside(x)) + net["1"](Rounded.apply(y))
    gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)).backward(net.losses(z))
    assert calls == []


def test_batched_passes_without_shared_parameters():
    net = Net(None)
    optimizer = gradsurgery.MGDA(torch.optim.SGD([*net["a"].parameters(), *net["b"].parameters()], lr=0.1))
    optimizer.backward(net.losses(Rounded.apply(X.clone().requires_grad_())), mode="batched")
    expected = grads_of(net)[-4:]
    optimizer.zero_grad()
    sum(net.losses(X.round(decimals=2))).backward()
    torch.testing.assert_close(grads_of(net)[-4:], expected)
    net = Net("1")
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="batched backward pass failed"):
        optimizer.backward(net.losses(net.at("1", X)), mode="batched")


@pytest.mark.parametrize("hidden", ["1", "2", "a"])
def test_batched_passes_refuse(hidden):
    net = Net(hidden)
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="batched backward pass failed"):
        optimizer.backward(net.losses(net.features()), mode="batched")
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in net.parameters())


def test_a_failure_leaves_no_gradient():
    net = Net("2")
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    passes = []

    def fail(grad):
        passes.append(grad)
        if len(passes) == 2:
            raise ArithmeticError("the second pass")

    z = net.at("1", X)
    z.register_hook(fail)
    with pytest.raises(ArithmeticError, match="the second pass"):
        optimizer.backward(net.losses(net.at("2", z.tanh()).tanh()))
    assert grads_of(net) == [None] * 8


@pytest.mark.parametrize("hidden", ["1", "2"])
def test_an_interrupt_while_the_first_graph_is_read(hidden, monkeypatch):
    net = Net(hidden)
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    with monkeypatch.context() as patch:
        patch.setattr(Graph, "of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            optimizer.backward(net.losses(net.features()))
    optimizer.backward(net.losses(net.features()))
    torch.testing.assert_close(grads_of(net), step(hidden)[1])


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize(("mode", "times"), [("sequential", 1 + 3), ("batched", 2)])
def test_passes_compute_anew_what_a_checkpoint_covers(mode, times):
    trunk = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5))
    heads = torch.nn.ModuleList(torch.nn.Linear(5, 1) for _ in range(3))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=0.1))
    z = checkpoint(trunk, X, use_reentrant=False)
    optimizer.backward([head(z).square().mean() for head in heads], mode=mode)
    assert trunk[1].num_batches_tracked == times


def test_passes_name_an_edge_where_nothing_else_leads_through_a_function():
    layers = [torch.nn.Linear(6, 6) for _ in range(3)]
    x, own = X.clone().requires_grad_(), torch.nn.Parameter(torch.ones(6))
    z, twice = Hiding.apply(layers[0], x), 2 * x
    y = Hiding.apply(layers[1], z) + Hiding.apply(layers[2], twice) + Hiding.apply(layers[0], own * x)

    def nodes(stops):
        graph = Graph.of([Root(y.sum()), *map(Root, stops)])
        reached = graph.reach(graph.roots[:1], graph.roots[1:])
        return [edge.node for edge in graph.edges_behind_functions([own], reached, graph.roots[1:]).values()]

    assert nodes([]) == [get_gradient_edge(x).node, twice.grad_fn]
    assert nodes([z]) == [twice.grad_fn]
    assert nodes([z, twice]) == []


def test_batched_passes_through_what_is_hidden_where_nothing_is_shared():
    layers = [torch.nn.Linear(6, 6) for _ in range(4)]
    optimizer = gradsurgery.MGDA(torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=0.1))
    with pytest.raises(RuntimeError, match="calls backward"):
        optimizer.backward([Hiding.apply(layers[i + 2], layers[i](X)).sum() for i in range(2)], mode="batched")
    assert layers[0].weight.grad is None
