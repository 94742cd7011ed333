# SPDX-License-Identifier: MIT
"""A call that fails in any of its stages changes nothing; made again, it does what it would have done."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch

import gradsurgery
from conftest import two_losses, two_task_net
from gradsurgery import methods
from gradsurgery.backends import choose
from gradsurgery.methods._buffered import BufferedMethod
from inputs import DEVICE, normal
from test_hidden import Hiding

STAGES = ("gram", "combine", "combine_by_rule", "task_order", "random", "pcgrad", "min_norm", "weights", "aggregate")
STAGES += ("gradvac", "gradnorm", "simplex_steps")


class Fault(Exception):
    pass


@contextmanager
def failing_stage(at):
    """Make the ``at``-th call of a backend's functions and of ``add_all`` (for methods of one pass) raise at once."""
    calls, backend = [0], type(choose(None, torch.device(DEVICE), 2))

    def counted(name, function):
        def call(*args, **kwargs):
            calls[0] += 1
            if calls[0] == at:
                raise Fault(name)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradsurgery._operate, "add_all", counted("add_all", gradsurgery._operate.add_all))
        for name in STAGES:
            if getattr(backend, name, None) is not None:
                patch.setattr(backend, name, counted(name, getattr(backend, name)))
        yield


def fails(*_):
    raise Fault


class Case:
    """An optimizer after some steps, and the call that fails."""

    def __init__(self, name, steps, how):
        torch.manual_seed(0)
        self.net, self.how = two_task_net(), how
        self.optimizer = gradsurgery.SurgeryOptimizer(torch.optim.Adam(self.net.parameters(), lr=0.01), name)
        for step in range(steps):
            self.optimizer.zero_grad()
            self.prepare(step)
            self.call()
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.prepare(steps)

    def losses(self, step):
        return two_losses(self.net, torch.linspace(-1, 1, 24).reshape(4, 6) * (1 + step / 4))

    def prepare(self, step):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0) if self.how == "scaled" else None
        if self.how == "collected":
            self.optimizer.collect(self.losses(step))
            self.call = self.optimizer.combine
        else:
            losses = self.losses(step)
            self.call = lambda: self.optimizer.backward(losses, scaler=scaler, retain_graph=True)

    def state(self):
        method = self.optimizer.method
        own = None if isinstance(method, BufferedMethod) and method._state is not None else method.state_dict()
        grads = [None if p.grad is None else p.grad.clone() for p in self.net.parameters()]
        return copy.deepcopy([grads, own, self.optimizer.optimizer.state_dict()])

    def result(self):
        self.call()
        return [[p.grad for p in self.net.parameters()], self.optimizer.method.state_dict()]


# Methods that keep gradients can undo only their first step.
@pytest.mark.parametrize(
    ("name", "how"),
    [
        *itertools.product(methods.available(), ["plain", "collected"]),
        *((name, "scaled") for name in methods.available() if isinstance(methods.get(name), BufferedMethod)),
    ],
)
def test_a_stage_that_fails_changes_nothing(name, how):
    kept, lost = isinstance(methods.get(name), BufferedMethod), set()
    for steps in (0, 2):
        expected = Case(name, steps, how).result()
        for at in range(1, 20):
            case = Case(name, steps, how)
            before = case.state()
            try:
                with failing_stage(at):
                    case.call()
            except Fault as fault:
                torch.testing.assert_close(case.state(), before, rtol=0, atol=0)
                if how == "collected" and case.optimizer._pending is None:
                    lost.add(str(fault))
                    case.prepare(steps)
                if not kept or steps == 0:
                    torch.testing.assert_close(case.result(), expected, rtol=0, atol=0)
            else:
                break
        assert 1 < at < 19
    assert lost <= {"aggregate", "combine", "combine_by_rule"}  # these may write over what was collected


