# SPDX-License-Identifier: MIT
"""The cases of test_distributed.py that need two processes: process groups, and errors in both processes."""

import copy
from functools import partial

import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import gradsurgery
from inputs import DEVICE
from process_nets import BATCHES, WORLD, Net, gradients, parallel, sharded, sharding_later, wrap


def of_one_process():
    (group, _) = distributed.new_subgroups(1)
    return of_a_group(group)


def of_a_group(group):
    net = Net()
    optimizer = wrap(net, process_group=group)
    assert copy.deepcopy(optimizer)._processes.group is group
    optimizer.backward(net(BATCHES[0][distributed.get_rank()]))
    return gradients(net)


def of_another_group():
    # Both processes make both groups.
    groups = [distributed.new_group([rank]) for rank in range(WORLD)]
    wrap(Net(), process_group=groups[1 - distributed.get_rank()])


def other_tasks():
    net, rank = Net(), distributed.get_rank()
    optimizer = wrap(net)
    losses = net(BATCHES[0][rank])
    try:
        optimizer.backward(losses[: 2 + rank])
    finally:
        assert all(p.grad is None for p in net.parameters())
        assert optimizer._pending is None


def other_seeds(make=Net, name="pcgrad", **options):
    net, rank = make(), distributed.get_rank()
    wrap(net, gradsurgery.methods.get(name, seed=rank, **options)).backward(net(BATCHES[0][rank]))


def other_losses():
    net, rank = Net(), distributed.get_rank()
    wrap(net, "uw").backward(net(BATCHES[0][rank])[: 2 + rank])


def other_shapes():
    net = nn.Linear(3, 1 + distributed.get_rank())
    y = net(torch.ones(3)).sum()
    wrap(net).backward([y, -y])


def sparse():
    table = nn.Embedding(5, 3, sparse=distributed.get_rank() == 1)
    z = table(torch.tensor([0, 2]))
    wrap(table).backward([z.sum(), z.square().sum()])


def fewer_parameters():
    net, rank = Net(), distributed.get_rank()
    parameters = [*net.parameters()][rank:]
    gradsurgery.PCGrad(torch.optim.SGD(parameters, lr=0.1)).backward(net(BATCHES[0][rank]))


def sharded_with(**options):
    wrap(sharded(), **options)


def whole_beside_parts():
    net = parallel()
    del net.group
    wrap(net)


def sharded_group():
    wrap(sharded(), process_group=distributed.group.WORLD)


def whole_among_shards():
    optimizer = wrap(sharded())
    try:
        optimizer.add_param_group({"params": iter([nn.Parameter(torch.ones(3))])})
    finally:
        assert len(optimizer.param_groups) == 1


def shard_among_whole():
    optimizer = wrap(Net())
    try:
        optimizer.add_param_group({"params": sharded().first.weight})
    finally:
        assert len(optimizer.param_groups) == 1


def shard_among_copies():
    """Add a parameter that is sharded over processes which, by the optimizer's process group, have the same parts."""
    optimizer = wrap(parallel((WORLD, 1)))
    try:
        optimizer.add_param_group({"params": sharded().first.weight})
    finally:
        assert len(optimizer.param_groups) == 1


def sharded_tasks(names):
    net, rank = sharded(), distributed.get_rank()
    optimizer = wrap(net, "uw" if len(names[0]) == 3 else "pcgrad")
    optimizer.backward(dict(zip(names[rank], net(BATCHES[0][rank]), strict=False)))


def absent_of_shards():
    net, rank = sharded(), distributed.get_rank()
    optimizer = wrap(net, "m_config")
    losses = net(BATCHES[0][rank])
    optimizer.backward([None, *losses[1:]] if rank == 0 else losses)


def sharded_later(method="pcgrad", **options):
    net = Net()
    optimizer = wrap(net, method, **{name: give(net) for name, give in options.items()})
    sharding_later(net, optimizer)
    optimizer.backward(net(BATCHES[0][distributed.get_rank()]))


def added_to_shards_later():
    net = Net()
    optimizer = wrap(net)
    sharding_later(net, optimizer)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})


