# SPDX-License-Identifier: MIT
"""The base class of methods, and how the package calls them."""

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
    """The name in messages and checkpoints: the paper's in lower snake case, or by default that of a user's class."""
    needs_losses: bool = False
    needs_gram: bool = True
    """Whether the weights depend on G. If not, ``weights`` uses only its shape, its device and whether it is finite,
    :func:`gradsurgery.aggregate` passes zeros in its place, and the optimizers make one backward pass, from the
    weighted sum of the losses."""
    num_batches: int = 1
    """How many independent batches a step may have. With several, ``weights`` is given J_1 J_2^T in place of G, where
    J_b holds the task gradients of batch b as rows, and d combines the gradients of the last batch."""
    weights_losses: bool = False
    """Whether these are loss weights, which also multiply the gradients of parameters that one task alone reaches."""

    takes_absent: ClassVar[bool] = False
    """Whether a step may lack some of the losses."""

    takes_shards: ClassVar[bool] = True
    """Whether each of several processes can work on its own parts of the parameters."""

    state_by_problem: ClassVar[bool] = False
    """Whether the state has a row for each G of a step (each segment); the segments must then stay the same."""

    _named_by_default: ClassVar[bool]
    """Set in classes that set no ``name`` and therefore have the class's."""

    _takes_backend: ClassVar[bool] = True
    """Whether the class's ``weights`` takes ``backend=``; that of a user's own method need not."""

    gram_parameters: Sequence[Tensor] | None = None
    """The shared parameters whose G the weights come from; None: all."""

    # For docs/methods.md, the tests and the benchmarks; the package itself reads none of these.
    weights_from: ClassVar[str] = "G"
    """What the weights come from."""
    scale: ClassVar[str] = ""
    """What the direction is like for orthogonal gradients of equal length: their "sum", their "mean", or the weights'
    own convention, such as "sums to 1"."""
    non_conflicting: ClassVar[str] = "no"
    """Whether the direction has no negative product with any task gradient: "yes", "no", or under which condition."""
    linear: ClassVar[bool | str] = False
    """Whether d is linear in factors a_t > 0 on the task gradients, or under which condition."""
    cost: ClassVar[str] = "T"
    """Operations per problem, in T."""

    def weights(self, gram: Tensor, *, losses: Tensor | None = None) -> Tensor:
        """Return the weights [..., T] for Gram matrices [..., T, T], and advance the state by one step.

        The result must depend on the arguments and the state alone, because each of several processes computes it for
        itself. The methods of this package also take ``backend=``, a name of :func:`gradsurgery.backends`.

        Args:
            gram: [..., T, T], of any floating dtype.
            losses: [T] loss values, where ``needs_losses``.

        Returns:
            float64 [..., T], a constant to autograd; NaN for the problems whose G, or losses, are not finite, as far
            as this step's weights depend on them.

        Raises:
            ValueError, TypeError: G or the losses are not what they must be, or the state or an option is for another
                number of tasks; the state is then left as it was.
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
        """Return the solver that ``weights`` would run for T tasks on the device, for backends with a one-call path.

        Such a backend runs all stages in one call, and advances the state. None: only ``weights`` itself can compute
        the weights. ``once``: the method is new and is used for this call only, so no state need be made.

        Raises:
            ValueError: as ``weights`` does.
        """
        return None

    @property
    def tells_tasks_apart(self) -> bool:
        """Whether every step must have the same tasks, because the state or an option holds something for each."""
        return any(not _is_number(value) for value in self.state_dict().values()) or any(
            isinstance(option, PerTask) for option in vars(self).values()
        )

    def _check_fits(self, num_tasks: int) -> None:
        """Raise ValueError if an option is for another number of tasks."""
        for option in vars(self).values():
            if isinstance(option, PerTask):
                option.check(num_tasks)

    def _has_other_weights(self, method: type[Method]) -> bool:
        """Whether a subclass or the object itself has replaced this class's ``weights``."""
        return getattr(self.weights, "__func__", None) is not method.weights

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the state, under the same keys at all times; empty for a method without a state.

        The optimizers call it at each step, and call :meth:`load_state_dict` to undo a step that failed. Gradients are
        too large to be copied at each step: methods that keep gradients undo the first step only.
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

    It does nothing while the block is traced or captured in a CUDA graph, because then nothing has run; nor if the
    state of a user's method cannot be read or restored at this time, so that the block's own error is the one raised.
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
    # torch.compile cannot trace code that inspects signatures.
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
