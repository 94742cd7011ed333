# SPDX-License-Identifier: MIT
"""The T x T stage: golden values, the papers' properties, hostile inputs, batches."""

import math
from functools import partial

import pytest
import torch

import gradsurgery
from gradsurgery._philox import philox_words
from inputs import DEVICE, HOSTILE, TASKS, exact_gram, hostile, near_copies, normal

# The example matrix of TorchJD's documentation.
GOLDEN = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])

task_order = partial(gradsurgery.task_order, device=DEVICE)


@pytest.mark.parametrize(
    ("method", "weights", "direction"),
    [("pcgrad", [2.2222, 1.5789], [0.5848, 3.8012, 3.8012]), ("mgda", [0.6, 0.4], [0.0, 1.0, 1.0])],
)
def test_golden_values(backend, method, weights, direction):
    gram = gradsurgery.gram(GOLDEN, backend=backend)
    got = gradsurgery.methods.get(method).weights(gram, backend=backend)
    torch.testing.assert_close(got, torch.tensor(weights).double(), atol=1e-4, rtol=0)
    got = gradsurgery.aggregate(GOLDEN, method, backend=backend)
    torch.testing.assert_close(got, torch.tensor(direction), atol=1e-4, rtol=0)


def test_philox_known_answers():
    # The generator's own test vectors, from Random123's kat_vectors.
    zero = torch.zeros(1, dtype=torch.int64)
    words = philox_words(zero, 4, 0, torch.tensor(0))
    assert [f"{w:08x}" for w in words[0].tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@pytest.mark.parametrize("tasks", [*TASKS, 256])
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (1, 0), (0, 1), (2**63 - 1, 2**40 + 3)])
def test_task_order(backend, tasks, seed, step):
    order = task_order(tasks, seed=seed, step=step, backend=backend)
    assert torch.equal(order.sort(1).values, torch.arange(tasks).expand(tasks, tasks))
    assert torch.equal(order, gradsurgery.task_order(tasks, seed=seed, step=torch.tensor(step), backend="reference"))


def test_task_order_is_uniform_and_independent():
    counts = torch.zeros(3, 3, 3)
    for step in range(3000):
        order = task_order(3, seed=5, step=step)
        for i in range(3):
            counts[i, torch.arange(3), order[i]] += 1
    # 1000 are expected, with a standard deviation of 26.
    assert ((counts - 1000).abs() < 5 * 26).all()
    first, second = (task_order(64, seed=5, step=s) for s in (0, 1))
    assert (first != second).any(1).all()
    assert (first[0] != first[1]).any()


