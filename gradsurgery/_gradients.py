# SPDX-License-Identifier: MIT
"""The one parsed form of ``grads`` that every stage and backend reads, and the checks at the boundary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._checks import as_integer, describe
from ._compiling import is_traced
from ._dtensor import is_sharded
from ._extension import C

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

Grads = Tensor | Sequence[Sequence[Tensor | None]]


@dataclass(slots=True)
class TaskGradients:
    """Gradients of T tasks with respect to P parameters, checked.

    Either ``matrix`` is the flat form [T, N], cut into segments at the ``segments`` offsets, or ``rows`` holds T lists
    of gradients, of which the P ``params`` count (None: all), and ``segments`` one segment id per parameter. Empty
    ``segments`` means one segment. All gradients of one parameter share one dense memory layout.
    """

    num_tasks: int
    num_segments: int
    segments: list[int]
    segmented: bool
    device: torch.device
    matrix: Tensor | None = None
    rows: Sequence[Sequence[Tensor | None]] | None = None
    params: list[int] | None = None
    lists: Any = None
    """The gradients as the compiled extension reads them, bypassing torch's dispatcher; None if it does not."""
    tabulated: list[Any] = field(default_factory=list)
    """What the Triton backend has read off all of ``rows``, once: the same list in what ``select`` returns."""
    differentiable: list[Tensor] = field(default_factory=list)
    """The tensors among the user's gradients that require grad; ``matrix`` and ``rows`` hold them detached."""

    @property
    def entries(self) -> list[Tensor | None]:
        """The T x P gradients of the list form, task by task."""
        assert self.rows is not None
        if self.params is None:
            return [entry for row in self.rows for entry in row]
        return [row[p] for row in self.rows for p in self.params]

    @property
    def like(self) -> list[Tensor | None]:
        """One gradient of each parameter of the list form: shape, dtype and layout of the output."""
        entries = self.entries
        step = len(entries) // self.num_tasks
        # Mostly the first task has one.
        return [
            next((entry for entry in entries[p::step] if entry is not None), None) if first is None else first
            for p, first in enumerate(entries[:step])
        ]

    def writing_to(self, out: Any) -> TaskGradients | None:
        """Return these gradients in a form whose kernels write to ``out`` itself; None if it needs temporaries."""
        if self.lists is not None and self.lists.fits(out):
            return self
        return None if self.matrix is None else replace(self, lists=None)

    def select(self, params: list[int], segments: list[int], num_segments: int) -> TaskGradients:
        """Return some parameters of the list form, in this order, with a segment id for each."""
        return replace(
            self,
            segments=segments,
            num_segments=num_segments,
            segmented=True,
            params=params if self.params is None else [self.params[p] for p in params],
            lists=self.lists and self.lists.select(params, segments, num_segments),
        )


def parse(grads: Grads, segments: Sequence[int] | None) -> TaskGradients:
    """Check ``grads`` and ``segments``; raise ValueError or TypeError with what was wanted and what came."""
    if isinstance(grads, Tensor):
        return _parse_matrix(grads, segments)
    return read_lists(grads, segments) or _parse_lists(grads, segments)


def read_lists(grads: Sequence[Sequence[Tensor | None]], segments: Sequence[int] | None) -> TaskGradients | None:
    """Parse the list form in the compiled extension; None without one, or if the lists hold anything unusual."""
    lists = C.Lists.read(grads) if _reads_past_dispatcher() else None
    if lists is None:
        return None
    parsed = TaskGradients(lists.num_tasks, 1, [], False, lists.device, rows=grads, lists=lists)
    if segments is None:
        return parsed
    ids = _segment_ids(segments, lists.num_params)
    return parsed.select(list(range(lists.num_params)), ids, max(ids) + 1)


def _reads_past_dispatcher() -> bool:
    return C is not None and not is_traced()


def _parse_matrix(grads: Tensor, segments: Sequence[int] | None) -> TaskGradients:
    lists = C.Lists.read_matrix(grads) if segments is None and _reads_past_dispatcher() else None
    if lists is not None:
        return TaskGradients(lists.num_tasks, 1, [], False, lists.device, matrix=grads, lists=lists)
    check_gradient(grads, "grads")
    if grads.dim() != 2 or (grads.shape[1] > 1 and grads.stride(1) != 1):
        raise ValueError(
            f"grads must be [T, N] with a contiguous last dimension, got shape {tuple(grads.shape)} with strides "
            f"{grads.stride()}" + ": contiguous() makes one" * (grads.dim() == 2)
        )
    if not len(grads):
        raise ValueError(f"grads must hold the gradients of at least one task, got shape {tuple(grads.shape)}")
    offsets = []
    if segments is not None:
        offsets = _integers(segments, "offsets [0, .., N] of the flat form")
        if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != grads.shape[1] or sorted(offsets) != offsets:
            raise ValueError(f"segments must be ascending offsets from 0 to N = {grads.shape[1]}, got {offsets}")
    return TaskGradients(
        num_tasks=grads.shape[0],
        num_segments=len(offsets) - 1 if offsets else 1,
        segments=offsets,
        segmented=segments is not None,
        device=grads.device,
        matrix=(grads.detach() if grads.requires_grad else grads).resolve_neg(),
        differentiable=[grads] if grads.requires_grad else [],
    )


