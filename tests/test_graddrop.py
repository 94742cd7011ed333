# SPDX-License-Identifier: MIT
"""GradDrop's random numbers, and what it makes of them."""

import pytest
import torch

import gradsurgery
from inputs import hostile, normal
from rules import direction, leaks, philox_of, uniforms

methods = gradsurgery.methods


def test_golden_values(backend):
    rows = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    # Here P = 0.6, 1, 1; with its own random numbers, TorchJD keeps the 6.
    found = [gradsurgery.aggregate(rows, "graddrop", seed=seed, backend=backend).tolist() for seed in range(8)]
    assert found == [[6 if uniforms(1, seed, 0) < 0.6 else -4, 2, 2] for seed in range(8)]
    assert [6, 2, 2] in found
    assert [-4, 2, 2] in found


def test_philox_as_published():
    # Random123's known answer for a counter and a key whose bits are all 1.
    ones = 2**64 - 1
    assert philox_of([2**32 - 1] * 4, ones) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


def test_random_numbers_are_the_same_on_every_backend(backend):
    rows = normal(6, 5001, torch.float32)
    assert torch.equal(direction("graddrop", rows, backend=backend), direction("graddrop", rows, backend="reference"))


def test_random_numbers_are_uniform(backend):
    columns = 40_000
    # P = 0.3 everywhere: the positive value is kept with this probability, else the negative one.
    rows = torch.tensor([[3.0], [-7.0]]).repeat(1, columns)
    method = methods.get("graddrop", seed=1)
    kept = []
    for _ in range(3):
        got = gradsurgery.aggregate(rows, method, backend=backend)
        assert ((got == 3) | (got == -7)).all()
        kept.append((got == 3).double())
    for share in kept:
        assert abs(share.mean() - 0.3) < 4 * (0.3 * 0.7 / columns) ** 0.5
    # Neighbours are independent of each other, and so are steps.
    pairs = [(share[1:], share[:-1]) for share in kept] + [(kept[0], kept[1]), (kept[1], kept[2]), (kept[0], kept[2])]
    for a, b in pairs:
        assert abs((a * b).mean() - 0.09) < 5 * (0.09 * 0.91 / columns) ** 0.5


def test_steps_and_seeds(backend):
    rows = normal(4, 500)
    method = methods.get("graddrop", seed=3)
    first, second = (gradsurgery.aggregate(rows, method, backend=backend) for _ in range(2))
    assert method.state_dict()["step"] == 2
    assert not torch.equal(first, second)
    assert torch.equal(first, gradsurgery.aggregate(rows, "graddrop", seed=3, backend=backend))
    assert not torch.equal(first, gradsurgery.aggregate(rows, "graddrop", seed=4, backend=backend))
    again = methods.get("graddrop")
    again.load_state_dict({"seed": 3, "step": torch.tensor(1, device="cpu")})
    assert torch.equal(second, gradsurgery.aggregate(rows, again, backend=backend))


def test_expected_direction(backend):
    # E[d] = P sum of the positive + (1 - P) sum of the negative values.
    rows = normal(5, 1).repeat(1, 60_000)
    positive, negative = (float(rows[:, 0].clamp(**bound).sum()) for bound in ({"min": 0}, {"max": 0}))
    purity = positive / (positive - negative)
    expected = purity * positive + (1 - purity) * negative
    got = gradsurgery.aggregate(rows, "graddrop", backend=backend)
    assert abs(got.mean() - expected) < 4 * got.std() / 60_000**0.5


@pytest.mark.parametrize("case", ["normal", "conflicting", "zero row", "mixed scales"])
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_torchjd_with_the_same_random_numbers(backend, tasks, case, monkeypatch):
    aggregation = pytest.importorskip("torchjd.aggregation")
    rows = hostile(tasks)[case]
    monkeypatch.setattr(torch, "rand", lambda shape, **options: uniforms(*shape).to(**options))
    for method, leak in (("graddrop", None), ("graddrop, leaky", leaks(tasks))):
        torch.testing.assert_close(direction(method, rows, backend=backend), aggregation.GradDrop(leak=leak)(rows))


def test_a_leak_of_1_is_the_sum(backend):
    rows = normal(4, 200)
    got = gradsurgery.aggregate(rows, "graddrop", leak=[1.0] * 4, backend=backend)
    torch.testing.assert_close(got, rows.sum(0))
