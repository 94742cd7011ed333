# SPDX-License-Identifier: MIT
"""Results are constants to autograd, and say so when somebody asks for a gradient through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class NotDifferentiableError(RuntimeError):
    """A gradient was asked for through the result of gradient surgery."""


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, result: Tensor, *inputs: Tensor) -> Tensor:
        ctx.name = name
        return result.detach()

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        raise NotDifferentiableError(
            f"the result of {ctx.name} is a constant to autograd: detach() it, or take its inputs without a graph"
        )


def constant(name: str, result: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """Return ``result``, tied to those inputs that require grad so that a backward pass through it raises."""
    if not torch.is_grad_enabled():
        return result
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    return _Constant.apply(name, result, *inputs) if inputs else result  # type: ignore[no-any-return,no-untyped-call]
