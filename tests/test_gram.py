# SPDX-License-Identifier: MIT
"""Stage 2: G of every form, dtype and size against float64, and its promised accuracy."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import gradsurgery
from conftest import USABLE, needs_extension, on_cpu
from inputs import DTYPES, GRAM_TOLERANCE, HOSTILE, TASKS, exact_gram, hostile, normal


def assert_gram(got: torch.Tensor, rows: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that G is within the promised error of the exact one, and exactly symmetric."""
    exact = rows.double() @ rows.double().T
    norms = exact.diagonal().sqrt()
    assert got.dtype == torch.float64
    assert torch.equal(got, got.mT)
    assert ((got - exact).abs() <= GRAM_TOLERANCE[dtype] * norms[:, None] * norms).all()


@pytest.mark.interpreted(17)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("columns", [1, 17, 1003, 4099])
def test_matches_float64(backend, tasks, columns, dtype):
    rows = normal(tasks, columns, dtype)
    assert_gram(gradsurgery.gram(rows, backend=backend), rows, dtype)


@pytest.mark.interpreted(17)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_hostile_inputs(backend, tasks, case, dtype):
    rows = hostile(tasks)[case].to(dtype)
    assert_gram(gradsurgery.gram(rows, backend=backend), rows, dtype)


def test_reference_matches_compensated_sums():
    rows = normal(3, 2000) * torch.logspace(-8, 8, 2000, dtype=torch.float64)
    exact = exact_gram(rows)
    norms = exact.diagonal().sqrt()
    error = (gradsurgery.gram(rows, backend="reference") - exact).abs() / (norms[:, None] * norms)
    assert error.max() <= 1e-15


@pytest.mark.interpreted(0)
def test_constant_rows_have_no_bias(backend):
    # All rounding errors of a float32 chain would point the same way here.
    rows = torch.full((17, 1 << 18), 0.1)
    assert_gram(gradsurgery.gram(rows, backend=backend), rows, torch.float32)


@on_cpu
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_sums_of_many_parameters_have_no_bias(backend):
    if backend not in USABLE:
        pytest.skip("not there")
    # So would those of the products of 20,000 parameters: an error of 3e-13 if one sum runs through all.
    value = torch.tensor(0.1, dtype=torch.float64).sqrt()
    gradients = list(value.expand(20_000, 1).unbind())
    exact = 20_000 * Fraction(value.item()) ** 2
    error = Fraction(gradsurgery.gram([gradients], backend=backend).item()) / exact - 1
    assert abs(error) < 1e-13


@on_cpu
@on_cpu
@needs_extension
def test_columns_of_several_parts():
    # One thread sums all of these columns, in two parts; the second part has a tail.
    rows = normal(1, 120_001, torch.float64)
    assert_gram(gradsurgery.gram(rows, backend="cpu"), rows, torch.float64)


@on_cpu
@on_cpu
@needs_extension
@pytest.mark.parametrize("tasks", [16, 24, 31, 49])
@pytest.mark.parametrize("case", [*HOSTILE, "lists", "strided", "short"])
def test_bfloat16_rows_of_many_tasks(tasks, case):
    # A matrix unit, if the CPU has one, multiplies these in panels of 16 tasks; the last panel may be partly empty.
    if case in HOSTILE:
        rows = hostile(tasks)[case].bfloat16()
    else:
        rows = normal(tasks, 5 if case == "short" else 1003, torch.bfloat16)
    rows = rows[:, 3:] if case == "strided" else rows
    if case == "lists":
        rows[1::7] = 0
        got = gradsurgery.gram([[None if t % 7 == 1 else row] for t, row in enumerate(rows)], backend="cpu")
    else:
        got = gradsurgery.gram(rows, backend="cpu")
    assert_gram(got, rows, torch.bfloat16)


@on_cpu
@on_cpu
@needs_extension
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_results_elsewhere_are_kept(dtype):
    least = torch.finfo(torch.float32).smallest_normal
    gradsurgery.gram(normal(8, 1003, dtype) * 1e-20, backend="cpu")
    assert torch.full((64,), least).mul_(0.5).gt(0).all()