@pytest.mark.parametrize("name", methods.available())
def test_aggregate_that_fails_leaves_the_method(name):
    rows, losses = normal(3, 40), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    for at in range(1, 20):
        method, other = methods.get(name), methods.get(name)
        try:
            with failing_stage(at):
                gradsurgery.aggregate(rows, method, losses=losses)
        except Fault:
            got, expected = (gradsurgery.aggregate(rows, m, losses=losses) for m in (method, other))
            torch.testing.assert_close([got, method.state_dict()], [expected, other.state_dict()], rtol=0, atol=0)
        else:
            break
    assert 1 < at < 19


def test_a_method_of_ones_own_that_fails_goes_back():
    class Mine(methods.Method):
        calls = 0

        def weights(self, gram, *, losses=None):
            self.calls += 1
            return gram[..., :1, 0] if self.calls == 1 else torch.ones_like(gram[..., 0])

        def state_dict(self):
            return {"calls": self.calls}

        def _restore(self, state):
            self.calls = state["calls"]

    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters()), Mine())
    with pytest.raises(ValueError, match="must return weights of shape"):
        optimizer.backward(two_losses(net, torch.ones(2, 6)))
    assert optimizer.method.calls == 0


class Growing(methods.Method):
    """A method whose state has other keys before the first step, or cannot be read or restored then."""

    ema = None

    def __init__(self, breaks):
        self.breaks = breaks

    def weights(self, gram, *, losses=None):
        self.ema = gram
        raise Fault("the real error")

    def state_dict(self):
        if self.breaks == "read":
            return {"ema": self.ema.clone()}
        return {} if self.ema is None else {"ema": self.ema}

    def load_state_dict(self, state):
        if self.breaks == "restored":
            raise KeyError("ema")
        super().load_state_dict(state)


@pytest.mark.parametrize("breaks", ["keys", "read", "restored"])
def test_a_state_that_cannot_go_back_does_not_hide_the_error(breaks):
    with pytest.raises(Fault, match="the real error"):
        gradsurgery.aggregate(normal(2, 5), Growing(breaks))


def test_an_optimizer_does_not_hide_the_error_either():
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters()), Growing("keys"))
    with pytest.raises(Fault, match="the real error"):
        optimizer.backward(two_losses(net, torch.ones(2, 6)))


def test_a_compiler_in_another_thread_does_not_matter(monkeypatch):
    """While one thread compiles, ``torch.compiler.is_compiling()`` is true in all threads of the process."""
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters()), "famo")
    optimizer.backward(two_losses(net, torch.ones(2, 6)))
    before = optimizer.method.state_dict()
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()
    monkeypatch.setattr(gradsurgery._operate, "add_all", fails)
    with pytest.raises(Fault):
        optimizer.backward(two_losses(net, torch.ones(2, 6)))
    after = optimizer.method.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_update_that_fails_is_not_half_made(monkeypatch):
    method, other = methods.get("famo"), methods.get("famo")
    net = two_task_net()
    optimizers = [gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters()), m) for m in (method, other)]
    for optimizer in optimizers:
        optimizer.backward(two_losses(net, torch.ones(2, 6)))
    keep, calls = type(method)._keep, []

    def fails_once(self, *args, **kwargs):
        calls.append(self)
        keep(self, *args, **kwargs)
        if len(calls) == 1:
            raise Fault

    monkeypatch.setattr(type(method), "_keep", fails_once)
    with pytest.raises(Fault):
        optimizers[0].update([0.5, 0.1])
    for optimizer in optimizers:
        optimizer.update([0.5, 0.1])
    torch.testing.assert_close(method.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_parameters_that_went_out_of_sight_are_looked_for_after_a_failure_too():
    first, second, x = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.ones(3, 2)
    optimizer = gradsurgery.MGDA(torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.0))

    def step(hidden):
        optimizer.zero_grad()
        z = first(x)
        y = Hiding.apply(second, z) if hidden else second(z)
        optimizer.backward([y.square().mean(), (y - 1).abs().mean()])
        return [p.grad for p in second.parameters()]

    expected = step(False)
    with pytest.raises(Fault), failing_stage(1):
        step(True)
    torch.testing.assert_close(step(True), expected)


