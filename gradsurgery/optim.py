# SPDX-License-Identifier: MIT
"""Gradient surgery as a drop-in wrapper of any torch optimizer: stages 1 to 5."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn.parameter import is_lazy

from . import methods
from ._collected import Collected
from ._compiling import untraced
from ._dtensor import is_sharded
from ._memory import OverwrittenError
from ._operate import backward_by_representation, backward_once, operate
from ._plan import Planner, check_method, check_representation
from ._shards import Shards, processes_of
from ._survey import Survey
from ._wrapper import OptimizerWrapper
from .backends import check_name, choose
from .collect import Losses, PassOptions, collect, holds_weights, listed
from .diagnostics import SurgeryInfo
from .distributed import Replicas
from .methods._base import Rollback
from .methods._state import numbers_of


class SurgeryOptimizer(OptimizerWrapper):
    """Wraps a torch optimizer; ``backward(losses)`` takes the place of ``sum(losses).backward()``.

    Parameter groups, state, defaults and other public attributes are those of the wrapped optimizer, so schedulers,
    gradient scalers and checkpoints work as they do without the wrapper. ``state_dict`` adds entries to the wrapped
    optimizer's: "surgery" holds the method's state, by the method's name; "shared", for methods that keep gradients,
    the places of the parameters whose gradients these are; "blocks" and "tasks", for methods that keep something for
    each segment or task, the segments and tasks. ``load_state_dict`` also takes a plain optimizer's state, and then
    leaves the method as it is.

    What ``backward`` does with a parameter depends on which losses reach it:

    * none: ``.grad`` is left as it was;
    * one (a head): its plain gradient is added to ``.grad``; methods that weight losses multiply it by the task's
      weight;
    * two or more: it is shared, and the direction d = sum_t w_t g_t is added to ``.grad``; a task that does not reach
      it has a zero gradient there. Only shared parameters enter G.

    In a step with a single loss, every parameter that it reaches counts as shared. Parameters outside the wrapped
    optimizer get no ``.grad``. Hooks on parameters run once per loss; with mode="representation", those on parameters
    below the features run once. Hooks that run after gradients are accumulated
    (``register_post_accumulate_grad_hook``) do not run, with three exceptions, where they run once per loss: sharded
    parameters, re-entrant checkpoints, and functions whose backward calls ``backward`` itself. If the method keeps
    something for each task, every step must have the same tasks in the same order.

    Args:
        optimizer: the optimizer to wrap.
        method: a name of ``methods.available()``, or a ``Method``.
        shared: the shared parameters. All other parameters then get the plain sum of their gradients, or, from methods
            that weight losses, the weighted sum. Default: the parameters that two or more losses reach, found anew at
            each backward.
        granularity: "global" (one G for all shared parameters), "per_group" (one per parameter group) or "per_tensor".
        process_group: the processes that train the model together, each with a batch of its own. Task gradients and
            losses are averaged over them before surgery, as if one process had all batches. None: the default group if
            ``torch.distributed`` is initialised. A group of this process alone averages nothing. Every process must
            call ``backward`` and ``combine``; if one raises, the others may wait until the group's timeout. If
            parameters are sharded, leave it None for ``fully_shard``, whose hooks average the gradients. For tensor
            parallelism alone, pass the group of the processes that hold the same parts; None then averages no
            gradients. Each process combines its own parts. There is one pass per loss, which also adds to ``.grad`` of
            parameters outside the optimizer. GradDrop is refused.
        backend: a name of :func:`gradsurgery.backends`; None chooses.

    Raises:
        TypeError, ValueError: an argument is not what it must be.

    Warns:
        UserWarning: a parameter counts as shared, but one loss alone trains it, and another gives it a gradient of
            zeros: pass ``shared``. This happens where several losses are computed from one stack, compiled function or
            re-entrant checkpoint. The first step looks for such gradients, on the host. If it finds some, but no two
            losses that give zeros to each other's parameters, the second step looks again. So do later steps whose
            losses depend on new functions in Python or TorchScript.
        UserWarning: no loss depends on any of the parameters, or ``step()`` was called twice, with learning rates that
            are not all the number 0, before the first surgery.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        method: str | methods.Method = "pcgrad",
        *,
        shared: Iterable[Tensor] | None = None,
        granularity: str = "global",
        process_group: distributed.ProcessGroup | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(optimizer)
        self.backend = check_name(backend)
        self._planner = Planner(methods.resolve(method, {}), shared, granularity)
        self._processes = self._processes_of(process_group)
        self._survey = Survey(infers_shared=shared is None)
        self._pending: Collected | None = None

    @property
    def method(self) -> methods.Method:
        """The method, which stays the same for the life of the optimizer."""
        return self._planner.method

    @property
    def granularity(self) -> str:
        """Which parameters have a G together: "global" (all), "per_group" or "per_tensor"."""
        return self._planner.granularity

    @untraced
    def backward(
        self,
        losses: Losses,
        *,
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
        mode: str = "sequential",
        chunk_size: int | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
    ) -> SurgeryInfo:
        """Run the backward passes, operate on the task gradients, and add the result to ``.grad``.

        Gradients that :meth:`collect` has gathered before are included.

        Args:
            losses: one scalar per task: a sequence or another iterable, a 1-D tensor, or a dict from name to scalar.
                None stands for a loss that this step lacks, if the method allows that (``takes_absent``); its task
                then has no gradients. None also stands for a loss that only other processes have, except with sharded
                parameters and with methods that take a single backward pass or several batches.
            scaler: a gradient scaler. Pass the losses unscaled; ``.grad`` comes out scaled, for ``scaler.unscale_``
                and ``scaler.step``; the method sees unscaled values.
            retain_graph: keep the graph after the last pass.
            mode: "sequential" (one backward pass per loss) or "batched" (one pass for all, under vmap: fewer, larger
                kernels, and T times the memory for the gradients of activations). With "batched", a loss counts as
                reaching a parameter if the graph connects them. Or "representation", with ``features``: the surgery is
                on the losses' gradients with respect to the features, for all samples of the batch. Its direction is
                passed back from the features to the parameters below them in one pass, instead of T. All other
                parameters, even those that several losses share, get the plain sum of their gradients, or, from
                methods that weight losses, the weighted sum. MGDA then is MGDA-UB (Sener & Koltun, NeurIPS 2018,
                section 3.3). This is an approximation: G, and all that is computed from it, is that of the features'
                gradients, and a sample that only one task has adds nothing to the products of two tasks. ``shared``
                has no effect, the granularity must be "global", and no loss may be None.
            chunk_size: the number of losses per batched pass; None: all.
            features: the shared representation, one tensor or several that do not depend on each other. The pass of
                each loss then goes through its own head to the features. From there passes go on to the parameters
                below: one per loss, batched, or, with "representation", a single one. Every parameter must lie either
                above the features (between losses and features) or below them; every feature must be used by some loss
                and have no hooks.

        Returns:
            G, the weights and the values computed from them, on the gradients' device.

        Raises:
            ValueError, TypeError: a loss or a gradient is not what it must be, or another process has other tasks or
                parameters. Gradients and state are then unchanged, except what ``fully_shard`` itself retains from a
                failed pass.
            OverwrittenError: a RuntimeError; passes returned gradients in the same memory. What was collected before
                is forgotten, too, because the passes may have written over it.
            RuntimeError: the batched pass failed, for example because vmap does not support an operator. Gradients and
                state are then unchanged.
        """
        losses, how = listed(losses), PassOptions(scaler, retain_graph, mode, chunk_size, features)
        before, survey = self._pending, self._survey
        once = self.method.weights_losses and not self.method.needs_gram
        if once and before is None and holds_weights(losses):
            return backward_once(losses, self._trainable(), self._planner, self._processes, self.backend, how, survey)
        if mode == "representation":
            if before is not None:
                raise ValueError('mode="representation" does not add to what was collected: call combine() first')
            check_representation(self.method, self.granularity)
            return backward_by_representation(
                losses, self._trainable(), self._planner, self._processes, self.backend, how, survey, self._check_tasks
            )
        try:
            self._collect(losses, how, self.method.takes_absent or self._others_may_have_losses)
            return self._combine()
        except OverwrittenError:
            raise
        except BaseException:
            self._pending = before
            raise

    @untraced
    def collect(
        self,
        losses: Losses,
        *,
        scaler: torch.amp.GradScaler | None = None,
        retain_graph: bool = False,
        mode: str = "sequential",
        chunk_size: int | None = None,
        features: Tensor | Sequence[Tensor] | None = None,
    ) -> None:
        """Add one micro-batch's task gradients to those collected so far; ``combine`` then operates on the sums.

        Surgery on accumulated gradients differs from accumulating the results of surgery on each micro-batch, which
        is what several ``backward`` calls do. ``scaler.update()`` belongs after the step, not between micro-batches.
        For methods that take several independent batches (``num_batches``), each call is one of these batches, and
        nothing is summed. Arguments and errors are those of :meth:`backward`, except that mode="representation" is
        refused, and that None stands for the loss of a task that another call or process has: each task's graph can
        then be freed before the next task's is made.
        """
        # With several batches, another call is another batch: each call must have all tasks.
        partial = self.method.takes_absent or self.method.num_batches == 1
        self._collect(listed(losses), PassOptions(scaler, retain_graph, mode, chunk_size, features), partial)

    def _check_tasks(self, tasks: list[str]) -> None:
        """Raise, before the passes, the errors about these tasks that can be found by then."""
        if not self._processes.alone:
            return  # or the others would wait: differences between processes are an error on all of them, later
        self._planner.check_tasks(tasks)
        if methods.is_known(self.method):
            self.method._check_fits(len(tasks))
        if (trained := next((p for p in self._parameters() if p.requires_grad), None)) is not None:
            choose(self.backend, trained.device, len(tasks))

    def _collect(self, losses: Losses, how: PassOptions, partial: bool) -> None:
        before, batches = self._pending, self.method.num_batches
        if before is not None and 1 < batches == before.batches:
            raise ValueError(f"a step of method {self.method.name!r} has at most {batches} batches: call combine() now")
        parameters, shards = self._trainable(), self._processes.shards

        def check(tasks: list[str]) -> None:
            self._check_tasks(tasks)
            if before is not None:
                before.check_next(tasks, parameters, scaled=how.scaler is not None)

        try:
            new = collect(
                losses,
                parameters,
                how,
                check=check,
                partial=partial,
                empty=self._others_may_have_losses,
                shards=shards,
                survey=self._survey,
            )
            self._pending = new if before is None else before.plus(new) if batches == 1 else before.beside(new)
        except OverwrittenError:
            self._pending = None  # what was collected before may have been written over, too
            raise

    @untraced
    def combine(self) -> SurgeryInfo:
        """Operate on what was collected, add the result to ``.grad``, and forget what was collected.

        The directions may reuse the memory of collected gradients that nobody else holds.

        Returns:
            As :meth:`backward`.

        Raises:
            ValueError: nothing was collected, a task is missing, or the method takes another number of batches.
            ValueError, TypeError: as :meth:`backward` does; what was collected is then kept.
            RuntimeError: torch.distributed failed to exchange gradients; what was collected is then lost.
        """
        return self._combine()

    @torch.no_grad()
    def _combine(self) -> SurgeryInfo:
        if self._pending is None:
            raise ValueError("there is nothing to combine: call collect(losses) first")
        collected = self._pending
        if collected.batches not in (1, self.method.num_batches):
            raise ValueError(
                f"a step of method {self.method.name!r} has 1 or {self.method.num_batches} batches, got "
                f"{collected.batches}"
            )
        planner, processes = self._planner, self._processes
        looks = self._survey.wants_gradients(collected)
        self._pending = collected = processes.average(collected, whole=looks, before=self._forget)
        collected.warn_of_nothing(stacklevel=6)
        self._survey.check(collected, processes)
        info = operate(collected, planner, processes, self.param_groups, self.backend, self._forget)
        self._survey.began = True
        return info

    def update(self, values: Sequence[Any] | Mapping[str, Any] | Tensor) -> None:
        """Pass values that do not come from the step itself to the method's ``update``.

        These are FAMO's losses after the step, or DTP's KPIs. They are averaged over the processes, each of which must
        call this; calling the method's own ``update`` instead would let the processes' weights diverge.

        Args:
            values: one number per task, in the tasks' order, or a dict from name to number.

        Raises:
            ValueError: the method has no ``update``; ``values`` does not hold one number per task; the tasks or their
                order are not those of the steps before; or the method's ``update`` raises it.
        """
        learn = getattr(self.method, "update", None)
        if learn is None:
            raise ValueError(
                f"method {self.method.name!r} learns from the losses of its steps alone, and has no update"
            )
        device = self._parameters()[0].device
        numbers = numbers_of("values", values, device)
        tasks = [str(task) for task in (values.keys() if isinstance(values, Mapping) else range(len(numbers)))]
        if self._processes.shards is not None:
            self._processes.shards.check_same(tasks, device)
        numbers = self._processes.average_losses(tasks, numbers)
        if isinstance(values, Mapping):
            self._planner.check_tasks(tasks)
        with Rollback(self.method, device):
            learn(numbers)
        if isinstance(values, Mapping):
            self._planner.remember_tasks(tasks)

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> Any:
        """Step the wrapped optimizer, with its own options; warn if the result of surgery is not in ``.grad``."""
        if self._pending is not None:
            warnings.warn("collected task gradients are not in .grad: call combine() before step()", stacklevel=2)
        elif closure is None:
            self._survey.begin_step(self.param_groups)
        if closure is None:
            return self.optimizer.step(**options)
        result = self.optimizer.step(closure, **options)
        self._survey.begin_step(self.param_groups)
        return result

    # Keeps torch from wrapping this step in hooks: the wrapped optimizer's step has them.
    step.hooked = True  # type: ignore[attr-defined]

    @untraced
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad``, and forget what was collected."""
        self._pending = None
        super().zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self._notice_shards()
        self.optimizer.add_param_group(param_group)
        try:
            self._processes.check(self.param_groups[-1]["params"])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _save(self) -> dict[str, Any]:
        ours = self._planner.state_dict(self._parameters(), self._processes.shards)
        return {**self.optimizer.state_dict(), **ours}

    def _load(self, state: dict[str, Any]) -> None:
        self._notice_shards()
        planned: dict[str, Any] = {name: state.pop(name) for name in state.keys() & {"shared", "blocks", "tasks"}}
        surgery = self._planner.own_state(state.pop("surgery", None))
        if surgery is not None and self._processes.shards is not None:
            surgery = self._processes.shards.gathered(surgery)
        self._planner.check_state(planned, len(self._parameters()))
        before = self.method.state_dict()
        try:
            if surgery is not None:
                self.method.load_state_dict(surgery)
            self.optimizer.load_state_dict(state)
        except BaseException:
            self.method.load_state_dict(before)
            raise
        if surgery is not None:
            self._planner.restore(planned, self._parameters())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.method!r}, granularity={self.granularity!r}, {self.optimizer!r})"

    def _forget(self) -> None:
        self._pending = None

    @property
    def _others_may_have_losses(self) -> bool:
        """Whether other processes may have losses that this one lacks."""
        return not self._processes.alone and self._processes.shards is None and self.method.num_batches == 1

    def _processes_of(self, group: distributed.ProcessGroup | None) -> Replicas | Shards:
        """Return the processes that train these parameters; errors are those of the constructor."""
        processes = processes_of(group, self._parameters(), self.method)
        check_method(self.method, self.granularity, processes.shards is not None)
        self._check_known(self._planner.named, "shared")
        self._check_known(self.method.gram_parameters, "norm_parameters")
        return processes

    def _notice_shards(self) -> None:
        """Adapt to parameters that were sharded after the optimizer was wrapped, as Accelerate does it."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        if isinstance(self._processes, Replicas) and any(map(is_sharded, self._parameters())):
            self._processes = self._processes_of(self._processes.group)

    def _trainable(self) -> list[Tensor]:
        self._notice_shards()
        # torch allows duplicates in a group, and lazy parameters, which no loss reaches before they have a shape.
        return [p for p in dict.fromkeys(self._parameters()) if p.requires_grad and not is_lazy(p)]
