# SPDX-License-Identifier: MIT
"""Stage 4: directions of every form, dtype and size against float64, and where they are written."""

import pytest
import torch

import gradsurgery
from conftest import on_cpu
from gradsurgery import methods
from inputs import DTYPES, HOSTILE, TASKS, UNIT_ROUNDOFF, hostile, normal
from test_gram import ragged_lists


def assert_direction(got: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor, before=0) -> None:
    """Assert that the direction differs from the float64 sum by one rounding at most."""
    terms = weights.double()[:, None] * rows.double()
    exact = terms.sum(0) + before
    roundoff = UNIT_ROUNDOFF[got.dtype]
    smallest = torch.finfo(got.dtype).smallest_normal * roundoff
    # The 16-bit formats are rounded by way of float32, which may cost a little more than half a unit.
    tolerance = (1 + 1e-3) * roundoff * exact.abs() + 1e-14 * terms.abs().sum(0) + 2 * smallest
    assert got.dtype == rows.dtype
    assert ((got.double() - exact).abs() <= tolerance).all()


@pytest.mark.interpreted(17)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("columns", [0, 1, 17, 1003, 40_001])
def test_matches_float64(backend, tasks, columns, dtype):
    rows, weights = normal(tasks, columns, dtype), normal(1, tasks)[0]
    assert_direction(gradsurgery.combine(rows, weights, backend=backend), rows, weights)


@pytest.mark.interpreted(17)
@pytest.mark.parametrize("tasks", [1, 3, 17])
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_hostile_inputs(backend, tasks, case, dtype):
    rows, weights = hostile(tasks)[case].to(dtype), normal(1, tasks)[0]
    assert_direction(gradsurgery.combine(rows, weights, backend=backend), rows, weights)


def test_out_may_be_a_tuple(backend):
    rows, weights = normal(3, 24, torch.float32), torch.tensor([1.0, -2.0, 0.5])
    out = torch.full((8,), torch.nan), torch.full((16,), torch.nan)
    lists = [[row[:8], row[8:]] for row in rows]
    assert gradsurgery.combine(lists, weights, out=out, backend=backend) is out
    assert_direction(torch.cat(out), rows, weights)


def test_out_is_overwritten_or_added_to(backend):
    rows, weights = normal(3, 101, torch.float32), torch.tensor([1.0, -2.0, 0.5])
    out = torch.full((101,), torch.nan)
    assert gradsurgery.combine(rows, weights, out=out, backend=backend) is out
    assert_direction(out, rows, weights)
    before = out.double()
    gradsurgery.combine(rows, weights, out=out, accumulate=True, backend=backend)
    assert_direction(out, rows, weights, before)


@pytest.mark.parametrize("method", ["mgda", "graddrop"])
def test_a_direction_may_take_the_place_of_a_gradient(method, backend):
    rows = normal(3, 1003, torch.float32)
    expected = gradsurgery.aggregate(rows, method, backend=backend)
    for place in range(3):
        matrix, lists = rows.clone(), [[row.clone()] for row in rows]
        gradsurgery.aggregate(matrix, method, out=matrix[place], backend=backend)
        gradsurgery.aggregate(lists, method, out=lists[place], backend=backend)
        assert torch.equal(matrix[place], expected)
        assert torch.equal(lists[place][0], expected)


def test_negated_views(backend):
    rows, weights = normal(3, 101, torch.float32), torch.tensor([1.0, -2.0, 0.5])
    negated = torch._neg_view(rows)
    assert_direction(gradsurgery.combine(negated, weights, backend=backend), -rows, weights)
    lists = [[rows[0]], [torch._neg_view(rows[1])], [None]]
    (found,) = gradsurgery.combine(lists, torch._neg_view(weights), backend=backend)
    assert_direction(found, torch.stack([rows[0], -rows[1]]), -weights[:2])
    for grads, out in ((rows, negated[0]), (lists, [negated[0]])):
        with pytest.raises(TypeError, match=r"out.* must not be a negated view"):
            gradsurgery.combine(grads, weights, out=out, backend=backend)


