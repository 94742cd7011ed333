# SPDX-License-Identifier: MIT
"""What the processes of a step find out about each other before they exchange numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import distributed

from .methods import Method

_MAX_VALUES = 4
_FAILED = b"failed"


class Processes:
    """Processes that have to do the same in each step, or raise an error all of them."""

    method: Method
    groups: list[Any]
    """The groups of those that this one agrees with: the dimensions of a mesh."""
    alone: bool
    """Whether no other process waits for this one."""
    _device = torch.device("cpu")
    _tells = False
    _awaited = False
    """Whether the others wait, or will, in :meth:`differ`."""

    @contextmanager
    def exchange(self, device: torch.device, *, tells: bool) -> Iterator[None]:
        """Return a context for a part of a step that calls :meth:`differ`.

        Args:
            device: where numbers are that the processes exchange.
            tells: have the others, once they come to ``differ``, raise an error, too, if one is raised in here before.
        """
        self._device, self._tells = device, tells and not self.alone
        self._awaited = self._tells
        try:
            yield
        except Exception:
            if self._awaited:
                with suppress(RuntimeError):  # of a group that is broken
                    self._compare([_FAILED])
            raise
        finally:
            self._awaited = False

    def differ(self, values: list[bytes | bytearray]) -> list[bool]:
        """Return for each value whether it differs between the processes.

        The host learns it, but does not wait for what the device computes.

        Raises:
            RuntimeError: another process raised an error, in an exchange that tells.
        """
        self._awaited = False
        failed, *differ = self._compare([b"", *values])
        if failed:
            raise RuntimeError("another process raised an error in this step")
        return differ

    def check_same(self, tasks: list[str]) -> None:
        """Raise ValueError, on every process, unless all have losses of these tasks and the method's seed."""
        what = f"losses of {tasks}{self.with_seed}"
        if any(self.differ([what.encode()])):
            raise ValueError(others_than(what))

    def will_differ(self) -> None:
        """Take note that the processes come to ``differ`` once more."""
        self._awaited = self._tells

    @property
    def with_seed(self) -> str:
        """The method's seed in words; empty where it has none."""
        seed = getattr(self.method, "seed", None)
        return "" if seed is None else f" with seed {seed}"

    def _compare(self, values: list[bytes | bytearray]) -> list[bool]:
        # As many numbers for all: one that failed does not know what the others compare.
        filled = [*values, *[b""] * (_MAX_VALUES - len(values))]
        digests = [int.from_bytes(hashlib.blake2b(value, digest_size=7).digest(), "little") for value in filled]
        with aside(self._device):
            extremes = torch.tensor([digests, [-digest for digest in digests]], device=self._device)
            for group in self.groups:
                distributed.all_reduce(extremes, distributed.ReduceOp.MAX, group=group)
            largest, least = extremes.tolist()
        return [high != -low for high, low in zip(largest, least, strict=True)][: len(values)]


def others_than(what: str) -> str:
    """Return the message of an error that all processes raise; this one has ``what``."""
    process = distributed.get_rank()
    return f"every process must have the same tasks, parameters and seed, got others than {what} on process {process}"


def aside(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which nothing waits for the device's other work."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()
