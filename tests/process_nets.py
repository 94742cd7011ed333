# SPDX-License-Identifier: MIT
"""The networks of test_distributed.py, spread over two processes in several ways, and their losses."""

from contextlib import nullcontext
from functools import cache

import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils.checkpoint import checkpoint

import gradsurgery
from gradsurgery import methods
from inputs import DEVICE, normal

WORLD = 2
BATCHES = normal(WORLD * 12, 5).reshape(3, WORLD, 4, 5)
OPTIONS = {"constant": {"task_weights": [0.5, 1.0, 2.0]}, "uw": {"lr": 0.5}, "gradnorm": {"lr": 0.1}}


class Net(nn.Module):
    """A trunk of two layers, and four heads: the third skips the second layer, and no loss reaches the fourth."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[0] if DEVICE == "cuda" else []):
            torch.manual_seed(1)
            self.first = nn.Linear(5, 7)
            self.second = nn.Linear(7, 7)
            self.heads = nn.ModuleList(nn.Linear(7, 1) for _ in range(4))
        self.double()

    def forward(self, x):
        return self.losses(*self.features(x))

    def features(self, x):
        low = self.first(x).tanh()
        return low, self.second(low).tanh()

    def losses(self, low, high):
        outputs = [self.heads[0](high), self.heads[1](high), self.heads[2](low)]
        return [(out - t).square().mean() + 0.1 for t, out in enumerate(outputs)]


def alone():
    return not distributed.is_initialized()


def on_each(net, losses):
    """Return the losses of this process's batch; if it is alone or sees both batches, the averages over both."""
    if not alone() and not getattr(net, "sees_both", False):
        return losses(distributed.get_rank())
    columns = zip(*(losses(rank) for rank in range(WORLD)), strict=True)
    present = [[loss for loss in column if loss is not None] for column in columns]
    return [sum(column) / len(column) if column else None for column in present]


def whole_of(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    return whole_of(tensor.detach()).clone()


def gradients(net):
    return [whole(p.grad) for p in net.parameters() if p.grad is not None]


def result(net, info=None):
    """Return the parameters, which of them have a gradient, and the step's G and weights if it has them."""
    found = [whole(p) for p in net.parameters()]
    found.append(torch.tensor([p.grad is not None for p in net.parameters()]))
    if info is not None:
        found += [value for value in (info._gram, info._weights) if value is not None]
    return found


def wrap(net, method="pcgrad", **options):
    if hasattr(net, "group"):
        options["process_group"] = net.group
    if isinstance(method, str):
        method = methods.get(method, **OPTIONS.get(method, {}))
    return gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), method, **options)


def sharded(mesh=None):
    """Return a net whose parameters are spread over the processes."""
    net = Net()
    if not alone():
        mesh = None if mesh is None else init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "shards"))
        spread_over(net, mesh or init_device_mesh("cpu", (WORLD,)))
    return net


def sharding_later(net, optimizer):
    names = {id(p): name for name, p in net.named_parameters()}
    spread_over(net, init_device_mesh("cpu", (WORLD,)))
    parts = dict(net.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [parts[names[id(p)]] for p in group["params"]]


def spread_over(net, mesh):
    for module in (net.first, net.second, net.heads[0], net):
        fully_shard(module, mesh=mesh)


@cache
def group_alone():
    return distributed.new_subgroups(1)[0]


def parallel(mesh=(1, WORLD), shard=False):
    """Return a net with a tensor-parallel trunk; each process has the heads. ``shard``: all is sharded as well."""
    net = Net()
    if alone():
        return net
    grid = init_device_mesh("cpu", mesh, mesh_dim_names=("shards", "parts"))
    net.sees_both = grid.size(1) > 1
    parallelize_module(net.first, grid["parts"], ColwiseParallel(output_layouts=Replicate()))
    parallelize_module(net.second, grid["parts"], RowwiseParallel(input_layouts=Replicate()))
    if shard:
        spread_over(net, grid["shards"])
    else:
        net.group = group_alone() if net.sees_both else distributed.group.WORLD
    return net


def replicated(net):
    return net if alone() else nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)


class Recomputing(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net.losses(*checkpoint(self.net.features, x.clone().requires_grad_(), use_reentrant=True))


def recomputing(net):
    """Return a call with a reentrant checkpoint, inside ``no_sync``: otherwise DistributedDataParallel raises."""
    model = replicated(Recomputing(net))

    def call(x):
        with nullcontext() if alone() else model.no_sync():
            return model(x)

    return call
