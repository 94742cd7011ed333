# SPDX-License-Identifier: MIT
"""Losses collected one after the other, and state of tasks and segments that checkpoints must keep in order."""

import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gradsurgery
from conftest import grads_of, two_losses, two_task_net
from gradsurgery import _collected
from gradsurgery._collected import Collected

X = torch.linspace(-1, 1, 48).reshape(8, 6)


def make(method, **options):
    torch.manual_seed(0)
    net = two_task_net(torch.float64)
    return net, gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method, **options)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("method", ["pcgrad", "gradnorm", "moco", "uw", "graddrop", "sum"])
def test_one_call_for_each_task_is_one_for_all(method, named):
    found = []
    for together in (True, False):
        net, optimizer = make(method)
        for _ in range(2):
            optimizer.zero_grad()
            if together:
                optimizer.collect(two_losses(net, X.double()))
            else:
                for task in range(2):
                    # Each graph is freed before the next one is made.
                    losses = [loss if t == task else None for t, loss in enumerate(two_losses(net, X.double()))]
                    optimizer.collect(dict(zip("ab", losses, strict=True)) if named else losses)
            info = optimizer.combine()
            optimizer.step()
        found.append(([*net.parameters()], info.weights if method != "graddrop" else None))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_every_task_must_have_come():
    net, optimizer = make("pcgrad")
    losses = two_losses(net, X.double())
    optimizer.collect({"a": losses[0], "b": None})
    with pytest.raises(ValueError, match=r"'pcgrad' needs a loss of every task, got none of \['b'\]"):
        optimizer.combine()
    assert all(g is None for g in grads_of(net))
    optimizer.collect({"a": None, "b": two_losses(net, X.double())[1]})  # what came before is still there
    optimizer.combine()
    expected, other = make("pcgrad")
    other.backward(two_losses(expected, X.double()))
    assert all(map(torch.equal, grads_of(net), grads_of(expected)))


def test_sums_take_the_place_of_what_is_summed(monkeypatch):
    rows, alive = [], []
    add = _collected._sum

    def spy(a, b):
        alive.append(sum(ref() is not None for ref in rows))
        return add(a, b)

    one, other = (
        Collected([*"abc"], [], [[torch.ones(4)] for _ in range(3)], torch.ones(3), [True] * 3, None) for _ in range(2)
    )
    rows.extend(weakref.ref(row[0]) for row in other.grads)
    monkeypatch.setattr(_collected, "_sum", spy)
    total = one.plus(other)
    assert alive == [3, 2, 1]
    assert [row[0].tolist() for row in one.grads + total.grads] == [[1.0] * 4] * 3 + [[2.0] * 4] * 3


def test_a_checkpoint_in_the_second_tasks_head_only():
    found = []
    for checkpoints in (False, True):
        net, optimizer = make("mgda")
        for _ in range(2):
            optimizer.zero_grad()
            for task, head in enumerate("ab"):
                z = net["trunk"](X.double()).tanh()
                out = checkpoint(net[head], z, use_reentrant=True) if checkpoints and task else net[head](z)
                optimizer.collect([None, out.square().mean()] if task else [out.square().mean(), None])
            optimizer.combine()
        found.append(grads_of(net))
    torch.testing.assert_close(*found)


def test_batches_are_of_all_tasks():
    net, optimizer = make("modo")
    with pytest.raises(TypeError, match="loss '1' must be a tensor, got NoneType"):
        optimizer.collect([two_losses(net, X.double())[0], None])


def test_losses_of_a_stack_one_after_the_other_are_warned_of():
    net, optimizer = make("mgda")
    outputs = torch.cat([net["a"](net["trunk"](X.double())), net["b"](net["trunk"](X.double()))], 1)
    losses = list(outputs.square().mean(0))
    optimizer.collect([losses[0], None], retain_graph=True)
    optimizer.collect([None, losses[1]])
    with pytest.warns(UserWarning, match="loss '1' gives gradients of zeros to parameters that loss '0' alone trains"):
        optimizer.combine()


def test_names_of_numbers_before_the_first_step_are_remembered():
    net, optimizer = make("dtp")
    optimizer.update({"b": 0.9, "a": 0.1})
    a, b = two_losses(net, X.double())
    with pytest.raises(ValueError, match=r"same tasks in the same order.* had \['b', 'a'\], got \['a', 'b'\]"):
        optimizer.backward({"a": a, "b": b})
    weights = optimizer.backward({"b": b, "a": a}).weights
    assert weights[1] > weights[0]


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
def test_a_state_belongs_to_its_segments_after_a_checkpoint_too(granularity):
    def make():
        layers = [torch.nn.Parameter(torch.full((3,), i + 1.0)) for i in range(3)]
        groups = [{"params": [p]} for p in layers]
        return layers, gradsurgery.SurgeryOptimizer(torch.optim.SGD(groups, lr=0.1), "modo", granularity=granularity)

    def step(layers, optimizer):
        total = sum(p.square().sum() for p in layers if p.requires_grad)
        return optimizer.backward([total, -2 * total])

    mine, optimizer = make()
    mine[2].requires_grad_(False)
    step(mine, optimizer)
    state = optimizer.state_dict()
    assert state["blocks"] == [0, 1]
    layers, resumed = make()
    resumed.load_state_dict(state)
    layers[0].requires_grad_(False)
    with pytest.raises(ValueError, match="a state for each group or tensor of the shared parameters"):
        step(layers, resumed)
    layers, resumed = make()
    layers[2].requires_grad_(False)
    resumed.load_state_dict(state)
    torch.testing.assert_close(step(layers, resumed).weights, step(mine, optimizer).weights)
    if granularity == "per_tensor":
        optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(torch.ones(3))
        assert "blocks" not in optimizer.state_dict()
        with pytest.raises(ValueError, match=r"blocks must hold places of 3 parameters, got \[7\]"):
            resumed.load_state_dict({**state, "blocks": [7]})