def explicit_pcgrad(rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Algorithm 1 of the paper on the gradients themselves; on the CPU: a GPU would wait for the host at each step."""
    device, rows = rows.device, rows.cpu()
    projected = rows.clone()
    for i, visits in enumerate(order.tolist()):
        for j in visits:
            product = projected[i] @ rows[j]
            if j != i and product < 0:
                projected[i] -= product / rows[j].square().sum() * rows[j]
    return projected.to(device)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", [c for c in HOSTILE if c not in ("zero", "zero row")])
def test_pcgrad_is_algorithm_1(backend, tasks, case):
    rows = hostile(tasks)[case]
    order = task_order(tasks, seed=3, step=4)
    weights = gradsurgery.pcgrad_weights(rows @ rows.T, seed=3, step=4, backend=backend)
    torch.testing.assert_close(weights, gradsurgery.pcgrad_weights(rows @ rows.T, order=order, backend=backend))
    if case in ("opposite", "rank deficient", "more tasks than parameters", "one parameter", "conflicting"):
        # There, products that are 0 except for rounding may have either sign: compare only the backends.
        expected = gradsurgery.pcgrad_weights(rows @ rows.T, order=order, backend="reference") @ rows
    else:
        expected = explicit_pcgrad(rows, order).sum(0)
    scale = rows.norm(dim=1).max()
    assert (weights @ rows - expected).abs().max() <= 1e-9 * scale
    mean = gradsurgery.pcgrad_weights(rows @ rows.T, seed=3, step=4, reduction="mean", backend=backend)
    torch.testing.assert_close(mean * tasks, weights)


@pytest.mark.parametrize("seed", range(20))
def test_pcgrad_of_two_tasks_conflicts_with_neither(backend, seed):
    rows = normal(2, 10, seed=seed)
    gram = rows @ rows.T
    weights = gradsurgery.pcgrad_weights(gram, backend=backend)
    assert (gram @ weights >= -1e-12 * gram.trace()).all()
    if gram[0, 1] >= 0:
        assert torch.equal(weights, torch.ones(2).double())


def test_pcgrad_never_projects_on_a_zero_gradient(backend):
    gram = torch.tensor([[1.0, 0.0, -0.5], [0.0, 0.0, 0.0], [-0.5, 0.0, 1.0]])
    assert torch.equal(gradsurgery.pcgrad_weights(gram, backend=backend), torch.tensor([1.5, 1.0, 1.5]).double())
    # A product that is not 0 beside a squared norm that underflowed to 0.
    odd = torch.tensor([[1.0, -1e-300], [-1e-300, 0.0]], dtype=torch.float64)
    assert torch.equal(gradsurgery.pcgrad_weights(odd, backend=backend), torch.ones(2).double())
    assert torch.equal(gradsurgery.pcgrad_weights(odd * 1e299, backend=backend), torch.ones(2).double())


def assert_shortest(gram: torch.Tensor, weights: torch.Tensor, tolerance: float = 1e-9) -> None:
    """The Karush-Kuhn-Tucker conditions of min w^T G w on the simplex."""
    value = weights @ gram @ weights
    slack = gram @ weights - value
    scale = gram.diagonal().max()
    assert (weights >= 0).all()
    assert abs(weights.sum() - 1) <= 1e-12
    assert (slack >= -tolerance * scale).all()
    assert (weights * slack).abs().max() <= tolerance * scale


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_min_norm_is_optimal(backend, tasks, case):
    gram = gradsurgery.gram(hostile(tasks)[case])
    assert_shortest(gram, gradsurgery.min_norm_weights(gram, backend=backend))


@pytest.mark.parametrize("tasks", [5, 17, 64])
def test_min_norm_resolves_rows_of_any_scale(backend, tasks):
    # The KKT conditions relative to the rows' own norms: thresholds relative to the trace would ignore small rows.
    rows = normal(tasks, 100) * torch.logspace(-8, 8, tasks, dtype=torch.float64)[:, None]
    gram = gradsurgery.gram(rows)
    weights = gradsurgery.min_norm_weights(gram, backend=backend)
    value = weights @ gram @ weights
    norms = gram.diagonal().sqrt()
    assert ((value - gram @ weights) / (norms * value.sqrt()) <= 1e-9).all()


@pytest.mark.parametrize("seed", range(3))
def test_min_norm_of_near_copies(backend, seed):
    gram = gradsurgery.gram(near_copies(64, seed))
    assert_shortest(gram, gradsurgery.min_norm_weights(gram, backend=backend), 1e-6)


def test_min_norm_of_a_float32_gram_that_is_not_quite_positive(backend):
    rows = normal(40, 3, torch.float32)
    gram = (rows @ rows.T).double()
    assert torch.linalg.eigvalsh(gram).min() < 0
    assert_shortest(gram, gradsurgery.min_norm_weights(gram, backend=backend), 1e-6)


@pytest.mark.parametrize("tasks", [2, 5, 17])
def test_min_norm_follows_a_permutation(backend, tasks):
    gram = gradsurgery.gram(normal(tasks, 200))
    permutation = torch.randperm(tasks)
    weights = gradsurgery.min_norm_weights(gram, backend=backend)
    permuted = gradsurgery.min_norm_weights(gram[permutation][:, permutation], backend=backend)
    torch.testing.assert_close(permuted, weights[permutation], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("a", "b", "weight"),
    [
        ([1.0, 0.0], [0.0, 1.0], 0.5),
        ([1.0, 0.0], [3.0, 1.0], 1.0),
        ([4.0, 1.0], [1.0, 0.0], 0.0),
        ([1.0, 0.0], [-3.0, 0.0], 0.75),
    ],
)
def test_two_task_closed_form(backend, a, b, weight):
    gram = gradsurgery.gram(torch.tensor([a, b]))
    for solver in ("exact", "frank_wolfe"):
        got = gradsurgery.min_norm_weights(gram, solver=solver, backend=backend)
        torch.testing.assert_close(got, torch.tensor([weight, 1 - weight]).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.parametrize("case", HOSTILE)
def test_frank_wolfe_is_one_algorithm(backend, tasks, case):
    gram = gradsurgery.gram(hostile(tasks)[case])
    got = gradsurgery.min_norm_weights(gram, solver="frank_wolfe", max_iter=60, backend=backend)
    expected = gradsurgery.min_norm_weights(gram, solver="frank_wolfe", max_iter=60, backend="reference")
    value, best = got @ gram @ got, gradsurgery.min_norm_weights(gram)
    assert (got >= 0).all()
    assert abs(got.sum() - 1) < 1e-12
    assert value >= best @ gram @ best - 1e-12 * gram.trace()
    assert abs(value - expected @ gram @ expected) <= 1e-6 * gram.diagonal().max()


def autograd_gradnorm(rows, weights, losses, initial, alpha, lr):
    """The paper's own procedure: differentiate L_grad by a second backward pass."""
    parameter = torch.zeros(rows.shape[1], dtype=torch.float64, requires_grad=True)
    w = weights.clone().requires_grad_()
    norms = torch.stack(
        [
            torch.autograd.grad(w[i] * (row @ parameter), parameter, create_graph=True)[0].norm()
            for i, row in enumerate(rows)
        ]
    )
    ratio = losses / initial
    target = (norms.mean() * (ratio / ratio.mean()) ** alpha).detach()
    (norms - target).abs().sum().backward()
    moved = (weights - lr * w.grad).clamp(min=0)
    return moved * len(rows) / moved.sum()


@pytest.mark.parametrize("alpha", [0.0, 0.12, 1.5])
@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 64])
def test_gradnorm_is_the_second_backward_pass(backend, tasks, alpha):
    rows = normal(tasks, 20)
    weights, losses, initial = (0.5 + normal(1, tasks, seed=s)[0].abs() for s in (2, 3, 4))
    norms = rows.norm(dim=1)
    got = gradsurgery.gradnorm_update(weights, norms, losses, initial, alpha=alpha, lr=0.02, backend=backend)
    torch.testing.assert_close(got, autograd_gradnorm(rows, weights, losses, initial, alpha, 0.02))
    assert abs(got.sum() - tasks) < 1e-12 * tasks


