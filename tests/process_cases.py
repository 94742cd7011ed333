# SPDX-License-Identifier: MIT
"""The cases that test_distributed.py runs in two processes, and in one process that has both batches."""

import copy
import tempfile
from contextlib import nullcontext
from functools import partial

import torch
from torch import distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import gradsurgery
from gradsurgery import methods
from inputs import DEVICE, normal
from process_losses import LOSSES
from process_nets import (
    BATCHES,
    WORLD,
    Net,
    alone,
    gradients,
    group_alone,
    on_each,
    parallel,
    recomputing,
    replicated,
    result,
    sharded,
    sharding_later,
    whole,
    whole_of,
    wrap,
)

# One method of each kind, to try with sharded and with tensor-parallel parameters.
OF_SHARDS = ("cr_mogm", "db_mtl", "gradvac", "krum", "mgda", "moco", "pcgrad", "sdmgrad", "sum", "trimmed_mean", "uw")


def train(method="pcgrad", make=Net, model=lambda net: net, scaler=None, **how):
    """Train for some steps and return the result."""
    net = make()
    call, optimizer = model(net), wrap(net, method(net) if callable(method) else method)
    scaler = scaler and torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for x in BATCHES:
        optimizer.zero_grad()
        info = optimizer.backward(on_each(net, lambda rank, x=x: call(x[rank])), scaler=scaler, **how)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
    return result(net, info)


def resumed(make=Net):
    """Train with a method that has a state, and with momentum; take the last step from a checkpoint."""
    net = make()
    optimizer = wrap(net, "gradvac")
    for t, x in enumerate(BATCHES):
        if t == 2 and not alone():
            stored, surgery = get_optimizer_state_dict(net, optimizer), optimizer.method.state_dict()
            optimizer = wrap(net, "gradvac")
            set_optimizer_state_dict(net, optimizer, stored, options=StateDictOptions(strict=False))
            optimizer.method.load_state_dict(surgery)
        optimizer.zero_grad()
        info = optimizer.backward(on_each(net, lambda rank, x=x: net(x[rank])))
        optimizer.step()
    return result(net, info)


def through_files(state, net, method):
    """Return a state as a new process reads it from files, into that of an optimizer that has taken a step."""
    optimizer = wrap(net, method)
    optimizer.backward(on_each(net, lambda rank: net(BATCHES[-1][rank])))
    optimizer.step()
    found = optimizer.state_dict()
    with tempfile.TemporaryDirectory() as own:
        folders = [own]
        distributed.broadcast_object_list(folders)
        checkpoint.save(state, checkpoint_id=folders[0])
        checkpoint.load(found, checkpoint_id=folders[0])
        distributed.barrier()
    return found


def kept_and_resumed(method, make=Net, late=False, files=False):
    """Train with a method that keeps gradients; after the first step go on from a checkpoint.

    The last step of M-ConFIG has one loss, which does not reach a shared layer. ``late``: the optimizer that loads the
    checkpoint was wrapped before the parameters were sharded. ``files``: the checkpoint goes through files.
    """
    net = make()
    optimizer = wrap(net, method)
    for t, x in enumerate(BATCHES):
        if t == 1:
            stored = copy.deepcopy(optimizer.state_dict())
            if not alone():
                buffers = stored["surgery"][method]["buffers"]
                like = [isinstance(p, DTensor) for p in optimizer._planner.kept]
                assert all([isinstance(b, DTensor) for b in row] == like for row in buffers)
                assert make is Net or [whole(b).shape for b in buffers[0]] == [p.shape for p in optimizer._planner.kept]
                if files:
                    stored = through_files(stored, make(), method)
            optimizer = wrap(Net() if late else net, method)
            optimizer.param_groups[0]["params"] = list(net.parameters())
            optimizer.load_state_dict(stored)
        optimizer.zero_grad()
        losses = on_each(net, lambda rank, x=x: net(x[rank]))
        info = optimizer.backward([None, None, losses[2]] if t == 2 and method == "m_config" else losses)
        optimizer.step()
    return result(net, info)


def updated(method, make=Net):
    """Train with a method that also learns from the numbers that each process passes to ``update``."""
    net = make()
    optimizer = wrap(net, method)
    for x in BATCHES:
        optimizer.zero_grad()
        losses = on_each(net, lambda rank, x=x: net(x[rank]))
        optimizer.collect(losses)
        info = optimizer.combine()
        optimizer.step()
        optimizer.update([loss.detach() * (t + 1) / 4 for t, loss in enumerate(losses)])
    return [*result(net, info), *(v for v in optimizer.method.state_dict().values() if v.is_floating_point())]


def by_segments(granularity, make=Net):
    net = make()
    groups = [{"params": [*net.first.parameters()]}, {"params": [*net.second.parameters(), *net.heads.parameters()]}]
    group = getattr(net, "group", None)
    sgd = torch.optim.SGD(groups, lr=0.1)
    optimizer = gradsurgery.SurgeryOptimizer(sgd, "mgda", granularity=granularity, process_group=group)
    info = optimizer.backward(on_each(net, lambda rank: net(BATCHES[0][rank])))
    optimizer.step()
    return result(net, info)


