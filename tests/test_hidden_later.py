# SPDX-License-Identifier: MIT
"""Re-entrant checkpoints, and functions like them, that appear after the first step."""

import warnings

import pytest
import torch
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import gradsurgery
from conftest import grads_of, on_cpu
from test_hidden import Hiding, X

pytestmark = on_cpu


def late(hidden, wrap, steps):
    """Train two tasks, and two more in each step that is True in ``steps``; return the last step's G and gradients."""
    torch.manual_seed(0)
    trunk, late = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
    heads = torch.nn.ModuleList(torch.nn.Linear(6, 1) for _ in range(4))
    modules = torch.nn.ModuleList([trunk, late, heads])
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(modules.parameters(), lr=0.1))
    for whole in steps:
        optimizer.zero_grad()
        z = trunk(X).tanh()
        of = dict(zip("ab", (head(z).square().mean() for head in heads[:2]), strict=True))
        if whole:
            source = z if hidden == "on the trunk" else X.clone().requires_grad_()
            w = wrap(late, source).tanh()
            of |= zip("cd", ((head(w) - n).square().mean() for n, head in enumerate(heads[2:], 1)), strict=True)
        info = optimizer.backward(of)
    return info.gram, grads_of(modules)


class Asking(Hiding):
    """Another package's checkpoint, which refuses passes to named inputs as torch's re-entrant one does."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        assert torch.autograd._is_checkpoint_valid()
        return Hiding.backward(ctx, grad)


WRAPS = pytest.mark.parametrize(
    "wrap",
    [Hiding.apply, Asking.apply, lambda f, x: checkpoint(f, x, use_reentrant=True)],
    ids=["own", "asking", "torch"],
)


@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize("method", ["pcgrad", "sum"])
@WRAPS
def test_what_hides_may_come_later_and_elsewhere(wrap, method, extension, monkeypatch):
    if not extension:
        monkeypatch.setattr(gradsurgery._graph, "C", None)
    torch.manual_seed(0)
    trunk, late, *heads = (torch.nn.Linear(6, outputs) for outputs in (6, 6, 1, 1))
    modules = torch.nn.ModuleList([trunk, late, *heads])
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(modules.parameters(), lr=0.1), method)

    def step(way):
        optimizer.zero_grad()
        x = X.clone().requires_grad_()
        z = trunk(x) if way == "open" else wrap(trunk, x) if way == "own input" else wrap(late, trunk(x))
        y = z.tanh() if way == "on the trunk" else late(z).tanh()
        optimizer.backward([(head(y) - n).square().mean() for n, head in enumerate(heads)])
        return grads_of(modules)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = step("open")
        for way in ("on the trunk", "own input", "open"):
            torch.testing.assert_close(step(way), expected, msg=lambda text, way=way: f"{way}: {text}")


def test_a_function_that_comes_later_and_joins_trunk_and_heads_is_warned_of():
    net = torch.nn.ModuleDict({name: torch.nn.Linear(6, size) for name, size in (("trunk", 6), ("a", 2), ("b", 2))})
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))

    def outputs(x):
        z = net["trunk"](x)
        return net["a"](z), net["b"](z)

    def step(joined):
        a, b = checkpoint(outputs, X.clone().requires_grad_(), use_reentrant=True) if joined else outputs(X)
        optimizer.backward([a.square().mean(), b.abs().mean()])

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        step(False)
        assert not warned
        step(True)
        assert "Name the shared parameters by shared=" in str(warned[0].message)
        step(True)
        step(False)
    assert len(warned) == 1


@pytest.mark.parametrize("hidden", ["on the trunk", "own input"])
@WRAPS
def test_tasks_that_come_later(hidden, wrap):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gram, grads = late(hidden, wrap, [False, True, True])
    expected, theirs = late(hidden, lambda f, x: f(x), [False, True, True])
    torch.testing.assert_close(gram, expected)
    torch.testing.assert_close(grads, theirs)


@WRAPS
def test_a_trunk_that_is_unfrozen_later(wrap):
    found = []
    for way in (wrap, lambda f, x: f(x)):
        torch.manual_seed(0)
        trunk, embedding = torch.nn.Linear(6, 6), torch.nn.Linear(6, 6)
        heads = torch.nn.ModuleList(torch.nn.Linear(6, 1) for _ in range(2))
        modules = torch.nn.ModuleList([embedding, trunk, heads])
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(modules.parameters(), lr=0.1))
        for trained in (False, True):
            trunk.requires_grad_(trained)
            embedding.requires_grad_(trained)
            optimizer.zero_grad()
            y = embedding(X)
            z = way(trunk, y).tanh() if trained else trunk(y).tanh()
            optimizer.backward([(head(z) - n).square().mean() for n, head in enumerate(heads)])
        found.append(grads_of(modules))
    torch.testing.assert_close(*found)
