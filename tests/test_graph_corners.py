# SPDX-License-Identifier: MIT
"""Rare forms of losses, and of graphs that the passes go back through."""

from collections import UserDict

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import Parameter
from torch.utils.checkpoint import checkpoint

from conftest import grads_of, on_cpu, two_losses, two_task_net
from gradsurgery import SurgeryOptimizer, _operate, _step, methods
from inputs import DEVICE
from test_hidden import Hiding, Net

X = torch.linspace(-1, 1, 48).reshape(8, 6)


def wrap(parameters, method="pcgrad", **arguments):
    return SurgeryOptimizer(torch.optim.SGD(parameters, lr=0.1), method, **arguments)


def ones(*shape):
    return Parameter(torch.ones(shape))


def hidden_step(net, optimizer):
    net.zero_grad()
    optimizer.backward(net.losses(net.features()))


def test_losses_that_are_elements_of_a_stack_of_vectors():
    w = Parameter(torch.tensor([1.0, 2.0]))
    stack = torch.stack([w.square()])
    optimizer = wrap([w], "sum")
    optimizer.collect([stack.select(1, 0), stack.select(1, 1)])
    optimizer.combine()
    assert w.grad.tolist() == [2, 4]


def test_losses_that_are_selected_from_a_stack_by_its_last_dimension():
    v, w = ones(1, 1), ones(1, 1)
    stack = torch.stack([v.square(), w.square()], dim=-1)
    optimizer = wrap([v, w])
    assert optimizer.backward([stack.select(2, 0), stack.select(2, 1)]).norms.tolist() == [0, 0]  # only heads


def test_losses_that_are_selected_from_a_stack_from_behind():
    parameters = [ones(1) for _ in range(3)]
    stack = torch.stack([p.sum() for p in parameters])
    optimizer = wrap(parameters, methods.Constant([1.0, 2.0, 3.0]))
    optimizer.collect([stack[-3], stack[-2], stack[-1]])
    optimizer.combine()
    assert [p.grad.item() for p in parameters] == [1, 2, 3]


def test_functions_of_packages_whose_names_begin_with_torchs(monkeypatch):
    monkeypatch.setattr(Hiding, "__module__", "torch_reversible")
    found = []
    for hidden in ("1", ""):
        net = Net(hidden)
        hidden_step(net, wrap(net.parameters(), "mgda"))
        found.append(grads_of(net))
    torch.testing.assert_close(found[0], found[1])


def test_hidden_parameters_stay_known_while_other_graphs_come_between():
    found = []
    for hidden in ("1", ""):
        net = Net(hidden)
        optimizer = wrap(net.parameters(), "mgda")
        hidden_step(net, optimizer)
        hook = net["2"].register_full_backward_hook(lambda *_: None)
        net.hidden = ""
        hidden_step(net, optimizer)
        hook.remove()
        net.hidden = hidden
        hidden_step(net, optimizer)
        found.append(grads_of(net))
    torch.testing.assert_close(found[0], found[1])


def test_features_that_come_out_of_a_reentrant_checkpoint_are_refused():
    net = two_task_net()
    z = checkpoint(net["trunk"], X.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(ValueError, match="without mode= and features="):
        wrap(net.parameters()).backward([net["a"](z).mean(), net["b"](z).mean()], features=z)


def test_checkpoints_concern_only_the_steps_that_have_them():
    net, outside, calls = two_task_net(), ones(1), []
    net["trunk"][0].weight.register_post_accumulate_grad_hook(calls.append)
    optimizer = wrap(net.parameters())
    for number, reentrant in enumerate((True, False, True, False)):
        x = X.clone().requires_grad_()
        z = checkpoint(net["trunk"], x, use_reentrant=reentrant) * outside
        if number == 1:  # a new function, which makes the optimizer read the graph again
            z = Copied.apply(z)
        losses = [net["a"](z).mean(), net["b"](z).square().mean()]
        optimizer.backward(losses, mode="sequential" if reentrant else "batched")
        assert bool(calls) is (outside.grad is not None) is reentrant
        calls.clear()
        outside.grad = None


class Copied(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad.clone()


def test_a_checkpoint_behind_another_part_of_a_stack_is_known_when_its_turn_comes():
    net, found = two_task_net(), []
    for reentrant in (True, False):
        net.zero_grad()
        optimizer = wrap(net.parameters())
        z = checkpoint(net["trunk"], X.clone().requires_grad_(), use_reentrant=reentrant)
        losses = torch.stack([net["a"](net["trunk"](X)).mean(), -net["b"](z).square().mean()])
        optimizer.collect([losses[0], None], retain_graph=True)
        optimizer.collect([None, losses[1]])
        optimizer.combine()
        found.append(grads_of(net))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_features_of_a_frozen_trunk(mode):
    net = two_task_net()
    net["trunk"].requires_grad_(False)
    z = net["trunk"](X.clone().requires_grad_())
    wrap(net.parameters()).backward([net["a"](z).mean(), net["b"](z).mean()], mode=mode, features=z)
    assert net["a"].weight.grad is not None


def test_scaled_losses_of_other_dtypes_and_shapes():
    net, found = two_task_net(), []
    for mode in ("sequential", "batched"):
        for scaler in (None, torch.amp.GradScaler(DEVICE, init_scale=4.0)):
            net.zero_grad()
            a, b = two_losses(net, X)
            info = wrap(net.parameters()).backward([a.double(), b.reshape(1)], mode=mode, scaler=scaler)
            found.append([*(grad / (4 if scaler else 1) for grad in grads_of(net)), info.gram])
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-4, atol=1e-6)


def test_batched_passes_to_heads_alone_keep_the_graph_only_if_told():
    v, w = ones(2), ones(2)
    optimizer = wrap([v, w])
    losses = [v.square().sum(), w.square().sum()]
    optimizer.backward(losses, mode="batched", retain_graph=True)
    optimizer.backward(losses, mode="batched")
    assert v.grad.tolist() == [4, 4]
    with pytest.raises(RuntimeError, match="second time"):
        optimizer.backward(losses, mode="batched")


def test_what_a_checkpoint_draws_again_is_the_same_in_batched_passes():
    net, drop, found = two_task_net(), torch.nn.Dropout(0.5), []
    for mode in ("sequential", "batched"):
        torch.manual_seed(0)
        net.zero_grad()
        z = checkpoint(lambda x: drop(net["trunk"](x)).tanh(), X, use_reentrant=False)
        wrap(net.parameters()).backward([net["a"](z).mean(), -net["b"](z).mean()], mode=mode)
        found.append(grads_of(net))
    torch.testing.assert_close(found[1], found[0])


class OutOfMemory(Copied):
    @staticmethod
    def backward(ctx, grad):
        raise torch.OutOfMemoryError("no memory")


def test_memory_that_runs_out_in_batched_passes_is_called_that():
    w = ones(2)
    z = OutOfMemory.apply(w)
    with pytest.raises(torch.OutOfMemoryError):
        wrap([w]).backward([z.sum(), -z.sum()], mode="batched")


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda w: "ab", TypeError, "losses must be a sequence"),
        (lambda w: [w.sum() * 1j, w.sum()], TypeError, "loss '0' must be real"),
    ],
)
def test_what_losses_cannot_be(losses, error, message):
    w = ones(2)
    with pytest.raises(error, match=message):
        wrap([w]).backward(losses(w))


