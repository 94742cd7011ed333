# SPDX-License-Identifier: MIT
"""Stage 1: from losses to task gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from ._checks import check_choice, check_count, describe
from ._collected import Collected
from ._dtensor import is_sharded
from ._features import check_features
from ._graph import Root, converts, root_of
from ._memory import Rows
from ._passes import Passes
from ._shards import Shards
from ._survey import Survey

_ABSENT = (
    "leave out a task that this batch lacks, unless the method keeps something for each task; None stands for a loss "
    "that another call of collect() or another process has; in a single process, backward() takes None only for "
    "methods that take absent losses"
)

Losses: TypeAlias = Iterable[Tensor | None] | Tensor | Mapping[Any, Tensor | None]
"""One scalar per task, in an order that stays the same, or by name."""


@dataclass(slots=True)
class PassOptions:
    """How backward passes run: what :meth:`gradsurgery.SurgeryOptimizer.backward` takes besides the losses.

    Raises:
        ValueError, TypeError: these are not what they must be, or do not fit together.
    """

    scaler: torch.amp.GradScaler | None = None
    retain_graph: bool = False
    mode: str = "sequential"
    chunk_size: int | None = None
    features: Tensor | Sequence[Tensor] | None = None

    def __post_init__(self) -> None:
        if self.scaler is not None and not hasattr(self.scaler, "scale"):
            raise TypeError(f"scaler must be a gradient scaler, got {describe(self.scaler)}")
        check_choice("mode", self.mode, ("sequential", "batched", "representation"))
        if self.chunk_size is not None:
            if self.mode != "batched":
                raise ValueError(f'chunk_size is for mode="batched", got {self.chunk_size!r} with mode={self.mode!r}')
            check_count("chunk_size", self.chunk_size)
        if isinstance(self.features, Tensor):
            self.features = [self.features]
        if self.features is not None:
            check_features(self.features)
        elif self.mode == "representation":
            raise ValueError('mode="representation" operates on the gradients of features: name them by features=')


@torch.enable_grad()
def collect(
    losses: Losses,
    parameters: list[Tensor],
    how: PassOptions,
    *,
    check: Callable[[list[str]], None] | None = None,
    weigh: Callable[[list[str], Tensor], Tensor] | None = None,
    steer: Callable[[Collected], tuple[list[Any], Tensor | None]] | None = None,
    partial: bool = False,
    empty: bool = False,
    shards: Shards | None = None,
    survey: Survey | None = None,
) -> Collected:
    """Return the gradient of every loss with respect to every parameter.

    ``.grad`` is left as it was. Hooks after the accumulation of gradients do not run, except with sharded parameters,
    re-entrant checkpoints, and inside functions whose backward calls ``backward`` itself. The last pass frees the graph
    unless ``retain_graph``.

    Args:
        losses: as in :meth:`gradsurgery.SurgeryOptimizer.backward`.
        parameters: the P parameters.
        how: how the passes run.
        check: called with the task names before the passes; raises if their gradients could not be used.
        weigh: maps task names and losses [T] to weights [T]. If given, there is one pass, from all losses with these
            as their gradients, and one row of gradients, whatever ``how.mode`` and ``how.features`` are.
        steer: for mode="representation": maps the gradients of the features to those that the single pass below starts
            from, and to weights [T] of the gradients above, or None. The caller then adds up the rows.
        partial: accept None for an absent loss; its row holds None only.
        empty: accept None for all losses.
        shards: given if the parameters are spread over processes; the gradients are then this process's parts.
        survey: what the graphs of earlier steps tell about the passes; None: there were no steps.

    Raises:
        ValueError: a loss is not a scalar or has no graph, or there is none; the passes do not support ``how``.
        TypeError: a loss is not a tensor.
        RuntimeError: the batched pass failed.
        OverwrittenError: passes returned gradients in the same memory.
    """
    mode, features = how.mode, cast("Sequence[Tensor] | None", how.features)
    if mode == "representation" and steer is None and weigh is None:
        raise ValueError('mode="representation" is for backward(), whose last pass needs the weights')
    tasks, each = _check_losses(losses, partial, empty)
    if check is not None:
        check(tasks)
    given = [loss for loss in each if loss is not None]
    device = next((at.device for at in (*given, *parameters)), torch.device("cpu"))
    # A hook of the stack itself runs only in passes through the stack, as the one from all losses is.
    joint = weigh is not None
    through = joint or (isinstance(losses, Tensor) and bool(losses._backward_hooks))
    roots = [None if loss is None else Root(loss) if through else root_of(loss) for loss in each]
    present = [loss is not None for loss in each]
    survey = survey or Survey(infers_shared=False)
    through_grad, hiding = survey.take(given)
    if shards is not None:
        if mode != "sequential" or features is not None:
            raise ValueError("sharded parameters take one backward pass per loss, without mode= and features=")
        # Before fully_shard's hooks average gradients that do not belong together.
        shards.check_same([*compress(tasks, present)], device)
    elif through_grad and (mode != "sequential" or features is not None):
        raise ValueError(
            "re-entrant checkpoints (use_reentrant=True, or another package's) take one backward pass per loss, "
            "without mode= and features=; those with use_reentrant=False take both"
        )
    values = _values(each, device)
    weights: Sequence[Tensor | None] = [None] * len(each)
    if weigh is not None:
        weights, mode, features = weigh(tasks, values).unbind(), "sequential", None
    scale = None if how.scaler is None else how.scaler.scale(torch.ones((), device=device))
    starts = [
        (root, _start(loss, scale, weight))  # type: ignore[arg-type]
        for root, loss, weight in zip(roots, each, weights, strict=True)
        if root is not None
    ]
    whole = shards is not None or through_grad
    hiding = hiding or whole
    passes = Passes(parameters, mode == "batched", how.chunk_size, how.retain_graph, starts, hiding)
    with passes.grads_aside() if hiding else nullcontext():
        if not starts:
            grads = []
        elif whole:
            grads = passes.through_grad(sharded=shards is not None, joint=joint)
        elif features is None:
            grads = passes.from_losses(joint=joint)
        elif mode != "representation":
            grads = passes.by_features(features)
        else:

            def steer_each(rows: Rows) -> tuple[list[Any], list[Tensor] | None]:
                rows = _spread(rows, roots, len(features))
                direction, weights = steer(Collected(tasks, list(features), rows, values, present, scale))  # type: ignore[misc]
                if weights is None:
                    return direction, None
                return direction, [w for w, root in zip(weights.unbind(), roots, strict=True) if root is not None]

            grads = passes.by_representation(features, steer_each)
    if not joint:
        grads = _spread(grads, roots, len(parameters))
    return Collected(tasks, parameters, grads, values, present, scale)


def _start(loss: Tensor, scale: Tensor | None, weight: Tensor | None) -> Tensor:
    """Return the gradient that a loss's backward pass begins with: 1, or a scale, a weight or both."""
    start = torch.ones_like(loss)
    for factor in (scale, weight):
        if factor is not None:
            start = start * factor.to(loss)
    # A parameter that a loss adds as it is gets this as its gradient.
    return start.as_subclass(Tensor) if converts(type(start)) else start


