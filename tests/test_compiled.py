# SPDX-License-Identifier: MIT
"""Models under torch.compile: autograd cannot tell which parameters each output of a compiled function reaches."""

import pytest
import torch
from torch._guards import TracingContext, tracing

import gradsurgery
from conftest import grads_of, on_cpu, two_task_net
from gradsurgery import _graph
from gradsurgery._compiling import capturing, is_traced
from gradsurgery._wrapper import OptimizerWrapper

pytestmark = on_cpu
X = torch.linspace(-1, 1, 48).reshape(8, 6)


def test_no_capture_is_asked_for_while_tracing():
    compiled = torch.compile(lambda x: -x if capturing(torch.device("cuda")) else x, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), X)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = two_task_net()

    def trunk(self, x):
        return self.parts["trunk"](x).tanh()

    def forward(self, x):
        z = self.trunk(x)
        return self.parts["a"](z), self.parts["b"](z)


def losses_of(outputs):
    a, b = outputs
    return [(a - 1).square().mean(), 3 * (b + 1).square().mean()]


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(0)
    net = Net()
    return net, torch.compile(net, backend="aot_eager")


def surgery(net, losses, method="mgda", **options):
    """Clear the net's gradients, make one backward call, and return copies of all gradients."""
    net.zero_grad()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method, **options)
    optimizer.backward(losses)
    return [g.clone() for g in grads_of(net)]


def test_a_whole_model_with_its_shared_parameters_named(whole):
    net, compiled = whole
    shared = [*net.parts["trunk"].parameters()]
    expected = surgery(net, losses_of(net(X)))
    torch.testing.assert_close(surgery(net, losses_of(compiled(X)), shared=shared), expected)
    plain = surgery(net, losses_of(net(X)), "uw")
    torch.testing.assert_close(surgery(net, losses_of(compiled(X)), "uw"), plain)


def test_a_whole_model_is_warned_of_once(whole):
    net, compiled = whole
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.warns(UserWarning, match="they count as shared.*Name the shared parameters") as caught:
        optimizer.backward(losses_of(compiled(X)))
    assert [w.filename for w in caught] == [__file__]
    optimizer.backward(losses_of(compiled(X)))
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.collect(losses_of(compiled(X)))
    with pytest.warns(UserWarning, match="Name the shared parameters") as caught:
        optimizer.combine()
    assert [w.filename for w in caught] == [__file__]


def test_a_trunk_of_its_own_needs_no_names(whole):
    net, _ = whole
    trunk = torch.compile(net.trunk, backend="aot_eager")
    with torch._functorch.config.patch(donated_buffer=False):
        z = trunk(X)
    outputs = net.parts["a"](z), net.parts["b"](z)
    torch.testing.assert_close(surgery(net, losses_of(outputs)), surgery(net, losses_of(net(X))))


def test_batches_of_several_sizes():
    """For several sizes torch compiles the backward pass ahead of time; it may overwrite what a second pass reads."""
    torch._dynamo.reset()
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))

    def step(trunk, rows):
        z = trunk(X[:rows])
        optimizer.backward(losses_of((net.parts["a"](z), net.parts["b"](z))))

    trunk = torch.compile(net.trunk, backend="aot_eager")
    step(trunk, 8)
    with pytest.raises(RuntimeError, match=r"set torch\._functorch\.config\.donated_buffer=False"):
        step(trunk, 5)
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        trunk = torch.compile(net.trunk, backend="aot_eager")
        for rows in (8, 5, 3):
            step(trunk, rows)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler reads .grad
@pytest.mark.parametrize("method", ["pcgrad", "gradnorm", "moco", "uw"])
def test_a_compiled_step_is_the_step(method):
    """Calls that set or clear what the optimizer keeps run uncompiled within the compiled step."""
    found = []
    for compiled in (False, True):
        torch.manual_seed(1)
        net = Net()
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)

        def step(x, net=net, optimizer=optimizer):
            net.zero_grad()
            info = optimizer.backward(losses_of(net(x)))
            optimizer.step()
            return info.weights

        with torch._functorch.config.patch(donated_buffer=False):
            call = torch.compile(step, backend="eager") if compiled else step
            weights = [call(X + shift) for shift in (0.0, 0.1, 0.2)]
        found.append((weights, [p.detach() for p in net.parameters()]))
    torch.testing.assert_close(found[1], found[0])


def test_a_compiled_step_forgets_uncompiled(monkeypatch):
    # torch 2.10 fails to trace zero_grad().
    net, traced, clear = Net(), [], OptimizerWrapper.zero_grad
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.collect(losses_of(net(X)))

    def spy(*args):
        traced.append(torch.compiler.is_compiling())
        clear(*args)

    monkeypatch.setattr(OptimizerWrapper, "zero_grad", spy)
    torch.compile(lambda: optimizer.zero_grad(), backend="eager")()
    assert traced == [False]
    with pytest.raises(ValueError, match="nothing to combine"):
        optimizer.combine()


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("extension", [True, False])
def test_heads_in_torchscript_are_noticed_once_it_is_one_function(monkeypatch, extension):
    if not extension:
        monkeypatch.setattr(_graph, "C", None)

    class TwoHeads(torch.nn.Module):  # of a new type, for which TorchScript has compiled nothing yet
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 1), torch.nn.Linear(8, 1)

        def forward(self, z):
            return self.a(z.tanh()), self.b(z.tanh())

    net = torch.jit.script(torch.nn.Sequential(Net().parts["trunk"], TwoHeads()))
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward(losses_of(net(X)))
    with pytest.warns(UserWarning, match="gradients of zeros to parameters that loss"):
        optimizer.backward(losses_of(net(X)))


def test_vmap_does_not_take_a_compiled_function(whole):
    net, compiled = whole
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1), shared=[*net.parts["trunk"].parameters()])
    with pytest.raises(RuntimeError, match=r"compiled backward function within vmap.*mode='sequential' goes back"):
        optimizer.backward(losses_of(compiled(X)), mode="batched")


def test_a_compilers_context_alone_tells_of_tracing():
    """While torch 2.11 traces a function by calling it, ``torch.compiler.is_compiling()`` is false."""
    assert not is_traced()
    with tracing(TracingContext(None)):
        assert not torch.compiler.is_compiling()
        assert is_traced()


@pytest.mark.parametrize("wrapped", [torch.compiler.allow_in_graph, torch._dynamo.nonstrict_trace])
def test_functions_that_the_compiler_traces_by_calling_them(wrapped):
    def direction(gradients):
        return gradsurgery.combine(gradients, gradsurgery.pcgrad_weights(gradsurgery.gram(gradients)))

    traced = wrapped(direction)
    compiled = torch.compile(lambda gradients: traced(gradients) * 1, fullgraph=True, backend="aot_eager")
    rows = X[:3].clone().requires_grad_()
    torch.testing.assert_close(compiled(rows), direction(rows.detach()))
