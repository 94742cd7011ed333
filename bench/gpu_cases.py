# SPDX-License-Identifier: MIT
"""The inputs, the contenders and the float64 results of every case of gpu_stages.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

import gradsurgery as gs
from gradsurgery.methods._solver import SolverMethod

from .exact import direction_error, exact_gram, gram_error
from .gpu_timing import FLAT, OURS, TRITON, Call, Case, Spec
from .others import BMM, blockwise_products

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STAGES = ("gram", "combine", "chain")
COLUMNS = 128
"""N is a multiple of this, so that rows are aligned."""
TENSORS = 500
"""Tensors per task in the list form."""
TENSOR_ALIGNMENT = 512
"""The alignment in bytes of each tensor in the list form, like that of an allocation of its own."""
LIST_GAPS = 16 << 20
"""The most bytes that this alignment may waste."""
SOLVER_INPUTS = 16
"""Different Gram matrices that take turns."""
SOLVED = [name for name in gs.methods.available() if isinstance(gs.methods.get(name), SolverMethod)]
"""The methods whose weights come from one solver."""
BESIDE = (2, 8, 32, 128)
"""T of the matrices whose products PyTorch computes as well."""
MM = "torch.mm"
BLOCKS = 528
"""Blocks of columns, four for each multiprocessor of the largest GPU."""

Gradients = Tensor | list[list[Tensor]]
Out = Tensor | list[Tensor]


@dataclass
class Bench:
    """Where the cases run, and the random values that their gradients are views of, by dtype."""

    device: torch.device
    cache_bytes: int
    """The size of the level-2 cache; 0 if inputs need not exceed it."""
    values: dict[str, Tensor]

    @classmethod
    def create(
        cls, device: torch.device, cache_bytes: int, largest: int, dtypes: Mapping[str, torch.dtype] = DTYPES
    ) -> Bench:
        """Draw enough values of each dtype for every set of inputs of up to ``largest`` bytes."""
        size = 2 * max(cache_bytes, largest) + largest
        generator = torch.Generator(device).manual_seed(0)
        values = {
            name: torch.empty((size + LIST_GAPS) // dtype.itemsize, dtype=dtype, device=device)
            for name, dtype in dtypes.items()
        }
        for tensor in values.values():
            tensor.normal_(generator=generator)
        return cls(device, cache_bytes, values)

    @property
    def backend(self) -> str:
        """The backend under test."""
        return self.device.type

    def sets(self, spec: Spec) -> int:
        """Return how many sets of inputs take turns."""
        return 1 if spec.cache == "hot" else max(2, math.ceil(2 * self.cache_bytes / spec.bytes))

    def matrices(self, spec: Spec, misaligned: bool = False) -> list[Tensor]:
        """Return sets of gradients [T, N]; misaligned ones have rows that start at odd elements."""
        stride, offset = (spec.size + 2, 1) if misaligned else (spec.size, 0)
        span = round_up(spec.tasks * stride + offset, COLUMNS)
        values = self.values[spec.dtype]
        starts = range(offset, self.sets(spec) * span, span)
        return [torch.as_strided(values, (spec.tasks, spec.size), (stride, 1), start) for start in starts]

    def lists(self, spec: Spec) -> list[list[list[Tensor]]]:
        """Return sets of T lists of tensors, of unequal sizes and N elements together."""
        values = self.values[spec.dtype]
        sizes = tensor_sizes(spec.size)
        spans = [round_up(size, TENSOR_ALIGNMENT // values.itemsize) for size in sizes]
        # One call makes all views of a row: a call for each would take longer than the measurement.
        pieces = [part for size, span in zip(sizes, spans, strict=True) for part in (size, span - size)]
        shape = self.sets(spec), spec.tasks, sum(spans)
        rows = values[: math.prod(shape)].view(shape)
        return [[list(row.split(pieces)[::2]) for row in matrix] for matrix in rows]


def columns(nominal_bytes: float, tasks: int, dtype: str) -> int:
    """Return N such that J has at least this many bytes and its rows are aligned."""
    return round_up(math.ceil(nominal_bytes / (tasks * DTYPES[dtype].itemsize)), COLUMNS)


def round_up(value: int, multiple: int) -> int:
    """Return the least multiple that is not below ``value``."""
    return -(-value // multiple) * multiple


def tensor_sizes(size: int) -> list[int]:
    """Return TENSORS unequal sizes that sum to N, the largest a hundred times the smallest."""
    ends = list(accumulate(100 ** (p * 37 % TENSORS / TENSORS) for p in range(TENSORS)))
    edges = [0, *(round(size * end / ends[-1]) for end in ends)]
    return [end - begin for begin, end in pairwise(edges)]


def prepare(bench: Bench, spec: Spec) -> Case:
    """Return the contenders of a case."""
    if spec.form == "solve":
        return _solver_case(bench, spec)
    if spec.form == "list":
        lists = bench.lists(spec)
        calls = {OURS: ours(bench, spec, lists), FLAT: ours(bench, spec, bench.matrices(spec))}
        if bench.device.type == "cuda":
            calls[TRITON] = ours(bench, spec, lists, "triton")
        if spec.stage == "chain":
            calls["torch.cat + mm + mv"] = [_cat_products(spec, rows) for rows in lists]
        return _stage_case(bench, spec, calls, lists[0], _joined(lists[0]))
    matrices = bench.matrices(spec, spec.form == "misaligned")
    calls = {OURS: ours(bench, spec, matrices)}
    if bench.device.type == "cuda":
        calls[TRITON] = ours(bench, spec, matrices, "triton")
    if spec.form == "misaligned":
        calls[FLAT] = ours(bench, spec, bench.matrices(spec))
    elif spec.tasks in BESIDE and spec.cache == "cold":
        calls |= _products(spec, matrices)
    return _stage_case(bench, spec, calls, matrices[0], matrices[0])


def ours(bench: Bench, spec: Spec, sets: list[Gradients], backend: str | None = None) -> list[Call]:
    """Return this package's call for each set of gradients, on the backend under test unless another is named."""
    backend = backend or bench.backend
    if spec.stage == "gram":
        return [partial(gs.gram, grads, backend=backend) for grads in sets]
    if spec.stage == "combine":
        weights = _weights(spec, torch.float64, bench.device)
        return [partial(gs.combine, grads, weights, out=_out(grads), backend=backend) for grads in sets]
    # A method object keeps its step on the device; a name would copy one there in each call.
    method = gs.methods.PCGrad()
    return [partial(gs.aggregate, grads, method, out=_out(grads), backend=backend) for grads in sets]


