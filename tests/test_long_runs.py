# SPDX-License-Identifier: MIT
"""What comes between steps: copies, checkpoints, evaluations, other dtypes, processes and parameters."""

import copy
import pickle
import weakref

import pytest
import torch

import gradsurgery
from conftest import on_cpu, two_losses, two_task_net
from inputs import normal

methods = gradsurgery.methods
X = torch.linspace(-1, 1, 48).reshape(8, 6)
# One method for each place in the code where a state is made.
STATEFUL = ("pcgrad", "gradvac", "gradnorm", "dwa", "modo", "cr_mogm")


def duplicates(optimizer):
    return copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))


def test_hooks_of_a_copy_run_and_those_of_the_original_do_not():
    original, called = gradsurgery.PCGrad(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)), []
    original.register_step_post_hook(lambda *_: called.append("original"))
    for optimizer in duplicates(original):
        optimizer.register_step_pre_hook(lambda *_: called.append("step"))
        optimizer.register_state_dict_post_hook(lambda *_: called.append("state"))
        optimizer.step()
        optimizer.state_dict()
    assert called == ["step", "state"] * 2


@pytest.mark.parametrize("name", STATEFUL)
def test_states_made_during_an_evaluation_go_on(name):
    method, plain = methods.get(name), methods.get(name)
    gram, losses = torch.tensor([[1.0, -0.5], [-0.5, 2.0]]).double(), torch.tensor([1.0, 2.0])
    with torch.inference_mode():
        method.weights(gram.clone(), losses=losses.clone())
    method.weights(gram, losses=losses / 3)
    with torch.inference_mode():
        method.load_state_dict(copy.deepcopy(method.state_dict()))
        fresh = methods.get(name)
        fresh.load_state_dict(method.state_dict())
    plain.weights(gram, losses=losses)
    plain.weights(gram, losses=losses / 3)
    for _ in range(2):
        expected = plain.weights(gram, losses=losses / 5)
        for each in (method, fresh):
            assert torch.equal(each.weights(gram, losses=losses / 5), expected)
    assert str(method.state_dict()) == str(fresh.state_dict()) == str(plain.state_dict())


def test_an_evaluation_before_the_first_step_counts():
    method, plain = methods.get("dtp"), methods.get("dtp")
    with torch.inference_mode():
        method.update([0.5, 0.6])
    plain.update([0.5, 0.6])
    for each in (method, plain):
        each.update([0.7, 0.2])
    assert str(method.state_dict()) == str(plain.state_dict())


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_dict_is_a_snapshot(name):
    method, gram, losses = methods.get(name), torch.tensor([[1.0, -0.5], [-0.5, 2.0]]).double(), torch.tensor([1.0, 2])
    method.weights(gram, losses=losses)
    state = method.state_dict()
    before, other = copy.deepcopy(state), methods.get(name)
    other.load_state_dict(state)
    for each in (method, other):
        each.weights(gram, losses=losses / 3)
    assert str(state) == str(before)


@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl", "m_config"])
def test_a_model_goes_on_in_another_dtype(name):
    states = {}
    for dtype in (torch.float32, torch.bfloat16):
        net = two_task_net(dtype)
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.Adam(net.parameters()), name)
        if states:
            optimizer.load_state_dict(states[torch.float32])
        optimizer.backward(two_losses(net, X.to(dtype)))
        optimizer.step()
        states[dtype] = optimizer.state_dict()
        kept_in = torch.float32 if name == "excess_mtl" else dtype  # its buffers are sums, which do not fit 16 bits
        assert all(b.dtype == kept_in for row in states[dtype]["surgery"][name]["buffers"] for b in row)
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl", "m_config"])
def test_copies_of_a_method_that_keeps_gradients_go_on_alike(name):
    def advance(method, step):
        rows = [[normal(2, 3, seed=9 * step + t), normal(1, 5, seed=9 * step + 4 + t)[0]] for t in range(3)]
        return gradsurgery.aggregate(rows, method, losses=torch.ones(3))

    method, used, fresh = methods.get(name), methods.get(name), methods.get(name)
    advance(method, 0)
    advance(used, 5)
    for each in (used, fresh):
        each.load_state_dict(method.state_dict())
    copies = [*duplicates(method), used, fresh]
    for step in (1, 2):
        expected = advance(method, step)
        for each in copies:
            torch.testing.assert_close(advance(each, step), expected, rtol=0, atol=0)
    assert all(str(each.state_dict()) == str(method.state_dict()) for each in copies)


@on_cpu
@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl", "m_config"])
def test_kept_gradients_have_the_same_bits_for_any_thread_count(name):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            method = methods.get(name)
            for step in range(2):
                d = gradsurgery.aggregate(normal(2, 600_000, torch.float32, seed=step), method, losses=torch.ones(2))
            found.append((d, method.state_dict()))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0][0], found[1][0])
    assert str(found[0][1]) == str(found[1][1])


def test_the_pickle_of_a_method_has_each_kept_gradient_once():
    method = methods.get("excess_mtl")
    gradsurgery.aggregate([list(normal(20, 1000, torch.float32, seed=t)) for t in range(2)], method)
    assert len(pickle.dumps(method)) < 1.2 * 2 * 20 * 1000 * 4


