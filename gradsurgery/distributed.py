# SPDX-License-Identifier: MIT
"""Task gradients of several processes, each with the whole model and a batch of its own: their averages.

Surgery is not linear: the average of what it makes of each process's gradients is not what it makes of their averages.
So the task gradients are averaged first, T gradients where plain training averages one. Every process then goes on with
the same numbers, and ends with the same parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import accumulate, groupby
from operator import is_
from typing import Any

import torch
from torch import Tensor, distributed

from ._gradients import DTYPES, assign_grads, is_dense
from .collect import Collected

_ABSENT, _PRESENT, _UNFIT = range(3)
_BUCKET_BYTES = 64 << 20  # what is held twice while it is averaged; more does not make a network faster
_ALIGNMENT = 64  # bytes: what the kernels read fastest


class Replicas:
    """The processes of a group.

    Attributes:
        sharded: whether each parameter is spread over the processes.

    Args:
        group: a process group that this process belongs to; None: the default one, where ``torch.distributed`` is
            initialised when a step is taken, else this process alone.

    Raises:
        TypeError: it is neither.
        ValueError: this process does not belong to it.
    """

    sharded = False

    def __init__(self, group: Any = None) -> None:
        if distributed.is_available() and group is distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must be a group of this process, got one that it does not belong to")
        if group is not None and not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
        self.group = group
        self._parameters: list[Tensor] = []
        self._shapes = ""

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        return Replicas(self.group)

    @property
    def count(self) -> int:
        """The number of processes."""
        if self.group is None and not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.group)

    def check(self, parameters: list[Tensor]) -> None:
        """Raise TypeError for a parameter that does not lie on this process."""
        for p in parameters:
            if is_sharded(p):
                raise TypeError(f"all parameters must be sharded or none, got a sharded one of shape {tuple(p.shape)}")

    def total(self, gram: Tensor) -> Tensor:
        """Return G of what lies on this process, which is all of it."""
        return gram

    def local(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return the parameters, which lie on this process."""
        return parameters

    def assign(self, parameters: list[Tensor], local: list[Tensor], grads: list[Tensor]) -> None:
        """Make each gradient the ``.grad`` of its parameter."""
        assign_grads(parameters, grads)

    def average(self, collected: Collected) -> Collected:
        """Return the averages of gradients and losses, of which what a process lacks counts as 0.

        Its lists take the averages in place, for nobody needs both; averages of averages are the same.

        Raises:
            ValueError, on every process: they have not collected the same tasks of the same parameters.
            TypeError, on every process: some gradient is sparse or complex.
        """
        if self.count == 1:
            return collected
        scaled = "unscaled" if collected.scale is None else "scaled"
        what = (
            f"{len(collected.grads)} {scaled} gradients of {len(collected.parameters)} parameters by {collected.tasks}"
        )
        mask = bytearray(_kind(entry) for row in collected.grads for entry in row) + bytearray(collected.present)
        found = self._agree(what, self._shapes_of(collected.parameters), mask, collected.losses.device)
        if _UNFIT in found:
            raise TypeError("gradients that are averaged over processes must be dense and real, got others")
        for row in collected.grads:
            there, found = found[: len(row)], found[len(row) :]
            for places in _buckets(collected.parameters, there):
                self._average_bucket(collected.parameters, row, places)
        return replace(
            collected, losses=self._average(collected.losses.clone()), present=[bool(there) for there in found]
        )

    def average_losses(self, tasks: list[str], losses: Tensor) -> Tensor:
        """Return the averages of losses [T]; ValueError, on every process, where they are not of the same tasks."""
        if self.count == 1:
            return losses
        self._agree(f"losses of {tasks}", "", bytearray(), losses.device)
        return self._average(losses.clone())

    def _average(self, values: Tensor) -> Tensor:
        """Average values [n] in place."""
        # First the division, as in DistributedDataParallel: sums of float16 would overflow.
        values.div_(self.count)
        distributed.all_reduce(values, group=self.group)
        return values

    def _average_bucket(self, parameters: list[Tensor], row: list[Tensor | None], places: list[int]) -> None:
        """Average the row's entries at these places, in a memory of their own."""
        first = parameters[places[0]]
        ends = list(accumulate(_padded(parameters[p]) for p in places))
        flat = torch.empty(ends[-1], dtype=first.dtype, device=first.device)
        entries = [_view(flat, begin, parameters[p]) for p, begin in zip(places, [0, *ends], strict=False)]
        mine = [i for i, p in enumerate(places) if row[p] is not None]
        if len(mine) < len(places):
            flat.zero_()
        if mine:
            torch._foreach_copy_([entries[i] for i in mine], [row[places[i]] for i in mine])  # type: ignore[misc]
        self._average(flat)
        for p, entry in zip(places, entries, strict=True):
            row[p] = entry

    def _shapes_of(self, parameters: list[Tensor]) -> str:
        if len(self._parameters) != len(parameters) or not all(map(is_, self._parameters, parameters)):
            self._parameters = parameters
            self._shapes = str([(p.dtype, p.shape, p.stride()) for p in parameters])
        return self._shapes

    def _agree(self, what: str, shapes: str, mask: bytearray, device: torch.device) -> bytearray:
        """Return the largest of the processes' masks, by value; ValueError unless the rest is the same everywhere.

        The host learns it, but does not wait for the device's work: what is exchanged does not depend on it.
        """
        with _aside(device):
            mine = torch.tensor([_digest((what + shapes).encode()), _digest(mask)], device=device)
            theirs = [torch.empty_like(mine) for _ in range(self.count)]
            distributed.all_gather(theirs, mine, group=self.group)
            layouts, masks = torch.stack(theirs, 1).tolist()
            if len(set(layouts)) > 1:
                raise ValueError(
                    f"every process must have the same tasks and parameters, got others than {what} on process "
                    f"{distributed.get_rank()}"
                )
            if len(set(masks)) == 1:
                return mask
            union = torch.tensor(list(mask), dtype=torch.uint8, device=device)
            distributed.all_reduce(union, distributed.ReduceOp.MAX, group=self.group)
            return bytearray(union.tolist())


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(parameter, "device_mesh")


