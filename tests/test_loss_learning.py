# SPDX-License-Identifier: MIT
"""Loss-weighting methods: what they learn from step to step."""

import math
from itertools import pairwise

import pytest
import torch

from test_loss_only import f64, new, series, step


@pytest.mark.parametrize("tasks", [1, 2, 64])
@pytest.mark.parametrize("name", ["uw", "imtl_l"])
def test_scales_descend_as_autograd_and_sgd_do(name, tasks):
    method = new(name, lr=0.1, initial=0.3)
    s = torch.full((tasks,), 0.3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([s], lr=0.1)
    for losses in series(tasks):
        losses = losses.clone().requires_grad_()
        f = (losses / (2 * s.exp()) + s / 2).sum() if name == "uw" else (s.exp() * losses - s).sum()
        optimizer.zero_grad()
        f.backward()
        torch.testing.assert_close(step(method, losses), losses.grad)
        optimizer.step()
        torch.testing.assert_close(method.state_dict()["s"], s.detach())


@pytest.mark.parametrize("name", ["uw", "imtl_l"])
def test_scales_come_to_rest_where_the_weighted_losses_are_equal(name):
    method, losses = new(name, lr=0.3), f64([0.2, 1.0, 3.0])
    for _ in range(200):
        got = step(method, losses)
    torch.testing.assert_close(got * losses, torch.full_like(losses, 0.5 if name == "uw" else 1.0))


@pytest.mark.parametrize("tasks", [1, 2, 64])
@pytest.mark.parametrize("second", [False, True])
def test_famo_learns_as_autograd_and_adam_do(tasks, second):
    method, values = new("famo", lr=0.1, gamma=0.05), series(tasks, 12)
    x = torch.zeros(tasks, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([x], lr=0.1, weight_decay=0.05)
    # If no second losses are given, the next step's losses take their place.
    for before, after in values.unflatten(0, (6, 2)) if second else pairwise(values):
        losses = before.clone().requires_grad_()
        z = x.softmax(0).detach()
        ((z * losses.log()).sum() / (z / before).sum()).backward()
        torch.testing.assert_close(step(method, losses), losses.grad)
        x.grad = torch.autograd.grad(x.softmax(0), x, before.log() - after.log())[0]
        adam.step()
        if second:
            method.update(after)
            torch.testing.assert_close(method.state_dict()["logits"], x.detach())


def test_famo_is_torchjds_up_to_its_epsilon():
    their = pytest.importorskip("torchjd.scalarization").FAMO(3, lr=0.1, weight_decay=0.02).double()
    method = new("famo", lr=0.1, gamma=0.02)
    for before, after in series(3, 12).unflatten(0, (6, 2)):
        losses = before.clone().requires_grad_()
        torch.testing.assert_close(
            step(method, losses), torch.autograd.grad(their(losses), losses)[0], rtol=1e-6, atol=1e-8
        )
        their.update(after)
        method.update(after)


def test_famo_takes_the_second_losses_once_and_in_any_form():
    tensor, other = new("famo"), new("famo")
    with pytest.raises(ValueError, match="must come after a step"):
        tensor.update(f64([1.0, 2.0]))
    for method in (tensor, other):
        step(method, f64([1.0, 2.0]))
    tensor.update(f64([0.5, 1.9]))
    other.update({"a": torch.tensor([0.5]), "b": f64(1.9).requires_grad_()})
    torch.testing.assert_close(tensor.state_dict(), other.state_dict(), rtol=0, atol=0)
    after = tensor.state_dict()
    tensor.update([0.1, 0.1])
    torch.testing.assert_close(tensor.state_dict(), after, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"needs losses, a tensor \[2\], got a tensor of shape \(3,\)"):
        tensor.update([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"losses must hold one number per task, got \[\]"):
        tensor.update([])
    # The task whose loss has fallen less gains weight.
    assert after["logits"][1] > 0 > after["logits"][0]


def test_famo_keeps_waiting_for_second_losses_that_count():
    method = new("famo")
    step(method, f64([1.0, 2.0]))
    before = method.state_dict()
    for losses in ([math.nan, 1.0], [math.inf, 1.0], [-1.0, 1.0]):
        method.update(losses)
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
    method.update([1.0, 1.0])
    assert not torch.equal(method.state_dict()["logits"], before["logits"])


@pytest.mark.parametrize("tasks", [1, 2, 64])
def test_group_dro_multiplies_by_exponentials(tasks):
    method, q = new("group_dro", eta=0.7), torch.full((tasks,), 1 / tasks, dtype=torch.float64)
    for losses in series(tasks):
        q = q * (0.7 * losses).exp()
        q = q / q.sum()
        torch.testing.assert_close(step(method, losses), q)


@pytest.mark.parametrize("tasks", [1, 2, 64])
@pytest.mark.parametrize("window", [1, 3])
def test_dwa_compares_the_means_of_two_windows(tasks, window):
    method, values = new("dwa", window=window, temperature=0.7), series(tasks, 12)
    for t, losses in enumerate(values):
        expected = torch.ones_like(losses)
        if t >= 2 * window:
            rate = values[t - window : t].mean(0) / values[t - 2 * window : t - window].mean(0)
            expected = tasks * (rate / 0.7).softmax(0)
        torch.testing.assert_close(step(method, losses), expected)


def test_dwa_is_torchjds_at_the_ends_of_windows():
    their = pytest.importorskip("torchjd.scalarization").DWA()
    method = new("dwa", window=3)
    for t, values in enumerate(series(4, 13)):
        losses = values.clone().requires_grad_()
        theirs, ours = torch.autograd.grad(their(losses), losses)[0], step(method, losses)
        if t % 3 == 0:
            torch.testing.assert_close(ours, theirs)
        if t % 3 == 2:
            their.step()


def test_dwa_takes_a_mean_of_zero_for_no_change():
    method = new("dwa", window=1, temperature=1.0)
    for losses in ([0.0, 2.0, 1e-300], [3.0, 1.0, 1e300]):
        step(method, f64(losses))
    assert step(method, f64([1.0, 1.0, 1.0])).tolist() == [0, 0, 3]
    method = new("dwa", window=1, temperature=1.0)
    for losses in ([0.0, 2.0], [3.0, 2.0]):
        step(method, f64(losses))
    assert step(method, f64([1.0, 1.0])).tolist() == [1, 1]


@pytest.mark.parametrize("tasks", [1, 2, 64])
@pytest.mark.parametrize("warmup", [1, 13])
def test_stch_is_the_gradient_of_the_smooth_maximum(tasks, warmup):
    method, values = new("stch", mu=0.4, warmup=warmup), series(tasks, 16)
    nadir = values[warmup - max(1, warmup // 5) : warmup].mean(0)
    for t, losses in enumerate(values):
        losses = losses.clone().requires_grad_()
        f = losses.log().sum() if t < warmup else tasks * 0.4 * ((losses / nadir).log() / 0.4).logsumexp(0)
        torch.testing.assert_close(step(method, losses), torch.autograd.grad(f, losses)[0])


def test_stch_without_a_nadir():
    method = new("stch", warmup=1)
    step(method, f64([0.0, 0.0, 2.0]))
    # The first loss has a nadir of 0 and counts as equal to it; the second is 0 and left out; the third is twice its
    # nadir.
    torch.testing.assert_close(step(method, f64([5.0, 0.0, 4.0])), f64([3 / 3 / 5, 0.0, 3 * 2 / 3 / 4]))


def test_dtp_weights_are_focal():
    method = new("dtp", gamma=2.0, alpha=0.25)
    losses = f64([1.0, 2.0, 3.0])
    assert step(method, losses).tolist() == [1, 1, 1]
    k = None
    for kpis in ([0.2, 0.9, 0.5], [0.4, 1.0, 0.0], [0.6, 0.0, 0.1]):
        method.update(dict(zip("abc", kpis, strict=True)) if k is None else kpis)
        k = f64(kpis) if k is None else 0.25 * f64(kpis) + 0.75 * k
        torch.testing.assert_close(step(method, losses), -((1 - k) ** 2) * k.log())
    with pytest.raises(ValueError, match="kpis must be one number for each of 3 tasks, got 2"):
        method.update([0.5, 0.5])
    ends = new("dtp")
    ends.update(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(step(ends, f64([1.0, 1.0])), f64([-math.log(1e-6) * (1 - 1e-6), 0.0]))


def test_kpis_are_not_printed_where_they_are_right(monkeypatch):
    """On a GPU, printing the KPIs would read them on the host."""
    monkeypatch.setattr(torch.Tensor, "__repr__", None)
    new("dtp").update(f64([0.5, 0.25]))


@pytest.mark.parametrize(
    ("kpis", "wanted"),
    [
        *((kpis, r"be T numbers in \[0, 1\]") for kpis in ([0.5, 1.1], [-0.1, 0.5], [math.nan, 0.5])),
        *((kpis, r"be T numbers in \[0, 1\]") for kpis in (f64([[0.5]]), f64([0.5]) + 0j)),
        *(
            (kpis, "hold one number per task")
            for kpis in (0.5, [], [[0.5]], [[0.5, 0.1]], ["a", "b"], [None], [f64(0.5) + 1j])
        ),
    ],
)
def test_kpis_that_cannot_be(kpis, wanted):
    method = new("dtp")
    with pytest.raises(ValueError, match=f"kpis must {wanted}, got"):
        method.update(kpis)
    assert method.state_dict() == {"kpis": None, "updated": None}
    method.update([0.5, 0.5])
    with pytest.raises(ValueError, match="is for weights of shape"):
        step(method, f64([1.0]))
