# SPDX-License-Identifier: MIT
"""What the optimizers pass to a method; heads in steps of several batches, with sparse gradients, or in 16 bits."""

import inspect

import pytest
import torch

import gradsurgery
from conftest import grads_of, on_cpu, two_losses, two_task_net
from gradsurgery.collect import PassOptions, collect

methods = gradsurgery.methods
X = torch.linspace(-1, 1, 48).reshape(8, 6)


class Recorder(methods.Method):
    name = "recorder"
    needs_losses = True

    def __init__(self, num_batches=1):
        self.num_batches = num_batches
        self.given = []

    def weights(self, gram, *, losses=None, **options):
        self.given.append((losses, options))
        return torch.ones_like(gram[..., 0])


def test_losses_of_micro_batches_are_summed_and_of_batches_the_last_count():
    net = two_task_net(torch.float64)
    batches = [two_losses(net, X.double() + shift) for shift in (0.0, 0.3, 0.7)]
    values = torch.stack([torch.stack(losses) for losses in batches]).detach()
    for num_batches, expected in ((1, values.sum(0)), (3, values[2])):
        method = Recorder(num_batches)
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
        for losses in batches:
            optimizer.collect(losses, retain_graph=True)
        optimizer.combine()
        torch.testing.assert_close(method.given[0][0], expected)


@pytest.mark.parametrize("name", [None, "reference"])
def test_a_named_backend_also_yields_the_weights(name):
    method, net = Recorder(), two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method, backend=name)
    optimizer.backward(two_losses(net, X))
    assert method.given[0][1] == ({} if name is None else {"backend": name})


class Own(methods.Method):
    """The shortest method that a user can write."""

    def weights(self, gram, *, losses=None):
        return torch.full_like(gram[..., 0], 0.5)


def test_a_method_of_ones_own_needs_neither_name_nor_backends():
    rows = torch.arange(6.0).reshape(2, 3)
    for backend in (None, "reference"):
        assert gradsurgery.aggregate(rows, Own(), backend=backend).tolist() == [1.5, 2.5, 3.5]
        net = two_task_net()
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), Own(), backend=backend)
        assert optimizer.backward(two_losses(net, X)).weights.tolist() == [0.5, 0.5]
        assert "(Own(), granularity='global'" in repr(optimizer)
    with pytest.raises(ValueError, match="method 'Wrong' must return weights of shape"):
        gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), Wrong()).backward(two_losses(net, X))


class Wrong(methods.Method):
    def weights(self, gram, *, losses=None):
        return torch.ones(5)


def test_what_a_method_was_given_can_be_read():
    assert repr(methods.PCGrad("mean", 7)) == "PCGrad(reduction='mean', seed=7)"
    assert repr(methods.Tchebycheff([1, 2])) == "Tchebycheff(pref=[1.0, 2.0], ideal=None)"
    assert (
        repr(methods.GradNorm(0.5, norm_parameters=[X])) == "GradNorm(alpha=0.5, lr=0.025, norm_parameters=<1 tensors>)"
    )
    for name in methods.available():
        options = set(inspect.signature(type(methods.get(name))).parameters) - {"method_options"}
        assert all(hasattr(methods.get(name), option) for option in options)


OTHER_OPTIONS = {
    "alpha": 0.7, "beta": 0.6, "c": 0.3, "combine": "normalized", "lr": 0.1, "max_iter": 9, "max_norm": 2.0,
    "normalization": "l2", "pref": [1.0, 2.0], "reduction": "mean", "reg_eps": 1e-3,
    "rescale": 1, "scale_mode": "median", "seed": 7, "solver": "frank_wolfe", "tau": 0.1, "tol": 1e-3,
}  # fmt: skip


def test_named_optimizers_take_the_options_of_their_methods():
    parameter = torch.nn.Parameter(X)
    adam = torch.optim.Adam([parameter])
    named = [value for value in vars(gradsurgery.named).values() if hasattr(methods, getattr(value, "__name__", ""))]
    assert len(named) == 14
    for optimizer in named:
        method = getattr(methods, optimizer.__name__)
        first, *options, common = inspect.signature(optimizer).parameters.values()
        assert (first.name, str(common)) == ("optimizer", "**common: 'Unpack[Common]'")
        assert [o.replace(annotation="") for o in options] == [
            o.replace(annotation="") for o in inspect.signature(method).parameters.values()
        ]
        others = {o.name: [parameter] if o.name == "norm_parameters" else OTHER_OPTIONS[o.name] for o in options}
        assert repr(optimizer(adam, **others).method) == repr(method(**others))
        assert repr(optimizer(adam, *others.values(), backend="reference").method) == repr(method(**others))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, as .* is, got list"):
        gradsurgery.PCGrad([parameter], lr=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'c'"):
        gradsurgery.PCGrad(adam, c=0.5)


def test_a_head_that_one_of_three_batches_reaches_gets_a_third():
    net, head = two_task_net(torch.float64), torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([*net.parameters(), head], lr=0.1), "modo")
    for batch in range(3):
        a, b = two_losses(net, X.double() + batch)
        optimizer.collect([a + 3 * head.square().sum() if batch == 1 else a, b])
    optimizer.combine()
    torch.testing.assert_close(head.grad, torch.full_like(head, 2))