@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_losses_from_a_generator_are_collected(method):
    w = ones(2)
    optimizer = wrap([w], method)
    optimizer.collect(w[i] for i in range(2))
    optimizer.combine()
    assert w.grad.tolist() == [1, 1]


class ByBatch(UserDict):
    """A mapping that does not iterate over its keys, like a TensorDict."""

    def __iter__(self):
        raise StopIteration

    def keys(self):
        return self.data.keys()

    def values(self):
        return self.data.values()


def test_losses_of_a_mapping_that_goes_by_batches():
    w = ones(2)
    optimizer = wrap([w], "famo")
    assert optimizer.backward(ByBatch({"a": w[0], "b": w[1]})).tasks == ["a", "b"]
    optimizer.update(ByBatch({"a": 0.5, "b": 0.25}))


@on_cpu
def test_a_step_under_fake_tensors():
    with FakeTensorMode():
        net = torch.nn.Linear(3, 2)
        wrap(net.parameters()).backward(net(torch.ones(3)).unbind())
        assert net.weight.grad.shape == (2, 3)


class Other(torch.Tensor):
    """A subclass as MONAI's images are, which turns all that torch's functions return into its own kind."""


FEATURES = {"features": None}
PASSES = [{}, {"mode": "batched"}, FEATURES, {"mode": "batched", **FEATURES}, {"mode": "representation", **FEATURES}]


@pytest.mark.parametrize("how", PASSES, ids=str)
@pytest.mark.parametrize("ours", ["losses", "parameters"])
def test_gradients_are_plain_whatever_class_losses_and_parameters_are_of(ours, how, monkeypatch):
    kinds, found, read = set(), [], _step.read
    for module in (_operate, _step):
        monkeypatch.setattr(module, "read", lambda c: kinds.update(type(g) for row in c.grads for g in row) or read(c))
    for kind in (torch.Tensor, Other):
        torch.manual_seed(0)
        net, variances = two_task_net(), torch.zeros(2)
        if ours == "parameters":
            variances = variances.as_subclass(kind)
            for module in net.modules():
                for name, p in [*module.named_parameters(recurse=False)]:
                    setattr(module, name, Parameter(p.detach().as_subclass(kind)))
        variances = [Parameter(v) for v in variances]
        z = net["trunk"](X.as_subclass(kind) if ours == "losses" else X)
        losses = [
            (net["a"](z) - 1).square().mean() + variances[0],
            3 * (net["b"](z) + 1).square().mean() + variances[1],
        ]
        assert type(losses[0]) is kind
        parameters = [*net.parameters(), *variances]
        wrap(parameters).backward(losses, **(how | {"features": z} if "features" in how else how))
        found.append([p.grad for p in parameters])
    assert kinds == {torch.Tensor, type(None)}
    assert {type(g) for g in found[1]} == {torch.Tensor}
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_tensors_without_views_under_a_default_device():
    """A default device makes each of torch's functions ask a mode, as if all tensors were of a subclass."""
    sparse, w = torch.eye(4).to_sparse().requires_grad_(), ones(4, 2)
    with torch.device("cpu"):
        y = torch.sparse.mm(sparse, w)
        wrap([sparse, w], shared=[w]).backward([y.sum(), y.square().sum()])
    assert w.grad is not None


class Quantized(torch.Tensor):
    """A weight that dispatches operators itself, and has only those that a step needs: no view, for one."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            return QuantizedLinear.apply(*args[:2])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        assert function is torch.ops.aten.detach.default, function
        return cls(args[0].values)


class QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x @ weight.values.T

    @staticmethod
    def backward(ctx, grad):
        return None, grad.T @ ctx.saved_tensors[0]


def test_weights_that_dispatch_operators_themselves():
    values, found = torch.linspace(-1, 1, 24).sin().reshape(4, 6), []
    for kind in (torch.Tensor.clone, Quantized):
        weight = kind(values).requires_grad_()
        z = torch.nn.functional.linear(X, weight)
        wrap([weight]).backward([z.square().mean(), (z - 1).abs().mean()])
        found.append(weight.grad)
    torch.testing.assert_close(found[1], found[0])
