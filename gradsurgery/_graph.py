# SPDX-License-Identifier: MIT
"""Which leaves a backward pass would reach, read off autograd's graph without running it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

_JOINING = ("CompiledFunctionBackward", "RegisterPostBackwardFunctionBackward")
"""torch.compile's functions, and fully_shard's of a module's inputs."""

_REENTRANT = "CheckpointFunctionBackward"
"""torch.utils.checkpoint's function with use_reentrant=True, and the like of other packages."""


def reach(roots: Sequence[Tensor], stops: Sequence[Tensor] = ()) -> tuple[dict[int, int], list[int]]:
    """Walk from the roots to the leaves, each node once, and not beyond the stops.

    Returns:
        For the id of each leaf a bit mask, bit r where root r depends on it on a path without a stop; and such a mask
        for each stop.
    """
    stop_at = {_edge(stop): s for s, stop in enumerate(stops)}
    stop_masks = [0] * len(stops)
    masks: defaultdict[Any, int] = defaultdict(int)
    for r, root in enumerate(roots):
        edge = _origin(root)
        if edge in stop_at:
            stop_masks[stop_at[edge]] |= 1 << r
        elif edge[0] is not None:
            masks[edge[0]] |= 1 << r
    leaves: dict[int, int] = {}
    for node in reversed(_postorder(list(masks), stop_at)):
        mask = masks[node]
        for edge in node.next_functions:
            if edge in stop_at:
                stop_masks[stop_at[edge]] |= mask
            elif edge[0] is not None:
                masks[edge[0]] |= mask
        if type(node).__name__ == "AccumulateGrad":
            leaves[id(node.variable)] = mask
    return leaves, stop_masks


def joins(losses: Sequence[Tensor]) -> bool:
    """Whether two losses depend on different outputs of one function that gives zeros, not None, for the others."""
    entries: dict[Any, set[frozenset[int]]] = defaultdict(set)
    for loss in losses:
        outputs: dict[Any, set[int]] = defaultdict(set)
        stack, seen = [edge for edge in [_origin(loss)] if edge[0] is not None], set()
        while stack:
            node, output = stack.pop()
            if type(node).__name__ in _JOINING:
                outputs[node].add(output)
            elif node not in seen:
                seen.add(node)
                stack.extend(edge for edge in node.next_functions if edge[0] is not None)
        for node, of_loss in outputs.items():
            entries[node].add(frozenset(of_loss))
    return any(len(found) > 1 for found in entries.values())


def recomputes(losses: Sequence[Tensor]) -> bool:
    """Whether a loss depends on a reentrant checkpoint, which hides what is inside from passes to named inputs."""
    starts = {_edge(loss)[0] for loss in losses}
    return any(type(node).__name__ == _REENTRANT for node in _postorder(list(starts), {}))


def is_stacked(loss: Tensor) -> bool:
    """Whether the loss is a part of a torch.stack, whose backward pass gives zeros to the other parts' parameters."""
    return _origin(loss) != _edge(loss)


def _origin(loss: Tensor) -> tuple[Any, int]:
    """Return the edge that the loss hangs on; for a part of a torch.stack, that of the loss that was stacked."""
    node, output = _edge(loss)
    name = type(node).__name__
    if name not in ("UnbindBackward0", "SelectBackward0"):
        return node, output
    whole = node.next_functions[0][0]
    if type(whole).__name__ != "StackBackward0":
        return node, output
    place = output if name == "UnbindBackward0" else node._saved_index
    # A negative index comes back as an unsigned number of 64 bits.
    return whole.next_functions[place if place < 2**63 else place - 2**64]  # type: ignore[no-any-return]


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _postorder(starts: list[Any], stop_at: dict[tuple[Any, int], int]) -> list[Any]:
    """Return all nodes, each behind those that it depends on."""
    order: list[Any] = []
    seen = set()
    stack = [(node, False) for node in starts]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend(
                (edge[0], False) for edge in node.next_functions if edge[0] is not None and edge not in stop_at
            )
    return order
