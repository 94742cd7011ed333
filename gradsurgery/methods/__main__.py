# SPDX-License-Identifier: MIT
"""Print docs/methods.md: ``python -m gradsurgery.methods > docs/methods.md``."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from . import Method, available, get
from ._stateful import SteppedMethod

_COLUMNS: dict[str, Callable[[Method], str]] = {
    "method": lambda m: f"`{m.name}`",
    "options": lambda m: ", ".join(f"`{option}`" for option in _options(m)) or "-",
    "weights come from": lambda m: m.weights_from,
    "scale": lambda m: m.scale,
    "conflicts with no task": lambda m: m.non_conflicting,
    "linear": lambda m: _yes(m.linear),
    "state": lambda m: ", ".join(m.state_dict()) or "-",
    "fixed tasks": lambda m: _yes(m.tells_tasks_apart),
    "random": lambda m: _yes(isinstance(m, SteppedMethod)),
    "weighs heads": lambda m: _yes(m.weights_losses),
    "backward passes": lambda m: "1" if m.weights_losses and not m.needs_gram else _passes(m),
    "cost": lambda m: m.cost,
}

_TEXT = """\
# Methods and their properties

Written by `python -m gradsurgery.methods` from the classes; the README says what each method does, the docstrings give
equations, conventions, options and sources.

## Where to begin

Judged by their properties:

* Try `sum` first. It takes one backward pass, and surgery does not always improve accuracy.
* `pcgrad` changes least: where no two tasks conflict, d is the sum, so the learning rate may stay as it is.
* If no task may get worse, to first order: `mgda`. Or `upgrad` or `dualproj`, with a smaller `reg_eps` if gradients are
  nearly opposite or of very different lengths.
* If losses have different units: `nash_mtl`, `config` (for independent gradients), or, with positive losses and one
  backward pass, `famo`, `gls`, `scale_invariant` or `stch`. Multiplying a loss by a factor that is the same at all
  steps does not turn their directions. It may reverse the direction of `imtl_g`, whose equal projections may be
  negative.
* If one task matters, and the others are to make some progress: `pcd`.
* If some of many tasks may bring corrupt gradients: `krum`, `trimmed_mean` or `coordinate_median`.

Not here: EPO and PMGDA. They solve a linear program at each step, and there is no solver for it on the device.

## Properties

* *options*: with their defaults; `pref=None` weighs all tasks alike.
* *scale*: what the direction is like for orthogonal task gradients of equal length: their sum (`graddrop`: on
  average), their mean, or the weights' own convention.
* *conflicts with no task*: whether no task gradient has a negative product with the direction, or under which
  condition, in the docstring's symbols. "up to reg_eps": apart from what the ridge changes. "if independent": by more
  than float32's rounding of G.
* *linear*: whether d is linear in factors a_t > 0 that multiply the task gradients, the same at all steps.
* *state*: what `state_dict` holds, with default options.
* *fixed tasks*: whether every step must have the tasks of the first one, because the state holds something for each
  task. Options with one number per task, such as `pref`, also fix them.
* *random*: whether it draws random numbers. They depend on a seed and the step alone: the same on every rank, and no
  global generator is read.
* *weighs heads*: whether w_t also multiplies the gradients of parameters that only loss t reaches.
* `granularity="per_group"` and `"per_tensor"` are for methods that weigh no heads and keep no buffers.
* *backward passes*: of `SurgeryOptimizer.backward` for T losses.
* *cost*: operations on one T x T problem, in addition to the passes over the gradients.

No method reads a value on the host: G, weights and state stay on the gradients' device. `tests/test_properties.py`
checks this for the plain PyTorch of each method, `tests/test_cuda.py` for the CUDA kernels. The latter also captures
whole steps in CUDA graphs, on a GPU so far for `pcgrad`, `mgda` and `gradnorm`.

"""


def text() -> str:
    """Return the page."""
    rows = [list(_COLUMNS), ["---"] * len(_COLUMNS)]
    rows += [[cell(get(name)) for cell in _COLUMNS.values()] for name in available()]
    return _TEXT + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _yes(value: bool | str) -> str:
    return value if isinstance(value, str) else "yes" if value else "no"


def _options(method: Method) -> list[str]:
    parameters = inspect.signature(type(method)).parameters.values()
    return [f"**{p.name}" if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]


def _passes(method: Method) -> str:
    return "T" if method.num_batches == 1 else f"T per batch, of 1 or {method.num_batches}"


if __name__ == "__main__":
    print(text(), end="")
