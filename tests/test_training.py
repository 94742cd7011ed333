# SPDX-License-Identifier: MIT
"""The drop-in optimizers inside an ordinary training loop: copies, schedulers, scalers, memory."""

import collections
import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

import gradsurgery
from bench.step import peak_bytes
from conftest import grads_of, on_cpu, two_losses, two_task_net
from inputs import DEVICE

X = torch.linspace(-1, 1, 48).reshape(8, 6)


def test_graph_is_freed_after_the_last_task():
    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            kept = x.clone()
            ctx.save_for_backward(kept)
            nonlocal reference
            reference = weakref.ref(kept)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad + 0 * ctx.saved_tensors[0]

    reference = None
    for retain_graph in (False, True):
        net = two_task_net()
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
        factor = Identity.apply(net["trunk"][0].bias).sum()  # shared by both losses, like the trunk
        losses = [loss * factor for loss in two_losses(net, X)]
        optimizer.backward(losses, retain_graph=retain_graph)
        gc.collect()
        assert (reference() is None) != retain_graph
        if retain_graph:
            optimizer.backward(losses)
        with pytest.raises(RuntimeError, match="second time"):
            losses[1].backward()


def test_it_is_an_optimizer():
    net = two_task_net()
    inner = torch.optim.AdamW(net.parameters(), lr=0.1)
    optimizer = gradsurgery.PCGrad(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    calls = []
    everywhere = register_optimizer_step_pre_hook(lambda *_: calls.append("everywhere"))
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure():
        optimizer.zero_grad()
        losses = two_losses(net, X)
        optimizer.backward(losses)
        return sum(losses)

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    everywhere.remove()
    assert calls == ["everywhere", "pre", "post"] * 2
    extra = torch.nn.Parameter(torch.ones(1))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert inner.param_groups[1]["lr"] == 0.5
    optimizer.zero_grad(set_to_none=False)
    assert all((g == 0).all() for g in grads_of(net))
    clone = copy.deepcopy(optimizer)
    assert clone.optimizer is not inner
    assert clone.param_groups[0]["lr"] == 0.1
    assert "AdamW" in repr(optimizer)


def test_copies_are_of_their_own():
    for copier in (copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))):
        weight = torch.nn.Parameter(torch.ones(2))
        optimizer = gradsurgery.PCGrad(torch.optim.SGD([weight], lr=0.1), shared=[weight])
        torch.optim.lr_scheduler.StepLR(optimizer, 1)
        clone = copier(optimizer)
        mine = clone.param_groups[0]["params"][0]
        info = clone.backward([3 * mine[0] - mine[1], 2 * mine[1] - mine[0]])
        clone.step()
        assert info.gram.abs().sum() > 0
        assert torch.equal(weight, torch.ones(2))
        assert not torch.equal(mine, weight)


def test_state_and_groups_can_be_replaced():
    """Packages that shard or reset an optimizer's state replace these attributes."""
    net = two_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.Adam(net.parameters()))
    optimizer.backward(two_losses(net, X))
    optimizer.step()
    optimizer.state = collections.defaultdict(dict)
    optimizer.param_groups = [{**group, "lr": 0.5} for group in optimizer.param_groups]
    assert not optimizer.optimizer.state
    optimizer.step()
    assert [group["lr"] for group in optimizer.optimizer.param_groups] == [0.5]
    assert len(optimizer.optimizer.state) == len(list(net.parameters()))


@on_cpu
@pytest.mark.parametrize("wrap", ["pytorch_optimizer", "accelerate"])
def test_optimizers_without_hooks_or_defaults(wrap):
    package = pytest.importorskip(wrap)
    net = two_task_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    wrapped = package.Lookahead(inner) if wrap == "pytorch_optimizer" else package.Accelerator(cpu=True).prepare(inner)
    optimizer = gradsurgery.PCGrad(wrapped)
    before = [p.clone() for p in net.parameters()]
    optimizer.zero_grad()
    optimizer.backward(two_losses(net, X))
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_what_an_optimizer_was_made_of_stays():
    net = two_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1))
    for name, value in (("method", gradsurgery.methods.MGDA()), ("granularity", "per_tensor")):
        with pytest.raises(AttributeError, match=r"no setter|can't set"):
            setattr(optimizer, name, value)
    with pytest.raises(TypeError, match="must not be a PCGrad itself: wrap what it wraps"):
        gradsurgery.GradNorm(optimizer)


