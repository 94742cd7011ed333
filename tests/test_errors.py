# SPDX-License-Identifier: MIT
"""Bad input: the message says what was expected and what was passed, and a failed call changes nothing."""

import numpy as np
import pytest
import torch

import gradsurgery
from conftest import on_cpu, two_losses, two_task_net
from inputs import DEVICE, normal

ROWS = normal(3, 8, torch.float32)
HERE = ROWS.device
LISTS = [[ROWS[0], ROWS[0, :2]], [ROWS[1], None]]
SPARSE = torch.sparse_coo_tensor([[0]], [1.0], (8,))


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        (
            ROWS[0],
            ValueError,
            r"grads must be \[T, N\] with a contiguous last dimension, got shape \(8,\) with",
        ),
        (torch.ones(3, 4, 2), ValueError, r"got shape \(3, 4, 2\)"),
        (torch.ones(0, 4), ValueError, r"at least one task, got shape \(0, 4\)"),
        (torch.ones(4, 3).T, ValueError, r"got shape \(3, 4\) with strides \(1, 3\): contiguous\(\)"),
        (ROWS.int(), TypeError, "grads must be float64, float32, bfloat16 or float16, got torch.int32"),
        (torch.ones(2, 3, dtype=torch.complex64), TypeError, r"complex64 gradient.*view_as_complex.*shared="),
        (SPARSE, TypeError, r"grads is a torch.sparse_coo gradient.*sparse=False"),
        ([], ValueError, "at least one task, got an empty list"),
        (None, TypeError, "got NoneType"),
        ([ROWS[0], ROWS[1]], TypeError, r"grads\[0\] must be a list of tensors or None, got a tensor of shape \(8,\)"),
        ([[ROWS[0]], [ROWS[1], ROWS[2]]], ValueError, "task 0 has 1 gradients, task 1 has 2"),
        ([[ROWS[0]], [ROWS[1, :3]]], ValueError, r"parameter 0 must have one shape, got \(8,\) and \(3,\) \(task 1\)"),
        (
            [[ROWS[0]], [ROWS[1].double()]],
            TypeError,
            r"parameter 0 must have one dtype, got torch.float32 and torch.float64",
        ),
        ([[ROWS[0]], [ROWS[1].to("meta")]], ValueError, rf"one device, got {HERE} and meta \(task 1\)"),
        ([[ROWS[0], None], [ROWS[1], 3.0]], TypeError, r"grads\[1\]\[1\] must be a tensor, got float 3.0"),
        ([[ROWS[0]], [3.0]], TypeError, r"grads\[1\]\[0\] must be a tensor, got float 3.0"),
        ([[ROWS[0]], [SPARSE]], TypeError, r"grads\[1\]\[0\] is a torch.sparse_coo gradient"),
        (
            [[None, ROWS[0]], [None, ROWS[0].to(torch.complex64)]],
            TypeError,
            r"grads\[1\]\[1\] is a torch.complex64 gradient",
        ),
    ],
)
@pytest.mark.parametrize("function", ["gram", "combine", "aggregate"])
def test_gradients(function, grads, error, message):
    arguments = (torch.ones(2),) if function == "combine" else ()
    with pytest.raises(error, match=message):
        getattr(gradsurgery, function)(grads, *arguments)


@pytest.mark.parametrize(
    ("grads", "segments", "error", "message"),
    [
        (ROWS, [0, 9], ValueError, r"ascending offsets from 0 to N = 8, got \[0, 9\]"),
        (ROWS, [1, 8], ValueError, "ascending offsets"),
        (ROWS, [0, 5, 3, 8], ValueError, "ascending offsets"),
        (ROWS, [], ValueError, "ascending offsets"),
        (ROWS, torch.tensor([0, 8]), TypeError, "segments must be a list of int"),
        (ROWS, [0, 8.0], TypeError, "segments must be a list of int"),
        (LISTS, [0], ValueError, r"one segment id >= 0 for each of the 2 parameters, got \[0\]"),
        (LISTS, [0, -1], ValueError, "one segment id >= 0"),
        (LISTS, [0, 2**63], TypeError, "segments must be a list of int"),
    ],
)
def test_segments(grads, segments, error, message):
    with pytest.raises(error, match=message):
        gradsurgery.gram(grads, segments=segments)


