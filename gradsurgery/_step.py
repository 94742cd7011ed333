# SPDX-License-Identifier: MIT
"""Where the optimizers write a step's directions, and how they add plain gradients."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._collected import Collected
from ._exchange import Pieces
from ._gradients import TaskGradients, is_expanded, parse, read_lists
from ._memory import check_not_freed
from ._shards import Shards
from .backends import Backend, choose
from .combine import combine_of
from .distributed import Replicas


def read(collected: Collected) -> tuple[TaskGradients, bytes, list[int]]:
    """Return the gradients, how many losses reach each parameter, and which parameters have sparse or complex ones.

    Sparse and complex gradients, which no kernel reads, are left out.
    """
    grads = read_lists(collected.grads, None)
    if grads is not None:
        return grads, grads.lists.counts if collected.batches == 1 else collected.reach, []
    rows = collected.grads
    foreign = sorted({p for row in rows for p, grad in enumerate(row) if _is_foreign(grad)})
    if foreign:
        rows = [[None if p in foreign else entry for p, entry in enumerate(row)] for row in rows]
    grads = parse(rows, None)
    if all(entry is None for entry in grads.entries):  # no gradient says where G lives
        grads = replace(grads, device=collected.losses.device)
    return grads, collected.reach, foreign


def targets(parameters: list[Tensor], grads: TaskGradients, params: list[int]) -> tuple[list[Any], bool, set[int]]:
    """Return the tensors for the directions of the parameters, ``params`` of ``grads``, and whether to add to them.

    Also return the places in the list whose tensor already holds the sum of the parameter's gradients.
    """
    found = None if grads.lists is None else grads.lists.targets(parameters, params)
    if found is not None:
        return found  # type: ignore[no-any-return]
    accumulate = any(p.grad is not None for p in parameters)
    like = grads.like
    out = [_target(p, like[place], accumulate) for p, place in zip(parameters, params, strict=True)]  # type: ignore[arg-type]
    return out, accumulate, set()


def _target(parameter: Tensor, like: Tensor, accumulate: bool) -> Tensor:
    """Return the tensor that a parameter's direction is written into, or added to; one of its gradients is ``like``."""
    grad, dtype = parameter.grad, like.dtype
    if grad is None:
        # Gradients of a parameter of a subclass, such as a quantised weight, need not be of that class.
        is_plain = type(parameter) is Tensor or issubclass(type(parameter), Parameter)
        model = parameter if is_plain else like
        return torch.zeros_like(model, dtype=dtype) if accumulate else torch.empty_like(model, dtype=dtype)
    if grad.dtype != dtype:
        raise TypeError(
            f".grad of a parameter of shape {tuple(parameter.shape)} is {grad.dtype}, its new gradients are {dtype}"
        )
    if grad.layout is not torch.strided:
        return grad.to_dense()
    check_not_freed(grad)
    if grad.is_inference() and not torch.is_inference_mode_enabled():
        grad = grad.clone()  # to write to it raises, but only after it was written
    # Kernels cannot write to an expanded .grad, nor to a negated view.
    return (grad.contiguous() if is_expanded(grad) else grad).resolve_neg()


class Landing:
    """The ``.grad`` that the directions of pieces, gathered from all processes, are written or added to.

    Args:
        pieces: the gradients' pieces.
        parameters: the parameters whose ``.grad`` it is.
        places: their places among those of the gradients.

    Raises:
        TypeError, ValueError: a ``.grad`` cannot be added to.
    """

    def __init__(self, pieces: Pieces, parameters: list[Tensor], places: list[int]) -> None:
        self._pieces = pieces
        self._adds = {p for p, parameter in zip(places, parameters, strict=True) if parameter.grad is not None}
        self._targets = {
            # One number stands for a gradient of that shape.
            p: _target(parameter, pieces.first[p].new_empty(()).expand(parameter.shape), accumulate=False)
            for p, parameter in zip(places, parameters, strict=True)
        }

    def fill(self) -> list[Tensor]:
        """Gather the directions, once all pieces are written, and return the new ``.grad`` of each parameter."""
        messages = self._pieces.gathered()
        # If one fails to come, the others must not have been added.
        for directions in [*messages] if self._adds else messages:
            fresh = [p for p in directions if p not in self._adds]
            if fresh:
                torch._foreach_copy_([self._targets[p] for p in fresh], [directions[p] for p in fresh])
            for p in directions.keys() & self._adds:
                self._targets[p].add_(directions[p])
        return [*self._targets.values()]


def add_plain(
    grads: TaskGradients,
    params: list[int],
    weights: Tensor,
    out: list[Any],
    accumulate: bool,
    done: Container[int],
    backend: Backend,
) -> None:
    """Write or add the weighted sums of ``params`` of ``grads``, except at the places in ``done``, which hold them."""
    left = [i for i in range(len(params)) if i not in done]
    if left:
        rest = grads.select([params[i] for i in left], [0] * len(left), 1)
        combine_of(rest, weights[None], [out[i] for i in left], accumulate, backend)


def add_all(collected: Collected, processes: Replicas | Shards, backend: str | None) -> None:
    """Add the sum of each parameter's gradients to its ``.grad``."""
    grads, reach, foreign = read(collected)
    params = [p for p, count in enumerate(reach) if count and p not in foreign]
    parameters = [collected.parameters[p] for p in params + foreign]
    local = processes.local(parameters)
    out, accumulate, done = targets(local[: len(params)], grads, params)
    ones = torch.ones(grads.num_tasks, dtype=torch.float64, device=grads.device)
    sums = foreign_sums(collected, foreign, local[len(params) :], ones)
    chosen = choose(backend, grads.device, grads.num_tasks)  # raises before anything is written
    if grads.num_tasks == 1 and grads.lists is None:
        row: list[Any] = grads.entries  # the sums themselves, which the reference would take to float64 and back
        for target, p in zip(out, params, strict=True):
            target.copy_(target + row[p] if accumulate else row[p])
    else:
        add_plain(grads, params, ones, out, accumulate, done, chosen)
    processes.assign(parameters, [*out, *map(put, local[len(params) :], sums)])


def _is_foreign(grad: Tensor | None) -> bool:
    """Whether the gradient is sparse or complex, which no kernel reads."""
    return grad is not None and (grad.layout is not torch.strided or grad.is_complex())


def foreign_sums(collected: Collected, params: list[int], local: list[Tensor], weights: Tensor) -> list[Tensor]:
    """Return the new ``.grad`` of parameters with sparse or complex gradients: the old one plus the weighted sum."""
    sums = []
    for p, parameter in zip(params, local, strict=True):
        column = zip((row[p] for row in collected.grads), weights.unbind(), strict=True)
        terms = [grad * weight.to(grad.dtype) for grad, weight in column if grad is not None]
        if parameter.grad is not None:
            terms.append(parameter.grad)
        # Dense ones first: torch adds no dense tensor to a sparse one.
        first, *rest = sorted(terms, key=lambda term: term.layout is not torch.strided)
        sums.append(sum(rest, first))
    return sums


def put(parameter: Tensor, total: Tensor) -> Tensor:
    """Return a parameter's new ``.grad``: the tensor that is there, with the total written into it, or the total."""
    grad = parameter.grad
    if grad is None or grad.layout is not torch.strided or is_expanded(grad) or grad._is_zerotensor():
        return total
    # Writing to an inference tensor raises, but only after it was written.
    return total if grad.is_inference() else grad.copy_(total)
