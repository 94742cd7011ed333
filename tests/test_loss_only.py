# SPDX-License-Identifier: MIT
"""Loss-weighting methods: their weights at a step."""

import math

import pytest
import torch

import gradsurgery
from conftest import grads_of, two_losses, two_task_net
from inputs import DEVICE, normal

LOGARITHMIC = ["famo", "gls", "scale_invariant", "stch"]
NAMES = [*LOGARITHMIC, "cosmos", "dtp", "dwa", "group_dro", "imtl_l", "minimax", "pbi", "tchebycheff", "uw"]
X = torch.linspace(-1, 1, 48).reshape(8, 6)
SHORT = {"dwa": {"window": 2}, "stch": {"warmup": 2}}
"""Options for which everything has happened after five steps."""


def f64(values):
    return torch.tensor(values, dtype=torch.float64, device=DEVICE)


ZERO = f64(0.0)


def gram(tasks):
    return torch.eye(tasks, dtype=torch.float64, device=DEVICE)


def series(tasks, steps=7):
    """Positive losses [steps, T] that mostly fall."""
    return (0.3 * normal(steps, tasks, seed=8) - 0.1 * torch.arange(steps)[:, None]).exp()


def new(name, **options):
    return gradsurgery.methods.get(name, **{**SHORT.get(name, {}), **options})


def step(method, losses):
    return method.weights(gram(losses.shape[-1]), losses=losses)


def weights(name, losses, **options):
    return step(gradsurgery.methods.get(name, **options), losses)


def given(tasks):
    """A preference and an ideal point."""
    return {"pref": normal(1, tasks, seed=3)[0].exp(), "ideal": -normal(1, tasks, seed=4)[0].exp()}


def pbi(losses, theta=5.0, pref=None, ideal=0.0):
    u = torch.ones_like(losses) if pref is None else pref
    u = u / u.norm()
    d1 = (losses - ideal) @ u
    return d1 + theta * (losses - ideal - d1 * u).norm()


def cosmos(losses, penalty=1.0, pref=None):
    p = torch.full_like(losses, 1 / len(losses)) if pref is None else pref
    return p @ losses - penalty * torch.nn.functional.cosine_similarity(p, losses, dim=0, eps=0)


def tchebycheff(losses, pref=None, ideal=0.0):
    return ((1 / len(losses) if pref is None else pref) * (losses - ideal)).max()


SCALARISATIONS = {
    "gls": lambda losses: losses.log().mean().exp(),
    "scale_invariant": lambda losses: losses.log().sum(),
    "stch": lambda losses: losses.log().sum(),
    "minimax": lambda losses: losses.max(),
    "tchebycheff": tchebycheff,
    "pbi": pbi,
    "cosmos": cosmos,
    "uw": lambda losses, initial=ZERO: (losses / (2 * initial.exp()) + initial / 2).sum(),
    "imtl_l": lambda losses, initial=ZERO: (losses * initial.exp() - initial).sum(),
    "famo": lambda losses: losses.log().mean() / (1 / losses.detach()).mean(),
}


@pytest.mark.parametrize("tasks", [1, 2, 64])
@pytest.mark.parametrize("name", SCALARISATIONS)
def test_weights_are_the_gradient_of_the_scalarisation(name, tasks):
    preference, ideal = given(tasks).values()
    options = {
        "tchebycheff": [{}, {"pref": preference}, {"pref": preference, "ideal": ideal}],
        "pbi": [{}, {"theta": 0.3, "pref": preference, "ideal": ideal}],
        "cosmos": [{}, {"penalty": 0.3, "pref": preference}],
        "uw": [{}, {"initial": ideal}],
        "imtl_l": [{}, {"initial": ideal}],
    }
    for chosen in options.get(name, [{}]):
        losses = normal(1, tasks, seed=2)[0].exp().requires_grad_()
        expected = torch.autograd.grad(SCALARISATIONS[name](losses, **chosen), losses)[0]
        got = weights(name, losses, **chosen)
        torch.testing.assert_close(got, expected)
        assert not got.requires_grad