def _products(spec: Spec, matrices: list[Tensor]) -> dict[str, list[Call]]:
    """Return PyTorch's calls: in the gradients' dtype, and without the work on T x T."""
    if spec.stage == "gram":
        columns = max(1, spec.size // BLOCKS)
        return {
            MM: [partial(torch.mm, matrix, matrix.T) for matrix in matrices],
            BMM: [partial(blockwise_products, matrix, columns) for matrix in matrices],
        }
    weights = _weights(spec, matrices[0].dtype, matrices[0].device)

    def combine(matrix: Tensor, out: Tensor) -> Tensor:
        return torch.mv(matrix.T, weights, out=out)

    def chain(matrix: Tensor, out: Tensor) -> Tensor:
        torch.mm(matrix, matrix.T)
        return combine(matrix, out)

    name, function = {"combine": ("torch.mv", combine), "chain": ("torch.mm + mv", chain)}[spec.stage]
    return {name: [partial(function, matrix, _out(matrix)) for matrix in matrices]}


def _cat_products(spec: Spec, rows: list[list[Tensor]]) -> Call:
    weights = _weights(spec, rows[0][0].dtype, rows[0][0].device)

    def call() -> Tensor:
        matrix = _joined(rows)
        torch.mm(matrix, matrix.T)
        return torch.mv(matrix.T, weights)

    return call


def _joined(rows: list[list[Tensor]]) -> Tensor:
    """Return the matrix [T, N] in one copy."""
    return torch.cat([gradient for row in rows for gradient in row]).view(len(rows), -1)


def _stage_case(bench: Bench, spec: Spec, calls: dict[str, list[Call]], first: Gradients, matrix: Tensor) -> Case:
    """Add floors and errors; ``matrix`` holds the first set of gradients."""
    exact = cache(partial(exact_gram, matrix))

    def error(contender: str) -> float:
        backend = {OURS: bench.backend, TRITON: "triton"}.get(contender)
        # A PCGrad object of its own, whose first step this is.
        call = calls[contender][0] if backend is None else ours(bench, spec, [first], backend)[0]
        if spec.stage == "gram":
            return gram_error(exact(), call())
        if backend is None:
            weights = _weights(spec, matrix.dtype, bench.device)
        elif spec.stage == "combine":
            weights = _weights(spec, torch.float64, bench.device)
        else:
            # The expected weights do not come from the backend under test.
            weights = gs.pcgrad_weights(exact().cpu(), seed=0, step=0).to(bench.device)
        return direction_error(matrix, weights, call())

    direction_bytes = spec.bytes // spec.tasks
    return Case(
        spec,
        calls,
        {contender: partial(error, contender) for contender in calls if contender != FLAT},
        read_bytes=0 if spec.stage == "combine" else spec.bytes,
        copy_bytes=0 if spec.stage == "gram" else spec.bytes + direction_bytes,
    )


def _solver_case(bench: Bench, spec: Spec) -> Case:
    """Stage 3 alone, on float64 Gram matrices [T, T], or [batch, T, T] at once."""
    function, options = gs.min_norm_weights, {}
    method = spec.stage.removesuffix(" weights")
    if method in SOLVED:
        function = gs.methods.get(method).weights
    elif spec.stage == "pcgrad_weights":
        # A step that is on the device already, as in a captured training loop.
        function, options = gs.pcgrad_weights, {"step": torch.zeros((), dtype=torch.int64, device=bench.device)}
    if spec.batch == 1:
        inputs = list(_random_grams(bench, spec.tasks, SOLVER_INPUTS))
    else:
        inputs = [_random_grams(bench, spec.tasks, spec.batch)]
    calls: list[Call] = [partial(function, gram, backend=bench.backend, **options) for gram in inputs]

    def error(calls: list[Call]) -> float:
        gram = inputs[0].cpu()
        exact = function(gram, backend="reference")
        off = calls[0]().cpu() - exact
        squares = [torch.einsum("...i,...ij,...j->...", v, gram, v) for v in (off, exact)]
        return (squares[0] / squares[1]).clamp(min=0).sqrt().max().item()

    contenders = {OURS: calls}
    if bench.device.type == "cuda" and method not in SOLVED:
        contenders[TRITON] = [partial(function, gram, backend="triton", **options) for gram in inputs]
    return Case(spec, contenders, {name: partial(error, calls) for name, calls in contenders.items()})


def _random_grams(bench: Bench, tasks: int, count: int) -> Tensor:
    """Return Gram matrices of gradients, half of whose pairs conflict, with norms up to 10 times apart."""
    random = {"generator": torch.Generator(bench.device).manual_seed(0), "device": bench.device, "dtype": torch.float64}
    gradients = torch.randn(count, tasks, 4 * tasks, **random)
    gradients += 0.5 * (-1.0) ** torch.arange(tasks, device=bench.device)[:, None]
    gradients *= 10 ** (torch.rand(count, tasks, 1, **random) - 0.5)
    return gradients @ gradients.mT


def _weights(spec: Spec, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return weights [T], none of which is 0: such a row would not be read."""
    return torch.linspace(0.5, 1.5, spec.tasks, dtype=dtype, device=device)


def _out(grads: Gradients) -> Out:
    """Return memory for one direction."""
    return torch.empty_like(grads[0]) if isinstance(grads, Tensor) else [torch.empty_like(g) for g in grads[0]]
