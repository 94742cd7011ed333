# SPDX-License-Identifier: MIT
"""Micro-benchmarks of each stage, the cpu backend beside the reference backend, grouped by case."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

import gradsurgery as gs

PARAMETERS = 16
"""Tensors per task in the list form."""

pytestmark = [
    pytest.mark.benchmark(max_time=0.3),
    pytest.mark.parametrize("backend", ["cpu", "reference"]),
]
gradient_cases = pytest.mark.parametrize(("tasks", "size"), [(2, 10**6), (8, 10**5), (8, 10**6)])
forms = pytest.mark.parametrize("form", ["flat", "list"])
task_counts = pytest.mark.parametrize("tasks", [8, 64])


@pytest.fixture(autouse=True)
def _case(request: pytest.FixtureRequest, benchmark: BenchmarkFixture, backend: str) -> None:
    """Put the backends of one case side by side; skip where a backend cannot be used."""
    if not gs.backends()[backend].startswith("available"):
        pytest.skip(gs.backends()[backend])
    values = request.node.callspec.params
    case = " ".join(f"{name}={value}" for name, value in values.items() if name != "backend")
    benchmark.group = f"{request.node.originalname} {case}"


def gradients(form: str, tasks: int, size: int) -> tuple[Tensor | list[list[Tensor]], Tensor | list[Tensor]]:
    """Return mixed-sign task gradients and an output to write into."""
    matrix = torch.randn(tasks, size, generator=torch.Generator().manual_seed(0))
    if form == "flat":
        return matrix, torch.empty(size)
    rows = [list(torch.tensor_split(row.clone(), PARAMETERS)) for row in matrix]
    return rows, [torch.empty_like(gradient) for gradient in rows[0]]


def gram_of(tasks: int) -> Tensor:
    """Return the Gram matrix of ``tasks`` gradients, half of whose pairs conflict."""
    matrix = torch.randn(tasks, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return matrix @ matrix.T


@forms
@gradient_cases
def test_gram(benchmark: BenchmarkFixture, form: str, tasks: int, size: int, backend: str) -> None:
    """Stage 2."""
    grads, _ = gradients(form, tasks, size)
    benchmark(gs.gram, grads, backend=backend)


@forms
@gradient_cases
def test_combine(benchmark: BenchmarkFixture, form: str, tasks: int, size: int, backend: str) -> None:
    """Stage 4."""
    grads, out = gradients(form, tasks, size)
    benchmark(gs.combine, grads, torch.linspace(0.5, 1.5, tasks), out=out, backend=backend)


@forms
@gradient_cases
def test_aggregate(benchmark: BenchmarkFixture, form: str, tasks: int, size: int, backend: str) -> None:
    """Stages 2 to 4 with PCGrad."""
    grads, out = gradients(form, tasks, size)
    benchmark(gs.aggregate, grads, "pcgrad", out=out, backend=backend)


@task_counts
def test_pcgrad_weights(benchmark: BenchmarkFixture, tasks: int, backend: str) -> None:
    """Stage 3 of PCGrad, with the draw of the visiting orders."""
    benchmark(gs.pcgrad_weights, gram_of(tasks), backend=backend)


@pytest.mark.parametrize("solver", ["exact", "frank_wolfe"])
@task_counts
def test_min_norm_weights(benchmark: BenchmarkFixture, solver: str, tasks: int, backend: str) -> None:
    """Stage 3 of MGDA."""
    benchmark(gs.min_norm_weights, gram_of(tasks), solver=solver, backend=backend)


@task_counts
def test_gradnorm_update(benchmark: BenchmarkFixture, tasks: int, backend: str) -> None:
    """Stage 3 of GradNorm."""
    norms, losses, initial = torch.rand(3, tasks, generator=torch.Generator().manual_seed(0)) + 0.5
    benchmark(gs.gradnorm_update, torch.ones(tasks), norms, losses, initial, backend=backend)
