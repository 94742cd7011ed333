# SPDX-License-Identifier: MIT
"""M-ConFIG: the same steps as the authors' code, steps with absent losses, and which parameters are shared then."""

import pytest
import torch

import gradsurgery
from conftest import grads_of, two_losses, two_task_net
from inputs import DEVICE, normal

methods = gradsurgery.methods
X = torch.linspace(-1, 1, 48).reshape(8, 6)


def explicit(inputs, beta):
    """Yield the algorithm's d for steps {task: gradient}; m is stored as a vector, not by its weights."""
    averages, counts, last = {}, {}, 0
    for k, given in enumerate(inputs, 1):
        for t, g in given.items():
            counts[t] = counts.get(t, 0) + 1
            averages[t] = beta * averages.get(t, 0) + (1 - beta) * g
        rows = torch.stack([averages[t] / (1 - beta ** counts[t]) for t in sorted(averages)])
        m = (1 - beta**k) * gradsurgery.aggregate(rows, "config")
        yield (m - beta * last) / (1 - beta)
        last = m


def rows_of(given, tasks):
    return [[given[t][:12].reshape(3, 4), given[t][12:]] if t in given else [None, None] for t in range(tasks)]


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_d_is_what_averages_to_config(backend, tasks, beta):
    method = methods.get("m_config", beta=beta)
    inputs = [dict(enumerate(normal(tasks, 60, seed=1)))]
    for k in range(7):
        those = {(3 * k + i) % tasks for i in range(1 + k % 3)}
        inputs.append({t: normal(tasks, 60, seed=2 + k)[t] for t in those})
    average = 0
    for given, expected in zip(inputs, explicit(inputs, beta), strict=True):
        got = gradsurgery.aggregate(rows_of(given, tasks), method, backend=backend)
        got = torch.cat([g.reshape(-1) for g in got])
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)
        average = beta * average + (1 - beta) * got
    rows = torch.stack([torch.cat([b.reshape(-1) for b in row]) for row in method.state_dict()["buffers"]])
    torch.testing.assert_close(average / (1 - beta ** len(inputs)), gradsurgery.aggregate(rows, "config"))


def test_more_tasks_than_half_of_what_a_backend_takes():
    rows = normal(70, 30)
    got = gradsurgery.aggregate(rows, "m_config")
    torch.testing.assert_close(got, gradsurgery.aggregate(rows, "config"))
    method = methods.get("m_config")
    with pytest.raises(RuntimeError, match="it takes at most 128 tasks, got 140"):
        gradsurgery.aggregate(rows, method, backend="triton")
    assert method.state_dict()["buffers"] is None


def test_adam_takes_the_authors_steps():
    operators = pytest.importorskip("conflictfree.momentum_operator")
    # float32, because conflictfree's operator uses torch's default dtype.
    targets = normal(3, 20).float()
    ours, theirs = (torch.nn.Parameter(torch.ones(20)) for _ in range(2))

    def losses(x):
        return [(i + 1) * ((x - target).square() * target.abs()).sum() for i, target in enumerate(targets)]

    optimizer = gradsurgery.MConFIG(torch.optim.Adam([ours], lr=0.05, betas=(0.9, 0.99), eps=1e-8), beta=0.9)
    operator = operators.PseudoMomentumOperator(num_vectors=3, beta_1=0.9, beta_2=0.99)
    sgd = torch.optim.SGD([theirs], lr=0.05)
    for step in range(40):
        indexes = list(range(3)) if step == 0 else [step % 3]
        optimizer.zero_grad()
        optimizer.backward([loss if t in indexes else None for t, loss in enumerate(losses(ours))])
        optimizer.step()
        grads = [torch.autograd.grad(losses(theirs)[t], theirs)[0] for t in indexes]
        theirs.grad = operator.calculate_gradient(indexes, grads)
        sgd.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - 1).abs().max() > 0.5


def make(method="m_config", **options):
    torch.manual_seed(2)
    net = two_task_net(torch.float64)
    return net, gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method, **options)


