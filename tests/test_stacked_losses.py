# SPDX-License-Identifier: MIT
"""Losses passed as a torch.stack reach the parameters that each loss alone reaches, however the passes are made."""

import warnings

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils.checkpoint import checkpoint

import gradsurgery
from conftest import grads_of, two_losses, two_task_net
from gradsurgery import _survey
from inputs import DEVICE

X = torch.linspace(-1, 1, 48).reshape(8, 6)

STACKS = {
    "list": list,
    "stack": torch.stack,
    "stack's parts": lambda losses: list(torch.stack(losses)),
    "parts by index": lambda losses: [torch.stack(losses)[t] for t in range(-2, 0)],
    "stack at the end": lambda losses: torch.stack(losses, dim=-1),
    "parts from the end": lambda losses: torch.stack(losses).unbind(-1),
    "rows": lambda losses: list(torch.stack([loss.reshape(1) for loss in losses])),
}


@pytest.mark.parametrize("way", ["sequential", "batched", "features", "batched features", "checkpoint"])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", ["gradnorm", "mgda"])
def test_stacked_losses_reach_what_each_of_them_does(method, scaled, way):
    found = []
    for stack in STACKS.values():
        torch.manual_seed(1)
        net = two_task_net()
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0) if scaled else None
        for _ in range(2):
            if way == "checkpoint":
                z = checkpoint(net["trunk"], X.clone().requires_grad_(), use_reentrant=True)
            else:
                z = net["trunk"](X)
            losses = [net["a"](z).square().mean(), net["b"](z).abs().mean()]
            options = {"mode": "batched"} if "batched" in way else {}
            options |= {"features": z} if "features" in way else {}
            info = optimizer.backward(stack(losses), scaler=scaler, **options)
        found.append((grads_of(net), info.gram, info.weights))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_features_of_stacked_losses_stay_apart(mode):
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    for stack in STACKS.values():
        optimizer = gradsurgery.MGDA(torch.optim.SGD([a, b], lr=0.1))
        optimizer.zero_grad()
        features = [2 * a, 3 * b]
        info = optimizer.backward(stack([f.sum() for f in features]), features=features, mode=mode)
        assert not info.gram.any()
        assert [a.grad.tolist(), b.grad.tolist()] == [[2.0] * 3, [3.0] * 3]


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_stack_with_a_constant_and_a_leaf(mode):
    a, leaf = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.tensor(2.0))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([a, leaf], lr=0.1), "mgda")
    info = optimizer.backward(torch.stack([a.sum(), torch.ones(()), leaf, (a * leaf).sum()]), mode=mode)
    assert info.gram.diagonal().tolist() == [3.0, 0.0, 1.0, 21.0]


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_constant_of_a_stack_alone(mode):
    a = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([a], lr=0.1), "mgda")
    with pytest.warns(UserWarning, match="train nothing"):
        optimizer.backward([torch.stack([torch.ones(()), a.sum()])[0]], mode=mode)
    assert a.grad is None


def of_columns(outputs):
    return list((outputs - 1).square().mean(0))


def both(net, z):
    return torch.cat([net["a"](z), net["b"](z)], 1)


def of_parts(outputs, part):
    """One loss for each task from the joined outputs, where ``part(outputs, t)`` is task t's part."""
    return [part(outputs, t).square().mean() for t in range(2)]


def halves(outputs):
    return [outputs[:, :1], outputs[:, 1:]]


def written(net, z):
    outputs = torch.empty(len(z), 2)
    outputs[:, :1], outputs[:, 1:] = net["a"](z), net["b"](z)
    return outputs


def routed(net, z):
    """Each row belongs to one task and goes through its head; a loss for each task from its rows."""
    task = torch.arange(len(z)) % 2
    outputs = torch.zeros(len(z), 1)
    for t, head in enumerate("ab"):
        outputs[task == t] = net[head](z[task == t])
    squares = outputs.square()
    return [squares[task == t].mean() for t in range(2)]


def classified(net, z):
    """A cross entropy of two classes for each head."""
    logits = torch.stack([torch.cat([head(z), -head(z)], 1) for head in (net["a"], net["b"])])
    return [cross_entropy(part, torch.arange(len(z)) % 2) for part in logits]


@torch.library.custom_op("gradsurgery_tests::squares_of_two", mutates_args=())
def squares_of_two(a: torch.Tensor, b: torch.Tensor) -> list[torch.Tensor]:
    return [a.square(), b.square()]


squares_of_two.register_autograd(
    lambda ctx, grads: tuple(2 * x * grad for x, grad in zip(ctx.saved_tensors, grads, strict=True)),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)

