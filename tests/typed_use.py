# SPDX-License-Identifier: MIT
"""What a type checker says about users' code: `make lint` fails if an error that is expected here does not occur."""

import torch

import gradsurgery
from gradsurgery import MGDA, CAGrad, PCGrad, SurgeryOptimizer

parameter = torch.nn.Parameter(torch.ones(3))
adam = torch.optim.Adam([parameter])


def losses() -> dict[str, torch.Tensor]:
    return {"a": parameter.sum(), "b": parameter.square().sum()}


def one_step(optimizer: SurgeryOptimizer) -> gradsurgery.Losses:
    optimizer.zero_grad()
    info = optimizer.backward(losses())
    optimizer.backward(losses().values())
    optimizer.backward(torch.stack([*losses().values()]), mode="batched")
    optimizer.step()
    conflicts: torch.Tensor = info.conflicts
    print(conflicts)
    optimizer.bakward(losses())  # type: ignore[attr-defined]
    optimizer.backward(parameter.item())  # type: ignore[arg-type]
    return losses()


one_step(PCGrad(adam, "mean", 7, shared=[parameter], backend="reference"))
one_step(CAGrad(adam, c=0.4, granularity="per_group"))
PCGrad(adam, reducton="mean")  # type: ignore[call-arg]
PCGrad(adam, reduction=3)  # type: ignore[arg-type]
PCGrad([parameter], lr=0.1)  # type: ignore[arg-type, call-arg]
MGDA(adam, normalization="l2", shard=None)  # type: ignore[call-arg]

matrix: torch.Tensor = gradsurgery.aggregate(torch.ones(2, 3), "mgda")
each: list[torch.Tensor | None] = gradsurgery.aggregate([[parameter, None]], MGDA(adam).method)
