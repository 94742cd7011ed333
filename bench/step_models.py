# SPDX-License-Identifier: MIT
"""The multi-task models whose training steps are timed, on random data of their usual shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiTaskModel(nn.Module):
    """A model that makes its own data, and computes one loss per task from it."""

    features: list[Tensor]
    """The shared representation of the last forward pass; empty where all parameters are shared."""

    def losses(self) -> list[Tensor]:
        """Run the forward pass."""
        raise NotImplementedError

    def trunk(self) -> list[nn.Parameter]:
        """Return the shared parameters."""
        raise NotImplementedError


class ReinforcementMLP(MultiTaskModel):
    """Many tasks on one small net, as in multi-task reinforcement learning: each task has a batch of its own."""

    def __init__(self, tasks: int, width: int = 400, batch: int = 128, observation: int = 39, action: int = 4) -> None:
        """Make three hidden layers, a head per task, and data."""
        super().__init__()
        sizes = [observation, width, width, width]
        self.body = nn.Sequential(
            *(m for i in range(3) for m in (nn.Linear(sizes[i], sizes[i + 1]), nn.ReLU(inplace=True)))
        )
        self.heads = nn.ModuleList([nn.Linear(width, action) for _ in range(tasks)])
        self.register_buffer("x", torch.randn(tasks, batch, observation))
        self.register_buffer("y", torch.randn(tasks, batch, action))

    def losses(self) -> list[Tensor]:
        """Mean squared error of each head on its own batch."""
        self.features = [self.body(x) for x in self.x.unbind()]
        outputs = [head(z) for head, z in zip(self.heads, self.features, strict=True)]
        return [F.mse_loss(out, y) for out, y in zip(outputs, self.y.unbind(), strict=True)]

    def trunk(self) -> list[nn.Parameter]:
        """Return the body's parameters."""
        return list(self.body.parameters())


class Block(nn.Module):
    """A basic residual block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Make two convolutions, and a third one where the shape changes."""
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outputs) for _ in range(2)])
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        h = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(h)) + self.skip(x)).relu()


class AttributeResNet(MultiTaskModel):
    """ResNet-18 with binary heads, as for CelebA's attributes."""

    def __init__(self, tasks: int, width: int, batch: int, side: int) -> None:
        """Make the net; 64 is the usual width."""
        super().__init__()
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks: list[nn.Module] = []
        for i in range(4):
            blocks += [Block(widths[i], widths[i + 1], 1 if i == 0 else 2), Block(widths[i + 1], widths[i + 1], 1)]
        stem = [nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        self.body = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.heads = nn.ModuleList([nn.Linear(8 * width, 1) for _ in range(tasks)])
        self.register_buffer("x", torch.randn(batch, 3, side, side))
        self.register_buffer("y", torch.randint(2, (tasks, batch, 1)).float())

    def losses(self) -> list[Tensor]:
        """Binary cross-entropy of each attribute."""
        z = self.body(self.x)
        self.features = [z]
        return [
            F.binary_cross_entropy_with_logits(head(z), y) for head, y in zip(self.heads, self.y.unbind(), strict=True)
        ]

    def trunk(self) -> list[nn.Parameter]:
        """Return the body's parameters."""
        return list(self.body.parameters())


class SceneNet(MultiTaskModel):
    """An encoder-decoder for segmentation, depth and normals, as for NYUv2."""

    def __init__(self, width: int, batch: int, height: int, breadth: int) -> None:
        """Make the net; 64 is the usual width."""
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]

        def layer(i: int, o: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

        down = [m for i in range(4) for m in (*layer(widths[i], widths[i + 1]), nn.MaxPool2d(2))]
        up = [
            m for i in range(4, 0, -1) for m in (nn.Upsample(scale_factor=2), *layer(widths[i], widths[max(1, i - 1)]))
        ]
        self.body = nn.Sequential(*down, *up)
        self.heads = nn.ModuleList(
            [nn.Sequential(*layer(width, width), nn.Conv2d(width, outputs, 1)) for outputs in (13, 1, 3)]
        )
        self.register_buffer("x", torch.randn(batch, 3, height, breadth))
        self.register_buffer("classes", torch.randint(13, (batch, height, breadth)))
        self.register_buffer("depth", torch.rand(batch, 1, height, breadth))
        self.register_buffer("normals", F.normalize(torch.randn(batch, 3, height, breadth), dim=1))

    def losses(self) -> list[Tensor]:
        """Cross-entropy, absolute error, and one minus the cosine."""
        z = self.body(self.x)
        self.features = [z]
        classes, depth, normals = (head(z) for head in self.heads)
        cosine = F.cosine_similarity(normals, self.normals, dim=1)
        return [F.cross_entropy(classes, self.classes), F.l1_loss(depth, self.depth), 1 - cosine.mean()]

    def trunk(self) -> list[nn.Parameter]:
        """Return the body's parameters."""
        return list(self.body.parameters())


class DomainTransformer(MultiTaskModel):
    """A causal transformer with a loss for each of several text domains; all parameters are shared."""

    def __init__(
        self, tasks: int, layers: int, width: int, heads: int, vocabulary: int, length: int, batch: int
    ) -> None:
        """Make the net; 12 layers, a width of 768 and 50,257 words make 124M parameters."""
        super().__init__()
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
                )
                for _ in range(layers)
            ]
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))
        self.register_buffer("tokens", torch.randint(vocabulary, (tasks, batch, length + 1)))

    def losses(self) -> list[Tensor]:
        """Cross-entropy of the next word in each domain."""
        self.features = []
        losses = []
        for tokens in self.tokens.unbind():
            h = self.words(tokens[:, :-1]) + self.places.weight
            for layer in self.layers:
                h = layer(h, src_mask=self.mask, is_causal=True)
            logits = self.norm(h) @ self.words.weight.T
            losses.append(F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
        return losses

    def trunk(self) -> list[nn.Parameter]:
        """Return all parameters."""
        return list(self.parameters())


@dataclass(frozen=True)
class Workload:
    """A model at full size, for a GPU, and at one that two CPU cores can train."""

    name: str
    full: Callable[[], MultiTaskModel]
    small: Callable[[], MultiTaskModel]


WORKLOADS = [
    Workload("rl", lambda: ReinforcementMLP(50), lambda: ReinforcementMLP(10)),
    Workload("resnet", lambda: AttributeResNet(40, 64, 64, 64), lambda: AttributeResNet(10, 16, 8, 32)),
    Workload("scene", lambda: SceneNet(64, 4, 288, 384), lambda: SceneNet(16, 2, 48, 64)),
    Workload(
        "transformer",
        lambda: DomainTransformer(4, 12, 768, 12, 50257, 512, 4),
        lambda: DomainTransformer(4, 2, 128, 4, 2000, 64, 2),
    ),
]
