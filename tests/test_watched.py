# SPDX-License-Identifier: MIT
"""The reference backend in functions that are compiled, exported, traced or transformed."""

import re
from pathlib import Path

import pytest
import torch
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx

import gradsurgery
from inputs import DEVICE, normal

ROWS = normal(3, 40, torch.float32)
WEIGHTS = torch.tensor([1.0, 0, 2], dtype=torch.float64, device=DEVICE)


def as_lists(rows):
    return [[row, row[1:]] for row in rows.unbind()]


FUNCTIONS = {
    "gram": lambda rows, weights: gradsurgery.gram(rows, backend="reference"),
    "gram of lists": lambda rows, weights: gradsurgery.gram(as_lists(rows), backend="reference"),
    "combine": lambda rows, weights: gradsurgery.combine(rows, weights, backend="reference"),
    "combine of lists": lambda rows, weights: gradsurgery.combine(as_lists(rows), weights, backend="reference")[1],
    "median": lambda rows, weights: gradsurgery.aggregate(rows, "coordinate_median", backend="reference"),
}


class Module(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, rows):
        return self.function(rows, WEIGHTS)


# These would not compile if the number of columns decided what is done.
ANY_SIZE = pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "median"])


@ANY_SIZE
def test_compiled_for_any_size(name):
    module, rows = Module(FUNCTIONS[name]), normal(3, 300_000, torch.float32)
    torch._dynamo.mark_dynamic(rows, 1)  # an error, should the size be fixed
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(rows), module(rows))


@ANY_SIZE
def test_exported_for_any_size(name):
    module = Module(FUNCTIONS[name])
    sizes = ({1: Dim("columns", min=8, max=1 << 24)},)
    exported = export(module, (ROWS,), dynamic_shapes=sizes).module()
    for columns in (8, 300_000):
        rows = normal(3, columns, torch.float32)
        torch.testing.assert_close(exported(rows), module(rows))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["jit.trace", "make_fx", "functionalize"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_do_not_decide_what_is_done(how, name):
    function = FUNCTIONS[name]
    watched = {
        "jit.trace": lambda: torch.jit.trace(function, (ROWS, WEIGHTS), check_trace=False),
        "make_fx": lambda: make_fx(function)(ROWS, WEIGHTS),
        "functionalize": lambda: torch.func.functionalize(function),
    }[how]()
    others = ROWS.flip(0), WEIGHTS + 1
    torch.testing.assert_close(watched(*others), function(*others))


@pytest.mark.parametrize("name", ["combine", "median"])
def test_vmap(name):
    rows, weights = torch.stack([ROWS, ROWS.flip(1)]), torch.tensor([[1.0, 0, 2], [3, 4, 0]], device=DEVICE).double()
    got = torch.vmap(FUNCTIONS[name])(rows, weights)
    torch.testing.assert_close(got, torch.stack([FUNCTIONS[name](*each) for each in zip(rows, weights, strict=True)]))


def test_gradients_with_weight_0_do_not_count():
    rows = ROWS.clone()
    rows[1, ::7] = torch.nan
    got = make_fx(FUNCTIONS["combine"])(ROWS, WEIGHTS)(rows, WEIGHTS)
    torch.testing.assert_close(got, ROWS[0] + 2 * ROWS[2])


def test_traced_medians_of_many_tasks_stay_small():
    graph = make_fx(FUNCTIONS["median"])(normal(40, 8), WEIGHTS).graph
    assert len(graph.nodes) < 200


def test_methods_that_cannot_be_compiled_whole():
    page = (Path(__file__).parent.parent / "docs" / "limits.md").read_text()
    listed = re.search(r"whose\s+loops can end early: ([^.]*)\.", page)[1]
    untraceable = set(re.findall(r"`(\w+)`", listed))
    losses, options = torch.linspace(1, 2, 3, device=DEVICE), {"krum": {"num_byzantine": 0}}
    failed = set()
    for name in gradsurgery.methods.available():

        def function(rows, name=name):
            chosen = options.get(name, {})
            return gradsurgery.aggregate(rows, name, losses=losses, backend="reference", **chosen)

        try:
            torch.compile(function, fullgraph=True, backend="eager")(ROWS)
        except torch._dynamo.exc.TorchDynamoException:
            failed.add(name)
        torch._dynamo.reset()
    assert failed == untraceable