@pytest.mark.parametrize(
    ("name", "options", "losses", "expected"),
    [
        ("gls", {}, [1.0, 4.0], [1.0, 0.25]),
        ("scale_invariant", {}, [2.0, 0.5], [0.5, 2.0]),
        ("minimax", {}, [2.0, 3.0, 3.0], [0.0, 1.0, 0.0]),
        ("minimax", {}, [-2.0, -1.0], [0.0, 1.0]),
        ("tchebycheff", {}, [2.0, 2.0], [0.5, 0.0]),
        ("tchebycheff", {"pref": [1, 2], "ideal": [0, 2]}, [3.0, 3.0], [1.0, 0.0]),
        ("tchebycheff", {"ideal": [5, 0]}, [1.0, 0.5], [0.0, 0.5]),
        ("pbi", {"pref": [1, 1]}, [2.0, 2.0], [0.5**0.5, 0.5**0.5]),
        ("pbi", {"pref": [3, 4], "theta": 2}, [4.0, 4.0], [0.6 + 1.6, 0.8 - 1.2]),
        ("cosmos", {"penalty": 10}, [3.0, 3.0], [0.5, 0.5]),
        ("cosmos", {"penalty": 5, "pref": [1, 1]}, [3.0, 4.0], [1 - 0.16 * 0.5**0.5, 1 + 0.12 * 0.5**0.5]),
        ("group_dro", {"eta": math.log(2)}, [1.0, 0.0], [2 / 3, 1 / 3]),
        ("group_dro", {"eta": math.log(2)}, [-1.0, 0.0], [1 / 3, 2 / 3]),
        ("famo", {}, [1.0, 3.0], [0.75, 0.25]),
        ("uw", {}, [5.0, 7.0], [0.5, 0.5]),
        ("imtl_l", {"initial": [0.0, math.log(3)]}, [5.0, 7.0], [1.0, 3.0]),
        ("dwa", {}, [5.0, 7.0], [1.0, 1.0]),
        ("dtp", {}, [5.0, 7.0], [1.0, 1.0]),
    ],
)
def test_golden_values(name, options, losses, expected):
    torch.testing.assert_close(weights(name, f64(losses), **options), f64(expected))


@pytest.mark.parametrize("tasks", [1, 2, 64])
@pytest.mark.parametrize("name", ["gls", "pbi", "cosmos", "uw", "imtl_l"])
def test_torchjd_has_the_same_scalarisations(name, tasks):
    their = pytest.importorskip("torchjd.scalarization")
    preference, ideal = given(tasks).values()
    scalarizer, options = {
        "gls": lambda: (their.GeometricMean(), {}),
        "pbi": lambda: (their.PBI(2.0, preference, ideal), {"theta": 2.0, "pref": preference, "ideal": ideal}),
        "cosmos": lambda: (their.COSMOS(0.5, preference), {"penalty": 0.5, "pref": preference}),
        "uw": lambda: (their.UW(tasks).double(), {}),
        "imtl_l": lambda: (their.IMTLL(tasks).double(), {}),
    }[name]()
    losses = normal(1, tasks, seed=2)[0].exp().requires_grad_()
    torch.testing.assert_close(
        weights(name, losses, **options), torch.autograd.grad(scalarizer(losses), losses)[0], rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_optimizer_steps_on_the_weighted_sum_of_the_losses(name):
    net, twin = (two_task_net(torch.float64) for _ in range(2))
    x = X.double()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.01), name)
    for _ in range(3):
        twin.load_state_dict(net.state_dict())
        twin.zero_grad()
        optimizer.zero_grad()
        info = optimizer.backward(two_losses(net, x))
        sum(w * loss for w, loss in zip(info.weights.tolist(), two_losses(twin, x), strict=True)).backward()
        torch.testing.assert_close(grads_of(net), grads_of(twin))
        optimizer.step()


@pytest.mark.parametrize("tasks", [1, 2, 64])
@pytest.mark.parametrize("name", NAMES)
def test_every_method_trains_by_name(name, tasks):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, tasks)).double()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.Adam(net.parameters(), lr=3e-2), name)

    def losses():
        return (net(X.double()) - torch.linspace(-1, 2, tasks)).square().mean(0)

    first = losses().sum().item()
    for _ in range(30):
        optimizer.zero_grad()
        optimizer.backward(losses(), mode="batched")
        optimizer.step()
    assert losses().sum().item() < 0.8 * first


