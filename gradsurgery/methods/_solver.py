# SPDX-License-Identifier: MIT
"""Methods whose weights come from G by one of the solvers that every backend has."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._constant import constant
from .._extension import SOLVER_NUMBERS, NativeSolver
from ..backends import choose
from ..functional import new_problems
from ._base import Method
from ._state import PerTask


class Solver(NamedTuple):
    """A solver that every backend has, and its numbers."""

    name: str
    """One of ``backends.solvers.SOLVERS``."""
    parameter: float = 0.0
    """The ridge of UPGrad and DualProj, c of CAGrad, alpha of FairGrad, f of Krum."""
    limit: float = math.inf
    """The bound on |d| of FairGrad, m of Krum."""
    pref: PerTask | None = None
    divisor: float = 1.0
    """What its weights are divided by."""
    depends_on_scale: bool = False
    """Whether the weights change if all gradients are scaled by one factor."""


class SolverMethod(Method):
    """A method whose weights are a function of G, a preference and numbers."""

    def _solver(self, num_tasks: int) -> Solver:
        """Return the solver for T tasks; ValueError if the options do not fit so many."""
        raise NotImplementedError

    def _check_fits(self, num_tasks: int) -> None:
        super()._check_fits(num_tasks)
        self._solver(num_tasks)

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights; NaN where G is not finite."""
        problems, out = new_problems(gram)
        device, num_tasks = gram.device, gram.shape[-1]
        solver = self._solver(num_tasks)
        preference = self._preference(solver, device, num_tasks)
        chosen = choose(backend, device, num_tasks)
        chosen.weights(problems, solver.name, preference, solver.parameter, solver.limit, out)
        if solver.divisor != 1:
            out /= solver.divisor
        return constant(f"{self.name} weights", out, [gram])

    def native_solver(self, device: torch.device, num_tasks: int, *, once: bool = False) -> NativeSolver | None:
        """Return the solver, the preference and the numbers; None if the method's weights are not the solver's."""
        if self._has_other_weights(SolverMethod):
            return None
        solver = self._solver(num_tasks)
        if solver.divisor != 1:
            return None
        preference = self._preference(solver, device, num_tasks)
        arguments = (SOLVER_NUMBERS[solver.name], preference, solver.parameter, solver.limit)
        return NativeSolver("weights", arguments, solver.depends_on_scale)

    def _preference(self, solver: Solver, device: torch.device, num_tasks: int) -> Tensor | None:
        return None if solver.pref is None else solver.pref.on(device, num_tasks, self.name)