def test_what_two_tasks_reach_in_different_batches_is_shared():
    net, between = two_task_net(torch.float64), torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([*net.parameters(), between], lr=0.1), "modo")
    for batch in range(3):
        a, b = two_losses(net, X.double() + batch)
        optimizer.collect([a + between.sum() if batch == 1 else a, b + 3 * between.sum() if batch == 2 else b])
    weights = optimizer.combine().weights
    torch.testing.assert_close(between.grad, (3 * weights[1]).expand(5))


@pytest.mark.parametrize(("dtype", "passes"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 2)])
def test_weights_in_16_bits_are_not_rounded(dtype, passes):
    w, counted = torch.nn.Parameter(torch.ones(4)), []
    w.register_hook(lambda grad: counted.append(1))
    optimizer = gradsurgery.SurgeryOptimizer(
        torch.optim.SGD([w], lr=0.1), methods.get("constant", task_weights=[0.3, 0.7])
    )
    optimizer.backward([(w.sum() * k).to(dtype) for k in (1, 2)])
    assert len(counted) == passes
    torch.testing.assert_close(w.grad, torch.full((4,), 1.7), rtol=1e-6, atol=0)


def test_a_weight_of_a_loss_counts_for_a_sparse_head():
    net, table = two_task_net(), torch.nn.Embedding(5, 6, sparse=True)
    optimizer = gradsurgery.GradNorm(torch.optim.SGD([*net.parameters(), *table.parameters()], lr=0.0), lr=0.2)
    for _ in range(2):
        optimizer.zero_grad()
        a, b = two_losses(net, X)
        info = optimizer.backward([a, b + table(torch.tensor([1, 2])).sum()])
    assert (info.weights[1] - 1).abs() > 1e-3
    torch.testing.assert_close(table.weight.grad.to_dense()[1], info.weights[1].float().expand(6))


def test_norm_parameters_must_be_shared():
    net = two_task_net()
    optimizer = gradsurgery.GradNorm(
        torch.optim.SGD(net.parameters(), lr=0.1), norm_parameters=list(net["a"].parameters())
    )
    with pytest.raises(ValueError, match="no two losses share any of norm_parameters"):
        optimizer.backward(two_losses(net, X))
    assert grads_of(net) == [None] * len(grads_of(net))


def test_an_average_of_gradnorm_reads_its_norm_parameters():
    infos = []
    for wrapped in (False, True):
        net = two_task_net(torch.float64)
        torch.manual_seed(3)
        for p in net.parameters():
            torch.nn.init.normal_(p)
        method = methods.GradNorm(lr=0.2, norm_parameters=list(net["trunk"][2].parameters()))
        method = methods.CRMOGM(method, alpha=0.0) if wrapped else method
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
        for _ in range(3):
            optimizer.zero_grad()
            info = optimizer.backward(two_losses(net, X.double()))
            optimizer.step()
        infos.append(info.weights)
    assert (infos[0] - 1).abs().min() > 1e-4
    torch.testing.assert_close(infos[0], infos[1])


def named_losses(net, names):
    return dict(zip(names, two_losses(net, X), strict=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [("moco", {}), ("gradnorm", {}), ("uw", {}), ("gradvac", {}), ("constant", {"task_weights": [1.0, 2.0]})],
)
def test_what_belongs_to_a_task_stays_with_its_name(name, options):
    net = two_task_net()
    method = methods.get(name, **options)
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
    optimizer.backward(named_losses(net, "ba"))
    for restored in (False, True):
        if restored:
            copy = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), methods.get(name, **options))
            state = optimizer.state_dict()
            copy.load_state_dict({**state, "tasks": dict(sorted(state["tasks"].items()))})  # some formats sort keys
            optimizer = copy
        before = str(optimizer.state_dict())
        with pytest.raises(ValueError, match=r"same tasks in the same order.* had \['b', 'a'\], got \['a', 'b'\]"):
            optimizer.backward(named_losses(net, "ab"))
        assert str(optimizer.state_dict()) == before
        optimizer.backward(named_losses(net, "ba"))
    state = optimizer.state_dict()
    del state["tasks"]
    optimizer.load_state_dict(state)
    optimizer.backward(named_losses(net, "cd"))