def one_of(net, present, x=X):
    return [loss if t == present else None for t, loss in enumerate(two_losses(net, x.double()))]


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_a_step_of_one_loss(mode):
    net, optimizer = make(method=methods.MConFIG(beta=0.5))
    trunk = list(net["trunk"].parameters())
    inputs = []
    for step in range(5):
        optimizer.zero_grad()
        x, present = (X + 0.1 * step).double(), range(2) if step == 0 else [step % 2]
        losses = two_losses(net, x)
        inputs.append({})
        for t in present:
            grads = torch.autograd.grad(losses[t], trunk, retain_graph=True)
            inputs[-1][t] = torch.cat([g.reshape(-1) for g in grads])
        given = {name: losses[t] if t in present else None for t, name in enumerate("ab")}
        info = optimizer.backward(given, mode=mode)
        *_, expected = explicit(inputs, 0.5)
        torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in trunk]), expected)
        for t, name in enumerate("ab"):
            assert (net[name].weight.grad is None) == (t not in present)
        assert info.tasks == ["a", "b"]
        optimizer.step()


def test_losses_one_by_one_make_a_first_step():
    results = []
    for apart in (True, False):
        net, optimizer = make()
        if apart:
            for t in range(2):
                optimizer.collect(one_of(net, t))
            optimizer.combine()
        else:
            optimizer.backward(two_losses(net, X.double()))
        results.append(grads_of(net))
    torch.testing.assert_close(*results)


def test_what_is_shared_where_losses_are_absent():
    net, optimizer = make()
    with pytest.raises(ValueError, match="what is shared cannot be told without every loss: name it by shared="):
        optimizer.backward(one_of(net, 0))
    net, optimizer = make()
    trunk = list(net["trunk"].parameters())
    unused = torch.nn.Parameter(torch.ones(2))
    sgd = torch.optim.SGD([*net.parameters(), unused], lr=0.1)
    named = gradsurgery.SurgeryOptimizer(sgd, "m_config", shared=[*trunk, unused])
    with pytest.raises(
        ValueError, match=r"first step of method 'm_config' needs gradients of every task, not of \[1\]"
    ):
        named.backward(one_of(net, 0))
    assert grads_of(net) == [None] * len(grads_of(net))
    assert named.method.state_dict()["buffers"] is None
    named.zero_grad()
    named.backward(two_losses(net, X.double()))
    named.backward(one_of(net, 1))
    assert unused.grad is None


@pytest.mark.parametrize("others", ["absent", "of a head alone"])
def test_shared_parameters_that_a_step_does_not_reach(others):
    """In the second step one loss reaches p and none reaches q; the averages of the other tasks still move q."""
    p, q, h = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([p, q, h], lr=0.1), methods.MConFIG(beta=0.5))
    c = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    first = {0: torch.cat([2 * c, c]), 1: torch.cat([c, 0 * c]), 2: torch.cat([-c, c.flip(0)])}
    second = {1: torch.cat([c.flip(0), 0 * c])}
    optimizer.backward([(p * 2 * c + q * c).sum(), (p * c).sum(), (q * c.flip(0) - p * c).sum()])
    optimizer.zero_grad()
    other = None if others == "absent" else h.sum()
    optimizer.backward([other, (p * c.flip(0)).sum(), other], retain_graph=True)
    *_, expected = explicit([first, second], 0.5)
    torch.testing.assert_close(torch.cat([p.grad, q.grad]), expected)
    assert q.grad.abs().min() > 0


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("method", ["m_config", "moco"])
def test_a_parameter_that_a_step_does_not_reach_keeps_its_gradients_dtype(method):
    """p and q are bfloat16 with float32 gradients; after a step that reaches p alone q's averages are float32, too."""
    p, q = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2))
    p.grad_dtype = q.grad_dtype = torch.float32
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([p, q], lr=0.1), method, shared=[p, q])
    optimizer.backward([(p.square() + q).sum().float(), (p + q.square()).sum().float()])
    optimizer.zero_grad()
    optimizer.backward([p.square().sum().float(), p.sum().float()])
    assert [p.grad.dtype, q.grad.dtype] == [torch.float32] * 2
    assert {b.dtype for row in optimizer.method.state_dict()["buffers"] for b in row} == {torch.float32}


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_step_that_is_not_finite_leaves_the_state(bad):
    method = methods.get("m_config")
    rows = normal(3, 60)
    gradsurgery.aggregate([[row[:12].reshape(3, 4), row[12:]] for row in rows], method)
    state = method.state_dict()
    given = {1: rows[1].clone()}
    given[1][4] = bad
    got = gradsurgery.aggregate(rows_of(given, 3), method)
    assert all(g.isnan().all() for g in got)
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)


