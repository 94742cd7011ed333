# SPDX-License-Identifier: MIT
"""What only the Triton backend has: its kinds of arithmetic, its slots (a program's columns), its launch parameters."""

from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gradsurgery
from conftest import USABLE, WHOLE
from gradsurgery import methods
from gradsurgery._gradients import parse
from gradsurgery.backends import choose
from inputs import DEVICE, DTYPES, normal
from test_gram import assert_gram, flatten

pytestmark = pytest.mark.skipif("triton" not in USABLE, reason=gradsurgery.backends()["triton"])

if "triton" in USABLE:
    from gradsurgery.backends.triton import launch, table, tuning, weights


@pytest.fixture(params=[True, False], ids=["fast float64", "slow float64"])
def fast(request, monkeypatch):
    """GPUs with fast and with slow float64, which compute products in different arithmetic."""
    monkeypatch.setattr(launch, "fast_float64", lambda device: request.param)
    return request.param


@pytest.mark.parametrize(
    ("dtype", "tasks", "expected"),
    [
        (torch.float32, 8, ("rows", 8)),
        (torch.float32, 9, ("float64", 16)),
        (torch.float32, 17, ("float64", 32)),
        (torch.bfloat16, 8, ("rows", 8)),
        (torch.bfloat16, 9, ("float32", 16)),
        (torch.float64, 8, ("rows", 8)),
        (torch.float64, 65, ("float64", 128)),
    ],
    ids=str,
)
def test_arithmetics(monkeypatch, dtype, tasks, expected):
    monkeypatch.setattr(launch, "fast_float64", lambda device: True)
    assert launch.arithmetic_of(dtype, tasks, torch.device(DEVICE)) == expected
    monkeypatch.setattr(launch, "fast_float64", lambda device: False)
    slow = expected if dtype is torch.float64 else ("float32", max(16, expected[1]))
    assert launch.arithmetic_of(dtype, tasks, torch.device(DEVICE)) == slow


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [3, 12, 20, 40, 70])
def test_every_arithmetic(fast, tasks, dtype):
    stand_for_it = (torch.float32, torch.bfloat16) if WHOLE else (torch.float32,)
    if (tasks == 40 and not WHOLE) or (tasks == 70 and (not fast or dtype not in stand_for_it)):
        pytest.skip("slow to interpret, and others stand for it")
    rows = normal(tasks, max(34, 1000 // tasks), dtype)
    assert_gram(gradsurgery.gram(rows, backend="triton"), rows, dtype)
    if dtype in (torch.float32, torch.bfloat16):  # rows that are not aligned
        assert_gram(gradsurgery.gram(rows[:, 1:], backend="triton"), rows[:, 1:], dtype)


@pytest.mark.parametrize("tasks", [2, 17])
def test_pcgrad_by_several_programs(monkeypatch, tasks):
    rows = normal(tasks, 30)
    gram = rows @ rows.T
    expected = gradsurgery.pcgrad_weights(gram, seed=1, step=2, reduction="mean", backend="reference")
    order = gradsurgery.task_order(tasks, seed=1, step=torch.tensor(2), backend="reference")
    monkeypatch.setattr(weights, "_tile", lambda num_tasks: (weights.triton.next_power_of_2(num_tasks), 2, 1))
    got = gradsurgery.pcgrad_weights(gram.expand(3, tasks, tasks), seed=1, step=2, reduction="mean", backend="triton")
    torch.testing.assert_close(got, expected.expand(3, tasks))
    assert torch.equal(gradsurgery.task_order(tasks, seed=1, step=torch.tensor(2), backend="triton"), order)


def test_an_order_that_is_none_reads_no_memory_of_others():
    memory = torch.full((64,), torch.nan, dtype=torch.float64)
    gram = memory[20:29].view(1, 3, 3).copy_(torch.eye(3))
    order = torch.tensor([[3, 1, 2], [0, 1 << 33, 2], [0, 1, -2]])
    out = torch.empty(1, 3, dtype=torch.float64)
    choose("triton", gram.device, 3).pcgrad(gram, order, 0, torch.tensor(0), False, False, out)
    assert out.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(("kilobytes", "most"), [(64, 64), (100, 64), (164, 128), (228, 128)])
def test_rotations_that_shared_memory_has_no_room_for_are_pytorchs(monkeypatch, kilobytes, most):
    properties = SimpleNamespace(shared_memory_per_multiprocessor=kilobytes * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = torch.device("cuda")
    for tasks in (2, 64, 65, 128):
        assert weights.serves("config", tasks, gpu) == (tasks <= most)
        assert weights.serves("upgrad", tasks, gpu)
        assert not weights.serves("krum", tasks, gpu)


@pytest.mark.parametrize("tasks", [9, 20, 70])
def test_float64_without_matrix_instructions(monkeypatch, tasks):
    monkeypatch.setattr(launch, "float64_dot", lambda device: False)
    rows = normal(tasks, 21)
    assert_gram(gradsurgery.gram(rows, backend="triton"), rows, torch.float64)
    assert launch.arithmetic_of(torch.float32, 9, torch.device(DEVICE)) == ("float32", 16)


@pytest.mark.parametrize(
    ("tasks", "exponents", "dtype"),
    [
        *product([3, 20], [(-20, -20), (18, 18), (-20, 18), (-30, -30)], [torch.float32, torch.bfloat16]),
        (70, (-20, 18), torch.float32),
        pytest.param(70, (-20, 18), torch.bfloat16, marks=pytest.mark.interpreted_whole),
    ],
    ids=str,
)
def test_rows_out_of_the_range_of_float32_products(monkeypatch, tasks, dtype, exponents):
    monkeypatch.setattr(launch, "fast_float64", lambda device: False)
    scale = torch.logspace(*exponents, tasks, dtype=torch.float64)[:, None]
    rows = (normal(tasks, 33) * scale).to(dtype)
    rows[1] = 0
    assert_gram(gradsurgery.gram(rows, backend="triton"), rows, dtype)
    rows[2, 30] = torch.inf
    got = gradsurgery.gram(rows, backend="triton")
    bad = torch.zeros(tasks, tasks, dtype=torch.bool)
    bad[2] = bad[:, 2] = True
    assert torch.equal(~got.isfinite(), bad)


def test_only_slots_out_of_range_are_taken_again():
    from gradsurgery.backends.triton import products

    rows = torch.zeros(3, 16)
    rows[0, 3], rows[1, 4], rows[2, 5] = 2.0**-34, -(2.0**54), 1.0
    for dtype in (torch.float32, torch.bfloat16):
        fits = torch.zeros(2, dtype=torch.int32)
        outside = rows.clone()
        outside[0, 3] = 2.0**-36
        for k, values in enumerate((rows, outside)):
            padded = torch.zeros(16, 16, dtype=dtype)
            padded[:3] = values.to(dtype)
            _fits_of[(1,)](fits[k:], padded, products.fits, products.raised)
        assert fits.tolist() == [1, 0]


if "triton" in USABLE:
    import triton
    import triton.language as tl

    @triton.jit
    def _fits_of(out, values, FITS: tl.constexpr, RAISED: tl.constexpr):
        i = tl.arange(0, 16)
        x = tl.load(values + i[:, None] * 16 + i[None, :])
        top = tl.zeros([16, 16], tl.int32 if x.dtype == tl.float32 else tl.int16)
        tl.store(out, FITS(RAISED(top, x)))


@pytest.mark.parametrize("tasks", [5, 20])
def test_dtypes_of_different_arithmetics_share_a_gram_matrix(fast, tasks):
    grads = [
        [normal(1, 20, dtype, seed=t)[0] * 10.0**-k for k, dtype in enumerate(DTYPES)] + [normal(1, 9, seed=t)[0]]
        for t in range(tasks)
    ]
    grads[1][0] = grads[2][1] = None
    got = gradsurgery.gram(grads, segments=[0, 1, 0, 1, 3], backend="triton")
    assert_gram(got[0], flatten(grads, [0, 2]), torch.float32)
    assert_gram(got[1], flatten(grads, [1, 3]), torch.float32)
    assert torch.equal(got[2], torch.zeros(tasks, tasks, dtype=torch.float64))
    assert_gram(got[3], flatten(grads, [4]), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tasks", [3, 17])
def test_segments_of_the_flat_form(fast, tasks, dtype):
    rows = normal(tasks, 200, dtype)
    offsets = [0, 0, 13, 13, 170, 200]
    got = gradsurgery.gram(rows, segments=offsets, backend="triton")
    for segment, (begin, end) in zip(got, pairwise(offsets), strict=True):
        assert_gram(segment, rows[:, begin:end], dtype)


def test_rows_are_aligned_only_if_all_of_them_are():
    rows = torch.zeros(2, 16)
    assert table.pieces_of(parse(rows, None))[0].aligned
    assert not table.pieces_of(parse(rows[:, 1:], None))[0].aligned
    assert not table.pieces_of(parse([[rows[0]], [rows[1, :-1].new_zeros(17)[1:]]], None))[0].aligned
    assert not table.pieces_of(parse(rows, None), torch.zeros(17)[1:])[0].aligned
    assert table.pieces_of(parse([[rows[0]], [None]], None))[0].aligned


def test_a_matrix_is_cut_as_a_list_of_it():
    wide, out = torch.zeros(3, 40, dtype=torch.float32), torch.zeros(33)
    for rows in (wide[:, :33], wide[:, 1:33], wide[1:, :32].contiguous(), wide[:1, :33], torch.zeros(1, 33)):
        for target in (None, out[: rows.shape[1]], out[1:] if rows.shape[1] == 32 else None):
            (flat,), (listed,) = (table.pieces_of(parse(rows, None), target, how) for how in (False, True))
            assert (flat.dtype, flat.aligned) == (listed.dtype, listed.aligned)
            for a, b in zip(table.cut(flat, 8, 3), table.cut(listed, 8, 3), strict=True):
                np.testing.assert_array_equal(a, b)
    assert table.pieces_of(parse(wide[:, :0], None), None, False) == []


def test_pieces_are_listed_once_and_anew_for_other_parameters():
    sizes, rows = [4, 0, 8, 6], [[], []]
    for size in sizes:
        rows[0].append(torch.zeros(size, dtype=torch.float64 if size == 8 else torch.float32))
        rows[1].append(None if size == 6 else torch.zeros_like(rows[0][-1]))
    outs = [torch.empty_like(g) for g in rows[0]]

    def wanted(places, with_outputs):
        outputs = [outs[p].data_ptr() if with_outputs else 0 for p in places]
        addresses = [[0 if row[p] is None else row[p].data_ptr() for row in rows] for p in places]
        return [[sizes[p], k, outputs[k], *addresses[k]] for k, p in enumerate(places)]

    def listed(grads, out=None):
        return [row for pieces in table.pieces_of(grads, out) for row in pieces.rows.tolist()]

    grads = parse(rows, [2, 0, 0, 1])
    for out in (None, outs, None):
        assert listed(grads, out) == wanted([2, 3, 0], out is not None)
    chosen = grads.select([0, 3], [0, 1], 2)
    assert listed(chosen) == wanted([0, 3], False)
    assert len(chosen.tabulated) == 1
    assert chosen.tabulated is grads.tabulated  # addresses are read once


def test_pieces_of_the_same_sizes_are_cut_once():
    first, second = (table.pieces_of(parse([[torch.zeros(n) for n in (5, 7)]] * 2, None))[0] for _ in range(2))
    assert table.cut(first, 4, 2)[0] is table.cut(second, 4, 2)[0]
    assert table.cut(first, 4, 2)[0] is not table.cut(first, 2, 2)[0]


@settings(deadline=None)
@given(
    pieces=st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 5)), min_size=1, max_size=30),
    block=st.sampled_from([16, 100, 512]),
    max_slots=st.integers(1, 50),
    least=st.integers(1, 4),
)
def test_slots_cover_every_block_once(pieces, block, max_slots, least):
    rows = np.array([[columns, segment, 0, 16, 32] for columns, segment in pieces])
    cut = table._pieces(torch.float32, rows)
    slots, segments = table.cut(cut, block, max_slots, least)
    seen = []
    for (piece, first, count, _), segment in zip(slots.tolist(), segments.tolist(), strict=True):
        assert count > 0
        while count > 0:
            assert cut.segments[piece] == segment
            here = min(count, -(-cut.columns[piece] // block) - first)
            seen += [(piece, k) for k in range(first, first + here)]
            piece, first, count = piece + 1, 0, count - here
    assert seen == [(p, k) for p, columns in enumerate(cut.columns) for k in range(-(-columns // block))]
    assert len(slots) <= max_slots + len(set(cut.segments.tolist()))
    assert all(a <= b for a, b in pairwise(segments.tolist()))


def test_more_tasks_than_it_takes():
    rows = torch.ones(129, 4)
    with pytest.raises(
        RuntimeError, match="backend 'triton' cannot serve this call: it takes at most 128 tasks, got 129"
    ):
        gradsurgery.gram(rows, backend="triton")
    assert choose(None, torch.device(DEVICE), 129).name != "triton"


def test_launch_parameters_are_fixed_unless_measured(monkeypatch):
    times = {tuning.Config(128, 2, 4): 1.0, tuning.Config(64, 2, 1): 2.0}
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, config: run(config) or times.get(config, 3.0))
    monkeypatch.setattr(tuning, "_tuned", {})
    launched = []
    fixed = tuning.Config(64, 2, 3)
    monkeypatch.delenv("GRADSURGERY_TRITON_AUTOTUNE", raising=False)
    assert tuning.measured(("a",), torch.device("cpu"), fixed, lambda: launched.append) is fixed
    assert launched == []
    monkeypatch.setenv("GRADSURGERY_TRITON_AUTOTUNE", "1")
    assert tuning.measured(("a",), torch.device("cpu"), fixed, lambda: launched.append) == tuning.Config(128, 2, 4)
    assert fixed in launched
    assert len(launched) == len(set(launched))
    count = len(launched)
    assert tuning.measured(("a",), torch.device("cpu"), fixed, lambda: launched.append) == tuning.Config(128, 2, 4)
    assert len(launched) == count
    # While a graph is captured, nothing is measured: it gets what an earlier run has chosen, or the fixed parameters.
    monkeypatch.setattr(tuning, "capturing", lambda device: True)
    assert tuning.measured(("a",), torch.device("cpu"), fixed, lambda: launched.append) == tuning.Config(128, 2, 4)
    assert tuning.measured(("b",), torch.device("cpu"), fixed, lambda: launched.append) is fixed
    assert len(launched) == count


def test_every_table_entry_is_among_its_candidates():
    for fixed in (*tuning._GRAM.values(), tuning.COMBINE, tuning.Config(4, 2)):
        assert fixed in tuning.candidates(fixed)


def test_samples_leave_the_generators_alone():
    before = torch.get_rng_state()
    launch._sample(128, torch.float64, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("launched", "call"),
    {
        "gradnorm": lambda gram: gradsurgery.gradnorm_update(gram[0], gram[1], gram[1], gram[2], backend="triton"),
        "gradnorm_step": lambda gram: methods.GradNorm().weights(gram, losses=gram[0], backend="triton"),
        "min_norm": lambda gram: gradsurgery.min_norm_weights(gram, backend="triton"),
        "pcgrad": lambda gram: gradsurgery.pcgrad_weights(gram, backend="triton"),
        "random": lambda gram: methods.Random().weights(gram, backend="triton"),
        "simplex_steps": lambda gram: methods.MoDo().weights(gram, backend="triton"),
        "weights": lambda gram: methods.UPGrad().weights(gram, backend="triton"),
    }.items(),
)
def test_compiled_callers_launch_uncompiled(monkeypatch, launched, call):
    # torch.compile drops the option enable_fp_fusion=False, which the solvers need.
    traced, launch = [], getattr(weights, launched)

    def spy(*args):
        traced.append(torch.compiler.is_compiling())
        launch(*args)

    monkeypatch.setattr(weights, launched, spy)
    rows = normal(3, 5, torch.float64).abs()
    gram = rows @ rows.T
    assert torch.equal(torch.compile(call, backend="eager")(gram), call(gram))
    assert traced == [False, False]


def test_every_measured_configuration_gives_the_result(monkeypatch):
    rows, weights = normal(3, 700, torch.float32), torch.tensor([1.0, -2.0, 0.0])
    outputs = []

    def try_gram(num_tasks, dtype, device):
        grads, out = parse(rows, None), torch.empty(3, 3, dtype=torch.float64)
        return lambda config: launch.gram(grads, out, config) or outputs.append(out.clone())

    def try_combine(num_tasks, dtype, device):
        grads, out = parse(rows, None), torch.empty(700)
        return lambda config: launch.combine(grads, weights.double(), out, False, config) or outputs.append(out.clone())

    monkeypatch.setattr(tuning, "_milliseconds", lambda run, config: run(config) or 1.0)
    monkeypatch.setattr(tuning, "_tuned", {})
    monkeypatch.setattr(launch, "_try_gram", try_gram)
    monkeypatch.setattr(launch, "_try_combine", try_combine)
    monkeypatch.setenv("GRADSURGERY_TRITON_AUTOTUNE", "1")
    gram, direction = (
        gradsurgery.gram(rows, backend="triton"),
        gradsurgery.combine(rows, weights, backend="triton"),
    )
    assert {out.shape for out in outputs} == {gram.shape, direction.shape}
    for out in outputs:
        if out.shape == gram.shape:
            assert_gram(out, rows, torch.float32)
        else:
            torch.testing.assert_close(out, weights @ rows)
