# SPDX-License-Identifier: MIT
"""Task gradients of several processes, each with the whole model and a batch of its own: their averages.

Surgery is not linear: averaging each process's direction is not the same as surgery on the averaged task gradients. So
the task gradients are averaged first, T gradients where plain training averages one. Every process then goes on with
the same numbers, and ends with the same parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, distributed

from ._collected import Collected
from ._dtensor import is_sharded
from ._extension import C
from ._gradients import DTYPES, gradient_dtype, is_dense
from .methods import Method

_ABSENT, _PRESENT, _UNFIT = range(3)
_BUCKET_BYTES = 64 << 20  # held twice while they are averaged; larger messages do not make a network faster
_ALIGNMENT = 64  # bytes: the kernels read aligned memory fastest


class Replicas:
    """The processes of a group.

    Args:
        group: a process group that this process belongs to; None: the default one, where ``torch.distributed`` is
            initialised when a step is taken, else this process alone.
        method: the method, whose random numbers must be the same everywhere.

    Raises:
        TypeError: ``group`` is neither a process group nor None.
        ValueError: this process does not belong to the group.
    """

    shards = None

    def __init__(self, group: Any, method: Method) -> None:
        if distributed.is_available() and group is distributed.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("process_group must be a group of this process, got one that it does not belong to")
        if group is not None and not (distributed.is_available() and isinstance(group, distributed.ProcessGroup)):
            raise TypeError(f"process_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
        self.group = group
        self.method = method

    def __deepcopy__(self, memo: dict[int, Any]) -> Replicas:
        # A process group cannot be copied.
        return Replicas(self.group, deepcopy(self.method, memo))

    @property
    def count(self) -> int:
        """The number of processes."""
        if self.group is None and not (distributed.is_available() and distributed.is_initialized()):
            return 1
        return distributed.get_world_size(self.group)

    @property
    def alone(self) -> bool:
        """Whether no other process waits for this one."""
        return self.count == 1

    def check(self, parameters: list[Tensor]) -> None:
        """Raise TypeError for a parameter that is spread over processes."""
        for p in parameters:
            if hasattr(p, "_fsdp_flattened"):
                raise TypeError("parameters must not be those of FullyShardedDataParallel, got some: use fully_shard")
            if is_sharded(p):
                raise TypeError(
                    "all parameters must be spread over processes or none when the optimizer is wrapped, got one of "
                    f"shape {tuple(p.shape)} that is, later"
                )

    def counted(self, parameters: list[Tensor]) -> list[bool]:
        """Return whether this process's gradient of each counts in G: all do."""
        return [True] * len(parameters)

    def total(self, gram: Tensor) -> Tensor:
        """Return G as it is, because whole gradients lie on this process."""
        return gram

    def total_of_batches(self, gram: Tensor) -> Tensor:
        """Return G of all processes' features' gradients, for averaged losses, from the G of this process's."""
        if self.count == 1:
            return gram
        gram = gram / self.count**2
        distributed.all_reduce(gram, group=self.group)
        return gram

    def local(self, parameters: list[Tensor]) -> list[Tensor]:
        """Return the parameters, which lie on this process."""
        return parameters

    def assign(self, parameters: list[Tensor], grads: list[Tensor]) -> None:
        """Make each gradient the ``.grad`` of its parameter."""
        assign_grads(parameters, grads)

    def average(self, collected: Collected) -> Collected:
        """Return the averages of gradients and losses; errors as those of :meth:`average_gradients`."""
        if self.count == 1:
            check_present(collected.tasks, collected.present, self.method)
            return collected
        holders = self._average_rows(collected)
        losses = collected.losses / max(holders)
        if min(holders) < max(holders):
            for loss, count in zip(losses.unbind(), holders, strict=True):
                loss.mul_(max(holders) / max(1, count))
        distributed.all_reduce(losses, group=self.group)
        return replace(collected, losses=losses, present=[count > 0 for count in holders])

    def average_gradients(self, collected: Collected) -> Collected:
        """Return the averages of the gradients over the processes that have the task's loss.

        A gradient that one of them lacks counts as 0. The averages replace the gradients in the lists; averaging them
        again gives the same, to rounding.

        Raises:
            ValueError, on every process: they have other tasks, parameters or seeds, or none has a task's loss.
            TypeError, on every process: some gradient is sparse or complex.
        """
        if self.count == 1:
            return collected
        return replace(collected, present=[count > 0 for count in self._average_rows(collected)])

    def _average_rows(self, collected: Collected) -> list[int]:
        """Average the gradients in place; return how many processes have each task's loss."""
        parameters, rows = collected.parameters, collected.grads
        mask = bytearray(_kind(entry) for row in rows for entry in row)
        found, holders = self._agree(collected, mask)
        check_present(collected.tasks, map(bool, holders), self.method)  # before anything is written
        if _UNFIT in found:
            raise TypeError(
                "gradients that are averaged over processes must be dense and real, got "
                + (_describe(collected, mask.index(_UNFIT)) if _UNFIT in mask else "others on another process")
            )
        width = len(parameters)
        reach = [found[t * width : (t + 1) * width] for t in range(len(rows))]
        # All rows of a bucket in turn, which frees memory that autograd returned in one piece for all of them.
        for bucket in _buckets(parameters, bytearray(map(max, zip(*reach, strict=True)))):
            for t, (row, there) in enumerate(zip(rows, reach, strict=True)):
                places = [p for p in bucket if there[p]]
                if places:
                    self._average_bucket(parameters, row, places, holders[t % len(holders)])
        return holders

    def average_losses(self, tasks: list[str], losses: Tensor) -> Tensor:
        """Return the averages of losses [T]; ValueError, on every process, where they are not of the same tasks."""
        if self.count == 1:
            return losses
        check_same(tasks, self.method, [self.group], losses.device)
        losses = losses / self.count
        distributed.all_reduce(losses, group=self.group)
        return losses

    def _average_bucket(
        self, parameters: list[Tensor], row: list[Tensor | None], places: list[int], holders: int
    ) -> None:
        """Average the row's entries at these places over ``holders`` processes, in new memory."""
        first = parameters[places[0]]
        ends = list(accumulate(_padded(parameters[p]) for p in places))
        flat = torch.empty(ends[-1], dtype=gradient_dtype(first), device=first.device)
        entries = [_view(flat, begin, parameters[p]) for p, begin in zip(places, [0, *ends], strict=False)]
        mine = [i for i, p in enumerate(places) if row[p] is not None]
        if len(mine) < len(places):
            flat.zero_()
        if mine:
            torch._foreach_copy_([entries[i] for i in mine], [row[places[i]] for i in mine])  # type: ignore[misc]
        # First the division, as in DistributedDataParallel: sums of float16 would overflow.
        flat.div_(holders)
        distributed.all_reduce(flat, group=self.group)
        for p, entry in zip(places, entries, strict=True):
            row[p] = entry

    def _agree(self, collected: Collected, mask: bytearray) -> tuple[bytearray, list[int]]:
        """Return the elementwise maximum of the processes' masks, and how many processes have each task's loss.

        ValueError unless tasks, parameters, scaling and seed are the same everywhere.
        """
        device, present = collected.losses.device, bytearray(collected.present)
        scaled = "unscaled" if collected.scale is None else "scaled"
        what = (
            f"{len(collected.grads)} {scaled} gradients of {len(collected.parameters)} parameters by {collected.tasks}"
            f"{_with_seed(self.method)}"
        )
        shapes = str([(gradient_dtype(p), p.shape, p.stride()) for p in collected.parameters])
        others, other_shapes, other_mask = _differ(
            [what.encode(), shapes.encode(), mask + present], [self.group], device
        )
        if others:
            hint = "" if self.method.num_batches > 1 else " (None stands for a loss that only other processes have)"
            raise ValueError(_others(what) + hint)
        if other_shapes:
            raise ValueError("parameters must have the same shapes, dtypes and memory layouts on every process")
        if not other_mask:
            return mask, [self.count * here for here in present]
        with _aside(device):
            union = torch.tensor(list(mask), dtype=torch.uint8, device=device)
            holders = torch.tensor(list(present), device=device)
            distributed.all_reduce(union, distributed.ReduceOp.MAX, group=self.group)
            distributed.all_reduce(holders, group=self.group)
            return bytearray(union.tolist()), holders.tolist()


