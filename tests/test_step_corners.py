# SPDX-License-Identifier: MIT
"""Rare steps of the optimizers: what is shared, what is remembered, and what is passed on."""

import copy
import pickle

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import Parameter

import gradsurgery
from conftest import two_losses, two_task_net
from gradsurgery import PCGrad, SurgeryOptimizer, methods
from test_graph_corners import X, ones, wrap


def test_micro_batches_with_tasks_in_another_order():
    w = ones(2)
    optimizer = wrap([w])
    optimizer.collect({"a": w[0], "b": -w.sum()})
    with pytest.raises(ValueError, match="same tasks in the same order"):
        optimizer.collect({"b": -w.sum(), "a": w[0]})


def test_micro_batches_of_as_many_other_parameters():
    v, w, u = ones(2), ones(2), ones(2)
    optimizer = wrap([v, w, u])
    u.requires_grad_(False)
    optimizer.collect([(v + w + u).sum(), -(v + w + u).sum()])
    u.requires_grad_(True)
    w.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters changed between micro-batches"):
        optimizer.collect([(v + w + u).sum(), -(v + w + u).sum()])


def test_more_losses_than_reach_counts():
    table, w = torch.nn.Embedding(3, 2, sparse=True), ones(2)
    looked_up = table(torch.tensor([0, 1])).sum()
    wrap([*table.parameters(), w], shared=[w]).backward([(looked_up + w.sum()) * (t + 1) for t in range(260)])
    assert w.grad is not None


@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_a_parameter_without_grad_beside_one_with(method):
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        v, w = ones(4), ones(4)
        v.grad = torch.ones(4)
        wrap([v, w], method).backward([v.sum() + w.sum(), v.sum() + w.sum()])
        assert w.grad.tolist() == [2] * 4
        assert v.grad.tolist() == [3] * 4
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_gradient_of_a_complex_head_keeps_its_dtype():
    w, head = ones(2), Parameter(torch.tensor(1 + 2j))
    wrap([w, head]).backward([w[0] + head.abs(), w[1]])
    assert head.grad.dtype == torch.complex64


@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_gradients_that_no_kernel_reads_are_added_in_place(method):
    """Torch adds them in place, too: other code may hold ``.grad``."""
    w, head, table = (
        ones(2),
        torch.nn.Parameter(torch.ones(2, dtype=torch.complex64)),
        torch.nn.Embedding(3, 2, sparse=True),
    )
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([w, head, table.weight], lr=0.1), method)
    held = [torch.ones_like(p) for p in (head, table.weight)]
    head.grad, table.weight.grad = held
    optimizer.backward([(w * head).abs().sum(), (w * table(torch.tensor([1]))).sum()])
    assert head.grad is held[0]
    assert table.weight.grad is held[1]
    torch.testing.assert_close(held[0], torch.full((2,), 2 + 0j))
    assert held[1][[0, 2]].eq(1).all()
    assert held[1][1].ne(1).all()


@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_gradients_that_no_kernel_reads_where_nothing_can_be_added_to(method):
    w, head = ones(2), torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([w, head], lr=0.1), method)
    with torch.inference_mode():
        inferred = torch.ones(2, dtype=torch.complex64)
    zero = torch._efficientzerotensor(2, dtype=torch.complex64, device=w.device)
    for grad, end in [(torch.ones((), dtype=torch.complex64).expand(2), 2), (inferred, 2), (zero, 1)]:
        head.grad = grad
        optimizer.backward([(w * head).abs().sum(), w.sum()])
        torch.testing.assert_close(head.grad, torch.full((2,), end + 0j))
    assert torch.equal(inferred, torch.ones_like(inferred))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_a_grad_of_inference_mode_is_added_to(method, backend):
    w, a, b = ones(2), ones(2), ones(2)
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([w, a, b], lr=0.1), method, backend=backend)
    w.grad = torch.zeros_like(w)
    with torch.inference_mode():
        a.grad = torch.ones(2, device=w.device)
    optimizer.backward([(w * a).sum(), (w * b).sum()])
    assert [p.grad.tolist() for p in (w, a, b)] == [[2, 2], [2, 2], [1, 1]]