@pytest.mark.parametrize("loss", [math.inf, math.nan, -1.0])
def test_gradnorm_does_not_learn_from_a_loss_that_cannot_be(backend, loss):
    method, gram = gradsurgery.methods.get("gradnorm"), 4 * torch.eye(3, dtype=torch.float64, device=DEVICE)
    method.weights(gram, losses=torch.ones(3), backend=backend)
    method.weights(gram, losses=torch.tensor([2.0, 1.0, 1.0]), backend=backend)
    before = method.state_dict()
    method.weights(gram, losses=torch.tensor([loss, 1.0, 1.0]), backend=backend)
    torch.testing.assert_close(method.state_dict(), before, rtol=0, atol=0)
    for alpha in (0.0, 1.0, 2.0):  # with these, powers of negative numbers are not NaN
        for first in ([1.0, 1.0, 1.0], [loss, 1.0, 1.0]):
            method, unequal = gradsurgery.methods.get("gradnorm", alpha=alpha), torch.arange(1.0, 4.0).diag()
            method.weights(unequal, losses=torch.tensor(first), backend=backend)
            before = method.state_dict()["weights"]
            method.weights(unequal, losses=torch.tensor([loss, 1.0, 1.0]), backend=backend)
            torch.testing.assert_close(method.state_dict()["weights"], before, rtol=0, atol=0)
    one = torch.ones(3, device=DEVICE)
    losses = torch.tensor([loss, 1.0, 1.0], device=DEVICE)
    assert gradsurgery.gradnorm_update(one, one, losses, one, backend=backend).isnan().all()


def test_gradnorm_weights_stay_non_negative(backend):
    one, norms = torch.ones(3), torch.tensor([1.0, 2.0, 50.0])
    got = gradsurgery.gradnorm_update(one, norms, one, one, lr=0.025, backend=backend)
    assert got[2] == 0
    assert torch.equal(got, got.clamp(min=0))
    huge = gradsurgery.gradnorm_update(one[:1], norms[:1], one[:1], one[:1], lr=1e9, backend=backend)
    assert torch.equal(huge, torch.ones(1).double())
    stuck = gradsurgery.gradnorm_update(
        torch.tensor([2.0, 1e-9]), torch.tensor([1.0, 0.0]), one[:2], one[:2], lr=9.0, backend=backend
    )
    assert stuck.isfinite().all()


