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
    _awaited = False
    """Whether the others wait, or will, in :meth:`differ`."""

    @contextmanager
    def telling(self, device: torch.device, *, awaited: bool) -> Iterator[None]:
        """Have the others raise an error, too, if one is raised in here before :meth:`differ`.

        Args:
            device: where this process's numbers are.
            awaited: whether they will come to that.
        """
        self._awaited = awaited and not self.alone
        try:
            yield
        except Exception:
            if self._awaited:
                with suppress(RuntimeError):  # of a group that is broken
                    self._compare([_FAILED], device)
            raise
        finally:
            self._awaited = False

    def differ(self, values: list[bytes | bytearray], device: torch.device) -> list[bool]:
        """Return for each value whether it differs between the processes.

        The host learns it, but does not wait for what the device computes.

        Raises:
            RuntimeError: another process raised an error, within :meth:`telling`.
        """
        self._awaited = False
        failed, *differ = self._compare([b"", *values], device)
        if failed:
            raise RuntimeError("another process raised an error in this step")
        return differ

    def check_same(self, tasks: list[str], device: torch.device) -> None:
        """Raise ValueError, on every process, unless all have losses of these tasks and the method's seed."""
        what = f"losses of {tasks}{self.with_seed}"
        if any(self.differ([what.encode()], device)):
            raise ValueError(others_than(what))

    @property
    def with_seed(self) -> str:
        """The method's seed in words; empty where it has none."""
        seed = getattr(self.method, "seed", None)
        return "" if seed is None else f" with seed {seed}"

    def _compare(self, values: list[bytes | bytearray], device: torch.device) -> list[bool]:
        # As many numbers for all: one that failed does not know what the others compare.
        filled = [*values, *[b""] * (_MAX_VALUES - len(values))]
        digests = [int.from_bytes(hashlib.blake2b(value, digest_size=7).digest(), "little") for value in filled]
        with aside(device):
            extremes = torch.tensor([digests, [-digest for digest in digests]], device=device)
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