def test_a_step_of_one_loss_reads_nothing_on_the_host():
    method, grad = methods.get("m_config"), torch.ones(7, device="meta")
    gradsurgery.aggregate([[grad], [grad]], method)
    gradsurgery.aggregate([[None], [grad]], method)


def test_a_preference_is_configs():
    rows = normal(3, 60)
    expected = gradsurgery.aggregate(rows, "config", pref=[1.0, 2.0, 0.5])
    torch.testing.assert_close(gradsurgery.aggregate(rows, "m_config", pref=[1.0, 2.0, 0.5]), expected)


@pytest.mark.parametrize("before", [False, True])
def test_what_was_shared_stays_shared(before):
    """A loss that no longer reaches the shared p counts as absent, whether or not an absent loss came before."""
    p, h = (torch.nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    c = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([p, h], lr=0.1), methods.MConFIG(beta=0.5))
    inputs = [{0: c, 1: c.flip(0)}]
    optimizer.backward([(p * c).sum(), (p * c.flip(0)).sum()])
    if before:
        inputs.append({0: 2 * c})
        optimizer.backward([(p * 2 * c).sum(), None])
    optimizer.zero_grad()
    inputs.append({0: c.square()})
    optimizer.backward([(p * c.square()).sum(), (h * c).sum()])
    *_, expected = explicit(inputs, 0.5)
    torch.testing.assert_close(p.grad, expected)
    torch.testing.assert_close(h.grad, c)
    state = optimizer.method.state_dict()
    optimizer.zero_grad()
    optimizer.backward([None, (h * c).sum()])
    assert p.grad is None
    torch.testing.assert_close(optimizer.method.state_dict(), state, rtol=0, atol=0)


def test_a_loss_of_a_head_alone_is_as_good_as_absent():
    p, q, h = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(3))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([p, q, h], lr=0.1), "m_config")
    optimizer.backward([(p + q).sum(), (p - 2 * q).sum(), (p.square() + q).sum()])
    optimizer.backward([h.sum(), None, p.sum()])
    assert optimizer.method.state_dict()["counts"].tolist() == [1, 1, 2]


def test_failed_calls_begin_nothing():
    net, optimizer = make(method=methods.MConFIG(pref=[1.0, 2.0, 3.0]))
    for _ in range(2):
        with pytest.raises(ValueError, match="pref must hold one number for each of 2 tasks, got 3"):
            optimizer.collect(two_losses(net, X.double()))
    assert optimizer.method.state_dict()["buffers"] is None
    net, optimizer = make()
    optimizer.backward(dict(zip("ab", two_losses(net, X.double()), strict=True)))
    with pytest.raises(ValueError, match=r"same tasks in the same order.*had \['a', 'b'\], got \['b', 'a'\]"):
        optimizer.backward(dict(zip("ba", one_of(net, 0), strict=True)))
    state = optimizer.state_dict()
    for places in ([0, 99], [-1]):
        with pytest.raises(ValueError, match=r"shared must hold places of 8 parameters, got"):
            optimizer.load_state_dict({**state, "shared": places, "surgery": make()[1].state_dict()["surgery"]})
    torch.testing.assert_close(optimizer.method.state_dict(), state["surgery"]["m_config"], rtol=0, atol=0)


def test_losses_are_not_looked_at():
    net, optimizer = make()
    for factor in (1.0, torch.inf):
        losses = [loss + factor - 1 for loss in two_losses(net, X.double())]
        optimizer.backward(losses)
    assert all(g is None or g.isfinite().all() for g in grads_of(net))
    assert optimizer.method.state_dict()["step"] == 2


