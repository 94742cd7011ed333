# SPDX-License-Identifier: MIT
"""The ways to compute task gradients from losses: all yield the same gradients."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.parallel.distributed import _DDPSink

import gradsurgery
from conftest import two_losses, two_task_net
from gradsurgery import _memory
from gradsurgery._graph import Graph, Root
from gradsurgery.collect import PassOptions, collect
from inputs import DEVICE

X = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(8, 6)
WAYS = [
    {"mode": "batched"},
    {"mode": "batched", "chunk_size": 1},
    {"mode": "batched", "chunk_size": 2},
    {"mode": "batched", "chunk_size": 9},
]


class Net(nn.Module):
    """A trunk with two features, three tasks; task 1 sees only the first feature, task 2 only the second."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(6, 5)
        self.left, self.right = nn.Linear(5, 4), nn.Linear(5, 3)
        self.decoder = nn.Linear(7, 2)
        self.heads = nn.ModuleList([nn.Linear(2, 1), nn.Linear(4, 1), nn.Linear(3, 1)])
        self.to(DEVICE, torch.float64)

    def forward(self, x):
        h = torch.tanh(self.trunk(x.to(DEVICE)))
        self.features = [torch.tanh(self.left(h)), torch.tanh(self.right(h))]
        decoded = self.decoder(torch.cat(self.features, 1)).relu()
        outputs = [decoded, *self.features]
        return [head(z).square().mean() for head, z in zip(self.heads, outputs, strict=True)]


