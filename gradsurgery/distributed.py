# SPDX-License-Identifier: MIT
"""Task gradients of several processes, each with the whole model and a batch of its own: their averages.

Surgery is not linear: averaging each process's direction is not the same as surgery on the averaged task gradients. So
the task gradients are averaged first, T gradients where plain training averages one. Every process then goes on with
the same numbers, or, where gradients are large, with its own pieces of them (``_exchange.py``), and ends with the same
parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, distributed

from ._collected import Collected
from ._dtensor import is_sharded
from ._exchange import Pieces, are_worth_pieces, average
from ._extension import C
from ._gradients import DTYPES, gradient_dtype
from .methods import Method
from .methods._buffered import BufferedMethod

_ABSENT, _PRESENT, _UNFIT = range(3)


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
    hold_parts = False
    """Whether each process has only its part of the gradients."""

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

    def average(self, collected: Collected, *, whole: bool, before: Callable[[], None]) -> Collected:
        """Return the averages of gradients and losses; errors as those of :meth:`average_gradients`.

        Large gradients are cut into pieces, unless ``whole`` on some process, or the method needs them whole.
        ``before`` is called before any gradient changes.
        """
        if collected.is_averaged:
            return collected
        if self.count == 1:
            check_present(collected.tasks, collected.present, self.method)
            return collected
        whole = whole or isinstance(self.method, BufferedMethod) or not self.method.takes_shards
        reach, holders, whole = self._agree(collected, whole)
        losses = collected.losses / max(holders)
        if min(holders) < max(holders):
            for loss, count in zip(losses.unbind(), holders, strict=True):
                loss.mul_(max(holders) / max(1, count))
        before()
        summed = distributed.all_reduce(losses, group=self.group, async_op=True)
        parameters, rows, pieces = collected.parameters, collected.grads, None
        if not whole and are_worth_pieces(parameters, reach, losses.device, self.group):
            pieces = Pieces(parameters, rows, reach, holders, self)
        else:
            average(parameters, rows, reach, holders, self.group)
        summed.wait()
        present = [count > 0 for count in holders]
        return replace(collected, losses=losses, present=present, is_averaged=True, pieces=pieces)

    def average_gradients(self, collected: Collected) -> Collected:
        """Return the averages of the gradients over the processes that have the task's loss.

        A gradient that one of them lacks counts as 0. The averages replace the gradients in the lists.

        Raises:
            ValueError, on every process: they have other tasks, parameters or seeds, or none has a task's loss.
            TypeError, on every process: some gradient is sparse or complex.
        """
        if self.count == 1:
            return collected
        reach, holders, _ = self._agree(collected, whole=True)
        average(collected.parameters, collected.grads, reach, holders, self.group)
        return replace(collected, present=[count > 0 for count in holders])

    def average_losses(self, tasks: list[str], losses: Tensor) -> Tensor:
        """Return the averages of losses [T]; ValueError, on every process, where they are not of the same tasks."""
        if self.count == 1:
            return losses
        check_same(tasks, self.method, [self.group], losses.device)
        losses = losses / self.count
        distributed.all_reduce(losses, group=self.group)
        return losses

    def _agree(self, collected: Collected, whole: bool) -> tuple[list[bytearray], list[int], bool]:
        """Return what is true of all processes together, before any gradient is written.

        For each row and parameter, whether any process has a gradient; how many have each task's loss; and whether any
        needs whole gradients. Errors are those of :meth:`average_gradients`.
        """
        device, present = collected.losses.device, bytearray(collected.present)
        mask = bytearray(_kind(entry) for row in collected.grads for entry in row)
        scaled = "unscaled" if collected.scale is None else "scaled"
        what = (
            f"{len(collected.grads)} {scaled} gradients of {len(collected.parameters)} parameters by {collected.tasks}"
            f"{_with_seed(self.method)}"
        )
        shapes = str([(gradient_dtype(p), p.shape, p.stride()) for p in collected.parameters])
        seen = bytearray([*mask, whole])
        others, other_shapes, other_mask = _differ(
            [what.encode(), shapes.encode(), seen + present], [self.group], device
        )
        if others:
            hint = "" if self.method.num_batches > 1 else " (None stands for a loss that only other processes have)"
            raise ValueError(_others(what) + hint)
        if other_shapes:
            raise ValueError("parameters must have the same shapes, dtypes and memory layouts on every process")
        holders = [self.count * here for here in present]
        if other_mask:
            with _aside(device):
                union = torch.tensor(list(seen), dtype=torch.uint8, device=device)
                counts = torch.tensor(list(present), device=device)
                distributed.all_reduce(union, distributed.ReduceOp.MAX, group=self.group)
                distributed.all_reduce(counts, group=self.group)
                seen, holders = bytearray(union.tolist()), counts.tolist()
        check_present(collected.tasks, map(bool, holders), self.method)
        if _UNFIT in seen[:-1]:
            raise TypeError(
                "gradients that are averaged over processes must be dense and real, got "
                + (_describe(collected, mask.index(_UNFIT)) if _UNFIT in mask else "others on another process")
            )
        width = len(collected.parameters)
        return [seen[t * width : (t + 1) * width] for t in range(len(collected.grads))], holders, bool(seen[-1])


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


def assign_grads(parameters: list[Tensor], grads: list[Tensor]) -> None:
    """Make each gradient the ``.grad`` of its parameter."""
    if C is not None:
        C.assign_grads(parameters, grads)
    else:
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
