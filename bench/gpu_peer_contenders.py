# SPDX-License-Identifier: MIT
"""The contenders of gpu_peers.py: ways from J [T, N] to the direction, each with the weights that are expected."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import gradsurgery as gs

from .gpu_cases import Bench
from .gpu_timing import OURS, TRITON, Call, Spec
from .others import TORCHJD, conflict_projection, jacobian_descent

METHODS = tuple(TORCHJD)
PRODUCTS = "stack + mm + mv"
"""PyTorch's products in the gradients' dtype, without weights of a method."""


@dataclass
class Contender:
    """One way, which yields a call per matrix."""

    name: str
    calls: Callable[[list[Tensor]], list[Call]]
    weights: Tensor | None
    """The exact weights of a first call, in float64; None if random orders make them unknown."""
    captured: bool
    """Whether it is measured as a CUDA graph too: not if it waits for the host, or draws orders there (a graph would
    repeat them).
    """


def contenders(bench: Bench, spec: Spec, matrices: list[Tensor], exact: Tensor) -> Iterator[Contender]:
    """Yield the contenders for a method; ``exact`` is the Gram matrix of the first matrix."""
    method = spec.stage
    # The expected weights do not come from a backend under test.
    weights = gs.methods.get(method).weights(exact.cpu(), backend="reference").to(bench.device)
    backends = {OURS: bench.backend} | ({TRITON: "triton"} if bench.device.type == "cuda" else {})
    for name, backend in backends.items():
        yield Contender(name, partial(_ours, method, backend), weights, captured=True)
    # The order of the projections does not matter to two tasks.
    theirs = weights if method != "pcgrad" or spec.tasks == 2 else None
    if method == "pcgrad":
        fixed = torch.linspace(0.5, 1.5, spec.tasks, dtype=torch.float64, device=bench.device).to(matrices[0].dtype)
        yield Contender(PRODUCTS, partial(_products, fixed), fixed.double(), captured=True)
        yield Contender("pytorch_optimizer", _projections, theirs, captured=False)
    yield Contender("torchjd", partial(_torchjd, method), theirs, captured=False)


def _ours(method: str, backend: str, matrices: list[Tensor]) -> list[Call]:
    # A method object keeps its state on the device; a name would start anew in each call.
    own = gs.methods.get(method)
    outs = [torch.empty_like(matrix[0]) for matrix in matrices]
    return [partial(gs.aggregate, m, own, out=out, backend=backend) for m, out in zip(matrices, outs, strict=True)]


def _products(weights: Tensor, matrices: list[Tensor]) -> list[Call]:
    def call(rows: list[Tensor]) -> Tensor:
        matrix = torch.stack(rows)
        torch.mm(matrix, matrix.T)
        return torch.mv(matrix.T, weights)

    return [partial(call, list(matrix.unbind())) for matrix in matrices]


def _projections(matrices: list[Tensor]) -> list[Call]:
    return [conflict_projection(list(matrix.unbind())) for matrix in matrices]


def _torchjd(method: str, matrices: list[Tensor]) -> list[Call]:
    aggregator = jacobian_descent(method)
    return [partial(aggregator, matrix) for matrix in matrices]