JOINED = {
    "own operator": lambda net, z: [y.mean() for y in squares_of_two(net["a"](z), net["b"](z))],
    "one output": lambda net, z: Doubled.apply(torch.stack([net["a"](z).mean(), net["b"](z).mean()]))[0].unbind(),
    "flipped": lambda net, z: of_columns(both(net, z).flip(1))[::-1],
    "rolled and repeated": lambda net, z: of_columns(both(net, z).repeat(2, 1).roll(2, 1)),
    "classes": classified,
    "rows by task": routed,
    "gathered": lambda net, z: of_parts(both(net, z), lambda o, t: o.gather(1, torch.full((len(z), 1), t))),
    "index_select": lambda net, z: of_parts(both(net, z), lambda o, t: o.index_select(1, torch.tensor([t]))),
    "a view for each": lambda net, z: of_parts(both(net, z), lambda o, t: o.T[t]),
    "a mean for each": lambda net, z: of_parts(both(net, z), lambda o, t: o.square().mean(0)[t]),
    "quantiles": lambda net, z: of_parts(both(net, z), lambda o, t: torch.maximum(0.3 * o[:, t], -0.7 * o[:, t])),
    "labels that are there": lambda net, z: of_parts(both(net, z), lambda o, t: o[:, t][X[:, t] > 0]),
    "quotient of a stack": lambda net, z: torch.stack([net["a"](z).mean(), net["b"](z).mean()]) / 2,
    "clamped stack": lambda net, z: torch.stack([net["a"](z).mean(), net["b"](z).mean()]).clamp(max=9).nan_to_num(),
    "stack, viewed": lambda net, z: torch.stack([net["a"](z).mean(), net["b"](z).mean()]).view(2, 1).log1p().view(2),
    "clamped above": lambda net, z: of_columns(both(net, z).clamp_max(9)),
    "interpolated": lambda net, z: of_columns(both(net, z).lerp(X[:, :2], 0.5).lerp(X[:, :2], X[:, 2:4])),
    "fused": lambda net, z: of_columns(torch.addcdiv(both(net, z).addcmul(X[:, :2], X[:, :2]), X[:, :2], X[:, 2:4])),
    "windows": lambda net, z: [window.square().mean() for window in both(net, z).unfold(1, 1, 1).unbind(1)],
    "hstack": lambda net, z: torch.hstack([net["a"](z).mean(), net["b"](z).mean()]),
    "columns": lambda net, z: of_columns(both(net, z)),
    "no reduction": lambda net, z: mse_loss(both(net, z), X[:, :2], reduction="none").mean(0),
    "slices": lambda net, z: [part.square().mean() for part in halves(both(net, z))],
    "split": lambda net, z: [part.square().mean() for part in both(net, z).split(1, 1)],
    "split by sizes": lambda net, z: [part.square().mean() for part in both(net, z).split([1, 1], 1)],
    "permuted": lambda net, z: [row.square().mean() for row in both(net, z).permute(1, 0)],
    "moved": lambda net, z: [row.square().mean() for row in both(net, z).transpose(0, 1)],
    "tanh": lambda net, z: of_columns(both(net, z).tanh()),
    "sigmoid": lambda net, z: of_columns(both(net, z).sigmoid()),
    "transposed": lambda net, z: [row.square().mean() for row in both(net, z).t()],
    "cross entropies": lambda net, z: bce(both(net, z), X[:, :2].abs(), reduction="none").mean(0),
    "buffer": lambda net, z: [part.square().mean() for part in halves(written(net, z))],
    "column by column": lambda net, z: [c.square().mean() for c in both(net, z).unbind(1)],
}


@pytest.mark.parametrize("join", JOINED.values(), ids=JOINED)
def test_what_becomes_of_a_stack_is_warned_of(join):
    net = two_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="loss '1' gives gradients of zeros to parameters that loss '0' alone trains"):
        optimizer.backward(join(net, net["trunk"](X)))
    optimizer.backward(join(net, net["trunk"](X)))  # no second warning
    named = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1), shared=net["trunk"].parameters())
    named.backward(join(net, net["trunk"](X)))


APART = {
    "heads of their own": lambda net, z: [cross_entropy(net[h](z).squeeze(1), X[:, 0].softmax(0)) for h in "ab"],
    "joined features": lambda net, z: two_losses_of(net, torch.cat([z[:, :4], z[:, 4:]], 1)),
    "two losses of all": lambda net, z: [both(net, z).square().mean(), both(net, z).abs().mean()],
    "two losses of one tensor": lambda net, z: (lambda o: [o.square().mean(), o.norm()])(both(net, z)),
    "old and new classes": lambda net, z: [cross_entropy(part, torch.arange(4) % 2) for part in both(net, z).split(4)],
    "a task without labels": lambda net, z: [loss * (t > 0) for t, loss in enumerate(of_columns(both(net, z)))],
    "tasks without labels, and one apart": lambda net, z: [*of_columns(both(net, z) * torch.tensor([1, 0])), z.mean()],
    "a head of zeros": lambda net, z: of_zeros(net, z),
}


def of_zeros(net, z):
    torch.nn.init.zeros_(net["a"].weight)
    return [(net["a"](z) - 1).square().mean(), net["b"](z).norm()]


