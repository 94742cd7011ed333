# SPDX-License-Identifier: MIT
"""What torch.compile cannot trace: functions that stay uncompiled, caches, and questions that it must not meet."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def untraced(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a function that compiled callers run uncompiled: traced, it would lose what it sets for later calls."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if torch.compiler.is_compiling():
            return _outside(function, *args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return call


# What torch's own optimizers use: torch.compiler.disable would import the compiler, which takes seconds.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def cached(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return the function with a cache of its results, of which torch.compile sees nothing: it would warn."""
    keeping = functools.lru_cache(function)

    @functools.wraps(function)
    def call(*args: Any) -> Result:
        return (function if torch.compiler.is_compiling() else keeping)(*args)

    return call


@cached
def takes(function: Callable[..., Any], option: str) -> bool:
    """Whether a function has a parameter of this name."""
    kinds = {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
    return option in kinds or inspect.Parameter.VAR_KEYWORD in kinds.values()


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the device's current stream; never while a function is traced."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing()
