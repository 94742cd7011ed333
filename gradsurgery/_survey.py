# SPDX-License-Identifier: MIT
"""What autograd's graphs tell about the passes through them, and of losses that they do not keep apart."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor

from ._graph import PARTS, Graph, Root, functions_behind

_REENTRANT = "CheckpointFunctionBackward"
"""torch.utils.checkpoint's function with use_reentrant=True, and the like of other packages."""

_JOINING = ("CompiledFunctionBackward", "RegisterPostBackwardFunctionBackward", _REENTRANT)
"""torch.compile's functions, fully_shard's of a module's inputs, and checkpoints."""

_WIDE_PARTS = frozenset(PARTS).union(
    """
    GatherBackward0 IndexBackward0 IndexSelectBackward0 MaskedSelectBackward0 SliceBackward0 SplitBackward0
    SplitWithSizesBackward0
    """.split()
)
_WHOLES = frozenset(
    """
    CatBackward0 CopySlices IndexAddBackward0 IndexPutBackward0 MaskedScatterBackward0 ScatterAddBackward0
    ScatterBackward0 StackBackward0
    """.split()
)
_KEEPING = frozenset(
    """
    AbsBackward0 AddBackward0 AddcdivBackward0 AddcmulBackward0 AmaxBackward0 BinaryCrossEntropyBackward0
    BinaryCrossEntropyWithLogitsBackward0 ClampBackward0 ClampBackward1 ClampMaxBackward0 ClampMinBackward0
    CloneBackward0 DivBackward0 EluBackward0 ExpBackward0 ExpandBackward0 GeluBackward0 HuberLossBackward0
    KlDivBackward0 L1LossBackward0 LeakyReluBackward0 LerpBackward0 LerpBackward1 LinalgVectorNormBackward0
    Log1PBackward0 LogBackward0 LogSigmoidBackward0 LogSoftmaxBackward0 LogsumexpBackward0 MaskedFillBackward0
    MaxBackward0 MaximumBackward0 MeanBackward0 MeanBackward1 MinimumBackward0 MseLossBackward0 MulBackward0
    MultiMarginLossBackward0 NanToNumBackward0 NegBackward0 NllLoss2DBackward0 NllLossBackward0 NormBackward0
    NormBackward1 PermuteBackward0 PowBackward0 ReluBackward0 ReshapeAliasBackward0 RsubBackward1 SigmoidBackward0
    SiluBackward0 SmoothL1LossBackward0 SoftMarginLossBackward0 SoftmaxBackward0 SoftplusBackward0 SqrtBackward0
    SqueezeBackward0 SqueezeBackward1 StdBackward0 SubBackward0 SumBackward0 SumBackward1 TBackward0 TanhBackward0
    ToCopyBackward0 TransposeBackward0 UnfoldBackward0 UnsafeViewBackward0 UnsqueezeBackward0 VarBackward0
    ViewBackward0 WhereBackward0
    """.split()
)
"""Operators that keep losses apart. They are walked through, from a loss back to a stack that it is part of."""


@dataclass(slots=True)
class Survey:
    """What the graphs of the steps so far tell: how passes must run, and whether shared parameters can be inferred.

    A graph is looked through where it has functions in Python that none before had.
    """

    infers_shared: bool
    """Whether shared parameters are inferred. Steps with one pass per loss check that they can be, until one warns."""
    checked: bool = False
    """Whether that was checked of the graph that was looked through last."""
    functions: set[str] | None = None
    """The names of the functions in Python; None before the first graph."""
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

    def take(self, losses: list[Tensor], roots: list[Root], one_pass: bool) -> None:
        """Look at the graph of these, and warn where gradients will not tell which parameters a loss reaches."""
        functions = functions_behind(losses)
        is_new = self.functions is None or not self.functions.issuperset(functions)
        self.checked = self.checked and not is_new
        checks = self.infers_shared and not self.checked and not one_pass and len(roots) > 1
        if not is_new and not checks:
            return
        graph = Graph.behind(roots)
        self.functions = functions.union(self.functions or ())
        self.through_grad = self.through_grad or _REENTRANT in graph.names
        self.hiding = self.hiding or any(map(graph.may_hide, graph.functions))
        if checks:
            self.checked = True
            if joins(graph):
                self.infers_shared = False
                warnings.warn(
                    "losses depend on different outputs of one compiled function, checkpoint or sharded module, or are "
                    "computed from one stacked tensor, whose backward pass gives zeros to what a loss does not depend "
                    "on: heads in it count as shared. Name the shared parameters by shared=, or keep trunk and heads "
                    "apart there",
                    stacklevel=7,
                )


def joins(graph: Graph) -> bool:
    """Whether a function's backward pass gives zeros, not None, to what a loss does not depend on.

    That is so where two losses, the roots of the graph, depend on different outputs of one function in Python, or are
    parts of what became of a stack.
    """
    return _depend_on_outputs(graph) or _are_parts_of_stack(graph)


def _are_parts_of_stack(graph: Graph) -> bool:
    """Whether losses are parts of a tensor whose columns were stacked from tensors with leaves of their own."""
    if len(graph.roots) < 2:
        return False
    common = set.intersection(*(_behind_parts(graph, node) for node, _ in graph.roots))
    return any(_has_leaves_of_some_inputs(graph, node) for node in _wholes_before(graph, common))


def _has_leaves_of_some_inputs(graph: Graph, node: int) -> bool:
    """Whether there are leaves that one input of a function depends on, and another does not."""
    edges = [edge for edge in graph.edges[node] if edge[0] >= 0]
    return len(set(graph.reach(edges).leaves.values())) > 1


def _behind_parts(graph: Graph, start: int) -> set[int]:
    """Return what a loss is computed from by parts of it, back to the last operator that may mix columns."""
    found, seen = set(), set()
    stack = [(start, False)]
    while stack:
        node, behind = stack.pop()
        if node < 0 or (node, behind) in seen:
            continue
        seen.add((node, behind))
        if behind:
            found.add(node)
        takes_part = graph.names[node] in _WIDE_PARTS
        if takes_part or graph.names[node] in _KEEPING:
            stack += [(source, behind or takes_part) for source, _ in graph.edges[node]]
    return found


def _wholes_before(graph: Graph, nodes: set[int]) -> list[int]:
    """Return the first stacks on the ways from these through what mixes no columns."""
    found, stack, seen = [], list(nodes), set(nodes)
    while stack:
        node = stack.pop()
        if graph.names[node] in _WHOLES:
            found.append(node)
        elif graph.names[node] in _KEEPING:
            following = {source for source, _ in graph.edges[node] if source >= 0} - seen
            seen |= following
            stack += following
    return found


def _depend_on_outputs(graph: Graph) -> bool:
    """Whether losses depend on different outputs of one function in Python, and of different leaves by them."""
    joining = {node for node in graph.functions if graph.names[node] in _JOINING}
    watched = joining.union(filter(graph.may_hide, graph.functions))
    if not watched:
        return False
    entries: dict[int, set[frozenset[int]]] = defaultdict(set)
    for loss in graph.roots:
        outputs: dict[int, set[int]] = defaultdict(set)
        stack, seen = [loss], set()
        while stack:
            node, output = stack.pop()
            if node in watched:
                outputs[node].add(output)
            if node not in joining and node not in seen:
                seen.add(node)
                stack.extend(edge for edge in graph.edges[node] if edge[0] >= 0)
        for node, of_loss in outputs.items():
            entries[node].add(frozenset(of_loss))
    several = [node for node, found in entries.items() if len(found) > 1]
    return any(node in joining or _has_leaves_of_some_inputs(graph, node) for node in several)
