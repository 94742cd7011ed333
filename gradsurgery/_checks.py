# SPDX-License-Identifier: MIT
"""Ranges of options."""

from __future__ import annotations

import math


def check_positive(name: str, value: float) -> float:
    """Return the value; ValueError unless it is positive and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return value


def check_not_negative(name: str, value: float) -> float:
    """Return the value; ValueError unless it is >= 0 and finite."""
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be >= 0 and finite, got {value}")
    return value


def check_fraction(name: str, value: float, *, zero: bool = True, one: bool = True) -> float:
    """Return the value; ValueError unless it is in [0, 1], where 0 and 1 may be excluded."""
    if not 0 <= value <= 1 or (value == 0 and not zero) or (value == 1 and not one):
        raise ValueError(f"{name} must be {'>=' if zero else '>'} 0 and {'<=' if one else '<'} 1, got {value}")
    return value


def check_count(name: str, value: int, least: int = 1) -> int:
    """Return the value; ValueError unless it is an int that is large enough."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be an int >= {least}, got {value!r}")
    return value
