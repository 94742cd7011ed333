# SPDX-License-Identifier: MIT
"""Loss-weighting methods: the state that they keep, batches, and steps that do not count."""

import copy

import pytest
import torch

import gradsurgery
from conftest import two_losses, two_task_net
from inputs import DEVICE, normal
from test_loss_only import LOGARITHMIC, NAMES, X, f64, gram, new, series, step

STATEFUL = [name for name in NAMES if gradsurgery.methods.get(name).state_dict()]


def warm(name, tasks):
    """A method after three steps."""
    method = new(name)
    for losses in series(tasks, 3):
        step(method, losses)
    if name == "dtp":
        method.update(torch.linspace(0.1, 0.9, tasks))
    return method


@pytest.mark.parametrize("name", STATEFUL)
@pytest.mark.parametrize("tasks", [1, 5])
def test_a_loaded_state_goes_on_alike_and_in_place(name, tasks):
    method, fresh, used = warm(name, tasks), new(name), warm(name, tasks)
    step(used, series(tasks)[0])
    places = {key: value.data_ptr() for key, value in used._state.items()}
    state = method.state_dict()
    copied = copy.deepcopy(state)
    fresh.load_state_dict(state)
    used.load_state_dict(state)
    for losses in series(tasks, 8)[3:]:
        expected = step(method, losses)
        assert torch.equal(step(fresh, losses), expected)
        assert torch.equal(step(used, losses), expected)
    assert places == {key: value.data_ptr() for key, value in used._state.items()}
    torch.testing.assert_close(fresh.state_dict(), method.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(state, copied, rtol=0, atol=0)
    used.load_state_dict(new(name).state_dict())
    assert set(used.state_dict().values()) == {None}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_that_cannot_be_is_refused_whole(name):
    method = warm(name, 3)
    before = method.state_dict()
    first = next(iter(before))
    for bad in ({}, {**before, "other": 1}):
        with pytest.raises(ValueError, match="must have the keys"):
            method.load_state_dict(bad)
    for key, value in before.items():
        fewer_dimensions = value[0] if value.dim() else value[None]
        other_kind = value.long() if value.is_floating_point() else value.float()
        wrongs = [3, value.to(torch.complex64), other_kind, fewer_dimensions]
        for wrong in (*wrongs, *([] if key == first else [value[None], None])):
            with pytest.raises(ValueError, match=f"{key} must be"):
                method.load_state_dict({**before, key: wrong})
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"is for weights of shape \(3,\), got \(4,\)"):
        step(method, f64([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("name", STATEFUL)
def test_the_optimizers_checkpoint_holds_the_state(name):
    def make():
        torch.manual_seed(0)
        net = two_task_net(torch.float64)
        return net, gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), new(name))

    def train(net, optimizer):
        optimizer.zero_grad()
        info = optimizer.backward(two_losses(net, X.double()))
        optimizer.step()
        return info.weights

    first, second = make(), make()
    for _ in range(5):
        train(*first)
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(copy.deepcopy(first[1].state_dict()))
    assert torch.equal(train(*first), train(*second))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tasks", [1, 2, 5, 64])
def test_a_batch_is_its_problems(name, tasks):
    batched, single = new(name), [[new(name) for _ in range(3)] for _ in range(2)]
    values = series(6 * tasks).view(-1, 2, 3, tasks)
    for t, losses in enumerate(values):
        if name == "dtp" and t == 2:
            for method in (batched, *single[0], *single[1]):
                method.update(torch.linspace(0.1, 0.9, tasks))
        losses = losses.clone()
        if t == 3:
            losses[1, 2, -1] = torch.nan
        got = batched.weights(gram(tasks).expand(2, 3, tasks, tasks), losses=losses)
        for b in range(2):
            for c in range(3):
                expected = step(single[b][c], losses[b, c])
                torch.testing.assert_close(got[b, c], expected, equal_nan=True, rtol=0, atol=0)
        assert got[1, 2].isnan().all() == (t == 3)
        assert got[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_segments_share_the_losses(name):
    rows, losses = normal(3, 20), f64([1.0, 2.0, 3.0])
    weights = step(new(name), losses)
    direction = gradsurgery.aggregate(rows, new(name), losses=losses, segments=[0, 7, 20])
    torch.testing.assert_close(direction, weights @ rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_does_not_count_leaves_the_state(name):
    for steps in (0, 1, 2, 5):
        method = new(name)
        for losses in (f64([1.0, torch.nan, 1.0]), *series(3, steps)):
            step(method, losses)
        before = method.state_dict()
        bad = gram(3).clone()
        bad[0, 1] = torch.inf
        assert method.weights(bad, losses=f64([1.0, 2.0, 3.0])).isnan().all()
        for value in (torch.nan, torch.inf, -torch.inf) + ((-1.0,) if name in LOGARITHMIC else ()):
            assert step(method, f64([1.0, value, 3.0])).isnan().all()
        torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "s"), [("uw", 80), ("imtl_l", -80)])
def test_a_large_loss_moves_s_to_its_bound(name, s):
    method = new(name)
    step(method, f64([1e4, 1.0]))
    assert method.state_dict()["s"][0] == s


@pytest.mark.parametrize(
    ("name", "options"), [("uw", {"initial": -80.0}), ("imtl_l", {"initial": 80.0}), ("group_dro", {"eta": 1e10})]
)
def test_an_update_that_overflows_is_dropped(name, options):
    method = new(name, **options)
    step(method, f64([1e-300, torch.nan]))
    before = method.state_dict()
    step(method, f64([1e300, 1e300]))
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_losses_of_other_dtypes_and_their_memory(name):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        method, losses = new(name), torch.tensor([0.5, 2.0], dtype=dtype, device=DEVICE)
        got = method.weights(gram(2), losses=losses)
        assert got.dtype == torch.float64
        assert torch.equal(got, step(new(name), losses.double()))
    losses = f64([0.5, 2.0])
    method = new(name)
    step(method, losses).zero_()
    state = method.state_dict()
    losses.zero_()
    torch.testing.assert_close(method.state_dict(), state)


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_read_on_the_host(name):
    per_task = {"uw": ["initial"], "cosmos": ["pref"], "pbi": ["pref", "ideal"]}
    method = new(name, **{option: [1.0, 2.0, 3.0] for option in per_task.get(name, [])})
    # Tensors without values: to read one raises.
    losses = torch.ones(3, device="meta")
    for _ in range(2):
        weights = method.weights(torch.ones(2, 3, 3, dtype=torch.float64, device="meta"), losses=losses)
        assert weights.device.type == "meta"
        if name in ("dtp", "famo"):
            method.update(losses)
