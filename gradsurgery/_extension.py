# SPDX-License-Identifier: MIT
"""The compiled extension, if it is there."""

from __future__ import annotations

from typing import Any

C: Any
try:
    from gradsurgery import _C as C
except ImportError as error:
    C = None
    WHY_NOT = f"the compiled extension is not there ({error})"
else:
    WHY_NOT = ""

NativeSolver = tuple[str, tuple[Any, ...]]
"""One of the extension's solvers, and its arguments."""

Rule = tuple[str, tuple[Any, ...]]
"""One of the rules that work coordinate by coordinate: ("graddrop", (seed, step counter, leaks [T] or None)) or
("trimmed_mean", (number of values left out at either end,))."""