@pytest.mark.parametrize("name", ["pcgrad", "mgda", "graddrop", "sum", "random"])
def test_methods_without_a_memory_take_any_tasks(name):
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), name)
    for names in ("ab", "ba", "cd"):
        assert optimizer.backward(named_losses(net, names)).tasks == list(names)
    assert "tasks" not in optimizer.state_dict()


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_loss_that_depends_on_no_feature(mode):
    net, alone = two_task_net(torch.float64), torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    parameters = [*net.parameters(), alone]

    def forward():
        z = net["trunk"](X.double())
        return z, [net["a"](z.tanh()).square().mean(), net["b"](z.tanh()).square().mean(), alone.square().sum()]

    expected = collect(forward()[1], parameters, PassOptions()).grads
    features, losses = forward()
    found = collect(losses, parameters, PassOptions(features=features, mode=mode)).grads
    for row, other in zip(found, expected, strict=True):
        for a, b in zip(row, other, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0, 2.0], TypeError, "must return a floating-point tensor, got list"),
        (torch.ones(2, dtype=torch.int64), TypeError, r"floating-point tensor, got a tensor of shape \(2,\)"),
        (torch.ones(3), ValueError, r"must return weights of shape \(2,\) on cpu, got shape \(3,\) on cpu"),
        (torch.ones(2, device="meta"), ValueError, r"shape \(2,\) on cpu, got shape \(2,\) on meta"),
    ],
)
@on_cpu
def test_weights_that_cannot_be(weights, error, message):
    method, net = Recorder(), two_task_net()
    method.weights = lambda gram, losses=None: weights
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
    with pytest.raises(error, match=message):
        optimizer.backward(two_losses(net, X))
    assert grads_of(net) == [None] * len(grads_of(net))
    with pytest.raises(error, match=message):
        gradsurgery.aggregate([[torch.ones(3)], [torch.ones(3)]], method, losses=torch.ones(2))


@pytest.mark.parametrize("first", ["sparse", "dense"])
def test_sparse_and_dense_gradients_of_one_head(first):
    table, net = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 2)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([*table.parameters(), *net.parameters()], lr=0.1))

    def losses(kind):
        decay = table.weight.square().sum() if kind == "dense" else 0.0
        return [table(torch.tensor([1, 3])).square().sum() + decay, net(torch.ones(3)).sum()]

    kinds = ["sparse", "dense"] if first == "sparse" else ["dense", "sparse"]
    for kind in kinds:
        sum(losses(kind)).backward()
    expected = grads_of(table)
    optimizer.zero_grad()
    for kind in kinds:
        optimizer.backward(losses(kind))
    torch.testing.assert_close(grads_of(table), expected)
    optimizer.zero_grad()
    for kind in kinds:
        optimizer.collect(losses(kind))
    optimizer.combine()
    torch.testing.assert_close(grads_of(table), expected)


@pytest.mark.parametrize("kind", [int, torch.tensor])
def test_a_state_of_numbers_belongs_to_no_task(kind):
    class Warm(methods.Method):
        steps = kind(0)

        def weights(self, gram, *, losses=None):
            self.steps = self.steps + 1
            return torch.ones_like(gram[..., 0])

        def state_dict(self):
            return {"steps": self.steps}

    shared = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([shared], lr=0.1), Warm())
    optimizer.backward({"a": shared.sum(), "b": shared.square().sum()})
    optimizer.backward({"a": shared.sum()})
    assert optimizer.method.steps == 2


def test_a_state_that_nothing_restores():
    class Forgetful(methods.Method):
        def weights(self, gram, *, losses=None):
            return torch.ones(len(gram), dtype=gram.dtype)

        def state_dict(self):
            return {"average": torch.ones(2)}

    with pytest.raises(NotImplementedError, match="Forgetful has a state_dict, and needs a load_state_dict"):
        Forgetful().load_state_dict({"average": torch.zeros(2)})


def test_shared_parameters_of_one_loss_beside_others_of_two():
    a, b = (torch.nn.Parameter(torch.full((3,), value)) for value in (1.0, 2.0))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([a, b], lr=0.1), shared=[a])
    optimizer.backward([(a * a).sum() + (b * b).sum(), 2 * (b * b).sum()])
    assert a.grad.tolist() == [2.0] * 3
    assert b.grad.tolist() == [12.0] * 3
