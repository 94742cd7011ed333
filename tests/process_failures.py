# SPDX-License-Identifier: MIT
"""What test_distributed.py has two processes do after one of them failed, or without losses on one of them."""

from functools import partial
from unittest import mock

import pytest
import torch
from torch import distributed

from inputs import DEVICE
from process_cases import result
from process_nets import BATCHES, WORLD, Net, alone, gradients, group_alone, on_each, sharded, wrap


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


def update(attempt):
    attempt.run = lambda: attempt.optimizer.update([1.0, "two", 3.0])


def updating(attempt):
    attempt.run = lambda: attempt.optimizer.update([1.0, 2.0, 3.0])


def collecting(attempt):
    attempt.run = lambda: (attempt.optimizer.collect(attempt.losses), attempt.optimizer.combine())


def after_failures(spoil, method="pcgrad", make=Net, others=None, **how):
    """Train for some steps, each after one that failed on one process, and then on both."""
    net = make()
    optimizer = wrap(net, method)
    for t, x in enumerate(BATCHES):
        if not alone():
            before = result(net) + gradients(net)
            rank, fails_on = distributed.get_rank(), t % WORLD
            attempt = Attempt(net, optimizer, x[rank], **how)
            if rank == fails_on:
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
            attempt = Attempt(net, optimizer, x[rank], **how)
            spoil(attempt)
            with pytest.raises((ArithmeticError, TypeError, ValueError)):
                attempt.run()
        losses = on_each(net, lambda rank, x=x: Attempt(net, optimizer, x[rank]).losses)
        info = optimizer.backward(losses)
        optimizer.step()
        optimizer.zero_grad()
    return result(net, info)


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
    }
