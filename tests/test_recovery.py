# SPDX-License-Identifier: MIT
"""What a step with unusual losses leaves in the state."""

import pytest
import torch

import gradsurgery
from conftest import USABLE
from inputs import DEVICE, normal

methods = gradsurgery.methods


def direction(method, losses, rows, backend=None):
    losses = torch.tensor(losses, dtype=torch.float64, device=DEVICE)
    return gradsurgery.aggregate(rows, method, losses=losses, backend=backend)


@pytest.mark.parametrize("backend", USABLE)
@pytest.mark.parametrize(("name", "loss"), [("moco", 1e9), ("db_mtl", 1e-9)])
def test_what_does_not_fit_float16_does_not_last(name, loss, backend):
    rows, method = normal(2, 50, torch.float16), methods.get(name)
    for losses in ([1, 1], [1, loss], *20 * [[1, 1]]):
        d = direction(method, losses, rows, backend)
        assert all(b.isfinite().all() for row in method.state_dict()["buffers"] for b in row)
    assert d.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "loss"), [("moco", 1e300), ("db_mtl", 1e-42)])
def test_a_step_that_would_overflow_is_left_out(name, loss, dtype):
    rows, method = normal(2, 50, dtype), methods.get(name)
    direction(method, [1, 1], rows)
    before = method.state_dict()
    assert direction(method, [1, loss], rows).isnan().all()
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["moco", "db_mtl"])
def test_a_negative_loss_leaves_what_is_kept_as_it_is(name):
    rows, method = normal(2, 50), methods.get(name)
    direction(method, [1, 1], rows)
    before = method.state_dict()
    assert direction(method, [1, -1], rows).isnan().all()
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_a_loss_of_zero_leaves_its_averaged_logarithm_as_it_is():
    rows, method = normal(2, 50), methods.get("db_mtl")
    direction(method, [1, 1], rows)
    before = method.state_dict()["buffers"]
    assert direction(method, [1, 0], rows).isfinite().all()
    after = method.state_dict()["buffers"]
    assert torch.equal(after[1][0], before[1][0])
    assert not torch.equal(after[0][0], before[0][0])


@pytest.mark.parametrize(("name", "end", "step"), [("uw", -80, 0.5), ("imtl_l", 80, 1.0)])
def test_scales_come_back_from_losses_of_zero(name, end, step):
    method, gram = methods.get(name, lr=30.0), torch.eye(2, dtype=torch.float64, device=DEVICE)
    for _ in range(8):
        weights = method.weights(gram, losses=torch.zeros(2, device=DEVICE))
    assert weights.isfinite().all()
    assert method.state_dict()["s"].tolist() == [end, end]
    # With this loss the slope in s has the size that it has for a loss of 0, and the other sign.
    losses = torch.full((2,), 2 * step, dtype=torch.float64, device=DEVICE) / weights
    method.weights(gram, losses=losses)
    assert method.state_dict()["s"].tolist() == pytest.approx([end - end / 80 * 30 * step] * 2)


@pytest.mark.parametrize(("name", "state"), [("uw", -900.0), ("imtl_l", 900.0)])
def test_scales_that_were_loaded_have_finite_weights_in_float32(name, state):
    method, gram = methods.get(name), torch.eye(2, dtype=torch.float64, device=DEVICE)
    method.load_state_dict({"s": torch.full((2,), state, dtype=torch.float64)})
    assert method.weights(gram, losses=torch.ones(2, device=DEVICE)).float().isfinite().all()
    assert method.state_dict()["s"].abs().max() <= 80


def test_weights_of_averages_whose_products_are_infinite():
    rows = [[1e100 * normal(1, 5)[0]], [normal(1, 5)[0]]]
    losses = torch.tensor([1e-100, 1.0], dtype=torch.float64, device=DEVICE)
    step = methods.get("db_mtl").step(rows, losses, None, None)
    assert step.gram[0, 0].isinf()
    assert step.weights.isnan().all()