def test_integers_of_numpy_are_integers():
    expected = gradsurgery.gram(ROWS, segments=[0, 5, 8])
    assert torch.equal(gradsurgery.gram(ROWS, segments=list(np.cumsum([0, 5, 3]))), expected)
    orders = [gradsurgery.task_order(5, seed=kind(3), step=kind(2)) for kind in (int, np.int32)]
    assert torch.equal(*orders)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"weights": torch.ones(2)}, ValueError, r"weights must have shape \(3,\), got \(2,\)"),
        ({"weights": torch.ones(1, 3)}, ValueError, r"weights must have shape \(3,\), got \(1, 3\)"),
        ({"weights": torch.ones(3), "segments": [0, 4, 8]}, ValueError, r"weights must have shape \(2, 3\)"),
        ({"weights": torch.ones(3).int()}, TypeError, "real floating-point tensor, got .* in torch.int32"),
        ({"weights": np.ones(3)}, TypeError, "real floating-point tensor, got ndarray"),
        ({"weights": [1.0, 1.0, 1.0]}, TypeError, "real floating-point tensor, got list"),
        (
            {"weights": torch.ones(3, device="meta")},
            ValueError,
            f"weights must be on the gradients' device {HERE}, got meta",
        ),
        ({"weights": torch.ones(3), "accumulate": True}, ValueError, "adds to out, and out is None"),
        ({"weights": torch.ones(3), "out": torch.ones(7)}, ValueError, r"contiguous tensor \[8\], got a tensor"),
        ({"weights": torch.ones(3), "out": torch.ones(16)[::2]}, ValueError, r"contiguous tensor \[8\]"),
        ({"weights": torch.ones(3), "out": torch.ones(8).double()}, TypeError, "out must be torch.float32 like the"),
        (
            {"weights": torch.ones(3), "out": torch.ones(8, device="meta")},
            ValueError,
            f"out must be on {HERE} like the",
        ),
        ({"weights": torch.ones(3), "out": [torch.ones(8)]}, ValueError, r"contiguous tensor \[8\], got list"),
        ({"weights": torch.ones(3), "backend": "nothing"}, ValueError, "backend must be one of .*, got 'nothing'"),
    ],
)
def test_combine(arguments, error, message):
    out = arguments.get("out")
    before = out.clone() if isinstance(out, torch.Tensor) else None
    with pytest.raises(error, match=message):
        gradsurgery.combine(ROWS, **arguments)
    if before is not None and not before.is_meta:
        assert torch.equal(out, before)


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (torch.ones(8), ValueError, "out must be a list of 2 tensors"),
        (5, ValueError, "out must be a list of 2 tensors"),
        ([torch.ones(8).to_sparse(), torch.ones(2)], TypeError, r"out\[0\] must be dense, got torch.sparse_coo"),
        ([torch.ones(8), torch.ones(1).expand(2)], ValueError, r"out\[1\] must have memory for each element"),
        ([torch.ones(8)], ValueError, "out must be a list of 2 tensors"),
        ([torch.ones(8), None], ValueError, r"out\[1\] must be a tensor of shape \(2,\), got NoneType"),
        ([torch.ones(8), torch.ones(3)], ValueError, r"out\[1\] must be .* \(2,\), got a tensor of shape \(3,\)"),
        ([torch.ones(8).half(), torch.ones(2)], TypeError, r"out\[0\] must be torch.float32 like the gradients"),
    ],
)
def test_combine_lists(out, error, message):
    with pytest.raises(error, match=message):
        gradsurgery.combine(LISTS, torch.ones(2), out=out)


