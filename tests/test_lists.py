# SPDX-License-Identifier: MIT
"""Gradients that the extension reads without torch's dispatcher, and the operators that serve all others."""

import itertools
import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery
from conftest import USABLE
from gradsurgery import _gradients
from gradsurgery._memory import _shares_memory
from inputs import DEVICE, normal

if DEVICE not in USABLE:
    pytest.skip(gradsurgery.backends()[DEVICE], allow_module_level=True)

SHAPES = [(3, 4), (), (7,), (0,), (2, 3, 2, 2)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float32, torch.float16]


def make_lists(tasks=4):
    """Return lists in which every second task lacks parameter 1, and only the last task has parameter 2."""
    rows = [
        [
            normal(1, max(1, torch.Size(s).numel()), d)[0][: torch.Size(s).numel()].reshape(s)
            for s, d in zip(SHAPES, DTYPES, strict=True)
        ]
        for _ in range(tasks)
    ]
    for t in range(tasks):
        rows[t][1] = None if t % 2 else rows[t][1]
        rows[t][2] = None if t + 1 < tasks else rows[t][2]
        rows[t][4] = rows[t][4].to(memory_format=torch.channels_last)
    return rows


def reads(rows):
    return _gradients.C.Lists.read(rows)


@pytest.mark.parametrize("segments", [None, [1, 0, 1, 2, 0]])
@pytest.mark.parametrize("method", ["pcgrad", "mgda", "gradnorm"])
def test_the_same_bits_with_and_without(method, segments, monkeypatch):
    rows = make_lists()
    losses = torch.ones(4, device=rows[0][0].device)
    assert reads(rows) is not None
    results = []
    for _ in range(2):
        out = gradsurgery.aggregate(rows, method, losses=losses, segments=segments)
        before = [torch.ones_like(d) for d in out]
        weights = torch.ones(3, 4) if segments else torch.ones(4)
        results.append(
            [
                gradsurgery.gram(rows, segments=segments),
                *out,
                *gradsurgery.combine(rows, weights.to(losses), segments=segments, out=before, accumulate=True),
            ]
        )
        monkeypatch.setattr(_gradients, "C", None)
    for fast, slow in zip(*results, strict=True):
        assert torch.equal(fast, slow)
        assert fast.stride() == slow.stride()


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.t().contiguous().t(),
        lambda g: g[:1].expand(3, 4),
        lambda g: g.requires_grad_(),
        lambda g: g.double(),
        lambda g: g.to_sparse(),
        lambda g: g.as_subclass(Subclass),
        lambda g: torch._neg_view(g),
        lambda g: [1.0],
        lambda g: g.int(),
        lambda g: g[:2],
    ],
)
def test_what_it_does_not_take(change):
    make = lambda: normal(3, 4, torch.float32)  # noqa: E731
    assert reads([[make()], [make()]]) is not None
    assert reads([[make()], [change(make())]]) is None
    assert reads([[make()], [make(), make()]]) is None
    assert reads([[make()], make()]) is None
    assert reads([[None], [None]]) is None
    assert reads([]) is None


def read_matrix(matrix):
    return _gradients.C.Lists.read_matrix(matrix)


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "cagrad", "graddrop", "trimmed_mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_same_bits_of_a_matrix_with_and_without(method, dtype, monkeypatch):
    long = normal(5, 300, dtype)
    matrices = [long, long[:, 3:200], long[::2], long[:1], long[:, :1], long[:, :0], long[:, 7:7]]
    assert all(read_matrix(matrix) is not None for matrix in matrices)
    results = []
    for _ in range(2):
        results.append([])
        for matrix in matrices:
            weights, before = torch.ones_like(matrix[:, 0]) if matrix.shape[1] else matrix.sum(1), matrix[0].clone()
            results[-1] += [
                gradsurgery.gram(matrix),
                gradsurgery.aggregate(matrix, method),
                gradsurgery.aggregate(matrix, gradsurgery.methods.get(method), out=matrix.new_empty(matrix.shape[1])),
                gradsurgery.combine(matrix, weights, out=before, accumulate=True),
            ]
        monkeypatch.setattr(_gradients, "C", None)
    for fast, slow in zip(*results, strict=True):
        assert torch.equal(fast, slow)


@pytest.mark.parametrize(
    "change",
    [
        lambda j: j.T,
        lambda j: j[:, ::2],
        lambda j: j[0],
        lambda j: j[:0],
        lambda j: j.clone().requires_grad_(),
        lambda j: j.as_subclass(Subclass),
        lambda j: torch._neg_view(j),
        lambda j: j.to_sparse(),
        lambda j: j.int(),
        lambda j: j.to("meta"),
        lambda j: j.tolist(),
    ],
)
def test_matrices_that_it_does_not_take(change):
    assert read_matrix(change(normal(3, 8, torch.float32))) is None


