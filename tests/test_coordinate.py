# SPDX-License-Identifier: MIT
"""Methods that work on the gradients coordinate by coordinate: GradDrop, trimmed mean, median."""

import pytest
import torch

import gradsurgery
from conftest import on_cpu
from gradsurgery import _gradients
from gradsurgery._gradients import parse
from gradsurgery.backends import choose, rules
from gradsurgery.combine import combine_by_rule_of
from inputs import DTYPES, UNIT_ROUNDOFF, hostile, normal
from rules import METHODS, TASKS, assert_direction, direction, make


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("method", METHODS)
def test_matches_float64(backend, tasks, dtype, method):
    for columns in (0, 1, 17, 1003):
        rows = normal(tasks, columns, dtype)
        assert_direction(direction(method, rows, backend=backend), method, rows)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("tasks", [2, 3, 17])
@pytest.mark.parametrize("method", METHODS)
def test_hostile_inputs(backend, tasks, dtype, method):
    for rows in hostile(tasks).values():
        rounded = rows.to(dtype)
        assert_direction(direction(method, rounded, backend=backend), method, rounded)


@pytest.mark.parametrize("method", METHODS)
def test_many_columns(backend, method):
    rows = normal(3, 40_001, torch.float32)
    assert_direction(direction(method, rows, backend=backend), method, rows)


@pytest.mark.parametrize("method", METHODS)
def test_large_output_past_the_cache(backend, method):
    if backend == "reference":
        pytest.skip("it has one way to write")
    rows = normal(3, 2_500_001, torch.float32)
    out = torch.full((2_500_002,), torch.nan)
    direction(method, rows, out=out[1:], backend=backend)
    # Outputs that are added to are written through the cache.
    added = torch.zeros(2_500_001)
    chosen = choose(backend, rows.device, 3)
    combine_by_rule_of(parse(rows, None), make(method, 3).rule(rows.device, 3), added, True, chosen)
    assert torch.equal(out[1:], added)
    assert torch.equal(direction(method, rows, backend=backend), added)
    assert out[0].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_misaligned_and_strided_rows(backend, dtype, method):
    storage = torch.full((9, 1200), torch.nan, dtype=dtype)
    rows = storage[:, 3:1006]
    rows.copy_(normal(9, 1003))
    assert_direction(direction(method, rows, backend=backend), method, rows)
    broadcast = normal(1, 50, dtype).expand(4, 50)
    assert_direction(direction(method, broadcast, backend=backend), method, broadcast)


@pytest.mark.parametrize("tasks", [3, 9])
@pytest.mark.parametrize("method", METHODS)
def test_all_values_of_one_sign_are_kept(backend, tasks, method):
    rows = normal(tasks, 100).abs()
    rows[:, 50:] *= -1
    got = direction(method, rows, backend=backend)
    if "graddrop" in method:
        torch.testing.assert_close(got, rows.sum(0))
    else:
        assert ((got >= rows.min(0).values) & (got <= rows.max(0).values)).all()


@pytest.mark.parametrize("method", ["trimmed_mean", "trimmed_mean, 3", "coordinate_median"])
def test_outliers_leave_nothing_behind(backend, method):
    rows = normal(8, 60, torch.float32)
    plain = rows[1:7].sort(0).values
    rows[0], rows[7] = 1e30, -1e30
    got = direction(method, rows, backend=backend)
    trimmed = {"trimmed_mean": 0, "trimmed_mean, 3": 2, "coordinate_median": 2}[method]
    torch.testing.assert_close(got, plain[trimmed : 6 - trimmed].double().mean(0).float(), rtol=1e-6, atol=1e-7)


def test_golden_values(backend):
    # From TorchJD's tests/unit/aggregation/test_values.py.
    rows = torch.tensor([[1e11, 3.0], [1.0, -1e11], [-1e10, 1e10], [2.0, 2.0]])
    assert gradsurgery.aggregate(rows, "trimmed_mean", backend=backend).tolist() == [1.5, 2.5]


