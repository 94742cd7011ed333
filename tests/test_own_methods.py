# SPDX-License-Identifier: MIT
"""What users write: methods of their own, ways to pass losses, and what they read from a step's result."""

import gc
import weakref

import pytest
import torch

import gradsurgery
from conftest import two_losses, two_task_net

methods = gradsurgery.methods
X = torch.linspace(-1, 1, 48).reshape(8, 6)


class Averaged(methods.Method):
    """Weights from a running mean of the losses; before the first step the mean is a plain number."""

    needs_losses = True

    def __init__(self):
        self.mean = 0.0

    def weights(self, gram, *, losses=None):
        self.mean = 0.9 * self.mean + 0.1 * losses
        return 1 / self.mean

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state):
        self.mean = state["mean"]


class Other(Averaged):
    pass


class Named(Averaged):
    name = "averaged"


class Seeded(methods.PCGrad):
    pass


class Local(methods.Method):
    name = "Local"


class OfLocal(Local):
    pass


def wrapped(method):
    net = two_task_net()
    return net, gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)


def named_losses(net, names):
    return dict(zip(names, two_losses(net, X), strict=True))


def test_a_number_that_becomes_a_state_for_each_task():
    net, optimizer = wrapped(Averaged())
    optimizer.backward(named_losses(net, "ab"))
    for losses in (named_losses(net, "ba"), two_losses(net, X)):
        with pytest.raises(ValueError, match="every step must have the same tasks in the same order"):
            optimizer.backward(losses)
    assert optimizer.state_dict()["tasks"] == {"a": 0, "b": 1}
    net, resumed = wrapped(Averaged())
    resumed.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"had \['a', 'b'\], got \['b', 'a'\]"):
        resumed.backward(named_losses(net, "ba"))


def test_a_class_without_a_name_is_called_by_its_own():
    assert [c.name for c in (Averaged, Other, Named, Seeded)] == ["Averaged", "Other", "averaged", "pcgrad"]
    assert OfLocal.name == "Local"
    state = wrapped(Other())[1].state_dict()
    _, optimizer = wrapped(Averaged())
    with pytest.raises(ValueError, match="the state must be that of method 'Averaged', got that of 'Other'"):
        optimizer.load_state_dict(state)


def test_a_class_does_not_outlive_its_use():
    """A user's class may be a closure over a model, which must not stay in memory."""

    def use():
        model = torch.nn.Linear(2, 2)

        class Own(methods.Method):
            def weights(self, gram, *, losses=None):
                return gram[..., 0].clamp(model.weight.detach().sum().double())

        class OwnOptimizer(torch.optim.SGD):
            def zero_grad(self, set_to_none=True):
                model.zero_grad()
                super().zero_grad(set_to_none)

        net = two_task_net()
        optimizer = gradsurgery.SurgeryOptimizer(OwnOptimizer(net.parameters(), lr=0.1), Own())
        optimizer.zero_grad()
        optimizer.backward(two_losses(net, X))
        return weakref.ref(model)

    model = use()
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("method", ["pcgrad", "uw"])
@pytest.mark.parametrize("passed", [dict.values, lambda losses: iter(losses.values())])
def test_losses_of_any_iterable(method, passed):
    net, optimizer = wrapped(method)
    with pytest.raises(TypeError, match=r"losses must be .*, got dict_items"):
        optimizer.backward(named_losses(net, "ab").items())
    optimizer.backward(passed(named_losses(net, "ab")))
    found = [p.grad.clone() for p in net.parameters()]
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
    optimizer.zero_grad()
    optimizer.backward(two_losses(net, X))
    assert all(torch.equal(a, p.grad) for a, p in zip(found, net.parameters(), strict=True))


def test_what_a_step_did_not_compute():
    net, optimizer = wrapped("uw")
    info = optimizer.backward(two_losses(net, X))
    assert hasattr(info, "weights")
    assert not any(hasattr(info, name) for name in ("gram", "norms", "cosines", "conflicts", "update_norm", "finite"))
    with pytest.raises(gradsurgery.NotComputedError, match="this step computed no G"):
        info.conflicts  # noqa: B018


@pytest.mark.parametrize("method", ["sum", "moco", "db_mtl", "m_config"])
def test_what_a_step_tells_of_averages(method):
    net, optimizer = wrapped(method)
    for scale in (1, 3):
        optimizer.zero_grad()
        optimizer.collect([scale * loss for loss in two_losses(net, X)])
        info = optimizer.combine()
    trunk = [*net["trunk"].parameters()]
    rows = [torch.autograd.grad(3 * loss, trunk, retain_graph=True) for loss in two_losses(net, X)]
    norms = gradsurgery.gram(rows).diagonal().sqrt()
    assert torch.allclose(info.norms, norms, rtol=0.1) is (method == "sum")
    length = torch.cat([p.grad.flatten() for p in trunk]).norm().double()
    assert torch.allclose(info.update_norm, length, rtol=1e-3) is (method != "m_config")
