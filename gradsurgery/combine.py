# SPDX-License-Identifier: MIT
"""Stage 4: the weighted sum of the task gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from ._checks import describe
from ._compiling import is_traced
from ._constant import constant
from ._extension import Rule
from ._gradients import Grads, TaskGradients, as_float64, is_dense, is_expanded, parse
from .backends import Backend, choose

Direction = Tensor | list[Any]
"""[N] for the flat form; P tensors for the list form, None where no task has a gradient."""


@overload
def combine(
    grads: Tensor,
    weights: Tensor,
    *,
    segments: Sequence[int] | None = None,
    out: Tensor | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def combine(
    grads: Sequence[Sequence[Tensor | None]],
    weights: Tensor,
    *,
    segments: Sequence[int] | None = None,
    out: list[Any] | None = None,
    accumulate: bool = False,
    backend: str | None = None,
) -> list[Any]: ...


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

    The sum is taken in float64, in ascending t, and rounded once (to 16-bit dtypes by way of float32). A gradient whose
    weight is 0 is not read, so it does not matter what it holds.

    Args:
        grads: as in :func:`gradsurgery.gram`.
        weights: [T], or [S, T] with ``segments``; any real floating dtype, on the gradients' device.
        segments: as in :func:`gradsurgery.gram`.
        out: where to write: a contiguous tensor [N] for the flat form, a list of P tensors like the gradients (None
            only where no task has a gradient) for the list form. It may be one task's gradients, but must not share
            memory with any others. None allocates.
        accumulate: add to what ``out`` holds instead of overwriting it.
        backend: a name of :func:`gradsurgery.backends`; None chooses.

    Returns:
        [N] for the flat form; a list of P tensors for the list form, None where no task has a gradient. In the
        gradients' dtype. A constant to autograd.

    Raises:
        ValueError: shapes, devices or segments do not fit together; ``out`` partly overlaps a gradient of the same
            parameter; ``accumulate`` without ``out``.
        TypeError: a dtype does not fit.
        RuntimeError: the named backend cannot serve the call.

    Cost: one read of the gradients, one write of the direction. Host synchronisations: none.
    """
    parsed = parse(grads, segments)
    _check_weights(weights, parsed)
    if out is not None:
        check_out(out, parsed)
    elif accumulate:
        raise ValueError("accumulate=True adds to out, and out is None")
    chosen = choose(backend, parsed.device, parsed.num_tasks)
    result = combine_of(parsed, weights, out, accumulate, chosen)
    return result if out is not None else constant("combine", result, [*parsed.differentiable, weights])


def combine_of(
    grads: TaskGradients, weights: Tensor, out: Direction | None, accumulate: bool, backend: Backend
) -> Direction:
    """Combine checked gradients under weights [T] or [S, T]."""
    weights = as_float64(weights)
    return _write(grads, out, lambda grads, out: backend.combine(grads, weights, out, accumulate))


def combine_by_rule_of(
    grads: TaskGradients, rule: Rule, out: Direction | None, accumulate: bool, backend: Backend
) -> Direction:
    """Combine checked gradients by a rule that works coordinate by coordinate."""
    return _write(grads, out, lambda grads, out: backend.combine_by_rule(grads, rule, out, accumulate))


def _write(grads: TaskGradients, out: Direction | None, write: Callable[[TaskGradients, Direction], None]) -> Direction:
    """Write the direction to ``out``, or to a new one."""
    if out is None:
        out = new_out(grads)
    direct = grads.writing_to(out)
    if direct is not None:
        write(direct, out)
    else:
        _write_lists(grads, out, write)
    return out


def new_out(grads: TaskGradients) -> Direction:
    """Return an uninitialised direction, with None where no task has a gradient."""
    if grads.lists is not None:
        return grads.lists.new_out()  # type: ignore[no-any-return]
    if grads.matrix is not None:
        return grads.matrix.new_empty(grads.matrix.shape[1])
    return [None if like is None else torch.empty_like(like) for like in grads.like]


