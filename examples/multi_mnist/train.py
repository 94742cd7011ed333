# SPDX-License-Identifier: MIT
"""Train one model with one method, and record what the report needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import gradsurgery

from .model import MultiLeNet

LEARNING_RATE = 1e-3
BATCH = 64
TASKS = ["left", "right"]
BASELINE = "Plain sum"


def _adam(model: MultiLeNet) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)


OPTIMIZERS: dict[str, Callable[[MultiLeNet], torch.optim.Optimizer]] = {
    BASELINE: _adam,
    "PCGrad": lambda model: gradsurgery.PCGrad(_adam(model)),
    "MGDA": lambda model: gradsurgery.MGDA(_adam(model)),
    "GradNorm": lambda model: gradsurgery.GradNorm(_adam(model), norm_parameters=list(model.last_shared.parameters())),
}


def make_optimizer(method: str, model: MultiLeNet) -> torch.optim.Optimizer:
    """Return the optimizer of this name in ``OPTIMIZERS``, or else Adam with this method and its default options."""
    if method in OPTIMIZERS:
        return OPTIMIZERS[method](model)
    return gradsurgery.SurgeryOptimizer(_adam(model), method)


@dataclass
class Run:
    """One trained model.

    Attributes:
        losses: training loss of each task at each step, in nats.
        cosines: cosine between the tasks' gradients of the shared parameters at each step.
        seconds: per step, (forward and backward, surgery, forward to the end of the optimizer's step).
        accuracy: of the left and of the right digit on the test set after the last step, 0 to 1.
    """

    method: str
    seed: int
    losses: list[tuple[float, float]] = field(default_factory=list)
    cosines: list[float] = field(default_factory=list)
    seconds: list[tuple[float, float, float]] = field(default_factory=list)
    accuracy: tuple[float, float] = (0.0, 0.0)


def train_model(
    method: str,
    seed: int,
    epochs: int,
    train_set: TensorDataset,
    test_set: TensorDataset,
    tick: Callable[[], None],
) -> Run:
    """Train for ``epochs`` and test once, at the end; ``tick`` is called after each step.

    The seed sets the initial weights and the order of the batches, the same ones for every method.
    """
    run = Run(method, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Channels last is the faster layout for these convolutions on a CPU.
        model = MultiLeNet().to(memory_format=torch.channels_last)
    optimizer = make_optimizer(method, model)
    generator = torch.Generator().manual_seed(seed)
    images, labels = train_set.tensors
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(BATCH):
            _train_step(run, model, optimizer, images[batch], labels[batch])
            tick()
    images, labels = test_set.tensors
    with torch.no_grad():
        predictions = torch.cat([torch.stack(model(some), 1).argmax(2) for some in images.split(BATCH)])
    left, right = (predictions == labels).double().mean(0).tolist()
    run.accuracy = (left, right)
    return run


def _train_step(run: Run, model: MultiLeNet, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    plain = not isinstance(optimizer, gradsurgery.SurgeryOptimizer)
    coordinate = not plain and isinstance(optimizer.method, gradsurgery.methods.CoordinateMethod)
    without_gram = plain or coordinate or not optimizer.method.needs_gram
    if without_gram:
        run.cosines.append(_cosine(model, images, labels))
    optimizer.zero_grad()
    start = perf_counter()
    losses = _losses(model, images, labels)
    if plain:
        sum(losses).backward()
        after_backward = after_surgery = perf_counter()
    elif not optimizer.method.needs_gram:
        optimizer.backward(losses)
        after_backward = after_surgery = perf_counter()
    else:
        optimizer.collect(losses)
        after_backward = perf_counter()
        info = optimizer.combine()
        after_surgery = perf_counter()
    optimizer.step()
    end = perf_counter()
    run.seconds.append((after_backward - start, after_surgery - after_backward, end - start))
    run.losses.append((losses[0].item(), losses[1].item()))
    if not without_gram:
        run.cosines.append(info.cosines[0, 1].item())


def _losses(model: MultiLeNet, images: Tensor, labels: Tensor) -> list[Tensor]:
    return [nn.functional.cross_entropy(logits, labels[:, t]) for t, logits in enumerate(model(images))]


def _cosine(model: MultiLeNet, images: Tensor, labels: Tensor) -> float:
    """Return the cosine between the task gradients, without touching ``.grad``."""
    shared = list(model.trunk.parameters())
    grads = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in _losses(model, images, labels)]
    return gradsurgery.SurgeryInfo(TASKS, gradsurgery.gram(grads), torch.ones(2)).cosines[0, 1].item()
