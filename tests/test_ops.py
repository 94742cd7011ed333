# SPDX-License-Identifier: MIT
"""The custom operators as PyTorch sees them, and the arguments that they refuse in direct calls."""

import pytest
import torch

import gradsurgery
from conftest import USABLE, on_cpu
from inputs import DEVICE, normal

if DEVICE not in USABLE:
    pytest.skip(gradsurgery.backends()[DEVICE], allow_module_level=True)

OPS = torch.ops.gradsurgery
PLACE = "cpu" if DEVICE == "cpu" else ".*"
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float64)


ROWS = normal(3, 40, torch.float32)
LISTS = [ROWS[0, :12].reshape(3, 4), None, ROWS[0, :5], ROWS[1, :12].reshape(3, 4), ROWS[1, :7], None]
GRAM = (ROWS @ ROWS.T).double()[None]
STEP = torch.tensor(4)
ONES = torch.ones(1, 3, dtype=torch.float64)
SAMPLES = {
    "gram": (OPS.gram.default, (ROWS, [0, 9, 40], empty(2, 3, 3))),
    "gram_list": (OPS.gram.list, (LISTS, 2, [0, 1, 0], empty(2, 2, 2))),
    "combine": (OPS.combine.default, (ROWS, ONES, [], False, torch.empty(40))),
    "combine_list": (
        OPS.combine.list,
        (LISTS, torch.ones(1, 2).double(), [], True, [torch.zeros(3, 4), torch.zeros(7), torch.zeros(5)]),
    ),
    "graddrop": (OPS.graddrop.default, (ROWS, 1, STEP, torch.ones(3).double(), False, torch.empty(40))),
    "graddrop_list": (
        OPS.graddrop.list,
        (LISTS, 2, 1, STEP, None, True, [torch.zeros(3, 4), torch.zeros(7), torch.zeros(5)]),
    ),
    "trimmed_mean": (OPS.trimmed_mean.default, (ROWS, 1, False, torch.empty(40))),
    "trimmed_mean_list": (
        OPS.trimmed_mean.list,
        (LISTS, 2, 0, True, [torch.zeros(3, 4), torch.zeros(7), torch.zeros(5)]),
    ),
    "task_order": (OPS.task_order.default, (3, 1, STEP, torch.empty(3, 3, dtype=torch.int64))),
    "random": (OPS.random.default, (GRAM, 1, STEP, empty(1, 3))),
    "simplex_steps": (OPS.simplex_steps.default, (GRAM, 0.1, 0.5, 3, ONES / 3)),
    "pcgrad": (OPS.pcgrad.default, (GRAM, None, 0, STEP, True, False, empty(1, 3))),
    "pcgrad_order": (OPS.pcgrad.default, (GRAM, torch.arange(3).repeat(3, 1), 0, STEP, False, True, empty(1, 3))),
    "min_norm": (OPS.min_norm.default, (GRAM, True, 250, 1e-6, empty(1, 3))),
    "weights": (OPS.weights.default, (GRAM, 0, torch.ones(3).double(), 1e-4, 1.0, empty(1, 3))),
    "gradvac": (
        OPS.gradvac.default,
        (GRAM, torch.arange(3).repeat(3, 1), 0.1, torch.zeros(1, 3, 3).double(), empty(1, 3)),
    ),
    "aggregate_pcgrad": (OPS.aggregate_pcgrad.default, (ROWS, [0, 9, 40], 0, STEP, False, torch.empty(40))),
    "aggregate_pcgrad_once": (OPS.aggregate_pcgrad.default, (ROWS, [], 0, None, True, torch.empty(40))),
    "aggregate_min_norm": (OPS.aggregate_min_norm.default, (ROWS, [], True, 250, 1e-6, torch.empty(40))),
    "aggregate_weights": (
        OPS.aggregate_weights.default,
        (ROWS, [0, 9, 40], 0, torch.ones(3).double(), 1e-4, 1.0, torch.empty(40)),
    ),
    "gradnorm": (OPS.gradnorm.default, (ONES, ONES, ONES, ONES, 1.5, 0.025, empty(1, 3))),
    "gradnorm_step": (OPS.gradnorm_step.default, (GRAM, ONES, 1.5, 0.025, ONES.clone(), ONES.clone(), empty(1, 3))),
}


