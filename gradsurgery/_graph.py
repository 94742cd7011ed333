# SPDX-License-Identifier: MIT
"""Which leaves a backward pass would reach, read off autograd's graph without running it."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ._extension import C

_PARTS = ("UnbindBackward0", "SelectBackward0")

_PASSING = ("_DDPSinkBackward", "BackwardHookFunctionBackward")
"""Functions each of whose outputs is one of the inputs: DistributedDataParallel's, and those of module hooks."""

Output = Tensor | GradientEdge
"""What torch's passes take."""

Edge = tuple[int, int]
"""The number of a node, and which of its outputs; -1 where no graph is behind."""


def converts(kind: Any) -> bool:
    """Whether torch's functions return tensors of this subclass if they are given one.

    Subclasses that dispatch operators are left out: they may not have ``view_as``, by which torch finds a leaf's edge.
    """
    is_plain = kind is Tensor or kind.__torch_function__ is torch._C._disabled_torch_function_impl
    return not is_plain and kind.__torch_dispatch__ is Tensor.__torch_dispatch__


def edge_of(tensor: Tensor) -> GradientEdge:
    """Return where the graph behind a tensor begins."""
    # Else the result of view_as, by which torch finds a leaf's edge, would be converted, and its function returned.
    with torch._C.DisableTorchFunctionSubclass():
        return get_gradient_edge(tensor)


def end_of(tensor: Tensor) -> Output:
    """Return what torch's passes take in place of a tensor that they begin at or go to.

    This is the tensor itself, or its edge if torch would convert all gradients of the pass to the tensor's subclass,
    whose attributes are slow to read.
    """
    return edge_of(tensor) if converts(type(tensor)) else tensor


class Root(NamedTuple):
    """What a backward pass begins at."""

    tensor: Tensor
    place: int | None = None
    """For a part of a torch.stack, its place there: the pass then begins at the tensor that was stacked in it."""

    def edge(self) -> GradientEdge:
        """Return where the graph begins."""
        if self.place is None:
            return edge_of(self.tensor)
        return GradientEdge(*self.tensor.grad_fn.next_functions[0][0].next_functions[self.place])  # type: ignore[union-attr]

    def output(self) -> Output:
        """Return what torch's passes take."""
        return end_of(self.tensor) if self.place is None else self.edge()


def root_of(loss: Tensor) -> Root | None:
    """Return what a loss's backward pass begins at: the loss, or for a part of a torch.stack the tensor stacked there.

    The stack's own backward pass would give zeros to everything that the other parts depend on. None: the loss depends
    on nothing.
    """
    node = loss.grad_fn
    name = type(node).__name__
    if name not in _PARTS or loss._backward_hooks:
        return Root(loss)
    whole: Any = node.next_functions[0][0]  # type: ignore[union-attr]
    if type(whole).__name__ != "StackBackward0":
        return Root(loss)
    num_dims = loss.dim() + 1
    if _signed(whole._saved_dim) % num_dims != _signed(node._saved_dim) % num_dims:  # type: ignore[union-attr]
        return Root(loss)
    place = loss.output_nr if name == "UnbindBackward0" else _signed(node._saved_index)  # type: ignore[union-attr]
    place %= len(whole.next_functions)
    return None if whole.next_functions[place][0] is None else Root(loss, place)


def _signed(number: int) -> int:
    """Return a number that autograd saved; it hands back negative numbers as unsigned ones of 64 bits."""
    return number if number < 2**63 else number - 2**64


def functions_behind(losses: list[Tensor]) -> set[str]:
    """Return the names of the functions in Python that the losses depend on, and of those written wholly in C++."""
    if C is not None:
        return C.functions_behind(losses)  # type: ignore[no-any-return]
    graph = Graph.of([Root(loss) for loss in losses])
    return {type(f).__name__ for f in graph.functions.values()} | {"CppFunction"} & set(graph.names)


class Reach(NamedTuple):
    """Masks: bit r is set if a path from root r leads there without passing a stop."""

    leaves: dict[int, int]
    """By the id of each leaf that a root depends on."""
    stops: list[int]
    nodes: list[int]


