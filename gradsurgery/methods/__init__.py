# SPDX-License-Identifier: MIT
"""Stage 3: the registry of methods. A method turns G into weights; each is one file."""

from __future__ import annotations

from typing import Any

from ._base import Method
from .constant import Constant
from .gradnorm import GradNorm
from .krum import Krum
from .mean import Mean
from .mgda import MGDA
from .pcgrad import PCGrad
from .random import Random
from .sum import Sum

_METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Constant, GradNorm, Krum, Mean, MGDA, PCGrad, Random, Sum)
}

__all__ = [
    "MGDA",
    "Constant",
    "GradNorm",
    "Krum",
    "Mean",
    "Method",
    "PCGrad",
    "Random",
    "Sum",
    "available",
    "get",
    "resolve",
]


def available() -> list[str]:
    """Return the names that :func:`get` takes."""
    return sorted(_METHODS)


def get(name: str, **options: Any) -> Method:
    """Return a new method by name, in its initial state; ValueError if there is none such."""
    if name not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(available())}, got {name!r}")
    return _METHODS[name](**options)


def resolve(method: str | Method, options: dict[str, Any]) -> Method:
    """Return ``method`` itself, or the one that it names with these options."""
    if isinstance(method, str):
        return get(method, **options)
    if not isinstance(method, Method):
        raise TypeError(f"method must be a name or a Method, got {type(method).__name__}")
    if options:
        raise ValueError(f"options {sorted(options)} go with a method's name, got a {type(method).__name__} object")
    return method
