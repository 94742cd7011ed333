# SPDX-License-Identifier: MIT
"""Checks of arguments."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor


def check_number(name: str, value: Any) -> float:
    """Return the value as a float; TypeError unless it is a real number."""
    if type(value) in (float, int):  # torch.compile traces no more than this
        return float(value)
    try:
        if isinstance(value, (str, bool)) or str(getattr(value, "dtype", "")).endswith("bool"):
            raise TypeError
        return float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a number, got {describe(value)}") from None


def check_positive(name: str, value: Any) -> float:
    """Return the number; ValueError unless it is positive and finite."""
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def check_not_negative(name: str, value: Any) -> float:
    """Return the number; ValueError unless it is >= 0 and finite."""
    number = check_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    return number


def check_fraction(name: str, value: Any, *, zero: bool = True, one: bool = True) -> float:
    """Return the number; ValueError unless it is in [0, 1], where 0 and 1 may be excluded."""
    number = check_number(name, value)
    if not 0 <= number <= 1 or (number == 0 and not zero) or (number == 1 and not one):
        raise ValueError(f"{name} must be {'>=' if zero else '>'} 0 and {'<=' if one else '<'} 1, got {value}")
    return number


def check_count(name: str, value: Any, least: int = 1) -> int:
    """Return the value as an int; ValueError unless it is an integer that is large enough, and below 2^63."""
    number = as_integer(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    return check_word(name, number)


def check_word(name: str, value: Any) -> int:
    """Return the value as an int; ValueError unless it is one of 0..2^63-1."""
    number = as_integer(value)
    if number is None or not 0 <= number < 2**63:
        raise ValueError(f"{name} must be an int in 0..2^63-1, got {value!r}")
    return number


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> Any:
    """Return the choice that the value equals; ValueError unless there is one."""
    given = value if isinstance(value, (str, float)) else as_integer(value)
    for choice in choices:
        if given == choice:
            return choice
    raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")


def list_of(parameters: Iterable[Tensor], name: str) -> list[Tensor]:
    """Return the parameters in a list, which is not empty.

    Raises:
        TypeError: it is a module, or one parameter, whose rows are tensors too.
        ValueError: there are none, as in a generator that was used before.
    """
    if isinstance(parameters, Tensor) or not isinstance(parameters, Iterable):
        raise TypeError(
            f"{name} must be an iterable of parameters, such as module.parameters(), got {describe(parameters)}"
        )
    found = list(parameters)
    if not found:
        raise ValueError(f"{name} must hold a parameter, got none (a generator yields its parameters only once)")
    return found


def describe(value: Any) -> str:
    """Return what a value is, for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} in {value.dtype}"
    return f"{type(value).__name__} {value!r}" if isinstance(value, (int, float, str)) else type(value).__name__


def as_integer(value: Any) -> int | None:
    """Return the value as an int; None unless it is an integer of any type, but bool."""
    if type(value) is int:
        return value
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
