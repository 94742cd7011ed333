# SPDX-License-Identifier: MIT
"""The backward passes that yield task gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ._dtensor import part_of
from ._features import check_ends, part, refuse_both
from ._gradients import gradient_dtype
from ._graph import Graph, Output, Root, converts, end_of
from ._memory import Rows, check_memory

Edges = Mapping[int, GradientEdge]
"""Edges that a pass goes to, in addition to its inputs."""
Steer = Callable[[Rows], tuple[list[Any], Sequence[Tensor] | None]]
"""Maps the features' gradients to those that one pass goes on with, and to a factor per loss for what is above."""

_WRONG_UNDER_VMAP = {"AsStridedScatterBackward0", "CdistBackward0"}
"""Functions whose backward pass under vmap silently gives every task the first one's gradient (torch 2.13)."""


@dataclass(slots=True)
class Parted:
    """The results of the passes from the losses to the features, and what lies below the features."""

    rows: Rows
    """T lists of P gradients, of the parameters above the features."""
    cotangents: Rows
    """T lists of the features' gradients."""
    features: list[Output]
    """What passes take in place of the features."""
    trunk: list[int]
    """The parameters below."""
    mask: list[int]
    """For each parameter: bit t is set if loss t depends on a feature that depends on the parameter."""
    edges: Edges
    names: set[str]
    """Of the functions below."""


