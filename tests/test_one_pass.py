# SPDX-License-Identifier: MIT
"""Methods that weight losses without G take one backward pass, from the weighted sum of the losses."""

import pytest
import torch

import gradsurgery
from conftest import grads_of, two_losses, two_task_net
from inputs import DEVICE

X = torch.linspace(-1, 1, 48).reshape(8, 6)
METHODS = [
    name
    for name in gradsurgery.methods.available()
    if (method := gradsurgery.methods.get(name)).weights_losses and not method.needs_gram
]


class Counted(torch.autograd.Function):
    """The identity, which counts the passes that go back through it."""

    passes = 0

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        Counted.passes += 1
        return grad


def counted_losses(net):
    z = Counted.apply(net["trunk"](X)).tanh()
    return [(net["a"](z) - 1).square().mean(), 3 * (net["b"](z) + 1).square().mean()]


def optimizer_of(net, method):
    return gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)


@pytest.mark.parametrize("method", METHODS)
def test_one_pass_is_what_surgery_on_the_task_gradients_gives(method):
    torch.manual_seed(3)
    one, each = two_task_net(torch.float64), two_task_net(torch.float64)
    each.load_state_dict(one.state_dict())
    first, second = optimizer_of(one, method), optimizer_of(each, method)
    for _ in range(3):
        first.zero_grad()
        second.zero_grad()
        info = first.backward(two_losses(one, X.double()))
        second.collect(two_losses(each, X.double()))
        torch.testing.assert_close(info.weights, second.combine().weights)
        torch.testing.assert_close(grads_of(one), grads_of(each))
        first.step()
        second.step()
    torch.testing.assert_close(first.method.state_dict(), second.method.state_dict())


def test_the_trunk_is_walked_once():
    for method, passes in (("uw", 1), ("sum", 1), ("gradnorm", 2), ("pcgrad", 2)):
        Counted.passes = 0
        net = two_task_net()
        optimizer_of(net, method).backward(counted_losses(net))
        assert Counted.passes == passes


def test_what_there_is_to_know():
    net = two_task_net()
    optimizer = optimizer_of(net, "dwa")
    info = optimizer.backward({"left": two_losses(net, X)[0], "right": two_losses(net, X)[1]})
    assert info.tasks == ["left", "right"]
    assert info.to_dict()["weights"] == [1.0, 1.0]
    assert info.to_dict()["cosines"] is None
    for field in ("gram", "norms", "cosines", "conflicts", "magnitude_similarity", "update_norm", "finite"):
        with pytest.raises(ValueError, match=r"collect\(\) and combine\(\) compute G"):
            getattr(info, field)
    optimizer.collect(dict(zip(info.tasks, two_losses(net, X), strict=True)))
    assert optimizer.combine().cosines.shape == (2, 2)


def test_results_are_added_and_other_parameters_keep_their_grad():
    net = two_task_net()
    net["unused"] = torch.nn.Linear(2, 2, device=DEVICE)
    optimizer = optimizer_of(net, "sum")
    optimizer.backward(two_losses(net, X))
    once = [None if g is None else g.clone() for g in grads_of(net)]
    optimizer.backward(two_losses(net, X), mode="batched", chunk_size=1)
    assert net["unused"].weight.grad is None
    for grad, before in zip(grads_of(net), once, strict=True):
        assert (grad is None) == (before is None)
        if grad is not None:
            torch.testing.assert_close(grad, 2 * before)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    net["a"].weight.requires_grad_()
    optimizer.zero_grad()
    optimizer.backward([two_losses(net, X)[0]])
    assert net["trunk"][0].weight.grad is None
    assert net["a"].weight.grad is not None


def test_micro_batches_before_a_backward_are_not_lost():
    net = two_task_net()
    optimizer = optimizer_of(net, "sum")
    optimizer.collect(two_losses(net, X))
    optimizer.backward(two_losses(net, X))
    both = grads_of(net)
    optimizer.zero_grad()
    optimizer.backward(two_losses(net, X))
    torch.testing.assert_close(both, [2 * grad for grad in grads_of(net)])