def test_a_checkpoint_between_steps_of_one_loss():
    net, optimizer = make()
    optimizer.backward(two_losses(net, X.double()))
    optimizer.step()
    saved = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
    other, resumed = make()
    other.load_state_dict(saved["net"])
    resumed.load_state_dict(saved["optimizer"])
    for n, o in ((net, optimizer), (other, resumed)):
        o.zero_grad()
        o.backward(one_of(n, 1, X + 0.2))
    assert all(a is b or torch.equal(a, b) for a, b in zip(grads_of(net), grads_of(other), strict=True))
    _, fresh = make()
    resumed.load_state_dict(fresh.state_dict())
    with pytest.raises(ValueError, match="cannot be told without every loss"):
        resumed.backward(one_of(other, 1))


def test_a_checkpoint_with_other_shared_parameters():
    def trained(second):
        """Take two steps, the second with only the first loss; p is shared, and q too if the second loss reaches it."""
        p, q = (torch.nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([p, q], lr=0.1), "m_config")
        optimizer.backward([(p + q).sum(), second(p, q).sum()])
        optimizer.backward([(p + q).sum(), None])
        return p, q, optimizer

    _, _, both = trained(lambda p, q: p - 2 * q)
    p, q, one = trained(lambda p, q: p)
    one.method.load_state_dict(methods.get("m_config").state_dict())
    one.load_state_dict(both.state_dict())
    one.backward([(p + q).sum(), None])
    assert one.method.state_dict()["counts"].tolist() == [3, 1]


def test_a_scaler_with_steps_of_one_loss():
    results = []
    for scaler in (None, torch.amp.GradScaler(DEVICE, init_scale=1024.0)):
        net, optimizer = make()
        for step in range(4):
            optimizer.zero_grad()
            losses = two_losses(net, X.double()) if step == 0 else one_of(net, step % 2)
            optimizer.backward(losses, scaler=scaler)
            if scaler is not None:
                scaler.unscale_(optimizer)
                scaler.update(512.0 * (step + 1))
            optimizer.step()
        results.append(grads_of(net))
    torch.testing.assert_close(*results)


def test_absent_losses_are_for_methods_that_take_them():
    net, optimizer = make("pcgrad")
    with pytest.raises(TypeError, match=r"loss '1' must be a tensor, got NoneType .*methods that take absent losses\)"):
        optimizer.backward(one_of(net, 0))
    net, optimizer = make()
    with pytest.raises(ValueError, match="losses must hold at least one loss, got none"):
        optimizer.backward([None, None])
    with pytest.raises(ValueError, match=r"beta must be >= 0 and < 1, got 1.0"):
        methods.MConFIG(beta=1.0)


def test_a_named_parameter_that_begins_to_be_trained():
    net = two_task_net(torch.float64)
    first = net["trunk"][0].requires_grad_(False)
    named = {"shared": list(net["trunk"].parameters())}
    optimizer = gradsurgery.MConFIG(torch.optim.SGD(net.parameters(), lr=0.1), **named)
    optimizer.backward(two_losses(net, X.double()))
    first.requires_grad_()
    before = grads_of(net)
    with pytest.raises(ValueError, match="leave requires_grad as it is; had 2, got 4"):
        optimizer.backward(two_losses(net, X.double()))
    torch.testing.assert_close(grads_of(net), before, rtol=0, atol=0)


def test_layers_that_are_unfrozen_are_refused():
    net = two_task_net()
    net["trunk"][0].requires_grad_(False)
    optimizer = gradsurgery.MConFIG(torch.optim.SGD(net.parameters(), lr=0.1))
    optimizer.backward(two_losses(net, X))
    before = grads_of(net)
    net["trunk"][0].requires_grad_(True)
    with pytest.raises(ValueError, match="the first step's losses shared, and now they share more"):
        optimizer.backward(two_losses(net, X))
    torch.testing.assert_close(grads_of(net), before)
