# SPDX-License-Identifier: MIT
"""DTP: more weight to tasks that do badly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .._checks import check_fraction, check_not_negative
from ._losses import LossMethod
from ._state import numbers_of

_LEAST = 1e-6


class DTP(LossMethod):
    """Dynamic task prioritization (Guo et al., ECCV 2018).

    w_t = -(1 - k_t)^gamma log k_t, with k_t a moving average of task t's performance: a KPI in [0, 1], such as
    accuracy, that the user passes to :meth:`update`, k_t <- alpha kpi_t + (1 - alpha) k_t. The weights are 1 until the
    first update, which sets k to the KPIs.

    Conventions: k below 1e-6 counts as 1e-6, because the logarithm is unbounded: a weight is at most 13.8. A task with
    a KPI of 1 has weight 0. The losses are only checked; all problems of a batch have the same weights. The paper
    leaves gamma and alpha to the user; the defaults are this library's.
    Scale: between 0 and 13.8. State: k [T], and whether there has been an update.

    Args:
        gamma: focusing exponent, >= 0; larger ones take more weight from tasks that do well.
        alpha: the newest KPI's share in the average, in (0, 1].
    """

    name = "dtp"
    weights_from = "KPIs"
    scale = "1 until the first KPIs"
    state_names = ("kpis", "updated")

    def __init__(self, gamma: float = 1.0, alpha: float = 0.5) -> None:
        self.gamma = check_not_negative("gamma", gamma)
        self.alpha = check_fraction("alpha", alpha, zero=False)

    def update(self, kpis: Sequence[float] | Mapping[str, float] | Tensor) -> None:
        """Take the tasks' newest KPIs, for example after each evaluation.

        In training by several processes call :meth:`gradsurgery.SurgeryOptimizer.update`, which averages them.

        Args:
            kpis: T numbers in [0, 1], or a dict of them in the tasks' order. Those on a GPU are not read on the host:
                if one is out of range, nothing is raised and nothing changes.

        Raises:
            ValueError: these are not T numbers in [0, 1].
        """
        given = kpis if isinstance(kpis, Tensor) else numbers_of("kpis", kpis, torch.device("cpu"))
        values = given.detach().real.to(torch.float64)
        valid = ((values >= 0) & (values <= 1)).all()[None]
        is_vector = values.dim() == 1 and len(values) > 0 and not given.is_complex()
        if not is_vector or (values.device.type == "cpu" and not valid):
            raise ValueError(f"kpis must be T numbers in [0, 1], got {kpis!r}")
        if self._state is not None:
            before = self._state["kpis"]
            if before.shape != values.shape:
                raise ValueError(f"kpis must be one number for each of {len(before)} tasks, got {len(values)}")
            values, valid = (value.to(before.device) for value in (values, valid))
        k, updated = (self._state_for(values)[name] for name in self.state_names)
        self._keep(valid, kpis=torch.where(updated, self.alpha * values + (1 - self.alpha) * k, values))
        self._keep(valid, updated=torch.ones_like(updated))

    def _initial(self, losses: Tensor) -> dict[str, Tensor]:
        return {"kpis": torch.zeros_like(losses), "updated": torch.zeros_like(losses[:1], dtype=torch.bool)}

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        state = self._state_for(losses.new_empty(losses.shape[-1]))
        k = state["kpis"].clamp(min=_LEAST)
        return torch.where(state["updated"], (1 - k) ** self.gamma * k.log().neg(), 1).expand_as(losses)