def _kind(entry: Tensor | None) -> int:
    if entry is None:
        return _ABSENT
    return _PRESENT if entry.layout is torch.strided and entry.dtype in DTYPES else _UNFIT


def _digest(data: bytes | bytearray) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def _aside(device: torch.device) -> AbstractContextManager[Any]:
    """Where nothing waits for what the device has to do."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _buckets(parameters: list[Tensor], there: bytearray) -> Iterator[list[int]]:
    """Cut the places of what is there into lists of one dtype and device and of at most about a bucket's bytes."""
    kinds: dict[Any, list[int]] = {}
    for p, (parameter, present) in enumerate(zip(parameters, there, strict=True)):
        if present:
            kinds.setdefault((parameter.dtype, parameter.device), []).append(p)
    for places in kinds.values():
        sizes = accumulate(parameters[p].nbytes for p in places)
        for _, bucket in groupby(zip(places, sizes, strict=True), lambda item: item[1] // _BUCKET_BYTES):
            yield [p for p, _ in bucket]


def _padded(parameter: Tensor) -> int:
    """Return the elements between a parameter's begin and the next one's."""
    step = _ALIGNMENT // parameter.element_size()
    return -(-parameter.numel() // step) * step


def _view(flat: Tensor, begin: int, parameter: Tensor) -> Tensor:
    """Return the part of a bucket that is a parameter's gradient, in the parameter's own layout if it is dense."""
    part = flat[begin : begin + parameter.numel()]
    return part.as_strided(parameter.shape, parameter.stride()) if is_dense(parameter) else part.view(parameter.shape)
