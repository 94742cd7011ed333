# SPDX-License-Identifier: MIT
"""ExcessMTL: more weight to tasks that are far from their optimum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from .._checks import check_positive
from ._buffered import BufferedMethod, Buffers, Given, Rows
from ._state import making_state

_UNIT = 2.0**-24
"""A factor on the terms of e, so that their sum in float32 does not overflow."""


class _Block(NamedTuple):
    """Parameters whose sums lie side by side."""

    places: list[int]
    counted: bool
    roots: Tensor
    """sqrt(S) [T, columns]; the method's buffers are views of it."""


class ExcessMTL(BufferedMethod):
    """Robust multi-task learning with excess risks (He et al., ICML 2024, equations 6, 7 and 9).

    The excess risk of a task is estimated as e_t = sum_n g_tn^2 / sqrt(S_tn), S the sum of the squared gradients of all
    steps so far; w_t <- w_t exp(eta e_t / e_t(0)), scaled to sum to T. e_t(0) is the estimate of the first step, which
    leaves the weights at 1.

    Conventions: S = 0 adds nothing to e (the authors add 1e-7 to S); if e_t(0) = 0, the first later e_t > 0 takes its
    place. They are loss weights: they also multiply the gradients of the heads. The step on w does not depend on the
    gradients' scale.
    Scale: sums to T. State: sqrt(S), in float32 at least, w and e(0). Memory: T N.

    Args:
        eta: > 0.
    """

    name = "excess_mtl"
    weights_losses = True
    scale = "sums to T"
    cost = "T"
    state_names = ("w", "first")

    _blocks: Sequence[_Block] = ()

    def __init__(self, eta: float = 1e-2) -> None:
        self.eta = check_positive("eta", eta)

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"w": torch.ones_like(like), "first": torch.zeros_like(like)}

    def _replace(self, given: Given) -> Rows:
        assert self._state is not None
        on_cpu = given.finite.device.type == "cpu"
        if on_cpu and not given.finite:
            return given.rows
        excess = torch.zeros_like(self._state["w"])
        for tasks, roots, gradients, counted in self._pieces(given):
            size = gradients.to(roots.dtype)
            if given.scale is not None:
                size = size / given.scale.to(size.dtype)
            if not on_cpu:
                size = torch.where(given.finite, size, 0)
            roots.hypot_(size)  # S itself might overflow
            if counted:
                divisor = roots.clamp(min=torch.finfo(roots.dtype).tiny)  # 0 / 0 is 0 here
                terms = torch.addcdiv(size.new_zeros(()), size, divisor, value=_UNIT).mul_(size)
                excess[tasks] += terms.sum(-1)
        excess = given.total(excess)
        started = self._state["first"] > 0
        first = torch.where(started, self._state["first"], excess)
        growth = torch.where(started, self.eta * excess / first, 0)
        # A weight that has become 0 may grow again.
        w = len(excess) * (self._state["w"].clamp(min=torch.finfo(torch.float64).tiny).log() + growth).softmax(0)
        self._keep(given.finite, w=w, first=first)
        return given.rows

    def _kept_in(self, dtype: torch.dtype) -> torch.dtype:
        # Sums of 16-bit squares would stop growing, or overflow.
        return torch.promote_types(dtype, torch.float32)

    def _pieces(self, given: Given) -> Iterator[tuple[int | slice, Tensor, Tensor, bool]]:
        """Yield tasks, columns of their roots and gradients, and whether these columns count in e."""
        assert self._buffers is not None
        for places, counted, roots in self._blocks_of(given):
            most = _most_bytes(roots.device) // roots.itemsize
            if len(places) > 1 or roots.numel() <= most:
                zero = roots.new_zeros(())
                each: Any = [
                    zero.expand(self._buffers[0][p].shape) if row[p] is None else row[p]
                    for row in given.rows
                    for p in places
                ]
                yield slice(None), roots, _flatten_dense_tensors(each).view_as(roots), counted
                continue
            for t, row in enumerate(given.rows):
                gradient = row[places[0]]
                if gradient is not None:
                    for part, piece in zip(roots[t].split(most), gradient.reshape(-1).split(most), strict=True):
                        yield t, part, piece, counted

    def _blocks_of(self, given: Given) -> Sequence[_Block]:
        """Return the blocks, and make them where the buffers are new."""
        assert self._buffers is not None
        first = self._buffers[0]
        if not self._blocks or any(
            b.counted != given.counted[b.places[0]] or b.roots.data_ptr() != first[b.places[0]].data_ptr()
            for b in self._blocks
        ):
            with making_state(self.name, given.finite.device):
                self._blocks = _in_blocks(self._buffers, given.counted)
        return self._blocks

    def _weigh(self, given: Given, gram: Tensor) -> Tensor:
        assert self._state is not None
        return self._state["w"]


def _most_bytes(device: torch.device) -> int:
    """Return how much of S to work on at a time: on a CPU, what stays in cache."""
    return (2 if device.type == "cpu" else 64) << 20


def _in_blocks(buffers: Buffers, counted: Sequence[bool]) -> list[_Block]:
    """Lay the buffers of small parameters side by side, and replace them by views."""
    first, most = buffers[0], _most_bytes(buffers[0][0].device)
    kinds: dict[Any, list[int]] = {}
    end = 0
    for p, (root, here) in enumerate(zip(first, counted, strict=True)):
        size = len(buffers) * root.nbytes
        end += size
        if size > 0:
            kinds.setdefault((here, root.dtype, end // most, p if size > most else None), []).append(p)
    blocks = []
    for (here, *_), places in kinds.items():
        shapes = [first[p].shape for p in places]
        roots = torch.cat([row[p].reshape(-1) for row in buffers for p in places]).view(len(buffers), -1)
        for row, flat in zip(buffers, roots, strict=True):
            parts = flat.split([shape.numel() for shape in shapes])
            for p, part, shape in zip(places, parts, shapes, strict=True):
                row[p] = part.view(shape)
        blocks.append(_Block(places, here, roots))
    return blocks