def test_tasks_of_a_failed_step_are_not_remembered():
    net = two_task_net()
    optimizer = gradsurgery.GradVac(torch.optim.SGD(net.parameters()))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)  # so gradients of heads are added, after those of shared parameters
    for at in range(1, 9):
        a, b = two_losses(net, torch.ones(2, 6))
        try:
            with failing_stage(at):
                optimizer.backward({"a": a, "b": b})
        except Fault:
            assert optimizer._planner._tasks is None
        else:
            break
    assert at > 2
    a, b = two_losses(net, torch.ones(2, 6))
    with pytest.raises(ValueError, match="same tasks in the same order"):
        optimizer.backward({"b": b, "a": a})


@pytest.mark.parametrize("method", ["pcgrad", "uw"])
def test_sums_of_complex_gradients_are_made_before_anything_is_written(monkeypatch, method):
    weight, head = (torch.nn.Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.complex64))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([weight, head]), method)

    def backward():
        losses = [(weight * head.real).sum() + weight.sum(), (weight * head.imag + 2 * weight).square().sum()]
        optimizer.backward(losses)

    with pytest.raises(TypeError, match="complex") if method == "pcgrad" else contextmanager(lambda: (yield))():
        backward()  # what is shared must be real
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([weight, head]), method, shared=[weight])
    backward()
    before = copy.deepcopy([weight.grad, head.grad, optimizer.method.state_dict()])
    for module in (gradsurgery._operate, gradsurgery._step):
        monkeypatch.setattr(module, "foreign_sums", fails)
    with pytest.raises(Fault):
        backward()
    torch.testing.assert_close([weight.grad, head.grad, optimizer.method.state_dict()], before, rtol=0, atol=0)


def test_batches_that_stay_are_not_written_over(monkeypatch):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([weight]), "modo")

    def losses(k):
        return [(weight * k).square().sum(), (weight - k).abs().sum() * k]

    optimizer.collect(losses(1.0))
    optimizer.collect(losses(2.0))
    before = [[g.clone() for g in row] for row in optimizer._pending.grads]
    monkeypatch.setattr(gradsurgery.distributed, "assign_grads", fails)
    with pytest.raises(Fault):
        optimizer.backward(losses(3.0))
    torch.testing.assert_close(optimizer._pending.grads, before, rtol=0, atol=0)
    assert optimizer.method.state_dict() == {"weights": None}


class Static(torch.autograd.Function):
    """A function that returns its gradients in the same memory each time, as modules in CUDA graphs do."""

    memory: tuple = ()

    @staticmethod
    def forward(ctx, weight, k):
        ctx.k = k
        return weight.sum() * k

    @staticmethod
    def backward(ctx, grad):
        return Static.memory[ctx.k % 2].fill_(ctx.k), None


@pytest.mark.parametrize("call", ["collect", "backward"])
def test_what_passes_wrote_over_is_forgotten(call):
    Static.memory = torch.zeros(2), torch.zeros(2)
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([weight]))
    optimizer.collect([Static.apply(weight, 1), Static.apply(weight, 2)])
    with pytest.raises(RuntimeError, match="gradients in the same memory"):
        getattr(optimizer, call)([Static.apply(weight, 3), Static.apply(weight, 4)])
    with pytest.raises(ValueError, match="nothing to combine"):
        optimizer.combine()


def test_wrong_arguments_leave_the_first_step_first():
    net = two_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters()))

    def losses():
        z = net["trunk"](torch.ones(6))
        return list(torch.cat([net["a"](z), net["b"](z)]).sigmoid().unbind())

    with pytest.raises(ValueError, match="mode must be one of"):
        optimizer.backward(losses(), mode="sequentially")
    with pytest.warns(UserWarning, match="Name the shared parameters by shared="):
        optimizer.backward(losses())
