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
        addresses = [grad.data_ptr() for grad in column if grad is not None and _has_memory(grad)]
        if len(set(addresses)) < len(addresses):
            return True
    return False


def _has_memory(grad: Tensor) -> bool:
    """Whether the address identifies the tensor: subclasses and sparse tensors hold others, some have no memory."""
    if type(grad) is not Tensor or grad.layout is not torch.strided:
        return False
    if grad.is_meta or grad._is_zerotensor():
        return False
    return grad.numel() > 0 and grad.untyped_storage().nbytes() > 0
