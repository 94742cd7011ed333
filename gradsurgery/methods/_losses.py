# SPDX-License-Identifier: MIT
"""The base classes of methods whose weights come from the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import check_not_negative, check_number
from .._constant import constant
from ..backends import check_name
from ..backends.problems import are_finite, is_finite
from ..functional import check_gram
from ._state import PerTask, read_losses
from ._stateful import StatefulMethod


class LossMethod(StatefulMethod):
    """Weights from the losses [T] or [..., T] alone; of G only the shape, the device and whether it is finite matter.

    A problem does not count if G or a loss is not finite, or if a loss is negative and the method needs logarithms. Its
    weights are then NaN, and its state stays. ``aggregate`` and ``backward`` of the optimizers compute no G for these
    methods, so there a step whose losses are finite counts even if its gradients are not. Subclasses define ``_weigh``,
    which returns the weights and updates the state.
    """

    needs_losses = True
    needs_gram = False
    weights_losses = True
    weights_from = "losses"
    linear = True
    takes_logarithms: ClassVar[bool] = False

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [..., T] and update the state, if there is one.

        Args:
            gram: [..., T, T].
            losses: [T], or [..., T] for one set for each problem.
            backend: a name of :func:`gradsurgery.backends`; it is checked, but not used.

        Raises:
            ValueError: the losses, the state or an option are for another number of tasks, or losses are missing.
            RuntimeError: the first call is captured in a CUDA graph.
        """
        check_name(backend)
        problems = check_gram(gram)
        values = read_losses(self.name, losses, gram.shape[:-1], gram.device)
        counts = self._counts(values) & is_finite(problems)
        weights = torch.where(counts, self._weigh(values, counts), torch.nan)
        return constant(f"{self.name} weights", weights, [gram])

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        """Return the weights for float64 losses [..., T]; update the state of the problems that count, [..., 1]."""
        raise NotImplementedError

    def _counts(self, losses: Tensor) -> Tensor:
        """Return whether each problem's losses have weights, bool [..., 1]."""
        counts = are_finite(losses)
        return counts & (losses >= 0).all(-1, keepdim=True) if self.takes_logarithms else counts

    def _state_for(self, like: Tensor) -> dict[str, Tensor]:
        self._state = super()._state_for(like)  # nothing after it raises
        return self._state


_LARGEST = 80.0
"""The bound on |s|: e^s is then finite in float32."""


class TrainedScales(LossMethod):
    """Weights that are a function of T numbers s, trained by plain gradient descent and kept from -80 to 80.

    Args:
        lr: step on s, >= 0.
        initial: s before the first step; a number, or T.
    """

    state_names = ("s",)

    def __init__(self, lr: float = 0.025, initial: float | Sequence[float] | Tensor = 0.0) -> None:
        self.lr = check_not_negative("lr", lr)
        one = not isinstance(initial, Sequence) and getattr(initial, "ndim", 0) == 0
        if one:
            self.initial: float | PerTask = check_number("initial", initial)
            if not abs(self.initial) <= _LARGEST:
                raise ValueError(f"initial must be from -{_LARGEST:g} to {_LARGEST:g}, got {initial}")
        else:
            wanted = f"numbers from -{_LARGEST:g} to {_LARGEST:g}"
            self.initial = PerTask("initial", initial, wanted, lambda values: values.abs() <= _LARGEST)  # type: ignore[arg-type]

    def _initial(self, losses: Tensor) -> dict[str, Tensor]:
        if isinstance(self.initial, float):
            return {"s": torch.full_like(losses, self.initial)}
        return {"s": self.initial.on(losses.device, losses.shape[-1], self.name).expand_as(losses).clone()}

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        if self._state is not None:
            self._state["s"].clamp_(-_LARGEST, _LARGEST)

    def _descend(self, counts: Tensor, s: Tensor, slope: Tensor) -> None:
        """Take a step on s, where it counts and does not overflow."""
        moved = s - self.lr * slope
        self._keep(counts, s=torch.where(moved.abs() < math.inf, moved.clamp(-_LARGEST, _LARGEST), moved))