def test_updates_by_way_of_the_optimizer():
    net = two_task_net()
    for name, values in (("famo", [0.5, 0.25]), ("dtp", [0.1, 0.9])):
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), name)
        own = gradsurgery.methods.get(name)
        losses = dict(zip("ba", two_losses(net, X), strict=True))
        own.weights(torch.eye(2).double(), losses=torch.stack(list(losses.values())))
        optimizer.backward(losses)
        own.update(torch.tensor(values))
        optimizer.update(dict(zip("ba", values, strict=True)))
        torch.testing.assert_close(optimizer.method.state_dict(), own.state_dict(), rtol=1e-6, atol=1e-7)
        for wrong in (3.0, None, [], [torch.ones(2), 1.0], [None, 1.0]):
            with pytest.raises(ValueError, match="values must hold one number per task"):
                optimizer.update(wrong)
        optimizer.update([torch.ones(1), torch.ones(())])
        with pytest.raises(ValueError, match=r"had \['b', 'a'\], got \['a', 'b'\]"):
            optimizer.update({"a": 0.5, "b": 0.5})
    with pytest.raises(ValueError, match="'pcgrad' learns from the losses of its steps alone"):
        gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.1)).update([1.0, 1.0])
    with pytest.raises(ValueError, match="method 'cr_mogm' learns from the losses of its steps alone"):
        gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "cr_mogm").update([1.0, 1.0])
    averaged = gradsurgery.methods.get("cr_mogm", method="dtp")
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), averaged)
    optimizer.backward(two_losses(net, X))
    copy.deepcopy(optimizer).update([0.2, 0.9])
    assert not averaged.method.state_dict()["updated"]
    optimizer.update([0.2, 0.9])
    assert averaged.method.state_dict()["kpis"].tolist() == [0.2, 0.9]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize("method", ["sum", "mgda"])
def test_a_parameter_that_a_group_holds_twice_counts_once(method):
    results, start = [], two_task_net()
    for extra in ([], ["trunk", "a"]):
        net = copy.deepcopy(start)
        doubles = [p for name in extra for p in net[name].parameters()]
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([*net.parameters(), *doubles], lr=0.1), method)
        for _ in range(2):  # first into new gradients, then added to them
            info = optimizer.backward(two_losses(net, X))
        results.append([info.weights, *grads_of(net)])
    torch.testing.assert_close(*results)


def test_code_for_the_common_wrappers_runs():
    net = two_task_net()
    optimizer = gradsurgery.PCGrad(torch.optim.Adam(net.parameters()), reduction="mean")
    losses = two_losses(net, X)
    optimizer.zero_grad()
    optimizer.pc_backward(losses)
    optimizer.step()
    assert optimizer.optimizer.state


def test_schedulers():
    net = two_task_net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=1.0))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    warmup = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(two_losses(net, X))
        optimizer.step()
        scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.125
    for _ in range(3):
        warmup.step(1.0)
    assert optimizer.optimizer.param_groups[0]["lr"] < 0.02


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "gradnorm", "fairgrad", "nash_mtl", "upgrad"])
def test_grad_scaler(method):
    results = []
    for scale in (None, 1024.0, 2.0**20):
        torch.manual_seed(3)
        net = two_task_net(torch.float64)
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale or 1.0, enabled=scale is not None)
        for _ in range(3):
            optimizer.zero_grad()
            info = optimizer.backward(two_losses(net, X.double()), scaler=scaler)
            factor = 1 if scale is None else scale
            scaled = torch.cat([p.grad.reshape(-1) for p in net["trunk"].parameters()]).norm()
            torch.testing.assert_close(scaled / factor, info.update_norm)
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        results.append(([p.detach() for p in net.parameters()], info.gram))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other)


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "gradnorm"])
def test_scaler_skips_a_step_that_overflowed(method):
    net = two_task_net()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    before = [p.detach().clone() for p in net.parameters()]
    for bad in (torch.inf, torch.nan, 1.0):
        optimizer.zero_grad()
        a, b = two_losses(net, X)
        info = optimizer.backward([a, b * bad], scaler=scaler)
        assert info.finite == (bad == 1.0)
        assert all(p.grad.isnan().all() != (bad == 1.0) for p in net["trunk"].parameters())
        unchanged = all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        assert unchanged
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 256.0
    assert not torch.equal(net["a"].weight, before[-4])
    assert all(p.isfinite().all() for p in net.parameters())


def test_scaler_of_losses_whose_gradients_are_views():
    bias = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = gradsurgery.MGDA(torch.optim.SGD([bias], lr=0.1))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0)
    info = optimizer.backward([bias.sum(), (bias - 1).sum()], scaler=scaler)
    assert info.gram.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    assert bias.grad.tolist() == [4.0, 4.0, 4.0]


def test_autocast_low_precision_parameters():
    net = two_task_net(torch.bfloat16)
    net["a"].float()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(net.parameters(), lr=0.05))
    z = net["trunk"](X.bfloat16()).tanh()
    info = optimizer.backward([(net["a"](z.float()) - 1).square().mean(), (net["b"](z) + 1).square().mean().float()])
    assert net["trunk"][0].weight.grad.dtype == torch.bfloat16
    assert net["a"].weight.grad.dtype == torch.float32
    assert info.gram.dtype == torch.float64


def test_same_seed_same_run():
    runs = []
    for global_seed in (1, 2):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(7))
        targets = torch.randn(6, 7)
        optimizer = gradsurgery.PCGrad(torch.optim.SGD([weight], lr=0.1), seed=11)
        torch.manual_seed(global_seed)
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.backward(list((targets @ weight).sin()))
            optimizer.step()
        runs.append(weight.detach())
    assert torch.equal(*runs)


