# SPDX-License-Identifier: MIT
"""Whether backward passes returned gradients in the same memory."""

from __future__ import annotations

import torch
from torch import Tensor

from ._extension import C

Rows = list[list[Tensor | None]]


class OverwrittenError(RuntimeError):
    """A backward pass wrote over what another one had returned."""


def check_memory(rows: Rows) -> None:
    """Raise OverwrittenError where passes, a row each, returned gradients in the same memory."""
    if len(rows) < 2:
        return
    shared = None if C is None else C.shares_memory(rows)
    if _shares_memory(rows) if shared is None else shared:
        raise OverwrittenError(
            "backward passes returned gradients in the same memory, where one writes over the other's: each must "
            "return new tensors. The passes of torch.cuda.make_graphed_callables do not (capture the whole step "
            "instead), nor do functions that return a saved gradient as it is (clone it there)"
        )


def _shares_memory(rows: Rows) -> bool:
    for column in zip(*rows, strict=True):
        grads = [grad for grad in column if type(grad) is Tensor and grad.layout is torch.strided]
        # Whether they have memory is asked only of gradients with the same address: it takes longer.
        if _repeats(grads) and _repeats([grad for grad in grads if _has_memory(grad)]):
            return True
    return False


def _repeats(grads: list[Tensor]) -> bool:
    return len({grad.data_ptr() for grad in grads}) < len(grads)


def check_not_freed(tensor: Tensor) -> None:
    """Raise ValueError if the tensor's elements have no memory, as after ``untyped_storage().resize_(0)``."""
    if _should_have_memory(tensor) and not tensor.untyped_storage().nbytes():
        raise ValueError(f"tensors must have memory, got one of shape {tuple(tensor.shape)} without")


def _has_memory(grad: Tensor) -> bool:
    """Whether the address identifies the tensor."""
    return _should_have_memory(grad) and grad.untyped_storage().nbytes() > 0


def _should_have_memory(tensor: Tensor) -> bool:
    """Whether it has elements in memory of its own: subclasses and sparse tensors hold others, some have none."""
    if type(tensor) is not Tensor or tensor.layout is not torch.strided:
        return False
    return tensor.numel() > 0 and not tensor.is_meta and not tensor._is_zerotensor()
