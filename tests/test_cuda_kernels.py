# SPDX-License-Identifier: MIT
"""The CUDA kernels against float64 on the device: shapes, alignments, dtypes, scales, sizes past 2^31.

The tests whose names contain ``sanitize`` reach every kernel at sizes small enough for compute-sanitizer.
"""

from functools import partial
from itertools import accumulate, cycle, islice, pairwise

import pytest
import torch

import gradsurgery
from conftest import needs_a_gpu
from gradsurgery.methods._solver import SolverMethod
from inputs import DTYPES, GRAM_TOLERANCE
from test_combine import assert_direction
from test_gram import assert_gram

needs_a_gpu()
pytestmark = [pytest.mark.usefixtures("no_default_device", "nan_in_free_memory")]

OPS = torch.ops.gradsurgery
TASKS = [1, 2, 3, 5, 6, 7, 8, 9, 12, 16, 24, 32, 33, 48, 64, 65, 128, 256]
SIZES = [0, 1, 7, 64, 129, 1000, 4096, 5]


@pytest.fixture
def nan_in_free_memory():
    """Put NaN into freed memory, which workspaces and outputs reuse: a read before the write then shows."""
    blocks = [torch.full((1 << k,), torch.nan, dtype=torch.float64, device="cuda") for k in range(6, 22)]
    del blocks


def gradients(tasks, columns, dtype=torch.float32, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(tasks, columns, generator=generator, device="cuda", dtype=torch.float64).to(dtype)


def nans(*shape, dtype=torch.float64):
    return torch.full(shape, torch.nan, dtype=dtype, device="cuda")


def laid_out(rows, offset, alignment):
    """Return the rows copied to an offset, a multiple of ``alignment`` elements apart, with NaN around them."""
    tasks, columns = rows.shape
    stride = -(-(columns + offset + 1) // alignment) * alignment
    storage = nans(tasks, stride, dtype=rows.dtype)
    storage[:, offset : offset + columns] = rows
    return storage[:, offset : offset + columns]


# Residues of the rows' addresses modulo 16 bytes: all 0; all the same, but not 0; different ones.
LAYOUTS = {"aligned": (0, 64), "misaligned": (3, 64), "different residues": (1, 1)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 17, 1003, 100_003])
@pytest.mark.parametrize("tasks", TASKS)
def test_flat_form(tasks, columns, dtype, layout):
    rows = laid_out(gradients(tasks, columns, dtype), *LAYOUTS[layout])
    products = nans(tasks, tasks)
    OPS.gram(rows, [], products)
    assert_gram(products, rows, dtype)
    weights = gradients(1, tasks, torch.float64, seed=2)[0]
    weights[tasks // 3] = 0
    out = laid_out(nans(1, columns, dtype=dtype), *LAYOUTS[layout])[0]
    gradsurgery.combine(rows, weights, out=out, backend="cuda")
    assert_direction(out, rows, weights)
    before = out.to(torch.float64, copy=True)
    gradsurgery.combine(rows, weights, out=out, accumulate=True, backend="cuda")
    assert_direction(out, rows, weights, before)


def cut(rows, sizes, dtypes, absent=lambda t, p: False):
    """Return T lists of tensors of these sizes and dtypes, some absent, and each size's values, float64 [T, size]."""
    lists, parts = [], []
    for p, ((begin, end), dtype) in enumerate(zip(pairwise(accumulate(sizes, initial=0)), cycle(dtypes))):
        # With alignment 1, the residues of the rows differ.
        part = laid_out(rows[:, begin:end].to(dtype), p % 3, 1)
        entries = [None if absent(t, p) else row for t, row in enumerate(part)]
        lists.append(entries)
        parts.append(torch.stack([torch.zeros_like(part[0]) if e is None else e for e in entries]).double())
    return [list(row) for row in zip(*lists, strict=True)], parts


def check_lists(tasks, sizes, dtypes, segments, absent):
    rows = gradients(tasks, sum(sizes), torch.float64)
    grads, parts = cut(rows, sizes, dtypes, absent)
    coarsest = max(dtypes, key=lambda dtype: GRAM_TOLERANCE[dtype])
    products = nans(max(segments) + 1, tasks, tasks)
    OPS.gram([entry for row in grads for entry in row], tasks, segments, products)
    for s, got in enumerate(products):
        own = [part for part, segment in zip(parts, segments, strict=True) if segment == s]
        assert_gram(got, torch.cat(own, 1) if own else rows[:, :0], coarsest)
    weights = gradients(max(segments) + 1, tasks, torch.float64, seed=2)
    present = [[t for t in range(tasks) if grads[t][p] is not None] for p in range(len(sizes))]
    out = [nans(size, dtype=dtype) if some else None for size, dtype, some in zip(sizes, cycle(dtypes), present)]
    gradsurgery.combine(grads, weights, segments=segments, out=out, backend="cuda")
    weights = weights.cpu()  # checked there: hundreds of small tensors take a GPU too long
    for p, (part, got) in enumerate(zip(parts, out, strict=True)):
        if got is not None:
            assert_direction(got.cpu(), part.cpu()[present[p]].to(got.dtype), weights[segments[p], present[p]])


MIXED = {**{str(dtype): [dtype] for dtype in DTYPES}, "alternating": list(DTYPES)}


@pytest.mark.parametrize("dtypes", MIXED)
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9, 17, 33, 65, 256])
def test_list_form(tasks, dtypes):
    # Parameter 4 has no gradient, and segment 1 has no parameter.
    check_lists(tasks, SIZES, MIXED[dtypes], [0, 2, 0, 3, 2, 2, 0, 3], lambda t, p: p == 4 or (t and (t + p) % 3 == 2))


