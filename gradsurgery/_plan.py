# SPDX-License-Identifier: MIT
"""Which parameters are shared, and in which segments, from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._checks import check_choice, describe, list_of
from ._collected import Collected
from ._compiling import capturing
from ._shards import Shards
from .methods import Method
from .methods._buffered import BufferedMethod


@dataclass(slots=True)
class Plan:
    """Which parameters are shared, and their segments: settled once for all steps with the same reach."""

    parameters: list[Tensor]
    reach: bytes
    """For each parameter, how many losses reach it."""
    enough: int
    """How many losses must reach a parameter for it to be shared."""
    groups: list[int] | None
    """For each parameter, its group, with granularity "per_group"; else None."""
    shared: list[int]
    plain: list[int]
    """The other parameters with a gradient."""
    segments: list[int]
    """The segment of each shared parameter."""
    blocks: list[Any]
    """For each segment, the number of its group, or its parameter."""
    num_segments: int
    read_segments: list[int]
    """Like ``segments``, but for computing G: with ``gram_parameters``, these are segment 1, all others segment 0."""
    num_read_segments: int


class Planner:
    """Makes the plans, and checks that what a method keeps belongs to the same parameters and tasks at each step.

    Args:
        method: the method.
        named: the parameters that the user says are shared; None: they are found anew at each step.
        granularity: "global", "per_group" or "per_tensor".
    """

    def __init__(self, method: Method, named: Iterable[Tensor] | None, granularity: str) -> None:
        self.method = method
        self._by_task = method.tells_tasks_apart
        self._looks = 0  # how often the state was inspected after a step, which may have made a number one per task
        self.named = None if named is None else list_of(named, "shared")
        self.granularity = granularity
        self._plan: Plan | None = None  # that of the last step
        self._blocks: list[Any] | None = None
        self.kept: list[Tensor] = []  # the parameters whose gradients the method keeps
        self._tasks: list[str] | None = None  # those of the steps before, if the method tells tasks apart

    def state_dict(self, parameters: list[Tensor], shards: Shards | None) -> dict[str, Any]:
        """Return the method's state and, if it keeps something for each of these, its parameters, blocks and tasks.

        Parameters are given by their places among all parameters, blocks by the place of their parameter or the number
        of their group.
        """
        own = self.method.state_dict()
        if self.kept and shards is not None:
            own = shards.spread(own, self.kept)
        state: dict[str, Any] = {"surgery": {self.method.name: own}}
        places = {id(p): place for place, p in enumerate(parameters)}
        shared = [places.get(id(p)) for p in self.kept]
        if shared and None not in shared:  # None: the parameter has since been removed from the optimizer
            state["shared"] = shared
        if self._blocks is not None and self.granularity != "global":
            blocks = [block if isinstance(block, int) else places.get(id(block)) for block in self._blocks]
            if None not in blocks:
                state["blocks"] = blocks
        if self._tasks is not None:
            state["tasks"] = {task: place for place, task in enumerate(self._tasks)}
        return state

    def own_state(self, surgery: dict[str, dict[str, Any]] | None) -> dict[str, Any] | None:
        """Return the method's state from a ``state_dict``'s "surgery"; ValueError if it is another method's."""
        if surgery is None:
            return None
        if not isinstance(surgery, dict):
            raise ValueError(f"surgery must hold a method's state by its name, got {describe(surgery)}")
        name, states = self.method.name, surgery.values()
        if not all(isinstance(own, dict) for own in states) or (name not in surgery and any(states)):
            raise ValueError(
                f"the state must be that of method {name!r}, got that of {', '.join(map(repr, surgery))}: to go on "
                'with another method, pop "surgery" from the state_dict'
            )
        return surgery.get(name, {})

    def check_state(self, state: dict[str, Any], num_parameters: int) -> None:
        """Raise ValueError unless a ``state_dict``, apart from the method's own state, can be restored."""
        for name in ("shared", "blocks"):
            places = state.get(name, [])
            if not isinstance(places, (list, tuple)) or not all(isinstance(place, int) for place in places):
                raise ValueError(f"{name} must be a list of places, got {describe(places)}")
            of_parameters = name == "shared" or self.granularity == "per_tensor"
            if of_parameters and not set(places) <= set(range(num_parameters)):
                raise ValueError(f"{name} must hold places of {num_parameters} parameters, got {places}")
        tasks = state.get("tasks", {})
        if not isinstance(tasks, dict) or set(tasks.values()) != set(range(len(tasks))):
            raise ValueError(f"tasks must hold a place for each name, got {tasks!r}")

    def restore(self, state: dict[str, Any], parameters: list[Tensor]) -> None:
        """Begin anew from a ``state_dict``, apart from the method's own state."""
        self._plan = None
        self.kept = [parameters[place] for place in state.get("shared", [])]
        self._tasks = sorted(state["tasks"], key=state["tasks"].__getitem__) if "tasks" in state else None
        self._blocks = state.get("blocks")
        if self._blocks is not None and self.granularity == "per_tensor":
            self._blocks = [parameters[place] for place in self._blocks]

    def check_tasks(self, tasks: list[str]) -> None:
        """Raise ValueError if the method tells tasks apart, and had other tasks before, or another order."""
        if self._tasks not in (None, tasks):
            raise ValueError(
                f"every step must have the same tasks in the same order, for the method has a state or an option for "
                f"each: had {self._tasks}, got {tasks}"
            )

    def remember_tasks(self, tasks: list[str], device: torch.device | None = None) -> None:
        """Remember the tasks of an update, or of a step that is done on a device."""
        if device is not None and not self._by_task and self._looks < 2 and not capturing(device):
            self._looks += 1
            with suppress(Exception):  # a user's method may raise, but its step is done
                self._by_task = self.method.tells_tasks_apart
        if self._by_task:
            self._tasks = tasks

    def cover(self, collected: Collected) -> Collected:
        """Return it with zero gradients for parameters that the method keeps, but no loss reaches this time."""
        named = self._settled()
        if not named and not all(collected.present):
            raise ValueError(
                "what is shared cannot be told without every loss: name it by shared=, or give all losses first"
            )
        return collected if named is None else collected.covering(self.kept)

    def plan_for(self, collected: Collected, reach: bytes, groups: list[dict[str, Any]]) -> Plan:
        """Return the last step's plan if it still holds, else a new one.

        Args:
            collected: the step's gradients.
            reach: for each parameter, how many losses reach it.
            groups: the optimizer's parameter groups.

        Raises:
            ValueError: the method keeps something for other parameters, segments or tasks, or takes G from parameters
                of which none is shared.
        """
        parameters, enough, group_of = collected.parameters, min(2, len(collected.tasks)), None
        if self.granularity == "per_group":
            places = {id(p): g for g, group in enumerate(groups) for p in group["params"]}
            group_of = [places.get(id(p), -1) for p in parameters]  # -1: removed since
        plan = self._plan
        if (
            plan is None
            or (plan.reach, plan.enough, plan.groups) != (reach, enough, group_of)
            or not _are_same(plan.parameters, parameters)
        ):
            plan = self._make(parameters, reach, enough, group_of)
            self._check_same(plan)
        self.check_tasks(collected.tasks)
        return plan

    def _make(self, parameters: list[Tensor], reach: bytes, enough: int, groups: list[int] | None) -> Plan:
        """Return a plan; ``enough`` losses must reach a parameter for it to be shared, unless the user named those."""
        shared, measured = self._settled(), self.method.gram_parameters
        if shared is None:
            chosen = [p for p, count in enumerate(reach) if count >= enough]
        else:
            named = {id(p) for p in shared}
            chosen = [p for p, count in enumerate(reach) if count and id(parameters[p]) in named]
        blocks: list[Any] = [0]
        segments = [0] * len(chosen)
        if self.granularity == "per_tensor":
            segments, blocks = list(range(len(chosen))), [parameters[p] for p in chosen]
        elif groups is not None:
            blocks = sorted({groups[p] for p in chosen})
            places = {group: place for place, group in enumerate(blocks)}
            segments = [places[groups[p]] for p in chosen]
        read_segments = segments
        if measured is not None:
            named = {id(p) for p in measured}
            read_segments = [int(id(parameters[p]) in named) for p in chosen]
            if not any(read_segments):
                raise ValueError("no two losses share any of norm_parameters")
        return Plan(
            parameters=parameters,
            reach=reach,
            enough=enough,
            groups=groups,
            shared=chosen,
            plain=sorted({p for p, count in enumerate(reach) if count} - set(chosen)),
            segments=segments,
            blocks=blocks,
            num_segments=max(segments, default=0) + 1,
            read_segments=read_segments,
            num_read_segments=max(read_segments, default=0) + 1,
        )

    def remember(self, plan: Plan, collected: Collected) -> None:
        """Remember the plan of a step that is done, and what the method keeps of it."""
        self._plan = plan
        self.remember_tasks(collected.tasks, collected.losses.device)
        if not plan.shared:
            return
        if self.method.state_by_problem:
            self._blocks = plan.blocks
        if isinstance(self.method, BufferedMethod):
            self.kept = self.kept or [plan.parameters[p] for p in plan.shared]

    def _settled(self) -> list[Tensor] | None:
        """Return the shared parameters if the user or earlier steps have determined them; else None."""
        if self.named is None and self.method.takes_absent:
            return self.kept or None
        return self.named

    def _check_same(self, plan: Plan) -> None:
        """Raise ValueError if the method keeps something for other parameters or segments."""
        if not plan.shared:
            return
        shared = [plan.parameters[p] for p in plan.shared]
        if self.kept and not _are_same(self.kept, shared):
            raise ValueError(
                f"method {self.method.name!r} keeps gradients of the shared parameters, which must be the same at each "
                f"step: name them by shared=, and leave requires_grad as it is; had {len(self.kept)}, got {len(shared)}"
            )
        if self.kept and self.named is None and self._plan is not None:
            old = {id(p) for p in self._plan.parameters}
            if any(plan.reach[p] >= plan.enough > 1 and id(plan.parameters[p]) not in old for p in plan.plain):
                raise ValueError(
                    f"method {self.method.name!r} keeps gradients of the parameters that the first step's losses "
                    "shared, and now they share more: name them by shared=, and leave requires_grad as it is"
                )
        if self._blocks is not None and not _are_same(self._blocks, plan.blocks):
            raise ValueError(
                f"method {self.method.name!r} has a state for each group or tensor of the shared parameters, which "
                f"must be the same at each step; had {len(self._blocks)}, got {len(plan.blocks)} or others"
            )