def some_shared():
    """Parameters that the user does not name get plain sums, even if several losses reach them."""
    net = Net()
    optimizer = gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1), shared=net.first.parameters())
    info = optimizer.backward(on_each(net, lambda rank: net(BATCHES[0][rank])))
    return [*result(net, info), *gradients(net)]


def accumulated(make=Net):
    """Accumulate micro-batches with a gradient scaler, on top of gradients that are already in ``.grad``."""
    net = make()
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    optimizer = wrap(net, "cagrad")
    optimizer.backward(on_each(net, lambda rank: net(BATCHES[0][rank])), scaler=scaler)
    for x in BATCHES[1:]:
        optimizer.collect(on_each(net, lambda rank, x=x: net(x[rank])), scaler=scaler)
    info = optimizer.combine()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    scaler.step(optimizer)
    return [*result(net, info), whole(norm)]


def double_sampled(make=Net):
    net = make()
    optimizer = wrap(net, "modo")
    for x in BATCHES:
        optimizer.collect(on_each(net, lambda rank, x=x: net(x[rank])))
    return [*result(net, optimizer.combine()), *gradients(net)]


def by_features(mode):
    net = Net()
    if alone():
        info = wrap(net).backward(on_each(net, lambda rank: net(BATCHES[0][rank])[:2]))
    else:
        low, high = net.features(BATCHES[0][distributed.get_rank()])
        info = wrap(net).backward(net.losses(low, high)[:2], features=high, mode=mode)
    return [*result(net, info), *gradients(net)]


def by_representation(method):
    net, found = Net(), []
    optimizer = wrap(net, method)
    for x in BATCHES:
        features = []

        def losses(rank, x=x, features=features):
            low, high = net.features(x[rank])
            features.append(high)
            return net.losses(low, high)[:2]

        optimizer.zero_grad()
        info = optimizer.backward(on_each(net, losses), features=features, mode="representation")
        found += [*result(net, info), *gradients(net)]
        optimizer.step()
    return found


def different_reach():
    """The losses of the two processes reach different parameters, and first reach them in different orders."""
    net = Net()

    def losses(rank):
        low, high = net.features(BATCHES[0][rank])
        if rank == 0:
            return [net.heads[0](high).square().mean(), net.heads[1](low).square().mean(), low.sum()]
        return [low.square().mean(), net.heads[1](low).mean(), net.heads[2](low).mean()]

    optimizer = wrap(net)
    info = optimizer.backward(on_each(net, losses))
    optimizer.step()
    return result(net, info)


def sharded_later(method):
    """Wrap the optimizer before the model is sharded, then put the shards into its groups, as Accelerate does."""
    net = Net()
    optimizer = wrap(net, method)
    if not alone():
        sharding_later(net, optimizer)
    for x in BATCHES:
        optimizer.zero_grad()
        info = optimizer.backward(on_each(net, lambda rank, x=x: net(x[rank])))
        optimizer.step()
    return result(net, info)


def mixed():
    """Parameters of several dtypes and memory layouts; one has a gradient of another dtype."""
    torch.manual_seed(2)
    convolution = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
    net = nn.ModuleDict({"a": convolution, "b": nn.Linear(4, 4).bfloat16(), "c": nn.Linear(4, 4).double()})
    # Multiples of 1/8: 8 bits hold them, and their sums are exact.
    for p in net.parameters():
        p.data = p.data.mul(8).round().div(8)
    net["b"].bias.grad_dtype = torch.float32
    x = torch.randint(-2, 3, (WORLD, 2, 3, 2, 2)).float()

    def losses(rank):
        z = net["a"](x[rank]).flatten(1)
        y = net["b"](z.bfloat16().detach())
        return [z.sum(), (2 * z - y).sum(), (2 * y).sum() - z.sum()]

    info = wrap(net).backward(on_each(net, losses))
    return [info.gram, *gradients(net), torch.tensor(net["a"].weight.grad.stride())]