def absent_everywhere():
    net = Net()
    optimizer = wrap(net)
    optimizer.collect([*net(BATCHES[0][distributed.get_rank()])[:2], None])
    optimizer.combine()


def no_losses_anywhere():
    wrap(Net(), "m_config").backward([None] * 3)


def held_back():
    net, rank = sharded(), distributed.get_rank()
    net.set_requires_gradient_sync(False)
    wrap(net).collect(net(BATCHES[0][rank]))


def flat():
    return FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=True)


def flat_shards():
    wrap(flat())


def flat_shards_later():
    wrap(Net()).add_param_group({"params": list(flat().parameters())})


def products_of_shards():
    gradsurgery.gram([[p.detach() for p in sharded().parameters()]] * 2)


def sharded_batched():
    net = sharded()
    wrap(net).backward(net(BATCHES[0][distributed.get_rank()]), mode="batched")


def sharded_representation():
    net, features = sharded(), []
    optimizer = wrap(net)
    net.heads[1].register_forward_pre_hook(lambda module, inputs: features.extend(inputs))
    losses = net(BATCHES[0][distributed.get_rank()])
    optimizer.backward(losses[:2], features=features, mode="representation")


def spread_loss():
    y = sharded().first.weight.square().sum()
    net = nn.Linear(2, 2)
    wrap(net).backward([net.weight.sum(), y])


def other_tasks_later(method, **way):
    net, rank = Net(), distributed.get_rank()
    optimizer = wrap(net, method)
    for names in ("ab", ("ab", "ba")[rank]):
        low, high = net.features(BATCHES[0][rank])
        losses = dict(zip(names, net.losses(low, high)[:2], strict=True))
        optimizer.backward(losses, **way, **({"features": high} if way else {}))


def other_tasks_of_an_update():
    net, rank = Net(), distributed.get_rank()
    optimizer = wrap(net, "famo")
    losses = dict(zip("abc", net(BATCHES[0][rank]), strict=True))
    optimizer.backward(losses)
    optimizer.update({name: losses[name].detach() for name in ("abc", "bac")[rank]})


GROUPS = {
    "of one process": of_one_process,
    "of a named group": lambda: of_a_group(distributed.group.WORLD),
    "of the default group": lambda: of_a_group(None),
}
ERRORS = {
    "of another group": of_another_group,
    "other tasks later": partial(other_tasks_later, "gradnorm"),
    "other tasks later, one pass": partial(other_tasks_later, "dwa"),
    "other tasks later, representation": partial(other_tasks_later, "gradnorm", mode="representation"),
    "other tasks": other_tasks,
    "other tasks of an update": other_tasks_of_an_update,
    "no tasks": lambda: wrap(Net()).backward([]),
    "no losses anywhere": no_losses_anywhere,
    "other seeds": other_seeds,
    "other seeds within": partial(other_seeds, name="cr_mogm", method="pcgrad"),
    "other losses": other_losses,
    "other shapes": other_shapes,
    "sparse": sparse,
    "absent everywhere": absent_everywhere,
    "fewer parameters": fewer_parameters,
}
if DEVICE == "cpu":
    ERRORS |= {
        "sharded graddrop": partial(sharded_with, method="graddrop"),
        "sharded in a group": sharded_group,
        "whole beside parts": whole_beside_parts,
        "whole among shards": whole_among_shards,
        "shard among whole": shard_among_whole,
        "shard among copies": shard_among_copies,
        "absent losses of shards": absent_of_shards,
        "seeds of shards": partial(other_seeds, sharded),
        "tasks of shards": partial(sharded_tasks, ("ab", "ba")),
        "losses of shards": partial(sharded_tasks, ("abc", "ab")),
        "graddrop sharded later": partial(sharded_later, "graddrop"),
        "whole among shards later": added_to_shards_later,
        "shared sharded later": partial(sharded_later, shared=lambda net: net.first.parameters()),
        "shards held back": held_back,
        "flat shards": flat_shards,
        "flat shards later": flat_shards_later,
        "products of shards": products_of_shards,
        "sharded batched": sharded_batched,
        "sharded representation": sharded_representation,
        "spread loss": spread_loss,
    }
