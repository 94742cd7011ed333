# SPDX-License-Identifier: MIT
"""What the steps so far tell: how backward passes must run, and whether shared parameters can be inferred."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from ._collected import Collected
from ._compiling import capturing
from ._graph import Graph, Root, functions_behind
from ._shards import Shards
from .distributed import Replicas

_REENTRANT = "CheckpointFunctionBackward"
"""torch.utils.checkpoint's function with use_reentrant=True, and the like of other packages."""


@dataclass(slots=True)
class Survey:
    """What the graphs of the steps so far, and the first gradients that came of them, tell about the passes.

    Only a graph with functions in Python that no earlier one had is looked through, or with the first of TorchScript's,
    which it makes at a module's second call, or of an extension's.
    """

    infers_shared: bool
    """Whether shared parameters are inferred, until a warning that they cannot be."""
    checked: bool = False
    """Whether the gradients were looked at since there were new functions, in Python or whole in C++."""
    suspected: bool = False
    """Whether they were, and must be once more."""
    functions: frozenset[str] = frozenset()
    """The names of those functions."""
    through_grad: bool = False
    """Whether passes must go by way of ``.grad``."""
    hiding: bool = False
    """Whether there are functions whose backward may call another pass."""
    began: bool = False
    """Whether there was a step of surgery."""
    early_steps: int = 0
    """Steps of the wrapped optimizer before that."""

    def begin_step(self) -> None:
        """Warn of the second step before any surgery; some checkpoints make one, to have a state to load into."""
        self.early_steps += not self.began
        if self.early_steps == 2 and not self.began:
            warnings.warn(
                "two steps without surgery: call this optimizer's backward(losses) in place of a loss's backward()",
                stacklevel=3,
            )

    def take(self, losses: list[Tensor], roots: list[Root]) -> None:
        """Look at the graph of these."""
        functions = functions_behind(losses)
        if functions <= self.functions:
            return
        graph = Graph.of(roots)
        self.through_grad = self.through_grad or _REENTRANT in graph.names
        self.hiding = self.hiding or any(map(graph.may_hide, graph.functions))
        self.checked = False
        self.functions |= functions  # last, or after an interrupt none of this would be done

    def check(self, collected: Collected, processes: Replicas | Shards) -> None:
        """Warn of shared parameters that one task alone trains, where another gives zeros.

        So the backward pass of a function with several outputs does, where a loss does not depend on all. If two tasks
        do so to each other it is certain; else it may come of a layer that begins at zero, and must be so at the next
        step, too. A task that gives zeros to all shared parameters, as for a batch without its labels, tells nothing.

        Args:
            collected: the task gradients, which are read on the host.
            processes: those that hold parts of them.
        """
        if not self.infers_shared or self.checked or capturing(collected.losses.device):
            return
        # After the first step processes may not agree that there are new functions, and their sum would wait.
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
                f"loss {other!r} gives gradients of zeros to parameters that loss {own!r} alone trains, and they count "
                "as shared: so do heads where losses are cut from one tensor, or come out of one compiled function, "
                "checkpoint or sharded module. Name the shared parameters by shared=, or keep trunk and heads apart "
                "there. (If they are shared, as where a loss has inputs of zeros: shared= says so, too.)",
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
