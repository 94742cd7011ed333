# SPDX-License-Identifier: MIT
"""What torch.compile cannot trace: functions that stay uncompiled, caches, and checks that it must not see."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch._guards import TracingContext
from torch.utils._python_dispatch import _get_current_dispatch_mode

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def is_traced() -> bool:
    """Whether torch.compile or torch.export traces the caller."""
    if torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return True
    # The compiler may trace a function by a call of it. Other threads, which do not see this context, run as they are.
    return TracingContext.try_get() is not None


def is_watched() -> bool:
    """Whether operations are traced, transformed or passed to a mode. Values then may not decide what is done."""
    return (
        is_traced()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
    )


def untraced(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Return a function that runs uncompiled in compiled callers: traced, it would lose state that it sets."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if is_traced():
            return _outside(function, *args, **kwargs)  # type: ignore[no-any-return]
        return function(*args, **kwargs)

    return call


# What torch's own optimizers use: torch.compiler.disable would import the compiler, which takes seconds.
@torch._disable_dynamo  # type: ignore[attr-defined]
def _outside(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


def cached(function: Callable[..., Result]) -> Callable[..., Result]:
    """Return the function with a cache that is hidden from torch.compile, which would warn of it."""
    keeping = functools.lru_cache(function)

    @functools.wraps(function)
    def call(*args: Any) -> Result:
        return (function if is_traced() else keeping)(*args)

    return call


# Weak, because a function may be a closure over a whole model.
_options: WeakKeyDictionary[Callable[..., Any], tuple[frozenset[str], bool]] = WeakKeyDictionary()


def takes(function: Callable[..., Any], option: str) -> bool:
    """Whether a function has a parameter of this name, or takes any."""
    try:
        named, any_other = _options[function]
    except (KeyError, TypeError):  # TypeError: it can have no weak reference
        kinds = {name: parameter.kind for name, parameter in inspect.signature(function).parameters.items()}
        named, any_other = frozenset(kinds), inspect.Parameter.VAR_KEYWORD in kinds.values()
        with suppress(TypeError):
            _options[function] = named, any_other
    return option in named or any_other


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured on the device's current stream; never while a function is traced."""
    if device.type != "cuda" or is_traced():
        return False
    return torch.cuda.is_current_stream_capturing()