@pytest.mark.interpreted(2)
@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e-6, 1e6, 1e12, 1e20])
@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
@pytest.mark.parametrize("tasks", [2, 5, 17])
def test_scaling_the_gradients_scales_the_direction(backend, tasks, method, scale):
    rows = hostile(tasks)["conflicting"] + 0.1 * normal(tasks, 37, seed=9)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        base = gradsurgery.aggregate(rows.to(dtype), method, backend=backend).double()
        scaled = gradsurgery.aggregate((rows * scale).to(dtype), method, backend=backend).double() / scale
        assert (scaled - base).norm() <= tolerance * base.norm()


def test_min_norm_of_squares_that_are_tiny(backend):
    weights = gradsurgery.min_norm_weights(1e-80 * torch.eye(2, dtype=torch.float64), backend=backend)
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", ["pcgrad", "mgda", "gradnorm"])
@pytest.mark.parametrize("tasks", [1, 2, 9])
def test_not_finite_in_nan_out(backend, tasks, method, bad):
    rows = normal(tasks, 300, torch.float32)
    rows[-1, 7] = bad
    direction = gradsurgery.aggregate(rows, method, losses=torch.ones(tasks), backend=backend)
    assert direction.isnan().all()


def test_nan_ends_every_solver(backend):
    gram = torch.full((3, 4, 4), torch.nan)
    for solver in ("exact", "frank_wolfe"):
        assert gradsurgery.min_norm_weights(gram, solver=solver, backend=backend).isnan().all()
    assert gradsurgery.pcgrad_weights(gram, backend=backend).isnan().all()
    nan = torch.full((2,), torch.nan)
    assert gradsurgery.gradnorm_update(nan, nan, nan, nan, backend=backend).isnan().all()


def test_gradnorm_steps_over_values_that_do_not_count(backend):
    """A first loss of 0 is not taken as L(0); NaN in G or in the losses does not enter the weights."""
    generator = torch.Generator(DEVICE).manual_seed(3)
    method = gradsurgery.methods.GradNorm(alpha=0.7, lr=0.1)
    weights, initial = torch.ones(4, dtype=torch.float64), torch.full((4,), torch.nan, dtype=torch.float64)
    for step in range(6):
        rows = torch.randn(4, 9, generator=generator, dtype=torch.float64)
        losses = torch.rand(4, generator=generator, dtype=torch.float64)
        if step == 0:
            losses[2] = 0
        if step == 2:
            rows[1, 3] = torch.nan
        if step == 4:
            losses[0] = torch.nan
        gram = rows @ rows.T
        got = method.weights(gram, losses=losses, backend=backend)
        torch.testing.assert_close(got, torch.full_like(weights, torch.nan) if step == 2 else weights, equal_nan=True)
        initial = torch.where(initial > 0, initial, losses)
        if step not in (0, 2, 4):  # the loss of 0 makes the mean rate of step 0 NaN
            weights = gradsurgery.gradnorm_update(weights, gram.diagonal().sqrt(), losses, initial, alpha=0.7, lr=0.1)
        torch.testing.assert_close(method.state_dict()["weights"], weights)
        torch.testing.assert_close(method.state_dict()["initial_losses"], initial)
    assert not torch.equal(weights, torch.ones(4, dtype=torch.float64))


