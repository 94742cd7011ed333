# SPDX-License-Identifier: MIT
"""Stage 3: the registry of methods. A method turns G into weights; each is one file."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from ._base import Method
from ._coordinate import CoordinateMethod
from .aligned_mtl import AlignedMTL
from .cagrad import CAGrad
from .config import ConFIG
from .constant import Constant
from .coordinate_median import CoordinateMedian
from .cosmos import COSMOS
from .cr_mogm import CRMOGM
from .db_mtl import DBMTL
from .dtp import DTP
from .dualproj import DualProj
from .dwa import DWA
from .excess_mtl import ExcessMTL
from .fairgrad import FairGrad
from .famo import FAMO
from .gls import GLS
from .graddrop import GradDrop
from .gradnorm import GradNorm
from .gradvac import GradVac
from .group_dro import GroupDRO
from .imtl_g import IMTLG
from .imtl_l import IMTLL
from .krum import Krum
from .m_config import MConFIG
from .mean import Mean
from .mgda import MGDA
from .minimax import Minimax
from .moco import MoCo
from .modo import MoDo
from .nash_mtl import NashMTL
from .pbi import PBI
from .pcd import PCD
from .pcgrad import PCGrad
from .random import Random
from .scale_invariant import ScaleInvariant
from .sdmgrad import SDMGrad
from .stch import STCH
from .sum import Sum
from .tchebycheff import Tchebycheff
from .trimmed_mean import TrimmedMean
from .upgrad import UPGrad
from .uw import UW

__all__ = [
    "COSMOS",
    "CRMOGM",
    "DBMTL",
    "DTP",
    "DWA",
    "FAMO",
    "GLS",
    "IMTLG",
    "IMTLL",
    "MGDA",
    "PBI",
    "PCD",
    "STCH",
    "UW",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "Constant",
    "CoordinateMedian",
    "CoordinateMethod",
    "DualProj",
    "ExcessMTL",
    "FairGrad",
    "GradDrop",
    "GradNorm",
    "GradVac",
    "GroupDRO",
    "Krum",
    "MConFIG",
    "Mean",
    "Method",
    "Minimax",
    "MoCo",
    "MoDo",
    "NashMTL",
    "PCGrad",
    "Random",
    "SDMGrad",
    "ScaleInvariant",
    "Sum",
    "Tchebycheff",
    "TrimmedMean",
    "UPGrad",
    "available",
    "get",
    "resolve",
]

_METHODS: dict[str, type[Method]] = {
    found.name: found
    for found in tuple(vars().values())
    if isinstance(found, type) and issubclass(found, Method) and found not in (Method, CoordinateMethod)
}
"""All methods imported above, without the base classes."""


def available() -> list[str]:
    """Return the names that :func:`get` takes."""
    return sorted(_METHODS)


def get(name: str, **options: Any) -> Method:
    """Return a new method by name, in its initial state.

    Args:
        name: one of :func:`available`.
        options: those of the method's class.

    Raises:
        ValueError: there is no such method, or an option is out of its range.
        TypeError: the method does not have an option.
    """
    if name not in _METHODS:
        alike = get_close_matches(str(name).lower(), _METHODS, n=1)
        hint = f" (did you mean {alike[0]!r}?)" if alike else ""
        raise ValueError(f"method must be one of {', '.join(available())}, got {name!r}{hint}")
    return _METHODS[name](**options)


def is_known(method: Method) -> bool:
    """Whether this is an unchanged method of this package: neither of a user's class, nor with ``weights`` replaced."""
    return type(method) in _METHODS.values() and "weights" not in vars(method)


def resolve(method: str | Method, options: dict[str, Any]) -> Method:
    """Return ``method`` itself, or the one that it names with these options.

    Raises:
        ValueError, TypeError: as :func:`get` does; ValueError for options given together with a ``Method``, TypeError
            for what is neither a name nor a ``Method``.
    """
    if isinstance(method, str):
        return get(method, **options)
    if not isinstance(method, Method):
        is_class = isinstance(method, type)
        cls = method if is_class else type(method)
        given = f"{'the class' if is_class else 'a'} {cls.__module__}.{cls.__qualname__}"
        raise TypeError(f"method must be a name or a Method, as gradsurgery.methods.MGDA() is one, got {given}")
    if options:
        raise ValueError(f"options {sorted(options)} go with a method's name, got a {type(method).__name__} object")
    return method