def two_losses_of(net, z):
    return [net["a"](z).square().mean(), net["b"](z).norm()]


@pytest.mark.parametrize("losses", APART.values(), ids=APART)
def test_what_is_apart_is_not_warned_of(losses):
    net = two_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(losses(net, net["trunk"](X)))
        optimizer.step()


@pytest.mark.parametrize(("zeros", "times"), [(False, 1), (True, 2)])
def test_a_layer_of_zeros_that_two_losses_share_is_not_warned_of(zeros, times, monkeypatch):
    """Until a layer of zeros moves, only the loss of head a trains the trunk, so the second step is checked, too."""
    read, are_not_zero = [], _survey._are_not_zero
    monkeypatch.setattr(_survey, "_are_not_zero", lambda *given: read.append(given) or are_not_zero(*given))
    net = two_task_net()
    if zeros:
        torch.nn.init.zeros_(net["b"].weight)
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    for _ in range(4):
        z = net["trunk"](X)
        b = net["b"](z) - 1
        optimizer.backward([net["a"](z).square().mean(), b.square().mean(), b.abs().mean()])
        optimizer.step()
        optimizer.zero_grad()
    assert len(read) == times


def test_zeros_from_one_side_are_warned_of_at_the_second_step():
    net = two_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in range(3):
            z = net["trunk"](X)
            logits, embedding = Doubled.apply(net["a"](z), z)
            optimizer.backward({"class": logits.square().mean(), "metric": embedding.square().mean()})
            assert len(warned) == min(step, 1)
    assert "'metric' gives gradients of zeros to parameters that loss 'class' alone trains" in str(warned[0].message)


def test_a_first_step_of_one_loss_does_not_count():
    net = two_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward([two_losses(net, X)[0]])
    with pytest.warns(UserWarning, match="Name the shared parameters"):
        optimizer.backward(of_columns(both(net, net["trunk"](X))))


class Ones(gradsurgery.methods.Method):
    """The sum of the losses, with one pass for each loss."""

    def weights(self, gram, *, losses=None):
        return torch.ones_like(gram[..., 0])


@pytest.mark.parametrize("of_part", [False, True])
def test_hooks_of_a_stack_run(of_part):
    net, plain = two_task_net(), two_task_net()
    plain.load_state_dict(net.state_dict())
    trunk = net["trunk"].parameters()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), Ones(), shared=trunk)
    for each, backward in ((net, optimizer.backward), (plain, lambda losses: sum(losses).backward())):
        losses = torch.stack(two_losses(each, X))
        if of_part:
            losses = list(losses)
        (losses[1] if of_part else losses).register_hook(lambda grad: 10 * grad)
        backward(losses)
    torch.testing.assert_close(grads_of(net), grads_of(plain))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *tensors):
        return tuple(2 * x for x in tensors)

    @staticmethod
    def backward(ctx, *grads):
        return tuple(2 * g for g in grads)


def test_functions_with_an_output_for_each_head_are_warned_of():
    net = two_task_net()
    z = net["trunk"](X)
    losses = [y.square().mean() for y in Doubled.apply(net["a"](z), net["b"](z))]
    with pytest.warns(UserWarning, match="Name the shared parameters by shared="):
        gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)).backward(losses)
    # No warning where all parameters below belong to both losses.
    left, right = Doubled.apply(net["trunk"](X), net["trunk"](X))
    losses = [net["a"](left).square().mean(), net["b"](right).square().mean()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)).backward(losses)


def test_checkpoints_around_the_heads_are_warned_of():
    net = two_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    losses = checkpoint(lambda x: tuple(two_losses(net, x)), X.clone().requires_grad_(), use_reentrant=True)
    with pytest.warns(UserWarning, match="Name the shared parameters by shared="):
        optimizer.backward(list(losses))


def test_stacked_features_are_not():
    net = two_task_net()
    left, right = (torch.nn.Linear(6, 3) for _ in range(2))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([*left.parameters(), *right.parameters(), *net.parameters()], lr=0.1))
    z = net["trunk"](torch.cat([left(X), right(X)], 1))
    optimizer.backward([net["a"](z).mean(), net["b"](z).mean()])
    both = torch.nn.Linear(6, 2)
    optimizer = gradsurgery.MGDA(torch.optim.SGD([*left.parameters(), *right.parameters(), *both.parameters()], lr=0.1))
    optimizer.backward(of_columns(both(torch.cat([left(X), right(X)], 1))))
    doubled = both(X)
    for _ in range(64):  # 2^64 paths, which must not be followed one by one
        doubled = (doubled + doubled) / 2
    gradsurgery.MGDA(torch.optim.SGD(both.parameters(), lr=0.1)).backward(of_columns(doubled))
    outputs = torch.stack([both(X)[:, 0], both(X)[:, 1]], 1)  # both columns are of the same parameters
    gradsurgery.MGDA(torch.optim.SGD(both.parameters(), lr=0.1)).backward(of_columns(outputs))
