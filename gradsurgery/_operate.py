# SPDX-License-Identifier: MIT
"""Stages 2 to 4 of the optimizers' step; for weights that come from the losses alone, one pass instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ._collected import Collected
from ._exchange import Pieces
from ._gradients import TaskGradients, check_gradient, parse
from ._plan import Plan, Planner
from ._shards import Shards
from ._step import Landing, add_all, add_plain, foreign_sums, put, read, targets
from ._survey import Survey
from .backends import Backend, choose
from .collect import Losses, PassOptions, collect
from .combine import combine_by_rule_of, combine_of
from .diagnostics import SurgeryInfo
from .distributed import Replicas
from .gram import gram_of
from .methods import CoordinateMethod, Method
from .methods._base import Rollback, weigh
from .methods._buffered import BufferedMethod


@dataclass(slots=True)
class Operation:
    """A method, and what was collected for it."""

    method: Method
    collected: Collected
    grads: TaskGradients
    plan: Plan
    processes: Replicas | Shards | Pieces
    backend: Backend
    backend_name: str | None
    """The user's choice."""
    whole: bool
    """Whether there is one G for all shared parameters."""

    def write(
        self, out: list[Any], accumulate: bool, before: Callable[[Tensor | None], None]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write or add the directions; return G [S, T, T], unscaled, and the weights [S, T].

        Calls ``before`` before it writes to ``out`` or over the collected gradients; until then only the method's state
        may have changed. ``before`` gets the weights, or None if they are not known by then, in which case they never
        multiply the heads' gradients.
        """
        method, plan = self.method, self.plan
        if isinstance(method, BufferedMethod) and plan.shared:
            return self._write_kept(method, out, accumulate, before)
        shared = self.grads.select(plan.shared, plan.segments, plan.num_segments)
        if isinstance(method, CoordinateMethod):
            rule = method.rule(self.grads.device, self.grads.num_tasks)
            before(None)
            combine_by_rule_of(shared, rule, out, accumulate, self.backend)
            return None, None
        reads_all = method.gram_parameters is None and not self.processes.hold_parts
        if self.backend.aggregate is not None and reads_all and shared.lists is not None and not method.weights_losses:
            solver = method.native_solver(self.grads.device, self.grads.num_tasks)
            # The call computes G of the scaled gradients, which changes such weights.
            if solver is not None and solver.depends_on_scale and self.collected.scale is not None:
                solver = None
            if solver is not None and out and shared.lists.fits(out):
                before(None)
                gram, weights = self.backend.aggregate(shared, solver, out, accumulate)  # type: ignore[misc]
                return self._unscaled(gram), weights
        gram, measured = self._gram()
        weights = torch.ones_like(gram[..., 0]) if isinstance(method, BufferedMethod) else self._weigh(measured)
        if self.collected.batches > 1:
            weights = torch.nn.functional.pad(weights, (self.grads.num_tasks - weights.shape[-1], 0))
        before(weights)
        combine_of(shared, weights, out, accumulate, self.backend)
        return gram, weights

    def _write_kept(
        self, method: BufferedMethod, out: list[Any], accumulate: bool, before: Callable[[Tensor | None], None]
    ) -> tuple[Tensor, Tensor]:
        """Do the same with what the method keeps in place of the task gradients."""
        collected, device = self.collected, self.grads.device
        backend = choose(self.backend_name, device, method.num_terms * self.grads.num_tasks)
        rows = [[row[p] for p in self.plan.shared] for row in collected.grads]
        step = method.step(
            rows, collected.losses, collected.scale, self.backend_name, self._counted(), self.processes.total
        )
        weights = step.weights[None]
        before(weights)
        combine_of(parse(step.terms, None), step.factors, out, accumulate, backend)
        return step.gram[None], weights

    def _gram(self) -> tuple[Tensor, Tensor]:
        """Return G of all shared parameters, and the G that the weights come from."""
        plan, tasks = self.plan, len(self.collected.tasks)
        params, segments = plan.shared, plan.read_segments
        if self.processes.hold_parts:
            counted = self._counted()
            params, segments = ([*compress(places, counted)] for places in (params, segments))
        gram = gram_of(self.grads.select(params, segments, plan.num_read_segments), self.backend)
        measured = gram = self._unscaled(self.processes.total(gram))
        if self.method.gram_parameters is not None:
            measured, gram = gram[1:], gram.sum(0, keepdim=True)
        if self.collected.batches > 1:
            measured = gram[..., :tasks, tasks : 2 * tasks]
        return gram, measured

    def _counted(self) -> list[bool]:
        """Return for each shared parameter whether its gradients count in this process's G."""
        return self.processes.counted([self.collected.parameters[p] for p in self.plan.shared])

    def _weigh(self, measured: Tensor) -> Tensor:
        losses, name = self.collected.losses, self.backend_name
        if self.whole:
            return weigh(self.method, measured[0], losses, name)[None]
        return weigh(self.method, measured, losses, name)

    def _unscaled(self, gram: Tensor) -> Tensor:
        return gram if self.collected.scale is None else gram / self.collected.scale.double().square()


def operate(
    collected: Collected,
    planner: Planner,
    processes: Replicas | Shards,
    groups: list[dict[str, Any]],
    backend_name: str | None,
    before: Callable[[], None],
) -> SurgeryInfo:
    """Operate on what was collected, and add the result to ``.grad``; ``before`` is called before gradients change."""
    method, num_tasks = planner.method, len(collected.tasks)
    collected = planner.cover(collected)
    grads, reach, foreign = read(collected)
    plan = planner.plan_for(collected, reach, groups)
    for p in set(foreign) & set(plan.shared):
        places = {id(q): place for place, q in enumerate(q for group in groups for q in group["params"])}
        for task, row in zip(collected.tasks * collected.batches, collected.grads, strict=True):
            if row[p] is not None:
                place = places[id(collected.parameters[p])]
                check_gradient(row[p], f"the gradient of loss {task!r} for the optimizer's parameter {place}")
    backend = choose(backend_name, grads.device, grads.num_tasks)
    plain = [p for p in plan.plain if p not in foreign]
    written = plan.shared + plain
    parameters = [collected.parameters[p] for p in written + foreign]
    local = processes.local(parameters)
    landing = None
    if collected.pieces is None:
        out, accumulate, done = targets(local[: len(written)], grads, written)
    else:
        landing = Landing(collected.pieces, local, written)
        out, accumulate, done = [collected.pieces.first[p] for p in written], False, set()
    begin = len(plan.shared)

    def of_losses(weights: Tensor | None) -> Tensor:
        """Return the factors on the gradients of parameters that are not shared."""
        if method.weights_losses:
            return weights[0]  # type: ignore[index]
        return torch.ones(grads.num_tasks, dtype=torch.float64, device=grads.device) / collected.batches

    sums: list[Tensor] = []

    def begin_to_write(weights: Tensor | None) -> None:
        if foreign:
            sums.extend(foreign_sums(collected, foreign, local[len(written) :], of_losses(weights)))
        before()

    whole = planner.granularity == "global"
    among = collected.pieces or processes
    operation = Operation(method, collected, grads, plan, among, backend, backend_name, whole)
    with Rollback(method, grads.device):
        gram, weights = operation.write(out[:begin], accumulate, begin_to_write)
        there = set() if method.weights_losses or collected.batches > 1 else {i - begin for i in done if i >= begin}
        if len(there) < len(plain):
            add_plain(grads, plain, of_losses(weights), out[begin:], accumulate, there, backend)
        if landing is not None:
            out = landing.fill()
        processes.assign(parameters, [*out, *map(put, local[len(written) :], sums)])
    planner.remember(plan, collected)
    if whole:
        gram, weights = (None if value is None else value[0] for value in (gram, weights))
    if collected.batches > 1:
        gram, weights = gram[..., -num_tasks:, -num_tasks:], weights[..., -num_tasks:]  # type: ignore[index]
    return SurgeryInfo(collected.tasks, gram, weights, None if whole else [*plan.blocks])


def backward_once(
    losses: Losses,
    parameters: list[Tensor],
    planner: Planner,
    processes: Replicas | Shards,
    backend: str | None,
    how: PassOptions,
    survey: Survey,
) -> SurgeryInfo:
    """Go back from the weighted sum of the losses, in one pass, and add the gradients; a failure changes nothing."""
    method, found = planner.method, []

    def weigh_by(tasks: list[str], values: Tensor) -> Tensor:
        values = processes.average_losses(tasks, values)
        planner.check_tasks(tasks)
        gram = values.new_zeros(()).expand(len(values), len(values))
        found.append(weigh(method, gram, values, backend))
        return found[0]

    with Rollback(method, parameters[0].device if parameters else torch.device("cpu")):
        collected = collect(losses, parameters, how, weigh=weigh_by, shards=processes.shards, survey=survey)
        collected.warn_of_nothing(stacklevel=5)
        with torch.no_grad():
            add_all(processes.average_gradients(collected), processes, backend)
    planner.remember_tasks(collected.tasks, collected.losses.device)
    survey.began = True
    return SurgeryInfo(collected.tasks, None, found[0])


def backward_by_representation(
    losses: Losses,
    parameters: list[Tensor],
    planner: Planner,
    processes: Replicas | Shards,
    backend_name: str | None,
    how: PassOptions,
    survey: Survey,
    check: Callable[[list[str]], None],
) -> SurgeryInfo:
    """Operate on the gradients of features, go on in one pass, and add the gradients; a failure changes nothing."""
    method = planner.method
    found: list[Tensor] = []

    @torch.no_grad()
    def steer(collected: Collected) -> tuple[list[Any], Tensor | None]:
        assert isinstance(processes, Replicas)  # no pass goes to features where parameters are sharded
        values = processes.average_losses(collected.tasks, collected.losses)
        planner.check_tasks(collected.tasks)
        grads = parse(collected.grads, None)
        backend = choose(backend_name, grads.device, grads.num_tasks)
        if isinstance(method, CoordinateMethod):
            rule = method.rule(grads.device, grads.num_tasks)
            return combine_by_rule_of(grads, rule, None, False, backend), None  # type: ignore[return-value]
        gram = processes.total_of_batches(gram_of(grads, backend))
        if collected.scale is not None:
            gram = gram / collected.scale.double().square()
        weights = weigh(method, gram, values, backend_name)
        found.extend([gram, weights])
        direction: Any = combine_of(grads, weights, None, False, backend)
        return direction, weights if method.weights_losses else None

    with Rollback(method, parameters[0].device if parameters else torch.device("cpu")):
        collected = collect(losses, parameters, how, check=check, steer=steer, shards=processes.shards, survey=survey)
        collected.warn_of_nothing(stacklevel=5)
        with torch.no_grad():
            add_all(processes.average_gradients(collected), processes, backend_name)
    planner.remember_tasks(collected.tasks, collected.losses.device)
    survey.began = True
    gram, weights = found or (None, None)
    return SurgeryInfo(collected.tasks, gram, weights)
