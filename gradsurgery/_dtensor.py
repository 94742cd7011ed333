# SPDX-License-Identifier: MIT
"""Parameters and gradients that are spread over processes, and this process's parts of them."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(parameter, "device_mesh")


def local_part(tensor: Any) -> Tensor:
    """Return this process's part of a DTensor; another tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[no-any-return]


def part_of(grad: Any, parameter: Any) -> Tensor:
    """Return this process's part of a parameter's gradient, which may still have to be summed over processes."""
    if not is_sharded(grad):
        return grad  # type: ignore[no-any-return]
    if not is_sharded(parameter):
        return grad.full_tensor()  # type: ignore[no-any-return]
    if grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    return local_part(grad)


def as_dtensor(part: Tensor, parameter: Any) -> Tensor:
    """Return this process's part as a DTensor like the parameter, if that is one."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor  # here, because it takes a second; with shards it is loaded already

    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