GRAM = torch.eye(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gradsurgery.pcgrad_weights(torch.ones(3, 2)), ValueError, r"gram must be \[..., T, T\].*\(3, 2\)"),
        (lambda: gradsurgery.pcgrad_weights(torch.ones(3)), ValueError, r"gram must be \[..., T, T\]"),
        (lambda: gradsurgery.pcgrad_weights(torch.ones(0, 0)), ValueError, "T >= 1"),
        (lambda: gradsurgery.pcgrad_weights(GRAM.long()), TypeError, "gram must be a real floating-point tensor"),
        (lambda: gradsurgery.pcgrad_weights([[1.0]]), TypeError, "gram must be .* got list"),
        (
            lambda: gradsurgery.pcgrad_weights(GRAM, reduction="max"),
            ValueError,
            "reduction must be one of sum, mean, got",
        ),
        (lambda: gradsurgery.pcgrad_weights(GRAM, seed=True), ValueError, "seed must be an int in .* got True"),
        (lambda: gradsurgery.pcgrad_weights(GRAM, backend=""), ValueError, "backend must be one of .* got ''"),
        (lambda: gradsurgery.pcgrad_weights(GRAM, seed=-1), ValueError, r"seed must be an int in 0..2\^63-1, got -1"),
        (lambda: gradsurgery.pcgrad_weights(GRAM, step=1.5), ValueError, "step must be an int in"),
        (lambda: gradsurgery.pcgrad_weights(GRAM, step=True), ValueError, "step must be an int in"),
        (
            lambda: gradsurgery.pcgrad_weights(GRAM, step=torch.ones(2, dtype=torch.int64)),
            ValueError,
            "step must be an int or an int64 tensor",
        ),
        pytest.param(
            lambda: gradsurgery.pcgrad_weights(GRAM, order=torch.zeros(3, 3).long()),
            ValueError,
            "permutation of 0..2",
            marks=on_cpu,
        ),
        (
            lambda: gradsurgery.pcgrad_weights(GRAM, order=torch.zeros(2, 3).long()),
            ValueError,
            r"order must be \[T, T\]",
        ),
        (lambda: gradsurgery.pcgrad_weights(GRAM, order=torch.zeros(3, 3)), TypeError, "order must be an int64 tensor"),
        (lambda: gradsurgery.min_norm_weights(GRAM, solver="newton"), ValueError, "solver must be one of exact, "),
        (lambda: gradsurgery.min_norm_weights(GRAM, max_iter=0), ValueError, "max_iter must be an int >= 1"),
        (lambda: gradsurgery.min_norm_weights(GRAM, tol=-1.0), ValueError, "tol must be >= 0"),
        (lambda: gradsurgery.task_order(0, seed=0, step=0), ValueError, "num_tasks must be an int >= 1, got 0"),
        (
            lambda: gradsurgery.gradnorm_update(torch.ones(3), torch.ones(2), torch.ones(3), torch.ones(3)),
            ValueError,
            r"norms must have the shape \[..., T\] of weights, T >= 1, got a tensor of shape \(2,\)",
        ),
        (
            lambda: gradsurgery.gradnorm_update(*[torch.ones(2, 0)] * 4),
            ValueError,
            r"weights must have the shape \[..., T\] of weights, T >= 1, got a tensor of shape \(2, 0\)",
        ),
        (
            lambda: gradsurgery.aggregate(ROWS, "unknown"),
            ValueError,
            "method must be one of aligned_mtl, cagrad, .*, got 'unknown'",
        ),
        (lambda: gradsurgery.task_order(True, seed=0, step=0), ValueError, "num_tasks must be an int >= 1, got True"),
        (lambda: gradsurgery.gram(ROWS, segments=[0, 8.0]), TypeError, r"N\] of the flat form, got float 8.0 in it"),
        (
            lambda: gradsurgery.aggregate(ROWS, "uw", losses=torch.ones(3, dtype=torch.complex64)),
            TypeError,
            "losses must be real, got torch.complex64",
        ),
        (lambda: gradsurgery.aggregate(ROWS, 3), TypeError, r"name or a Method, as .* is one, got a builtins\.int"),
        (lambda: gradsurgery.aggregate(ROWS, "gradnorm"), ValueError, "method 'gradnorm' needs losses="),
        (
            lambda: gradsurgery.aggregate(ROWS, gradsurgery.methods.get("pcgrad"), seed=1),
            ValueError,
            r"options \['seed'\]",
        ),
        (lambda: gradsurgery.methods.get("mgda", normalization="l1"), ValueError, "normalization must be one of none"),
        (lambda: gradsurgery.methods.get("mgda", combine="both"), ValueError, "combine must be one of original, "),
        (lambda: gradsurgery.methods.get("mgda", solver="newton"), ValueError, "solver must be"),
        (lambda: gradsurgery.methods.get("gradnorm", lr=-1.0), ValueError, "lr must be >= 0 and finite, got -1.0"),
        (
            lambda: gradsurgery.methods.get("pcgrad").load_state_dict({"x": 1}),
            ValueError,
            r"\['seed', 'step'\], got \['x'\]",
        ),
    ],
)
def test_weights_and_methods(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_gradients():
    with pytest.raises(TypeError, match="grads is a nested tensor, and gradients must be dense"):
        gradsurgery.gram(torch.nested.nested_tensor([torch.ones(2)] * 2))


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (torch.nn.Linear(2, 2), "must be an iterable of parameters, .* got Linear"),
        (torch.nn.Parameter(torch.ones(2)), r"must be an iterable of parameters, .* got a tensor of shape \(2,\)"),
        (list(torch.nn.Linear(2, 2).named_parameters()), "must hold parameters, .* got tuple"),
        (torch.nn.Sequential(torch.nn.Linear(2, 2)), "must hold parameters, .* got Linear"),
    ],
)
def test_shared_parameters_that_are_none(named, message):
    net = two_task_net()
    for make in (
        lambda sgd: gradsurgery.PCGrad(sgd, shared=named),
        lambda sgd: gradsurgery.GradNorm(sgd, norm_parameters=named),
    ):
        with pytest.raises(TypeError, match=message):
            make(torch.optim.SGD(net.parameters(), lr=0.1))


