# SPDX-License-Identifier: MIT
"""Methods own their states and options: they neither change tensors that a user holds, nor change with them."""

import copy

import pytest
import torch

import gradsurgery
from gradsurgery import methods

GRAM = torch.tensor([[2.0, -1.0], [-1.0, 3.0]], dtype=torch.float64)


def test_an_infinite_loss_leaves_the_averages():
    method, rows = methods.DBMTL(), torch.eye(2)
    gradsurgery.aggregate(rows, method, losses=torch.ones(2))
    before = method.state_dict()
    assert gradsurgery.aggregate(rows, method, losses=torch.tensor([torch.inf, 1.0])).isnan().all()
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)


def test_steps_leave_the_state_that_was_loaded():
    method, other, rows = methods.MoCo(), methods.MoCo(), torch.eye(2)
    gradsurgery.aggregate(rows, method, losses=torch.ones(2))
    state = method.state_dict()
    before = copy.deepcopy(state)
    other.load_state_dict(state)
    gradsurgery.aggregate(rows, other, losses=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(state, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["modo", "uw", "group_dro", "pcd"])
def test_a_float32_state_becomes_float64(name):
    first, then = methods.get(name), methods.get(name)
    first.weights(GRAM, losses=torch.tensor([1.0, 2.0]))
    then.load_state_dict({key: value.float() for key, value in first.state_dict().items()})
    assert then.weights(GRAM, losses=torch.tensor([1.0, 2.0])).dtype == torch.float64
    assert {value.dtype for value in then.state_dict().values()} == {torch.float64}


def test_options_do_not_change_with_the_tensors_they_were_given_in():
    given = torch.tensor([1.0, 2.0], dtype=torch.float64)
    method = methods.Constant(given)
    given.zero_()
    assert method.weights(GRAM).tolist() == [1, 2]


def test_steps_leave_the_initial_scales():
    method, losses = methods.UW(initial=[1.0, 2.0], lr=1.0), torch.tensor([5.0, 5.0])
    first = method.weights(GRAM, losses=losses)
    method.load_state_dict({"s": None})
    torch.testing.assert_close(method.weights(GRAM, losses=losses), first, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["gls", "mean", "uw"])
def test_methods_that_need_no_backend_check_its_name(name):
    with pytest.raises(ValueError, match="backend"):
        methods.get(name).weights(GRAM, losses=torch.ones(2), backend="nonsense")


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("gradnorm", {"weights": [[0.5, 1.5], [1.25, 0.75], [1.0, 1.0]], "initial_losses": [[1.0, 2.0]] * 3}),
        ("modo", {"weights": [[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]}),
    ],
)
def test_a_state_of_any_strides_counts_as_its_values(backend, name, state):
    gram = GRAM.expand(3, 2, 2).contiguous()
    state = {key: torch.tensor(value, dtype=torch.float64) for key, value in state.items()}
    transposed = {key: value.t().contiguous().t() for key, value in state.items()}
    later = []
    for loaded in (state, transposed):
        method = methods.get(name)
        method.load_state_dict(loaded)
        later.append((method.weights(gram, losses=torch.ones(2), backend=backend), method.state_dict()))
    torch.testing.assert_close(later[1], later[0], rtol=0, atol=0)
