# SPDX-License-Identifier: MIT
"""Stages 2 to 4 in one call of the extension: the same bits as by separate stages, and methods that do without it."""

import pytest
import torch

import gradsurgery
from conftest import USABLE, grads_of, two_losses, two_task_net
from gradsurgery.backends import choose
from gradsurgery.methods._solver import SolverMethod
from inputs import DEVICE, normal

if DEVICE not in USABLE:
    pytest.skip(gradsurgery.backends()[DEVICE], allow_module_level=True)

methods = gradsurgery.methods
TASKS = 5
PREFERENCE = [0.1, 0.3, 0.2, 0.7, 0.4]
CASES = [
    ("upgrad", {}),
    ("upgrad", {"pref": PREFERENCE, "reg_eps": 1e-6}),
    ("dualproj", {"pref": PREFERENCE}),
    ("cagrad", {"c": 0.3}),
    ("nash_mtl", {"max_norm": 0.2}),
    ("fairgrad", {"alpha": 2.0}),
    ("imtl_g", {}),
    ("config", {"pref": PREFERENCE}),
    ("aligned_mtl", {"scale_mode": "median"}),
    ("aligned_mtl", {"scale_mode": "rmse", "pref": PREFERENCE}),
    ("krum", {"num_byzantine": 1, "num_selected": 2}),
]


def by_stages(grads, method, segments=None):
    return gradsurgery.combine(
        grads, method.weights(gradsurgery.gram(grads, segments=segments)), segments=segments, backend=DEVICE
    )