def _parse_lists(grads: Sequence[Sequence[Tensor | None]], segments: Sequence[int] | None) -> TaskGradients:
    if not isinstance(grads, Sequence):
        raise TypeError(
            "grads must be a [T, N] tensor or a list of T lists of gradients (one list per task, None where a task has "
            f"no gradient), got {describe(grads)}"
        )
    if not grads:
        raise ValueError("grads must hold the gradients of at least one task, got an empty list")
    entries: list[Tensor | None] = []
    like: list[Tensor | None] = []
    device = None
    differentiable: list[Tensor] = []
    negated = is_traced()  # traced tensors cannot be asked for it
    irregular = set()
    for t, row in enumerate(grads):
        if isinstance(row, Tensor) or not isinstance(row, Sequence):
            raise TypeError(f"grads[{t}] must be a list of tensors or None, got {describe(row)}")
        if t == 0:
            like = [None] * len(row)
        elif len(row) != len(like):
            raise ValueError(
                f"every task must list the same parameters: task 0 has {len(like)} gradients, task {t} has {len(row)}"
            )
        for p, entry in enumerate(row):
            if entry is None:
                continue
            first = like[p]
            if (
                first is None
                or not isinstance(entry, Tensor)
                or entry.dtype != first.dtype
                or entry.shape != first.shape
            ):
                check_gradient(entry, f"grads[{t}][{p}]")
                if first is None:
                    like[p] = entry
                elif entry.shape != first.shape:
                    raise ValueError(
                        f"gradients of parameter {p} must have one shape, got {tuple(first.shape)} and "
                        f"{tuple(entry.shape)} (task {t})"
                    )
                else:
                    raise TypeError(
                        f"gradients of parameter {p} must have one dtype, got {first.dtype} and {entry.dtype} "
                        f"(task {t})"
                    )
            elif entry.layout is not torch.strided:
                check_gradient(entry, f"grads[{t}][{p}]")
            if device is None:
                device = entry.device
            elif entry.device != device:
                raise ValueError(f"all gradients must be on one device, got {device} and {entry.device} (task {t})")
            if not entry.is_contiguous():
                irregular.add(p)
            if entry.requires_grad:
                differentiable.append(entry)
            negated = negated or entry.is_neg()
        entries.extend(row)
    if differentiable or negated:
        # The imaginary part of a conjugate has the opposite sign of what is in memory, which is what kernels read.
        entries = [None if entry is None else entry.detach().resolve_neg() for entry in entries]
    for p in irregular:
        _unify_layout(entries, like, p)
    ids = _segment_ids(segments, len(like))
    return TaskGradients(
        num_tasks=len(grads),
        num_segments=max(ids, default=0) + 1,
        segments=ids,
        segmented=segments is not None,
        device=torch.get_default_device() if device is None else device,
        rows=[entries[begin : begin + len(like)] for begin in range(0, len(entries), len(like))] if like else grads,
        differentiable=differentiable,
    )


def _segment_ids(segments: Sequence[int] | None, num_params: int) -> list[int]:
    if segments is None:
        return []
    ids = _integers(segments, "one segment id per parameter")
    if len(ids) != num_params or any(i < 0 for i in ids):
        raise ValueError(f"segments must name one segment id >= 0 for each of the {num_params} parameters, got {ids}")
    return ids


def check_gradient(value: Any, name: str) -> None:
    """Raise TypeError unless it is a dense, real tensor of this process, of one of DTYPES; ``name`` is for messages."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {describe(value)}")
    if is_sharded(value):
        raise TypeError(
            f"{name} is a {type(value).__name__}, spread over processes: give its to_local(), and add up G over the "
            "processes, as SurgeryOptimizer does"
        )
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor, and gradients must be dense")
    if value.layout is not torch.strided:
        raise TypeError(
            f"{name} is a {value.layout} gradient, and gradients must be dense: use sparse=False in the embedding, or "
            "leave its parameters out of the surgery (shared=)"
        )
    if value.is_complex():
        raise TypeError(
            f"{name} is a {value.dtype} gradient, and gradients must be real: keep the parameter as a real tensor "
            "[..., 2] and use torch.view_as_complex in the forward pass, or leave it out of the surgery (shared=)"
        )
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {value.dtype}")


def _unify_layout(entries: list[Tensor | None], like: list[Tensor | None], p: int) -> None:
    """Give all gradients of parameter p one dense layout: the one they share, else the contiguous one."""
    step = len(like)
    present = [t for t in range(p, len(entries), step) if entries[t] is not None]
    first = like[p]
    assert first is not None
    if is_dense(first) and all(entries[t].stride() == first.stride() for t in present):  # type: ignore[union-attr]
        return
    for t in present:
        entries[t] = entries[t].contiguous()  # type: ignore[union-attr]


def as_float64(values: Tensor) -> Tensor:
    """Return ``values`` detached, contiguous, in float64 and not negated; itself if it is so already."""
    if values.requires_grad:
        values = values.detach()
    if values.dtype is not torch.float64:
        values = values.to(torch.float64)
    return (values if values.is_contiguous() else values.contiguous()).resolve_neg()


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a parameter's gradients."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one block of memory without overlap."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_expanded(tensor: Tensor) -> bool:
    """Whether several elements lie in the same memory, as after ``expand``."""
    return any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))


def _integers(values: Sequence[int], wanted: str) -> list[int]:
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"segments must be a list of int, {wanted}, got {describe(values)}")
    numbers = []
    for value in values:
        number = as_integer(value)
        if number is None or number >= 2**63:
            raise TypeError(f"segments must be a list of int, {wanted}, got {describe(value)} in it")
        numbers.append(number)
    return numbers
