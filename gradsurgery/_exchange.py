# SPDX-License-Identifier: MIT
"""Averages of task gradients over processes, as few messages: whole, or cut into one piece per process.

To average T gradients of N numbers sends 2 T N of them, as every process ends with all. Cut into pieces, of which each
process averages, multiplies and combines its own, the gradients send T N numbers, and the direction another N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, groupby
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, distributed

from ._gradients import gradient_dtype, is_dense

if TYPE_CHECKING:
    from .distributed import Replicas

_MESSAGE_BYTES = 64 << 20  # held twice while they are averaged; larger messages do not make a network faster
_PIECES_BYTES = 16 << 20  # the least for which fewer bytes make up for more messages
_ALIGNMENT = 64  # bytes: the kernels read aligned memory fastest

Rows = list[list[Tensor | None]]
Item = TypeVar("Item")


@dataclass(slots=True)
class _Bucket:
    """Parameters whose gradients travel together."""

    places: list[int]
    begins: list[int]
    """Where each parameter's gradient begins in a message."""
    size: int
    """The number of elements of a message, one piece after the other."""
    piece: Tensor
    """This process's piece of the message of each parameter's first gradient, where the direction is written."""


class Pieces:
    """This process's pieces of all task gradients, 1-D tensors, many of them empty, in place of the gradients.

    Pieces are cut from what is sent, several parameters after one another, so that all processes have equal shares.

    Args:
        parameters: the P parameters.
        rows: lists of P gradients of this process, which the pieces replace.
        reach: for each row and parameter, whether any process has a gradient.
        holders: for each task, by how many to divide the sum of its gradients; rows are in the tasks' order, repeated.
        processes: the processes.
    """

    hold_parts = True
    """Whether each process has only its part of the gradients."""

    def __init__(
        self, parameters: list[Tensor], rows: Rows, reach: list[bytearray], holders: list[int], processes: Replicas
    ) -> None:
        self.first: dict[int, Tensor] = {}
        """By parameter, the piece of its first gradient, in whose place the direction is written."""
        self._parameters, self._processes = parameters, processes
        self._buckets: list[_Bucket] = []
        for kind in _kinds(parameters, _counts(reach), apart=True):
            for places in _cut(kind, lambda p: _num_bytes(parameters[p])):
                self._scatter(places, rows, reach, holders)

    def _scatter(self, places: list[int], rows: Rows, reach: list[bytearray], holders: list[int]) -> None:
        """Average a bucket's gradients and keep the pieces, one gradient of each parameter at a time."""
        group = self._processes.group
        own, count = distributed.get_rank(group), distributed.get_world_size(group)
        flat, begins, views = _message([self._parameters[p] for p in places], count)
        length = len(flat) // count
        # Where this process's part of each parameter begins and ends within its piece.
        ends = (begin + self._parameters[p].numel() for begin, p in zip(begins, places, strict=True))
        bounds = [min(max(at - own * length, 0), length) for at in chain(*zip(begins, ends, strict=True))]
        sizes = [b - a for a, b in zip([0, *bounds], [*bounds, length], strict=True)]
        room = torch.empty_like(flat) if _backend(flat.device, group) == "gloo" else None
        tasks_of = ([t for t, there in enumerate(reach) if there[p]] for p in places)
        for turn, tasks in enumerate(zip(*tasks_of, strict=True)):
            entries = list(zip(tasks, places, strict=True))
            _fill(flat, views, rows, entries, holders)
            piece = _sum_piece(flat, room, group)
            parts = piece.split(sizes)[1::2]
            for (t, p), part in zip(entries, parts, strict=True):
                rows[t][p] = part
            if turn == 0:
                self._buckets.append(_Bucket(places, begins, len(flat), piece))
                self.first |= dict(zip(places, parts, strict=True))

    def counted(self, parameters: list[Tensor]) -> list[bool]:
        """Return whether this process's pieces of each count in G: all do."""
        return [True] * len(parameters)

    def total(self, gram: Tensor) -> Tensor:
        """Return G of whole gradients, computed in place from the G of the pieces."""
        distributed.all_reduce(gram, group=self._processes.group)
        return gram

    def gathered(self) -> Iterator[dict[int, Tensor]]:
        """Yield the directions of all processes by their parameters' places, as they share the memory of a message."""
        for bucket in self._buckets:
            flat = bucket.piece.new_empty(bucket.size)
            _gather_pieces(flat, bucket.piece, self._processes.group)
            places = zip(bucket.places, bucket.begins, strict=True)
            yield {p: _view(flat, begin, self._parameters[p]) for p, begin in places}


def are_worth_pieces(parameters: list[Tensor], reach: list[bytearray], device: torch.device, group: Any) -> bool:
    """Whether gradients are large enough to be cut into pieces, and the group can do it."""
    total = sum(count * _num_bytes(p) for count, p in zip(_counts(reach), parameters, strict=True))
    return total > _PIECES_BYTES and _backend(device, group) in ("gloo", "nccl", "xccl")


