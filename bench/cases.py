# SPDX-License-Identifier: MIT
"""The inputs, the contenders and the float64 results of every case."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchjd.aggregation import MGDA, MGDAWeighting, PCGrad, PCGradWeighting

import gradsurgery as gs

from .exact import direction_error, exact_gram, gram_error
from .others import BMM, blockwise_products, conflict_projection
from .timing import ALLOCATING, FLOOR, MM, OURS, REFERENCE, Case


def task_gradients(tasks: int, size: int) -> Tensor:
    """Return J [T, N]: independent noise, norms up to 10 times apart, and conflicts.

    Every second task opposes a direction that the others share, which makes a cosine of -0.2 or 0.2.
    """
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn(tasks, size, generator=generator)
    signs = 0.5 * (-1.0) ** torch.arange(tasks)
    gradients.addr_(signs, torch.randn(size, generator=generator))
    return gradients.mul_(10 ** (torch.rand(tasks, 1, generator=generator) - 0.5))


def gram_case(gradients: Tensor) -> Case:
    """Stage 2 beside one read of J and beside PyTorch's matrix products."""
    error = partial(gram_error, exact_gram(gradients))
    return _case(
        "gram",
        gradients,
        {
            OURS: lambda: gs.gram(gradients, backend="cpu"),
            FLOOR: gradients.sum,
            MM: lambda: torch.mm(gradients, gradients.T),
            BMM: lambda: blockwise_products(gradients),
        },
        {OURS: error, MM: error, BMM: error},
    )


def combine_case(gradients: Tensor) -> Case:
    """Stage 4 beside one read of J."""
    weights = torch.linspace(0.5, 1.5, len(gradients))
    out = torch.empty_like(gradients[0])
    return _case(
        "combine",
        gradients,
        {OURS: lambda: gs.combine(gradients, weights, out=out, backend="cpu"), FLOOR: gradients.sum},
        {OURS: partial(direction_error, gradients, weights)},
    )


def pcgrad_case(gradients: Tensor) -> Case:
    """PCGrad from J to the direction. Others use random orders, so from three tasks on their results are not known."""
    rows = list(gradients.unbind())
    out = torch.empty_like(rows[0])
    aggregator = PCGrad()
    # A method given by name starts from its first step in each call. With two tasks there is only one order.
    weights = gs.pcgrad_weights(exact_gram(gradients), seed=0, step=0, backend="reference")
    foreseen = (OURS, ALLOCATING, REFERENCE, "torchjd", "pytorch_optimizer", "plain loop")[: 6 if len(rows) == 2 else 3]
    return _case(
        "pcgrad",
        gradients,
        {
            OURS: lambda: gs.aggregate(gradients, "pcgrad", out=out, backend="cpu"),
            ALLOCATING: lambda: gs.aggregate(gradients, "pcgrad", backend="cpu"),
            REFERENCE: lambda: gs.aggregate(gradients, "pcgrad", out=out, backend="reference"),
            "torchjd": lambda: aggregator(gradients),
            "pytorch_optimizer": conflict_projection(rows),
            "plain loop": lambda: plain_pcgrad(rows),
        },
        dict.fromkeys(foreseen, partial(direction_error, gradients, weights)),
    )


def mgda_case(gradients: Tensor) -> Case:
    """MGDA from J to the direction: ours solves for the weights to rounding, torchjd runs Frank-Wolfe."""
    out = torch.empty_like(gradients[0])
    aggregator = MGDA()
    weights = gs.min_norm_weights(exact_gram(gradients), backend="reference")
    return _case(
        "mgda",
        gradients,
        {
            OURS: lambda: gs.aggregate(gradients, "mgda", out=out, backend="cpu"),
            ALLOCATING: lambda: gs.aggregate(gradients, "mgda", backend="cpu"),
            REFERENCE: lambda: gs.aggregate(gradients, "mgda", out=out, backend="reference"),
            "torchjd": lambda: aggregator(gradients),
        },
        dict.fromkeys((OURS, ALLOCATING, REFERENCE, "torchjd"), partial(direction_error, gradients, weights)),
    )


def weights_cases(tasks: int) -> list[Case]:
    """Stage 3 alone, on one float64 Gram matrix."""
    gram = exact_gram(task_gradients(tasks, 1000))
    best = gs.min_norm_weights(gram, backend="reference")
    pcgrad, mgda = PCGradWeighting(), MGDAWeighting()

    def error(weights: Tensor) -> float:
        off = weights - best
        return ((off @ gram @ off) / (best @ gram @ best)).sqrt().item()

    projections = {OURS: lambda: gs.pcgrad_weights(gram, backend="cpu"), "torchjd": lambda: pcgrad(gram)}
    shortest = {OURS: lambda: gs.min_norm_weights(gram, backend="cpu"), "torchjd": lambda: mgda(gram)}
    return [
        Case("pcgrad_weights", tasks, None, "float64", projections),
        Case("min_norm_weights", tasks, None, "float64", shortest, dict.fromkeys(shortest, error)),
    ]


def overhead_case() -> Case:
    """The cost of a call itself: PCGrad on a matrix [2, 16], called as a user would."""
    gradients = task_gradients(2, 16)
    out = torch.empty(16)
    aggregator = PCGrad()
    return _case(
        "pcgrad",
        gradients,
        {OURS: lambda: gs.aggregate(gradients, out=out), "torchjd": lambda: aggregator(gradients)},
    )


def plain_pcgrad(rows: list[Tensor]) -> Tensor:
    """PCGrad as it is commonly written in PyTorch: each comparison waits for its result, each projection reads N."""
    projected = [row.clone() for row in rows]
    others = list(rows)
    for p in projected:
        random.shuffle(others)
        for g in others:
            product = torch.dot(p, g)
            if product < 0:
                p -= product / g.norm() ** 2 * g
    return torch.stack(projected).sum(0)


def _case(
    stage: str,
    gradients: Tensor,
    calls: dict[str, Callable[[], Tensor]],
    errors: dict[str, Callable[[Tensor], float]] | None = None,
) -> Case:
    return Case(stage, *gradients.shape, str(gradients.dtype).removeprefix("torch."), calls, errors or {})
