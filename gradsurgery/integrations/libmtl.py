# SPDX-License-Identifier: MIT
"""LibMTL: our methods as weighting classes for its trainer. LibMTL itself is not imported."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backends import check_name
from ..methods import CoordinateMethod, Method, resolve
from ..optim import SurgeryOptimizer


def weighting(
    method: str | Method = "pcgrad", /, *, backend: str | None = None, **method_options: Any
) -> type[SurgeryWeighting]:
    """Return a class to use where LibMTL takes a weighting class: ``Trainer(weighting=weighting("pcgrad"), ...)``.

    Scripts that take weightings by name find it in place of one that they know: ``LibMTL.weighting.EW =
    weighting("pcgrad")``.

    Args:
        method: a name of ``methods.available()``; each model then has a method, and a state, of its own. Or a
            ``Method``, which all models made from the class share.
        backend: a name of :func:`gradsurgery.backends`; None chooses.
        method_options: the named method's own options. The trainer's ``weight_args`` stay empty.

    Raises:
        ValueError, TypeError: as ``methods.get`` does.
    """
    # What is wrong with them is said here, not in the trainer.
    resolve(method, method_options)
    check_name(backend)

    class Configured(SurgeryWeighting):
        _method = method
        _method_options = method_options
        _backend = backend

    return Configured


class SurgeryWeighting(nn.Module):
    """What :func:`weighting` configures. A LibMTL trainer's model inherits from an architecture and from this.

    ``backward(losses)`` adds to ``.grad``, which the trainer has cleared: d = sum_t w_t g_t for the parameters that the
    architecture's ``get_share_params()`` names, absent gradients counting as zero; for all others, the heads, the
    sum of their gradients, times w_t for methods that weight losses. The task gradients stay in their own tensors on
    their device; only the weights [T] are copied to the host, for LibMTL's record of them. The parameters are
    looked up at the first ``backward``.

    The method, ``surgery_method``, has its state in the model's ``state_dict`` under "_extra_state", so a checkpoint of
    a model with another method needs that key removed.
    """

    _method: ClassVar[str | Method]
    _method_options: ClassVar[dict[str, Any]]
    _backend: ClassVar[str | None]

    # The architecture's.
    rep_grad: bool
    get_share_params: Callable[[], Iterable[Tensor]]

    surgery_method: Method
    _surgery: SurgeryOptimizer | None

    def init_param(self) -> None:
        """Make the method; LibMTL calls this once the model is built.

        Raises:
            ValueError: the model has ``rep_grad=True``.
        """
        if self.rep_grad:
            raise ValueError(
                "gradsurgery works on the gradients of shared parameters: rep_grad must be False, got True"
            )
        self.surgery_method = resolve(self._method, self._method_options)
        self._surgery = None

    def backward(self, losses: Tensor | Sequence[Tensor], **weight_args: Any) -> Any:
        """Go back from the losses and write ``.grad``.

        Args:
            losses: [T], or T scalars.
            weight_args: none; they are here to be refused by name.

        Returns:
            The weights as a numpy array, float64 [T]; None for coordinate-wise methods.

        Raises:
            ValueError: there are ``weight_args``.
            ValueError, TypeError, RuntimeError: as :meth:`gradsurgery.SurgeryOptimizer.backward` does.
        """
        if weight_args:
            raise ValueError(
                "weight_args must be empty, for a method takes its options from weighting(method, **options), got "
                f"{sorted(weight_args)}"
            )
        if self._surgery is None:
            # Steps 1 to 4 are all that it does here: the trainer's own optimizer makes the step.
            holder = torch.optim.SGD(self.parameters())
            self._surgery = SurgeryOptimizer(
                holder, self.surgery_method, shared=self.get_share_params(), backend=self._backend
            )
        info = self._surgery.backward(losses)
        return None if isinstance(self.surgery_method, CoordinateMethod) else info.weights.cpu().numpy()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the method's state, for ``state_dict``."""
        return self.surgery_method.state_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the method's state, for ``load_state_dict``."""
        self.surgery_method.load_state_dict(state)