@pytest.mark.interpreted(17)
@pytest.mark.parametrize(
    ("tasks", "dtype"),
    [(17, torch.float32), (100, torch.float32), (17, torch.bfloat16), (100, torch.bfloat16), (17, torch.float16)],
    ids=str,
)
@pytest.mark.parametrize("ones", [slice(16), slice(0, None, 16)], ids=["at first", "in each step"])
def test_worst_rounding_of_a_float32_chain(backend, tasks, dtype, ones):
    # Added to a 1 in the same accumulator, each product of 1.01 * 2^-24 is rounded up to 2^-23, or truncated to 0.
    rows = torch.full((tasks, 512), (1.01 * 2.0**-24) ** 0.5, dtype=dtype)
    rows[:, ones] = 1
    assert_gram(gradsurgery.gram(rows, backend=backend), rows, dtype)


@pytest.mark.parametrize("tasks", [3, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_misaligned_and_strided_rows(backend, tasks, dtype):
    storage = torch.full((tasks, 1200), torch.nan, dtype=dtype)
    rows = storage[:, 3:1006]
    rows.copy_(normal(tasks, 1003))
    assert_gram(gradsurgery.gram(rows, backend=backend), rows, dtype)
    broadcast = normal(1, 50, dtype).expand(tasks, 50)
    assert_gram(gradsurgery.gram(broadcast, backend=backend), broadcast, dtype)


@pytest.mark.interpreted(0)
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tasks=st.integers(1, 20),
    columns=st.integers(0, 3000),
    offset=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    cuts=st.lists(st.integers(0, 3000), max_size=4),
)
def test_any_shape_and_segments(backend, tasks, columns, offset, dtype, cuts):
    rows = normal(tasks, columns + offset, dtype)[:, offset:]
    offsets = [0, *sorted(min(c, columns) for c in cuts), columns]
    got = gradsurgery.gram(rows, segments=offsets, backend=backend)
    assert got.shape == (len(offsets) - 1, tasks, tasks)
    for segment, (begin, end) in zip(got, pairwise(offsets), strict=True):
        assert_gram(segment, rows[:, begin:end], dtype)


def ragged_lists(tasks: int, dtype: torch.dtype) -> list[list[torch.Tensor | None]]:
    """Lists with absent entries, an empty tensor, scalars, a parameter nobody touches, and mixed dtypes."""
    shapes = [(7, 5), (), (0, 3), (33,), (4, 1, 6), (129,)]
    grads = [
        [normal(1, 200, dtype, seed=t)[0, : torch.Size(s).numel()].reshape(s) for s in shapes] for t in range(tasks)
    ]
    for t in range(tasks):
        grads[t][3] = None
        grads[t][5] = grads[t][5].double()
        if t % 2:
            grads[t][0] = None
    return grads


def flatten(grads, parameters) -> torch.Tensor:
    """Return the gradients as float64 [T, N], with zeros for absent entries."""
    rows = []
    for row in grads:
        parts = []
        for p in parameters:
            like = next((other[p] for other in grads if other[p] is not None), None)
            if like is not None:
                parts.append(torch.zeros(like.numel()) if row[p] is None else row[p].reshape(-1))
        rows.append(torch.cat([part.double() for part in parts]) if parts else torch.zeros(0, dtype=torch.float64))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 5, 12, 20])
def test_list_form(backend, tasks, dtype):
    grads = ragged_lists(tasks, dtype)
    assert_gram(gradsurgery.gram(grads, backend=backend), flatten(grads, range(6)), dtype)
    ids = [2, 0, 0, 1, 2, 0]
    got = gradsurgery.gram(grads, segments=ids, backend=backend)
    assert got.shape == (3, tasks, tasks)
    for s in range(3):
        assert_gram(got[s], flatten(grads, [p for p in range(6) if ids[p] == s]), dtype)