@pytest.mark.interpreted(0)
def test_no_second_copy_of_the_task_gradients(backend):
    tasks, elements = 6, 1 << 20
    weights = [torch.nn.Parameter(torch.randn(elements)) for _ in range(4)]
    targets = torch.randn(tasks)
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(weights, lr=0.1), backend=backend)
    optimizer.collect([sum((weight * target).mean() for weight in weights) for target in targets])
    peak = peak_bytes(optimizer.combine, weights[0].device)
    direction = 4 * 4 * elements
    # The cpu and cuda backends write the direction over gradients; the reference makes float64 copies, one parameter at
    # a time.
    allowed = {"reference": 3, "triton": 1.02}.get(backend, 0.02)
    assert peak <= allowed * direction


def test_nothing_to_train_is_warned_of():
    old, net = two_task_net(), two_task_net()
    for method in ("mgda", "uw"):
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(old.parameters(), lr=0.1), method)
        optimizer.backward(two_losses(old, X))  # no warning
        with pytest.warns(UserWarning, match="these losses depend on no parameter of the optimizer") as warned:
            optimizer.backward(two_losses(net, X))
        assert warned[0].filename == __file__
    optimizer = gradsurgery.MGDA(torch.optim.SGD(old.parameters(), lr=0.1))
    optimizer.collect([two_losses(net, X)[0], None])
    optimizer.collect([None, two_losses(old, X)[1]])
    optimizer.combine()  # no warning
    optimizer.collect(two_losses(net, X))
    with pytest.warns(UserWarning, match="these losses depend on no parameter of the optimizer") as warned:
        optimizer.combine()
    assert warned[0].filename == __file__
    for p in old.parameters():
        p.requires_grad_(False)
    gradsurgery.MGDA(torch.optim.SGD(old.parameters(), lr=0.1)).backward(two_losses(net, X))  # no warning: frozen


def test_optimizers_with_methods_of_other_signatures():
    class Sophia(torch.optim.SGD):
        def zero_grad(self):
            super().zero_grad()

        def step(self, closure=None, *, bs):
            self.bs = bs
            return super().step(closure)

    net = two_task_net()
    optimizer = gradsurgery.PCGrad(Sophia(net.parameters(), lr=0.1))
    optimizer.zero_grad()
    optimizer.backward(two_losses(net, X))
    optimizer.step(bs=64)
    assert optimizer.optimizer.bs == 64
    assert optimizer.step(lambda: 5, bs=65) == 5
    optimizer.zero_grad()
    assert grads_of(net) == [None] * len(grads_of(net))


def test_gradients_of_a_subclass_of_parameters_are_plain():
    class Weight(torch.Tensor):
        """A class like that of quantised weights: no float tensor can be made by ``empty_like`` or ``zeros_like``."""

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func in (torch.empty_like, torch.zeros_like):
                raise NotImplementedError
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))

    p = torch.linspace(-1, 1, 12).reshape(4, 3).as_subclass(Weight)
    p.requires_grad_()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([p], lr=0.1))
    for accumulate in (False, False, True):
        if not accumulate:
            optimizer.zero_grad()
        optimizer.backward([(X[:, :4] @ p).sum(), -(X[:, 2:] @ p).square().sum()])
        assert type(p.grad) is torch.Tensor
        optimizer.step()


def test_a_task_that_reaches_nothing_shared_leaves_mgda_nothing_to_train():
    net, own = two_task_net(), torch.nn.Linear(6, 1)
    x = torch.linspace(-1, 1, 48).reshape(8, 6)
    optimizer = gradsurgery.MGDA(torch.optim.SGD([*net.parameters(), *own.parameters()], lr=0.1))
    optimizer.backward([*two_losses(net, x), own(x).square().mean()])
    assert not any(p.grad.any() for p in net["trunk"].parameters())
    assert all(p.grad.any() for p in (*net["a"].parameters(), *own.parameters()))
    groups = [{"params": net["trunk"][0].parameters()}, {"params": net["trunk"][2].parameters()}]
    optimizer = gradsurgery.MGDA(torch.optim.SGD(groups, lr=0.1), granularity="per_group")
    optimizer.zero_grad()
    optimizer.backward([*two_losses(net, x), net["trunk"][0](x).square().mean()])
    assert net["trunk"][0].weight.grad.any()
    assert not net["trunk"][2].weight.grad.any()


@pytest.mark.parametrize("method", ["cagrad", "nash_mtl", "fairgrad", "pcgrad"])
def test_a_single_loss_is_scaled_with_its_head(method):
    net = two_task_net()
    loss = two_losses(net, torch.linspace(-1, 1, 48).reshape(8, 6))[0]
    (plain,) = torch.autograd.grad(loss, net["a"].weight, retain_graph=True)
    gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), method).backward([loss])
    ratio = net["a"].weight.grad / plain
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio))
    assert (abs(ratio[0, 0] - 1) < 1e-5) == (method == "pcgrad")