@pytest.mark.parametrize("dtypes", ["torch.float32", "alternating"])
@pytest.mark.parametrize("tasks", [2, 9, 33])
def test_more_parameters_than_one_launch_takes(tasks, dtypes):
    sizes = list(islice(cycle([3, 4, 5, 6, 7]), 1500))
    check_lists(tasks, sizes, MIXED[dtypes], [p // 700 for p in range(1500)], lambda t, p: t and (t + p) % 5 == 0)


@pytest.mark.parametrize("tasks", [2, 8, 9, 33])
def test_segments_of_the_flat_form(tasks):
    rows, offsets = gradients(tasks, 5003), [0, 13, 13, 100, 5003]
    products, weights = gradsurgery.gram(rows, segments=offsets), gradients(4, tasks, seed=2)
    direction = gradsurgery.combine(rows, weights, segments=offsets)
    for s, (begin, end) in enumerate(pairwise(offsets)):
        assert_gram(products[s], rows[:, begin:end], torch.float32)
        assert_direction(direction[begin:end], rows[:, begin:end], weights[s])


@pytest.mark.parametrize("bad", [1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tasks", [5, 8, 9, 17, 33, 64])
def test_rows_of_every_scale(tasks, dtype, bad):
    """Each row keeps its own relative accuracy beside tiny, huge and zero rows and one that ends in NaN or Inf."""
    rows = gradients(tasks, 20_011, dtype)
    for row, scale in enumerate([1e-20, 1e20, 0]):
        rows[row] *= scale
    rows[3, -1] = bad
    products = gradsurgery.gram(rows)
    kept = torch.tensor([t for t in range(tasks) if t != 3 or bad == 1], device="cuda")
    assert_gram(products[kept][:, kept], rows[kept], dtype)
    assert products[3].isfinite().any() == (bad == 1)
    for scale in (1e-20, 1e20):
        scaled = gradients(tasks, 20_011, dtype) * scale
        assert_gram(gradsurgery.gram(scaled), scaled, dtype)


@pytest.mark.parametrize("tasks", [2, 8, 9, 16, 33, 64, 128])
def test_repeats_give_the_same_bits(tasks):
    rows = gradients(tasks, 200_003)
    weights = gradients(1, tasks, seed=2)[0]
    lists = [list(row.split([70_001, 60_001, 70_001])) for row in rows]
    for grads in (rows, lists):
        first = gradsurgery.gram(grads)
        assert all(torch.equal(first, gradsurgery.gram(grads)) for _ in range(20))
        assert_gram(first, rows, torch.float32)
    directions = [lambda: gradsurgery.combine(rows, weights), lambda: torch.cat(gradsurgery.combine(lists, weights))]
    for direction in directions:
        first = direction()
        assert all(torch.equal(first, direction()) for _ in range(20))
        assert_direction(first, rows, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_weights_and_aliases(dtype):
    rows, weights = gradients(9, 70_001, dtype), gradients(1, 9, seed=2)[0]
    weights[::3] = 0
    used, poisoned = weights != 0, rows.clone()
    poisoned[::3] = torch.nan
    expected = gradsurgery.combine(rows, weights)
    assert_direction(expected, rows[used], weights[used])
    assert torch.equal(expected, gradsurgery.combine(poisoned, weights))
    for row in (0, 4, 8):  # the first has weight 0, the others do not
        copy = rows.clone()
        gradsurgery.combine(copy, weights, out=copy[row])
        assert_direction(copy[row], rows[used], weights[used])
        lists = [list(part.clone() for part in r.split([30_000, 40_001])) for r in rows]
        gradsurgery.combine(lists, weights, out=lists[row])
        assert_direction(torch.cat(lists[row]), rows[used], weights[used])
    assert gradsurgery.combine(poisoned, torch.ones_like(weights)).isnan().all()


# Rows of one sign: nothing cancels, so a bias of the accumulation shows.
@pytest.mark.parametrize(
    ("tasks", "columns", "dtype"),
    [
        (8, 20_000_000, torch.float32),
        (8, 20_000_000, torch.bfloat16),
        (33, 5_000_000, torch.float32),
        (2, 1_000_000_000, torch.bfloat16),
        (3, 800_000_000, torch.bfloat16),  # T N > 2^31
    ],
)
def test_accuracy_at_size(tasks, columns, dtype):
    needed = (tasks + 1) * columns * dtype.itemsize + (3 << 30)
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    generator = torch.Generator("cuda").manual_seed(1)
    rows = torch.empty(tasks, columns, dtype=dtype, device="cuda").uniform_(0.5, 1.5, generator=generator)
    rows[1] *= -1
    exact = torch.zeros(tasks, tasks, dtype=torch.float64, device="cuda")
    for block in rows.split(1 << 21, 1):
        wide = block.double()
        exact += wide @ wide.T
    norms = exact.diagonal().sqrt()
    error = (gradsurgery.gram(rows, backend="cuda") - exact).abs() / (norms[:, None] * norms)
    assert error.max() <= GRAM_TOLERANCE[dtype]
    weights = gradients(1, tasks, seed=2)[0]
    direction = gradsurgery.combine(rows, weights, backend="cuda")
    for block, part in zip(rows.split(1 << 22, 1), direction.split(1 << 22), strict=True):
        assert_direction(part, block, weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 8, 9, 17, 33, 65])
def test_sanitize_streaming_kernels(tasks, dtype):
    # The rows of the last case have different residues, and are long enough for whole steps of the kernels.
    for offset, columns in ((0, 128), (1, 1), (3, 731)):
        rows, weights = laid_out(gradients(tasks, columns, dtype), offset, 1), gradients(1, tasks, seed=2)[0]
        assert_gram(gradsurgery.gram(rows), rows, dtype)
        assert_direction(gradsurgery.combine(rows, weights), rows, weights)
    check_lists(tasks, [5, 1, 33], [dtype, torch.float32], [0, 1, 0], lambda t, p: t and (t + p) % 3 == 2)


@pytest.mark.parametrize("tasks", [1, 3, 6, 8, 17, 64])
def test_sanitize_solvers(tasks):
    rows = gradients(tasks, 40, torch.float64)
    products, step = gradsurgery.gram(rows - 2 * rows.mean(0)), torch.tensor(3, device="cuda")
    host = products.cpu()
    torch.testing.assert_close(
        gradsurgery.task_order(tasks, seed=1, step=step).cpu(), gradsurgery.task_order(tasks, seed=1, step=3)
    )
    for order in (None, gradsurgery.task_order(tasks, seed=2, step=step)):
        got = gradsurgery.pcgrad_weights(products, order=order, seed=1, step=step)
        expected = gradsurgery.pcgrad_weights(host, order=None if order is None else order.cpu(), seed=1, step=3)
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-9, atol=1e-9)
    for solver in ("exact", "frank_wolfe"):
        got = gradsurgery.min_norm_weights(products, solver=solver, max_iter=20).cpu()
        expected = gradsurgery.min_norm_weights(host, solver=solver, max_iter=20)
        assert abs(got @ host @ got - expected @ host @ expected) <= 1e-9 * host.diagonal().max()
    losses = torch.linspace(1, 2, tasks, dtype=torch.float64)
    theirs, ours = gradsurgery.methods.GradNorm(), gradsurgery.methods.GradNorm()
    for _ in range(2):
        got = ours.weights(products, losses=losses.cuda()).cpu()
        torch.testing.assert_close(got, theirs.weights(host, losses=losses))
    got = gradsurgery.gradnorm_update(*[losses.cuda()] * 4).cpu()
    torch.testing.assert_close(got, gradsurgery.gradnorm_update(*[losses] * 4))
    for name in gradsurgery.methods.available():
        solver = gradsurgery.methods.get(name)
        if isinstance(solver, SolverMethod):
            got, expected = solver.weights(products).cpu(), solver.weights(host)
            off = got - expected
            assert (off @ host @ off).clamp(min=0).sqrt() <= 1e-6 * (expected @ host @ expected).clamp(min=1e-12).sqrt()
    theirs, ours = (gradsurgery.methods.GradVac(beta=0.5, seed=3) for _ in range(2))
    for _ in range(2):
        torch.testing.assert_close(ours.weights(products).cpu(), theirs.weights(host), rtol=1e-9, atol=1e-9)
    for make in (gradsurgery.methods.MoDo, partial(gradsurgery.methods.SDMGrad, lr=0.01), gradsurgery.methods.Random):
        theirs, ours = make(), make()
        for _ in range(2):
            torch.testing.assert_close(ours.weights(products).cpu(), theirs.weights(host), rtol=1e-9, atol=1e-9)
    method, one = gradsurgery.methods.PCGrad(), gradsurgery.pcgrad_weights(products)
    assert torch.equal(method.weights(products.expand(3, tasks, tasks)), one.expand(3, tasks))
    method.weights(products)
    assert method.state_dict()["step"] == 2


@pytest.mark.parametrize("batch", [1, 5, 200])
@pytest.mark.parametrize("tasks", [16, 17, 40, 100, 256])
def test_sanitize_pcgrad_by_one_and_several_blocks(tasks, batch):
    rows = gradients(batch * tasks, 40, torch.float64).view(batch, tasks, 40)
    rows -= rows.mean(1, keepdim=True)
    products = rows @ rows.mT
    got = gradsurgery.pcgrad_weights(products, seed=1, step=3)
    expected = gradsurgery.pcgrad_weights(products.cpu(), seed=1, step=3)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-8, atol=1e-8)


def kernels_of(call):
    """Return the names of gradsurgery's kernels that a call launches."""
    activity = torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return [event.name for event in profile.events() if "gs3gpu" in event.name or "gs::gpu" in event.name]


@pytest.mark.parametrize("form", ["flat", "list"])
@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 1000, 40_003, 300_000])
@pytest.mark.parametrize("tasks", [1, 2, 5, 8, 9, 16])
def test_aggregate_in_one_launch(tasks, columns, dtype, method, form):
    rows = laid_out(gradients(tasks, columns, dtype), 0, 64)
    rows[-1] *= -1
    grads = (
        rows
        if form == "flat"
        else [list(row.split([columns // 3 // 8 * 8, columns - columns // 3 // 8 * 8])) for row in rows]
    )
    method = gradsurgery.methods.get(method)
    got = gradsurgery.aggregate(grads, method)
    got = got if form == "flat" else torch.cat(got)
    exact = rows.double() @ rows.double().T
    solve = {"pcgrad": gradsurgery.pcgrad_weights, "mgda": gradsurgery.min_norm_weights}[method.name]
    assert_direction(got, rows, solve(exact, backend="reference"))
    assert torch.equal(got, again(gradsurgery.aggregate(grads, gradsurgery.methods.get(method.name))))


def again(direction):
    return direction if isinstance(direction, torch.Tensor) else torch.cat(direction)


@pytest.mark.parametrize(("columns", "launches"), [(1000, 1), (300_000, 1), (3_000_000, 4)])
def test_launches_of_an_aggregate(columns, launches):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("sizes are those of compute capability 9.0")
    rows = gradients(8, columns // 4 * 4)
    gradsurgery.aggregate(rows)
    assert len(kernels_of(lambda: gradsurgery.aggregate(rows))) == launches


@pytest.mark.parametrize(("columns", "one"), [(1_000_000, True), (1_100_000, False)])
def test_16_bit_gradients_above_16_mb_take_the_stages(columns, one):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("sizes are those of compute capability 9.0")
    rows = gradients(8, columns, torch.bfloat16)
    gradsurgery.aggregate(rows)
    assert (len(kernels_of(lambda: gradsurgery.aggregate(rows))) == 1) == one


@pytest.mark.parametrize("tasks", [1, 8, 16])
@pytest.mark.parametrize("method", ["pcgrad", "mgda", "upgrad"])
@pytest.mark.parametrize("columns", [300, 60_000])
def test_sanitize_aggregate(tasks, method, columns):
    rows = gradients(tasks, columns)
    rows[-1] *= -1
    weights = gradsurgery.methods.get(method).weights(gradsurgery.gram(rows))
    assert_direction(gradsurgery.aggregate(rows, method), rows, weights)