def assert_same(rows, expected):
    for row, wanted in zip(rows, expected, strict=True):
        for grad, other in zip(row, wanted, strict=True):
            assert (grad is None) == (other is None)
            if grad is not None:
                torch.testing.assert_close(grad, other, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", [{}, *WAYS], ids=str)
@pytest.mark.parametrize("by_features", [False, True])
def test_every_way_yields_the_same(way, by_features):
    net = Net()
    parameters = list(net.parameters())
    losses = net(X)
    expected = collect(losses, parameters, PassOptions(retain_graph=True)).grads
    features = net.features if by_features else None
    kept = collect(losses, parameters, PassOptions(features=features, retain_graph=True, **way))
    assert_same(kept.grads, expected)
    assert_same(collect(losses, parameters, PassOptions(features=features, **way)).grads, expected)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(losses[0], net.trunk.weight)


class WithFeatures(Net):
    def forward(self, x):
        return (*super().forward(x), *self.features)


@pytest.mark.parametrize("way", [{}, *WAYS], ids=str)
@pytest.mark.parametrize("wrapper", ["hooks", "unused parameters"])
def test_outputs_that_a_wrapper_hands_on(way, wrapper):
    """Modules with full backward hooks, or in DDP with unused parameters, return copies of their outputs."""
    net, sink = WithFeatures(), SimpleNamespace(_ddp_sink_clone=True, reducer=None, static_graph=False)
    parameters = list(net.parameters())
    expected = collect(net(X)[:3], parameters, PassOptions()).grads
    if wrapper == "hooks":
        net.register_full_backward_hook(lambda *_: None)
        *losses, left, right = net(X.clone().requires_grad_())
    else:
        # DistributedDataParallel passes on all that a module returns: also tensors without a graph, and other objects.
        _, _, *losses, _, left, right = _DDPSink.apply(lambda: sink, 3, X, *net(X)[:3], None, *net.features)
    assert_same(collect(losses, parameters, PassOptions(retain_graph=True, **way)).grads, expected)
    with pytest.raises(ValueError, match="a model with hooks, one in DistributedDataParallel"):
        collect(losses, parameters, PassOptions(features=[left, right], retain_graph=True, **way))
    assert_same(collect(losses, parameters, PassOptions(features=net.features, **way)).grads, expected)


@pytest.mark.parametrize("way", [{}, *WAYS], ids=str)
def test_features_that_are_outputs_of_one_function(way):
    """One feature is an output of a function, and another one depends on its other output by further functions.

    Torch would run these functions in the passes above the features, too.
    """
    encoder, decoder, head = nn.Linear(6, 8).double(), nn.Linear(4, 6).double(), nn.Linear(8, 3).double()
    parameters = [*encoder.parameters(), *decoder.parameters(), *head.parameters()]

    def run(viewed, features):
        mean, log_variance = encoder(X).chunk(2, 1)
        mean = mean.view_as(mean) if viewed else mean
        deviation = (log_variance / 2).exp()
        losses = [decoder(mean + deviation).square().mean(), head(torch.cat([mean, deviation], 1)).square().mean()]
        return collect(losses, parameters, PassOptions(features=features(mean, log_variance, deviation), **way)).grads

    expected = run(False, lambda *_: None)
    with pytest.raises(ValueError, match="feature 0 comes out of a function on which feature 1 depends by another"):
        run(False, lambda mean, _, deviation: [mean, deviation])
    assert_same(run(True, lambda mean, _, deviation: [mean, deviation]), expected)
    assert_same(run(False, lambda mean, log_variance, _: [mean, log_variance]), expected)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.side = nn.Linear(6, 4).double(), nn.Linear(6, 4).double()

    def forward(self, x):
        return self.main(x), self.side(x)


def test_features_beside_an_output_of_a_module_with_hooks():
    pair, head = Pair(), nn.Linear(4, 1).double()
    pair.register_full_backward_hook(lambda *_: None)
    parameters = [*pair.parameters(), *head.parameters()]

    def run(features):
        main, side = pair(X.clone().requires_grad_())
        feature, side = main.tanh(), side.view_as(side)
        return collect(
            [head(feature).mean(), (feature * side).mean()], parameters, PassOptions(features=features(feature, side))
        )

    with pytest.raises(
        ValueError, match="run on through feature 0, which depends on a function by whose other outputs"
    ):
        run(lambda feature, _: feature)
    assert_same(run(lambda *both: both).grads, run(lambda *_: None).grads)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_tensors_that_retain_their_gradient(mode):
    net = Net()
    losses = net(X)
    left, _ = net.features
    (expected,) = torch.autograd.grad(sum(losses), left, retain_graph=True)
    left.retain_grad()
    collect(losses, list(net.parameters()), PassOptions(mode=mode))
    if mode == "sequential":
        torch.testing.assert_close(left.grad, expected)
    else:
        with pytest.raises(RuntimeError, match="vmap"):
            left.grad.norm()


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("method", ["pcgrad", "gradnorm"])
def test_training_steps_are_the_same(way, method):
    grads = []
    for arguments in ({}, way):
        torch.manual_seed(0)
        net = two_task_net(torch.float64)
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
        for _ in range(3):
            optimizer.zero_grad()
            info = optimizer.backward(two_losses(net, X), **arguments)
            optimizer.step()
        grads.append([info.gram, info.weights, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*grads)


def test_heads_stay_out_of_the_gram_matrix():
    net = two_task_net(torch.float64)
    losses = two_losses(net, X)
    trunk = list(net["trunk"].parameters())
    rows = [torch.autograd.grad(loss, trunk, retain_graph=True) for loss in losses]
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    torch.testing.assert_close(optimizer.backward(losses, mode="batched").gram, gradsurgery.gram(rows))


def test_features_part_each_head_from_the_trunk():
    """Each head's backward runs once; the trunk's runs once per task, or, if batched, once in all."""
    counts = {}

    def count(name):
        def hook(grad):
            counts[name] = counts.get(name, 0) + 1

        return hook

    for way, trunk_passes in (({}, 3), ({"mode": "batched"}, 1)):
        counts.clear()
        net = Net()
        losses = net(X)
        net.features[0].grad_fn.register_hook(lambda *_: counts.update(trunk=counts.get("trunk", 0) + 1))
        net.heads[1].weight.register_hook(count("head"))
        collect(losses, list(net.parameters()), PassOptions(features=net.features, **way))
        assert counts["head"] == 1
        assert counts["trunk"] == trunk_passes - (1 if way == {} else 0)  # task 2 does not see this feature


class NoVmap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(grad.detach().cpu().numpy() * 2).to(grad.device)


def test_what_vmap_cannot_take_is_named():
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([p], lr=0.1))
    make = lambda: [NoVmap.apply(p).sum(), -NoVmap.apply(p).square().sum()]  # noqa: E731
    with pytest.raises(RuntimeError, match=r"the batched backward pass failed: .*mode='sequential'"):
        optimizer.backward(make(), mode="batched")
    assert p.grad is None
    assert optimizer.method.state_dict()["step"] == 0
    optimizer.backward(make())
    assert p.grad is not None


def test_what_vmap_gets_wrong_is_refused():
    centers = nn.Parameter(torch.randn(10, 4, device=DEVICE))
    heads = nn.ModuleList(nn.Linear(10, 1) for _ in range(2)).to(DEVICE)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([centers, *heads.parameters()], lr=0.1))
    features = (-torch.cdist(torch.randn(16, 4, device=DEVICE), centers).square()).exp()
    losses = [(head(features) - t).square().mean() for t, head in enumerate(heads)]
    for options in ({}, {"features": features}):
        with pytest.raises(RuntimeError, match=r"wrong gradients of CdistBackward0 .*mode='sequential'"):
            optimizer.backward(losses, mode="batched", retain_graph=True, **options)
    scattered = torch.zeros(16, device=DEVICE).as_strided_scatter(centers[0], (4,), (2,))
    with pytest.raises(RuntimeError, match="wrong gradients of AsStridedScatterBackward0"):
        optimizer.backward([scattered.sum(), scattered.square().sum()], mode="batched")
    # Above the features each loss has a pass of its own.
    z = centers.tanh()
    distances = [torch.cdist(z, z[:3] + t).square().mean() for t in range(2)]
    optimizer.backward(distances, mode="batched", features=z)


