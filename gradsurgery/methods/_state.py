# SPDX-License-Identifier: MIT
"""What methods keep from step to step, and what users give for each task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from .._checks import describe
from .._compiling import capturing, is_traced


@contextmanager
def making_state(name: str, device: torch.device) -> Iterator[None]:
    """A context in which a method's state is made, or moved to a device.

    Raises RuntimeError while a CUDA graph is captured: the state would start anew at each replay. It leaves inference
    mode, because tensors made there cannot be updated outside.
    """
    if capturing(device):
        raise RuntimeError(f"method {name!r} must run once before its steps are captured in a CUDA graph")
    with torch.inference_mode(False):
        yield


def read_losses(name: str, losses: Any, shape: torch.Size, device: torch.device) -> Tensor:
    """Return losses [T] or [..., T] as float64 of that shape [..., T] on the device, detached."""
    if not isinstance(losses, Tensor) or losses.shape not in (shape[-1:], shape):
        error = ValueError if losses is None or isinstance(losses, Tensor) else TypeError
        raise error(f"method {name!r} needs losses, a tensor [{shape[-1]}], got {describe(losses)}")
    if losses.is_complex():
        raise TypeError(f"losses must be real, got {losses.dtype}")
    return losses.detach().to(device, torch.float64).expand(shape).contiguous()


def numbers_of(name: str, values: Iterable[Any] | Mapping[str, Any], device: torch.device) -> Tensor:
    """Return one number per task as float64 [T]; ValueError if there is none, or a value is not a single number."""
    numbers = []
    with suppress(TypeError, ValueError):
        each = list(values.values() if isinstance(values, Mapping) else values)
        are_complex = any(isinstance(value, Tensor) and value.is_complex() for value in each)
        if not are_complex and not any(isinstance(value, Sequence) for value in each):
            numbers = [torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in each]
    if not numbers or any(number.numel() != 1 for number in numbers):
        raise ValueError(f"{name} must hold one number per task, got {values!r}")
    return torch.stack([number.reshape(()) for number in numbers])


def check_like(state: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a ``state_dict`` has dense tensors of these shapes and dtypes."""
    for name, like in wanted.items():
        value = state[name]
        if not isinstance(value, Tensor) or any(
            getattr(value, of) != getattr(like, of) for of in ("shape", "dtype", "layout")
        ):
            raise ValueError(f"{name} must be {describe(like)}, got {describe(value)}")


class PerTask:
    """Numbers that a user gives, one per task. They move to G's device once, because such a copy synchronises."""

    def __init__(
        self,
        name: str,
        values: Sequence[float] | Tensor,
        wanted: str = "finite numbers",
        valid: Callable[[Tensor], Tensor] = torch.isfinite,
    ) -> None:
        self.name = name
        # On the CPU rather than torch's default device, where the check might synchronise, or on "meta" see no values.
        device = None if isinstance(values, Tensor) else "cpu"
        try:
            if isinstance(values, Tensor) and values.is_complex():
                raise TypeError
            self.values = torch.as_tensor(values, dtype=torch.float64, device=device).detach().clone()
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"{name} must be T {wanted}, got {values!r}") from None
        # Traced values cannot be looked at.
        looked_at = not is_traced()
        if (
            self.values.dim() != 1
            or not len(self.values)
            or (looked_at and not (self.values.isfinite() & valid(self.values)).all())
        ):
            raise ValueError(f"{name} must be T {wanted}, got {values!r}")

    def __repr__(self) -> str:
        return repr(self.values.tolist())

    def check(self, num_tasks: int) -> None:
        """Raise ValueError unless there is one number for each task."""
        if len(self.values) != num_tasks:
            raise ValueError(f"{self.name} must hold one number for each of {num_tasks} tasks, got {len(self.values)}")

    def on(self, device: torch.device, num_tasks: int, method: str) -> Tensor:
        """Return the numbers [T] on the device."""
        self.check(num_tasks)
        if self.values.device != device:
            with making_state(method, device):
                self.values = self.values.to(device)
        return self.values