def average(parameters: list[Tensor], rows: Rows, reach: list[bytearray], holders: list[int], group: Any) -> None:
    """Replace gradients by their averages; arguments as for :class:`Pieces`."""
    for kind in _kinds(parameters, _counts(reach), apart=False):
        # All of a parameter's in turn, which frees memory that autograd returned in one piece for all of them.
        present = [(t, p) for p in kind for t, there in enumerate(reach) if there[p]]
        for entries in _cut(present, lambda entry: _num_bytes(parameters[entry[1]])):
            flat, _, views = _message([parameters[p] for _, p in entries], 1)
            _fill(flat, views, rows, entries, holders)
            distributed.all_reduce(flat, group=group)
            for (t, p), view in zip(entries, views, strict=True):
                rows[t][p] = view


def _counts(reach: list[bytearray]) -> list[int]:
    """Return how many gradients each parameter has."""
    return [sum(column) for column in zip(*reach, strict=True)]


def _kinds(parameters: list[Tensor], counts: list[int], *, apart: bool) -> Iterable[list[int]]:
    """Return the places of parameters that have gradients: a list for each dtype and device, if apart, and count."""
    kinds: dict[Any, list[int]] = {}
    for p, (parameter, count) in enumerate(zip(parameters, counts, strict=True)):
        if count:
            kinds.setdefault((gradient_dtype(parameter), parameter.device, apart and count), []).append(p)
    return kinds.values()


def _cut(items: list[Item], num_bytes: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Cut a list into lists of about a message's bytes."""
    ends = accumulate(map(num_bytes, items))
    for _, part in groupby(zip(items, ends, strict=True), lambda pair: pair[1] // _MESSAGE_BYTES):
        yield [item for item, _ in part]


def _message(parameters: list[Tensor], count: int) -> tuple[Tensor, list[int], list[Tensor]]:
    """Return memory for a gradient of each parameter, in ``count`` equal parts; where each begins; and views of them.

    It is uninitialised.
    """
    like = parameters[0]
    *begins, end = accumulate(map(_padded, parameters), initial=0)
    step = count * _ALIGNMENT // gradient_dtype(like).itemsize
    flat = torch.empty(-(-end // step) * step, dtype=gradient_dtype(like), device=like.device)
    return flat, begins, [_view(flat, begin, p) for begin, p in zip(begins, parameters, strict=True)]


def _fill(flat: Tensor, views: list[Tensor], rows: Rows, entries: list[tuple[int, int]], holders: list[int]) -> None:
    """Move gradients into a message, 0 for those that this process lacks, each divided by a number of processes."""
    grads = [rows[t][p] for t, p in entries]
    mine = [i for i, grad in enumerate(grads) if grad is not None]
    if len(mine) < len(grads):
        flat.zero_()
    if mine:
        torch._foreach_copy_([views[i] for i in mine], [grads[i] for i in mine])  # type: ignore[misc]
    for t, p in entries:
        rows[t][p] = None  # frees it before more memory is needed
    # Before the sum, as in DistributedDataParallel: sums of float16 would overflow.
    counts = [holders[t % len(holders)] for t, _ in entries]
    if len(set(counts)) == 1:
        flat.div_(counts[0])
    else:
        torch._foreach_div_(views, [float(count) for count in counts])


def _sum_piece(flat: Tensor, room: Tensor | None, group: Any) -> Tensor:
    """Return this process's piece of the sum of all messages; ``room``: for gloo, memory for a message."""
    count = distributed.get_world_size(group)
    if room is not None:  # gloo's reduce_scatter sends as much as its all_reduce
        distributed.all_to_all_single(room, flat, group=group)
        return room.view(count, -1).sum(0)
    piece = flat.new_empty(len(flat) // count)
    # Before torch 2.13 it has another name.
    reduce_scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
    reduce_scatter(piece, flat, group=group)
    return piece


def _gather_pieces(flat: Tensor, piece: Tensor, group: Any) -> None:
    """Write the pieces of all processes one after the other."""
    if _backend(flat.device, group) == "gloo":  # whose all_gather copies more
        distributed.all_to_all_single(flat, piece.repeat(distributed.get_world_size(group)), group=group)
        return
    all_gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    all_gather(flat, piece, group=group)


def _backend(device: torch.device, group: Any) -> str | None:
    """Return the name of the group's backend for tensors on this device."""
    backends = distributed.get_backend_config(group).split(",")
    return dict(item.split(":") for item in backends).get(device.type)


def _padded(parameter: Tensor) -> int:
    """Return the number of elements from a parameter's beginning to the next one's."""
    step = _ALIGNMENT // gradient_dtype(parameter).itemsize
    return -(-parameter.numel() // step) * step


def _num_bytes(parameter: Tensor) -> int:
    """Return the bytes that a gradient of the parameter takes in a message."""
    return _padded(parameter) * gradient_dtype(parameter).itemsize


def _view(flat: Tensor, begin: int, parameter: Tensor) -> Tensor:
    """Return the part of a message that is a parameter's gradient, in the parameter's own layout if it is dense."""
    part = flat[begin : begin + parameter.numel()]
    return part.as_strided(parameter.shape, parameter.stride()) if is_dense(parameter) else part.view(parameter.shape)