def test_a_direction_of_a_subclass_goes_by_the_operators():
    matrix = normal(3, 8, torch.float32)
    out = torch.zeros(8, device=DEVICE).as_subclass(Subclass)
    lists = read_matrix(matrix)
    for other in (out, [torch.zeros(8)], torch.zeros(8).double(), torch.zeros(16)[::2], torch.zeros(1, 8), None):
        assert not lists.fits(other)
    gradsurgery.aggregate(matrix, "mgda", out=out)
    torch.testing.assert_close(out.as_subclass(torch.Tensor), gradsurgery.aggregate(matrix, "mgda"), rtol=0, atol=0)
    with pytest.raises(ValueError, match="out must be a list of tensors like the gradients"):
        lists.combine(torch.ones(3, dtype=torch.float64, device=DEVICE), torch.zeros(7, device=DEVICE), False)
    for call in (lambda: lists.select([0], [0], 1), lambda: lists.targets([], [])):
        with pytest.raises(ValueError, match="param"):
            call()


def test_a_dispatch_mode_sees_the_operators():
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    with Mode():
        gradsurgery.gram(make_lists())
        gradsurgery.gram(normal(2, 5))
    assert {"gradsurgery::gram.list", "gradsurgery::gram"} <= set(seen)


@pytest.mark.filterwarnings("ignore")  # warnings of torch's tracer
def test_a_tracer_sees_the_operators():
    traced = torch.jit.trace(gradsurgery.gram, normal(2, 5), check_trace=False)
    other = normal(2, 5, seed=7)
    assert torch.equal(traced(other), gradsurgery.gram(other))


def test_direct_calls_are_safe():
    lists = reads(make_lists())
    fresh = lists.new_out()
    assert lists.fits(fresh)
    weights = torch.ones(4, dtype=torch.float64, device=lists.device)
    for out in [fresh[:4], [*fresh[:4], torch.zeros(3)], [*fresh[:4], fresh[4].contiguous()], tuple("abcde")]:
        assert not lists.fits(out)
        with pytest.raises(ValueError, match="out must be a list of tensors like the gradients"):
            lists.combine(weights, out, False)
    many = _gradients.C.Lists.read([[torch.ones(2)] for _ in range(300)])
    assert many.counts[0] == 127
    assert not _gradients.C.Lists.read_matrix(torch.ones(2, 4)).fits(torch.ones(4, 1))
    with pytest.raises(ValueError, match="there are 5 parameters, got index 5"):
        lists.select([0, 5], [], 1)
    with pytest.raises(ValueError, match="name one per parameter"):
        lists.select([0, 1], [0], 1)
    with pytest.raises(ValueError, match=r"segments must be in 0..0, got 1"):
        lists.select([0, 1], [0, 1], 1).gram(torch.empty(4, 4, dtype=torch.float64, device=lists.device))
    with pytest.raises(ValueError, match="weights must not be a negated view"):
        lists.combine(torch._neg_view(weights), fresh, False)
    with pytest.raises(ValueError, match="gram must be contiguous"):
        lists.gram(torch.empty(3, 3, dtype=torch.float64, device=lists.device))


def freed(tensor):
    tensor.untyped_storage().resize_(0)
    return tensor


def test_freed_memory_is_shared_by_nothing():
    rows = [[freed(torch.ones(4))], [freed(torch.ones(4))]]
    found = [_shares_memory(rows), _gradients.C.shares_memory(rows)]  # pytest cannot print freed tensors
    assert found == [False, False]


