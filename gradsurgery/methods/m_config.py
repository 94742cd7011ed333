# SPDX-License-Identifier: MIT
"""M-ConFIG: ConFIG of averaged gradients; after the first step, one of the losses is enough."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_fraction
from ._buffered import BufferedMethod, Given, Rows, absent
from .config import ConFIG


class MConFIG(BufferedMethod):
    """Momentum ConFIG (Liu, Chu & Thuerey, ICLR 2025, Algorithm 1), for an optimizer with momentum.

    A step takes one loss or more; the others are None. For each loss that is given, the bias-corrected average of the
    task's gradients is updated: after n_t gradients, a_t = (1 - beta) sum_i beta^(n_t - i) g_ti / (1 - beta^n_t).
    c = ConFIG(a_1 .. a_T) is computed from all averages. d is the gradient that makes the wrapped optimizer's own
    bias-corrected average c: with m_k = (1 - beta^k) c_k at step k, d = (m_k - beta m_(k-1)) / (1 - beta).

    So ``Adam`` with betas (beta, beta2) takes Algorithm 1's step, c over the root of the averaged d^2, and ``SGD`` with
    momentum and dampening beta steps along m.

    Conventions: the first step needs every loss, which also determines the shared parameters (the authors' step is 0
    until each loss has been seen once). A task without any gradient is absent, and its average stays; a step that
    reaches no shared parameter is not counted. The division by the root, and its epsilon, are the wrapped optimizer's.
    For its average to be c, it must step exactly once for each d, without clipping: i steps after a skipped one, a part
    beta^i of the error is left. Heads get plain gradients. With ``aggregate``, each parameter needs some task's
    gradient. A captured CUDA graph can only be replayed for steps that have the losses it was captured with.
    Scale: a sum over tasks. State: a, the numbers n of gradients and k of steps, and m's weights. Memory: T N. G and
    the weights are those of a; ``update_norm`` is c's.

    Args:
        beta: 0 <= beta < 1, the wrapped optimizer's.
        pref: ConFIG's, T finite numbers; None: 1 each.
    """

    name = "m_config"
    takes_absent = True
    scale = "sum"
    linear = True
    cost = "T^3"
    state_names = ("step", "counts", "previous")
    num_terms = 2

    def __init__(self, beta: float = 0.9, pref: Sequence[float] | Tensor | None = None) -> None:
        self.beta = check_fraction("beta", beta, one=False)
        self._config = ConFIG(pref)
        self.pref = self._config.pref

    def _begin(self, rows: Rows) -> None:
        if self._buffers is None and (missing := absent(rows)):
            raise ValueError(f"the first step of method {self.name!r} needs gradients of every task, not of {missing}")
        if self.pref is not None:
            device = next(g for row in rows for g in row if g is not None).device
            self.pref.on(device, len(rows), self.name)  # raises before anything changes

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        counts = torch.zeros(len(like), dtype=torch.int64, device=like.device)
        return {"step": counts.new_zeros(()), "counts": counts, "previous": torch.zeros_like(like)}

    def _replace(self, given: Given) -> Rows:
        assert self._state is not None
        counts = self._state["counts"] + given.present
        new = torch.where(given.present, (1 - self.beta) / self._total(counts), 0)
        averages = self._average(given, 1 - new, new)
        self._keep(given.finite, step=self._state["step"] + 1, counts=counts)
        return averages

    def _weigh(self, given: Given, gram: Tensor) -> Tensor:
        return self._config.weights(gram, backend=given.backend)

    def _terms(self, given: Given, kept: Rows, weights: Tensor) -> tuple[Rows, Tensor]:
        """Return the averages and the gradients as the terms of d, and their factors."""
        assert self._state is not None
        step, counts, previous = (self._state[name] for name in self.state_names)
        m = self._total(step) * weights
        # m_(k-1) was a sum of the averages a' before this step. With a gradient g, beta a' = r a - (1 - beta) g / b for
        # the new average a, r = ``ratio`` and b = ``before``.
        before = torch.where(counts > 1, self._total(counts - 1), 1)
        ratio = torch.where(given.present, self._total(counts) / before, self.beta)
        of_averages = (m - ratio * previous) / (1 - self.beta)
        of_gradients = previous / before
        self._keep(given.finite, previous=m)
        if given.scale is not None:
            of_averages = of_averages * given.scale.double()
        return [*kept, *given.rows], torch.cat([of_averages, of_gradients])

    def _total(self, count: Tensor) -> Tensor:
        """Return the sum of the factors in an average of n gradients, 1 - beta^n."""
        return 1 - self.beta ** count.double()
