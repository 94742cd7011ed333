# SPDX-License-Identifier: MIT
"""What the methods share whose weights come from the losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import check_not_negative, check_number, describe
from .._constant import constant
from ..backends import check_name
from ..backends.problems import are_finite, is_finite
from ..functional import check_gram
from ._base import Method
from ._state import PerTask, check_like, keep_state, making_state, read_losses


class LossMethod(Method):
    """Weights from the losses [T] or [..., T] alone; of G only the shape, the device and whether it is finite count.

    A problem does not count where G or a loss is not finite, or a loss is negative and the method needs logarithms: its
    weights are NaN and its state stays. ``backward`` of the optimizers computes no G for these methods, so there a step
    whose losses are finite counts even if its gradients are not. Subclasses say in ``_weigh`` what the weights are, and
    what the state becomes.

    State: float64, int64 or bool tensors by name, the first [..., T], one row for each problem.
    """

    needs_losses = True
    needs_gram = False
    weights_losses = True
    needs = "losses"
    linear = True
    state_names: ClassVar[tuple[str, ...]] = ()
    takes_logarithms: ClassVar[bool] = False

    _state: dict[str, Tensor] | None = None

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [..., T] and update the state, if there is one.

        Args:
            gram: [..., T, T].
            losses: [T], or [..., T] for one set for each problem.
            backend: a name of :func:`gradsurgery.backends`, of which none is needed.

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
        """Return the weights for float64 losses [..., T]; keep the new state of those problems that count, [..., 1]."""
        raise NotImplementedError

    def _initial(self, losses: Tensor) -> dict[str, Tensor]:
        """Return the initial state for losses [..., T]."""
        return {}

    def _counts(self, losses: Tensor) -> Tensor:
        """Return whether each problem's losses have weights, bool [..., 1]."""
        counts = are_finite(losses)
        return counts & (losses >= 0).all(-1, keepdim=True) if self.takes_logarithms else counts

    def _state_for(self, losses: Tensor) -> dict[str, Tensor]:
        """Return the state for losses [..., T], on their device."""
        if self._state is None:
            with making_state(self.name, losses.device):
                self._state = self._initial(losses)
        first = self._state[self.state_names[0]]
        if self._losses_shape(first) != losses.shape:
            raise ValueError(
                f"the state of method {self.name!r} is for losses of shape {tuple(self._losses_shape(first))}, got "
                f"{tuple(losses.shape)}"
            )
        if first.device != losses.device:
            with making_state(self.name, losses.device):
                self._state = {name: value.to(losses.device) for name, value in self._state.items()}
        return self._state

    def _keep(self, counts: Tensor, **new: Tensor) -> None:
        """Write the new state where it counts."""
        assert self._state is not None
        keep_state(self._state, new, counts)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, tensors by name; None each before the first step."""
        state = self._state or dict.fromkeys(self.state_names)
        return {name: None if value is None else value.clone() for name, value in state.items()}

    def _restore(self, state: dict[str, Any]) -> None:
        if all(value is None for value in state.values()):
            self._state = None
            return
        first = state[self.state_names[0]]
        if not isinstance(first, Tensor) or not self._losses_shape(first):
            raise ValueError(f"{self.state_names[0]} must be a tensor [..., T], got {describe(first)}")
        losses = torch.empty(self._losses_shape(first), dtype=torch.float64, device=first.device)
        check_like(state, self._initial(losses))
        if self._state is not None and self._state[self.state_names[0]].shape == first.shape:
            for name, value in state.items():
                self._state[name].copy_(value)
        else:
            self._state = {name: state[name].clone() for name in self.state_names}

    def _losses_shape(self, first: Tensor) -> torch.Size:
        """Return the shape of the losses that go with the first tensor of the state."""
        return first.shape


_LARGEST = 80.0
"""Of s: e^s is then finite in float32."""


class TrainedScales(LossMethod):
    """Weights that are a function of T numbers s, which plain gradient descent trains, and which stay within 80 of 0.

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