@pytest.mark.parametrize("collected", [True, False])
def test_a_grad_without_memory_is_seen_before_anything_is_written(collected):
    w, a, b = ones(2), ones(2), ones(2)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([w, a, b], lr=0.1))
    w.grad, b.grad = torch.zeros(2), torch.zeros(2)
    b.grad.untyped_storage().resize_(0)
    losses = [(w * a).sum(), (w * b).sum()]
    if collected:
        optimizer.collect(losses)
    with pytest.raises(ValueError, match="tensors must have memory"):
        optimizer.combine() if collected else optimizer.backward(losses)
    assert torch.equal(w.grad, torch.zeros(2))
    assert a.grad is None
    assert (optimizer._pending is not None) is collected


@pytest.mark.parametrize("method", ["pcgrad", "sum"])
def test_no_parameter_that_requires_grad(method):
    v, w = ones(2), Parameter(torch.ones(2), requires_grad=False)
    wrap([w], method).backward([v[0], v[1]])
    assert v.grad is None
    assert w.grad is None


def test_a_method_of_ones_own_that_reads_some_parameters():
    v, w = ones(2), ones(2)

    method = methods.MGDA()
    method.gram_parameters = [w]
    weights = wrap([v, w], method).backward([10 * v[0] + w[0], w[1] + v[1]]).weights
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))  # from G over both parameters they would differ


def test_weights_of_ones_own_become_float64():
    class Own(methods.Method):
        def weights(self, gram, *, losses=None):
            return torch.ones(len(gram))

    w = ones(2)
    assert wrap([w], Own()).backward([w[0], w[1]]).weights.dtype == torch.float64


def test_sparse_gradients_in_later_batches_are_named():
    table, w = torch.nn.Embedding(3, 2, sparse=True), ones(2)
    optimizer = wrap([w, *table.parameters()], "modo", shared=[w, table.weight])
    optimizer.collect([w[0], w[1]])
    for _ in range(2):
        looked_up = table(torch.tensor([0])).sum()
        optimizer.collect([w[0] + looked_up, w[1] + looked_up])
    with pytest.raises(TypeError, match="gradients must be dense"):
        optimizer.combine()


def test_segments_of_an_info_are_the_users_own():
    net = two_task_net()
    optimizer = wrap(net.parameters(), "gradvac", granularity="per_tensor")
    optimizer.backward(two_losses(net, X)).segments.clear()
    assert len(optimizer.backward(two_losses(net, X)).segments) == 4


def test_a_state_per_tensor_is_not_used_for_another_tensor():
    u, v, w = ones(2), ones(2), ones(2)
    optimizer = wrap([u, v, w], "gradvac", granularity="per_tensor")

    def losses():
        return [u.prod() + v.prod() + w.prod(), -(u + v + w).sum()]

    w.requires_grad_(False)
    optimizer.backward(losses())
    w.requires_grad_(True)
    v.requires_grad_(False)
    with pytest.raises(ValueError, match="state for each group or tensor"):
        optimizer.backward(losses())


def test_without_a_state_tensors_may_change():
    v, w = ones(2), ones(2)
    optimizer = wrap([v, w], granularity="per_tensor")
    optimizer.backward([(v * w).sum(), -(v[0] * w).sum()])
    v.requires_grad_(False)
    assert len(optimizer.backward([(v * w).sum(), -(v[0] * w).sum()]).segments) == 1


def test_a_group_that_is_removed_before_the_surgery():
    v, w = ones(2), ones(2)
    optimizer = wrap([{"params": [v]}, {"params": [w]}], granularity="per_group")
    optimizer.collect([(v * w).sum(), -(v[0] * w).sum()])
    optimizer.param_groups.pop()
    assert optimizer.combine().segments == [-1, 0]


def test_named_shared_parameters_leave_later_ones_alone():
    v, w = ones(2), ones(2)
    optimizer = wrap([v], "moco", shared=[v])
    optimizer.backward([v.sum(), v[0]])
    optimizer.add_param_group({"params": [w]})
    optimizer.backward([(v * w).sum(), (v * w)[0]])
    assert w.grad.tolist() == [2, 1]


def test_tasks_are_told_apart_from_a_state_that_comes_at_the_second_step():
    class Late(methods.Method):
        steps, seen = 0, 0

        def weights(self, gram, *, losses=None):
            self.steps += 1
            if self.steps > 1:
                self.seen = torch.ones(len(gram))
            return torch.ones(len(gram))

        def state_dict(self):
            return {"steps": self.steps, "seen": self.seen}

        def load_state_dict(self, state):
            self.steps, self.seen = state["steps"], state["seen"]

    w = ones(2)
    optimizer = wrap([w], Late())
    for _ in range(2):
        optimizer.backward({"a": w[0], "b": w[1]})
    with pytest.raises(ValueError, match="same tasks"):
        optimizer.backward({"b": w[0], "a": w[1]})


