# SPDX-License-Identifier: MIT
"""Surgery on parameters that are spread over processes: by ``fully_shard``, tensor parallelism or both.

Each process has its part of every task gradient, which ``fully_shard``'s hooks have averaged. G is the sum over the
processes of the products of their parts, T x T numbers. Each process combines its own part; none ever has a whole
gradient. If several processes have copies of the same part, only one of them counts it in G.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import combinations
from math import prod
from typing import Any

import torch
from torch import Tensor, distributed

from ._collected import Collected
from ._dtensor import as_dtensor, is_sharded, local_part, part_of
from .distributed import Replicas, check_present, check_same
from .methods import Method


def processes_of(group: Any, parameters: list[Tensor], method: Method) -> Replicas | Shards:
    """Return the processes that train the parameters together by a method.

    Raises:
        TypeError, ValueError: as :class:`Replicas`, :meth:`Replicas.check` and :meth:`Shards.check` do.
    """
    if any(map(is_sharded, parameters)):
        return Shards(parameters, group, method)
    replicas = Replicas(group, method)
    replicas.check(parameters)
    return replicas


class Shards:
    """The processes that parameters are spread over.

    Args:
        parameters: DTensors; with a group also other tensors, of which every process has a copy.
        group: the processes that hold the same parts and have batches of their own. Gradients are averaged over them.
            None: only ``fully_shard``'s hooks average gradients.
        method: the method, whose random numbers must be the same everywhere.

    Raises:
        TypeError, ValueError: as :meth:`check` and :class:`Replicas` do.
    """

    alone = False
    """False, because other processes wait for this one."""

    hold_parts = True
    """Whether each process has only its part of the gradients."""

    def __init__(self, parameters: list[Any], group: Any, method: Method) -> None:
        self.method = method
        self._replicas = None if group is None else Replicas(group, method)
        # The dimensions of the meshes, by their processes, because each mesh makes process groups of its own.
        self._dims: dict[tuple[int, ...], tuple[Any, int]] = {}
        self._cut: set[tuple[int, ...]] = set()
        self.check(parameters)

    @property
    def shards(self) -> Shards:
        """This object; :class:`Replicas` has None in this place."""
        return self

    def check(self, parameters: Iterable[Any]) -> None:
        """Check more parameters, and remember the processes that hold them.

        Raises:
            TypeError: a parameter is not spread, and no group says whether its gradients are to be averaged; or the
                processes do not form the dimensions of one mesh, as for ``fully_shard`` and tensor parallelism.
            ValueError: the group has processes with other parts.
        """
        dims, cut = dict(self._dims), set(self._cut)
        for p in parameters:
            if not is_sharded(p):
                if self._replicas is None:
                    raise TypeError(
                        f"all parameters must be spread over processes or none, got one of shape {tuple(p.shape)} that "
                        "is not: fully_shard the module that holds it, and wrap the optimizer before the model first "
                        "runs; or, if tensor parallelism leaves it whole, pass as process_group= the processes with "
                        "the same parts and batches of their own, which may be this process alone"
                    )
                continue
            if any(placement.is_partial() for placement in p.placements):
                raise TypeError(f"parameters must be sharded or replicated, got placements {p.placements}")
            for dim in range(p.device_mesh.ndim):
                dims.setdefault(_ranks(p.device_mesh.get_group(dim)), (p.device_mesh, dim))
            cut |= _cut_by((p.device_mesh, p.placements))
        for these, those in combinations(dims, 2):
            if len(set(these) & set(those)) > 1:
                raise TypeError(
                    f"parameters must be spread over the dimensions of one mesh, got processes {these} and {those}"
                )
        if self._replicas is not None:
            replicas = _ranks(self._replicas.group)
            for ranks in dims:
                if len(set(ranks) & set(replicas)) > 1:
                    raise ValueError(
                        f"process_group must hold processes with the same parts, got {replicas}, where parameters are "
                        f"spread over {ranks}: leave it None if fully_shard did that"
                    )
        self._dims, self._cut = dims, cut

    def counted(self, parameters: Iterable[Any]) -> list[bool]:
        """Return for each whether this process's part counts in G; of several copies, the first process's counts."""
        first = {ranks for ranks in self._cut if ranks[0] == distributed.get_rank()}
        kinds = [(p.device_mesh, p.placements) if is_sharded(p) else None for p in parameters]
        count = {kind: self._cut - _cut_by(kind) <= first for kind in set(kinds)}
        return [count[kind] for kind in kinds]

    def total(self, gram: Tensor) -> Tensor:
        """Return G of whole gradients, computed in place from the G of the parts that count."""
        for ranks in self._dims:
            if ranks in self._cut:
                distributed.all_reduce(gram, group=self._group(ranks))
        return gram

    def local(self, parameters: list[Any]) -> list[Tensor]:
        """Return this process's parts of the parameters, each with its part of ``.grad`` as ``.grad``."""
        parts = []
        for p in parameters:
            part = _part(p)
            part.grad = None if p.grad is None else part_of(p.grad, p)
            parts.append(part)
        return parts

    def assign(self, parameters: list[Any], grads: list[Tensor]) -> None:
        """Make each gradient this process's part of its parameter's ``.grad``."""
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = as_dtensor(grad, p)

    def spread(self, surgery: dict[str, Any], parameters: list[Any]) -> dict[str, Any]:
        """Return a method's state in which the kept parts of these parameters' gradients are DTensors."""
        kept = [[as_dtensor(b, p) for b, p in zip(row, parameters, strict=True)] for row in surgery["buffers"]]
        return {**surgery, "buffers": kept}

    def gathered(self, surgery: dict[str, Any]) -> dict[str, Any]:
        """Undo :meth:`spread`: return the state with this process's parts."""
        kept = surgery.get("buffers")
        if kept is None:
            return surgery
        return {**surgery, "buffers": [[local_part(b) for b in row] for row in kept]}

    def average(self, collected: Collected, *, whole: bool, before: Callable[[], None]) -> Collected:
        """Return the averages of gradients over the group, if there is one, and of losses.

        Parts stay whole, whatever ``whole`` is: pieces of them would not be the parts that this object knows.
        """
        if self._replicas is None:
            check_present(collected.tasks, collected.present, self.method)
        else:
            collected = self._of_parts(partial(self._replicas.average, whole=True, before=before), collected)
        return replace(collected, losses=self._average_over_dims(collected.losses))

    def average_gradients(self, collected: Collected) -> Collected:
        """Return the averages of gradients over the group, if there is one."""
        return collected if self._replicas is None else self._of_parts(self._replicas.average_gradients, collected)

    def average_losses(self, tasks: list[str], losses: Tensor) -> Tensor:
        """Return the averages of losses [T]; :meth:`check_same` has found the same tasks where parts differ."""
        return self._average_over_dims(
            losses if self._replicas is None else self._replicas.average_losses(tasks, losses)
        )

    def _of_parts(self, average: Callable[[Collected], Collected], collected: Collected) -> Collected:
        parts = [_part(p) for p in collected.parameters]
        averages = average(replace(collected, parameters=parts))
        return replace(averages, parameters=collected.parameters)

    def _average_over_dims(self, losses: Tensor) -> Tensor:
        losses = losses / prod(map(len, self._dims))
        for ranks in self._dims:
            distributed.all_reduce(losses, group=self._group(ranks))
        return losses

    def check_same(self, tasks: list[str], device: torch.device) -> None:
        """Raise ValueError, on every process, unless all have losses of these tasks and the method's seed."""
        check_same(tasks, self.method, [self._group(ranks) for ranks in self._dims], device)

    def _group(self, ranks: tuple[int, ...]) -> Any:
        mesh, dim = self._dims[ranks]
        return mesh.get_group(dim)


def _part(parameter: Any) -> Any:
    """Return this process's part of a parameter, with the same dtype for its gradients."""
    part = local_part(parameter).detach()
    if hasattr(parameter, "grad_dtype"):
        part.grad_dtype = parameter.grad_dtype
    return part


def _cut_by(kind: tuple[Any, Any] | None) -> set[tuple[int, ...]]:
    """Return the groups of processes that have different parts of parameters with such a mesh and placements."""
    if kind is None:
        return set()
    mesh, placements = kind
    return {_ranks(mesh.get_group(dim)) for dim, placement in enumerate(placements) if not placement.is_replicate()}


def _ranks(group: Any) -> tuple[int, ...]:
    return tuple(distributed.get_process_group_ranks(group))