def check_present(tasks: list[str], present: Iterable[bool], method: Method) -> None:
    """Raise ValueError unless each task has a loss, or, if the method takes absent ones, at least one task."""
    absent = [task for task, here in zip(tasks, present, strict=True) if not here]
    if len(absent) == len(tasks) or (absent and not method.takes_absent):
        wanted = "one loss" if method.takes_absent else "a loss of every task"
        raise ValueError(f"a step of method {method.name!r} needs {wanted}, got none of {absent}")


def check_same(tasks: list[str], method: Method, groups: list[Any], device: torch.device) -> None:
    """Raise ValueError, on every process of the groups, unless all have losses of these tasks and the method's seed."""
    what = f"losses of {tasks}{_with_seed(method)}"
    if any(_differ([what.encode()], groups, device)):
        raise ValueError(_others(what))


def _with_seed(method: Method) -> str:
    seed = getattr(method, "seed", None)
    return "" if seed is None else f" with seed {seed}"


def _others(what: str) -> str:
    process = distributed.get_rank()
    return f"every process must have the same tasks, parameters and seed, got others than {what} on process {process}"


def _differ(values: list[bytes | bytearray], groups: list[Any], device: torch.device) -> list[bool]:
    """Return for each value whether it differs between the processes of the groups, which are dimensions of a mesh.

    The host waits for the answer, but not for other work of the device.
    """
    digests = [int.from_bytes(hashlib.blake2b(value, digest_size=7).digest(), "little") for value in values]
    with _aside(device):
        extremes = torch.tensor([digests, [-digest for digest in digests]], device=device)
        for group in groups:
            distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
        largest, least = extremes.tolist()
    return [high != -low for high, low in zip(largest, least, strict=True)]


