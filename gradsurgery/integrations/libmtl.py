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

    For scripts that look up weightings by name, put it in the place of one that they know: ``LibMTL.weighting.EW =
    weighting("pcgrad")``.

    Args:
        method: a name of ``methods.available()``; each model then has a method, and a state, of its own. Or a
            ``Method``, which all models made from the class share.
        backend: a name of :func:`gradsurgery.backends`; None chooses.
        method_options: the named method's own options. The trainer's ``weight_args`` stay empty.

    Raises:
        ValueError, TypeError: as ``methods.get`` does.
    """
    # Errors in the options are raised here, not in the trainer.
    resolve(method, method_options)
    check_name(backend)

    class Configured(SurgeryWeighting):
        _method = method
        _method_options = method_options
        _backend = backend

    return Configured


class SurgeryWeighting(nn.Module):
    """The base of what :func:`weighting` returns. A LibMTL trainer's model inherits from an architecture and from this.

    ``backward(losses)`` adds to ``.grad``, which the trainer has cleared. The parameters that the architecture's
    ``get_share_params()`` yields get d = sum_t w_t g_t; absent gradients count as zero. All others, the heads, get the
    sum of their gradients, or, from methods that weight losses, the weighted sum. The task gradients stay in their own
    tensors on their device; only the weights [T] are copied to the host, for LibMTL's record of them. The parameters
    are looked up at the first ``backward``.

    The state of the method, ``surgery_method``, is in the model's ``state_dict`` under "_extra_state". To load a
    checkpoint of a model with another method, remove that key from it.
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
        """Run the backward passes and write ``.grad``.

        Args:
            losses: [T], or T scalars.
            weight_args: must be empty; the trainer's are accepted only to name them in the error.

        Returns:
            The weights as a numpy array, float64 [T]; None for coordinate-wise methods.

        Raises:
            ValueError: there are ``weight_args``.
            ValueError, TypeError, RuntimeError: as :meth:`gradsurgery.SurgeryOptimizer.backward` does.
        """
        if weight_args:
            raise ValueError(
                "weight_args must be empty, because a method takes its options from weighting(method, **options), got "
                f"{sorted(weight_args)}"
            )
        if self._surgery is None:
            # It only runs stages 1 to 4: the trainer's own optimizer makes the step.
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
