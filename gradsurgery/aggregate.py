# SPDX-License-Identifier: MIT
"""Stages 2 to 4 in one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

from torch import Tensor

from ._constant import constant
from ._gradients import Grads, TaskGradients, parse
from .backends import choose
from .combine import Direction, check_out, combine, combine_by_rule_of, combine_of, new_out
from .gram import gram_of, zeros_for
from .methods import CoordinateMethod, Method, resolve
from .methods._base import Rollback, weigh
from .methods._buffered import BufferedMethod


@overload
def aggregate(
    grads: Tensor,
    method: str | Method = "pcgrad",
    *,
    losses: Tensor | None = None,
    segments: Sequence[int] | None = None,
    out: Tensor | None = None,
    backend: str | None = None,
    **method_options: Any,
) -> Tensor: ...


@overload
def aggregate(
    grads: Sequence[Sequence[Tensor | None]],
    method: str | Method = "pcgrad",
    *,
    losses: Tensor | None = None,
    segments: Sequence[int] | None = None,
    out: list[Any] | None = None,
    backend: str | None = None,
    **method_options: Any,
) -> list[Any]: ...


def aggregate(
    grads: Grads,
    method: str | Method = "pcgrad",
    *,
    losses: Tensor | None = None,
    segments: Sequence[int] | None = None,
    out: Direction | None = None,
    backend: str | None = None,
    **method_options: Any,
) -> Direction:
    """Return the direction d = sum_t w_t g_t with the weights that ``method`` gives to G.

    Equal to ``combine(grads, methods.get(method, **method_options).weights(gram(grads), losses=losses))``, except for
    methods that keep gradients from step to step, and for coordinate-wise methods, which have no weights. For methods
    whose weights do not depend on G (``needs_gram``) it computes none: gradients that are not finite then affect
    neither the weights nor the state, and of d at most the coordinates concerned.

    Args:
        grads, segments, out: as in :func:`gradsurgery.combine`.
        method: a name of ``methods.available()``, for a new method in its initial state, or a ``Method``, which
            carries its state from call to call.
        losses: [T] loss values, for the methods that need them.
        backend: a name of :func:`gradsurgery.backends` for all stages; None chooses.
        method_options: the named method's own options.

    Returns:
        As :func:`gradsurgery.combine`: [N] or a list of P tensors, in the gradients' dtype; a constant to autograd.

    Raises:
        ValueError: an unknown method, options given together with a ``Method``, missing losses, or an error of a stage.
        TypeError: an option that the method does not have, or an error of a stage.
        RuntimeError: an error of a stage.

    Cost: two reads of the gradients, one write of the direction, and a T x T problem; coordinate-wise methods and those
    that need no G read the gradients once, methods that keep gradients more often. Host synchronisations: none, except
    by the reference backend's iterative solvers, which wait for a G on a GPU unless a CUDA graph is being captured.
    """
    resolved = resolve(method, method_options)
    parsed = parse(grads, segments)
    if out is not None:
        check_out(out, parsed)
    if resolved.needs_losses and losses is None:
        raise ValueError(f"method {resolved.name!r} needs losses=, a tensor [{parsed.num_tasks}]")
    if isinstance(method, str):
        result = _aggregate(resolved, parsed, losses, out, backend, once=True)
    else:
        with Rollback(resolved, parsed.device):
            result = _aggregate(resolved, parsed, losses, out, backend, once=False)
    return result if out is not None else constant("aggregate", result, parsed.differentiable)


def _aggregate(
    method: Method, grads: TaskGradients, losses: Tensor | None, out: Direction | None, backend: str | None, once: bool
) -> Direction:
    """Return the direction; ``once`` if the method is new and used for this call only."""
    if isinstance(method, BufferedMethod):
        return _aggregate_buffers(method, grads, losses, out, backend)
    chosen = choose(backend, grads.device, grads.num_tasks)
    if isinstance(method, CoordinateMethod):
        return combine_by_rule_of(grads, method.rule(grads.device, grads.num_tasks), out, False, chosen)
    if chosen.aggregate is not None:
        solver = method.native_solver(grads.device, grads.num_tasks, once=once)
        if solver is not None:
            out = new_out(grads) if out is None else out
            direct = grads.writing_to(out)
            if direct is not None:
                chosen.aggregate(direct, solver, out)
                return out
    gram = gram_of(grads, chosen) if method.needs_gram else zeros_for(grads)
    weights = weigh(method, gram, losses, backend)
    return combine_of(grads, weights, out, False, chosen)


def _aggregate_buffers(
    method: BufferedMethod, grads: TaskGradients, losses: Tensor | None, out: Direction | None, backend: str | None
) -> Direction:
    """Update what the method keeps in place of the gradients, and return the direction of that."""
    if grads.segmented:
        raise ValueError(f"method {method.name!r} keeps gradients of one segment, got segments")
    rows = grads.rows if grads.matrix is None else [[row] for row in grads.matrix.unbind()]
    assert rows is not None
    outs: Any = out if grads.matrix is None else [out]
    touched = [p for p, column in enumerate(zip(*rows, strict=True)) if any(g is not None for g in column)]
    kept = [[row[p] for p in touched] for row in rows]
    if not touched:
        return [None] * len(rows[0]) if out is None else out
    choose(backend, grads.device, method.num_terms * len(rows))  # raises before anything changes
    step = method.step(kept, losses, None, backend)
    found = combine(step.terms, step.factors, out=None if out is None else [outs[p] for p in touched], backend=backend)
    if out is not None:
        return out
    each: list[Any] = [None] * len(rows[0])
    for p, direction in zip(touched, found, strict=True):
        each[p] = direction
    return each if grads.matrix is None else each[0]
