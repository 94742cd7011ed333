# SPDX-License-Identifier: MIT
"""What the optimizers save and load, and the hooks that run then."""

import pytest
import torch

import gradsurgery
from conftest import two_losses, two_task_net

X = torch.linspace(-1, 1, 48).reshape(8, 6)


def test_hooks_are_called_with_the_wrapper_and_its_whole_state():
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    calls = []
    optimizer.register_state_dict_pre_hook(lambda o: calls.append(("save", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: calls.append(("saved", o)) or {"wrapped": state})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: calls.append(("load", o)) or state["wrapped"])
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(("loaded", o)))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append(("step", args[0])) or (args, kwargs))
    optimizer.register_step_post_hook(
        lambda o, args, kwargs: calls.append(("stepped", args[0])) or calls.append(("", o))
    )
    state = optimizer.state_dict()
    assert set(state) == {"wrapped"}
    state["wrapped"]["surgery"]["pcgrad"]["seed"] = 5
    optimizer.load_state_dict(state)
    assert optimizer.method.seed == 5
    optimizer.step()
    assert [name for name, _ in calls] == ["save", "saved", "load", "loaded", "step", "stepped", ""]
    assert all(o is optimizer for _, o in calls)


def test_hooks_change_the_state_that_is_loaded_and_not_the_callers():
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1), seed=3)
    optimizer.register_load_state_dict_pre_hook(lambda o, state: state.pop("surgery") and None)
    state = gradsurgery.PCGrad(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5), seed=4).state_dict()
    optimizer.load_state_dict(state)
    assert "surgery" in state
    assert optimizer.method.seed == 3
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("tasks", [["a", "b"], {"a": 0, "b": 2}])
def test_a_checkpoint_with_other_tasks_changes_nothing(tasks):
    optimizer = gradsurgery.GradNorm(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    before = str(optimizer.state_dict())
    other = gradsurgery.GradNorm(torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.5))
    with pytest.raises(ValueError, match="tasks must hold a place for each name"):
        optimizer.load_state_dict({**other.state_dict(), "tasks": tasks})
    assert str(optimizer.state_dict()) == before


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"surgery": [1]}, "surgery must hold a method's state by its name, got list"),
        ({"shared": 5}, "shared must be a list of places, got int 5"),
        ({"shared": [7]}, r"shared must hold places of 1 parameters, got \[7\]"),
        ({"blocks": 5}, "blocks must be a list of places, got int 5"),
        ({"blocks": ["a"]}, "blocks must be a list of places, got list"),
    ],
)
@pytest.mark.parametrize("granularity", ["global", "per_group", "per_tensor"])
def test_a_checkpoint_that_cannot_be_changes_nothing(changed, message, granularity):
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer = gradsurgery.SurgeryOptimizer(sgd, "gradvac", granularity=granularity)
    before = str(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict({**optimizer.state_dict(), **changed})
    assert str(optimizer.state_dict()) == before


def train(net, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        optimizer.backward(two_losses(net, X + 0.1 * step))
        optimizer.step()


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "gradnorm"])
def test_checkpoint_continues_bit_for_bit(method, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        net = two_task_net()
        return net, gradsurgery.SurgeryOptimizer(torch.optim.Adam(net.parameters(), lr=0.02), method)

    net, optimizer = make(0)
    train(net, optimizer, 3)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    train(net, optimizer, 3, start=3)
    resumed, other = make(1)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(checkpoint["net"])
    other.load_state_dict(checkpoint["optimizer"])
    train(resumed, other, 3, start=3)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), resumed.parameters(), strict=True))
    torch.testing.assert_close(optimizer.state_dict(), other.state_dict(), atol=0, rtol=0)


def test_plain_and_wrong_checkpoints():
    net = two_task_net()
    adam = torch.optim.Adam(net.parameters(), lr=0.3)
    optimizer = gradsurgery.PCGrad(torch.optim.Adam(net.parameters()))
    train(net, optimizer, 2)
    optimizer.load_state_dict(adam.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert optimizer.method.state_dict()["step"] == 2
    before = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"that of method 'pcgrad', got that of 'gradnorm': .*pop \"surgery\""):
        optimizer.load_state_dict(gradsurgery.GradNorm(adam).state_dict())
    with pytest.raises(ValueError, match="must have the keys"):
        optimizer.load_state_dict(gradsurgery.MGDA(adam).state_dict())
    gradnorm = gradsurgery.GradNorm(torch.optim.Adam(net.parameters()))
    for state in (
        (torch.ones(2), None),
        (None, torch.ones(2)),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(()), torch.ones(())),
    ):
        with pytest.raises(ValueError, match=r"(weights|initial_losses) must be a tensor"):
            gradnorm.method.load_state_dict(dict(zip(("weights", "initial_losses"), state, strict=True)))
    assert gradnorm.method.state_dict() == {"weights": None, "initial_losses": None}
    kept = {"pcgrad": {"seed": 5, "step": torch.tensor(9)}}
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({"state": {}, "param_groups": [], "surgery": kept})
    torch.testing.assert_close(optimizer.state_dict(), before)


def test_a_method_takes_no_other_ones_state():
    net = two_task_net()
    uw, imtl, mgda, cagrad = (
        gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters()), name)
        for name in ("uw", "imtl_l", "mgda", "cagrad")
    )
    assert uw.method.state_dict().keys() == imtl.method.state_dict().keys()
    with pytest.raises(ValueError, match="state must be that of method 'imtl_l', got that of 'uw'"):
        imtl.load_state_dict(uw.state_dict())
    cagrad.load_state_dict(mgda.state_dict())  # neither method has a state
    for own in ({"s": torch.ones(2)}, {"seed": 5}, {"imtl_l": torch.ones(2)}):
        with pytest.raises(ValueError, match="state must be that of method 'imtl_l', got that of"):
            imtl.load_state_dict({**imtl.state_dict(), "surgery": own})


def test_places_of_kept_parameters_go_with_one_that_is_removed():
    v, w = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([{"params": [v]}, {"params": [w]}], lr=0.1), "moco")
    optimizer.backward([(v * w).sum(), (v - w).sum()])
    assert optimizer.state_dict()["shared"] == [0, 1]
    optimizer.param_groups.pop()
    assert "shared" not in optimizer.state_dict()
