# SPDX-License-Identifier: MIT
"""ExcessMTL: more weight to tasks that are far from their optimum."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from .._checks import check_positive
from .._compiling import is_traced
from .._gradients import is_dense
from ..gram import gram
from ._buffered import BufferedMethod, Buffers, Given, Rows
from ._state import making_state


class _Block(NamedTuple):
    """Small parameters, whose sums lie side by side, or a large one, whose buffers are used as they are."""

    places: list[int]
    counted: bool
    roots: Tensor | None
    """sqrt(S) [T, columns] of small ones; the method's buffers are views of it. None for a large one."""


class ExcessMTL(BufferedMethod):
    """Robust multi-task learning with excess risks (He et al., ICML 2024, equations 6, 7 and 9).

    The excess risk of a task is estimated as e_t = sum_n g_tn^2 / sqrt(S_tn), S the sum of the squared gradients of all
    steps so far; w_t <- w_t exp(eta e_t / e_t(0)), scaled to sum to T. e_t(0) is the estimate of the first step, which
    leaves the weights at 1.

    Conventions: S = 0 adds nothing to e (the authors add 1e-7 to S); if e_t(0) = 0, the first later e_t > 0 takes its
    place, and leaves w_t as it was. (TorchJD's weights sum to 1, and move at the first step, too.) They are loss
    weights: they also multiply the gradients of the heads. The step on w does not depend on the gradients' scale.
    Scale: sums to T. State: sqrt(S), in float32 at least, w and e(0). Memory: T N.

    Args:
        eta: > 0.
    """

    name = "excess_mtl"
    weights_losses = True
    scale = "sums to T"
    linear = True
    cost = "T"
    state_names = ("w", "first")

    _blocks: tuple[Buffers | None, Sequence[bool], Sequence[_Block]] = (None, (), ())
    """The buffers and ``counted`` that blocks were made for, and the blocks."""

    def __init__(self, eta: float = 1e-2) -> None:
        self.eta = check_positive("eta", eta)

    def _initial(self, like: Tensor) -> dict[str, Tensor]:
        return {"w": torch.ones_like(like), "first": torch.zeros_like(like)}

    def _replace(self, given: Given) -> Rows:
        assert self._state is not None
        may_branch = given.finite.device.type == "cpu" and not is_traced()
        if may_branch and not given.finite:
            return given.rows
        excess = torch.zeros_like(self._state["w"])
        for tasks, roots, gradients, counted in self._pieces(given):
            size = gradients.to(roots.dtype)
            if given.scale is not None:
                size = size / given.scale.to(size.dtype)
            if not may_branch:
                size = torch.where(given.finite, size, 0)
            roots.hypot_(size)  # S itself might overflow
            if counted:
                part = size / roots.clamp(min=torch.finfo(roots.dtype).tiny)  # 0 / 0 is 0 here
                excess[tasks] += _products(part, size, given.backend)
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

    def _pieces(self, given: Given) -> Iterator[tuple[slice, Tensor, Tensor, bool]]:
        """Yield some tasks' roots and gradients of some parameters, [tasks, ...], and whether these count in e."""
        assert self._buffers is not None
        for places, counted, roots in self._blocks_of(given):
            if roots is None:
                for t, row in enumerate(given.rows):
                    gradient = row[places[0]]
                    if gradient is not None:
                        for root, part in _in_pieces(self._buffers[t][places[0]], gradient):
                            yield slice(t, t + 1), root, part, counted
            else:
                zero = roots.new_zeros(())
                each: Any = [
                    zero.expand(self._buffers[0][p].shape) if row[p] is None else row[p]
                    for row in given.rows
                    for p in places
                ]
                yield slice(None), roots, _flatten_dense_tensors(each).view_as(roots), counted

    def _begin(self, rows: Rows) -> None:
        if self._blocks[0] is not self._buffers:
            self._blocks = ExcessMTL._blocks  # before more memory is taken

    def _blocks_of(self, given: Given) -> Sequence[_Block]:
        """Return the blocks, and make them where the buffers are new."""
        assert self._buffers is not None
        if self._blocks[0] is not self._buffers or self._blocks[1] != given.counted:
            self._blocks = ExcessMTL._blocks
            with making_state(self.name, given.finite.device):
                self._blocks = (self._buffers, given.counted, _in_blocks(self._buffers, given.counted))
        return self._blocks[2]

    def __getstate__(self) -> dict[str, Any]:
        # Each view would be written with its whole block, and no longer share it when it is read.
        own = self.state_dict()
        buffers = own.pop("buffers")
        state = None if buffers is None else own
        return {**vars(self), "_buffers": buffers, "_state": state, "_blocks": ExcessMTL._blocks}

    def _weigh(self, given: Given, gram: Tensor) -> Tensor:
        assert self._state is not None
        return self._state["w"]


def _piece_bytes(device: torch.device) -> int:
    """Return about how much of S to work on at a time: on a CPU, what stays in cache."""
    return (2 if device.type == "cpu" else 64) << 20


def _products(these: Tensor, those: Tensor, backend: str | None) -> Tensor:
    """Return the inner products of rows [tasks, ...], float64; unlike a sum's, their bits do not depend on threads."""
    pairs = [list(these.unbind()), list(those.unbind())]
    return gram(pairs, segments=range(len(these)), backend=backend)[:, 0, 1]


def _in_pieces(root: Tensor, gradient: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """Cut both into pieces [1, columns]; where their layouts differ, return them whole, [1, ...]."""
    if not is_dense(root) or root.stride() != gradient.stride():
        return [(root[None], gradient[None])]
    size, most = root.numel(), _piece_bytes(root.device) // root.itemsize
    flat = (each.as_strided((1, size), (size, 1)).split(most, 1) for each in (root, gradient))
    return zip(*flat, strict=True)


def _in_blocks(buffers: Buffers, counted: Sequence[bool]) -> list[_Block]:
    """Return the blocks; lay the buffers of small parameters side by side, and replace them by views."""
    of_first, most = buffers[0], _piece_bytes(buffers[0][0].device)
    blocks = []
    small: dict[Any, list[int]] = {}
    end = 0
    for p, (root, here) in enumerate(zip(of_first, counted, strict=True)):
        size = len(buffers) * root.nbytes
        if size > most:
            blocks.append(_Block([p], here, None))
        elif size > 0:
            end += size
            small.setdefault((here, root.dtype, end // most), []).append(p)
    for (here, *_), places in small.items():
        shapes = [of_first[p].shape for p in places]
        roots = torch.cat([row[p].reshape(-1) for row in buffers for p in places]).view(len(buffers), -1)
        for row, flat in zip(buffers, roots, strict=True):
            parts = flat.split([shape.numel() for shape in shapes])
            for p, part, shape in zip(places, parts, shapes, strict=True):
                row[p] = part.view(shape)
        blocks.append(_Block(places, here, roots))
    return blocks
