# SPDX-License-Identifier: MIT
"""An optimizer per method, where that reads naturally."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import methods
from .optim import SurgeryOptimizer


class _NamedOptimizer(SurgeryOptimizer):
    """A ``SurgeryOptimizer`` with one method, whose options it takes beside its own."""

    method_class: ClassVar[type[methods.Method]]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        shared: Iterable[Tensor] | None = None,
        granularity: str = "global",
        process_group: None = None,
        backend: str | None = None,
        **method_options: Any,
    ) -> None:
        super().__init__(
            optimizer,
            self.method_class(**method_options),
            shared=shared,
            granularity=granularity,
            process_group=process_group,
            backend=backend,
        )


class PCGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.PCGrad`, whose options it takes by keyword."""

    method_class = methods.PCGrad
    pc_backward = SurgeryOptimizer.backward


class MGDA(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.MGDA`, whose options it takes by keyword."""

    method_class = methods.MGDA


class GradNorm(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.GradNorm`, whose options it takes by keyword."""

    method_class = methods.GradNorm
