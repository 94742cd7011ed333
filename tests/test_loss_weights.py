# SPDX-License-Identifier: MIT
"""The methods whose weights do not depend on G: sum, mean, constant, random."""

import math

import pytest
import torch

import gradsurgery
from conftest import grads_of, two_losses, two_task_net
from gradsurgery._philox import philox_words
from inputs import DEVICE

X = torch.linspace(-1, 1, 48).reshape(8, 6)
GRAM = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64, device=DEVICE)
GIVEN = [0.25, -2.0]


def weighted(weights):
    """The gradients of the weighted sum of the losses, heads included."""
    torch.manual_seed(1)
    net = two_task_net()
    sum(w * loss for w, loss in zip(weights, two_losses(net, X), strict=True)).backward()
    return grads_of(net)


@pytest.mark.parametrize(
    ("method", "options", "weights"),
    [
        ("sum", {}, [1, 1]),
        ("mean", {}, [0.5, 0.5]),
        ("constant", {}, [1, 1]),
        ("constant", {"task_weights": GIVEN}, GIVEN),
        ("constant", {"task_weights": torch.tensor(GIVEN, requires_grad=True)}, GIVEN),
    ],
)
def test_the_optimizer_steps_on_the_weighted_sum_of_the_losses(method, options, weights):
    torch.manual_seed(1)
    net = two_task_net()
    chosen = gradsurgery.methods.get(method, **options)
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), chosen)
    info = optimizer.backward(two_losses(net, X))
    assert info.weights.tolist() == weights
    torch.testing.assert_close(grads_of(net), weighted(weights))
    batch = chosen.weights(GRAM.expand(3, 4, 2, 2))
    assert torch.equal(batch, torch.tensor(weights, dtype=torch.float64, device=DEVICE).expand(3, 4, 2))
    assert batch.is_contiguous()


def test_random_weights_weigh_the_heads_too():
    torch.manual_seed(1)
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "random")
    info = optimizer.backward(two_losses(net, X))
    torch.testing.assert_close(grads_of(net), weighted(info.weights.tolist()))


def test_random_weights_are_a_function_of_seed_and_step():
    first, second, other = (gradsurgery.methods.get("random", seed=s) for s in (3, 3, 4))
    gram = torch.eye(5, dtype=torch.float64, device=DEVICE)
    drawn = [first.weights(gram) for _ in range(3)]
    assert torch.equal(second.weights(gram.expand(7, 5, 5)), drawn[0].expand(7, 5))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(other.weights(gram), drawn[0])
    state = first.state_dict()
    later = first.weights(gram)
    other.load_state_dict(state)
    assert torch.equal(other.weights(gram), later)
    global_state = torch.get_rng_state()
    first.weights(gram)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_random_weights_are_those_of_the_docstring(backend):
    method, gram = gradsurgery.methods.get("random", seed=3), torch.eye(3, dtype=torch.float64, device=DEVICE)
    for step in range(2):
        words = philox_words(torch.tensor([2**32 - 1]), 6, 3, torch.tensor(step))[0].tolist()
        v = [(u + 0.5) / 2**32 for u in words]
        z = [math.sqrt(-2 * math.log(v[2 * t])) * math.cos(2 * math.pi * v[2 * t + 1]) for t in range(3)]
        expected = torch.tensor(z, dtype=torch.float64, device=DEVICE).softmax(0)
        torch.testing.assert_close(method.weights(gram, backend=backend), expected)


@pytest.mark.parametrize("tasks", [1, 2, 7, 40])
def test_random_weights_are_the_same_everywhere(backend, tasks):
    seed, step = 2**62 + 3, torch.tensor(2**33 + 5, device=DEVICE)
    gram = torch.eye(tasks, dtype=torch.float64, device=DEVICE).repeat(3, 1, 1)
    gram[1, 0, -1] = torch.inf
    method = gradsurgery.methods.get("random", seed=seed)
    method.load_state_dict({"seed": seed, "step": step})
    got = method.weights(gram, backend=backend)
    assert method.state_dict()["step"] == 2**33 + 6
    method.load_state_dict({"seed": seed, "step": step})
    expected = method.weights(gram.cpu(), backend="reference")
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-13, atol=0, equal_nan=True)
    assert expected.isnan().any(-1).tolist() == [False, True, False]


def test_random_weights_are_the_softmax_of_normal_numbers():
    method, gram = gradsurgery.methods.get("random"), torch.eye(8, dtype=torch.float64, device=DEVICE)
    weights = torch.stack([method.weights(gram) for _ in range(1000)])
    assert (weights > 0).all()
    torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))
    z = weights.log() - weights.log().mean(1, keepdim=True)  # normal numbers less their mean: variance 7/8
    assert abs(z.square().mean() * 8 / 7 - 1) < 0.1
    # Kurtosis 3 and no skew, to five standard errors of 8,000 numbers.
    standard = z / z.std()
    assert abs(standard.pow(4).mean() - 3) < 5 * (24 / 8000) ** 0.5
    assert abs(standard.pow(3).mean()) < 5 * (6 / 8000) ** 0.5
    correlation = torch.corrcoef(torch.cat([weights[:-1], weights[1:]], 1).T)[:8, 8:]
    assert correlation.abs().max() < 5 / 1000**0.5


@pytest.mark.parametrize("given", [[[1.0, 2.0]], [1.0, float("nan")], [float("inf"), 1.0], 3.0])
def test_weights_that_cannot_be(given):
    with pytest.raises(ValueError, match="task_weights must be T finite numbers"):
        gradsurgery.methods.get("constant", task_weights=given)


def test_weights_for_another_number_of_tasks():
    with pytest.raises(ValueError, match="one number for each of 2 tasks, got 3"):
        gradsurgery.methods.get("constant", task_weights=[1, 2, 3]).weights(GRAM)


@pytest.mark.parametrize("method", ["sum", "mean", "constant", "random"])
def test_a_gradient_that_is_not_finite_makes_its_problem_nan(method):
    grams = torch.stack([GRAM, GRAM.clone()])
    grams[1, 0, 1] = torch.inf
    got = gradsurgery.methods.get(method).weights(grams)
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


def test_the_given_weights_are_copied():
    given = torch.ones(2)
    method = gradsurgery.methods.get("constant", task_weights=given)
    given[0] = 5
    got = method.weights(GRAM)
    got[1] = 7
    assert method.weights(GRAM).tolist() == [1, 1]
