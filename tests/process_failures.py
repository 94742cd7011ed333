# SPDX-License-Identifier: MIT
"""What test_distributed.py has two processes do after one of them failed, or without losses on one of them."""

import time
from functools import partial
from unittest import mock

import pytest
import torch
from torch import distributed
from torch.distributed.nn.functional import all_reduce

from inputs import DEVICE
from process_cases import result
from process_nets import BATCHES, WORLD, Net, alone, gradients, group_alone, on_each, sharded, sharding_later, wrap


def fail(grad):
    raise ArithmeticError("in a pass")


class Attempt:
    """The losses of this process's batch, of which one process spoils something, and a step of these."""

    def __init__(self, net, optimizer, x, **how):
        self.net, self.optimizer, self.how = net, optimizer, how
        with mock.patch.object(net, "losses", self.see):
            self.losses = net(x)
        if how.get("mode") == "representation":
            self.losses = self.losses[:2]
            how["features"] = self.high

    def see(self, low, high):
        self.low, self.high = low, high
        return Net.losses(self.net, low, high)

    def run(self):
        self.optimizer.backward(self.losses, **self.how)


def loss(attempt):
    attempt.losses[1] = attempt.losses[1].detach()


def kind_of_losses(attempt):
    attempt.losses = 3


def option(attempt):
    attempt.how["mode"] = "none"


def upper_pass(attempt):
    attempt.high.register_hook(fail)


def lower_pass(attempt):
    attempt.low.register_hook(fail)


def combining(attempt):
    """This process has collected nothing, as after an error in ``collect``."""
    attempt.run = attempt.optimizer.combine


def collection(attempt):
    loss(attempt)
    attempt.run = lambda: attempt.optimizer.collect(attempt.losses)


def update(attempt):
    attempt.run = lambda: attempt.optimizer.update([1.0, "two", 3.0])


def updating(attempt):
    attempt.run = lambda: attempt.optimizer.update([1.0, 2.0, 3.0])


def collecting(attempt):
    attempt.run = lambda: (attempt.optimizer.collect(attempt.losses), attempt.optimizer.combine())


def after_failures(spoil, method="pcgrad", make=Net, others=None, later=None, **how):
    """Train for some steps, each after one that failed on one process, and then on both.

    ``later`` shards the net after it was wrapped.
    """
    net = make()
    optimizer = wrap(net, method)
    if later is not None and not alone():
        later(net, optimizer)
    # That passes of copies do not wait for others is known after the first step.
    for t, x in enumerate(BATCHES):
        if not alone() and (t > 0 or getattr(net.first.weight, "placements", None)):
            fail_once(net, optimizer, spoil, others, x[distributed.get_rank()], t % WORLD, how)
        losses = on_each(net, lambda rank, x=x: Attempt(net, optimizer, x[rank]).losses)
        info = optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
    return result(net, info)


def fail_once(net, optimizer, spoil, others, x, fails_on, how):
    before = result(net) + gradients(net)
    attempt = Attempt(net, optimizer, x, **how)
    if distributed.get_rank() == fails_on:
        spoil(attempt)
        with pytest.raises((ArithmeticError, TypeError, ValueError)):
            attempt.run()
    else:
        if others is not None:
            others(attempt)
        with pytest.raises(RuntimeError, match="another process raised an error in this step"):
            attempt.run()
    assert all(map(torch.equal, before, result(net) + gradients(net)))
    optimizer.zero_grad()
    # An error of all is everyone's own.
    attempt = Attempt(net, optimizer, x, **how)
    spoil(attempt)
    with pytest.raises((ArithmeticError, TypeError, ValueError)):
        attempt.run()


def communicating():
    """Passes that may wait for others, as functions in Python can have them do, are not told of an error."""
    if alone():
        return []
    net, rank = Net(), distributed.get_rank()
    optimizer, x = wrap(net, "mgda"), BATCHES[0][rank]

    def losses():
        low, high = net.features(x)
        return net.losses(low, all_reduce(high))

    optimizer.backward(losses())
    each = losses()
    if rank == 0:
        begin = time.monotonic()
        with pytest.raises(ValueError, match="has no graph"):
            optimizer.backward([each[0].detach(), *each[1:]])
        assert time.monotonic() - begin < 5
    optimizer.backward(each)  # which the other process has waited for
    return []


def failing_alone():
    """A process that nobody waits for raises what it raises, and waits for nobody."""
    if not alone() and distributed.get_rank() == 0:
        net = Net()
        with pytest.raises(ValueError, match="has no graph"):
            wrap(net, process_group=group_alone()).backward([net.first.weight.sum().detach()])
    return []


def without_losses(method, in_backward=True, scaler=None, **how):
    """In one step a process has no loss at all, as where its data has ended; in another it lacks one."""
    net = Net()
    optimizer = wrap(net, method)
    scaler = scaler and torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for x, lacks in zip(BATCHES, [((), (0, 1, 2)), ((0, 1, 2), ()), ((1,), (0, 2))], strict=True):

        def losses(rank, x=x, lacks=lacks):
            return [None if t in lacks[rank] else loss for t, loss in enumerate(net(x[rank]))]

        if in_backward:
            info = optimizer.backward(on_each(net, losses), scaler=scaler, **how)
        else:
            optimizer.collect(on_each(net, losses), scaler=scaler, **how)
            info = optimizer.combine()
        optimizer.step()
    return result(net, info)


FAILURES = {
    "after a loss": partial(after_failures, loss),
    "after losses of another kind": partial(after_failures, kind_of_losses),
    "after an option": partial(after_failures, option, "gradvac"),
    "after a pass": partial(after_failures, upper_pass, "gradnorm"),
    "after a batched pass": partial(after_failures, upper_pass, mode="batched"),
    "after a loss, one pass": partial(after_failures, loss, "uw"),
    "after a pass, one pass": partial(after_failures, upper_pass, "uw"),
    "after a pass above": partial(after_failures, upper_pass, mode="representation"),
    "after a pass below": partial(after_failures, lower_pass, mode="representation"),
    "after a pass below, by coordinates": partial(after_failures, lower_pass, "trimmed_mean", mode="representation"),
    "after a combination": partial(after_failures, combining, others=collecting),
    "after an update": partial(after_failures, update, "dtp", others=updating),
    "failing alone": failing_alone,
    "communicating passes": communicating,
    "no losses": partial(without_losses, "mgda"),
    "no losses, state": partial(without_losses, "gradnorm"),
    "no losses, batched": partial(without_losses, "pcgrad", mode="batched"),
    "no losses, scaled": partial(without_losses, "pcgrad", scaler=True),
    "no losses, buffers": partial(without_losses, "m_config"),
    "no losses, collected": partial(without_losses, "uw", in_backward=False),
}
if DEVICE == "cpu":
    FAILURES |= {
        "shards after a loss": partial(after_failures, loss, make=sharded),
        "shards after a loss, one pass": partial(after_failures, loss, "uw", make=sharded),
        "shards after a mode": partial(after_failures, option, make=sharded),
        "shards after a collection": partial(after_failures, collection, others=collecting, make=sharded),
        "sharded later, after a loss": partial(after_failures, loss, later=sharding_later),
        "sharded later, after a mode": partial(after_failures, option, "uw", later=sharding_later),
    }