@pytest.fixture
def only_one_call(monkeypatch):
    """Return a function; once it has been called, a separate call of any stage fails."""

    def forbid():
        def fail(*arguments):
            raise AssertionError("a stage by itself")

        for stage in ("gram", "weights", "combine"):
            monkeypatch.setattr(choose(DEVICE, torch.device(DEVICE), TASKS), stage, fail)

    return forbid


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_bits_of_the_stages(name, options, bad, only_one_call):
    matrix = normal(TASKS, 300, torch.float32)
    rows = [[matrix[t, :200].reshape(10, 20).clone(), matrix[t, 200:203].clone()] for t in range(TASKS)]
    rows[1][1] = None
    if bad:
        matrix[2, 7] = rows[2][0][0, 7] = torch.inf
    method = methods.get(name, **options)
    calls = ((matrix, None), (matrix, [0, 120, 120, 300]), (rows, None), (rows, [1, 0]))
    expected = [by_stages(grads, method, segments) for grads, segments in calls]
    only_one_call()
    for (grads, segments), wanted in zip(calls, expected, strict=True):
        into = torch.empty_like(wanted) if isinstance(wanted, torch.Tensor) else [torch.empty_like(d) for d in wanted]
        for out in (None, into):
            got = gradsurgery.aggregate(grads, method, segments=segments, out=out)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert expected[0].isnan().all() == bad


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES} - {"krum"}))
@pytest.mark.parametrize("scale", [None, 2.0**12])
def test_a_step_has_the_bits_of_the_stages(name, scale, monkeypatch):
    results, calls = [], []
    backend = choose(DEVICE, torch.device(DEVICE), 2)
    whole = backend.aggregate
    monkeypatch.setattr(backend, "aggregate", lambda *arguments: calls.append(arguments) or whole(*arguments))
    for one_call in (True, False):
        torch.manual_seed(3)
        net = two_task_net()
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), name)
        scaler = None if scale is None else torch.amp.GradScaler(DEVICE, init_scale=scale)
        if not one_call:
            monkeypatch.setattr(type(optimizer.method), "native_solver", lambda *arguments: None)
        info = optimizer.backward(two_losses(net, torch.linspace(-1, 1, 48).reshape(8, 6)), scaler=scaler)
        results.append([*grads_of(net), info.gram, info.weights])
    assert len(calls) == (0 if scale and name in ("fairgrad", "nash_mtl") else 1)
    for got, wanted in zip(*results, strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", [name for name in methods.available() if not methods.get(name).needs_gram])
def test_no_gram_where_the_weights_do_not_need_it(name, monkeypatch):
    matrix = normal(TASKS, 300, torch.float32)
    rows = [[row[:200].clone(), None if t == 1 else row[200:].clone()] for t, row in enumerate(matrix)]
    losses = torch.arange(1.0, TASKS + 1, device=DEVICE)
    calls = ((matrix, None), (matrix, [0, 120, 120, 300]), (rows, None), (rows, [1, 0]))
    expected = []
    for grads, segments in calls:
        weights = methods.get(name).weights(gradsurgery.gram(grads, segments=segments), losses=losses)
        expected.append(gradsurgery.combine(grads, weights, segments=segments))
    matrix[-1, 7] = rows[-1][0][7] = torch.nan  # the task with the largest loss, which some methods follow alone
    for direction in expected:
        (direction if isinstance(direction, torch.Tensor) else direction[0])[7] = torch.nan
    monkeypatch.setattr(choose(DEVICE, torch.device(DEVICE), TASKS), "gram", None)
    for (grads, segments), wanted in zip(calls, expected, strict=True):
        got = gradsurgery.aggregate(grads, name, losses=losses, segments=segments)
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_gradients_that_are_not_finite_do_not_stop_methods_without_g():
    rows, losses = normal(2, 5), torch.tensor([1.0, 2.0], device=DEVICE)
    broken, uw, expected = rows.clone(), methods.get("uw"), methods.get("uw")
    broken[0, 3] = torch.nan
    assert torch.equal(gradsurgery.aggregate(broken, "minimax", losses=losses), rows[1])  # the first has weight 0
    gradsurgery.aggregate(broken, uw, losses=losses)
    gradsurgery.aggregate(rows, expected, losses=losses)
    assert str(uw.state_dict()) == str(expected.state_dict()) != str(methods.get("uw").state_dict())


def test_what_another_solver_does_not_know():
    """The one call is not made for rescaled weights, nor if a subclass or an object has a ``weights`` of its own."""

    class Halved(methods.UPGrad):
        def weights(self, gram, **options):
            return super().weights(gram, **options) / 2

    class First(SolverMethod):
        def weights(self, gram, **options):
            return torch.eye(gram.shape[-1], dtype=gram.dtype)[0]

    class AnyKrum(methods.Krum):
        weights = First.weights

    rows, device = normal(TASKS, 40), torch.device(DEVICE)
    for method in (First(), AnyKrum(num_byzantine=TASKS)):
        torch.testing.assert_close(gradsurgery.aggregate(rows, method), rows[0])
    patched = methods.UPGrad()
    patched.weights = Halved().weights
    whole = methods.UPGrad().native_solver(device, TASKS)
    assert whole is not None
    for method, like in (
        (Halved(), methods.UPGrad()),
        (patched, methods.UPGrad()),
        (methods.CAGrad(1.0, rescale=1), methods.CAGrad(1.0)),
        (methods.CAGrad(1.0, rescale=2), methods.CAGrad(1.0)),
        (methods.CAGrad(1.0, rescale=2.0), methods.CAGrad(1.0)),
    ):
        assert method.native_solver(device, TASKS) is None
        torch.testing.assert_close(gradsurgery.aggregate(rows, method), gradsurgery.aggregate(rows, like) / 2)


def test_options_that_do_not_fit_change_nothing():
    rows, out = normal(3, 40), torch.full((40,), 7.0, dtype=torch.float64)
    for method, message in (
        (methods.UPGrad(pref=[1.0, 2.0]), "pref must hold one number for each of 3 tasks, got 2"),
        (methods.Krum(num_byzantine=1), "needs at least 4 tasks, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            gradsurgery.aggregate(rows, method, out=out)
    assert (out == 7).all()