def _spread(rows: Rows, roots: Sequence[Root | None], width: int) -> Rows:
    """Return a row for each loss; losses without a root have no pass, and their rows hold None only."""
    found = iter(rows)
    return [[None] * width if root is None else next(found) for root in roots]


@torch.no_grad()
def _values(each: list[Tensor | None], device: torch.device) -> Tensor:
    """Return the losses as float64 [T], detached; 0 for an absent one."""
    scalars = [loss if loss is None or loss.dim() == 0 else loss.reshape(()) for loss in each]
    kinds = {None if loss is None else (loss.dtype, loss.device) for loss in scalars}
    if None in kinds or len(kinds) > 1:
        absent = torch.zeros((), dtype=torch.float64, device=device)
        scalars = [absent if loss is None else loss.to(absent) for loss in scalars]
    # A plain tensor, whatever class the losses are of.
    return torch.stack(scalars).to(torch.float64).as_subclass(Tensor)  # type: ignore[arg-type]


def listed(losses: Losses) -> Losses:
    """Return losses that can be gone through more than once."""
    again = (Tensor, Mapping, Sequence, Set)
    return list(losses) if isinstance(losses, Iterable) and not isinstance(losses, again) else losses


def holds_weights(losses: Losses) -> bool:
    """Whether the losses' dtypes are precise enough to apply weights. 16 bits are not: T passes are taken then."""
    each = _check_losses(losses, partial=False)[1]
    return not any(loss.dtype in (torch.bfloat16, torch.float16) for loss in each if loss is not None)


def _check_losses(losses: Losses, partial: bool, empty: bool = False) -> tuple[list[str], list[Tensor | None]]:
    """Return the tasks' names and their losses, of one element each."""
    if isinstance(losses, Tensor):
        if losses.dim() != 1:
            raise ValueError(
                "losses must be a sequence of scalars, one per task, or a 1-D tensor, got a tensor of shape "
                f"{tuple(losses.shape)}"
            )
        losses = list(losses.unbind())
    if isinstance(losses, Mapping):
        tasks, scalars = [*map(str, losses.keys())], list(losses.values())  # a TensorDict iterates over batches
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        tasks, scalars = [str(t) for t in range(len(losses))], list(losses)
    else:
        raise TypeError(
            f"losses must be a sequence or another iterable, a 1-D tensor or a dict of losses, got "
            f"{type(losses).__name__}"
        )
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"losses must have names that differ as strings, got {tasks}")
    if not scalars or (not empty and all(loss is None for loss in scalars)):
        raise ValueError("losses must hold at least one loss, got none")
    for task, loss in zip(tasks, scalars, strict=True):
        if loss is None and partial:
            continue
        if not isinstance(loss, Tensor):
            raise TypeError(f"loss {task!r} must be a tensor, got {describe(loss)} ({_ABSENT})")
        if is_sharded(loss):
            raise TypeError(f"loss {task!r} must not be a DTensor: give its full_tensor()")
        if loss.is_complex():
            raise TypeError(f"loss {task!r} must be real, got {loss.dtype}")
        if loss.numel() != 1:
            raise ValueError(f"loss {task!r} must be a scalar, got shape {tuple(loss.shape)}")
        if not loss.requires_grad:
            raise ValueError(
                f"loss {task!r} has no graph to go back through: it must depend on a parameter, and not be detached or "
                f"computed under no_grad ({_ABSENT})"
            )
    return tasks, scalars