def test_every_operator_has_a_sample():
    names = {schema for schema in torch._C._dispatch_get_all_op_names() if schema.startswith("gradsurgery::")}
    assert {
        op._name if op._overloadname == "list" else op._name.removesuffix(".default") for op, _ in SAMPLES.values()
    } == names


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    op, arguments = SAMPLES[name]
    assert set(torch.library.opcheck(op, arguments, test_utils=CHECKS).values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("gram", 0, ROWS[0], r"grads must be \[T, N\] with a contiguous last dimension, got shape \[40\]"),
        ("gram", 0, ROWS.T, r"grads must be \[T, N\] with a contiguous last dimension"),
        ("gram", 0, ROWS.int(), "float64, float32, bfloat16 or float16, got int"),
        ("gram", 1, [0, 41], "segments must ascend from 0 to 40"),
        ("gram", 1, [0, 30, 20, 40], "segments must ascend from 0 to 40"),
        ("gram", 1, [5, 9, 40], "segments must ascend from 0 to 40"),
        ("gram", 2, empty(1, 3, 3), rf"gram must be contiguous on {PLACE} with shape \[2, 3, 3\]"),
        ("gram", 2, torch.empty(2, 3, 3), "gram must be double"),
        ("gram_list", 1, 4, "num_tasks x P entries, got 6 entries for 4 tasks"),
        ("gram_list", 2, [0, 1], "one segment per parameter, got 2 for 3"),
        ("gram_list", 2, [0, 7, 0], "segments must be in 0..1, got 7"),
        ("gram_list", 2, [0, 2**32, 0], "segments must be in 0..1, got 4294967296"),
        ("gram_list", 0, [ROWS[0, :4], ROWS[0, :5]], r"gradient 0 must be dense with shape \[4\]"),
        ("gram_list", 0, [ROWS[0, :4], ROWS[0, :4].double()], "gradient 0 must be strided float"),
        ("gram_list", 0, [ROWS[0, :12].view(4, 3), ROWS[0, :12].view(3, 4).T], r"gradient 0 must be dense with shape"),
        ("gram_list", 0, [ROWS[0, :1].expand(4), ROWS[0, :1].expand(4)], "gradient 0 must be dense"),
        ("combine", 1, torch.ones(2, 3).double(), rf"weights must be contiguous on {PLACE} with shape \[1, 3\]"),
        ("combine", 4, torch.empty(41), rf"out must be contiguous on {PLACE} with shape \[40\]"),
        (
            "combine_list",
            4,
            [torch.zeros(3, 4), torch.zeros(7)],
            "out must hold one tensor per parameter, got 2 for 3",
        ),
        ("combine_list", 4, [torch.zeros(4, 3), torch.zeros(7), torch.zeros(5)], "gradient 0 must be dense"),
        ("graddrop", 2, torch.tensor([1, 2]), "step must be contiguous"),
        ("graddrop", 3, torch.ones(2).double(), rf"leak must be contiguous on {PLACE} with shape \[3\]"),
        ("graddrop", 5, torch.empty(41), rf"out must be contiguous on {PLACE} with shape \[40\]"),
        ("graddrop_list", 4, torch.ones(3).double(), "leak must be contiguous"),
        ("graddrop_list", 6, [torch.zeros(3, 4)], "one tensor per parameter"),
        ("trimmed_mean", 1, 2, r"num_trimmed must be in 0..1 for 3 tasks, got 2"),
        ("trimmed_mean", 0, ROWS[0], r"grads must be \[T, N\] with a contiguous last dimension"),
        ("trimmed_mean_list", 1, 5, "num_tasks x P entries, got 6 entries for 5 tasks"),
        ("trimmed_mean_list", 4, [torch.zeros(4, 3), torch.zeros(7), torch.zeros(5)], "gradient 0 must be dense"),
        ("gram", 2, empty(3, 3), rf"gram must be contiguous on {PLACE} with shape \[2, 3, 3\]"),
        ("gram_list", 3, empty(4), "gram must have 2 dimensions or one more"),
        ("combine_list", 1, empty(1, 1, 2), "weights must have 1 dimensions or one more"),
        ("pcgrad", 0, GRAM[0, 0], r"gram must be \[..., T, T\]"),
        ("pcgrad", 0, GRAM[0], rf"weights must be contiguous on {PLACE} with shape \[3\]"),
        ("pcgrad", 3, torch.tensor([1, 2]), "step must be contiguous"),
        pytest.param(
            "pcgrad_order", 1, torch.tensor([[0, 1, 1]] * 3), "order row 0 must be a permutation", marks=on_cpu
        ),
        ("weights", 1, 11, "weighting must be a gs_weighting, got 11"),
        ("weights", 1, 2**32 + 9, "weighting must be a gs_weighting, got 4294967305"),
        ("weights", 2, torch.ones(2).double(), rf"preference must be contiguous on {PLACE} with shape \[3\]"),
        ("weights", 3, 0.0, "ridge must be positive and finite, got 0"),
        pytest.param(
            "pcgrad_order", 1, torch.arange(3).repeat(2, 1), rf"order must be contiguous on {PLACE}", marks=on_cpu
        ),
        ("task_order", 2, torch.tensor([1, 2]), "step must be contiguous"),
        ("task_order", 3, torch.empty(2, 3, dtype=torch.int64), "order must be contiguous"),
        ("random", 2, torch.tensor([1, 2]), "step must be contiguous"),
        ("random", 3, empty(3), rf"weights must be contiguous on {PLACE} with shape \[1, 3\]"),
        ("simplex_steps", 0, GRAM.float(), "matrix must be double"),
        ("simplex_steps", 3, -1, "num_iter must be >= 0, got -1"),
        ("simplex_steps", 4, ONES[0], rf"weights must be contiguous on {PLACE} with shape \[1, 3\]"),
        ("gradvac", 1, torch.arange(3).repeat(2, 1), "order must be contiguous"),
        ("gradvac", 3, torch.zeros(3, 3).double(), "targets must be contiguous"),
        ("aggregate_pcgrad", 1, [0, 41], "segments must ascend from 0 to 40"),
        ("aggregate_pcgrad", 3, torch.tensor([1, 2]), "step must be contiguous"),
        ("aggregate_pcgrad", 5, torch.empty(41), rf"out must be contiguous on {PLACE} with shape \[40\]"),
        ("aggregate_min_norm", 0, ROWS.T, r"grads must be \[T, N\] with a contiguous last dimension"),
        ("aggregate_min_norm", 5, torch.empty(40).double(), "out must be float"),
        ("aggregate_weights", 0, ROWS[0], r"grads must be \[T, N\] with a contiguous last dimension"),
        ("aggregate_weights", 1, [0, 41], "segments must ascend from 0 to 40"),
        ("aggregate_weights", 2, 11, "weighting must be a gs_weighting, got 11"),
        ("aggregate_weights", 2, 2**32, "weighting must be a gs_weighting, got 4294967296"),
        ("aggregate_weights", 3, torch.ones(2).double(), rf"preference must be contiguous on {PLACE} with shape \[3\]"),
        ("aggregate_weights", 4, -1.0, "ridge must be positive and finite, got -1"),
        ("aggregate_weights", 6, torch.empty(41), rf"out must be contiguous on {PLACE} with shape \[40\]"),
        ("min_norm", 0, GRAM[:, :2], r"gram must be \[..., T, T\]"),
        ("min_norm", 4, empty(1, 2), "weights must be contiguous"),
        ("gradnorm", 1, torch.ones(1, 2).double(), "norms must be contiguous"),
        ("gradnorm", 2, torch.ones(1, 2).double(), "losses must be contiguous"),
        ("gradnorm", 3, torch.ones(1, 2).double(), "initial_losses must be contiguous"),
        ("gradnorm", 6, empty(1, 2), "new_weights must be contiguous"),
        ("gradnorm_step", 1, torch.ones(1, 2).double(), "losses must be contiguous"),
        ("gradnorm_step", 4, torch.ones(1, 2).double(), "state_weights must be contiguous"),
        ("gradnorm_step", 5, torch.ones(1, 3), "initial_losses must be double"),
    ],
)
def test_direct_calls_are_safe(name, position, value, message):
    op, arguments = SAMPLES[name]
    changed = list(arguments)
    changed[position] = value
    if name == "gram_list" and position == 0:
        changed = [value, 2, [], empty(1, 2, 2)]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        op(*changed)