def check_method(method: Method, granularity: str, sharded: bool) -> None:
    """Raise ValueError for an unknown granularity, or if the method does not support it, or shards."""
    check_choice("granularity", granularity, ("global", "per_group", "per_tensor"))
    keeps = isinstance(method, BufferedMethod)
    if granularity != "global" and (method.weights_losses or keeps or method.gram_parameters is not None):
        why = "weights losses" if method.weights_losses else "keeps gradients" if keeps else "reads a G of its own"
        raise ValueError(f"method {method.name!r} {why}, which needs granularity 'global', got {granularity!r}")
    if sharded and not method.takes_shards:
        raise ValueError(
            f"method {method.name!r} numbers all coordinates, which needs whole parameters, got sharded ones"
        )


def check_representation(method: Method, granularity: str) -> None:
    """Raise ValueError if the method cannot operate on the gradients of features."""
    wanted = 'mode="representation" operates on the gradients of features'
    if granularity != "global":
        raise ValueError(f"{wanted}, which needs granularity 'global', got {granularity!r}")
    if isinstance(method, BufferedMethod):
        raise ValueError(f"{wanted}, which change from batch to batch, but method {method.name!r} keeps gradients")
    if method.gram_parameters is not None:
        raise ValueError(f"{wanted}, but method {method.name!r} reads the G of parameters of its own")


def _are_same(these: list[Any], those: list[Any]) -> bool:
    """Whether two lists hold the same numbers or parameters."""
    return len(these) == len(those) and all(
        a is b or (isinstance(a, int) and a == b) for a, b in zip(these, those, strict=True)
    )
