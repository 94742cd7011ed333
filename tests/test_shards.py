# SPDX-License-Identifier: MIT
"""Which processes count their part of a parameter in G. test_distributed.py tests the results, on two processes."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, init_device_mesh
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from conftest import on_cpu
from gradsurgery import methods
from gradsurgery._shards import Shards

pytestmark = on_cpu


@pytest.fixture(scope="module")
def grid():
    """A mesh of four processes that send nothing; this process is the first of the second row."""
    distributed.init_process_group("fake", store=FakeStore(), rank=2, world_size=4)
    yield init_device_mesh("cpu", (2, 2), mesh_dim_names=("shards", "parts"))
    distributed.destroy_process_group()


def spread(mesh, *placements):
    return nn.Parameter(DTensor.from_local(torch.ones(2, 2), mesh, placements, run_check=False))


def test_one_of_several_copies_counts(grid):
    whole = nn.Parameter(torch.ones(3))
    counts = [
        (spread(grid, _StridedShard(0, split_factor=2), Shard(0)), True),
        (spread(grid, Shard(0), Replicate()), True),
        (spread(grid, Replicate(), Shard(1)), False),
        (spread(grid["shards"], Shard(0)), True),
        (spread(grid["parts"], Shard(0)), False),
        (spread(grid["parts"], Replicate()), False),
        (whole, False),
    ]
    parameters = [p for p, _ in counts]
    shards = Shards(parameters, distributed.new_subgroups(1)[0], methods.get("pcgrad"))
    assert shards.counted(parameters) == [count for _, count in counts]
    # If both rows of the mesh hold the same parts, nothing is summed over the rows, so each row counts its own.
    copies = [spread(grid, Replicate(), Shard(1)), spread(grid["parts"], Replicate())]
    assert Shards(copies, None, methods.get("pcgrad")).counted(copies) == [True, True]


def test_parts_along_both_dimensions_are_summed_over_all(grid, monkeypatch):
    summed = []
    monkeypatch.setattr(
        distributed, "all_reduce", lambda _, group: summed.append(distributed.get_process_group_ranks(group))
    )
    both = spread(grid, _StridedShard(0, split_factor=2), Shard(0))
    Shards([both], None, methods.get("pcgrad")).total(torch.ones(2, 2))
    assert summed == [[0, 2], [2, 3]]


def test_meshes_that_are_not_of_one_grid(grid):
    line = init_device_mesh("cpu", (4,))
    shards = Shards([spread(grid, Shard(0), Replicate())], None, methods.get("pcgrad"))
    with pytest.raises(TypeError, match="must be spread over the dimensions of one mesh, got processes"):
        shards.check([spread(line, Shard(0))])
    with pytest.raises(TypeError, match="must be sharded or replicated, got placements"):
        shards.check([spread(grid, Shard(0), Partial())])
    shards.check([spread(grid, Shard(0), Shard(1))])  # the failed checks have changed nothing
