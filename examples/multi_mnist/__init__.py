# SPDX-License-Identifier: MIT
"""Compare the sum of losses, PCGrad, MGDA and GradNorm, or other methods, on Multi-MNIST.

Run ``python -m examples.multi_mnist``. For other methods, add ``--methods`` and their names in the README's table.

Two MNIST digits lie on one canvas; the tasks are to name the left and the right one. Every method trains the
same network from the same initial weights on the same batches, with Adam at the same learning rate and the
method's default options, except that GradNorm takes its norms over the last shared layer, as its paper does.
Nothing is tuned: the test set is used once per model, after its last step. Needs the ``demo`` extra.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

import gradsurgery

from .data import multi_mnist
from .figure import save_figure
from .report import table, verdict
from .train import BASELINE, BATCH, OPTIMIZERS, Run, train_model


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train every method with every seed, print the table, write the figure, and return the runs."""
    parser = argparse.ArgumentParser(prog="python -m examples.multi_mnist", description="The Multi-MNIST demo.")
    parser.add_argument("--seeds", type=int, default=3, help="models per method (default: 3)")
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training pairs (default: 2)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[name for name in OPTIMIZERS if name != BASELINE],
        choices=[*OPTIMIZERS, *gradsurgery.methods.available()],
        metavar="NAME",
        help="methods beside the plain sum, by their names in the README (default: PCGrad MGDA GradNorm)",
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo/multi_mnist.png"), help="the figure's file")
    parser.add_argument("--quick", action="store_true", help="few pairs, only to see that everything runs")
    options = parser.parse_args(argv)
    if options.seeds < 2 or options.epochs < 1:
        parser.error("--seeds must be at least 2, to show a spread, and --epochs at least 1")

    console = Console()
    threads = torch.get_num_threads()
    # The order of sums depends on the number of threads; the results must not depend on the machine's cores.
    torch.set_num_threads(1)
    try:
        methods = list(dict.fromkeys([BASELINE, *options.methods]))
        runs = _train_all(methods, options.seeds, options.epochs, options.quick, console)
    finally:
        torch.set_num_threads(threads)
    console.print(table(runs))
    console.print(verdict(runs))
    save_figure(runs, options.output)
    console.print(f"Figure: {options.output}")
    return runs


def _train_all(methods: list[str], seeds: int, epochs: int, quick: bool, console: Console) -> list[Run]:
    """Train every method with every seed, behind a progress bar."""
    train_pairs, test_pairs = (3 * BATCH, 200) if quick else (150 * BATCH, 4000)
    train_set, test_set = multi_mnist(train_pairs, test_pairs)
    runs = []
    with Progress(console=console) as progress:
        steps = len(methods) * seeds * epochs * train_pairs // BATCH
        bar = progress.add_task("Training", total=steps)
        for seed in range(seeds):
            for method in methods:
                run = train_model(method, seed, epochs, train_set, test_set, lambda: progress.advance(bar))
                runs.append(run)
    return runs