def test_named_backend_that_cannot_serve(monkeypatch):
    other = "cuda" if DEVICE == "cpu" else "cpu"
    why = rf"backend '{other}' cannot serve this call: the ((compiled )?extension|tensors are on {HERE})"
    with pytest.raises(RuntimeError, match=why):
        gradsurgery.gram(ROWS, backend=other)
    monkeypatch.setenv("GRADSURGERY_BACKEND", other)
    with pytest.raises(RuntimeError, match=why):
        gradsurgery.gram(ROWS)
    assert gradsurgery.gram(ROWS, backend="reference").shape == (3, 3)
    monkeypatch.setenv("GRADSURGERY_BACKEND", "unknown")
    with pytest.raises(ValueError, match=r"GRADSURGERY_BACKEND must be one of cuda, .*, got 'unknown'"):
        gradsurgery.gram(ROWS)
    # Making a method chooses no backend: there is no data yet.
    assert gradsurgery.methods.get("mgda").name == "mgda"


def test_too_many_tasks_fall_through_to_the_reference():
    rows = normal(257, 3, torch.float32)
    assert gradsurgery.aggregate(rows, "mgda").shape == (3,)
    with pytest.raises(RuntimeError, match=r"at most 256 tasks, got 257|compiled extension"):
        gradsurgery.gram(rows, backend=DEVICE)


def test_results_are_constants_to_autograd():
    rows = ROWS.clone().requires_grad_()
    lists = [[rows[0]], [rows[1]]]
    results = {
        "gram": gradsurgery.gram(rows),
        "combine": gradsurgery.combine(rows, torch.ones(3)),
        "aggregate": gradsurgery.aggregate(lists)[0],
        "pcgrad_weights": gradsurgery.pcgrad_weights(rows @ rows.T),
        "min_norm_weights": gradsurgery.min_norm_weights(rows @ rows.T),
        "gradnorm_update": gradsurgery.gradnorm_update(rows[0], *[torch.ones(8)] * 3),
    }
    for name, result in results.items():
        with pytest.raises(gradsurgery.NotDifferentiableError, match=f"the result of {name} is a constant"):
            (result.sum() + rows.sum()).backward()
    assert not gradsurgery.gram(rows.detach()).requires_grad
    with torch.no_grad():
        assert not gradsurgery.gram(rows).requires_grad


class Untouched:
    """Asserts that a failed call left gradients, optimizer and method as they were."""

    def __init__(self) -> None:
        self.net = two_task_net()
        self.optimizer = gradsurgery.PCGrad(torch.optim.Adam(self.net.parameters()))
        self.x = torch.randn(4, 6)
        self.optimizer.backward(two_losses(self.net, self.x))
        self.optimizer.step()
        self.before = self.state()

    def state(self):
        grads = [p.grad.clone() for p in self.net.parameters()]
        return grads, {k: v.clone() for k, v in self.net.state_dict().items()}, self.optimizer.state_dict()

    def check(self) -> None:
        torch.testing.assert_close(self.state(), self.before, atol=0, rtol=0)
        assert self.optimizer._pending is None


