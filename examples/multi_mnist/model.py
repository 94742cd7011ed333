# SPDX-License-Identifier: MIT
"""A LeNet trunk with one head per digit."""

from torch import Tensor, nn


class MultiLeNet(nn.Module):
    """Two convolutions and a linear layer, shared; then two linear layers per task."""

    def __init__(self) -> None:
        super().__init__()
        self.last_shared = nn.Linear(20 * 6 * 6, 50)
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 10, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(10, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            self.last_shared,
            nn.ReLU(),
        )
        self.heads = nn.ModuleList(nn.Sequential(nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 10)) for _ in range(2))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images [B, 1, 36, 36] to the logits [B, 10] of the left and of the right digit."""
        features = self.trunk(images)
        left, right = self.heads
        return left(features), right(features)
