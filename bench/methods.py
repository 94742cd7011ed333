# SPDX-License-Identifier: MIT
"""Every Gram method beside TorchJD's: weights from one G, and whole aggregations.

Run ``python -m bench.methods`` from the repository's root. NOTES.md says how the measurements are taken.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor
from torchjd import aggregation

import gradsurgery as gs

from .cases import task_gradients
from .exact import direction_error, exact_gram
from .origin import provenance, write
from .tables import print_rows
from .targets import Target, judge, print_targets
from .timing import OURS, PCGRAD, Case, Clock

RESULTS = Path(__file__).parent / "results" / "cpu-methods.json"
METHODS = [name for name in gs.methods.available() if gs.methods.get(name).weights_from.startswith("G")]
TASKS = (2, 8, 32, 64)
SIZE = 10**7
TARGETS = [
    Target("upgrad weights", 32, None, 10, "torchjd", faster=True),
    Target("cagrad weights", 8, None, 100, "torchjd", faster=True),
    Target("nash_mtl weights", 8, None, 100, "torchjd", faster=True),
    *(Target(name, 8, SIZE, 1.15, PCGRAD) for name in METHODS if name != "pcgrad"),
]


def torchjd_weightings() -> dict[str, Callable[[Tensor], Tensor]]:
    """Return TorchJD's functions of G, by the names of our methods and with the same parameters."""
    return {
        "aligned_mtl": aggregation.AlignedMTLWeighting(),
        "cagrad": aggregation.CAGradWeighting(c=0.5),
        "cr_mogm": aggregation.CRMOGMWeighting(aggregation.MGDAWeighting()),
        "dualproj": aggregation.DualProjWeighting(),
        "fairgrad": aggregation.FairGradWeighting(1.0),
        "gradvac": aggregation.GradVacWeighting(beta=0.01),
        "imtl_g": aggregation.IMTLGWeighting(),
        "krum": aggregation.KrumWeighting(0),
        "mgda": aggregation.MGDAWeighting(),
        "modo": aggregation.MoDoWeighting(gamma=1e-3),
        "pcd": aggregation.PCDWeighting(),
        "pcgrad": aggregation.PCGradWeighting(),
        "sdmgrad": aggregation.SDMGradWeighting(lr=5.0),
        "upgrad": aggregation.UPGradWeighting(),
    }


def torchjd_of_rows(tasks: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what TorchJD computes from J only."""
    nash = aggregation.NashMTL(n_tasks=tasks)

    def nash_mtl(gradients: Tensor) -> Tensor:
        nash.reset()  # otherwise it would continue from the solution
        return nash(gradients)

    return {"config": aggregation.ConFIG(), "nash_mtl": nash_mtl}


def weights_case(name: str, tasks: int) -> Case:
    """Stage 3 alone, on one float64 G; for TorchJD's methods that take no G, on a factor [T, T] of it."""
    gram = exact_gram(task_gradients(tasks, 1000))
    method = gs.methods.get(name)
    calls: dict[str, Callable[[], Tensor]] = {OURS: lambda: method.weights(gram, backend="cpu")}
    theirs, of_rows = torchjd_weightings(), torchjd_of_rows(tasks)
    factor = torch.linalg.cholesky(gram)
    errors: dict[str, Callable[[Tensor], float]] = {}
    if not method.state_dict():  # with a state, a call depends on those before it
        exact = gs.methods.get(name).weights(gram, backend="reference")
        of_directions = partial(direction_error, factor, exact)
        errors = dict.fromkeys((OURS, "torchjd"), lambda weights: of_directions(weights.double() @ factor))
    if name in theirs and not (name == "krum" and tasks < 3):  # TorchJD refuses Krum of fewer tasks
        calls["torchjd"] = lambda: theirs[name](gram)
    elif name in of_rows:
        calls["torchjd"] = lambda: of_rows[name](factor)
        errors["torchjd"] = of_directions
    return Case(f"{name} weights", tasks, None, "float64", calls, errors)


def aggregate_case(name: str, gradients: Tensor) -> Case:
    """From J to the direction, beside our PCGrad and TorchJD."""
    out = torch.empty_like(gradients[0])
    method, pcgrad = gs.methods.get(name), gs.methods.get("pcgrad")
    theirs = torchjd_of_rows(len(gradients)).get(name)
    if name in torchjd_weightings():
        theirs = aggregation.GramianWeightedAggregator(torchjd_weightings()[name])
    calls: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: gs.aggregate(gradients, method, out=out, backend="cpu"),
        PCGRAD: lambda: gs.aggregate(gradients, pcgrad, out=out, backend="cpu"),
    }
    if theirs is not None:
        calls["torchjd"] = lambda: theirs(gradients)
    errors = {}
    if not method.state_dict():
        exact = gs.methods.get(name).weights(exact_gram(gradients), backend="reference")
        errors = dict.fromkeys((OURS, "torchjd"), partial(direction_error, gradients, exact))
    return Case(name, *gradients.shape, "float32", calls, errors)


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(prog="python -m bench.methods", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds")
    parser.add_argument("--output", type=Path, help=f"where the JSON goes; a whole run's: {RESULTS.name}")
    options = parser.parse_args()
    if not gs.backends()["cpu"].startswith("available"):
        parser.error(f"the cpu backend cannot be measured: {gs.backends()['cpu']}")
    # Warnings of the solvers that TorchJD calls.
    warnings.filterwarnings("ignore", module="cvxpy.*")
    warnings.filterwarnings("ignore", message="You are solving a parameterized problem")
    origin = provenance(torch.device("cpu"))
    console = Console(width=124)
    clock = Clock(0.02 if options.quick else 0.5)
    rows = []
    for case in _cases((2, 8) if options.quick else TASKS, 10**4 if options.quick else SIZE):
        print(f"{case.stage} T={case.tasks} N={case.size}", file=sys.stderr)
        rows += clock.measure(case)
    print_rows(console, rows, origin["machine"])
    verdicts = judge(rows, TARGETS)
    print_targets(verdicts)
    if output := options.output or (None if options.quick else RESULTS):
        write(output, f"python -m bench.methods{' --quick' if options.quick else ''}", origin, rows, verdicts)


def _cases(tasks: tuple[int, ...], size: int) -> Iterator[Case]:
    for count in tasks:
        for name in METHODS:
            yield weights_case(name, count)
    gradients = task_gradients(8, size)
    for name in METHODS:
        yield aggregate_case(name, gradients)


if __name__ == "__main__":
    main()
