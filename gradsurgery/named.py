# SPDX-License-Identifier: MIT
"""Optimizers named after their methods."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias, TypedDict

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from typing_extensions import Unpack

from . import methods
from ._wrapper import check_optimizer
from .optim import SurgeryOptimizer

Preference: TypeAlias = Sequence[float] | Tensor | None


class Common(TypedDict, total=False):
    """The keyword arguments of ``SurgeryOptimizer`` that every optimizer here takes, too."""

    shared: Iterable[Tensor] | None
    granularity: str
    process_group: ProcessGroup | None
    backend: str | None


class _NamedOptimizer(SurgeryOptimizer):
    def __init__(self, optimizer: Optimizer, method: methods.Method, **common: Unpack[Common]) -> None:
        check_optimizer(optimizer)  # first: PCGrad(parameters, lr=0.1) lacks an optimizer, and lr is not the error
        super().__init__(optimizer, method, **common)


class AlignedMTL(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.AlignedMTL`, whose options it takes."""

    def __init__(
        self, optimizer: Optimizer, pref: Preference = None, scale_mode: str = "min", **common: Unpack[Common]
    ) -> None:
        super().__init__(optimizer, methods.AlignedMTL(pref, scale_mode), **common)


class CAGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.CAGrad`, whose options it takes."""

    def __init__(self, optimizer: Optimizer, c: float = 0.5, rescale: int = 0, **common: Unpack[Common]) -> None:
        super().__init__(optimizer, methods.CAGrad(c, rescale), **common)


class ConFIG(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.ConFIG`, whose options it takes."""

    def __init__(self, optimizer: Optimizer, pref: Preference = None, **common: Unpack[Common]) -> None:
        super().__init__(optimizer, methods.ConFIG(pref), **common)


class DualProj(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.DualProj`, whose options it takes."""

    def __init__(
        self, optimizer: Optimizer, pref: Preference = None, reg_eps: float = 1e-4, **common: Unpack[Common]
    ) -> None:
        super().__init__(optimizer, methods.DualProj(pref, reg_eps), **common)


class FairGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.FairGrad`, whose options it takes."""

    def __init__(self, optimizer: Optimizer, alpha: float = 1.0, **common: Unpack[Common]) -> None:
        super().__init__(optimizer, methods.FairGrad(alpha), **common)


class GradNorm(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.GradNorm`, whose options it takes."""

    def __init__(
        self,
        optimizer: Optimizer,
        alpha: float = 1.5,
        lr: float = 0.025,
        norm_parameters: Iterable[Tensor] | None = None,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(optimizer, methods.GradNorm(alpha, lr, norm_parameters), **common)


class GradVac(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.GradVac`, whose options it takes."""

    def __init__(self, optimizer: Optimizer, beta: float = 1e-2, seed: int = 0, **common: Unpack[Common]) -> None:
        super().__init__(optimizer, methods.GradVac(beta, seed), **common)


class IMTLG(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.IMTLG`, whose options it takes."""

    def __init__(self, optimizer: Optimizer, **common: Unpack[Common]) -> None:
        super().__init__(optimizer, methods.IMTLG(), **common)


class MConFIG(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.MConFIG`, whose options it takes."""

    def __init__(
        self, optimizer: Optimizer, beta: float = 0.9, pref: Preference = None, **common: Unpack[Common]
    ) -> None:
        super().__init__(optimizer, methods.MConFIG(beta, pref), **common)


class MGDA(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.MGDA`, whose options it takes."""

    def __init__(
        self,
        optimizer: Optimizer,
        normalization: str = "none",
        combine: str = "original",
        solver: str = "exact",
        max_iter: int = 250,
        tol: float = 1e-6,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(optimizer, methods.MGDA(normalization, combine, solver, max_iter, tol), **common)


class NashMTL(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.NashMTL`, whose options it takes."""

    def __init__(self, optimizer: Optimizer, max_norm: float = 1.0, **common: Unpack[Common]) -> None:
        super().__init__(optimizer, methods.NashMTL(max_norm), **common)


class PCD(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.PCD`, whose options it takes."""

    def __init__(
        self,
        optimizer: Optimizer,
        tau: float | Sequence[float] | Tensor = 0.02,
        beta: float = 0.999,
        **common: Unpack[Common],
    ) -> None:
        super().__init__(optimizer, methods.PCD(tau, beta), **common)


class PCGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.PCGrad`, whose options it takes."""

    def __init__(self, optimizer: Optimizer, reduction: str = "sum", seed: int = 0, **common: Unpack[Common]) -> None:
        super().__init__(optimizer, methods.PCGrad(reduction, seed), **common)

    pc_backward = SurgeryOptimizer.backward


class UPGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.UPGrad`, whose options it takes."""

    def __init__(
        self, optimizer: Optimizer, pref: Preference = None, reg_eps: float = 1e-4, **common: Unpack[Common]
    ) -> None:
        super().__init__(optimizer, methods.UPGrad(pref, reg_eps), **common)
