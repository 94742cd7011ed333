# SPDX-License-Identifier: MIT
"""Features part the graph: passes from the losses end there, and passes to the parameters below begin there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor

from ._checks import describe
from ._graph import Edge, Graph, Reach


def check_features(features: Sequence[Tensor]) -> None:
    """Raise TypeError or ValueError unless these are tensors with graphs, whose passes can be parted."""
    wanted = "features must be a tensor with a graph, or a non-empty list of them"
    if not isinstance(features, Sequence):
        raise TypeError(f"{wanted}, got {describe(features)}")
    for feature in features:
        if not isinstance(feature, Tensor):
            raise TypeError(f"{wanted}, got {describe(feature)} in it")
    if not features or not all(feature.requires_grad for feature in features):
        raise ValueError(wanted)
    for f, feature in enumerate(features):
        if feature._backward_hooks or feature.retains_grad:
            raise ValueError(
                f"feature {f} has hooks or retains its gradient, which the passes above and below it would both "
                "trigger: in the model go on from feature.view_as(feature), and give that as the feature"
            )


def part(
    graph: Graph, starts: Sequence[Edge], stops: Sequence[Edge], parameters: Sequence[Tensor]
) -> tuple[Reach, Reach]:
    """Return what the features (the stops) depend on, and what lies between the losses and the features.

    Raises:
        ValueError: a feature depends on another one; no loss depends on a feature; a parameter is on both sides.
    """
    for f, stop in enumerate(stops):
        others = [*stops[:f], *stops[f + 1 :]]
        if others and any(graph.reach([stop], others).stops):
            raise ValueError(f"feature {f} depends on another one: name tensors that do not")
    below, above = graph.reach(stops), graph.reach(starts, stops)
    if not all(above.stops):
        raise ValueError(
            f"no loss depends on feature {above.stops.index(0)} (a model with hooks, one in DistributedDataParallel "
            "with unused parameters, or a compiled one returns copies: its other outputs do not depend on them)"
        )
    refuse_both(p for p, owner in enumerate(parameters) if id(owner) in above.leaves and id(owner) in below.leaves)
    return below, above


def refuse_both(places: Iterable[int]) -> None:
    """Raise ValueError if there are any parameters, given by their places, on both sides."""
    both = [*places]
    if both:
        raise ValueError(f"parameters {both} are used above and below the features, which must part the two")


def check_ends(graph: Graph, stops: Sequence[Edge], others: Iterable[int]) -> None:
    """Raise ValueError if a pass from the losses to the features and other nodes would run on through a feature.

    Torch's passes run every function that leads to a node where they end, by whichever of the node's outputs.
    """
    place_of = {node: f for f, (node, _) in enumerate(stops)}
    for f, (node, _) in enumerate(stops):
        beyond = graph.behind(node)
        for end in beyond & place_of.keys():
            raise ValueError(
                f"feature {place_of[end]} comes out of a function on which feature {f} depends by another output: in "
                "the model go on from feature.view_as(feature), and give that as the feature"
            )
        if beyond.intersection(others):
            raise ValueError(
                f"passes from the losses would run on through feature {f}, which depends on a function by whose other "
                "outputs losses depend on more parameters, such as that of a module's full backward hooks (give those "
                "outputs as features, too), or on the input of a function in Python (call that function with "
                "input.view_as(input))"
            )
