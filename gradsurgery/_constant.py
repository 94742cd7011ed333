# SPDX-License-Identifier: MIT
"""Results are constants to autograd, and say so when somebody asks for a gradient through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._compiling import is_traced

Result = TypeVar("Result", Tensor, list[Any], Tensor | list[Any])


class NotDifferentiableError(RuntimeError):
    """A gradient was asked for through the result of gradient surgery.

    Within functions that torch.compile compiled, results are constants too, but nothing is raised.
    """


class _Constant(torch.autograd.Function):
    @staticmethod
    def forward(name: str, result: Tensor, *inputs: Tensor) -> Tensor:
        return result.detach()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grad: Any) -> Any:
        raise NotDifferentiableError(
            f"the result of {ctx.name} is a constant to autograd: detach() it, or take its inputs without a graph"
        )


def constant(name: str, result: Result, inputs: Sequence[Tensor]) -> Result:
    """Return ``result``, tied to those inputs that require grad so that a backward pass through it raises."""
    inputs = [tensor for tensor in inputs if tensor.requires_grad]
    # A compiler would trace the backward pass, which raises.
    if not inputs or not torch.is_grad_enabled() or is_traced():
        return result
    if isinstance(result, list):
        return [None if part is None else constant(name, part, inputs) for part in result]
    return _Constant.apply(name, result, *inputs)  # type: ignore[no-any-return,no-untyped-call]
