# SPDX-License-Identifier: MIT
"""Which leaves a backward pass would reach, read off autograd's graph without running it."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ._extension import C

Root = Tensor | GradientEdge
"""What a backward pass begins at."""

_REENTRANT = "CheckpointFunctionBackward"
"""torch.utils.checkpoint's function with use_reentrant=True, and the like of other packages."""

_JOINING = ("CompiledFunctionBackward", "RegisterPostBackwardFunctionBackward", _REENTRANT)
"""torch.compile's functions, fully_shard's of a module's inputs, and checkpoints."""

_PASSING = ("_DDPSinkBackward", "BackwardHookFunctionBackward")
"""Functions whose outputs are their inputs, one by one: DistributedDataParallel's, and of hooks of whole modules."""

_PARTS = ("UnbindBackward0", "SelectBackward0")
_WIDE_PARTS = (
    *(*_PARTS, "SliceBackward0", "SplitBackward0", "SplitWithSizesBackward0", "IndexBackward0", "GatherBackward0"),
    *("IndexSelectBackward0", "MaskedSelectBackward0"),
)
_WHOLES = (
    *("StackBackward0", "CatBackward0", "CopySlices", "IndexPutBackward0", "IndexAddBackward0", "ScatterBackward0"),
    *("ScatterAddBackward0", "MaskedScatterBackward0"),
)
_KEEPING = (
    *("BinaryCrossEntropyBackward0", "BinaryCrossEntropyWithLogitsBackward0", "HuberLossBackward0", "PermuteBackward0"),
    *("SigmoidBackward0", "TBackward0", "TanhBackward0", "TransposeBackward0"),
    *("AbsBackward0", "AddBackward0", "ClampBackward0", "ClampBackward1", "ClampMinBackward0", "CloneBackward0"),
    *("DivBackward0", "ExpBackward0", "L1LossBackward0", "Log1PBackward0", "LogBackward0", "MeanBackward0"),
    *("MeanBackward1", "MseLossBackward0", "MulBackward0", "NanToNumBackward0", "NegBackward0", "PowBackward0"),
    *("ReluBackward0", "ReshapeAliasBackward0", "SmoothL1LossBackward0", "SoftplusBackward0"),
    *("SqrtBackward0", "SqueezeBackward0", "SqueezeBackward1", "SubBackward0", "SumBackward0"),
    *("SumBackward1", "ToCopyBackward0", "UnsqueezeBackward0", "ViewBackward0", "WhereBackward0"),
    *("AmaxBackward0", "EluBackward0", "ExpandBackward0", "GeluBackward0", "KlDivBackward0", "LeakyReluBackward0"),
    *("LinalgVectorNormBackward0", "LogSigmoidBackward0", "LogSoftmaxBackward0", "LogsumexpBackward0"),
    *("MaskedFillBackward0", "MaxBackward0", "MaximumBackward0", "MinimumBackward0", "MultiMarginLossBackward0"),
    *("NllLoss2DBackward0", "NllLossBackward0", "NormBackward0", "NormBackward1", "RsubBackward1", "SiluBackward0"),
    *("SoftmaxBackward0", "SoftMarginLossBackward0", "StdBackward0", "UnsafeViewBackward0", "VarBackward0"),
    *("AddcdivBackward0", "AddcmulBackward0", "ClampMaxBackward0", "LerpBackward0", "LerpBackward1", "UnfoldBackward0"),
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
        if self.functions is None or not self.functions.issuperset(functions):
            nodes = _postorder([_edge(root)[0] for root in roots], {}) if functions else []
            self.through_grad = self.through_grad or any(type(node).__name__ == _REENTRANT for node in nodes)
            self.hiding = self.hiding or any(map(_may_hide, nodes))
            self.functions = functions.union(self.functions or ())
            self.checked = False
        if self.infers_shared and not self.checked and not one_pass and len(roots) > 1:
            self.checked = True
            if joins(roots, in_python=bool(functions)):
                self.infers_shared = False
                warnings.warn(
                    "losses depend on different outputs of one compiled function, checkpoint or sharded module, or are "
                    "computed from one stacked tensor, whose backward pass gives zeros to what a loss does not depend "
                    "on: heads in it count as shared. Name the shared parameters by shared=, or keep trunk and heads "
                    "apart there",
                    stacklevel=7,
                )


def functions_behind(losses: list[Tensor]) -> set[str]:
    """Return the names of the functions in Python that the losses depend on."""
    if C is not None:
        return C.functions_behind(losses)  # type: ignore[no-any-return]
    nodes = _postorder([loss.grad_fn for loss in losses if loss.grad_fn is not None], {})
    return {type(node).__name__ for node in nodes if isinstance(node, BackwardCFunction)}


def reach(
    roots: Sequence[Root], stops: Sequence[Tensor] = (), names: set[str] | None = None
) -> tuple[dict[int, int], list[int]]:
    """Walk from the roots to the leaves, each node once, and not beyond the stops.

    Returns:
        For the id of each leaf a bit mask, bit r where root r depends on it on a path without a stop; and such a mask
        for each stop. The names of the functions on these paths join ``names``.
    """
    stop_at = {_edge(stop): s for s, stop in enumerate(stops)}
    stop_masks = [0] * len(stops)
    masks: defaultdict[Any, int] = defaultdict(int)
    of_output: defaultdict[tuple[Any, int], int] = defaultdict(int)

    def depends(edge: tuple[Any, int], mask: int) -> None:
        if edge in stop_at:
            stop_masks[stop_at[edge]] |= mask
        elif edge[0] is not None:
            masks[edge[0]] |= mask
            of_output[edge] |= mask

    for r, root in enumerate(roots):
        depends(_edge(root), 1 << r)
    leaves: dict[int, int] = {}
    for node in reversed(_postorder(list(masks), stop_at)):
        edges = node.next_functions
        if names is not None:
            names.add(type(node).__name__)
        places = _places(node) if type(node).__name__ in _PASSING else [None] * len(edges)
        for edge, place in zip(edges, places, strict=True):
            depends(edge, masks[node] if place is None else of_output[node, place])
        if type(node).__name__ == "AccumulateGrad":
            leaves[id(node.variable)] = masks[node]
    return leaves, stop_masks


def _places(node: Any) -> list[int | None]:
    """Return for each input of a function of ``_PASSING`` the output that it is; None for one without a graph."""
    # Outputs that are no tensors count, too. The first argument of DistributedDataParallel's function is the module.
    skipped = type(node).__name__ == "_DDPSinkBackward"
    with_graph = (place - skipped for place, needed in enumerate(node.needs_input_grad) if needed)
    return [None if edge[0] is None else next(with_graph) for edge in node.next_functions]


def joins(losses: Sequence[Root], *, in_python: bool = True) -> bool:
    """Whether a function's backward pass gives zeros, not None, to what a loss does not depend on.

    That is so where two losses depend on different outputs of one function in Python, if there are any, or are parts of
    what became of a stack.
    """
    return (in_python and _depend_on_outputs(losses)) or _are_parts_of_stack(losses)


def _are_parts_of_stack(losses: Sequence[Root]) -> bool:
    """Whether losses are parts of a tensor whose columns were stacked from tensors with leaves of their own."""
    if len(losses) < 2:
        return False
    common = set.intersection(*(_behind_parts(_edge(loss)[0]) for loss in losses))
    return any(map(_has_leaves_of_some_inputs, _before(list(common), _WHOLES)))


def _has_leaves_of_some_inputs(node: Any) -> bool:
    """Whether there are leaves that one input of a function depends on, and another does not."""
    edges = [GradientEdge(*edge) for edge in node.next_functions if edge[0] is not None]
    return len(set(reach(edges)[0].values())) > 1


def _behind_parts(start: Any) -> set[Any]:
    """Return what a loss is computed from by parts of it, back to the last operator that may mix columns."""
    found, seen = set(), set()
    stack = [(start, False)]
    while stack:
        node, behind = stack.pop()
        if node is None or (node, behind) in seen:
            continue
        seen.add((node, behind))
        if behind:
            found.add(node)
        takes_part = type(node).__name__ in _WIDE_PARTS
        if takes_part or type(node).__name__ in _KEEPING:
            stack += [(edge[0], behind or takes_part) for edge in node.next_functions]
    return found


def _before(nodes: list[Any], names: Sequence[str]) -> list[Any]:
    """Return the first nodes with one of the names on the ways from these through what mixes no columns."""
    found, stack, seen = [], list(nodes), set(nodes)
    while stack:
        node = stack.pop()
        if type(node).__name__ in names:
            found.append(node)
        elif type(node).__name__ in _KEEPING:
            following = {edge[0] for edge in node.next_functions if edge[0] is not None} - seen
            seen |= following
            stack += following
    return found


def _depend_on_outputs(losses: Sequence[Root]) -> bool:
    entries: dict[Any, set[frozenset[int]]] = defaultdict(set)
    for loss in losses:
        outputs: dict[Any, set[int]] = defaultdict(set)
        stack, seen = [_edge(loss)], set()
        while stack:
            node, output = stack.pop()
            joining = type(node).__name__ in _JOINING
            if joining or _may_hide(node):
                outputs[node].add(output)
            if not joining and node not in seen:
                seen.add(node)
                stack.extend(edge for edge in node.next_functions if edge[0] is not None)
        for node, of_loss in outputs.items():
            entries[node].add(frozenset(of_loss))
    several = [node for node, found in entries.items() if len(found) > 1]
    return any(type(node).__name__ in _JOINING or _has_leaves_of_some_inputs(node) for node in several)


def edges_behind_functions(
    roots: Sequence[Root], parameters: Sequence[Tensor], stops: Sequence[Tensor] = ()
) -> list[GradientEdge]:
    """Return an edge out of each function that a pass to these parameters and stops would not come to.

    A pass that names the edges, too, runs those functions. Their backward may call another pass, whose gradients of
    parameters that are not in the graph it leaves in ``.grad``, as those of reversible layers do.
    """
    known = {id(p) for p in parameters}
    stop_at = {_edge(stop): s for s, stop in enumerate(stops)}
    starts = [edge[0] for edge in map(_edge, roots) if edge not in stop_at]
    leading, found = set(), []
    for node in _postorder(starts, stop_at):
        edges = [edge for edge in node.next_functions if edge[0] is not None]
        if type(node).__name__ == "AccumulateGrad":
            leads = id(node.variable) in known
        else:
            leads = any(edge in stop_at or edge[0] in leading for edge in edges)
        if not leads and edges and _may_hide(node):
            found.append(GradientEdge(*edges[0]))
            leads = True
        if leads:
            leading.add(node)
    return found


def _may_hide(node: Any) -> bool:
    """Whether it is a function in Python, other than torch's own."""
    return isinstance(node, BackwardCFunction) and not type(node)._forward_cls.__module__.startswith("torch.")  # type: ignore[attr-defined]


def root_of(loss: Tensor) -> Root | None:
    """Return what a loss's backward pass begins at: the loss, or for a part of a torch.stack what was stacked.

    The stack's backward pass would give zeros to all that the other parts depend on. None: it depends on nothing.
    """
    node = loss.grad_fn
    name = type(node).__name__
    if name not in _PARTS or loss._backward_hooks:
        return loss
    whole: Any = node.next_functions[0][0]  # type: ignore[union-attr]
    if type(whole).__name__ != "StackBackward0":
        return loss
    num_dims = loss.dim() + 1
    if _signed(whole._saved_dim) % num_dims != _signed(node._saved_dim) % num_dims:  # type: ignore[union-attr]
        return loss
    place = loss.output_nr if name == "UnbindBackward0" else _signed(node._saved_index)  # type: ignore[union-attr]
    edge = whole.next_functions[place]
    return None if edge[0] is None else GradientEdge(*edge)


def _signed(number: int) -> int:
    """Return a number that autograd saved, whose negative ones come back as unsigned ones of 64 bits."""
    return number if number < 2**63 else number - 2**64


def _edge(root: Root) -> tuple[Any, int]:
    edge = get_gradient_edge(root) if isinstance(root, Tensor) else root
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
