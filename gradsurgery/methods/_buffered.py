# SPDX-License-Identifier: MIT
"""Methods that keep tensors as large as the task gradients from step to step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .._checks import describe
from ..backends.problems import are_finite, is_finite
from ..combine import combine
from ..gram import gram
from ._state import check_like, making_state, read_losses
from ._stateful import StatefulMethod

Rows = Sequence[Sequence[Tensor | None]]
Buffers = list[list[Tensor]]


@dataclass(slots=True)
class Given:
    """What a step was given, and what follows from it."""

    rows: Rows
    """T lists of P task gradients, None where there is none; every parameter has one."""
    losses: Tensor | None
    """[T] float64, if the method needs them; else they are ignored."""
    scale: Tensor | None
    """The gradient scaler's factor on ``rows``, []; None: 1."""
    backend: str | None
    counted: Sequence[bool]
    """For each parameter, whether it is part of this process's sums."""
    total: Callable[[Tensor], Tensor]
    """Maps this process's sums to those over all processes, if gradients are sharded."""
    gram: Tensor
    """G [T, T] of the rows, unscaled."""
    present: Tensor
    """Whether each task has a gradient, bool [T]."""
    finite: Tensor
    """Whether gradients and losses are finite, bool []; if not, the step leaves the state as it was."""


class Step(NamedTuple):
    """The result of a step: G [T, T] of the rows that the method keeps, their weights [T], and d as a sum of terms."""

    gram: Tensor
    weights: Tensor
    terms: Rows
    factors: Tensor
    """[number of terms], one for each term of d; they give d the scale of the step's rows."""


def absent(rows: Rows) -> list[int]:
    """Return the tasks without any gradient."""
    return [t for t, row in enumerate(rows) if all(g is None for g in row)]


