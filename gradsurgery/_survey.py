# SPDX-License-Identifier: MIT
"""What the steps so far tell: how backward passes must run, and whether shared parameters can be inferred."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._collected import Collected
from ._compiling import capturing
from ._graph import Graph, Root, functions_behind
from ._shards import Shards
from .distributed import Replicas


@dataclass(slots=True)
class Survey:
    """What the graphs of the steps so far, and their first gradients, tell about the passes.

    A graph is searched only if it has functions in Python that no earlier graph had, or the first function that is
    written wholly in C++: TorchScript's, which appear at a module's second call, or an extension's.
    """

    infers_shared: bool
    """Whether shared parameters are inferred, until a warning that they cannot be."""
    checked: bool = False
    """Whether gradients were checked for zeros since the last new functions (in Python, or wholly in C++) appeared."""
    suspected: bool = False
    """Whether a check found zeros that the next step must confirm."""
    functions: frozenset[str] = frozenset()
    """The names of such functions in the graphs so far."""
    reentrant: frozenset[str] = frozenset()
    """Those of re-entrant checkpoints."""
    hides: frozenset[str] = frozenset()
    """Those of functions whose backward may call another pass."""
    began: bool = False
    """Whether there was a step of surgery."""
    early_steps: int = 0
    """Steps of the wrapped optimizer before the first surgery, as far as they count."""

    def begin_step(self, groups: list[dict[str, Any]]) -> None:
        """Warn at the second step before any surgery.

        Steps do not count if all learning rates are 0 (as numbers: tensors are not read): checkpoint code takes such
        steps, to make a state to load into.
        """
        rates = (group.get("lr") for group in groups)
        if self.began or all(not isinstance(rate, Tensor) and rate == 0 for rate in rates):
            return
        self.early_steps += 1
        if self.early_steps == 2:
            warnings.warn(
                "two steps without surgery: call this optimizer's backward(losses) in place of a loss's backward()",
                stacklevel=3,
            )

    def take(self, losses: list[Tensor]) -> tuple[bool, bool]:
        """Look at the graph behind these losses, and tell how passes through it must run.

        Returns:
            Whether they must go by way of ``.grad``, and whether functions may call passes of their own.
        """
        functions = functions_behind(losses)
        if not functions <= self.functions:
            graph = Graph.of([*map(Root, losses)])
            self.reentrant |= {graph.names[node] for node in graph.functions if graph.is_reentrant(node)}
            self.hides |= {graph.names[node] for node in graph.functions if graph.may_hide(node)}
            self.checked = False
            self.functions |= functions  # last: after an interrupt, all of this is done again
        return not functions.isdisjoint(self.reentrant), not functions.isdisjoint(self.hides)

    def wants_gradients(self, collected: Collected) -> bool:
        """Whether :meth:`check` reads gradients of this step, which must then not be cut into pieces."""
        return self.infers_shared and not self.checked and not capturing(collected.losses.device)

    def check(self, collected: Collected, processes: Replicas | Shards) -> None:
        """Warn of parameters that count as shared, but that one task alone trains, because another gives them zeros.

        The backward pass of a function with several outputs gives such zeros if a loss does not depend on all outputs.
        If two tasks give zeros to each other's parameters, this is certain. Otherwise a layer that begins at zero may
        be the cause, so the next step must show the zeros, too. A task that gives zeros to all shared parameters, as
        for a batch without its labels, proves nothing.

        Args:
            collected: the task gradients, which are read on the host.
            processes: those that hold parts of them.
        """
        if not self.wants_gradients(collected):
            return
        # After the first step processes may disagree on whether functions are new, and total() would wait for some.
        self.checked = processes.shards is not None and self.began and not self.suspected
        shared = [p for p, count in enumerate(collected.reach) if count > 1]
        if self.checked or not shared:
            return
        trains = processes.total(_are_not_zero(collected, shared))
        try:
            trained_by = [{t for t, value in enumerate(column) if value} for column in trains.T.tolist()]
        except RuntimeError:  # fake tensors and those on "meta" have no values
            return
        telling = set().union(*trained_by)
        pairs = set()
        for p, tasks in zip(shared, trained_by, strict=True):
            if len(tasks) == 1:
                reaching = {r % len(collected.tasks) for r, row in enumerate(collected.grads) if row[p] is not None}
                pairs |= {(min(tasks), t) for t in telling & reaching - tasks}
        certain = pairs if self.suspected else {(own, other) for own, other in pairs if (other, own) in pairs}
        self.suspected = bool(pairs)
        self.checked = bool(certain) or not pairs
        if certain:
            self.infers_shared = False
            own, other = (collected.tasks[t] for t in min(certain))
            warnings.warn(
                f"loss {other!r} gives gradients of zeros to parameters that loss {own!r} alone trains, but they count "
                "as shared. This happens to heads if losses are slices of one tensor, or come out of one compiled "
                "function, checkpoint or sharded module. Name the shared parameters by shared=, or keep trunk and "
                "heads apart there. (If they really are shared, and a loss has inputs of zeros, for example, shared= "
                "says so, too.)",
                stacklevel=6,
            )


def _are_not_zero(collected: Collected, parameters: list[int]) -> Tensor:
    """Return in how many batches a task's gradient of each of these parameters is not zero, [T, len(parameters)]."""
    device = collected.losses.device
    rows = [torch.stack([_is_not_zero(row[p], device) for p in parameters]) for row in collected.grads]
    return torch.stack(rows).view(collected.batches, -1, len(parameters)).sum(0, dtype=torch.float64)


def _is_not_zero(grad: Tensor | None, device: torch.device) -> Tensor:
    if grad is None or grad.layout is not torch.strided or not grad.numel():
        return torch.zeros((), dtype=torch.bool, device=device)
    largest: Tensor = torch.linalg.vector_norm(grad, torch.inf)  # any() would allocate N bytes
    return largest.ne(0).to(device)