def test_a_scaler_sees_scaled_gradients_and_the_method_unscaled_losses():
    net = two_task_net()
    plain = optimizer_of(net, "scale_invariant")
    expected = plain.backward(two_losses(net, X)).weights
    unscaled = grads_of(net)
    plain.zero_grad()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0)
    info = plain.backward(two_losses(net, X), scaler=scaler)
    torch.testing.assert_close(info.weights, expected)
    torch.testing.assert_close(grads_of(net), [64 * grad for grad in unscaled])
    scaler.unscale_(plain)
    torch.testing.assert_close(grads_of(net), unscaled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": []}, "features must be a tensor with a graph"),
        ({"features": X}, "features must be a tensor with a graph"),
        ({"mode": "both"}, "mode must be one of sequential, batched, representation, got"),
        ({"chunk_size": 2}, "chunk_size is for mode="),
    ],
)
def test_how_passes_would_go_is_checked_all_the_same(options, message):
    net = two_task_net()
    with pytest.raises(ValueError, match=message):
        optimizer_of(net, "uw").backward(two_losses(net, X), **options)


def test_a_failed_pass_changes_nothing():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no way back")

    net = two_task_net()
    optimizer = optimizer_of(net, "uw")
    optimizer.backward(two_losses(net, X))
    before, state = [g.clone() for g in grads_of(net)], optimizer.method.state_dict()
    z = Fails.apply(net["trunk"](X))
    with pytest.raises(RuntimeError, match="no way back"):
        optimizer.backward([(net["a"](z)).mean(), net["b"](z).mean()])
    torch.testing.assert_close(grads_of(net), before, rtol=0, atol=0)
    torch.testing.assert_close(optimizer.method.state_dict(), state, rtol=0, atol=0)


def test_a_loss_that_is_not_finite_reaches_the_gradients():
    for method in METHODS:
        net = two_task_net()
        losses = two_losses(net, X)
        optimizer_of(net, method).backward([losses[0], losses[1] * torch.nan])
        assert net["trunk"][0].weight.grad.isnan().any()


def test_sparse_gradients_of_an_embedding():
    embedding = torch.nn.Embedding(9, 4, sparse=True, device=DEVICE)
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(embedding.parameters(), lr=0.1), "constant")
    rows = embedding(torch.tensor([1, 3], device=DEVICE))
    optimizer.backward([rows.sum(), 2 * rows.square().sum()])
    expected = 1 + 4 * embedding.weight.detach()
    torch.testing.assert_close(embedding.weight.grad.to_dense()[[1, 3]], expected[[1, 3]])
    assert embedding.weight.grad.is_sparse


def test_hooks_of_the_losses_run_once_with_the_weights():
    net, seen = two_task_net(), []
    losses = two_losses(net, X)
    for loss in losses:
        loss.register_hook(lambda grad: seen.append(grad.item()))
    optimizer_of(net, gradsurgery.methods.Constant([3.0, 5.0])).backward(losses)
    assert sorted(seen) == [3, 5]


def test_hooks_of_a_stack_whose_parts_are_given_run():
    net, plain = two_task_net(), two_task_net()
    plain.load_state_dict(net.state_dict())
    optimizer = optimizer_of(net, "sum")
    for each, backward in ((net, optimizer.backward), (plain, lambda losses: sum(losses).backward())):
        stack = torch.stack(two_losses(each, X))
        stack.register_hook(lambda grad: 10 * grad)
        backward(list(stack))
    torch.testing.assert_close(grads_of(net), grads_of(plain))


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_of_a_loss_of_one_element_is_contiguous(scaled):
    loss = torch.nn.Parameter(torch.tensor([3.0], device=DEVICE))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0) if scaled else None
    optimizer_of(torch.nn.ParameterList([loss]), gradsurgery.methods.Constant([2.0])).backward([loss], scaler=scaler)
    assert loss.grad.tolist() == [8.0 if scaled else 2.0]
    assert loss.grad.stride() == (1,)
