# SPDX-License-Identifier: MIT
import os
from importlib.util import find_spec

import pytest
import torch

import gradsurgery
from gradsurgery.backends import choose
from inputs import DEVICE

# Tests that need one of these skip without it.
OPTIONAL = {"matplotlib", "mlxtend", "pytorch_optimizer", "rich", "torchjd"}


def serves(name: str) -> bool:
    try:
        return bool(choose(name, torch.device(DEVICE), 1))
    except RuntimeError:
        return False


AVAILABLE = [name for name, why in gradsurgery.backends().items() if why.startswith("available")]
USABLE = [name for name in AVAILABLE if serves(name)]

# A tester who asks for a compiled backend must not be given a green run without it, nor a run on the CPU that skips.
required = set(filter(None, os.environ.get("GRADSURGERY_REQUIRE", "").split(",")))
assert required <= set(AVAILABLE), f"backends {required - set(AVAILABLE)} are not usable: {gradsurgery.backends()}"
if "cpu" in required:
    absent = {name for name in OPTIONAL if find_spec(name) is None}
    assert not absent, f"packages {absent} are not installed"

on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="about the CPU, or about no device at all")
on_gpu = pytest.mark.skipif("cuda" not in AVAILABLE, reason=f"needs the cuda backend: {gradsurgery.backends()['cuda']}")


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this installation can use on the tests' device."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_default_device():
    """What users' programs have; under a default device a missing ``device=`` passes."""
    torch.set_default_device(None)
    yield
    torch.set_default_device(None if DEVICE == "cpu" else DEVICE)


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