class BufferedMethod(StatefulMethod):
    """A method that keeps tensors as large as the gradients; G and d are those of rows that replace the gradients.

    Buffers are T lists of P tensors; a missing gradient counts as zero. A step with a gradient that is not finite
    leaves the state as it was, and its weights are NaN. State: the buffers, and the other tensors, all on the
    gradients' device.
    """

    weights_from: ClassVar[str] = "gradients"
    num_terms: ClassVar[int] = 1
    """d is a sum of at most ``num_terms`` times T tensors."""

    _buffers: Buffers | None = None

    @property
    def tells_tasks_apart(self) -> bool:
        """True: each buffer belongs to one task."""
        return True

    def step(
        self,
        rows: Rows,
        losses: Tensor | None,
        scale: Tensor | None,
        backend: str | None,
        counted: Sequence[bool] | None = None,
        total: Callable[[Tensor], Tensor] = lambda numbers: numbers,
    ) -> Step:
        """Take a step: update the state, and return the terms of d. Arguments are those of ``Given``."""
        self._begin(rows)
        counted = [True for _ in rows[0]] if counted is None else counted
        segments = [0 if here else 1 for here in counted]
        # gram() raises unless the tasks' gradients of a parameter have one shape and dtype.
        products = total(gram(rows, segments=segments, backend=backend)[0])
        if scale is not None:
            products = products / scale.double().square()
        finite = is_finite(products)[0]
        if self.needs_losses:
            losses = read_losses(self.name, losses, products.shape[:-1], products.device)
            finite = finite & are_finite(losses)[0]
        self._prepare(rows, products)
        present = torch.ones(len(rows), dtype=torch.bool, device=products.device)
        for t in absent(rows):
            present[t].fill_(False)  # an assignment would copy from the host
        given = Given(rows, losses, scale, backend, counted, total, products, present, finite)
        kept = self._replace(given)
        problem = products if kept is rows else total(gram(kept, segments=segments, backend=backend)[0])
        weights = self._weigh(given, problem)
        weights = torch.where(given.finite & is_finite(problem), weights, torch.nan)
        return Step(problem, weights, *self._terms(given, kept, weights))

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Raise ValueError: the weights are those of gradients that the method keeps, not of G."""
        raise ValueError(
            f"method {self.name!r} weighs gradients that it keeps: use gradsurgery.aggregate or SurgeryOptimizer"
        )

    def _begin(self, rows: Rows) -> None:
        """Check the rows before anything changes."""

    def _prepare(self, rows: Rows, products: Tensor) -> None:
        """Make the state for these rows, or bring it to their dtypes and device; ValueError if it is for other rows."""
        first = [next(g for g in column if g is not None) for column in zip(*rows, strict=True)]
        dtypes = [self._kept_in(g.dtype) for g in first]
        if self._buffers is not None:
            _check_alike(self._buffers, len(rows), first, self.name)
            if dtypes != [b.dtype for b in self._buffers[0]]:
                # The model's dtype has changed.
                with making_state(self.name, self._buffers[0][0].device):
                    self._buffers = [[b.to(d) for b, d in zip(row, dtypes, strict=True)] for row in self._buffers]
        if self._buffers is None or self._state is None:
            with making_state(self.name, products.device):
                self._buffers = [
                    [torch.zeros_like(g, dtype=d) for g, d in zip(first, dtypes, strict=True)] for _ in rows
                ]
                self._state = self._initial(products[0])
        if next(iter(self._state.values())).device != products.device:
            with making_state(self.name, products.device):
                self._buffers = [[b.to(products.device) for b in row] for row in self._buffers]
                self._state = {name: value.to(products.device) for name, value in self._state.items()}

    def _replace(self, given: Given) -> Rows:
        """Update the buffers; return the rows for G and d: unscaled ones, or ``given.rows`` with their scale.

        It may also set ``given.finite`` to False.
        """
        raise NotImplementedError

    def _weigh(self, given: Given, gram: Tensor) -> Tensor:
        """Return the weights for the G of the rows from ``_replace``; their values do not matter if G is not finite."""
        raise NotImplementedError

    def _terms(self, given: Given, kept: Rows, weights: Tensor) -> tuple[Rows, Tensor]:
        """Return the terms of d and their factors; ``kept`` is what ``_replace`` returned."""
        return kept, weights if given.scale is None or kept is given.rows else weights * given.scale.double()

    def _kept_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of buffers for gradients of this dtype."""
        return dtype

    def _average(self, given: Given, keep: Tensor, factor: Tensor) -> Buffers:
        """Replace each buffer b_t by keep b_t + factor_t g_t, in a finite step; keep is [] or [T], factor [T]."""
        assert self._buffers is not None
        # An infinite entry would stay so, hence such a step does not count. Float16 entries are clamped below instead:
        # there norms may be out of range where no entry is.
        largest = [torch.finfo(b.dtype).max / 2 for b in self._buffers[0] if b.dtype != torch.float16]
        most = min([math.inf, *largest])
        given.finite = given.finite & (factor * given.gram.diagonal().sqrt() <= most).all()
        if given.scale is not None:
            factor = factor / given.scale.double()
        kept = torch.where(given.finite, keep, 1).expand_as(factor)
        weights = torch.stack([kept, torch.where(given.finite, factor, 0)], 1)
        # One call for all of them: two "tasks" with T times P "parameters", and a segment for each task.
        flat: list[Any] = [b for row in self._buffers for b in row]
        segments = [t for t, row in enumerate(given.rows) for _ in row]
        combine(
            [flat, [g for row in given.rows for g in row]], weights, segments=segments, out=flat, backend=given.backend
        )
        if short := [b for b in flat if b.dtype == torch.float16]:
            end = torch.finfo(torch.float16).max
            torch._foreach_clamp_min_(short, -end)
            torch._foreach_clamp_max_(short, end)
        return self._buffers

    def state_dict(self) -> dict[str, Any]:
        """Return the buffers and the other tensors; None each before the first step."""
        buffers = self._buffers and [[b.clone() for b in row] for row in self._buffers]
        return {"buffers": buffers, **super().state_dict()}

    def _snapshot(self) -> bool:
        return self._state is not None

    def _roll_back(self, snapshot: bool) -> None:
        # Buffers are too large to be kept twice: only a first step is undone.
        if not snapshot:
            self._buffers = self._state = None

    def _restore(self, state: dict[str, Any]) -> None:
        if state["buffers"] is None:
            self._buffers = self._state = None
            return
        kept = state["buffers"]
        if not isinstance(kept, Sequence) or not all(
            isinstance(row, Sequence) and all(isinstance(b, Tensor) for b in row) for row in kept
        ):
            raise ValueError(f"buffers must be T lists of tensors, got {describe(kept)}")
        of_each = [[(b.shape, b.dtype) for b in row] for row in kept]
        if not kept or any(row != of_each[0] for row in of_each):
            raise ValueError("buffers must be of the same shapes and dtypes for each task, got others")
        tensors = {name: state[name] for name in self.state_names}
        check_like(tensors, self._initial(torch.empty(len(kept), dtype=torch.float64, device="cpu")))
        if self._buffers is not None:
            _check_alike(self._buffers, len(kept), kept[0], self.name)
        if self._buffers and [b.dtype for b in self._buffers[0]] == [b.dtype for b in kept[0]]:
            # In place: a captured CUDA graph uses the same tensors.
            for mine, theirs in zip(self._buffers, kept, strict=True):
                torch._foreach_copy_(mine, list(theirs))
        else:
            self._buffers = [[b.clone() for b in row] for row in kept]
        self._take_over(tensors)


def _check_alike(buffers: Buffers, num_tasks: int, gradients: Sequence[Tensor], name: str) -> None:
    """Raise ValueError unless the buffers are for this number of tasks and for gradients of these shapes."""
    shapes = [b.shape for b in buffers[0]]
    if len(buffers) != num_tasks or shapes != [g.shape for g in gradients]:
        raise ValueError(
            f"the state of method {name!r} is for {len(buffers)} tasks and {len(shapes)} shared parameters of other "
            f"shapes, got {num_tasks} and {len(gradients)}"
        )
