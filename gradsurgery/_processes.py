# SPDX-License-Identifier: MIT
"""What surgery on one process says to programs of several."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor, distributed


def check_parameters(groups: Iterable[dict[str, Any]]) -> None:
    """Raise TypeError for parameters that are spread over processes."""
    for group in groups:
        given = group["params"]
        for p in [given] if isinstance(given, Tensor) else given:
            if hasattr(p, "to_local"):
                raise TypeError(
                    f"parameters must lie on one process, got a {type(p).__name__} of shape {tuple(p.shape)}, as "
                    "fully_shard or a parallel plan makes them"
                )


def warn_of_others() -> None:
    """Warn where there are other processes: nothing keeps their parameters equal."""
    count = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if count > 1:
        warnings.warn(
            f"surgery runs on one process: no gradients are averaged over the {count} that there are, also under "
            "DistributedDataParallel, by whose hooks its backward passes go",
            stacklevel=3,
        )