@pytest.mark.parametrize("tasks", [1, 2, 3, 8])
@pytest.mark.parametrize("method", METHODS)
def test_not_finite_values_stay_in_their_coordinate(backend, tasks, method):
    for value in (torch.nan, torch.inf, -torch.inf):
        rows = normal(tasks, 60, torch.float32)
        clean = direction(method, rows, backend=backend)
        for task, column in ((0, 3), (tasks // 2, 31), (tasks - 1, 58)):
            rows[task, column] = value
        got = direction(method, rows, backend=backend)
        assert got[[3, 31, 58]].isnan().all()
        others = torch.tensor([c for c in range(60) if c not in (3, 31, 58)])
        assert torch.equal(got[others], clean[others])


SHAPES = [(3, 4), (), (5,), (0,), (2, 3, 2, 2), (77,)]


def as_lists(rows):
    """Cut the columns into parameters; each tensor has memory of its own."""
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    return [
        [part.clone().reshape(s) for part, s in zip(row[: sum(sizes)].split(sizes), SHAPES, strict=True)]
        for row in rows
    ]


def flat(tensors):
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


@pytest.mark.parametrize("extension", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_lists_are_the_flat_form_cut(backend, dtype, method, extension, monkeypatch):
    if not extension:
        monkeypatch.setattr(_gradients, "C", None)
    lists = as_lists(normal(8, 119, dtype))
    # A missing gradient counts as zero.
    for t, p in ((0, 0), (5, 0), (2, 2), (7, 5)):
        lists[t][p] = torch.zeros_like(lists[t][p])
    expected = direction(method, torch.stack([flat(row) for row in lists]), backend=backend)
    for t, p in ((0, 0), (5, 0), (2, 2), (7, 5)):
        lists[t][p] = None
    got = direction(method, lists, backend=backend)
    assert [d.shape for d in got] == [torch.Size(s) for s in SHAPES]
    assert torch.equal(flat(got), expected)
    cut = direction(method, lists, segments=[0, 1] * 3, backend=backend)
    assert torch.equal(flat(cut), expected)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_without_gradients_have_no_coordinates(backend, method):
    lists = as_lists(normal(3, 119, torch.float32))
    expected = direction(method, lists, backend=backend)
    got = direction(method, [[None, *row[:3], None, *row[3:]] for row in lists], backend=backend)
    assert got.pop(4) is got.pop(0) is None
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert direction(method, [[None], [None]], backend=backend) == [None]
    assert direction(method, [[], []], backend=backend) == []


@pytest.mark.parametrize("method", METHODS)
def test_mixed_dtypes_and_memory_formats(backend, method):
    rows = [
        [part.to(d) for part, d in zip(row, [*DTYPES, *DTYPES[:2]], strict=True)] for row in as_lists(normal(4, 119))
    ]
    for row in rows:
        row[4] = row[4].to(memory_format=torch.channels_last)
    got, expected = (direction(method, rows, backend=b) for b in (backend, "reference"))
    for a, b in zip(got, expected, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=2 * UNIT_ROUNDOFF[a.dtype], atol=1e-15)
    # Outputs whose memory layout is not that of the gradients.
    out = [torch.full(d.shape, torch.nan, dtype=d.dtype) for d in got]
    gradsurgery.aggregate(rows, make(method, 4), out=out, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, out, strict=True))


@pytest.mark.parametrize("form", ["flat", "list", "operator"])
@pytest.mark.parametrize("method", METHODS)
def test_out_may_be_added_to_and_be_one_of_the_gradients(backend, method, form, monkeypatch):
    if form == "operator":
        monkeypatch.setattr(_gradients, "C", None)
    rows = normal(5, 3001, torch.float32)
    chosen = choose(backend, rows.device, 5)
    for accumulate in (False, True):
        copy = rows.clone()
        grads = parse(copy if form == "flat" else [[row] for row in copy], None)
        out = copy[2] if form == "flat" else [copy[2]]
        combine_by_rule_of(grads, make(method, 5).rule(rows.device, 5), out, accumulate, chosen)
        assert_direction(copy[2], method, rows, rows[2].double() if accumulate else 0)
        assert torch.equal(copy[[0, 1, 3, 4]], rows[[0, 1, 3, 4]])


@on_cpu
@pytest.mark.parametrize("columns", [20_001, 300_001])
@pytest.mark.parametrize("method", METHODS)
def test_same_bits_for_any_thread_count(method, columns):
    rows = normal(5, columns, torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = direction(method, rows)
        torch.set_num_threads(2)
        assert torch.equal(one, direction(method, rows))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["normal", "conflicting", "zero row", "mixed scales"])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_torchjd(backend, tasks, case):
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = hostile(tasks)[case]
    for trimmed in range((tasks + 1) // 2):
        ours = gradsurgery.aggregate(rows, "trimmed_mean", num_trimmed=trimmed, backend=backend)
        torch.testing.assert_close(ours, aggregation.TrimmedMean(trimmed)(rows))


def test_exchanges_sort():
    # It suffices that they sort zeros and ones (Knuth, section 5.3.4).
    for count in range(1, 13):
        values = torch.arange(2**count)[None] >> torch.arange(count)[:, None] & 1
        for low, high in rules._exchanges(count):
            values[[low, high]] = values[[low, high]].sort(0).values
        assert torch.equal(values, values.sort(0).values)
    for count in (40, 100, 257):
        values = normal(count, 50).to("cpu")
        rows = list(values.unbind())
        for low, high in rules._exchanges(count):
            rows[low], rows[high] = torch.minimum(rows[low], rows[high]), torch.maximum(rows[low], rows[high])
        assert torch.equal(torch.stack(rows), values.sort(0).values)


def test_median_is_the_middle(backend):
    for tasks in (1, 3, 7, 31):
        rows = normal(tasks, 90, torch.float32)
        assert torch.equal(gradsurgery.aggregate(rows, "coordinate_median", backend=backend), rows.median(0).values)


def test_results_are_constants(backend):
    rows = normal(3, 10).requires_grad_()
    with pytest.raises(RuntimeError, match="aggregate"):
        gradsurgery.aggregate(rows, "coordinate_median", backend=backend).sum().backward()


@pytest.mark.parametrize("method", METHODS)
def test_there_are_no_weights(method):
    with pytest.raises(ValueError, match=r"has no weights.* use gradsurgery.aggregate or SurgeryOptimizer"):
        make(method, 3).weights(torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("name", ["db_mtl", "excess_mtl", "m_config", "moco"])
def test_kept_gradients_have_no_weights_of_a_gram_matrix(name):
    method = gradsurgery.methods.get(name)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"method '{name}' weighs gradients that it keeps: use gradsurgery"):
            method.weights(torch.eye(3, dtype=torch.float64), losses=torch.ones(3))
        gradsurgery.aggregate(normal(3, 5), method, losses=torch.ones(3))


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("graddrop", {"leak": [0.5, 1.1]}, r"leak must be T numbers in \[0, 1\]"),
        ("graddrop", {"leak": [-0.1, 0.5]}, r"leak must be T numbers in \[0, 1\]"),
        ("graddrop", {"leak": [0.5, float("nan")]}, r"leak must be T numbers in \[0, 1\]"),
        ("graddrop", {"leak": [0.5] * 4}, "leak must hold one number for each of 3 tasks, got 4"),
        ("graddrop", {"seed": -1}, "seed must be an int in"),
        ("trimmed_mean", {"num_trimmed": -1}, "num_trimmed must be an int >= 0"),
        ("trimmed_mean", {"num_trimmed": 1.0}, "num_trimmed must be an int >= 0"),
    ],
)
def test_errors(method, options, message):
    with pytest.raises(ValueError, match=message):
        gradsurgery.aggregate(normal(3, 10), method, **options)
