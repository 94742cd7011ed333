# SPDX-License-Identifier: MIT
"""Gradient surgery as a drop-in wrapper of any torch optimizer: stages 1 to 5."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from . import methods
from ._gradients import TaskGradients, is_dense, parse
from .backends import Backend, choose
from .collect import Collected, Losses, collect
from .combine import combine_of
from .diagnostics import SurgeryInfo
from .gram import gram_of

_GRANULARITIES = ("global", "per_group", "per_tensor")
_HOOKS = [
    f"_optimizer_{call}_{when}_hooks" for call in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
]


class SurgeryOptimizer(torch.optim.Optimizer):
    """Wraps a torch optimizer; ``backward(losses)`` takes the place of ``sum(losses).backward()``.

    Parameter groups, state and defaults are those of the wrapped optimizer, so schedulers, gradient scalers and
    checkpoints work as without it. ``state_dict`` adds the method's state under "surgery"; a plain optimizer's
    checkpoint loads as well.

    What ``backward`` does with a parameter depends on which losses reach it:

    * none: ``.grad`` is left as it was;
    * one (a head): its plain gradient is added to ``.grad``, times the task's weight only for methods that weight
      losses;
    * two or more: it is shared, and the direction d = sum_t w_t g_t is added to ``.grad``; an absent task counts as
      a zero gradient there. Only shared parameters enter G.

    Args:
        optimizer: the optimizer to wrap.
        method: a name of ``methods.available()``, or a ``Method``.
        shared: the shared parameters. All other parameters then get the plain sum of their gradients. Default: those
            that two or more losses reach, found anew at each backward.
        granularity: "global" (one G for all shared parameters), "per_group" (one per parameter group) or "per_tensor".
        process_group: None; surgery runs on one process.
        backend: a name of :func:`gradsurgery.backends`; None chooses.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        method: str | methods.Method = "pcgrad",
        *,
        shared: Iterable[Tensor] | None = None,
        granularity: str = "global",
        process_group: None = None,
        backend: str | None = None,
    ) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if granularity not in _GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(_GRANULARITIES)}, got {granularity!r}")
        if process_group is not None:
            raise ValueError("process_group must be None: surgery runs on one process")
        self.optimizer = optimizer
        self.method = methods.resolve(method, {})
        if self.method.weights_losses and granularity != "global":
            raise ValueError(
                f"method {self.method.name!r} weights losses, which needs granularity 'global', got {granularity!r}"
            )
        self.granularity = granularity
        self.backend = backend
        self._shared = None if shared is None else list(shared)
        self._check_known(self._shared, "shared")
        self._check_known(self.method.gram_parameters, "norm_parameters")
        self._pending: Collected | None = None
        # Optimizer.__init__ would build groups and state of its own; its unpickling path sets up the hooks alone.
        super().__setstate__({})
        for name in _HOOKS:
            # The wrapped optimizer steps, reads and writes the state, so it also runs these hooks.
            setattr(self, name, getattr(optimizer, name))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    def backward(
        self, losses: Losses, *, scaler: torch.amp.GradScaler | None = None, retain_graph: bool = False
    ) -> SurgeryInfo:
        """Run one backward pass per loss, operate on the task gradients, and add the result to ``.grad``.

        Args:
            losses: one scalar per task: a sequence, a 1-D tensor, or a dict from name to scalar.
            scaler: a gradient scaler. The losses are given unscaled; ``.grad`` comes out scaled, for
                ``scaler.unscale_`` and ``scaler.step``; the method sees unscaled values.
            retain_graph: keep the graph after the last task.

        Raises:
            ValueError, TypeError: a loss or a gradient is not what it must be; nothing has changed then.
        """
        before = self._pending
        self.collect(losses, scaler=scaler, retain_graph=retain_graph)
        try:
            return self.combine()
        except BaseException:
            self._pending = before
            raise

    def collect(
        self, losses: Losses, *, scaler: torch.amp.GradScaler | None = None, retain_graph: bool = False
    ) -> None:
        """Add one micro-batch's task gradients to those collected so far; ``combine`` then operates on the sums.

        Surgery on accumulated gradients differs from accumulating the results of surgery on each micro-batch, which
        is what several ``backward`` calls do. ``scaler.update()`` belongs after the step,
        not between micro-batches. Arguments and errors are those of :meth:`backward`.
        """
        parameters = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        collected = collect(losses, parameters, scaler=scaler, retain_graph=retain_graph)
        self._pending = collected if self._pending is None else self._pending.plus(collected)

    @torch.no_grad()
    def combine(self) -> SurgeryInfo:
        """Operate on what was collected, add the result to ``.grad``, and forget what was collected."""
        if self._pending is None:
            raise ValueError("there is nothing to combine: call collect(losses) first")
        collected = self._pending
        shared, plain = self._split(collected)
        sparse = [p for p in plain if any(_is_sparse(row[p]) for row in collected.grads)]
        read = shared + [p for p in plain if p not in sparse]
        grads = parse([[row[p] for p in read] for row in collected.grads], None)
        if not read:  # no gradient says where G lives
            grads = replace(grads, device=collected.losses.device)
        parameters = [collected.parameters[p] for p in read]
        accumulate = any(p.grad is not None for p in parameters)
        out = [_target(p, accumulate) for p in parameters]
        backend = choose(self.backend, grads.device, grads.num_tasks)

        gram, weights, segments = self._weigh(collected, shared, grads, backend)
        plain_weights = weights[0] if self.method.weights_losses else torch.ones_like(weights[0])
        if len(read) > len(shared):
            segments = segments + [len(weights)] * (len(read) - len(shared))
            weights_of_segments = torch.cat([weights, plain_weights[None]])
        else:
            weights_of_segments = weights
        grads = replace(grads, segments=segments, num_segments=len(weights_of_segments), segmented=True)
        combine_of(grads, weights_of_segments, out, accumulate, backend)
        for parameter, direction in zip(parameters, out, strict=True):
            parameter.grad = direction
        for p in sparse:
            _add_sparse(collected.parameters[p], [row[p] for row in collected.grads], plain_weights)
        self._pending = None
        if self.granularity == "global":
            gram, weights = gram[0], weights[0]
        return SurgeryInfo(collected.tasks, gram, weights)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    # What Optimizer.__init__ would wrap around it, the wrapped optimizer's own step has.
    step.hooked = True  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad``, and forget what was collected."""
        self._pending = None
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state, and the method's under "surgery"."""
        return {**self.optimizer.state_dict(), "surgery": self.method.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Without "surgery", as in a plain optimizer's checkpoint, the method keeps its state.
        """
        state = dict(state_dict)
        surgery = state.pop("surgery", None)
        before = self.method.state_dict()
        try:
            if surgery is not None:
                self.method.load_state_dict(surgery)
            self.optimizer.load_state_dict(state)
        except BaseException:
            self.method.load_state_dict(before)
            raise

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler leaves a bound step behind, which belongs to this object alone.
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def __repr__(self) -> str:
        return f"{type(self).__name__}(method={self.method.name}, granularity={self.granularity}, {self.optimizer!r})"

    def _check_known(self, parameters: Iterable[Tensor] | None, name: str) -> None:
        known = {id(p) for group in self.param_groups for p in group["params"]}
        unknown = [p for p in parameters or () if id(p) not in known]
        if unknown:
            raise ValueError(f"{name} holds {len(unknown)} tensors that are not parameters of the wrapped optimizer")

    def _split(self, collected: Collected) -> tuple[list[int], list[int]]:
        """Return the indices of the shared parameters and of the other ones with a gradient."""
        touched = [sum(row[p] is not None for row in collected.grads) for p in range(len(collected.parameters))]
        if self._shared is None:
            enough = min(2, len(collected.tasks))
            shared = [p for p, count in enumerate(touched) if count >= enough]
        else:
            named = {id(p) for p in self._shared}
            shared = [p for p, count in enumerate(touched) if count and id(collected.parameters[p]) in named]
        chosen = set(shared)
        return shared, [p for p, count in enumerate(touched) if count and p not in chosen]

    def _segments(self, collected: Collected, shared: list[int]) -> list[int]:
        """Return the segment of each shared parameter."""
        if self.granularity == "per_tensor":
            return list(range(len(shared)))
        if self.granularity == "per_group":
            group_of = {id(p): g for g, group in enumerate(self.param_groups) for p in group["params"]}
            groups = [group_of[id(collected.parameters[p])] for p in shared]
            ids = {g: i for i, g in enumerate(sorted(set(groups)))}
            return [ids[g] for g in groups]
        return [0] * len(shared)

    def _weigh(
        self, collected: Collected, shared: list[int], grads: TaskGradients, backend: Backend
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Return G [S, T, T], unscaled, the weights [S, T], and the segment of each of the shared parameters.

        The shared parameters are the first ones of ``grads``.
        """
        assert grads.entries is not None
        segments = read_segments = self._segments(collected, shared)
        if self.method.gram_parameters is not None:
            # Segment 1 holds the parameters whose G the method reads; G is the sum of both segments.
            chosen = {id(p) for p in self.method.gram_parameters}
            read_segments = [int(id(collected.parameters[p]) in chosen) for p in shared]
            if not any(read_segments):
                raise ValueError("no two losses share any of norm_parameters")
        params = len(grads.entries) // grads.num_tasks
        gram = gram_of(
            replace(
                grads,
                entries=[
                    entry
                    for t in range(grads.num_tasks)
                    for entry in grads.entries[t * params : t * params + len(shared)]
                ],
                segments=read_segments,
                num_segments=max(read_segments, default=0) + 1,
                segmented=True,
            ),
            backend,
        )
        if collected.scale is not None:
            gram = gram / collected.scale.to(gram) ** 2
        read = gram
        if self.method.gram_parameters is not None:
            read, gram = gram[1:], gram.sum(0, keepdim=True)
        # A method of the user's own need not know of backends.
        named = {} if self.backend is None else {"backend": backend.name}
        if self.granularity == "global":
            weights = self.method.weights(read[0], losses=collected.losses, **named)[None]
        else:
            weights = self.method.weights(read, losses=collected.losses, **named)
        return gram, weights, segments


def _target(parameter: Tensor, accumulate: bool) -> Tensor:
    """Return the tensor that a parameter's direction is written into, or added to."""
    if parameter.grad is None:
        return torch.zeros_like(parameter) if accumulate else torch.empty_like(parameter)
    if _is_sparse(parameter.grad):
        raise TypeError(
            f".grad of a parameter of shape {tuple(parameter.shape)} is sparse, its new gradients are dense"
        )
    # An expanded .grad cannot be written in place.
    return parameter.grad if is_dense(parameter.grad) else parameter.grad.contiguous()


def _is_sparse(grad: Tensor | None) -> bool:
    return grad is not None and grad.layout is not torch.strided


def _add_sparse(parameter: Tensor, grads: list[Tensor | None], weights: Tensor) -> None:
    """Add the weighted sum of gradients, some sparse, which no kernel reads, to a parameter outside the surgery."""
    terms = [g * weight.to(g.dtype) for g, weight in zip(grads, weights.unbind(), strict=True) if g is not None]
    if parameter.grad is not None:
        terms.append(parameter.grad)
    # Dense ones first: a sparse tensor takes no dense one.
    first, *rest = sorted(terms, key=_is_sparse)
    parameter.grad = sum(rest, first)


class _NamedOptimizer(SurgeryOptimizer):
    """A ``SurgeryOptimizer`` with one method, whose options it takes beside its own."""

    method_class: ClassVar[type[methods.Method]]

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        shared: Iterable[Tensor] | None = None,
        granularity: str = "global",
        process_group: None = None,
        backend: str | None = None,
        **method_options: Any,
    ) -> None:
        super().__init__(
            optimizer,
            self.method_class(**method_options),
            shared=shared,
            granularity=granularity,
            process_group=process_group,
            backend=backend,
        )


class PCGrad(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.PCGrad`, whose options it takes by keyword."""

    method_class = methods.PCGrad
    pc_backward = SurgeryOptimizer.backward


class MGDA(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.MGDA`, whose options it takes by keyword."""

    method_class = methods.MGDA


class GradNorm(_NamedOptimizer):
    """``SurgeryOptimizer`` with :class:`gradsurgery.methods.GradNorm`, whose options it takes by keyword."""

    method_class = methods.GradNorm