def test_freed_memory_is_no_absent_gradient():
    """Gradients with freed memory, as of parameters that are gathered and freed, raise: they are not absent ones."""
    ones, operators = torch.ones(4), torch.ops.gradsurgery
    weights, gram = (torch.ones(shape, dtype=torch.float64, device=ones.device) for shape in ([2], [2, 2]))
    calls = [
        lambda: gradsurgery.gram([[ones], [freed(torch.ones(4))]]),
        lambda: gradsurgery.gram([[ones], [freed(torch.ones(8)[4:])]]),
        lambda: gradsurgery.gram(freed(torch.ones(2, 8)[:, 4:])),
        lambda: gradsurgery.gram(freed(torch.ones(2, 4))),
        lambda: gradsurgery.gram([[ones], [freed(torch.ones(4)).requires_grad_()]]),
        lambda: gradsurgery.combine([[ones], [ones]], weights, out=[freed(torch.ones(4))]),
        lambda: operators.gram(freed(torch.ones(2, 4)), [], gram),
        lambda: operators.gram.list([ones, freed(torch.ones(4))], 2, [], gram),
        lambda: operators.combine.list([ones, ones], weights, [], False, [freed(torch.ones(4))]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"tensors must have memory, got one of shape \[.*4\] without"):
            call()
    assert torch.equal(gradsurgery.gram([[freed(torch.ones(0))], [torch.ones(0)]]), torch.zeros_like(gram))


def test_outputs_live_while_kernels_write_to_them():
    """Another thread replaces the outputs in the caller's list while kernels write to them."""
    rows = [[torch.ones(1 << 21)] for _ in range(4)]
    ended, taken = threading.Event(), itertools.count()

    def take():
        while not ended.is_set():
            out[0] = torch.empty_like(rows[0][0])
            next(taken)

    out = [torch.empty_like(rows[0][0])]
    thread = threading.Thread(target=take)
    thread.start()
    try:
        for _ in range(30):
            gradsurgery.combine(rows, torch.ones(4), out=out)
    finally:
        ended.set()
        thread.join()
    assert next(taken) > 1


def make_optimizer(parameters):
    return gradsurgery.PCGrad(torch.optim.SGD(parameters, lr=0.1))


def test_directions_take_the_place_of_gradients():
    p, head = torch.nn.Parameter(normal(1, 6)[0]), torch.nn.Parameter(normal(1, 6)[0])
    optimizer = make_optimizer([p, head])
    optimizer.collect([(p * head).sum(), (p * p).sum()])
    collected = optimizer._pending.grads
    expected = gradsurgery.aggregate([[g.clone()] for g, _ in collected])
    addresses = [g.data_ptr() for g in collected[0]]
    optimizer.combine()
    assert [g.grad.data_ptr() for g in (p, head)] == addresses
    assert torch.equal(p.grad, expected[0])
    assert torch.equal(head.grad, p.detach())


def test_layers_give_transposed_views_of_their_own():
    net = torch.nn.Linear(5, 3).to(DEVICE)
    optimizer = make_optimizer(net.parameters())
    x = normal(1, 5)[0]
    for held in (False, True):
        optimizer.zero_grad()
        optimizer.collect([net(x.float()).sum(), net(x.float()).square().sum()])
        weight = optimizer._pending.grads[0][0]
        address, base = weight.data_ptr(), weight._base if held else None
        del weight
        optimizer.combine()
        assert (net.weight.grad.data_ptr() == address) is not held
        assert net.weight.grad._base is None
    assert base is not None


@pytest.mark.skipif(DEVICE != "cpu", reason="numpy's memory is the host's")
def test_memory_of_another_library_is_left_alone():
    p = torch.nn.Parameter(torch.ones(3))
    theirs = np.full(3, 5, np.float32)
    optimizer = make_optimizer([p])
    optimizer.collect([p.sum() * 2, p.square().sum()])
    optimizer._pending.grads[0][0] = torch.from_numpy(theirs)
    optimizer.combine()
    assert (theirs == 5).all()
    assert torch.equal(p.grad, torch.full((3,), 7.0))


@pytest.mark.parametrize("held", ["hook", "list", "view", "sum"])
def test_gradients_that_somebody_holds_are_left_alone(held):
    p, q = (torch.nn.Parameter(normal(1, 6)[0]) for _ in range(2))
    x, kept = normal(1, 6)[0], []
    if held == "hook":
        p.register_hook(kept.append)
    losses = [(p * x).sum() + (q * 2 * x).sum(), (p * p * x).sum() - (3 * q * x).sum()]
    if held == "sum":  # both parameters get the very same tensor
        losses = [((p + q) * x).square().sum(), -((p + q) ** 3).sum()]
    optimizer = make_optimizer([p, q])
    optimizer.collect(losses)
    rows = [list(row) for row in optimizer._pending.grads]
    assert reads(rows) is not None
    if held == "list":
        kept += [*rows[0], *rows[1]]
    elif held == "view":
        kept += [g[1:3] for row in rows for g in row]
    before = [g.clone() for g in kept]
    expected = gradsurgery.aggregate([[g.clone() for g in row] for row in rows])
    del rows
    optimizer.combine()
    assert torch.equal(p.grad, expected[0])
    assert torch.equal(q.grad, expected[1])
    assert p.grad.data_ptr() != q.grad.data_ptr()
    for g, value in zip(kept, before, strict=True):
        assert torch.equal(g, value)
