# SPDX-License-Identifier: MIT
"""Agreement with the public implementations, where they are right."""

import random

import pytest
import torch

import gradsurgery
from conftest import on_cpu
from inputs import hostile, normal

torchjd = pytest.importorskip("torchjd.aggregation")
pytorch_optimizer = pytest.importorskip("pytorch_optimizer")

pytestmark = on_cpu


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("case", ["normal", "conflicting", "parallel", "zero row"])
def test_torchjd_pcgrad_with_the_same_orders(backend, tasks, case):
    rows = hostile(tasks)[case]
    torch.manual_seed(42)
    order = torch.stack([torch.randperm(tasks) for _ in range(tasks)])
    torch.manual_seed(42)
    expected = torchjd.PCGrad()(rows)
    weights = gradsurgery.pcgrad_weights(gradsurgery.gram(rows), order=order, backend=backend)
    torch.testing.assert_close(gradsurgery.combine(rows, weights), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 17])
@pytest.mark.parametrize("case", ["normal", "conflicting", "mixed scales", "more tasks than parameters"])
def test_torchjd_mgda_is_our_frank_wolfe(backend, tasks, case):
    rows = hostile(tasks)[case]
    gram = gradsurgery.gram(rows)
    theirs = torchjd.MGDAWeighting(epsilon=1e-3, max_iters=100)(gram)
    ours = gradsurgery.min_norm_weights(gram, solver="frank_wolfe", max_iter=100, tol=1e-3, backend=backend)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_our_exact_minimum_is_below_torchjds():
    gaps = []
    for seed in range(10):
        rows = normal(17, 30, seed=seed)
        gram = rows @ rows.T
        theirs, ours = torchjd.MGDAWeighting()(gram), gradsurgery.min_norm_weights(gram)
        gaps.append(float(theirs @ gram @ theirs / (ours @ gram @ ours)))
    assert min(gaps) >= 1 - 1e-12
    assert max(gaps) > 1.001  # theirs stops early


@pytest.mark.parametrize("seed", range(5))
def test_pytorch_optimizer_pcgrad_with_two_tasks(seed):
    # With two tasks neither its shuffle nor its visit of j = i can matter, and one parameter means no heads.
    results = []
    for wrap in (
        lambda o: pytorch_optimizer.PCGrad(o, reduction="sum"),
        lambda o: gradsurgery.PCGrad(o, reduction="sum"),
    ):
        random.seed(seed)
        torch.manual_seed(seed)
        weight = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
        targets = torch.randn(2, 50, dtype=torch.float64)
        optimizer = wrap(torch.optim.SGD([weight], lr=0.1))
        for _ in range(4):
            optimizer.zero_grad()
            optimizer.pc_backward([((targets[0] @ weight) - 1).square(), (targets[1] @ weight + weight.sum()).square()])
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[1], results[0])