@pytest.mark.parametrize("name", ["sum", "pcgrad", "mgda", "upgrad", "graddrop", "trimmed_mean"])
def test_autograd_is_told_of_what_is_written(name, backend):
    rows = normal(3, 8, torch.float32)
    out, factor = torch.zeros(8), torch.ones(8, requires_grad=True)
    for grads, target in ((rows, out), ([[row] for row in rows], [out])):
        product = (factor * out).sum()
        gradsurgery.aggregate(grads, name, out=target, backend=backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_targets_that_autograd_does_not_allow(backend):
    rows, weights = normal(3, 8, torch.float32), torch.ones(3)
    with torch.inference_mode():
        inferred = torch.zeros(8)
        gradsurgery.combine(rows, weights, out=inferred, backend=backend)
    for out, message in ((torch.zeros(8).requires_grad_(), "out.* must not require grad"), (inferred, "inference")):
        before = out.detach().clone()
        for grads, target in ((rows, out), ([[row] for row in rows], [out])):
            with pytest.raises(ValueError, match=message):
                gradsurgery.combine(grads, weights, out=target, backend=backend)
        assert torch.equal(out, before)
    leaf = torch.zeros(8).requires_grad_()
    with torch.no_grad():
        gradsurgery.combine(rows, weights, out=leaf, backend=backend)
    torch.testing.assert_close(leaf.detach(), inferred)


def test_out_that_overlaps_a_gradient_in_part(backend):
    flat = normal(1, 40, torch.float32)[0]
    rows, weights, method = flat[8:32].view(3, 8), torch.ones(3), methods.get("pcgrad")
    lists = [[row] for row in rows]
    before = flat.clone()
    for begin in (1, 7, 9, 15, 25, 31):
        for grads, out in ((rows, flat[begin : begin + 8]), (lists, [flat[begin : begin + 8]])):
            with pytest.raises(ValueError, match="must be one of its gradients or apart from them"):
                gradsurgery.combine(grads, weights, out=out, backend=backend)
            with pytest.raises(ValueError, match="must be one of its gradients or apart from them"):
                gradsurgery.aggregate(grads, method, out=out, backend=backend)
    assert torch.equal(flat, before)
    assert method.state_dict()["step"] == 0
    expected = gradsurgery.combine(rows.clone(), weights, backend=backend)
    for begin in (0, 32, 16):
        flat.copy_(before)
        gradsurgery.combine(lists, weights, out=[flat[begin : begin + 8]], backend=backend)
        assert torch.equal(flat[begin : begin + 8], expected)


@pytest.mark.interpreted(0)
def test_large_output_past_the_cache(backend):
    # The compiled backend's writes bypass the cache if outputs exceed 8 MB.
    rows, weights = normal(2, 3_000_001, torch.float32), torch.tensor([0.3, 0.7])
    out = torch.full((3_000_002,), torch.nan)
    gradsurgery.combine(rows, weights, out=out[1:], backend=backend)
    assert_direction(out[1:], rows, weights)
    assert out[0].isnan()
    assert_direction(gradsurgery.combine(rows, weights, backend=backend), rows, weights)


def test_zero_weight_is_not_read(backend):
    rows = normal(3, 50, torch.float32)
    rows[1] = torch.nan
    weights = torch.tensor([2.0, 0.0, -1.0])
    assert_direction(gradsurgery.combine(rows, weights, backend=backend), rows[[0, 2]], weights[[0, 2]])
    assert gradsurgery.combine(rows, torch.ones(3), backend=backend).isnan().all()
    assert gradsurgery.combine(normal(3, 50), torch.full((3,), torch.nan), backend=backend).isnan().all()


def test_segments_of_the_flat_form(backend):
    rows, weights = normal(4, 100, torch.float32), normal(3, 4)
    got = gradsurgery.combine(rows, weights, segments=[0, 13, 13, 100], backend=backend)
    assert_direction(got[:13], rows[:, :13], weights[0])
    assert_direction(got[13:], rows[:, 13:], weights[2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_list_form(backend, tasks, dtype):
    grads, ids, weights = ragged_lists(tasks, dtype), [2, 0, 0, 1, 2, 0], normal(3, tasks)
    got = gradsurgery.combine(grads, weights, segments=ids, backend=backend)
    assert got[3] is None
    for p in (0, 1, 2, 4, 5):
        present = [t for t in range(tasks) if grads[t][p] is not None]
        rows = torch.stack([grads[t][p].reshape(-1) for t in present])
        assert got[p].shape == grads[present[0]][p].shape
        assert_direction(got[p].reshape(-1), rows, weights[ids[p], present])


def test_list_form_writes_into_any_layout(backend):
    image = normal(1, 120, torch.float32).reshape(2, 3, 4, 5)
    last = image.to(memory_format=torch.channels_last)
    weights = torch.tensor([1.0, 2.0])
    for grads in ([[image], [image]], [[last], [last]], [[image], [last]], [[last], [image]]):
        for out in (torch.full_like(image, torch.nan), torch.full_like(last, torch.nan)):
            layout = out.stride()
            gradsurgery.combine(grads, weights, out=[out], backend=backend)
            assert out.stride() == layout
            assert_direction(out.reshape(-1), torch.stack([image.reshape(-1)] * 2), weights)
    total = torch.ones_like(last)
    gradsurgery.combine([[image], [image]], weights, out=[total], accumulate=True, backend=backend)
    assert_direction(total.reshape(-1), torch.stack([image.reshape(-1)] * 2), weights, 1)


def test_out_may_be_one_of_the_gradients(backend):
    rows, weights = normal(9, 5000, torch.float32), normal(1, 9)[0]
    copy = rows.clone()
    gradsurgery.combine(copy, weights, out=copy[4], backend=backend)
    assert_direction(copy[4], rows, weights)


def test_nothing_to_combine(backend):
    assert gradsurgery.combine([[None], [None]], torch.ones(2), backend=backend) == [None]
    assert gradsurgery.combine([[], []], torch.ones(2), backend=backend) == []
    assert gradsurgery.combine(torch.zeros(2, 0), torch.ones(2), backend=backend).shape == (0,)


@on_cpu
@pytest.mark.parametrize("columns", [20_001, 300_001])
def test_same_bits_for_any_thread_count(columns):
    rows, weights = normal(5, columns, torch.float32), normal(1, 5)[0]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradsurgery.combine(rows, weights)
        torch.set_num_threads(2)
        assert torch.equal(one, gradsurgery.combine(rows, weights))
    finally:
        torch.set_num_threads(threads)


def test_backends_agree_to_the_last_bit_but_one(backend):
    rows, weights = normal(6, 10_001, torch.float32), normal(1, 6)[0]
    fast, slow = (
        gradsurgery.combine(rows, weights, backend=backend),
        gradsurgery.combine(rows, weights, backend="reference"),
    )
    assert ((fast - slow).abs() <= 2.0**-23 * slow.abs()).all()