class Graph(NamedTuple):
    """Autograd's graph behind some roots. Nodes have numbers, above those of the nodes that they depend on."""

    roots: list[Edge]
    names: list[str]
    """Of the nodes' types."""
    edges: list[tuple[Edge, ...]]
    """Of each node's inputs."""
    leaves: dict[int, Tensor]
    functions: dict[int, Any]
    """The nodes that are functions in Python."""

    @classmethod
    def of(cls, roots: Sequence[Root]) -> Graph:
        """Read the graph, in C++ if possible: nodes that Python has held are freed by deep recursion in torch 2.13."""
        return cls(*C.read_graph(roots)) if C is not None else _walk(roots)

    def behind(self, node: int) -> set[int]:
        """Return the nodes that a node leads to."""
        found: set[int] = set()
        left = [node]
        while left:
            following = {source for source, _ in self.edges[left.pop()] if source >= 0} - found
            found |= following
            left += following
        return found

    def reach(self, roots: Sequence[Edge], stops: Sequence[Edge] = ()) -> Reach:
        """Go from the roots to the leaves, and not beyond the stops."""
        masks = [0] * len(self.names)
        stop_masks = dict.fromkeys(stops, 0)
        passing: dict[int, dict[int, int]] = {n: defaultdict(int) for n in self.functions if self.names[n] in _PASSING}

        def depends(edge: Edge, mask: int) -> None:
            node, output = edge
            if edge in stop_masks:
                stop_masks[edge] |= mask
            elif node >= 0:
                masks[node] |= mask
                if node in passing:
                    passing[node][output] |= mask

        for r, root in enumerate(roots):
            depends(root, 1 << r)
        for node in reversed(range(len(masks))):
            if node in passing:
                for edge, place in zip(self.edges[node], self._places(node), strict=True):
                    depends(edge, masks[node] if place is None else passing[node][place])
            elif masks[node]:
                for edge in self.edges[node]:
                    depends(edge, masks[node])
        leaves = {id(leaf): masks[node] for node, leaf in self.leaves.items() if masks[node]}
        return Reach(leaves, [stop_masks[stop] for stop in stops], masks)

    def _places(self, node: int) -> list[int | None]:
        """Return for each input of a function of ``_PASSING`` which output it is; None for an input without a graph."""
        # Outputs that are no tensors count, too. DistributedDataParallel's function takes the module first.
        skipped = self.names[node] == "_DDPSinkBackward"
        needed = self.functions[node].needs_input_grad
        with_graph = (place - skipped for place, needs_grad in enumerate(needed) if needs_grad)
        return [None if behind < 0 else next(with_graph) for behind, _ in self.edges[node]]

    def may_hide(self, node: int) -> bool:
        """Whether it is a function in Python, other than torch's own, whose backward may call another pass."""
        function = self.functions.get(node)
        return function is not None and not type(function)._forward_cls.__module__.startswith("torch.")

    def is_reentrant(self, node: int) -> bool:
        """Whether a function in Python asks whether it may run, as re-entrant checkpoints do in their backward.

        The answer is no in passes to named inputs.
        """
        backward = inspect.unwrap(type(self.functions[node])._forward_cls.backward)
        return "_is_checkpoint_valid" in getattr(getattr(backward, "__code__", None), "co_names", ())

    def edges_behind_functions(
        self, parameters: Sequence[Tensor], reached: Reach | None = None, stops: Sequence[Edge] = ()
    ) -> dict[int, GradientEdge]:
        """Return an edge out of each reached function that a pass to these parameters and stops would not run.

        The edges are keyed by the node that each leads to; without ``reached``, all functions count. A pass that names
        these edges, too, runs those functions. Their backward may call another pass, which leaves gradients of
        parameters that are not in the graph in ``.grad``, as that of reversible layers does.
        """
        known, ends = {id(p) for p in parameters}, set(stops)
        leads = [False] * (len(self.names) + 1)  # one more, for edges to -1, without a graph behind
        for node, leaf in self.leaves.items():
            leads[node] = id(leaf) in known
        found = {}
        for node, edges in enumerate(self.edges):
            for edge in edges:
                if leads[edge[0]] or edge in ends:
                    leads[node] = True
                    break
            else:
                behind = [place for place, edge in enumerate(edges) if edge[0] >= 0]
                if behind and self.may_hide(node) and (reached is None or reached.nodes[node]):
                    found[edges[behind[0]][0]] = GradientEdge(*self.functions[node].next_functions[behind[0]])
                    leads[node] = True
        return found


def _walk(roots: Sequence[Root]) -> Graph:
    """Read the graph without the extension."""
    numbers: dict[Any, int] = {}

    def number(edge: Any) -> Edge:
        return -1 if edge[0] is None else numbers[edge[0]], edge[1]

    starts = [root.edge() for root in roots]
    graph = Graph([], [], [], {}, {})
    stack = [(start.node, False) for start in reversed(starts)]
    while stack:
        node, done = stack.pop()
        if node in numbers:
            continue
        if not done:
            stack.append((node, True))
            stack.extend((edge[0], False) for edge in reversed(node.next_functions) if edge[0] is not None)
            continue
        if type(node).__name__ == "AccumulateGrad":
            graph.leaves[len(numbers)] = node.variable  # type: ignore[attr-defined]
        elif isinstance(node, BackwardCFunction):
            graph.functions[len(numbers)] = node
        graph.names.append(type(node).__name__)
        graph.edges.append(tuple(map(number, node.next_functions)))
        numbers[node] = len(numbers)
    graph.roots.extend((numbers[start.node], start.output_nr) for start in starts)
    return graph