def test_excess_mtl_leaves_a_weight_in_the_step_of_the_first_excess_risk():
    method, first, second = methods.get("excess_mtl", eta=0.3), torch.tensor([1.0, -2, 0]), torch.tensor([0, 1.0, 1])
    gradsurgery.aggregate(torch.stack([first, torch.zeros(3)]), method)
    assert method.state_dict()["w"].eq(1).all()
    gradsurgery.aggregate(torch.stack([second, second]), method)
    excess = (second.square() / (first.square() + second.square()).sqrt()).sum()
    w = method.state_dict()["w"]
    torch.testing.assert_close((w[0] / w[1]).log(), 0.3 * excess.double() / first.abs().sum())


def test_sums_that_are_replaced_are_freed_before_new_ones_are_made(monkeypatch):
    method, freed = methods.get("excess_mtl"), []
    gradsurgery.aggregate(normal(2, 5), method)
    old, prepare = weakref.ref(method._blocks[2][0].roots), method._prepare
    method.load_state_dict(methods.get("excess_mtl").state_dict())
    monkeypatch.setattr(method, "_prepare", lambda *given: freed.append(old() is None) or prepare(*given))
    gradsurgery.aggregate(normal(2, 5), method)
    assert freed == [True]


@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl", "m_config"])
def test_one_parameter_goes_on_in_another_dtype(name):
    def advance(method, dtype, step):
        rows = [[normal(2, 3, torch.float32, seed=9 * step + t), normal(1, 5, seed=t)[0].to(dtype)] for t in range(3)]
        return gradsurgery.aggregate(rows, method, losses=torch.ones(3))

    method, resumed = methods.get(name), methods.get(name)
    for step, dtype in enumerate((torch.float32, torch.float64, torch.float64)):
        advance(method, dtype, step)
    resumed.load_state_dict(method.state_dict())
    for step in (3, 4):
        for got, expected in zip(*(advance(each, torch.float64, step) for each in (method, resumed)), strict=True):
            assert torch.equal(got, expected)
    assert str(resumed.state_dict()) == str(method.state_dict())


class Branches(torch.nn.Module):
    """Three layers, of which each step uses some, and two losses."""

    def __init__(self):
        super().__init__()
        for name in "xyz":
            self.add_module(name, torch.nn.Linear(4, 4))
        self.heads = torch.nn.Linear(4, 2)

    def forward(self, used):
        z = torch.ones(3, 4)
        for name in used:
            z = self.get_submodule(name)(z).tanh() + z
        return [self.heads(z)[:, 0].square().mean(), (self.heads(z)[:, 1] - 1).square().mean()]


@pytest.mark.parametrize("granularity", ["per_group", "per_tensor"])
@pytest.mark.parametrize("name", ["modo", "sdmgrad", "gradvac", "cr_mogm"])
def test_a_block_does_not_get_the_state_of_another(name, granularity):
    net = Branches()
    groups = [{"params": list(net.get_submodule(m).parameters())} for m in ("x", "y", "z", "heads")]
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(groups, lr=0.1), name, granularity=granularity)
    optimizer.backward(net("xy"))
    before = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=f"method '{name}' has a state for each group or tensor"):
        optimizer.backward(net("yz"))
    torch.testing.assert_close([p.grad for p in net.parameters()], before, rtol=0, atol=0)
    optimizer.backward(net("yx"))
    same, same_optimizer = copy.deepcopy((net, optimizer))
    same.z.bias.requires_grad_(False)
    same_optimizer.backward(same("xy"))
    copied = gradsurgery.SurgeryOptimizer(torch.optim.SGD(groups, lr=0.1), name, granularity=granularity)
    copied.backward(net("xz"))
    copied.load_state_dict(optimizer.state_dict())
    copied.backward(net("xy"))


def test_a_parameter_that_moves_to_another_group_has_the_g_of_that_group():
    first, second, third = (torch.nn.Parameter(torch.tensor([float(k), 1.0])) for k in (1, 2, 3))
    groups = [{"params": [first, second]}, {"params": [third]}]
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(groups, lr=0.0), granularity="per_group")

    def losses():
        return [(first + second + third).square().sum(), (first * second * third).sum()]

    before = optimizer.backward(losses()).gram
    groups = optimizer.param_groups
    groups[1]["params"].insert(0, groups[0]["params"].pop())
    moved = optimizer.backward(losses()).gram
    fresh = gradsurgery.PCGrad(torch.optim.SGD(groups, lr=0.0), granularity="per_group")
    torch.testing.assert_close(moved, fresh.backward(losses()).gram, rtol=0, atol=0)
    assert not torch.equal(moved, before)
    optimizer.collect(losses())
    groups[0]["params"].clear()
    optimizer.combine()  # on the parameters that the groups had when it was collected


def test_a_step_that_fails_settles_no_blocks():
    net, method = Branches(), methods.get("modo")
    groups = [{"params": list(net.get_submodule(m).parameters())} for m in ("x", "y", "z", "heads")]
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(groups, lr=0.1), method, granularity="per_group")
    method.weights = None
    with pytest.raises(TypeError):
        optimizer.backward(net("xy"))
    del method.weights
    optimizer.backward(net("yz"))


@pytest.mark.parametrize("name", ["moco", "db_mtl", "excess_mtl"])
def test_a_named_parameter_that_a_step_leaves_out_has_a_zero_gradient(name):
    net = Branches()
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = gradsurgery.SurgeryOptimizer(sgd, name, shared=[*net.x.parameters(), *net.y.parameters()])
    optimizer.backward(net("xy"))
    optimizer.zero_grad()
    optimizer.backward(net("x"))
    assert net.x.weight.grad.norm() > 0
    assert net.y.weight.grad.isfinite().all()
