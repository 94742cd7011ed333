# SPDX-License-Identifier: MIT
import gc
import os
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gradsurgery
from gradsurgery.backends import choose
from inputs import DEVICE

# Optional packages: a test that needs one of them is skipped where it is not installed.
OPTIONAL = {
    "accelerate",
    "conflictfree",
    "cvxpy",
    "ecos",
    "lightning",
    "matplotlib",
    "mlxtend",
    "pytorch_optimizer",
    "rich",
    "torchjd",
}


def serves(name: str) -> bool:
    try:
        return bool(choose(name, torch.device(DEVICE), 1))
    except RuntimeError:
        return False


AVAILABLE = [name for name, why in gradsurgery.backends().items() if why.startswith("available")]
USABLE = [name for name in AVAILABLE if serves(name)]

# GRADSURGERY_REQUIRE names backends that must be usable: without them the run must fail, not pass. With "cpu", no
# optional package may be missing either, so that no test is skipped for want of one.
required = set(filter(None, os.environ.get("GRADSURGERY_REQUIRE", "").split(",")))
assert required <= set(AVAILABLE), f"backends {required - set(AVAILABLE)} are not usable: {gradsurgery.backends()}"
if "cpu" in required:
    absent = {name for name in OPTIONAL if find_spec(name) is None}
    assert not absent, f"packages {absent} are not installed"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether to run more than CI has time for, as `make gpu-code` does.
WHOLE = "GRADSURGERY_TEST_WHOLE" in os.environ

needs_extension = pytest.mark.skipif("cpu" not in AVAILABLE, reason="needs the compiled extension")
on_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="about the CPU, or about no device at all")

if INTERPRETED and find_spec("triton") is not None:
    from triton import language
    from triton.runtime import interpreter

    # Replace the language once. The interpreter would do so at every call of every function, which takes nearly half of
    # its time.
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": language, "core": language.core}))
    interpreter._patch_lang = lambda function: SimpleNamespace(restore=lambda: None)


def needs_a_gpu() -> None:
    """Skip the calling test module if the cuda backend is not available."""
    if "cuda" not in AVAILABLE:
        pytest.skip(f"needs the cuda backend: {gradsurgery.backends()['cuda']}", allow_module_level=True)


# The test modules of solvers. Where solvers are slow (in Triton's interpreter, or the reference on a GPU), the values
# in INTERPRETED_METHODS stand for all values of a parameter.
SOLVERS = ("test_gram_methods", "test_cagrad", "test_pcd", "test_rounded_gram")
INTERPRETED_METHODS = {
    "case": "rank deficient",
    "tasks": 5,
    "alpha": 3.0,
    "c": 0.3,
    "mode": "median",
    "ridge": 1e-8,
    "scale": 1e6,
}
# Likewise the seeds of tests/test_rounded_gram.py; `make gpu-code` runs all of them.
INTERPRETED_SEEDS = (0, 5, 31, 51)


# Modules with tests of many seconds. They run first: a long test at the end would leave the other processes idle.
FIRST = (
    "test_triton_compile",
    "test_examples",
    "test_bench_gpu_peers",
    "test_bench_gpu",
    "test_install",
    "test_bench_step",
    "test_distributed",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that the Triton backend does not serve, and most of the slow ones; put ``FIRST`` first."""
    left_out = {item for item in items if hasattr(item, "callspec") and not worthwhile(item)}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.module.__name__ not in FIRST)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep the garbage collector from scanning the objects that stay until the end."""
    gc.freeze()


def worthwhile(item: Any) -> bool:
    parameters = item.callspec.params
    backend, module = parameters.get("backend"), item.module.__name__
    interpreted = INTERPRETED and (backend == "triton" or module == "test_triton")
    # On a GPU the reference's solvers run on the host, where their tests run anyway, or make hundreds of launches.
    solves = module in (*SOLVERS, "test_weights", "test_torchjd")
    slow = interpreted or (backend == "reference" and DEVICE != "cpu" and solves)
    marks = {mark.name: mark.args for mark in item.iter_markers()}
    if slow and ("not_interpreted" in marks or ("interpreted_whole" in marks and not WHOLE)):
        return False
    if module == "test_coordinate" and backend == "triton":
        # Triton has no kernel for these methods: it runs the reference's code.
        return item.originalname in ("test_golden_values", "test_lists_are_the_flat_form_cut")
    if module in (*SOLVERS, "test_gradvac") and backend == "reference" and parameters.get("tasks", 1) > 5:
        return False
    if module in SOLVERS and backend == "triton" and parameters.get("method") == "gradvac":
        return False  # Triton has no kernel for it: it runs the reference's code
    if module in SOLVERS and slow:
        if module == "test_rounded_gram" and not WHOLE and parameters.get("seed", 0) not in INTERPRETED_SEEDS:
            return False
        return all(parameters.get(name, value) == value for name, value in INTERPRETED_METHODS.items())
    tasks, columns = parameters.get("tasks", 1), parameters.get("columns", 1)
    if not slow:
        return backend != "triton" or tasks <= 128
    if parameters.get("case", "normal") not in ("normal", "mixed scales") and (tasks > 3 or (tasks < 3 and not WHOLE)):
        return False
    if module == "test_weights" and tasks > 17:
        return item.originalname == "test_task_order" and tasks <= 128
    (most,) = marks.get("interpreted", (128,))
    return tasks <= (most if interpreted else max(most, 2)) and tasks * columns <= 5_000


@pytest.fixture(params=USABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that this installation can use on the tests' device."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    # Not torch.manual_seed(): where there is no GPU, each call of it records a whole stack trace.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def no_default_device():
    """Set no default device, as in users' programs: a default device would hide a missing ``device=``."""
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


def grads_of(net):
    """Every parameter's .grad."""
    return [p.grad for p in net.parameters()]
