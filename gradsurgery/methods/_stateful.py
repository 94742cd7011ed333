# SPDX-License-Identifier: MIT
"""Methods that keep small tensors from step to step."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import check_word, describe
from ._base import Method
from ._state import check_like, making_state


class StatefulMethod(Method):
    """A method with a state: float64, int64 or bool tensors by name, a row for each problem.

    Subclasses name the tensors in ``state_names``; ``_initial`` returns their values before the first step.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    _state: dict[str, Tensor] | None = None

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step, for weights like this float64 tensor [..., T]."""
        return {}

    def _state_for(self, like: Tensor) -> dict[str, Tensor]:
        """Return the state for weights like these, on their device; only a step that is done keeps it in the method."""
        if self._state is None:
            with making_state(self.name, like.device):
                return self._initial(like)
        first = self._state[self.state_names[0]]
        if self._shape_of(first) != like.shape:
            raise ValueError(
                f"the state of method {self.name!r} is for weights of shape {tuple(self._shape_of(first))}, got "
                f"{tuple(like.shape)}"
            )
        if first.device == like.device:
            return self._state
        with making_state(self.name, like.device):
            return {name: value.to(like.device) for name, value in self._state.items()}

    def _keep(self, counts: Tensor, /, **new: Tensor) -> None:
        """Write new values into the state where ``counts``, bool [..., 1], is true and they are finite.

        In place, because a captured CUDA graph reads and writes these tensors.
        """
        assert self._state is not None
        for name, value in new.items():
            written = counts & (value.abs() < math.inf) if value.is_floating_point() else counts
            torch.where(written, value, self._state[name], out=self._state[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the state, tensors by name; None each before the first step."""
        state = self._state or dict.fromkeys(self.state_names)
        return {name: None if value is None else value.clone() for name, value in state.items()}

    def _restore(self, state: dict[str, Any]) -> None:
        self._take_over(self._checked(state))

    def _checked(self, state: dict[str, Any]) -> dict[str, Tensor] | None:
        """Return the tensors of a ``state_dict``, checked, in float64; None if it is from before the first step."""
        tensors = {name: state[name] for name in self.state_names}
        for name, value in tensors.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                tensors[name] = value.double()
        if all(value is None for value in tensors.values()):
            return None
        first = tensors[self.state_names[0]]
        if not isinstance(first, Tensor) or not self._shape_of(first) or not self._shape_of(first)[-1]:
            raise ValueError(f"{self.state_names[0]} must be a tensor [..., T], got {describe(first)}")
        like = torch.empty(self._shape_of(first), dtype=torch.float64, device=first.device)
        check_like(tensors, self._initial(like))
        return tensors

    def _take_over(self, state: dict[str, Tensor] | None) -> None:
        """Make this the state, in place if shapes allow, because a captured CUDA graph uses the same tensors."""
        if state and self._state and all(self._state[name].shape == value.shape for name, value in state.items()):
            for name, value in state.items():
                self._state[name].copy_(value)
        else:
            # Kernels need them contiguous.
            self._state = state and {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}

    def _shape_of(self, first: Tensor) -> torch.Size:
        """Return the shape of the weights that go with the first tensor of the state."""
        return first.shape


class SteppedMethod(Method):
    """A method whose random numbers are a function of a seed and the number of the step.

    State: the seed and the step counter, which lives on G's device and is never read on the host. A step whose G is not
    finite counts, too.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = check_word("seed", seed)
        self._step: Tensor | None = None

    def _step_on(self, device: torch.device) -> Tensor:
        """Return the step counter on the device, which the caller reads and increments."""
        if self._step is None:
            with making_state(self.name, device):
                # Made where G lives: a copy from the host would synchronise.
                self._step = torch.zeros((), dtype=torch.int64, device=device)
        elif self._step.device != device:
            with making_state(self.name, device):
                self._step = self._step.to(device)
        return self._step

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and the step counter."""
        step = torch.zeros((), dtype=torch.int64, device="cpu") if self._step is None else self._step.clone()
        return {"seed": self.seed, "step": step}

    def _restore(self, state: dict[str, Any]) -> None:
        seed, step = check_word("seed", state["seed"]), state["step"]
        if not isinstance(step, Tensor) or step.dtype != torch.int64 or step.dim() != 0:
            raise ValueError(f"step must be an int64 tensor [], got {step!r}")
        self.seed = seed
        if self._step is None:
            self._step = step.clone()
        else:
            self._step.copy_(step)  # in place: a captured CUDA graph uses the same tensor
