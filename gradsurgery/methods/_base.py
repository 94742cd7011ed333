# SPDX-License-Identifier: MIT
"""What a method is."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._checks import describe
from .._compiling import capturing, is_traced, takes
from .._constant import constant
from .._extension import NativeSolver
from ..backends import check_name
from ..backends.problems import is_finite
from ..functional import check_gram
from ._state import PerTask


class Method:
    """Weights from G, stage 3. Subclasses with state keep it in tensors that ``state_dict`` names.

    Constructors raise ValueError for an option that is out of its range.
    """

    name: ClassVar[str] = "Method"
    """Lower snake case of the paper's name, or that of a user's class; what messages and checkpoints call it."""
    needs_losses: bool = False
    needs_gram: bool = True
    """Whether the weights depend on G. If not, only its shape, its device and whether it is finite are used, and the
    optimizers make one backward pass, from the weighted sum of the losses."""
    num_batches: int = 1
    """How many independent batches a step may have. With several, ``weights`` is given J_1 J_2^T of the first two in
    place of G, and d combines the gradients of the last one."""
    weights_losses: bool = False
    """Whether the weights belong to the losses, and so also multiply the gradients of parameters that one task owns."""

    takes_absent: ClassVar[bool] = False
    """Whether a step may lack some of the losses."""

    takes_shards: ClassVar[bool] = True
    """Whether each of several processes can work on its own parts of the parameters."""

    state_by_problem: ClassVar[bool] = False
    """Whether the state has a row for each of several problems, which then must be the same at each step."""

    _named_by_default: ClassVar[bool]
    """In classes whose name is the class's own, for want of another."""

    _takes_backend: ClassVar[bool] = True
    """Whether the class's ``weights`` has the option; that of a user's own method need not."""

    gram_parameters: Sequence[Tensor] | None = None
    """The shared parameters whose G the weights come from; None: all."""

    # For docs/methods.md, the tests and the benchmarks; the package itself reads none of these.
    weights_from: ClassVar[str] = "G"
    """What the weights come from."""
    scale: ClassVar[str] = ""
    """What the direction is like for orthogonal gradients of equal length: their "sum", their "mean", or the weights'
    own convention, as "sums to 1"."""
    non_conflicting: ClassVar[str] = "no"
    """Whether the direction has no negative product with any task gradient: "yes", "no", or when."""
    linear: ClassVar[bool | str] = False
    """Whether d, as a function of factors a_t > 0 on the task gradients, is linear, or when."""
    cost: ClassVar[str] = "T"
    """Operations per problem, in T."""

    def weights(self, gram: Tensor, *, losses: Tensor | None = None) -> Tensor:
        """Return the weights [..., T] for Gram matrices [..., T, T], and advance the state by one step.

        A function of the arguments and the state alone: each of several processes computes them for itself. The methods
        of this package also take ``backend=``, a name of :func:`gradsurgery.backends`.

        Args:
            gram: [..., T, T], of any floating dtype.
            losses: [T] loss values, where ``needs_losses``.

        Returns:
            float64 [..., T], a constant to autograd; NaN for the problems whose G, or losses, are not finite, as far
            as this step's weights depend on them.

        Raises:
            ValueError, TypeError: G or the losses are not what they must be, or of another number of tasks than the
                state or an option; the state is as before then.
            RuntimeError: the named backend cannot serve the call.
        """
        raise NotImplementedError(f"{type(self).__name__} must define weights(gram, *, losses=None)")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        named = next(base for base in cls.__mro__ if "name" in vars(base))
        if named is Method or "_named_by_default" in vars(named):
            cls.name, cls._named_by_default = cls.__name__, True
        cls._takes_backend = takes(cls.weights, "backend")

    def __repr__(self) -> str:
        options = inspect.signature(type(self)).parameters
        given = (f"{name}={_brief(getattr(self, name))}" for name in options if hasattr(self, name))
        return f"{type(self).__name__}({', '.join(given)})"

    def native_solver(self, device: torch.device, num_tasks: int, *, once: bool = False) -> NativeSolver | None:
        """Return what ``weights`` would run for T tasks there, for backends with all stages in one call.

        None: only ``weights`` itself can compute them. The backend advances the state. ``once``: the method is new and
        is used for this call only, so that no state need be made.

        Raises:
            ValueError: as ``weights`` does.
        """
        return None

    @property
    def tells_tasks_apart(self) -> bool:
        """Whether tasks must stay the same: the state holds more than numbers, or an option something for each task."""
        return any(not _is_number(value) for value in self.state_dict().values()) or any(
            isinstance(option, PerTask) for option in vars(self).values()
        )

    def _check_fits(self, num_tasks: int) -> None:
        """Raise ValueError if an option is for another number of tasks."""
        for option in vars(self).values():
            if isinstance(option, PerTask):
                option.check(num_tasks)

    def _has_other_weights(self, method: type[Method]) -> bool:
        """Whether a subclass or the object itself has weights of its own."""
        return getattr(self.weights, "__func__", None) is not method.weights

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the state, under the same keys at all times; empty for a method without.

        The optimizers call it at each step, and :meth:`load_state_dict` after a step that failed; but methods that keep
        gradients, which are too large for that, undo the first step only.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; ValueError for keys or shapes that it never returns."""
        if not isinstance(state, Mapping):
            raise TypeError(f"the state of method {self.name!r} must be a dict, got {describe(state)}")
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"state of method {self.name!r} must have the keys {sorted(self.state_dict())}, got {sorted(state)}"
            )
        with torch.inference_mode(False):
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        """Take over a state with the right keys."""
        if state:
            raise NotImplementedError(f"{type(self).__name__} has a state_dict, and needs a load_state_dict")

    def _snapshot(self) -> Any:
        """Return what ``_roll_back`` needs to take the state back to what it is now."""
        return self.state_dict()

    def _roll_back(self, snapshot: Any) -> None:
        """Take the state back to what it was at a ``_snapshot``, in place where it can be."""
        self.load_state_dict(snapshot)


class Rollback:
    """A context that takes a method's state back to what it was if its block raises.

    Not while the block is traced or captured in a CUDA graph: nothing has run then. Nor the state of a user's method
    that cannot be read or restored at this time; what the block raised matters more.
    """

    __slots__ = ("_method", "_snapshot")

    def __init__(self, method: Method, device: torch.device) -> None:
        stateless = type(method).state_dict is Method.state_dict
        self._method = None if stateless or is_traced() or capturing(device) else method
        try:
            self._snapshot = None if self._method is None else method._snapshot()
        except Exception:
            self._method = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._method is not None:
            with suppress(Exception):
                self._method._roll_back(self._snapshot)


def weigh(method: Method, gram: Tensor, losses: Tensor | None, backend: str | None) -> Tensor:
    """Return the method's weights; ValueError or TypeError where a method of the user's own returns something else."""
    function = getattr(method.weights, "__func__", method.weights)
    # torch.compile cannot trace what looks at signatures.
    takes_backend = method._takes_backend if is_traced() else takes(function, "backend")
    named = {"backend": backend} if backend is not None and takes_backend else {}
    weights = method.weights(gram, losses=losses, **named)
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        raise TypeError(f"method {method.name!r} must return a floating-point tensor, got {describe(weights)}")
    if weights.shape != gram.shape[:-1] or weights.device != gram.device:
        raise ValueError(
            f"method {method.name!r} must return weights of shape {tuple(gram.shape[:-1])} on {gram.device}, got shape "
            f"{tuple(weights.shape)} on {weights.device}"
        )
    return weights.detach().double()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.dim() == 0)


def _brief(option: Any) -> str:
    is_parameters = isinstance(option, list) and any(isinstance(item, Tensor) for item in option)
    return f"<{len(option)} tensors>" if is_parameters else repr(option)


class FixedMethod(Method):
    """A method whose weights depend on nothing but the number of tasks."""

    needs_gram = False
    weights_losses = True
    weights_from = "nothing"
    linear = True

    def _fixed(self, gram: Tensor) -> Tensor:
        """Return the weights [T] or [..., T] for float64 G [..., T, T]."""
        raise NotImplementedError

    def weights(self, gram: Tensor, *, losses: Tensor | None = None, backend: str | None = None) -> Tensor:
        """Return the weights; NaN where G is not finite."""
        check_name(backend)
        problems = check_gram(gram)
        weights = torch.where(is_finite(problems), self._fixed(problems), torch.nan)
        return constant(f"{self.name} weights", weights, [gram])
