# SPDX-License-Identifier: MIT
"""The ways to make one multi-task training step, each cut into the same four parts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import gradsurgery as gs

from .step_models import MultiTaskModel

Part = Callable[[str], AbstractContextManager[None]]
"""Times what runs in it: "forward", "backward", "surgery" or "optimizer"."""
Step = Callable[[Part], None]
PARTS = ("forward", "backward", "surgery", "optimizer")
METHODS = ("pcgrad", "mgda")
"""Our methods; the names of our contenders begin with one of them."""
REPRESENTATION = "representation"
"""Surgery on the features' gradients. It happens amid the backward passes, and is timed as part of them."""
PLAIN = "sum of losses"
COMMON = "pytorch_optimizer PCGrad"
ONE_BY_ONE = "torchjd PCGrad, one by one"


def contenders(make: Callable[[], MultiTaskModel]) -> dict[str, Callable[[], Step]]:
    """Return what makes each contender's step, with a model and an optimizer of its own."""
    model = make()
    has_heads = len(model.trunk()) < len(list(model.parameters()))
    has_one_input = has_heads and len(model.losses()) > len(model.features)
    del model
    found: dict[str, Callable[[], Step]] = {PLAIN: lambda: _plain(make())}
    for method in METHODS:
        for name, arguments in _ways(has_heads).items():
            found[f"{method}, {name}"] = lambda method=method, a=arguments: _ours(make(), method, a)
        if has_one_input:
            found[f"{method}, {REPRESENTATION}"] = lambda method=method: _by_representation(make(), method)
    found[COMMON] = lambda: _common(make())
    for aggregator in ("PCGrad", "MGDA", "UPGrad"):
        found[f"torchjd {aggregator}"] = lambda aggregator=aggregator: _torchjd(make(), aggregator, None)
    found[ONE_BY_ONE] = lambda: _torchjd(make(), "PCGrad", 1)
    return found


def _ways(has_heads: bool) -> dict[str, dict[str, Any]]:
    ways: dict[str, dict[str, Any]] = {"sequential": {}, "batched": {"mode": "batched"}}
    if has_heads:
        ways["features, batched"] = {"mode": "batched", "features": True}
    return ways


def _optimizer(model: MultiTaskModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4)


def _plain(model: MultiTaskModel) -> Step:
    optimizer = _optimizer(model)

    def step(part: Part) -> None:
        with part("forward"):
            loss = torch.stack(model.losses()).sum()
        with part("backward"):
            loss.backward()
        with part("optimizer"):
            optimizer.step()

    return _leaving_nothing(model, optimizer, step)


def _leaving_nothing(model: MultiTaskModel, optimizer: torch.optim.Optimizer, step: Step) -> Step:
    """Return the step followed by an untimed end, which frees memory that would count as there before the next step."""

    def whole(part: Part) -> None:
        step(part)
        optimizer.zero_grad()
        model.features = []  # the features keep the graph

    return whole


def _ours(model: MultiTaskModel, method: str, arguments: dict[str, Any]) -> Step:
    optimizer = gs.SurgeryOptimizer(_optimizer(model), method)

    def step(part: Part) -> None:
        with part("forward"):
            losses = model.losses()
        way = {**arguments, "features": model.features} if "features" in arguments else arguments
        with part("backward"):
            optimizer.collect(losses, **way)
        with part("surgery"):
            optimizer.combine()
        with part("optimizer"):
            optimizer.step()

    return _leaving_nothing(model, optimizer, step)


def _by_representation(model: MultiTaskModel, method: str) -> Step:
    optimizer = gs.SurgeryOptimizer(_optimizer(model), method)

    def step(part: Part) -> None:
        with part("forward"):
            losses = model.losses()
        with part("backward"):
            optimizer.backward(losses, features=model.features, mode="representation")
        with part("optimizer"):
            optimizer.step()

    return _leaving_nothing(model, optimizer, step)


def _common(model: MultiTaskModel) -> Step:
    """The code of pc_backward, divided into the timed parts."""
    from pytorch_optimizer.optimizer import pcgrad

    optimizer = pcgrad.PCGrad(_optimizer(model))

    def step(part: Part) -> None:
        with part("forward"):
            losses = model.losses()
        with part("backward"):
            grads, shapes, has_grads = optimizer.pack_grad(losses)
        with part("surgery"):
            merged = pcgrad.un_flatten_grad(optimizer.project_conflicting(grads, has_grads), shapes[0])
            has_grad = pcgrad.un_flatten_grad(torch.stack(has_grads).sum(dim=0), shapes[0])
            optimizer.set_grad(merged, has_grad)
        with part("optimizer"):
            optimizer.step()

    return _leaving_nothing(model, optimizer, step)


def _torchjd(model: MultiTaskModel, name: str, chunk: int | None) -> Step:
    """torchjd's multi-task backward pass if the model has heads, else its plain one, with so many losses at a time."""
    from torchjd import aggregation
    from torchjd.autojac import backward, jac_to_grad, mtl_backward

    aggregator = getattr(aggregation, name)()
    optimizer = _optimizer(model)
    trunk: list[Tensor] = list(model.trunk())

    def step(part: Part) -> None:
        with part("forward"):
            losses = model.losses()
        with part("backward"):
            if model.features:
                mtl_backward(losses, features=model.features, parallel_chunk_size=chunk)
            else:
                backward(losses, inputs=trunk, parallel_chunk_size=chunk)
        with part("surgery"):
            jac_to_grad(trunk, aggregator)
        with part("optimizer"):
            optimizer.step()

    return _leaving_nothing(model, optimizer, step)