def test_no_parameters_of_any_number_of_tasks_end_at_once():
    with pytest.raises(ValueError, match="gram must be contiguous"):
        torch.ops.gradsurgery.gram.list([], 2**62, [], empty(2, 2))


def test_every_solver_has_a_number_and_a_reference():
    from gradsurgery.backends.solvers import SOLVERS, solve

    assert set(gradsurgery._extension.SOLVER_NUMBERS) == set(SOLVERS)
    with pytest.raises(KeyError, match="aligned_mtl_max"):
        solve(GRAM, "aligned_mtl_max", None, 1.0, 1.0, ONES[0])


@pytest.mark.parametrize(("num_byzantine", "num_selected"), [(1e8, 1.0), (3.5, 1.0), (0.0, 4.0)])
def test_krum_of_more_than_all_ends_at_once(num_byzantine, num_selected):
    arguments = SAMPLES["weights"][1]
    krum = gradsurgery._extension.SOLVER_NUMBERS["krum"]
    with pytest.raises(ValueError, match=r"parameter must be in 0..3 and its limit in 1..3"):
        OPS.weights(arguments[0], krum, None, num_byzantine, num_selected, arguments[-1])


class Diagonal(gradsurgery.methods.Method):
    def weights(self, gram, *, losses=None):
        return gram.diagonal()