def test_gradients_of_zero_share_no_memory():
    p = nn.Parameter(torch.randn(4, device=DEVICE))
    gradsurgery.PCGrad(torch.optim.SGD([p], lr=0.1)).backward([torch.sgn(p).sum(), 2 * torch.sgn(p).sum()])
    assert not p.grad.any()


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


class Static(torch.autograd.Function):
    """A product whose backward pass always writes to the same memory, as graphed callables do."""

    memory = torch.zeros(2, 3)

    @staticmethod
    def forward(ctx, w, x):
        ctx.save_for_backward(w, x)
        return w @ x

    @staticmethod
    def backward(ctx, grad):
        w, x = ctx.saved_tensors
        return Static.memory[0].copy_(grad * x).view(3), Static.memory[1].copy_(grad * w).view(3)


@pytest.mark.parametrize(
    "way",
    [
        lambda y, z, other: ([y, -2 * y], {}),
        lambda y, z, other: ([y, other, -2 * y], {}),
        lambda y, z, other: ([y, -2 * y], {"features": y}),
        lambda y, z, other: ([y + z.sum(), z.sum() - 2 * y], {"features": z}),
        lambda y, z, other: ([y + z.sum(), z.sum() - 2 * y], {"features": z, "mode": "batched"}),
        lambda y, z, other: ([Static.apply(z, z.detach()), z.sum(), -Static.apply(z, z.detach())], {"features": z}),
    ],
    ids=["neighbours", "apart", "below", "above", "above, batched", "features"],
)
def test_passes_that_write_to_the_same_memory_are_an_error(way):
    w, v = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    losses, options = way(Static.apply(w, torch.arange(3.0)), 2 * v, w.square().sum())
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([w, v], lr=0.1), "pcgrad")
    with pytest.raises(RuntimeError, match="returned gradients in the same memory"):
        optimizer.backward(losses, **options)
    assert w.grad is None


def test_gradients_in_the_same_memory_are_found_in_any_place():
    a, b, c, empty = torch.ones(4), torch.ones(4), torch.ones(3), torch.ones(0)
    sparse = torch.eye(2).to_sparse()
    for rows, shared in (
        ([[a, None], [b, c], [None, c]], True),
        ([[a, c], [b, None], [a[1:], None]], False),
        ([[a, empty], [b, empty]], False),
        ([[a, b], [b, a]], False),
        ([[sparse, a], [sparse, b]], False),
        ([[sparse, a], [None, a]], True),
        ([[None], [None]], False),
        ([[a], [a[:2]]], True),
    ):
        assert _memory._shares_memory(rows) == shared
        with pytest.raises(_memory.OverwrittenError) if shared else nullcontext():
            _memory.check_memory(rows)


