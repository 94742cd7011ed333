# SPDX-License-Identifier: MIT
"""Stage 4: the weighted sum of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._constant import constant
from ._gradients import Grads, TaskGradients, parse
from .backends import choose

Direction = Tensor | list[Tensor | None]


def combine(
    grads: Grads,
    weights: Tensor,
    *,
    segments: Sequence[int] | None = None,
    out: Direction | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Direction:
    """Return d = sum_t w_t g_t.

    The sum is taken in float64, in ascending t, and rounded once. A gradient whose weight is 0 is not read, so it does not
    matter what it holds.

    Args:
        grads: as in :func:`gradsurgery.gram`.
        weights: [T], or [S, T] with ``segments``; any real floating dtype, on the gradients' device.
        segments: as in :func:`gradsurgery.gram`.
        out: where to write: a contiguous tensor [N] for the flat form, a list of P tensors like the gradients (None only
            where no task has a gradient) for the list form. None allocates.
        accumulate: add to what ``out`` holds instead of overwriting it.
        backend: a name of :func:`gradsurgery.backends`; None chooses.

    Returns:
        [N] for the flat form; a list of P tensors for the list form, None where no task has a gradient. In the gradients'
        dtype. A constant to autograd.

    Raises:
        ValueError: shapes, devices or segments do not fit together; ``accumulate`` without ``out``.
        TypeError: a dtype does not fit.
        RuntimeError: the named backend cannot serve the call.

    Cost: one read of the gradients, one write of the direction. Host synchronisations: none.
    """
    parsed = parse(grads, segments)
    _check_weights(weights, parsed)
    if out is not None:
        _check_out(out, parsed)
    elif accumulate:
        raise ValueError("accumulate=True adds to out, and out is None")
    result = combine_of(parsed, weights, out, accumulate, backend)
    if out is not None or not (parsed.requires_grad or weights.requires_grad):
        return result
    inputs = [*parsed.inputs(), weights]
    if isinstance(result, Tensor):
        return constant("combine", result, inputs)
    return [None if direction is None else constant("combine", direction, inputs) for direction in result]


def combine_of(
    grads: TaskGradients, weights: Tensor, out: Direction | None, accumulate: bool, backend: str | None
) -> Direction:
    """Combine checked gradients under weights [T] or [S, T]."""
    chosen = choose(backend, grads.device, grads.num_tasks)
    weights = weights.detach().to(torch.float64).reshape(grads.num_segments, grads.num_tasks).contiguous()
    with torch.no_grad():
        if grads.matrix is not None:
            target = torch.empty_like(grads.matrix[0]) if out is None else out
            chosen.combine(grads, weights, target, accumulate)  # type: ignore[arg-type]
            return target
        assert grads.like is not None
        if out is None:
            out = [None if g is None else torch.empty_like(g) for g in grads.like]
        _combine_lists(chosen, grads, weights, out, accumulate)
        return out


def _combine_lists(chosen, grads: TaskGradients, weights: Tensor, out, accumulate: bool) -> None:  # type: ignore[no-untyped-def]
    """Write each touched parameter's direction; by way of a temporary where ``out`` has another memory layout."""
    assert grads.like is not None and grads.entries is not None
    params = len(grads.like)
    touched = [p for p in range(params) if grads.like[p] is not None]
    entries, segments = grads.entries, grads.segments
    if len(touched) < params:
        entries = [grads.entries[t * params + p] for t in range(grads.num_tasks) for p in touched]
        segments = [segments[p] for p in touched] if segments else segments
    if not touched:
        return
    targets = [out[p] for p in touched]
    moved = [i for i, p in enumerate(touched) if targets[i].stride() != grads.like[p].stride()]  # type: ignore[union-attr]
    for i in moved:
        targets[i] = torch.empty_like(grads.like[touched[i]]).copy_(targets[i])  # type: ignore[arg-type]
    present = TaskGradients(
        num_tasks=grads.num_tasks,
        num_segments=grads.num_segments,
        segments=segments,
        segmented=grads.segmented,
        device=grads.device,
        requires_grad=False,
        entries=entries,
    )
    chosen.combine(present, weights, targets, accumulate)
    for i in moved:
        out[touched[i]].copy_(targets[i])


def _check_weights(weights: Tensor, grads: TaskGradients) -> None:
    shape = (grads.num_segments, grads.num_tasks) if grads.segmented else (grads.num_tasks,)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights must be a real floating-point tensor, got {getattr(weights, 'dtype', type(weights))}")
    if weights.shape != shape:
        raise ValueError(f"weights must have shape {shape}, got {tuple(weights.shape)}")
    if weights.device != grads.device:
        raise ValueError(f"weights must be on the gradients' device {grads.device}, got {weights.device}")


def _check_out(out: Direction, grads: TaskGradients) -> None:
    if grads.matrix is not None:
        if not isinstance(out, Tensor) or out.shape != grads.matrix.shape[1:] or not out.is_contiguous():
            shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"out must be a contiguous tensor [{grads.matrix.shape[1]}], got {shape}")
        _check_target(out, grads.matrix, "out")
        return
    assert grads.like is not None
    if isinstance(out, Tensor) or len(out) != len(grads.like):
        raise ValueError(f"out must be a list of {len(grads.like)} tensors, one per parameter")
    for p, (target, like) in enumerate(zip(out, grads.like, strict=True)):
        if like is None:
            continue
        if not isinstance(target, Tensor) or target.shape != like.shape:
            raise ValueError(
                f"out[{p}] must be a tensor of shape {tuple(like.shape)}, got {target if target is None else tuple(target.shape)}"
            )
        _check_target(target, like, f"out[{p}]")


def _check_target(target: Tensor, like: Tensor, name: str) -> None:
    if target.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like the gradients, got {target.dtype}")
    if target.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the gradients, got {target.device}")