def _kind(entry: Tensor | None) -> int:
    if entry is None:
        return _ABSENT
    return _PRESENT if entry.layout is torch.strided and entry.dtype in DTYPES else _UNFIT


def _describe(collected: Collected, place: int) -> str:
    """Return what the gradient at a place of the mask is."""
    t, p = divmod(place, len(collected.parameters))
    grad: Any = collected.grads[t][p]
    return f"{grad.layout} {grad.dtype} for parameter {p} of shape {tuple(grad.shape)}"


def _aside(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which nothing waits for the device's other work."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def _buckets(parameters: list[Tensor], there: bytearray) -> Iterator[list[int]]:
    """Cut the places of what is there into lists of one dtype and device and of at most about a bucket's bytes."""
    kinds: dict[Any, list[int]] = {}
    for p, (parameter, present) in enumerate(zip(parameters, there, strict=True)):
        if present:
            kinds.setdefault((gradient_dtype(parameter), parameter.device), []).append(p)
    for places in kinds.values():
        sizes = accumulate(parameters[p].numel() * gradient_dtype(parameters[p]).itemsize for p in places)
        for _, bucket in groupby(zip(places, sizes, strict=True), lambda item: item[1] // _BUCKET_BYTES):
            yield [p for p, _ in bucket]


def assign_grads(parameters: list[Tensor], grads: list[Tensor]) -> None:
    """Make each gradient the ``.grad`` of its parameter."""
    if C is not None:
        C.assign_grads(parameters, grads)
    else:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad


def _padded(parameter: Tensor) -> int:
    """Return the number of elements from a parameter's beginning to the next one's."""
    step = _ALIGNMENT // gradient_dtype(parameter).itemsize
    return -(-parameter.numel() // step) * step


def _view(flat: Tensor, begin: int, parameter: Tensor) -> Tensor:
    """Return the part of a bucket that is a parameter's gradient, in the parameter's own layout if it is dense."""
    part = flat[begin : begin + parameter.numel()]
    return part.as_strided(parameter.shape, parameter.stride()) if is_dense(parameter) else part.view(parameter.shape)
