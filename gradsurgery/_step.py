# SPDX-License-Identifier: MIT
"""What a step of the optimizers does with which parameter, and where the directions go."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ._gradients import TaskGradients, assign_grads, is_dense, parse, read_lists
from .backends import Backend, choose
from .collect import Collected
from .combine import combine_of


@dataclass(slots=True)
class Plan:
    """Which parameters are shared, and their segments: settled once for all steps with the same reach."""

    parameters: list[Tensor]
    reach: bytes
    """Of each parameter, how many losses reach it."""
    enough: int
    """How many must, for it to be shared."""
    measured: Sequence[Tensor] | None
    shared: list[int]
    plain: list[int]
    """The other parameters with a gradient."""
    segments: list[int]
    """The segment of each shared parameter."""
    blocks: list[int]
    """What each segment is of: a group's number, or a parameter's id."""
    num_segments: int
    read_segments: list[int]
    """Those that G is computed in: the same, or with ``measured``, 1 for these parameters and 0 for the others."""
    num_read_segments: int

    def holds(self, parameters: list[Tensor], reach: bytes, enough: int, measured: Sequence[Tensor] | None) -> bool:
        """Whether it is a plan for these."""
        return (
            self.reach == reach
            and self.enough == enough
            and self.measured is measured
            and len(self.parameters) == len(parameters)
            and all(map(is_, self.parameters, parameters))
        )


def make_plan(
    parameters: list[Tensor],
    reach: bytes,
    *,
    shared: Sequence[Tensor] | None,
    enough: int,
    groups: dict[int, int] | None,
    per_tensor: bool,
    measured: Sequence[Tensor] | None,
) -> Plan:
    """Return a plan.

    Args:
        parameters, reach: those of the step.
        shared: the shared parameters; None: those that ``enough`` losses reach.
        enough: see ``shared``.
        groups: from a parameter's id to its group, for segments by groups.
        per_tensor: a segment for each shared parameter.
        measured: the parameters whose G the method reads; None: all shared ones.
    """
    if shared is None:
        chosen = [p for p, count in enumerate(reach) if count >= enough]
    else:
        named = {id(p) for p in shared}
        chosen = [p for p, count in enumerate(reach) if count and id(parameters[p]) in named]
    if per_tensor:
        of_chosen = blocks = [id(parameters[p]) for p in chosen]
    elif groups is not None:
        of_chosen = [groups[id(parameters[p])] for p in chosen]
        blocks = sorted(set(of_chosen))
    else:
        of_chosen, blocks = [0] * len(chosen), [0]
    places = {block: place for place, block in enumerate(blocks)}
    segments = [places[block] for block in of_chosen]
    read_segments = segments
    if measured is not None:
        named = {id(p) for p in measured}
        read_segments = [int(id(parameters[p]) in named) for p in chosen]
        if not any(read_segments):
            raise ValueError("no two losses share any of norm_parameters")
    return Plan(
        parameters=parameters,
        reach=reach,
        enough=enough,
        measured=measured,
        shared=chosen,
        plain=sorted({p for p, count in enumerate(reach) if count} - set(chosen)),
        segments=segments,
        blocks=blocks,
        num_segments=max(segments, default=0) + 1,
        read_segments=read_segments,
        num_read_segments=max(read_segments, default=0) + 1,
    )


def check_kept(name: str, kept: list[Tensor], shared: list[Tensor]) -> None:
    """Raise ValueError where the gradients that a method keeps are those of other parameters."""
    if not kept or not shared:
        return
    if len(shared) != len(kept) or not all(map(is_, shared, kept)):
        raise ValueError(
            f"method {name!r} keeps gradients of the shared parameters, which must be the same at each step: name them "
            f"by shared=; had {len(kept)}, got {len(shared)}"
        )


def check_blocks(name: str, had: list[int] | None, blocks: list[int]) -> None:
    """Raise ValueError where the rows of a method's state are those of other blocks."""
    if had not in (None, blocks):
        raise ValueError(
            f"method {name!r} has a state for each group or tensor of the shared parameters, which must be the same at "
            f"each step; had {len(had or ())}, got {len(blocks)} or others"
        )


