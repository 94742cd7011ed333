# SPDX-License-Identifier: MIT
import os

import pytest
import torch

import gradsurgery

USABLE = [name for name, why in gradsurgery.backends().items() if why.startswith("available")]

# A tester who asks for the compiled backend must not be given a green run without it.
if os.environ.get("GRADSURGERY_REQUIRE"):
    missing = set(os.environ["GRADSURGERY_REQUIRE"].split(",")) - set(USABLE)
    assert not missing, f"backends {missing} are not usable: {gradsurgery.backends()}"


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this installation can use."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def two_task_net(dtype: torch.dtype = torch.float32) -> torch.nn.ModuleDict:
    """A trunk and two heads; each loss reaches the trunk and its own head."""
    return torch.nn.ModuleDict(
        {
            "trunk": torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)),
            "a": torch.nn.Linear(8, 1),
            "b": torch.nn.Linear(8, 1),
        }
    ).to(dtype)


def two_losses(net: torch.nn.ModuleDict, x: torch.Tensor) -> list[torch.Tensor]:
    z = net["trunk"](x).tanh()
    return [(net["a"](z) - 1).square().mean(), 3 * (net["b"](z) + 1).square().mean()]
