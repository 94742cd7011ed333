# SPDX-License-Identifier: MIT
"""Surgery on parameters that ``torch.distributed.fsdp.fully_shard`` has spread over processes.

Its hooks average each task's gradient and leave this process its shard. So G is the sum over the processes of their
shards' products, T x T numbers, and each combines its own shard; no process ever has a whole average.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from ._gradients import is_sharded
from .collect import Collected
from .distributed import Replicas, check_same
from .methods import Method


def processes_of(group: Any, parameters: list[Tensor], method: Method) -> Replicas | Shards:
    """Return the processes that train the parameters together by a method.

    Raises:
        TypeError, ValueError: as :class:`Replicas` and :meth:`Shards.check` do; a group beside sharded parameters;
            parameters of FullyShardedDataParallel, which keeps their gradients elsewhere.
    """
    sharded = [p for p in parameters if is_sharded(p)]
    if any(hasattr(p, "_fsdp_flattened") for p in parameters):
        raise TypeError("parameters must not be those of FullyShardedDataParallel, got some: use fully_shard")
    if not sharded:
        return Replicas(group, method)
    if group is not None:
        raise ValueError("process_group must be None for sharded parameters, which name their processes")
    shards = Shards(sharded[0], method)
    shards.check(parameters)
    return shards


class Shards:
    """The processes that sharded parameters are spread over.

    Args:
        like: one of the parameters.
        method: the method, whose random numbers must be the same everywhere.
    """

    def __init__(self, like: Any, method: Method) -> None:
        self.mesh = like.device_mesh
        self.dims = _sharded_dims(like)
        self.shards = self
        self.method = method

    def check(self, parameters: Iterable[Any]) -> None:
        """Raise TypeError for a parameter that is not sharded over the same processes, as ``fully_shard`` does it."""
        for p in parameters:
            if not is_sharded(p):
                raise TypeError(
                    f"all parameters must be sharded or none, got one of shape {tuple(p.shape)} that is not: "
                    "fully_shard the module that holds it, and wrap the optimizer before the model first runs"
                )
            if p.device_mesh != self.mesh or _sharded_dims(p) != self.dims:
                raise TypeError(
                    "all parameters must be sharded over the same processes, as fully_shard does it, got placements "
                    f"{p.placements} of {p.device_mesh} beside shards over dimensions {self.dims} of {self.mesh}"
                )

    def total(self, gram: Tensor) -> Tensor:
        """Return G of whole gradients from that of their shards, which it is written over."""
        for dim in self.dims:
            distributed.all_reduce(gram, group=self.mesh.get_group(dim))
        return gram

    def local(self, parameters: list[Any]) -> list[Tensor]:
        """Return this process's shards, with the shards of ``.grad`` as theirs."""
        shards = []
        for p in parameters:
            shard = p.to_local().detach()
            shard.grad = None if p.grad is None else p.grad.to_local()
            shards.append(shard)
        return shards

    def assign(self, parameters: list[Any], local: list[Tensor], grads: list[Tensor]) -> None:
        """Make each gradient the shard of its parameter's ``.grad``."""
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = _spread(grad, p)

    def spread(self, surgery: dict[str, Any], parameters: list[Any]) -> dict[str, Any]:
        """Return a method's state with the shards of the gradients that it keeps, of these parameters, as DTensors."""
        kept = [[_spread(b, p) for b, p in zip(row, parameters, strict=True)] for row in surgery["buffers"]]
        return {**surgery, "buffers": kept}

    def gathered(self, surgery: dict[str, Any]) -> dict[str, Any]:
        """Return what :meth:`spread` took."""
        kept = surgery.get("buffers")
        if kept is None:
            return surgery
        return {**surgery, "buffers": [[b.to_local() if is_sharded(b) else b for b in row] for row in kept]}

    def average(self, collected: Collected) -> Collected:
        """Return the same with the losses' averages, for the gradients are averages already."""
        return replace(collected, losses=self.average_losses(collected.tasks, collected.losses))

    def average_gradients(self, collected: Collected) -> Collected:
        """Return the same, for the gradients are averages already."""
        return collected

    def average_losses(self, tasks: list[str], losses: Tensor) -> Tensor:
        """Return the averages of losses [T], whose tasks are known to be the same on every process."""
        losses = losses / self.mesh.size()
        for group in self._groups():
            distributed.all_reduce(losses, group=group)
        return losses

    def check_same(self, tasks: list[str], device: torch.device) -> None:
        """Raise ValueError, on every process, unless all have losses of these tasks and the method's seed."""
        check_same(tasks, self.method, self._groups(), device)

    def _groups(self) -> list[Any]:
        return [self.mesh.get_group(dim) for dim in range(self.mesh.ndim)]


def _spread(shard: Tensor, parameter: Any) -> Tensor:
    from torch.distributed.tensor import DTensor  # which takes a second, and whoever has shards has it

    return DTensor.from_local(
        shard,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _sharded_dims(parameter: Any) -> list[int]:
    return [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
