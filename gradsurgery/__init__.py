# SPDX-License-Identifier: MIT
"""Gradient surgery for multi-task PyTorch models.

Stages, in the order in which data flows: collect task gradients, their Gram matrix G, weights from G, the combined
direction, the optimizer's step.
"""

from . import methods
from ._constant import NotDifferentiableError
from ._memory import OverwrittenError
from .aggregate import aggregate
from .backends import backends
from .collect import Losses
from .combine import combine
from .diagnostics import NotComputedError, SurgeryInfo
from .functional import gradnorm_update, min_norm_weights, pcgrad_weights, task_order
from .gram import gram
from .named import (
    IMTLG,
    MGDA,
    PCD,
    AlignedMTL,
    CAGrad,
    ConFIG,
    DualProj,
    FairGrad,
    GradNorm,
    GradVac,
    MConFIG,
    NashMTL,
    PCGrad,
    UPGrad,
)
from .optim import SurgeryOptimizer

__version__ = "0.1.0"

__all__ = [
    "IMTLG",
    "MGDA",
    "PCD",
    "AlignedMTL",
    "CAGrad",
    "ConFIG",
    "DualProj",
    "FairGrad",
    "GradNorm",
    "GradVac",
    "Losses",
    "MConFIG",
    "NashMTL",
    "NotComputedError",
    "NotDifferentiableError",
    "OverwrittenError",
    "PCGrad",
    "SurgeryInfo",
    "SurgeryOptimizer",
    "UPGrad",
    "aggregate",
    "backends",
    "combine",
    "gradnorm_update",
    "gram",
    "methods",
    "min_norm_weights",
    "pcgrad_weights",
    "task_order",
]