@pytest.mark.interpreted(0)
@pytest.mark.parametrize("tasks", [1, 2, 8, 33])
def test_batches_equal_loops(backend, tasks):
    grams = torch.stack([rows @ rows.T for rows in list(hostile(tasks).values()) * 4]).reshape(4, -1, tasks, tasks)
    grams[1, 2, 0, 0] = torch.nan
    for function in (
        lambda g: gradsurgery.pcgrad_weights(g, seed=1, step=2, backend=backend),
        lambda g: gradsurgery.min_norm_weights(g, backend=backend),
        lambda g: gradsurgery.min_norm_weights(g, solver="frank_wolfe", max_iter=30, backend=backend),
    ):
        batched = function(grams)
        assert batched.shape == grams.shape[:-1]
        for index in torch.cartesian_prod(torch.arange(4), torch.arange(grams.shape[1])):
            one = function(grams[tuple(index)])
            if backend == "reference":
                # Batched matrix products may sum in another order.
                norm = (
                    one @ grams[tuple(index)] @ one
                    - batched[tuple(index)] @ grams[tuple(index)] @ batched[tuple(index)]
                ).abs()
                assert norm.isnan() or norm <= 1e-9 * grams[tuple(index)].diagonal().max()
            else:
                assert torch.equal(one, batched[tuple(index)]) or (one.isnan() & batched[tuple(index)].isnan()).all()
    values = [0.5 + normal(1, 12 * tasks, seed=s).abs().reshape(3, 4, tasks) for s in range(4)]
    batched = gradsurgery.gradnorm_update(*values, backend=backend)
    assert torch.equal(batched[2, 1], gradsurgery.gradnorm_update(*(v[2, 1] for v in values), backend=backend))


def test_empty_batch(backend):
    assert gradsurgery.pcgrad_weights(torch.zeros(0, 3, 3), backend=backend).shape == (0, 3)
    assert gradsurgery.min_norm_weights(torch.zeros(0, 3, 3), backend=backend).shape == (0, 3)


@pytest.mark.parametrize(
    ("normalization", "scale"),
    [("none", [1, 1, 1]), ("l2", [3, 4, 5]), ("loss", [2, 1, 0.5]), ("loss+", [6, 4, 2.5])],
)
@pytest.mark.parametrize("combine", ["original", "normalized"])
def test_mgda_normalizations(backend, normalization, scale, combine):
    rows = torch.nn.functional.normalize(normal(3, 40)) * torch.tensor([[3.0], [4.0], [5.0]])
    losses, scale = torch.tensor([2.0, 1.0, 0.5]), torch.tensor(scale).double()
    got = gradsurgery.aggregate(
        rows, "mgda", losses=losses, backend=backend, normalization=normalization, combine=combine
    )
    scaled = rows / scale[:, None]
    weights = gradsurgery.min_norm_weights(scaled @ scaled.T)
    torch.testing.assert_close(got, weights @ (rows if combine == "original" else scaled))


def test_mgda_leaves_a_zero_row_unscaled(backend):
    rows = normal(3, 10)
    rows[1] = 0
    for normalization in ("l2", "loss+"):
        got = gradsurgery.aggregate(rows, "mgda", losses=torch.ones(3), backend=backend, normalization=normalization)
        assert torch.equal(got, torch.zeros(10).double())


def test_methods_carry_state_only_when_given(backend):
    rows = normal(17, 5)
    assert torch.equal(gradsurgery.aggregate(rows, backend=backend), gradsurgery.aggregate(rows, backend=backend))
    method = gradsurgery.methods.get("pcgrad")
    first, second = (gradsurgery.aggregate(rows, method, backend=backend) for _ in range(2))
    assert not torch.equal(first, second)
    restored = gradsurgery.methods.get("pcgrad", seed=9)
    restored.load_state_dict(method.state_dict())
    assert torch.equal(method.weights(rows @ rows.T), restored.weights(rows @ rows.T))


def test_segments_get_surgery_separately(backend):
    rows = normal(5, 90, torch.float32)
    got = gradsurgery.aggregate(rows, "mgda", segments=[0, 30, 90], backend=backend)
    parts = [
        gradsurgery.aggregate(part, "mgda", backend=backend)
        for part in (rows[:, :30].contiguous(), rows[:, 30:].contiguous())
    ]
    torch.testing.assert_close(got, torch.cat(parts))
    out = torch.empty(90)
    assert gradsurgery.aggregate(rows, segments=[0, 30, 90], out=out, backend=backend) is out


def test_oracle_of_the_oracle():
    # The reference's whole PCGrad chain against exact sums and the explicit algorithm.
    rows = normal(6, 50)
    order = task_order(6, seed=0, step=0)
    weights = gradsurgery.pcgrad_weights(exact_gram(rows), order=order, backend="reference")
    expected = explicit_pcgrad(rows, order).sum(0)
    assert math.isclose((weights @ rows - expected).norm(), 0, abs_tol=1e-12)