@pytest.mark.parametrize("name", ["dtp", "dwa", "famo", "gls", "minimax", "pbi", "tchebycheff"])
@pytest.mark.parametrize("factor", [1e-200, 1e-20, 1e20, 1e200])
def test_scaled_losses_have_the_same_weights(name, factor):
    losses = normal(1, 5)[0].exp()
    scaled, plain = (new(name) for _ in range(2))
    for _ in range(6):
        losses = losses * normal(1, 5, seed=6)[0].sigmoid()
        got, expected = (m.weights(gram(5), losses=v) for m, v in ((scaled, factor * losses), (plain, losses)))
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", ["scale_invariant", "stch"])
def test_factors_on_losses_leave_the_direction_as_it_is(name):
    factors, losses = torch.logspace(-20, 20, 5, dtype=torch.float64), normal(1, 5)[0].exp()
    scaled, plain = (new(name) for _ in range(2))
    for _ in range(6):
        losses = losses * normal(1, 5, seed=6)[0].sigmoid()
        got, expected = (m.weights(gram(5), losses=v) for m, v in ((scaled, factors * losses), (plain, losses)))
        torch.testing.assert_close(got * factors, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tasks", [1, 2, 64])
def test_extreme_losses_have_finite_weights(name, tasks):
    method = new(name)
    extremes = [torch.logspace(-20, 20, tasks, dtype=torch.float64)]
    extremes += [torch.full((tasks,), value, dtype=torch.float64) for value in (1e-20, 1e20, 1.0, 0.0, 1e-150, 1e150)]
    for losses in extremes:
        got = method.weights(gram(tasks), losses=losses.roll(1))
        assert got.isfinite().all(), losses
        assert all(value.isfinite().all() for value in method.state_dict().values())


@pytest.mark.parametrize("name", LOGARITHMIC)
def test_a_loss_of_zero_is_left_out_and_a_negative_one_has_no_logarithm(name):
    method = gradsurgery.methods.get(name)
    assert method.weights(gram(3), losses=f64([-1.0, 1.0, 1.0])).isnan().all()
    got = method.weights(gram(3), losses=f64([2.0, 0.0, 3.0]))
    assert got[1] == 0
    torch.testing.assert_close(got[[0, 2]], weights(name, f64([2.0, 3.0])))
    assert weights(name, f64([0.0, 0.0])).tolist() == [0, 0]


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(LOGARITHMIC)))
def test_negative_losses_have_weights_elsewhere(name):
    assert weights(name, f64([-1.0, 2.0, -3.0])).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_losses_that_cannot_be(name):
    method = gradsurgery.methods.get(name)
    for losses in (None, [1.0, 2.0], f64(1.0), f64([1.0]), f64([1.0, 2.0, 3.0]), f64([[1.0, 2.0]])):
        error = TypeError if isinstance(losses, list) else ValueError
        with pytest.raises(error, match=rf"'{name}' needs losses, a tensor \[2\], got"):
            method.weights(gram(2), losses=losses)
    assert method.state_dict() == gradsurgery.methods.get(name).state_dict()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("uw", {"lr": -1.0}, "lr must be >= 0 and finite, got -1.0"),
        ("imtl_l", {"initial": math.inf}, "initial must be from -80 to 80, got inf"),
        ("uw", {"initial": [[1.0]]}, "initial must be T numbers from -80 to 80"),
        ("uw", {"initial": [1.0, -81.0]}, "initial must be T numbers from -80 to 80"),
        ("uw", {"initial": []}, "initial must be T numbers from -80 to 80"),
        ("dwa", {"window": 0}, "window must be an int >= 1, got 0"),
        ("dwa", {"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ("dtp", {"gamma": -1.0}, "gamma must be >= 0 and finite, got -1.0"),
        ("dtp", {"alpha": 0.0}, "alpha must be > 0 and <= 1, got 0.0"),
        ("stch", {"mu": 0.0}, "mu must be positive and finite, got 0.0"),
        ("stch", {"warmup": 0}, "warmup must be an int >= 1, got 0"),
        ("famo", {"lr": math.nan}, "lr must be >= 0 and finite, got nan"),
        ("famo", {"gamma": -1.0}, "gamma must be >= 0 and finite, got -1.0"),
        ("group_dro", {"eta": math.inf}, "eta must be >= 0 and finite, got inf"),
        ("pbi", {"theta": -1.0}, "theta must be >= 0 and finite, got -1.0"),
        ("cosmos", {"penalty": -1.0}, "penalty must be >= 0 and finite, got -1.0"),
        ("cosmos", {"pref": [1, 0]}, "pref must be T positive numbers"),
        ("tchebycheff", {"ideal": [1, math.inf]}, "ideal must be T finite numbers"),
    ],
)
def test_options_that_cannot_be(name, options, message):
    with pytest.raises(ValueError, match=message):
        gradsurgery.methods.get(name, **options)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("uw", "initial"),
        ("imtl_l", "initial"),
        ("tchebycheff", "ideal"),
        ("pbi", "pref"),
        ("cosmos", "pref"),
    ],
)
def test_options_for_another_number_of_tasks(name, option):
    with pytest.raises(ValueError, match=rf"{option} must hold one number for each of 2 tasks, got 3"):
        weights(name, f64([1.0, 2.0]), **{option: [1, 2, 3]})