def _write_lists(grads: TaskGradients, out: Direction, write: Callable[[TaskGradients, Direction], None]) -> None:
    """Write the direction of each parameter with a gradient; via a temporary if ``out`` has another memory layout."""
    like = grads.like
    touched = [p for p, first in enumerate(like) if first is not None]
    if not touched:
        return
    if len(touched) < len(like):
        segments = [grads.segments[p] for p in touched] if grads.segments else []
        grads = grads.select(touched, segments, grads.num_segments)
    written = [
        out[p] if _same_layout(out[p], like[p]) else torch.empty_like(like[p]).copy_(out[p])  # type: ignore[arg-type]
        for p in touched
    ]
    # Without ``lists`` operators are called, which also take, for example, tensors of subclasses.
    write(replace(grads, lists=None), written)
    for p, result in zip(touched, written, strict=True):
        if result is not out[p]:
            out[p].copy_(result)


def _same_layout(a: Tensor, b: Tensor) -> bool:
    return a.stride() == b.stride() or (a.is_contiguous() and b.is_contiguous())


def _check_weights(weights: Tensor, grads: TaskGradients) -> None:
    shape = (grads.num_segments, grads.num_tasks) if grads.segmented else (grads.num_tasks,)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"weights must be a real floating-point tensor, got {describe(weights)}")
    if weights.shape != shape:
        raise ValueError(f"weights must have shape {shape}, got {tuple(weights.shape)}")
    if weights.device != grads.device:
        raise ValueError(f"weights must be on the gradients' device {grads.device}, got {weights.device}")


def check_out(out: Direction, grads: TaskGradients) -> None:
    """Raise ValueError or TypeError unless the direction can be written there."""
    if grads.lists is not None and grads.lists.fits(out, apart=True):
        return
    if grads.matrix is not None:
        if not isinstance(out, Tensor) or out.shape != grads.matrix.shape[1:] or not out.is_contiguous():
            dense = isinstance(out, Tensor) and out.layout is torch.strided
            strides = f" with strides {out.stride()}" if dense else ""  # type: ignore[union-attr]
            raise ValueError(f"out must be a contiguous tensor [{grads.matrix.shape[1]}], got {describe(out)}{strides}")
        _check_target(out, grads.matrix, "out")
        _check_apart(out, grads.matrix, "out")
        return
    likes, entries = grads.like, grads.entries
    if not isinstance(out, (list, tuple)) or len(out) != len(likes):
        raise ValueError(f"out must be a list of {len(likes)} tensors, one per parameter")
    for p, (target, like) in enumerate(zip(out, likes, strict=True)):
        if like is None:
            continue
        if not isinstance(target, Tensor) or target.shape != like.shape:
            raise ValueError(f"out[{p}] must be a tensor of shape {tuple(like.shape)}, got {describe(target)}")
        _check_target(target, like, f"out[{p}]")
        _check_apart(target, [g for g in entries[p :: len(likes)] if g is not None], f"out[{p}]")


def _check_target(target: Tensor, like: Tensor, name: str) -> None:
    if target.layout is not torch.strided:
        raise TypeError(f"{name} must be dense, got {target.layout}")
    if is_expanded(target):
        raise ValueError(f"{name} must have memory for each element, got an expanded tensor")
    if target.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require grad, because a direction is a constant to autograd")
    if target.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like the gradients, got {target.dtype}")
    if target.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the gradients, got {target.device}")
    if is_traced():
        return  # the rest cannot be asked of traced tensors
    if target.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} is an inference tensor, which can be written to in inference mode only")
    if target.is_neg():
        raise TypeError(f"{name} must not be a negated view, got one: give its resolve_neg()")


def _check_apart(target: Tensor, gradients: Tensor | list[Tensor], name: str) -> None:
    """Raise ValueError if the target partly overlaps one of the gradients, which are the rows of a matrix or a list."""
    # Traced tensors have no memory, those of subclasses may have none; a target that is not dense gets a temporary.
    if is_traced() or type(target) not in (Tensor, Parameter) or not is_dense(target):
        return
    if isinstance(gradients, Tensor):
        step = gradients.stride(0) * gradients.itemsize
        places = [gradients.data_ptr() + t * step for t in range(len(gradients))]
    else:
        places = [gradient.data_ptr() for gradient in gradients]
    begin, size = target.data_ptr(), target.nbytes
    if any(place != begin and place < begin + size and begin < place + size for place in places):
        raise ValueError(f"{name} must be one of its gradients or apart from them, got one that partly overlaps")
