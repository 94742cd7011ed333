# SPDX-License-Identifier: MIT
"""Launch parameters of the streaming kernels, by stage, arithmetic, padded number of tasks and size of an element.

The table is fixed, so that a shape's results have the same bits in every process. With
``GRADSURGERY_TRITON_AUTOTUNE=1`` each entry is measured once per process and device instead, on random data; the
blocks may differ then, and with them the last bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch

from ..._compiling import capturing


class Config(NamedTuple):
    """One way to launch a kernel."""

    block: int
    """Columns that a program takes at a time."""
    num_warps: int
    num_stages: int = 3


# (arithmetic, padded number of tasks, bytes of an element)
_GRAM = {
    **{("rows", 1, size): Config(4096 // size, 1) for size in (2, 4, 8)},
    **{("rows", 2, size): Config(2048 // size, 1) for size in (2, 4, 8)},
    **{("rows", tasks, size): Config(1024 // size, 1) for tasks in (3, 4) for size in (2, 4, 8)},
    **{("rows", tasks, size): Config(512 // size, 1) for tasks in (5, 6, 7, 8) for size in (2, 4, 8)},
    ("float64", 16, 4): Config(64, 1),
    ("float64", 16, 8): Config(32, 1),
    ("float64", 32, 4): Config(64, 2),
    ("float64", 32, 8): Config(32, 2),
    **{("float64", tasks, 4): Config(32, 4) for tasks in (64, 128)},
    **{("float64", tasks, 8): Config(16, 4) for tasks in (64, 128)},
    **{("float32", 16, size): Config(64, 1, 4) for size in (2, 4)},
    **{("float32", 32, size): Config(32, 2, 4) for size in (2, 4)},
    **{("float32", tasks, size): Config(32, 4) for tasks in (64, 128) for size in (2, 4)},
}
COMBINE = Config(512, 4, 1)
_tuned: dict[tuple[object, ...], Config] = {}


def gram_config(arithmetic: str, tasks: int, dtype: torch.dtype) -> Config:
    """Return the fixed configuration of the Gram kernel."""
    return _GRAM[arithmetic, tasks, dtype.itemsize]


def measured(
    key: tuple[object, ...], device: torch.device, fixed: Config, prepare: Callable[[], Callable[[Config], None]]
) -> Config:
    """Return ``fixed``, or where the user asks for measurement the fastest configuration near it.

    ``prepare`` makes the data, and returns what launches a configuration.
    """
    if os.environ.get("GRADSURGERY_TRITON_AUTOTUNE") != "1":
        return fixed
    key = (*key, device)
    if key not in _tuned:
        if capturing(device):
            return fixed
        run = prepare()
        _tuned[key] = min(candidates(fixed), key=lambda config: _milliseconds(run, config))
    return _tuned[key]


def candidates(fixed: Config) -> list[Config]:
    """Return configurations with half to twice the columns and warps, and 1 to 4 stages; ``fixed`` is among them."""
    blocks = [block for block in (fixed.block // 2, fixed.block, fixed.block * 2) if block >= min(16, fixed.block)]
    warps = dict.fromkeys([max(fixed.num_warps // 2, 1), fixed.num_warps, fixed.num_warps * 2])
    return [Config(*values) for values in product(blocks, warps, (1, 2, 3, 4))]


def _milliseconds(run: Callable[[Config], None], config: Config) -> float:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    try:
        return float(do_bench(lambda: run(config), return_mode="median"))
    except OutOfResources:
        return float("inf")