def test_list_form_layouts(backend):
    # The gradients of a parameter are contiguous, channels-last, transposed or broadcast, depending on the task.
    image = normal(1, 2 * 3 * 4 * 5, torch.float32).reshape(2, 3, 4, 5)
    matrix = normal(1, 30, torch.float32).reshape(5, 6)
    grads = [
        [image, matrix, image.to(memory_format=torch.channels_last)],
        [
            2 * image.to(memory_format=torch.channels_last),
            matrix.T.contiguous().T,
            image.to(memory_format=torch.channels_last),
        ],
        [image.flip(0), torch.ones(()).expand(5, 6), -image.to(memory_format=torch.channels_last)],
    ]
    assert not grads[1][0].is_contiguous()
    before = [[entry.clone() for entry in row] for row in grads]
    assert_gram(gradsurgery.gram(grads, backend=backend), flatten(grads, range(3)), torch.float32)
    assert all(torch.equal(a, b) for x, y in zip(grads, before, strict=True) for a, b in zip(x, y, strict=True))


def test_nothing_to_multiply(backend):
    assert torch.equal(gradsurgery.gram(torch.zeros(3, 0), backend=backend), torch.zeros(3, 3).double())
    assert torch.equal(gradsurgery.gram([[None], [None]], backend=backend), torch.zeros(2, 2).double())
    assert torch.equal(gradsurgery.gram([[], []], backend=backend), torch.zeros(2, 2).double())


@pytest.mark.interpreted(8)
@pytest.mark.parametrize("tasks", [2, 8, 9, 64])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_bad_value_marks_its_row_only(backend, tasks, value):
    rows = normal(tasks, 3000, torch.float32)
    rows[1, 2900] = value
    got = gradsurgery.gram(rows, backend=backend)
    bad = torch.zeros(tasks, tasks, dtype=torch.bool)
    bad[1] = bad[:, 1] = True
    assert torch.equal(~got.isfinite(), bad)


@on_cpu
@needs_extension
@pytest.mark.parametrize("tasks", [2, 8, 17, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_thread_count(tasks, dtype):
    rows = normal(tasks, 300_001, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradsurgery.gram(rows)
        torch.set_num_threads(2)
        assert torch.equal(one, gradsurgery.gram(rows))
        assert torch.equal(one, gradsurgery.gram(rows))
    finally:
        torch.set_num_threads(threads)


def test_offsets_past_32_bits(backend):
    # The row stride alone passes 2^31; the pages between the rows are never touched.
    columns = 100_003
    stride = (1 << 31) + 7
    storage = torch.empty(stride + columns, dtype=torch.bfloat16)
    rows = storage.as_strided((2, columns), (stride, 1))
    rows.copy_(normal(2, columns))
    assert_gram(gradsurgery.gram(rows, backend=backend), rows, torch.bfloat16)


@pytest.mark.parametrize("tasks", [2, 17])
def test_chunk_boundaries(tasks):
    # More columns than one slot, one chunk and one block hold, against the reference.
    rows = normal(tasks, 1_000_003, torch.float32)
    norms = rows.double().norm(dim=1)
    error = (gradsurgery.gram(rows) - gradsurgery.gram(rows, backend="reference")).abs() / (norms[:, None] * norms)
    assert error.max() <= 1e-6


def test_near_parallel_gradients_keep_their_difference(backend):
    # |a - b|^2 from G: float32 accumulation would lose it.
    a = normal(1, 100_000, torch.float32)
    b = a + 1e-3 * normal(1, 100_000, torch.float32, seed=2)
    got = gradsurgery.gram(torch.cat([a, b]), backend=backend)
    exact = (a.double() - b.double()).square().sum()
    assert abs(got[0, 0] + got[1, 1] - 2 * got[0, 1] - exact) <= 1e-8 * exact


def test_largest_task_count(backend):
    rows = normal(128 if backend == "triton" else 256, 501, torch.float32)
    assert_gram(gradsurgery.gram(rows, backend=backend), rows, torch.float32)
