# SPDX-License-Identifier: MIT
"""What a step's passes go through, and who gets gradients: checkpoints, other dtypes, hooks, other parameters."""

import threading
import weakref
from functools import partial

import pytest
import torch
from torch.autograd.graph import register_multi_grad_hook
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import gradsurgery
from conftest import grads_of, needs_extension, two_losses, two_task_net
from gradsurgery import _graph

X = torch.linspace(-1, 1, 48).reshape(8, 6)


@pytest.mark.parametrize("method", ["pcgrad", "uw"])
@pytest.mark.parametrize("trained", [True, False])
def test_reentrant_checkpoints(method, trained):
    """A pass to named inputs raises in such a checkpoint, or misses its parameters if nothing before it is trained."""
    net = two_task_net()
    net["trunk"][0].requires_grad_(trained)
    x = X.clone().requires_grad_()

    def losses(reentrant):
        z = checkpoint(net["trunk"][1:], net["trunk"][0](x), use_reentrant=reentrant)
        return [net["a"](z).square().mean(), net["b"](z).abs().mean()]

    found = []
    for reentrant in (True, False):
        net.zero_grad()
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
        for _ in range(2):
            info = optimizer.backward(losses(reentrant))
        found.append((grads_of(net), info.weights))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert found[0][0][2] is not None
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "pcgrad")
    with pytest.raises(ValueError, match="use_reentrant=False take both"):
        optimizer.backward(losses(True), mode="batched")


class Keeping(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        y = x.clone()
        ctx.save_for_backward(y)
        kept.append(weakref.ref(y))
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def test_what_the_last_loss_does_not_depend_on_goes_with_the_losses():
    net, kept = two_task_net(), []
    z = net["trunk"](X)
    losses = [Keeping.apply(net[name](z), kept).mean() for name in "ab"]
    gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1)).backward(losses)
    assert [y() is None for y in kept] == [False, True]
    del losses
    assert [y() is None for y in kept] == [True, True]


def test_losses_and_parameters_of_other_classes():
    class Other(torch.Tensor):
        pass

    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "dwa")
    for _ in range(2):
        info = optimizer.backward([loss.as_subclass(Other) for loss in two_losses(net, X)])
    assert type(info.weights) is torch.Tensor
    assert all(type(v) is torch.Tensor for v in optimizer.method.state_dict().values() if isinstance(v, torch.Tensor))


def test_shared_parameters_without_elements():
    weight, empty = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(0, 3))
    y = weight + empty.sum()
    gradsurgery.PCGrad(torch.optim.SGD([weight, empty], lr=0.1)).backward([y.sum(), -y[0]])
    assert empty.grad.shape == (0, 3)


def test_parameters_without_memory():
    net = two_task_net().to("meta")
    gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1)).backward(two_losses(net, X.to("meta")))
    assert all(p.grad.is_meta for p in net.parameters() if p.grad is not None)


def test_a_complex_head_outside_the_surgery():
    net, head = two_task_net(), torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    optimizer = gradsurgery.PCGrad(torch.optim.Adam([*net.parameters(), head], lr=0.1))
    for times in (1, 2):
        a, b = two_losses(net, X)
        optimizer.backward([a + (head * (2 + 1j)).abs().sum(), b])
        (expected,) = torch.autograd.grad((head * (2 + 1j)).abs().sum(), head)
        torch.testing.assert_close(head.grad, times * expected)
    optimizer.step()
    with pytest.raises(TypeError, match=r"is a torch.complex64 gradient, and gradients must be real"):
        optimizer.backward([head.abs().sum(), head.abs().square().sum()])


@pytest.mark.parametrize("shape", [(), (3,)])
def test_parameters_whose_gradients_are_negated_views(shape, backend):
    """The gradient of a conjugate's imaginary part is a negated view: its memory holds the opposite sign."""
    real, imaginary = (torch.nn.Parameter(torch.full(shape, value)) for value in (2.0, 1.0))

    def losses():
        z = torch.complex(real, imaginary).conj()
        return [(z * (1 + 2j)).real.sum(), (z * (3 - 1j)).real.sum()]

    expected = [torch.full(shape, 4.0), torch.full(shape, 1.0)]
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([real, imaginary], lr=0.1), "pcgrad", backend=backend)
    sum(losses()).backward()  # leaves a negated view in .grad
    assert imaginary.grad.is_neg() or shape
    for times in (2, 3):
        info = optimizer.backward(losses())
        torch.testing.assert_close([real.grad, imaginary.grad], [times * g for g in expected], rtol=0, atol=0)
    size = real.numel()
    torch.testing.assert_close(info.gram, size * torch.tensor([[5.0, 1.0], [1.0, 10.0]]).double(), rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
def test_gradients_wider_than_their_parameters():
    net = two_task_net(torch.bfloat16)
    optimizer = gradsurgery.GradNorm(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward(two_losses(net, X.bfloat16()))
    narrow = optimizer.method.state_dict()
    for p in net.parameters():
        p.grad_dtype = None
    optimizer.zero_grad()
    net["trunk"][0].weight.grad = torch.zeros_like(net["trunk"][0].weight, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"is torch.float32, its new gradients are torch.bfloat16"):
        optimizer.backward(two_losses(net, X.bfloat16()))
    torch.testing.assert_close(optimizer.method.state_dict(), narrow, rtol=0, atol=0)
    optimizer.zero_grad()
    for p in net.parameters():
        p.grad_dtype = torch.float32
    for times in (1, 2):
        optimizer.backward(two_losses(net, X.bfloat16()))
        assert all(g.dtype == torch.float32 for g in grads_of(net)), times


@pytest.mark.parametrize("method", ["pcgrad", "uw", "sum"])
def test_under_no_grad(method):
    """Under no_grad ``backward`` works, as the losses already have their graph."""
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
    for form in (list, torch.stack):
        losses = form(two_losses(net, X))
        with torch.no_grad():
            optimizer.backward(losses)
    assert all(g is not None for g in grads_of(net))


def test_a_step_without_what_was_collected_is_warned_of():
    net = two_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.collect(two_losses(net, X))
    with pytest.warns(UserWarning, match=r"call combine\(\) before step\(\)"):
        optimizer.step()
    optimizer.combine()
    optimizer.step()


@pytest.mark.parametrize("method", ["pcgrad", "uw"])
def test_parameters_outside_the_optimizer_get_no_gradient(method):
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net["trunk"].parameters(), lr=0.1), method)
    optimizer.backward(two_losses(net, X))
    assert all(p.grad is not None for p in net["trunk"].parameters())
    assert net["a"].weight.grad is None


