# SPDX-License-Identifier: MIT
"""The task gradients of a step, as they come from the backward passes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ._dtensor import local_part
from ._exchange import Pieces
from ._gradients import gradient_dtype
from ._memory import check_memory


@dataclass(slots=True)
class Collected:
    """Task gradients of one or more micro-batches.

    Attributes:
        tasks: names.
        parameters: the P parameters.
        grads: T lists of P gradients, None where a task does not reach a parameter; with several batches, one batch's
            lists after the other's.
        losses: [T], detached and unscaled; summed over micro-batches like the gradients, but with several independent
            batches, those of the last one; 0 for an absent loss.
        present: for each task, whether some micro-batch had its loss.
        scale: the gradient scaler's factor that ``grads`` still carry, [], or None.
        batches: how many independent batches ``grads`` holds, one after the other; 1 for sums of micro-batches.
        is_averaged: whether gradients and losses are averages over several processes.
        pieces: how averages are cut into pieces; ``grads`` then holds this process's. None: they are whole.
    """

    tasks: list[str]
    parameters: list[Tensor]
    grads: list[list[Tensor | None]]
    losses: Tensor
    present: list[bool]
    scale: Tensor | None
    batches: int = 1
    is_averaged: bool = False
    pieces: Pieces | None = None

    @property
    def reach(self) -> bytes:
        """The number of tasks with a gradient of each parameter, in any of the batches, at most 127."""
        tasks = len(self.tasks)
        rows = [[grad is not None for grad in row] for row in self.grads]
        # A single pass for all tasks has one row.
        reached = [map(any, zip(*rows[t::tasks], strict=True)) for t in range(min(tasks, len(rows)))]
        return bytes(min(127, sum(by_task)) for by_task in zip(*reached, strict=True))

    def warn_of_nothing(self, stacklevel: int) -> None:
        """Warn if no loss depends on any of the parameters."""
        if self.parameters and all(entry is None for row in self.grads for entry in row):
            warnings.warn(
                "these losses depend on no parameter of the optimizer that requires grad, and train nothing: make the "
                "optimizer from the parameters that the model has now",
                stacklevel=stacklevel,
            )

    def plus(self, other: Collected) -> Collected:
        """Return the sum with another one, which :meth:`check_next` has accepted and whose gradients are released.

        Raises:
            OverwrittenError: the second backward passes wrote over the first ones' gradients.
        """
        check_memory(self.grads + other.grads)
        grads = []
        for mine, theirs in zip(self.grads, other.grads, strict=True):
            grads.append([_sum(a, b) for a, b in zip(mine, theirs, strict=True)])
            theirs.clear()  # frees what is summed; ``self`` stays until all is summed
        present = [a or b for a, b in zip(self.present, other.present, strict=True)]
        return Collected(self.tasks, self.parameters, grads, self.losses + other.losses, present, other.scale)

    def beside(self, other: Collected) -> Collected:
        """Return both, as batches of their own; errors as those of :meth:`plus`."""
        # New lists, so that what this object still holds is not written over.
        grads = [[*row] for row in self.grads + other.grads]
        check_memory(grads)
        batches = self.batches + other.batches
        return Collected(self.tasks, self.parameters, grads, other.losses, other.present, other.scale, batches)

    def covering(self, parameters: Sequence[Tensor]) -> Collected:
        """Return this with a gradient for each of these: if it lacks one, a zero one of the first task that has any."""
        named = {id(p) for p in parameters}
        places = [place for place, p in enumerate(self.parameters) if id(p) in named]
        first = next((t for t, row in enumerate(self.grads) if any(row[p] is not None for p in places)), None)
        if first is None:
            return self
        reach, row = self.reach, list(self.grads[first])
        for p in places:
            if not reach[p]:
                row[p] = torch.zeros_like(local_part(self.parameters[p]), dtype=gradient_dtype(self.parameters[p]))
        return replace(self, grads=[*self.grads[:first], row, *self.grads[first + 1 :]])

    def check_next(self, tasks: list[str], parameters: Sequence[Tensor], *, scaled: bool) -> None:
        """Raise ValueError unless another micro-batch is of the same tasks and parameters, and scaled like this one."""
        if self.is_averaged:
            raise ValueError(
                "what was collected is averaged over the processes, because combine() failed after that: call it "
                "again, or zero_grad(), which forgets what was collected"
            )
        if self.tasks != tasks:
            raise ValueError(
                f"every micro-batch must have the same tasks in the same order: had {self.tasks}, got {tasks} "
                "(zero_grad() forgets what was collected)"
            )
        if [id(p) for p in self.parameters] != [id(p) for p in parameters]:
            raise ValueError("the optimizer's parameters changed between micro-batches: combine() before changing them")
        if (self.scale is not None) != scaled:
            raise ValueError("either every micro-batch is given the scaler or none")


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b if a.layout is torch.strided else b + a  # torch adds no dense tensor to a sparse one