@dataclass(slots=True)
class Passes:
    """How to go back to the P parameters. A result holds P gradients for each task, None where it has none."""

    parameters: list[Tensor]
    batched: bool
    """One pass for all tasks, under vmap, instead of one per task."""
    chunk_size: int | None
    """Tasks of a batched pass; None: all."""
    retain_graph: bool
    starts: list[tuple[Root, Tensor]]
    """What the pass of each loss begins at, and the gradient there: 1, a gradient scaler's factor, a weight or both."""
    hiding: bool
    """Whether functions may leave gradients of parameters inside them in ``.grad``, which is then set aside."""
    ends: Sequence[Output] = field(init=False)
    """What passes take in place of the parameters."""

    def __post_init__(self) -> None:
        others = any(map(converts, {*map(type, self.parameters)}))
        self.ends = [*map(end_of, self.parameters)] if others else self.parameters

    @contextmanager
    def grads_aside(self) -> Iterator[None]:
        """Clear ``.grad`` of the parameters for this context; RuntimeError if a batched pass left anything there."""
        with ExitStack() as restoring:
            for p in self.parameters:
                restoring.callback(setattr, p, "grad", p.grad)
                p.grad = None
            yield
            if any(p.grad is not None for p in self.parameters):
                raise RuntimeError(
                    "the batched backward pass failed: a function's backward calls backward() itself "
                    "(mode='sequential' goes back without vmap)"
                )

    def _go_back(
        self, outputs: Sequence[Output], inputs: Sequence[Output], grads: Sequence[Tensor], edges: Edges, keep: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients of the inputs alone; the pass goes to the edges, too."""
        found = torch.autograd.grad(outputs, [*inputs, *edges.values()], grads, retain_graph=keep, allow_unused=True)  # type: ignore[arg-type]
        return found[: len(inputs)]

    def _add_hidden(self, row: list[Tensor | None]) -> None:
        """Add to a row what functions have left in ``.grad``, and clear it."""
        if not self.hiding:
            return
        for place, p in enumerate(self.parameters):
            if p.grad is not None:
                found = row[place]
                row[place] = p.grad if found is None else found + p.grad
                p.grad = None

    def from_losses(self, *, joint: bool = False) -> Rows:
        """Go from each loss to the parameters; ``joint``: from all losses at once, which yields one row, of sums."""
        groups = self._groups(joint)
        if not self.parameters:
            return [[] for _ in groups]
        if self.batched:
            return self._batched_from_losses()
        rows: Rows = []
        roots = [root for root, _ in self.starts]
        edges = Graph.of(roots).edges_behind_functions(self.parameters) if self.hiding else {}
        for (outputs, factors), keep in self._with_keep(groups):
            rows.append([*self._go_back(outputs, self.ends, factors, edges, keep)])
            self._add_hidden(rows[-1])
        check_memory(rows)
        return rows

    def through_grad(self, *, sharded: bool, joint: bool = False) -> Rows:
        """Do what :meth:`from_losses` does by way of all leaves' ``.grad``, where passes to named inputs do not work.

        Re-entrant checkpoints hide what is inside them. ``fully_shard`` has other tensors than the parameters in the
        graph, and its hooks wait for whole passes. The gradients of sharded parameters are this process's parts.

        Raises:
            RuntimeError: a pass left no shard of a gradient, for example because of ``set_requires_gradient_sync``.
        """
        parameters: list[Any] = self.parameters
        rows: Rows = []
        for (outputs, factors), keep in self._with_keep(self._groups(joint)):
            torch.autograd.backward(outputs, factors, retain_graph=keep)
            rows.append([part_of(p.grad, p) if sharded and p.grad is not None else p.grad for p in parameters])
            for p in parameters:
                p.grad = None
            if sharded and all(entry is None for entry in rows[-1]):
                raise RuntimeError(
                    f"loss {len(rows) - 1} left no gradient in the sharded parameters: it must depend on one, and "
                    "set_requires_gradient_sync must stay True, also between micro-batches (use collect() for these)"
                )
        return rows

    def _batched_from_losses(self) -> Rows:
        """Go from all losses at once to shared parameters; to those of one task alone, by one pass from all losses."""
        roots, factors = map(list, zip(*self.starts, strict=True))
        graph = Graph.of(roots)
        _check_vmap(set(graph.names))
        outputs = [root.output() for root in roots]
        leaves = graph.reach(graph.roots).leaves
        mask = [leaves.get(id(p), 0) for p in self.parameters]
        rows: Rows = [[None] * len(mask) for _ in outputs]
        owned = [p for p, m in enumerate(mask) if m.bit_count() == 1]
        shared = [p for p, m in enumerate(mask) if m.bit_count() > 1]
        edges = graph.edges_behind_functions(self.parameters) if self.hiding else {}
        if owned:
            inputs = [self.ends[p] for p in owned]
            of_sum = self._go_back(outputs, inputs, factors, {}, self.retain_graph or bool(shared or edges))
            for p, grad in zip(owned, of_sum, strict=True):
                rows[mask[p].bit_length() - 1][p] = grad
        units = torch.eye(len(rows), dtype=factors[0].dtype, device=factors[0].device)
        cotangents = [units[t].to(f).reshape(-1, *[1] * f.dim()) * f for t, f in enumerate(factors)]
        self._fill_batched(rows, shared, mask, outputs, cotangents, edges)
        return rows

    def by_features(self, features: Sequence[Tensor]) -> Rows:
        """Go from each loss to the features and the parameters above them, then from the features to those below.

        Raises:
            ValueError: the features do not part the graph.
        """
        parted = self._to_features(features)
        rows = parted.rows
        if self.batched:
            _check_vmap(parted.names)
            check_memory(rows)
            stacks = [
                torch.stack([torch.zeros_like(f) if row[i] is None else row[i] for row in parted.cotangents])  # type: ignore[misc]
                for i, f in enumerate(features)
            ]
            self._fill_batched(rows, parted.trunk, parted.mask, parted.features, stacks, parted.edges)
            return rows
        for row, (grads, keep) in zip(rows, self._with_keep(parted.cotangents), strict=True):
            self._fill_below(row, grads, parted, keep)
        check_memory(rows)
        return rows

    def by_representation(self, features: Sequence[Tensor], steer: Steer) -> Rows:
        """Go from each loss to the features, and from there once, with what ``steer`` makes of their gradients.

        The gradients of that one pass are in the first row, together with the first loss's gradients above the
        features.

        Raises:
            ValueError: the features do not part the graph, or each of several belongs to one loss alone.
            TypeError: a feature is complex.
        """
        parted = self._to_features(features, joint=True)
        rows = parted.rows
        check_memory(rows)
        direction, factors = steer(parted.cotangents)
        parted.cotangents = []
        if factors is not None:
            for row, factor in zip(rows, factors, strict=True):
                row[:] = [None if grad is None else grad * factor.to(grad.dtype) for grad in row]
        self._fill_below(rows[0], direction, parted, self.retain_graph)
        return rows

    def _to_features(self, features: Sequence[Tensor], *, joint: bool = False) -> Parted:
        """Go from each loss to the features and the parameters above; ``joint``: some must belong to several losses."""
        graph = Graph.of([*(root for root, _ in self.starts), *map(Root, features)])
        starts, stops = graph.roots[: len(self.starts)], graph.roots[len(self.starts) :]
        below, above = part(graph, starts, stops, self.parameters)
        if joint and len({*above.stops}) > 1 and all(tasks.bit_count() == 1 for tasks in above.stops):
            raise ValueError(
                "each feature belongs to one loss alone, as where each task has data of its own: two losses' gradients "
                'then have no products, and mode="representation" would find no conflicts'
            )
        if joint and any(f.is_complex() for f in features):
            raise TypeError('mode="representation" takes real features, got complex ones')
        rows: Rows = [[None] * len(self.parameters) for _ in self.starts]
        cotangents: Rows = []
        edges = graph.edges_behind_functions(self.parameters, above, stops) if self.hiding else {}
        known = above.leaves.keys() & map(id, self.parameters)
        check_ends(graph, stops, [*edges, *(node for node, leaf in graph.leaves.items() if id(leaf) in known)])
        feature_ends = [*map(end_of, features)]
        for t, ((root, factor), keep) in enumerate(self._with_keep(self.starts)):
            own = [p for p, owner in enumerate(self.parameters) if above.leaves.get(id(owner), 0) >> t & 1]
            inputs = [*feature_ends, *(self.ends[p] for p in own)]
            found = self._go_back([root.output()], inputs, [factor], edges, keep)
            cotangents.append(list(found[: len(features)]))
            for p, grad in zip(own, found[len(features) :], strict=True):
                rows[t][p] = grad
            self._add_hidden(rows[t])
        check_memory(cotangents)
        mask = [0] * len(self.parameters)
        for p, owner in enumerate(self.parameters):
            for f, tasks in enumerate(above.stops):
                mask[p] |= tasks * (below.leaves.get(id(owner), 0) >> f & 1)
        trunk = [p for p, m in enumerate(mask) if m]
        refuse_both(p for p in trunk if any(row[p] is not None for row in rows))
        edges = graph.edges_behind_functions(self.parameters, below) if self.hiding else {}
        names = {name for name, reached in zip(graph.names, below.nodes, strict=True) if reached}
        return Parted(rows, cotangents, feature_ends, trunk, mask, edges, names)

    def _fill_below(
        self, row: list[Tensor | None], cotangents: Sequence[Tensor | None], parted: Parted, keep: bool
    ) -> None:
        """Fill in the gradients of the parameters below the features from those of the features."""
        given = [(f, g) for f, g in zip(parted.features, cotangents, strict=True) if g is not None]
        inputs = [self.ends[p] for p in parted.trunk]
        if given and (inputs or parted.edges):
            outputs, grads = zip(*given, strict=True)
            for p, grad in zip(parted.trunk, self._go_back(outputs, inputs, grads, parted.edges, keep), strict=True):
                row[p] = grad
            self._add_hidden(row)

    def _groups(self, joint: bool) -> list[tuple[list[Output], list[Tensor]]]:
        """Return the outputs of each pass, and the gradients there."""
        if joint:
            return [([root.output() for root, _ in self.starts], [factor for _, factor in self.starts])]
        return [([root.output()], [factor]) for root, factor in self.starts]

    def _with_keep(self, items: Sequence[Any]) -> list[tuple[Any, bool]]:
        """Pair each with whether its pass must keep the graph."""
        return [(item, self.retain_graph or i + 1 < len(items)) for i, item in enumerate(items)]

    def _fill_batched(
        self,
        rows: Rows,
        params: list[int],
        mask: list[int],
        outputs: Sequence[Output],
        cotangents: list[Tensor],
        edges: Edges,
    ) -> None:
        """Fill in the gradients of ``params`` from cotangents [T, ...] of the outputs, where the mask says so."""
        if not params and not edges:
            return
        step = self.chunk_size or len(rows)
        for begin, keep in self._with_keep(range(0, len(rows), step)):
            chunk = [c[begin : begin + step] for c in cotangents]
            found = self._vmapped(outputs, params, chunk, edges, keep)
            for p, stack in zip(params, found, strict=True):
                for t, grad in enumerate(stack.unbind(), begin):
                    if mask[p] >> t & 1:
                        rows[t][p] = grad

    def _vmapped(
        self,
        outputs: Sequence[Output],
        params: list[int],
        cotangents: list[Tensor],
        edges: Edges,
        keep: bool,
    ) -> Sequence[Tensor]:
        def go_back(*grads: Tensor) -> tuple[Tensor, ...]:
            found = self._go_back(outputs, [self.ends[p] for p in params], grads, edges, keep)
            pairs = zip((self.parameters[p] for p in params), found, strict=True)
            return tuple(torch.zeros_like(p, dtype=gradient_dtype(p)) if g is None else g for p, g in pairs)

        try:
            # Not by is_grads_batched, whose convolutions loop over the batch. Random numbers that a checkpoint draws
            # again are the same for all tasks.
            return torch.vmap(go_back, randomness="same")(*cotangents)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise RuntimeError(
                f"the batched backward pass failed: {reason} (mode='sequential' goes back without vmap)"
            ) from error


def _check_vmap(names: set[str]) -> None:
    wrong = sorted(names & _WRONG_UNDER_VMAP)
    if wrong:
        raise RuntimeError(
            f"the batched backward pass failed: torch.vmap gives wrong gradients of {wrong[0]} "
            "(mode='sequential' goes back without vmap)"
        )
