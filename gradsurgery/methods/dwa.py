# SPDX-License-Identifier: MIT
"""DWA: weights from the rates at which losses fall."""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_count, check_positive
from ._losses import LossMethod


class DWA(LossMethod):
    """Dynamic weight average (Liu, Johns & Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019).

    w_t = T exp(r_t / temperature) / sum_s exp(r_s / temperature), r_t the mean of task t's newest ``window`` losses
    over the mean of the ``window`` losses before them. The weights are 1 for the first 2 ``window`` steps.

    Conventions: windows of steps, which move with each step, in place of the paper's epochs; a step's own losses count
    from the next step on. r_t = 1 where the older mean is 0; losses should keep their sign.
    Scale: sums to T. State: the last 2 ``window`` losses [..., T, 2 window], oldest first, and the number of steps. The
    means are taken anew at each step, so that no rounding builds up.

    Args:
        window: steps per mean, >= 1.
        temperature: > 0; larger ones make the weights more equal.
    """

    name = "dwa"
    scale = "sums to T"
    state_names = ("history", "steps")

    def __init__(self, window: int = 25, temperature: float = 2.0) -> None:
        self.window = check_count("window", window)
        self.temperature = check_positive("temperature", temperature)

    def _initial(self, losses: Tensor) -> dict[str, Tensor]:
        history = losses.new_zeros(*losses.shape, 2 * self.window)
        return {"history": history, "steps": torch.zeros_like(losses[..., :1], dtype=torch.int64)}

    def _weigh(self, losses: Tensor, counts: Tensor) -> Tensor:
        state = self._state_for(losses)
        history, steps = state["history"], state["steps"]
        older, newest = history.unflatten(-1, (2, self.window)).mean(-1).unbind(-1)
        rates = torch.where(older == 0, 1, newest / older) / self.temperature
        largest = torch.finfo(rates.dtype).max
        weights = losses.shape[-1] * rates.clamp(-largest, largest).softmax(-1)
        weights = torch.where(steps >= 2 * self.window, weights, 1)
        self._keep(counts[..., None], history=torch.cat([history[..., 1:], losses[..., None]], -1))
        self._keep(counts, steps=steps + 1)
        return weights

    def _shape_of(self, first: Tensor) -> torch.Size:
        return first.shape[:-1]