def test_a_state_that_cannot_be_read_does_not_undo_a_step():
    class Broken(methods.Method):
        broken = False

        def weights(self, gram, *, losses=None):
            self.broken = True
            return torch.ones(len(gram))

        def state_dict(self):
            if self.broken:
                raise RuntimeError("not now")
            return {}

    w = ones(2)
    wrap([w], Broken()).backward([w[0], w[1]])
    assert w.grad.tolist() == [1, 1]


def test_a_plain_optimizers_state_leaves_parameters_and_tasks():
    w = ones(2)
    optimizer = wrap([w], "moco")
    optimizer.backward({"a": w[0], "b": w[1]})
    optimizer.load_state_dict(torch.optim.SGD([w], lr=0.2).state_dict())
    state = optimizer.state_dict()
    assert state["shared"] == [0]
    assert state["tasks"] == {"a": 0, "b": 1}


def test_a_state_that_a_hook_returns_stays_whole():
    optimizer = wrap([ones(2)])
    own = optimizer.state_dict()
    keys = set(own)
    optimizer.register_load_state_dict_pre_hook(lambda _, state: own)
    optimizer.load_state_dict({})
    assert set(own) == keys


def test_hooks_are_neither_pickled_nor_copied():
    optimizer, called = wrap([ones(2)]), []
    optimizer.register_state_dict_pre_hook(lambda found: called.append(found))
    pickle.dumps(optimizer)
    copy.deepcopy(optimizer).state_dict()
    assert called == []


def test_an_optimizer_without_defaults():
    sgd = torch.optim.SGD([ones(2)], lr=0.1)
    del sgd.defaults
    assert SurgeryOptimizer(sgd, "pcgrad").defaults == {}


def test_defaults_stay_those_of_the_wrapped_optimizer():
    sgd = torch.optim.SGD([ones(2)], lr=0.1)
    sgd.defaults = {"lr": 0.1}  # as of a class whose groups have no more
    optimizer = SurgeryOptimizer(sgd, "pcgrad")
    assert sgd.defaults == {"lr": 0.1}
    optimizer.defaults = {"lr": 0.2}
    assert sgd.defaults == {"lr": 0.2}


def test_a_lazy_layer_that_has_no_shape_yet():
    """A step may leave it out; once a batch has given it a shape it is trained."""
    a, later = ones(2), torch.nn.LazyLinear(1)
    optimizer = SurgeryOptimizer(torch.optim.SGD([a, *later.parameters()], lr=0.1), "pcgrad")
    optimizer.backward([a.sum(), 2 * a.sum()])
    assert torch.equal(a.grad, torch.full((2,), 3.0))
    optimizer.backward([a.sum(), later(a).sum()])
    assert later.weight.grad is not None


def test_an_optimizer_that_is_not_made_yet_has_no_attributes():
    with pytest.raises(AttributeError):
        object.__new__(SurgeryOptimizer).train  # noqa: B018


def test_warns_once_of_early_steps(recwarn):
    w = ones(1)
    optimizer = wrap([w], "sum")
    w.sum().backward()
    for _ in range(3):
        optimizer.step()
    assert len(recwarn) == 1


def test_steps_that_torch_takes_for_a_checkpoint_are_no_early_steps(recwarn):
    net = two_task_net()
    optimizer = wrap(net.parameters())  # without momentum it never has a state
    for _ in range(3):
        stored = get_optimizer_state_dict(net, optimizer)
    assert stored["param_groups"][0]["lr"] == 0.1
    assert not recwarn


@pytest.mark.parametrize("rates", [[0, 0.1], [torch.zeros(())]], ids=["one is not 0", "tensors are not read"])
def test_early_steps_that_count_although_learning_rates_are_0(rates):
    optimizer = PCGrad(torch.optim.SGD([{"params": [ones(1)], "lr": rate} for rate in rates]))
    optimizer.step()
    with pytest.warns(UserWarning, match="two steps without surgery"):
        optimizer.step()


def test_matrices_of_one_column():
    assert gradsurgery.gram(torch.ones(1, 2).t(), segments=[0, 1]).tolist() == [[[1, 1], [1, 1]]]


def test_negated_weights():
    weights, rows = torch._neg_view(torch.tensor([1.0, 2.0], dtype=torch.float64)), torch.eye(2)
    assert gradsurgery.combine(rows, weights).tolist() == [-1, -2]
    assert gradsurgery.combine([[row] for row in rows], weights)[0].tolist() == [-1, -2]
