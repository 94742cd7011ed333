# SPDX-License-Identifier: MIT
"""Many problems, or problems of many tasks, have the same weights with any number of threads, and one by one."""

import pytest
import torch

import gradsurgery
from conftest import needs_extension, on_cpu
from inputs import normal

pytestmark = on_cpu


def weigh(name, gram, backend="cpu"):
    return gradsurgery.methods.get(name).weights(gram, backend=backend)


@pytest.fixture
def threads():
    """A function that sets the number of threads; the test's end restores it."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", ["mgda", "dualproj"])
def test_the_reference_with_several_threads(method, threads):
    rows = normal(160, 8 * 80).view(160, 8, 80).transpose(0, 1)
    found = []
    for count in (2, 1):
        threads(count)
        found.append(weigh(method, rows @ rows.mT, "reference"))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@needs_extension
@pytest.mark.parametrize("method", ["aligned_mtl", "fairgrad", "gradvac", "mgda", "pcgrad", "sdmgrad", "upgrad"])
def test_more_problems_than_have_a_workspace(method):
    rows = normal(3, 700 * 6).view(3, 700, 6).transpose(0, 1)
    grams = rows @ rows.mT
    grams[600, 0, 0] = torch.nan
    expected = torch.cat([weigh(method, few) for few in grams.split(100)])
    torch.testing.assert_close(weigh(method, grams), expected, rtol=0, atol=0, equal_nan=True)


@needs_extension
@pytest.mark.parametrize("problems", [1, 3, 20])
def test_upgrad_of_many_tasks(problems, threads):
    grams = torch.stack([gradsurgery.gram(normal(30, 20, seed=seed)) for seed in range(problems)])
    threads(1)
    expected = weigh("upgrad", grams)
    threads(2)
    assert torch.equal(weigh("upgrad", grams), expected)
    assert torch.equal(weigh("upgrad", grams[-1]), expected[-1])
