# SPDX-License-Identifier: MIT
"""Options given as any type of number, and errors that name what is wrong and what to give."""

import numpy as np
import pytest
import torch

import gradsurgery
from conftest import needs_extension, on_cpu, two_losses, two_task_net
from inputs import normal

methods = gradsurgery.methods
X = torch.linspace(-1, 1, 48).reshape(8, 6)
NUMBERS = {"numpy": np.float64, "tensor": torch.tensor}


@pytest.mark.parametrize("kind", NUMBERS.values(), ids=NUMBERS)
@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("cagrad", "c", 0.25),
        ("fairgrad", "alpha", 2.0),
        ("gradnorm", "alpha", 1.5),
        ("gradvac", "beta", 0.5),
        ("mgda", "tol", 0.25),
        ("modo", "gamma", 0.5),
        ("nash_mtl", "max_norm", 0.5),
        ("pcd", "tau", 0.5),
        ("sdmgrad", "lam", 0.5),
        ("upgrad", "reg_eps", 0.5),
        ("uw", "initial", 0.5),
    ],
)
def test_numbers_of_any_kind(kind, name, option, value):
    expected = methods.get(name, **{option: value})
    method = methods.get(name, **{option: kind(value)})
    assert repr(method) == repr(expected)
    rows, losses = normal(3, 5), torch.tensor([1.0, 2.0, 3.0])
    directions = [gradsurgery.aggregate(rows, m, losses=losses) for m in (method, expected)]
    assert torch.equal(*directions)


@on_cpu
@needs_extension
def test_numbers_that_are_traced():
    compiled = torch.compile(
        lambda rows, alpha: gradsurgery.aggregate(rows, "fairgrad", alpha=alpha), fullgraph=True, backend="eager"
    )
    for alpha in (1, 2, 3, 0.5, 1.5):
        expected = gradsurgery.aggregate(normal(3, 5), "fairgrad", alpha=alpha)
        torch.testing.assert_close(compiled(normal(3, 5), alpha), expected)


@pytest.mark.parametrize("integer", [np.int64, torch.tensor])
def test_integers_of_any_kind(integer):
    assert repr(methods.PCGrad(seed=integer(3))) == repr(methods.PCGrad(seed=3))
    assert repr(methods.Krum(num_selected=integer(2))) == repr(methods.Krum(num_selected=2))
    assert repr(methods.CAGrad(rescale=integer(1))) == repr(methods.CAGrad(rescale=1))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: methods.CAGrad(c="0.5"), TypeError, "c must be a number, got str '0.5'"),
        (lambda: methods.CAGrad(c=True), TypeError, "c must be a number, got bool True"),
        (lambda: methods.CAGrad(c=np.bool_(True)), TypeError, "c must be a number, got "),
        (lambda: methods.CAGrad(c=torch.tensor(True)), TypeError, "c must be a number, got a tensor"),
        (lambda: methods.CAGrad(rescale=True), ValueError, "rescale must be one of 0, 1, 2, got True"),
        (lambda: methods.CAGrad(rescale=torch.ones(2)), ValueError, "rescale must be one of 0, 1, 2, got tensor"),
        (lambda: methods.UPGrad(pref=[]), ValueError, r"pref must be T .*, got \[\]"),
        (lambda: methods.get("gls").weights(torch.eye(2), losses=torch.ones(2), backend="x"), ValueError, "got 'x'"),
        (
            lambda: methods.get("sum").weights(torch.eye(2), backend="x"),
            ValueError,
            "backend must be one of .*, got 'x'",
        ),
        (lambda: methods.CAGrad(c=torch.ones(2)), TypeError, r"c must be a number, got a tensor of shape \(2,\)"),
        (lambda: methods.CAGrad(c=torch.tensor(1j)), TypeError, "c must be a number, got a tensor"),
        (lambda: methods.NashMTL(max_norm=None), TypeError, "max_norm must be a number, got NoneType"),
        (lambda: methods.NashMTL(max_norm=0), ValueError, "max_norm must be > 0, got 0"),
        (lambda: methods.MGDA(tol="small"), TypeError, "tol must be a number, got str 'small'"),
        (lambda: methods.MGDA(max_iter=2.5), ValueError, "max_iter must be an int >= 1, got 2.5"),
        (lambda: methods.MGDA(max_iter=2**63), ValueError, r"max_iter must be an int in 0..2\^63-1, got 92233"),
        (lambda: methods.PCGrad(seed=0.5), ValueError, "seed must be an int in .*, got 0.5"),
        (lambda: methods.UPGrad(pref="mean"), TypeError, "pref must be T .*, got 'mean'"),
        (lambda: methods.UPGrad(pref=torch.ones(2) * 1j), TypeError, "pref must be T .*, got tensor"),
        (lambda: methods.Constant({"a": 1.0}), TypeError, "task_weights must be T .*, got {'a': 1.0}"),
        (lambda: methods.UW(initial=float("inf")), ValueError, "initial must be from -80 to 80, got inf"),
        (lambda: methods.get("PC_Grad"), ValueError, r"got 'PC_Grad' \(did you mean 'pcgrad'\?\)"),
        (lambda: methods.get("x"), ValueError, "got 'x'$"),
        (lambda: methods.get(3), ValueError, "got 3$"),
        (lambda: methods.resolve(methods.MGDA, {}), TypeError, r"one, got the class gradsurgery\.methods\.mgda\.MGDA"),
        (lambda: methods.Method().weights(torch.eye(2)), NotImplementedError, r"Method must define weights\(gram"),
        (lambda: gradsurgery.gram(np.eye(2)), TypeError, "a list of T lists .*, got ndarray"),
        (lambda: methods.PCGrad().load_state_dict(None), TypeError, "'pcgrad' must be a dict, got NoneType"),
        (lambda: gradsurgery.task_order(3, seed=0, step=torch.ones(())), TypeError, "an int64 tensor .* torch.float32"),
    ],
)
def test_what_an_option_must_be(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_what_an_optimizer_must_be_given():
    net = two_task_net()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    used = net["trunk"].parameters()
    list(used)
    with pytest.raises(ValueError, match=r"shared must hold a parameter, got none \(a generator yields"):
        gradsurgery.PCGrad(sgd, shared=used)
    with pytest.raises(ValueError, match="norm_parameters must hold a parameter, got none"):
        gradsurgery.GradNorm(sgd, norm_parameters=[])
    optimizer = gradsurgery.PCGrad(sgd)
    with pytest.raises(TypeError, match="scaler must be a gradient scaler, got bool True"):
        optimizer.backward(two_losses(net, X), scaler=True)
    with pytest.raises(AttributeError, match="'PCGrad' object has no attribute 'metod'; nor: 'SGD' object has no"):
        print(optimizer.metod)
    info = optimizer.backward(two_losses(net, X))
    assert repr(info) == "SurgeryInfo(tasks=['0', '1'], with gram and weights)"


def test_a_g_of_its_own_needs_one_segment():
    net = two_task_net()
    method = methods.get("mgda")
    method.gram_parameters = [net["trunk"][0].weight]
    with pytest.raises(ValueError, match="'mgda' reads a G of its own, which needs granularity 'global'"):
        gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method, granularity="per_tensor")


def test_options_of_the_optimizer_itself():
    with pytest.raises(TypeError, match=r"as torch.optim.Adam\(model.parameters\(\)\) is, got generator"):
        gradsurgery.PCGrad(two_task_net().parameters(), lr=0.1)