def test_hooks_run_once_for_each_loss_and_not_after_accumulation():
    net, calls = two_task_net(), []
    weight = net["trunk"][0].weight
    weight.register_hook(lambda grad: calls.append("gradient"))
    weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1)).backward(two_losses(net, X))
    assert calls == ["gradient"] * 2


def test_passes_through_reentrant_checkpoints_reach_other_parameters_and_hooks():
    net, calls = two_task_net(), []
    weight, head = net["trunk"][0].weight, net["a"].weight
    weight.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated"))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net["trunk"].parameters(), lr=0.1))
    z = checkpoint(net["trunk"], X.clone().requires_grad_(), use_reentrant=True)
    optimizer.backward([net["a"](z).square().mean(), net["a"](z).abs().mean()])
    assert calls == ["accumulated"] * 2
    z = net["trunk"](X).detach()
    (expected,) = torch.autograd.grad(net["a"](z).square().mean() + net["a"](z).abs().mean(), head)
    torch.testing.assert_close(head.grad, expected)


def test_what_was_collected_is_dropped_by_the_optimizer_not_the_model():
    net = two_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.collect(two_losses(net, X))
    net.zero_grad()
    optimizer.combine()
    optimizer.collect(two_losses(net, X))
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="nothing to combine"):
        optimizer.combine()


def test_selective_checkpoints_take_one_pass():
    trunk = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh())
    optimizer = gradsurgery.MGDA(torch.optim.SGD(trunk.parameters(), lr=0.1))
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])

    def step(selective, by_features=False, **way):
        trunk.zero_grad()
        z = checkpoint(trunk, X, use_reentrant=False, context_fn=contexts) if selective else trunk(X)
        optimizer.backward([z.mean(), -z[:, 0].mean()], features=z if by_features else None, **way)
        return grads_of(trunk)

    torch.testing.assert_close(step(True, mode="batched"), step(False))
    representation = {"by_features": True, "mode": "representation"}
    torch.testing.assert_close(step(True, **representation), step(False, **representation))
    with pytest.raises(RuntimeError, match="an extra time"):
        step(True)


class SquareInPlace(torch.autograd.Function):
    """A function that saves memory: it writes its gradient over its input."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0].data.mul_(2 * grad)


def test_functions_that_overwrite_what_they_saved_are_wrong_from_the_second_pass_on():
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 18).reshape(6, 3))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([weight], lr=0.1))
    norms = []
    for square in (torch.square, SquareInPlace.apply):
        y = square(X @ weight)
        norms.append(optimizer.backward([y.mean(), -y[:, 0].mean()]).norms)
    right, wrong = norms
    torch.testing.assert_close(wrong[0], right[0])
    assert not torch.isclose(wrong[1], right[1])


def test_multi_grad_hooks_of_parameters_do_not_work():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([weight], lr=0.1))
    with register_multi_grad_hook([weight], lambda grads: None), pytest.raises(RuntimeError, match="leaf node"):
        optimizer.backward([weight.sum(), weight.square().sum()])
    assert weight.grad is None
    optimizer.backward([weight.sum(), weight.square().sum()])


class Same(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


@needs_extension
@pytest.mark.parametrize("way", ["batched", "features", "function"])
def test_deep_graphs(way):
    """If Python has walked a graph, torch 2.13 frees its nodes recursively: a deep graph overflows the stack."""

    def step():
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = gradsurgery.PCGrad(torch.optim.SGD([weight], lr=0.1))
        state = weight * 1
        for _ in range(20_000):
            state = state * 1
        if way == "function":
            state = Same.apply(state)
        losses = [state.sum(), -state[0]]
        passes = {"batched": {"mode": "batched"}, "features": {"features": state}}.get(way, {})
        del state
        finite.append(optimizer.backward(losses, **passes).finite)

    finite = []
    before = threading.stack_size(512 << 10)  # 20,000 nested calls need several times as much
    try:
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert finite == [True]


def test_the_graph_is_the_same_without_the_extension(monkeypatch):
    net = two_task_net()
    z = Same.apply(net["trunk"](X)).tanh()
    halves = z.split(3, 1)
    stacked = torch.stack([net["a"](z).mean(), halves[0].exp().sum(), -halves[1].detach().sum(), halves[1].sum()])
    roots = [_graph.Root(stacked[0]), *(_graph.Root(stacked[p], p) for p in (3, 1, 0)), _graph.Root(net["b"].weight)]
    graph = _graph.Graph.of(roots)
    monkeypatch.setattr(_graph, "C", None)
    assert _graph.Graph.of(roots) == graph
    assert graph.names[graph.roots[-1][0]] == "AccumulateGrad"
    assert {"SameBackward", "SplitBackward0", "StackBackward0"} < set(graph.names)
    assert all(source < node for node, edges in enumerate(graph.edges) for source, _ in edges)
