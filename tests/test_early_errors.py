# SPDX-License-Identifier: MIT
"""Errors that the arguments show are raised before any backward pass, while the caller's graph is still whole."""

import pytest
import torch

import gradsurgery
from conftest import two_losses, two_task_net
from gradsurgery import methods
from gradsurgery.backends import choose
from inputs import DEVICE

ELSEWHERE = "cuda" if DEVICE == "cpu" else "cpu"


def first_step(optimizer, losses):
    optimizer.backward(losses, retain_graph=True)
    optimizer.zero_grad()


def first_collect(optimizer, losses):
    optimizer.collect(losses, retain_graph=True)


@pytest.mark.parametrize(
    ("method", "before", "fail", "message"),
    [
        (methods.UPGrad([1.0, 2.0, 3.0]), None, lambda o, losses: o.backward(losses), "for each of 2 tasks, got 3"),
        (methods.PCD([0.1, 0.2]), None, lambda o, losses: o.backward(losses), "tau must hold 1 numbers"),
        (
            methods.CRMOGM(methods.UPGrad([1.0])),
            None,
            lambda o, losses: o.backward(losses),
            "for each of 2 tasks, got 1",
        ),
        (methods.Krum(2), None, lambda o, losses: o.backward(losses), "needs at least 5 tasks, got 2"),
        (methods.GradDrop(leak=[0.0]), None, lambda o, losses: o.collect(losses), "for each of 2 tasks, got 1"),
        ("gradnorm", first_step, lambda o, losses: o.backward(losses[:1]), "every step must have the same tasks"),
        ("gradnorm", first_step, lambda o, losses: o.collect(losses[:1]), "every step must have the same tasks"),
        (
            "pcgrad",
            first_collect,
            lambda o, losses: o.collect(losses[:1]),
            "every micro-batch must have the same tasks",
        ),
        (
            "pcgrad",
            first_collect,
            lambda o, losses: o.collect(losses, scaler=torch.amp.GradScaler(DEVICE)),
            "either every micro-batch is given the scaler or none",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_any_pass(method, before, fail, message):
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
    losses = two_losses(net, torch.randn(5, 6))
    if before is not None:
        before(optimizer, losses)
    passes = []
    net["trunk"][0].weight.register_hook(passes.append)
    with pytest.raises(ValueError, match=message):
        fail(optimizer, losses)
    assert passes == []
    optimizer.zero_grad()
    sum(losses).backward()


def test_a_backend_that_cannot_serve_is_said_before_any_pass():
    net = two_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1), backend=ELSEWHERE)
    losses = two_losses(net, torch.randn(5, 6))
    passes = []
    net["trunk"][0].weight.register_hook(passes.append)
    for call in (optimizer.backward, optimizer.collect):
        with pytest.raises(RuntimeError, match=f"backend '{ELSEWHERE}' cannot"):
            call(losses)
    assert passes == []
    sum(losses).backward()


def test_so_does_one_that_the_environment_names(monkeypatch):
    monkeypatch.setenv("GRADSURGERY_BACKEND", ELSEWHERE)
    net, passes = two_task_net(), []
    net["trunk"][0].weight.register_hook(passes.append)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match=f"backend '{ELSEWHERE}' cannot"):
        optimizer.backward(two_losses(net, torch.randn(5, 6)))
    assert passes == []


def test_frozen_parameters_may_be_elsewhere():
    frozen, w = torch.nn.Parameter(torch.ones(2, device="meta"), requires_grad=False), torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([frozen, w], lr=0.1), backend="reference")
    optimizer.backward([w[0], w[1]])
    assert w.grad.tolist() == [1, 1]


def test_subclasses_with_weights_of_their_own_are_not_asked():
    class Own(methods.Krum):
        def weights(self, gram, *, losses=None, backend=None):
            return torch.ones_like(gram[..., 0])

    w = torch.nn.Parameter(torch.ones(2))
    for method in (Own(2), methods.CRMOGM(Own(2))):
        w.grad = None
        gradsurgery.SurgeryOptimizer(torch.optim.SGD([w], lr=0.1), method).backward([w[0], w[1]])
        assert w.grad.tolist() == [1, 1]


def test_a_micro_batch_of_other_tasks_leaves_what_was_collected():
    net = two_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.randn(5, 6)
    wanted = optimizer.backward(two_losses(net, x)).gram
    optimizer.zero_grad()
    optimizer.collect(two_losses(net, x))
    with pytest.raises(ValueError, match=r"had \['0', '1'\], got \['0'\] \(zero_grad\(\) forgets"):
        optimizer.collect(two_losses(net, x)[:1])
    torch.testing.assert_close(optimizer.combine().gram, wanted)


def test_a_device_without_float64(monkeypatch):
    monkeypatch.delenv("GRADSURGERY_BACKEND", raising=False)
    with pytest.raises(RuntimeError, match=r"no backend can serve tensors on mps: .* no float64"):
        choose(None, torch.device("mps"), 2)