@pytest.mark.parametrize(
    ("losses", "error", "message"),
    [
        (lambda a, b: [], ValueError, "at least one loss"),
        (lambda a, b: a, ValueError, r"one per task, or a 1-D tensor, got a tensor of shape \(\)"),
        (lambda a, b: [a, b.expand(2)], ValueError, r"loss '1' must be a scalar, got shape \(2,\)"),
        (lambda a, b: [a, b.detach()], ValueError, "loss '1' has no graph to go back through"),
        (lambda a, b: {"left": a, "right": 3.0}, TypeError, "loss 'right' must be a tensor, got float 3.0 "),
        (lambda a, b: {1: a, "1": b}, ValueError, r"names that differ as strings, got \['1', '1'\]"),
        (lambda a, b: 3.0, TypeError, "a 1-D tensor or a dict of losses, got float"),
        (lambda a, b: "ab", TypeError, "got str"),
        (lambda a, b: {a, b}, TypeError, "got set"),
    ],
)
def test_losses(losses, error, message):
    untouched = Untouched()
    with pytest.raises(error, match=message):
        untouched.optimizer.backward(losses(*two_losses(untouched.net, untouched.x)))
    untouched.check()


def test_freed_graph_changes_nothing():
    untouched = Untouched()
    losses = two_losses(untouched.net, untouched.x)
    torch.autograd.grad(losses[0], list(untouched.net["trunk"].parameters()))
    with pytest.raises(RuntimeError, match="second time"):
        untouched.optimizer.backward(losses)
    untouched.check()


def test_sparse_shared_gradient_changes_nothing():
    table = torch.nn.Embedding(5, 3, sparse=True)
    net = torch.nn.Linear(3, 2)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([*net.parameters(), *table.parameters()], lr=0.1))
    net.bias.requires_grad_(False)  # the number in the message counts it all the same
    with pytest.raises(TypeError, match=r"loss '0' for the optimizer's parameter 2 is a torch.sparse_coo .*shared="):
        optimizer.backward(list(net(table(torch.tensor([1, 2]))).mean(0).unbind()))
    assert all(p.grad is None for p in [*net.parameters(), *table.parameters()])
    assert optimizer.method.state_dict()["step"] == 0
    with pytest.raises(ValueError, match="nothing to combine"):
        optimizer.combine()


def test_wrapper_arguments():
    net = two_task_net()
    adam = torch.optim.Adam(net.parameters())
    for arguments, error, message in [
        ({"optimizer": net}, TypeError, "optimizer must be a torch.optim.Optimizer, as .* is, got ModuleDict"),
        ({"granularity": "layer"}, ValueError, "granularity must be one of global, per_group, per_tensor, got 'layer'"),
        ({"shared": [torch.ones(2)]}, ValueError, "shared holds 1 tensors that are not parameters"),
        (
            {"method": "gradnorm", "granularity": "per_tensor"},
            ValueError,
            "weights losses, which needs granularity 'global'",
        ),
        ({"process_group": object()}, TypeError, "process_group must be a torch.distributed.ProcessGroup, got object"),
        ({"method": "sum of all"}, ValueError, "method must be one of"),
    ]:
        with pytest.raises(error, match=message):
            gradsurgery.SurgeryOptimizer(**{"optimizer": adam, **arguments})
    with pytest.raises(ValueError, match="norm_parameters holds 1 tensors"):
        gradsurgery.GradNorm(adam, norm_parameters=[torch.ones(2)])
    with pytest.raises(TypeError, match="seeed"):
        gradsurgery.PCGrad(adam, seeed=1)
    with pytest.raises(ValueError, match="nothing to combine"):
        gradsurgery.PCGrad(adam).combine()


def test_micro_batches_that_do_not_match():
    net = two_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.Adam(net.parameters()))
    x = torch.randn(4, 6)
    optimizer.collect(two_losses(net, x))
    with pytest.raises(ValueError, match=r"same tasks in the same order: had \['0', '1'\], got \['a', 'b'\]"):
        optimizer.collect(dict(zip("ab", two_losses(net, x), strict=True)))
    with pytest.raises(ValueError, match="every micro-batch is given the scaler or none"):
        optimizer.collect(two_losses(net, x), scaler=torch.amp.GradScaler(DEVICE))
    net["b"].requires_grad_(False)
    with pytest.raises(ValueError, match="parameters changed between micro-batches"):
        optimizer.backward(two_losses(net, x))
    net["b"].requires_grad_(True)
    assert optimizer.combine().finite
