# SPDX-License-Identifier: MIT
"""What test_distributed.py has two processes do where each lacks some losses, or all."""

from contextlib import suppress
from functools import partial
from unittest import mock

import torch

from inputs import DEVICE
from process_nets import BATCHES, Net, alone, on_each, result, wrap


def absent_losses(method="m_config", again=False, in_backward=False):
    """Each process lacks another loss, and then both the same; ``again``, after a failure amid each step."""
    net = Net()
    optimizer = wrap(net, method)
    lacks_one = optimizer.method.takes_absent
    for x, absent in zip(BATCHES, [(0, 1), (2, 2) if lacks_one else (2, 1), (0, None)], strict=True):

        def losses(rank, x=x, absent=absent):
            return [None if t == absent[rank] else loss for t, loss in enumerate(net(x[rank]))]

        if in_backward:
            optimizer.backward(on_each(net, losses))
        else:
            optimizer.collect(on_each(net, losses))
            if again:
                with mock.patch("gradsurgery._operate.read", side_effect=MemoryError), suppress(MemoryError):
                    optimizer.combine()
            optimizer.combine()
        optimizer.step()
    return result(net)


def absent_at_first():
    """A step fails for a task that no process has, and goes on with what was collected before."""
    net = Net()
    optimizer = wrap(net)

    def collect(lost):
        optimizer.collect(
            on_each(
                net, lambda rank: [None if t in lost[rank] else loss for t, loss in enumerate(net(BATCHES[0][rank]))]
            )
        )

    collect([(1, 2), (0, 2)])
    with suppress(ValueError):
        optimizer.combine()
    collect([(1,), (0,)])
    return result(net, optimizer.combine())


def without_losses(method, in_backward=True, scaler=None, features=False, **how):
    """In one step a process has no loss at all, as where its data has ended, and another one in the next."""
    net = Net()
    optimizer = wrap(net, method)
    scaler = scaler and torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for x, lacks in zip(BATCHES, [((), (0, 1, 2)), ((0, 1, 2), ()), ((1,), (0, 2))], strict=True):
        kept = []

        def losses(rank, x=x, lacks=lacks, kept=kept):
            low, high = net.features(x[rank])
            if not alone() or len(lacks[rank]) < 3:
                kept.append(low)
            return [None if t in lacks[rank] else loss for t, loss in enumerate(net.losses(low, high))]

        if in_backward:
            each = on_each(net, losses)
            info = optimizer.backward(each, scaler=scaler, **({"features": kept} if features else {}), **how)
        else:
            optimizer.collect(on_each(net, losses), scaler=scaler, **how)
            info = optimizer.combine()
        optimizer.step()
    return result(net, info)


LOSSES = {
    **{f"absent losses {name}": partial(absent_losses, name) for name in ("gradnorm", "m_config", "pcgrad", "uw")},
    "absent losses in backward": partial(absent_losses, "mgda", in_backward=True),
    "absent losses again": partial(absent_losses, again=True),
    "absent losses, failed": absent_at_first,
    **{f"no losses {name}": partial(without_losses, name) for name in ("gradnorm", "m_config", "mgda")},
    "no losses, batched": partial(without_losses, "pcgrad", mode="batched"),
    "no losses, features": partial(without_losses, "mgda", features=True),
    "no losses, features batched": partial(without_losses, "mgda", features=True, mode="batched"),
    "no losses, scaled": partial(without_losses, "pcgrad", scaler=True),
    "no losses, collected": partial(without_losses, "uw", in_backward=False),
}
