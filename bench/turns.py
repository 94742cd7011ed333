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
    """Remembers what contenders took, to foresee which ones take too long."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._seen: dict[Hashable, tuple[int, float]] = {}

    def add(self, key: Hashable, tasks: int, seconds: float) -> None:
        """Remember one call, of the newest number of tasks."""
        self._seen[key] = tasks, seconds

    def seconds(self, key: Hashable, tasks: int) -> float:
        """Return what a call should take, from fewer tasks: no contender grows faster than T squared. 0 if unknown."""
        fewer, seconds = self._seen.get(key, (tasks, 0.0))
        return seconds * (tasks / fewer) ** 2


def take_turns(
    samplers: Mapping[Name, Callable[[], Sample]],
    rounds: Mapping[Name, int],
    after_round: Callable[[], object] | None = None,
) -> dict[Name, list[Sample]]:
    """Call each sampler so many times; return what came. Garbage is collected by ``after_round`` at most."""
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