OWN = Diagonal()


@pytest.mark.parametrize(
    "function",
    [
        gradsurgery.gram,
        lambda rows: gradsurgery.combine(rows, torch.ones(3)),
        lambda rows: gradsurgery.combine([[row] for row in rows.unbind()], torch.ones(3))[0],
        lambda rows: gradsurgery.combine(rows, torch.ones(3), out=torch.empty(40)),
        lambda rows: gradsurgery.combine([[row] for row in rows], torch.ones(3), out=[torch.empty(40)])[0],
        gradsurgery.aggregate,
        lambda rows: gradsurgery.aggregate(rows, "pcgrad", out=torch.empty(40)),
        lambda rows: gradsurgery.aggregate(rows, "pcgrad", backend="reference"),
        lambda rows: gradsurgery.aggregate(rows, OWN, backend="reference"),
        lambda rows: gradsurgery.aggregate(rows, "upgrad", pref=[1.0, 2.0, 3.0]),
        lambda rows: gradsurgery.aggregate(rows, "db_mtl", losses=torch.ones(3)),
        lambda rows: gradsurgery.aggregate(rows, "moco", losses=torch.ones(3)),
        lambda rows: gradsurgery.aggregate(rows, "m_config"),
        lambda rows: gradsurgery.aggregate(rows, "excess_mtl"),
        lambda rows: gradsurgery.aggregate(rows, "random"),
        lambda rows: gradsurgery.min_norm_weights(gradsurgery.gram(rows)),
        lambda rows: gradsurgery.pcgrad_weights(gradsurgery.gram(rows), order=torch.tensor([[2, 1, 0]] * 3)),
    ],
)
def test_functions_compile_whole(function):
    for rows in (ROWS, ROWS.clone().requires_grad_()):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(rows).detach(), function(rows).detach())


def test_a_function_transform_is_told_of_constants():
    with pytest.raises(gradsurgery.NotDifferentiableError, match="constant to autograd"):
        torch.func.grad(lambda rows: gradsurgery.aggregate(rows, "mgda").sum())(ROWS)


def test_compiles_without_a_graph_break():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def gram_trace(rows):
        out = rows.new_empty(1, 3, 3, dtype=torch.float64)
        OPS.gram(rows, [], out)
        return out.sum()

    assert torch.equal(gram_trace(ROWS), gradsurgery.gram(ROWS)[None].sum())