def summands():
    """A sequence is split: each process has a summand of a whole parameter's gradients, and of its ``.grad``."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 4)).double()
    if not alone():
        plan = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1)), "2": RowwiseParallel()}
        parallelize_module(net, init_device_mesh("cpu", (WORLD,)), plan)
    x = normal(8, 4).reshape(2, 4, 4)
    y = net(x if alone() else x.chunk(WORLD, 1)[distributed.get_rank()])
    losses = [y.square().mean(), (y - 1).square().mean(), y.sum()]
    losses[0].backward(retain_graph=True)
    assert alone() or net[0].weight.grad.placements[0].is_partial()
    info = wrap(net).backward(losses)
    return [info.gram, *gradients(net)]


def complex_parts():
    """A complex head, cut between processes, which no kernel reads; its gradients are added to ``.grad`` twice."""
    torch.manual_seed(3)
    net = nn.ModuleDict({"trunk": nn.Linear(4, 4).double(), "head": nn.Linear(4, 2, dtype=torch.complex128)})
    if not alone():
        mesh, plan = init_device_mesh("cpu", (WORLD,)), ColwiseParallel(output_layouts=Replicate())
        parallelize_module(net, mesh, {"trunk": plan, "head": plan})
    for _ in range(2):
        y = net["trunk"](normal(3, 4))
        wrap(net).backward([y.square().mean(), net["head"](y.to(torch.complex128)).abs().square().mean()])
    return gradients(net)


def whole_amid_parts():
    """A plain parameter that each process holds: the forward pass takes it for a DTensor, so its gradient is one."""
    torch.manual_seed(3)
    net = nn.ModuleDict({"trunk": nn.Linear(4, 4).double(), "head": nn.Linear(4, 1).double()})
    bias = nn.Parameter(torch.ones(4, dtype=torch.float64))
    if not alone():
        plan = ColwiseParallel(use_local_output=False)
        parallelize_module(net["trunk"], init_device_mesh("cpu", (WORLD,)), plan)
        net.group = group_alone()
    net.register_parameter("bias", bias)
    with nullcontext() if alone() else implicit_replication():
        y = whole_of(net["trunk"](normal(3, 4)) * bias)
        info = wrap(net).backward([y.square().mean(), net["head"](y).square().mean(), -y.sum()])
    return [info.gram, *gradients(net)]


def not_finite(make=Net):
    net = make()
    poison = torch.tensor([1.0, torch.inf], dtype=torch.float64)
    info = wrap(net).backward(on_each(net, lambda rank: [loss * poison[rank] for loss in net(BATCHES[0][rank])]))
    return [info.gram.isfinite(), *(g.isfinite() for g in gradients(net))]


def gradnorm_of_first(net):
    return methods.get("gradnorm", norm_parameters=[net.first.weight], lr=0.1)


WHOLE = {name: partial(train, name) for name in methods.available()} | LOSSES
WHOLE |= {
    "accumulated": accumulated,
    "scaler": partial(train, scaler=True),
    "DistributedDataParallel": partial(train, model=replicated),
    "recomputing": partial(train, model=recomputing),
    "batched": partial(train, mode="batched"),
    "features": partial(by_features, "sequential"),
    "features batched": partial(by_features, "batched"),
    **{f"representation {name}": partial(by_representation, name) for name in ("gradnorm", "mgda", "trimmed_mean")},
    "representation by losses": lambda: by_representation(methods.MGDA(normalization="loss")),
    "different reach": different_reach,
    "some shared": some_shared,
    "mixed": mixed,
}
SPREAD = {}
# Two processes on one GPU use gloo, which averages tensors on a GPU but does not shard them.
if DEVICE == "cpu":
    SPREAD |= {f"shards {name}": partial(train, name, sharded) for name in OF_SHARDS}
    SPREAD |= {f"parts {name}": partial(train, name, parallel) for name in OF_SHARDS}
    SPREAD |= {
        "shards accumulated": partial(accumulated, sharded),
        "sharded later": partial(sharded_later, "pcgrad"),
        "sharded later, one pass": partial(sharded_later, "uw"),
        "sharded later, resumed": partial(kept_and_resumed, "excess_mtl", sharded, late=True),
        "shards m_config from files": partial(kept_and_resumed, "m_config", sharded, files=True),
        "shards of copies": partial(train, "uw", partial(sharded, (WORLD, 1)), scaler=True),
        "shards accumulated of copies": partial(accumulated, partial(sharded, (WORLD, 1))),
        "shards of one copy": partial(train, make=partial(sharded, (1, WORLD)), scaler=True),
        "parts with summands": summands,
        "shards of parts": partial(train, "excess_mtl", partial(parallel, (WORLD, 1), shard=True)),
        "parts of shards": partial(train, "excess_mtl", partial(parallel, (1, WORLD), shard=True)),
        "copies of parts": partial(train, "excess_mtl", partial(parallel, (WORLD, 1))),
        "copies of parts, one pass": partial(train, "uw", partial(parallel, (WORLD, 1))),
        "complex parts": complex_parts,
        "whole amid parts": whole_amid_parts,
    }
for kind, make in {"": Net, **({"shards ": sharded, "parts ": parallel} if DEVICE == "cpu" else {})}.items():
    (SPREAD if kind else WHOLE).update(
        {
            f"{kind}gradnorm of first": partial(train, gradnorm_of_first, make),
            f"{kind}double sampled": partial(double_sampled, make),
            f"{kind}not finite": partial(not_finite, make),
            f"{kind}per group": partial(by_segments, "per_group", make),
            f"{kind}resumed": partial(resumed, make),
            f"{kind}m_config resumed": partial(kept_and_resumed, "m_config", make),
            f"{kind}excess_mtl resumed": partial(kept_and_resumed, "excess_mtl", make),
            f"{kind}famo updated": partial(updated, "famo", make),
            f"{kind}per tensor": partial(by_segments, "per_tensor", make),
        }
    )
