# SPDX-License-Identifier: MIT
"""TorchJD: our methods as its weightings and aggregators, and its weightings as our methods."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast, get_args, get_origin

import torch
from torch import Tensor, nn

from ..backends import check_name
from ..combine import combine
from ..functional import check_gram
from ..gram import gram
from ..methods import CoordinateMethod, Method, resolve
from ..methods._base import weigh
from ..methods._buffered import BufferedMethod

try:
    from torchjd import Stateful, aggregation
    from torchjd.aggregation import Aggregator, CRMOGMWeighting, GramianWeightedAggregator, Weighting
    from torchjd.linalg import PSDMatrix
except ImportError as error:
    raise ImportError("gradsurgery.integrations.torchjd needs TorchJD 0.18 or later: pip install -U torchjd") from error

# TorchJD declares these as weightings of J, but they read only its number of rows, which G has, too.
_BY_COUNT = tuple(getattr(aggregation, f"{name}Weighting") for name in ("Constant", "Mean", "Random", "Sum"))
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


class SurgeryWeighting(Weighting[PSDMatrix], Stateful):
    """A method of ours as a TorchJD weighting: w = method(G), for Gramians [T, T].

    Use it with ``torchjd.autogram.Engine``, in ``GramianWeightedAggregator``, or under a modifier such as
    ``CRMOGMWeighting``. The weights [T] have G's dtype and device, are computed in float64, are constants to autograd,
    and are NaN where G is not finite. Each call is a step of the method; ``state_dict`` holds the method's state, and
    ``reset`` takes it back to what it was at construction.

    Args:
        method: a name of ``methods.available()``, or a ``Method``.
        backend: a name of :func:`gradsurgery.backends`; None chooses.
        method_options: the named method's own options.

    Raises:
        ValueError: the method needs losses, which TorchJD does not hand to a weighting, or the gradients themselves; G
            is not [T, T].
        TypeError: G is not a real floating-point tensor.
    """

    def __init__(
        self, method: str | Method = "pcgrad", /, *, backend: str | None = None, **method_options: Any
    ) -> None:
        super().__init__()
        self.method = resolve(method, method_options)
        if isinstance(self.method, (BufferedMethod, CoordinateMethod)):
            raise ValueError(
                f"method {self.method.name!r} takes no weights from the Gramian: use gradsurgery.aggregate or "
                "gradsurgery.SurgeryOptimizer"
            )
        if self.method.needs_losses:
            raise ValueError(
                f"method {self.method.name!r} needs the losses, which TorchJD does not hand to a weighting: use "
                "gradsurgery.SurgeryOptimizer, whose backward takes them"
            )
        self.backend = backend
        self._initial = self.method.state_dict()

    @torch.no_grad()
    def forward(self, gramian: Tensor, /) -> Tensor:
        """Return the weights [T] for a Gramian [T, T]."""
        if not gramian.is_floating_point():
            raise TypeError(f"gramian must be a real floating-point tensor, got {gramian.dtype}")
        if gramian.dim() != 2 or gramian.shape[0] != gramian.shape[1] or len(gramian) == 0:
            raise ValueError(f"gramian must be [T, T] with T >= 1, got shape {tuple(gramian.shape)}")
        return weigh(self.method, gramian.double(), None, self.backend).to(gramian.dtype)

    def reset(self) -> None:
        """Take the method's state back to what it was at construction."""
        self.method.load_state_dict(self._initial)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the method's state, for ``state_dict``."""
        return self.method.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the method's state, for ``load_state_dict``."""
        self.method.load_state_dict(state)


class SurgeryAggregator(GramianWeightedAggregator, Stateful):
    """A method of ours as a TorchJD aggregator: J [T, N] -> d = J^T method(J J^T), [N].

    G and d come from :func:`gradsurgery.gram` and :func:`gradsurgery.combine`: sums are taken in float64 whatever the
    dtype of J, and d has J's dtype. Use it with ``torchjd.autojac.jac_to_grad``, which then returns the weights, in
    float64. With ``optimize_gramian_computation=True`` TorchJD computes G and d by its own products, in J's dtype, and
    only the weights come from here. The weights of methods that weight losses multiply only the aggregated gradients,
    not those of the heads.

    Args:
        method, backend, method_options: as in :class:`SurgeryWeighting`, of which ``gramian_weighting`` is one.

    Raises:
        ValueError, TypeError: as :class:`SurgeryWeighting` and :func:`gradsurgery.gram` do.
    """

    gramian_weighting: SurgeryWeighting

    def __init__(
        self, method: str | Method = "pcgrad", /, *, backend: str | None = None, **method_options: Any
    ) -> None:
        inner = SurgeryWeighting(method, backend=backend, **method_options)
        super().__init__(inner)
        # In place of what the base class made, which computes the Gramian in J's dtype.
        self.weighting = inner << cast(Callable[[Tensor], PSDMatrix], partial(gram, backend=backend))

    @torch.no_grad()
    def forward(self, matrix: Tensor, /) -> Tensor:
        """Return d [N] for J [T, N]."""
        if matrix.stride(1) != 1:
            matrix = matrix.contiguous()
        # Called as a module, because its hooks tell jac_to_grad the weights.
        return combine(matrix, self.weighting(matrix), backend=self.gramian_weighting.backend)

    def reset(self) -> None:
        """Take the method's state back to what it was at construction."""
        self.gramian_weighting.reset()


