# SPDX-License-Identifier: MIT
"""Contenders take turns within one process, so that a drift of the machine hits all alike."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Sample = TypeVar("Sample")
Name = TypeVar("Name", bound=Hashable)


class Foresight:
    """Remembers contenders' times, to predict which ones would take too long."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seen: dict[Hashable, tuple[int, float]] = {}

    def add(self, key: Hashable, tasks: int, seconds: float) -> None:
        """Remember the time of one call; replaces that of an earlier number of tasks."""
        self._seen[key] = tasks, seconds

    def seconds(self, key: Hashable, tasks: int) -> float:
        """Predict a call's time from fewer tasks: no contender's grows faster than T squared. 0 if unknown."""
        fewer, seconds = self._seen.get(key, (tasks, 0.0))
        return seconds * (tasks / fewer) ** 2


def take_turns(
    samplers: Mapping[Name, Callable[[], Sample]],
    rounds: Mapping[Name, int],
    after_round: Callable[[], object] | None = None,
) -> dict[Name, list[Sample]]:
    """Call each sampler ``rounds`` times; return the samples. Garbage is collected only if ``after_round`` does it."""
    samples: dict[Name, list[Sample]] = {name: [] for name in samplers}
    total = max(rounds.values(), default=0)
    shuffle = random.Random(0).shuffle
    gc.disable()
    try:
        for i in range(total):
            # Spreads the rounds of a slow contender evenly over all rounds.
            turn = [name for name, count in rounds.items() if i * count % total < count]
            # A changing order lets nobody profit from what the one before left in the cache.
            shuffle(turn)
            for name in turn:
                samples[name].append(samplers[name]())
            if after_round is not None:
                after_round()
    finally:
        gc.enable()
    return samples
