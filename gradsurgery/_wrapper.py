# SPDX-License-Identifier: MIT
"""An optimizer that stands in for another one: what schedulers, scalers and checkpoints ask of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ._checks import describe
from ._compiling import takes

_OWN_HOOKS = [
    f"_optimizer_{call}_{when}_hooks" for call in ("state_dict", "load_state_dict") for when in ("pre", "post")
]


class OptimizerWrapper(torch.optim.Optimizer):
    """An optimizer with the wrapped one's parameter groups, state and defaults. That one runs the hooks of ``step``.

    Args:
        optimizer: the optimizer to wrap.

    Raises:
        TypeError: it is not an optimizer, or is such a wrapper itself.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        check_optimizer(optimizer)
        self.optimizer = optimizer
        # Optimizer.__init__ would build groups and state of its own; its unpickling path sets up the hooks alone, and
        # adds a default, which is not the wrapped optimizer's.
        defaults = dict(self.defaults)
        super().__setstate__({})
        for name in self.defaults.keys() - defaults.keys():
            del self.defaults[name]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> Any:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        self.optimizer.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The wrapped optimizer's defaults; empty where it has none."""
        return getattr(self.optimizer, "defaults", {})

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.optimizer.defaults = defaults

    def state_dict(self) -> dict[str, Any]:
        """Run the hooks of ``state_dict``, and return the state to save."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._save()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned, and run the hooks of ``load_state_dict``."""
        state = dict(state_dict)  # the caller's own may be changed neither by hooks nor here
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state)
            state = state if changed is None else dict(changed)
        self._load(state)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _save(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state: dict[str, Any]) -> None:
        """Restore a state, which it may change."""
        raise NotImplementedError

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad``."""
        if takes(type(self.optimizer).zero_grad, "set_to_none"):
            self.optimizer.zero_grad(set_to_none=set_to_none)
        else:
            self.optimizer.zero_grad()

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Register a hook of the wrapped optimizer's step; it is called with this optimizer in the other's place."""

        def call(inner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = hook(self, (self, *args[1:]), kwargs)
            return None if changed is None else ((inner, *changed[0][1:]), changed[1])

        return self.optimizer.register_step_pre_hook(call)

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Register a hook of the wrapped optimizer's step; it is called with this optimizer in the other's place."""
        return self.optimizer.register_step_post_hook(lambda inner, args, kwargs: hook(self, (self, *args[1:]), kwargs))

    if not TYPE_CHECKING:  # or a type checker would accept any name

        def __getattr__(self, name: str) -> Any:
            # For further attributes of some optimizers, such as train() and eval(). Not for private ones: GradScaler
            # looks for one, and would then set attributes on this object that the wrapped optimizer needs.
            if name.startswith("_") or "optimizer" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            try:
                return getattr(self.optimizer, name)
            except AttributeError as error:
                why = f"{type(self).__name__!r} object has no attribute {name!r}; nor: {error}"
                raise AttributeError(why) from None

    def __getstate__(self) -> dict[str, Any]:
        # Without the bound step that a scheduler sets, and the hooks: both belong to this object alone.
        return {name: value for name, value in self.__dict__.items() if name not in ("step", *_OWN_HOOKS)}

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _check_known(self, parameters: Sequence[Any] | None, name: str) -> None:
        known = {id(p) for p in self._parameters()}
        for p in parameters or ():
            if not isinstance(p, Tensor):
                raise TypeError(f"{name} must hold parameters, as module.parameters() yields them, got {describe(p)}")
        unknown = [p for p in parameters or () if id(p) not in known]
        if unknown:
            raise ValueError(
                f"{name} holds {len(unknown)} tensors that are not parameters of the wrapped optimizer (sharding a "
                "model makes new ones)"
            )


def check_optimizer(optimizer: Any) -> None:
    """Raise TypeError unless it can be wrapped."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optimizer must be a torch.optim.Optimizer, as torch.optim.Adam(model.parameters()) is, got "
            f"{type(optimizer).__name__}"
        )
    if isinstance(optimizer, OptimizerWrapper):
        raise TypeError(f"optimizer must not be a {type(optimizer).__name__} itself: wrap what it wraps")
