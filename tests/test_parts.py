# SPDX-License-Identifier: MIT
"""The parts that the reference backend cuts gradients into: each column once, absent gradients left out."""

import math

import pytest
import torch

import gradsurgery
from gradsurgery._gradients import parse
from gradsurgery.backends import parts, reference
from inputs import normal

WIDTH = 8
SIZES = [WIDTH - 1, WIDTH, 0, WIDTH + 1, 2 * WIDTH + 3, 1, 2, 3, WIDTH]


@pytest.fixture
def narrow(monkeypatch):
    """Parts of at most 8 columns."""
    cut, runs = parts.parts, parts._runs
    for module in (parts, reference):
        monkeypatch.setattr(module, "parts", lambda grads, out, width: cut(grads, out, WIDTH))
    monkeypatch.setattr(parts, "_runs", lambda found, width: runs(found, WIDTH))


def lists():
    rows = [[normal(1, size + 1, torch.float64)[0, :size] * (t + 1) for size in SIZES] for t in range(3)]
    rows[1][3] = rows[0][4] = rows[2][4] = None
    for row in rows:
        row[5], row[7] = row[5].half(), row[7].float()
        row[8] = None
    return rows


def whole(rows):
    """The rows as one float64 matrix."""
    like = [next((row[p] for row in rows if row[p] is not None), torch.zeros(0)) for p in range(len(rows[0]))]
    return torch.stack(
        [
            torch.cat([(torch.zeros_like(f) if g is None else g).double() for f, g in zip(like, row, strict=True)])
            for row in rows
        ]
    )


@pytest.mark.parametrize("segments", [None, [0, 0, 0, 1, 1, 1, 0, 0, 0]])
def test_chunks_hold_each_column_once(narrow, segments):
    rows, ids = lists(), segments or [0] * len(SIZES)
    found = [(chunk.parts, chunk.values.clone()) for chunk in parts.chunks(parse(rows, segments))]
    assert torch.equal(torch.cat([values for _, values in found], 1), whole(rows))
    assert all(values.shape[1] <= WIDTH for _, values in found)
    assert [run[0].coordinate for run, _ in found] == [0, *torch.tensor([v.shape[1] for _, v in found]).cumsum(0)[:-1]]
    columns = [sum(len(part.like) for run, _ in found for part in run if part.segment == s) for s in (0, 1)]
    assert columns == [sum(n for n, s in zip(SIZES[:-1], ids, strict=False) if s == segment) for segment in (0, 1)]
    assert all(len({part.segment for part in run}) == 1 for run, _ in found)
    assert len(found) < sum(-(-size // WIDTH) for size in SIZES)  # small parameters share a chunk


@pytest.mark.parametrize("accumulate", [False, True])
def test_parts_are_written_where_they_belong(narrow, accumulate):
    rows, weights = lists(), torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)
    out = [None if first is None else torch.ones_like(first) for first in parse(rows, None).like]
    gradsurgery.combine(rows, weights, out=out, accumulate=accumulate, backend="reference")
    got = torch.cat([target.double() for target in out if target is not None])
    torch.testing.assert_close(got, weights @ whole(rows) + accumulate, rtol=2e-3, atol=0)
    assert out[-1] is None


@pytest.mark.parametrize("offsets", [[0, 50], [0, 3, 3, 20, 50]])
def test_a_matrix_is_cut_by_its_segments(narrow, offsets):
    matrix = normal(3, 50, torch.float32)
    chunks = [(chunk.parts[0], chunk.values.clone()) for chunk in parts.chunks(parse(matrix, offsets))]
    assert torch.equal(torch.cat([values for _, values in chunks], 1), matrix.double())
    for part, values in chunks:
        begin, end = offsets[part.segment : part.segment + 2]
        assert begin <= part.coordinate
        assert part.coordinate + values.shape[1] <= end


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_an_absent_gradient_does_not_count(backend, weight):
    rows = [[torch.tensor([1.0, 2.0]), None], [torch.tensor([3.0, 4.0]), torch.tensor([5.0])]]
    _, second = gradsurgery.combine(rows, torch.tensor([weight, 2.0]), backend=backend)
    assert second.tolist() == [10.0]