def test_copies_on_write_are_not_in_the_same_memory():
    gradient = torch.ones(4)
    _memory.check_memory([[gradient], [torch._lazy_clone(gradient)]])


@pytest.mark.parametrize("method", ["pcgrad", "modo"])  # one sums the batches, the other keeps them apart
def test_micro_batches_that_write_to_the_same_memory_are_an_error(method):
    w = nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([w], lr=0.1), method)
    optimizer.collect([Static.apply(w, torch.arange(3.0)), w.sum()])
    with pytest.raises(RuntimeError, match="returned gradients in the same memory"):
        optimizer.collect([Static.apply(w, torch.ones(3)), w.sum()])


def test_tasks_one_by_one_that_write_to_the_same_memory_are_an_error():
    w = nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([w], lr=0.1))
    optimizer.collect([Static.apply(w, torch.arange(3.0)), None])
    with pytest.raises(gradsurgery.OverwrittenError):
        optimizer.collect([None, Static.apply(w, torch.ones(3))])


def test_a_graph_without_a_gradient():
    a, b, c = (nn.Parameter(torch.ones(2, device=DEVICE)) for _ in range(3))
    losses = [(a * c).sum() + Stop.apply(b).sum(), (a * a).sum()]
    expected = collect(losses, [a, b, c], PassOptions(retain_graph=True)).grads
    assert expected[0][1] is None
    assert_same(collect(losses, [a, b, c], PassOptions(mode="batched")).grads, expected)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_batched_zeros_of_a_shared_parameter_without_a_gradient():
    p = nn.Parameter(torch.ones(2, dtype=torch.bfloat16, device=DEVICE))
    p.grad_dtype = torch.float32
    (first,), (second,) = collect([Stop.apply(p).sum(), Stop.apply(p).sum()], [p], PassOptions(mode="batched")).grads
    assert_same([[first], [second]], [[torch.zeros(2, device=DEVICE)]] * 2)


def test_errors():
    net = Net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    losses = net(X)
    left, right = net.features
    detached = torch.ones(3)
    for arguments, message in [
        ({"mode": "vmap"}, "mode must be one of sequential, batched, representation, got 'vmap'"),
        ({"chunk_size": 2}, "chunk_size is for mode="),
        ({"mode": "batched", "chunk_size": 0}, "chunk_size must be an int >= 1, got 0"),
        ({"mode": "batched", "chunk_size": True}, "chunk_size must be an int >= 1, got True"),
        ({"features": []}, "features must be a tensor with a graph"),
        ({"features": detached}, "features must be a tensor with a graph"),
        ({"features": [left]}, r"parameters \[0, 1\] are used above and below"),
        ({"features": [left, right, left.tanh()]}, "feature 2 depends on another one"),
        ({"features": [left, right, net(X)[0]]}, "no loss depends on feature 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            optimizer.backward(losses, **arguments)
    for features, came in [(net, "got Net$"), ([left, net], "got Net in it"), (3, "got int 3")]:
        with pytest.raises(TypeError, match=f"features must be a tensor with a graph.*, {came}"):
            optimizer.backward(losses, features=features)
    right.retain_grad()
    with pytest.raises(ValueError, match="feature 1 has hooks or retains its gradient"):
        optimizer.backward(losses, features=[left, right])
    left.register_hook(lambda grad: grad / 2)
    with pytest.raises(ValueError, match="feature 0 has hooks"):
        optimizer.backward(losses, features=[left, right])
    assert all(p.grad is None for p in net.parameters())
    optimizer.backward(net(X), features=net.features)


def test_reach_without_a_graph_in_between():
    leaf, other = (torch.ones((), requires_grad=True) for _ in range(2))
    graph = Graph.of([Root(leaf), Root(leaf * other), Root(other.expand(2).sum())])
    reach = graph.reach(graph.roots)
    assert reach.leaves == {id(leaf): 3, id(other): 6}
    assert reach.stops == []
    z = leaf * 2
    graph = Graph.of([Root(z), Root(z + other)])
    reach = graph.reach(graph.roots, graph.roots[:1])
    assert reach.leaves == {id(other): 2}
    assert reach.stops == [3]