class FromTorchJD(Method):
    """A TorchJD weighting of Gramians as a method of ours: w = weighting(G), in float64.

    TorchJD's weightings take one problem at a time, so a batch is handled in a loop. If G is not finite the weights are
    NaN, and the weighting is not called. To check this the host waits for G, so no step can be captured in a CUDA
    graph. Errors that the weighting raises for a finite G are passed on. Cost: the weighting's.

    State: the buffers and attributes, hyperparameters included, of every ``torchjd.Stateful`` module in the weighting
    (``GradVacWeighting``, ``PCDWeighting``, ``CRMOGMWeighting``); empty without one. Random numbers come from torch's
    global generator, which no state holds: seed it alike on every rank.

    Args:
        weighting: a ``Weighting[PSDMatrix]``, or one that reads only the number of tasks (sum, mean, constant, random);
            a ``CRMOGMWeighting`` around such a weighting; or an ``Aggregator`` that combines by such a weighting.

    Raises:
        TypeError: the weights do not follow from G (``GradDrop``, ``TrimmedMean``, ``ConFIG``, ``NashMTL``, ...).
        ValueError: a stateful weighting, which holds one problem's state, is given a batch of several.
    """

    name = "torchjd"

    def __init__(self, weighting: Weighting[PSDMatrix] | Aggregator) -> None:
        self.weighting = _gramian_weighting(weighting)

    @torch.no_grad()
    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights [..., T] of Gramians [..., T, T]; NaN where one is not finite."""
        check_name(backend)
        problems = check_gram(gram).view(-1, *gram.shape[-2:])
        weights = problems.new_full(gram.shape[:-1], torch.nan)
        if len(problems) > 1 and self._stateful():
            kind = type(self.weighting).__name__
            raise ValueError(f"{kind} has state for one problem, got {len(problems)}: use granularity='global'")
        finite = problems.isfinite().all(-1).all(-1).tolist()
        for row, problem, usable in zip(weights.view(-1, gram.shape[-1]), problems, finite, strict=True):
            if usable:
                row.copy_(self.weighting(problem))
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Return the buffers and attributes of each stateful module, by its path."""
        return copy.deepcopy({path: _attributes(module) for path, module in self._stateful().items()})

    def _restore(self, state: dict[str, Any]) -> None:
        modules = self._stateful()
        if any(set(state[path]) != set(_attributes(module)) for path, module in modules.items()):
            raise ValueError(f"state must be that of {type(self.weighting).__name__}, got another weighting's")
        for path, module in modules.items():
            for name, value in copy.deepcopy(state[path]).items():
                setattr(module, name, value)

    def _stateful(self) -> dict[str, nn.Module]:
        modules: dict[str, nn.Module] = dict(self.weighting.named_modules(prefix="weighting"))
        return {path: module for path, module in modules.items() if isinstance(module, Stateful)}


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's buffers, even unset ones, and its attributes, except those that every module has."""
    return {name: v for name, v in (vars(module) | module._buffers).items() if name not in _OF_EVERY_MODULE}


def _gramian_weighting(given: Weighting[PSDMatrix] | Aggregator) -> Weighting[PSDMatrix]:
    """Return the weighting that takes Gramians; TypeError if there is none."""
    weighting: Any = given
    if isinstance(given, aggregation.WeightedAggregator):
        weighting = given.gramian_weighting if isinstance(given, GramianWeightedAggregator) else given.weighting
    inner = weighting
    while isinstance(inner, CRMOGMWeighting):
        inner = inner.weighting
    if isinstance(inner, _BY_COUNT) or _statistic(inner) is PSDMatrix:
        return cast(Weighting[PSDMatrix], weighting)
    raise TypeError(
        "weighting must be declared as a TorchJD Weighting[PSDMatrix], or be an Aggregator that combines by one, "
        f"because a method sees only the Gramian; got {type(inner).__name__}"
    )


def _statistic(weighting: object) -> Any:
    """Return X where the weighting's class is declared as a ``Weighting[X]``, else None."""
    bases = (base for cls in type(weighting).__mro__ for base in vars(cls).get("__orig_bases__", ()))
    return next((get_args(base)[0] for base in bases if get_origin(base) is Weighting), None)
