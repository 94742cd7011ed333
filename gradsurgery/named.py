# SPDX-License-Identifier: MIT
"""An optimizer per method, where that reads naturally."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, distributed

from . import methods
from ._wrapper import check_optimizer
from .optim import SurgeryOptimizer


class _NamedOptimizer(SurgeryOptimizer):
    """A ``SurgeryOptimizer`` with one method, whose options it takes before its own, which go by keyword."""

    method_class: ClassVar[type[methods.Method]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # What help() shows: the options by name.
        own = list(inspect.signature(cls.__init__).parameters.values())[1:]
        if "__init__" not in vars(cls):
            options = inspect.signature(cls.method_class).parameters.values()
            own = [own[0], *options, *(p for p in own if p.kind is p.KEYWORD_ONLY)]
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *options: Any,
        shared: Iterable[Tensor] | None = None,
        granularity: str = "global",
        process_group: distributed.ProcessGroup | None = None,
        backend: str | None = None,
        **named_options: Any,
    ) -> None:
        check_optimizer(optimizer)  # before an option of that optimizer's is called unknown
        super().__init__(
            optimizer,
            self.method_class(*options, **named_options),
            shared=shared,
            granularity=granularity,
            process_group=process_group,
            backend=backend,
        )


class AlignedMTL(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.AlignedMTL`, whose options it takes."""

    method_class = methods.AlignedMTL


class CAGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.CAGrad`, whose options it takes."""

    method_class = methods.CAGrad


class ConFIG(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.ConFIG`, whose options it takes."""

    method_class = methods.ConFIG


class DualProj(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.DualProj`, whose options it takes."""

    method_class = methods.DualProj


class FairGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.FairGrad`, whose options it takes."""

    method_class = methods.FairGrad


class GradNorm(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.GradNorm`, whose options it takes."""

    method_class = methods.GradNorm


class GradVac(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.GradVac`, whose options it takes."""

    method_class = methods.GradVac


class IMTLG(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.IMTLG`, whose options it takes."""

    method_class = methods.IMTLG


class MConFIG(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.MConFIG`, whose options it takes."""

    method_class = methods.MConFIG


class MGDA(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.MGDA`, whose options it takes."""

    method_class = methods.MGDA


class NashMTL(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.NashMTL`, whose options it takes."""

    method_class = methods.NashMTL


class PCD(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.PCD`, whose options it takes."""

    method_class = methods.PCD


class PCGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.PCGrad`, whose options it takes."""

    method_class = methods.PCGrad
    pc_backward = SurgeryOptimizer.backward


class UPGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.UPGrad`, whose options it takes."""

    method_class = methods.UPGrad