def read(collected: Collected) -> tuple[TaskGradients, bytes, list[int]]:
    """Return the gradients, how many losses reach each parameter, and the parameters with sparse gradients.

    No kernel reads those, and they are left out.
    """
    grads = read_lists(collected.grads, None)
    if grads is not None:
        return grads, grads.lists.counts, []
    rows = collected.grads
    sparse = [p for p in range(len(collected.parameters)) if any(_is_sparse(row[p]) for row in rows)]
    if sparse:
        rows = [[None if p in sparse else entry for p, entry in enumerate(row)] for row in rows]
    grads = parse(rows, None)
    if all(entry is None for entry in grads.entries):  # no gradient says where G lives
        grads = replace(grads, device=collected.losses.device)
    return grads, collected.reach, sparse


def targets(parameters: list[Tensor], grads: TaskGradients, params: list[int]) -> tuple[list[Any], bool, set[int]]:
    """Return what the directions of the parameters, ``params`` of ``grads``, are written into, and whether to add them.

    Also return where in the list the target already holds the sum of the parameter's gradients.
    """
    found = None if grads.lists is None else grads.lists.targets(parameters, params)
    if found is not None:
        return found  # type: ignore[no-any-return]
    accumulate = any(p.grad is not None for p in parameters)
    return [_target(p, accumulate) for p in parameters], accumulate, set()


def _target(parameter: Tensor, accumulate: bool) -> Tensor:
    """Return the tensor that a parameter's direction is written into, or added to."""
    if parameter.grad is None:
        return torch.zeros_like(parameter) if accumulate else torch.empty_like(parameter)
    if _is_sparse(parameter.grad):
        raise TypeError(
            f".grad of a parameter of shape {tuple(parameter.shape)} is sparse, its new gradients are dense"
        )
    # An expanded .grad cannot be written in place.
    return parameter.grad if is_dense(parameter.grad) else parameter.grad.contiguous()


def add_plain(
    grads: TaskGradients,
    params: list[int],
    weights: Tensor,
    out: list[Any],
    accumulate: bool,
    done: Container[int],
    backend: Backend,
) -> None:
    """Write or add the weighted sums of ``params`` of ``grads``, but for the places where ``done`` says it is there."""
    left = [i for i in range(len(params)) if i not in done]
    if left:
        rest = grads.select([params[i] for i in left], [0] * len(left), 1)
        combine_of(rest, weights[None], [out[i] for i in left], accumulate, backend)


def add_all(collected: Collected, backend: str | None) -> None:
    """Add the sum of each parameter's gradients to its ``.grad``."""
    grads, reach, sparse = read(collected)
    params = [p for p, count in enumerate(reach) if count and p not in sparse]
    parameters = [collected.parameters[p] for p in params]
    out, accumulate, done = targets(parameters, grads, params)
    ones = torch.ones(grads.num_tasks, dtype=torch.float64, device=grads.device)
    add_plain(grads, params, ones, out, accumulate, done, choose(backend, grads.device, grads.num_tasks))
    assign_grads(parameters, out)
    for p in sparse:
        add_sparse(collected.parameters[p], [row[p] for row in collected.grads], ones)


def _is_sparse(grad: Tensor | None) -> bool:
    return grad is not None and grad.layout is not torch.strided


def add_sparse(parameter: Tensor, grads: list[Tensor | None], weights: Tensor) -> None:
    """Add the weighted sum of gradients, some sparse, which no kernel reads, to a parameter outside the surgery."""
    terms = [g * weight.to(g.dtype) for g, weight in zip(grads, weights.unbind(), strict=True) if g is not None]
    if parameter.grad is not None:
        terms.append(parameter.grad)
    # Dense ones first: a sparse tensor takes no dense one.
    first, *rest = sorted(terms, key=_is_sparse)
    parameter.grad = sum(rest, first)
