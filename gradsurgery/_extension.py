# SPDX-License-Identifier: MIT
"""The compiled extension, if it is there."""

from __future__ import annotations

import importlib
import warnings
from typing import Any, NamedTuple

C: Any
try:
    # "from gradsurgery import" would call its absence a circular import.
    C = importlib.import_module("gradsurgery._C")
except ModuleNotFoundError as error:
    C = None
    WHY_NOT = f"the compiled extension is not there: pip install -v shows why it was not built ({error})"
except ImportError as error:
    C = None
    WHY_NOT = f"the compiled extension cannot be loaded, so build it again for this torch ({error})"
    warnings.warn(WHY_NOT, stacklevel=2)
else:
    WHY_NOT = ""

SOLVER_NUMBERS: dict[str, int] = C.weightings() if C else {}
"""The extension's numbers for the solvers of ``backends.solvers.SOLVERS``."""


class NativeSolver(NamedTuple):
    """One of the extension's solvers, for the stages in one call."""

    name: str
    """"pcgrad", "min_norm" or "weights"."""
    arguments: tuple[Any, ...]
    depends_on_scale: bool = False
    """Whether the weights change if all gradients are scaled by one factor."""


class Rule(NamedTuple):
    """One of the rules that work coordinate by coordinate."""

    name: str
    """"graddrop" or "trimmed_mean"."""
    arguments: tuple[Any, ...]
    """Of "graddrop" (seed, step counter, leaks [T] or None), of "trimmed_mean" (number left out at either end,)."""
