# SPDX-License-Identifier: MIT
"""The cases of test_distributed.py in which each of two processes lacks some losses, or all."""

from contextlib import suppress
from functools import partial
from unittest import mock

import torch

from inputs import DEVICE
from process_nets import BATCHES, Net, alone, on_each, result, wrap

EACH_ONE = [((0,), (1,)), ((2,), (1,)), ((0,), ())]
BOTH_ONE = [((0,), (1,)), ((2,), (2,)), ((0,), ())]
ALL = [((), (0, 1, 2)), ((0, 1, 2), ()), ((1,), (0, 2))]


def lacking(lacks, method="m_config", again=False, collected=False, scaler=None, by_features=False, **how):
    """Train while process r lacks the losses ``lacks[step][r]``: all of them, if its data has ended.

    ``again``: in each step ``combine`` fails once, and is called again.
    """
    net = Net()
    optimizer = wrap(net, method)
    scaler = scaler and torch.amp.GradScaler(DEVICE, init_scale=4.0)
    for x, absent in zip(BATCHES, lacks, strict=True):
        features = []

        def losses(rank, x=x, absent=absent, features=features):
            low, high = net.features(x[rank])
            if not alone() or len(absent[rank]) < 3:  # a feature that no loss depends on is an error
                features.append(low)
            return [None if t in absent[rank] else loss for t, loss in enumerate(net.losses(low, high))]

        each = on_each(net, losses)
        if by_features:
            how["features"] = features
        if collected:
            optimizer.collect(each, scaler=scaler, **how)
            if again:
                with mock.patch("gradsurgery._operate.read", side_effect=MemoryError), suppress(MemoryError):
                    optimizer.combine()
            info = optimizer.combine()
        else:
            info = optimizer.backward(each, scaler=scaler, **how)
        optimizer.step()
    return result(net, info)


def absent_at_first():
    """``combine`` fails as no process has a loss of task 2; the step then goes on with what was collected before."""
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


LOSSES = {
    "absent losses m_config": partial(lacking, BOTH_ONE, collected=True),
    "absent losses again": partial(lacking, BOTH_ONE, collected=True, again=True),
    **{
        f"absent losses {name}": partial(lacking, EACH_ONE, name, collected=True)
        for name in ("gradnorm", "pcgrad", "uw")
    },
    "absent losses in backward": partial(lacking, EACH_ONE, "mgda"),
    "absent losses, failed": absent_at_first,
    **{f"no losses {name}": partial(lacking, ALL, name) for name in ("gradnorm", "m_config", "mgda")},
    "no losses, batched": partial(lacking, ALL, "pcgrad", mode="batched"),
    "no losses, features": partial(lacking, ALL, "mgda", by_features=True),
    "no losses, features batched": partial(lacking, ALL, "mgda", by_features=True, mode="batched"),
    "no losses, scaled": partial(lacking, ALL, "pcgrad", scaler=True),
    "no losses, collected": partial(lacking, ALL, "uw", collected=True),
}
