# SPDX-License-Identifier: MIT
"""What a method keeps when a call fails, when parameters change, and when values are out of the usual range."""

import math

import pytest
import torch

import gradsurgery
from gradsurgery.backends.simplex import project_on_simplex
from gradsurgery.methods import excess_mtl
from inputs import normal

methods = gradsurgery.methods
EYE = torch.eye(3, dtype=torch.float64)
WITHOUT_WEIGHTS = {"coordinate_median", "db_mtl", "excess_mtl", "graddrop", "m_config", "moco", "trimmed_mean"}
NEW = {
    "cr_mogm": "weights",
    "gradnorm": "weights",
    "gradvac": "targets",
    "modo": "weights",
    "pcd": "averages",
    "sdmgrad": "weights",
}


@pytest.mark.parametrize("name", NEW)
def test_a_first_call_that_fails_begins_nothing(name):
    method = methods.get(name, **({"method": "pcgrad"} if name == "cr_mogm" else {}))
    for gram in (torch.ones(2, 3), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises((TypeError, ValueError)):
            method.weights(gram, losses=torch.ones(2))
    if name not in ("modo", "sdmgrad"):  # these two need no backend
        with pytest.raises(RuntimeError, match="cannot serve this call"):
            method.weights(torch.ones(2, 2, device="cpu"), losses=torch.ones(2), backend="cuda")
    assert method.state_dict()[NEW[name]] is None
    method.weights(EYE, losses=torch.ones(3))


def test_options_for_other_tasks_begin_nothing():
    method = methods.get("sdmgrad", pref=[0.5, 0.5])
    with pytest.raises(ValueError, match="pref must hold one number for each of 3 tasks, got 2"):
        method.weights(EYE)
    method.weights(EYE[:2, :2])
    averaged = methods.get("cr_mogm", method="pcgrad")
    averaged.weights(EYE[:2, :2])
    with pytest.raises(ValueError, match=r"'cr_mogm' is for weights of shape \(2,\), got \(3,\)"):
        averaged.weights(EYE)
    assert averaged.method.state_dict()["step"] == 1


@pytest.mark.parametrize("name", ["moco", "db_mtl"])
def test_losses_for_other_tasks_begin_nothing(name):
    method = methods.get(name)
    for losses in (torch.ones(1), torch.ones(3)):
        with pytest.raises(ValueError, match=r"needs losses, a tensor \[2\], got a tensor of shape"):
            gradsurgery.aggregate(normal(2, 5), method, losses=losses)
    assert method.state_dict()["buffers"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buffers": "abc"}, "buffers must be T lists of tensors, got str 'abc'"),
        ({"buffers": [1, 2]}, "buffers must be T lists of tensors, got list"),
        ({"buffers": []}, "buffers must be of the same shapes and dtypes"),
        ({"buffers": [[torch.ones(2)], [torch.ones(3)]]}, "buffers must be of the same shapes and dtypes"),
        ({"w": torch.ones(7)}, r"w must be a tensor of shape \(2,\) in torch.float64, got a tensor of shape \(7,\)"),
        (
            {"w": torch.ones(2)},
            r"w must be a tensor of shape \(2,\) in torch.float64, got a tensor .* in torch.float32",
        ),
    ],
)
def test_states_of_kept_gradients_that_cannot_be(change, message):
    method = methods.get("moco")
    gradsurgery.aggregate(normal(2, 5), method, losses=torch.ones(2))
    state = method.state_dict()
    for other in (methods.get("moco"), method):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict({**state, **change})
    torch.testing.assert_close(method.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["moco", "db_mtl"])
def test_a_state_of_another_dtype_than_the_steps_before(name):
    rows, used, fresh = normal(2, 50), methods.get(name), methods.get(name)
    of_float32 = methods.get(name)
    gradsurgery.aggregate(rows, of_float32, losses=torch.ones(2))
    gradsurgery.aggregate(rows.bfloat16(), used, losses=torch.ones(2))
    directions = []
    for method in (used, fresh):
        method.load_state_dict(of_float32.state_dict())
        directions.append(gradsurgery.aggregate(rows, method, losses=torch.ones(2)))
    assert torch.equal(*directions)


@pytest.mark.parametrize("name", ["excess_mtl", "m_config"])
def test_losses_that_a_method_does_not_need_do_not_count(name):
    expected = gradsurgery.aggregate(normal(2, 5), name)
    for losses in (torch.tensor([math.nan, 1.0]), torch.ones(3)):
        assert torch.equal(gradsurgery.aggregate(normal(2, 5), name, losses=losses), expected)


def test_kept_gradients_stay_with_their_parameters():
    a, b = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([a, b], lr=0.1), "moco")
    optimizer.backward([a.sum(), a.square().sum()])
    with pytest.raises(
        ValueError, match="shared parameters, which must be the same at each step: name them by shared="
    ):
        optimizer.backward([b.sum(), b.square().sum()])
    assert b.grad is None
    optimizer.backward([a.sum(), a.square().sum()])


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e20), (torch.float32, 1e-20), (torch.float16, 300.0), (torch.float16, 1e-4)]
)
def test_excess_risks_in_the_whole_range(dtype, scale):
    method, expected = methods.get("excess_mtl", eta=0.3), methods.get("excess_mtl", eta=0.3)
    for step in range(3):
        rows = normal(3, 40, seed=step).clamp(-3, 3)
        gradsurgery.aggregate((scale * rows).to(dtype), method)
        gradsurgery.aggregate(rows, expected)
    got, wanted = (m.state_dict()["w"] for m in (method, expected))
    torch.testing.assert_close(got, wanted, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=0)
    assert (wanted != 1).all()


def test_excess_risks_of_many_16_bit_gradients():
    """In the gradients' own dtype the sums of their squares would overflow, or stop growing after 1 / eps steps."""
    for dtype, size, steps in ((torch.bfloat16, 300.0, 300), (torch.float16, 6e4, 5)):
        method = methods.get("excess_mtl", eta=0.3)
        for _ in range(steps):
            gradsurgery.aggregate(torch.tensor([[size, 1.0], [1.0, size]], dtype=dtype), method)
        roots = method.state_dict()["buffers"]
        expected = torch.tensor([[size], [1.0]], dtype=dtype).float() * steps**0.5
        torch.testing.assert_close(roots[0][0].view(2, 1), expected, rtol=1e-5, atol=0)


def test_the_first_excess_risks_are_sums_of_magnitudes():
    method, rows = methods.get("excess_mtl"), normal(3, 40, torch.float32)
    gradsurgery.aggregate(rows, method)
    torch.testing.assert_close(method.state_dict()["first"], rows.double().abs().sum(1), rtol=1e-6, atol=0)


def test_excess_risks_in_several_chunks(monkeypatch):
    shapes = [(3,), (0, 5), (4, 2), (7,), (5,)]
    results = []
    for size in (1 << 20, 130, 50):
        monkeypatch.setattr(excess_mtl, "_piece_bytes", lambda device, size=size: size)
        method = methods.get("excess_mtl", eta=0.3)
        for step in range(3):
            rows = [[normal(1, 8, seed=4 * step + t)[0][: math.prod(s)].reshape(s) for s in shapes] for t in range(2)]
            rows[1][3] = None
            if step == 1:
                rows = [[*row[:2], row[2].t().contiguous().t(), *row[3:]] for row in rows]
            d = gradsurgery.aggregate(rows, method)
        results.append([*d, method.state_dict()["w"]])
    for others in results[1:]:
        torch.testing.assert_close(results[0], others, rtol=1e-13, atol=0)
    assert (results[0][-1] != 1).all()


class WithoutBackend:
    def weights(self, gram, *, losses=None):
        return gram.diagonal(dim1=-2, dim2=-1)


def test_weights_of_a_users_own_need_no_backend_option():
    class Inherits(WithoutBackend, methods.Method):
        pass

    class Patched(methods.Method):
        pass

    Patched.weights = torch.no_grad()(WithoutBackend.weights)
    own = methods.Method()
    own.weights = WithoutBackend().weights
    for method in (Inherits(), Patched(), own):
        d = gradsurgery.aggregate(EYE, method, backend="reference")
        assert d.tolist() == [1.0, 1.0, 1.0]


def tensors(value):
    """All tensors that an object holds."""
    if isinstance(value, torch.Tensor):
        return [value]
    held = vars(value) if isinstance(value, methods.Method) else value
    held = held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else []
    return [tensor for item in held for tensor in tensors(item)]


@pytest.mark.parametrize("name", [name for name in methods.available() if methods.get(name).state_dict()])
def test_a_loaded_state_takes_the_old_ones_memory(name):
    """A captured CUDA graph goes on with the same tensors, so loading a state must write into them."""
    first, later = methods.get(name), methods.get(name)
    for method, steps in ((first, 1), (later, 3)):
        for step in range(steps):
            gradsurgery.aggregate(normal(3, 5, seed=step), method, losses=1 + normal(1, 3, seed=step)[0].abs())
    before = tensors(first)
    first.load_state_dict(later.state_dict())
    assert before
    assert all(a is b for a, b in zip(before, tensors(first), strict=True))
    torch.testing.assert_close(first.state_dict(), later.state_dict(), rtol=0, atol=0)


def test_the_simplex_of_large_values():
    for scale in (1e10, 1e18, 1e300):
        w = project_on_simplex(-scale * torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64))
        assert w.tolist() == [0.5, 0.5, 0]


@pytest.mark.parametrize("name", sorted({*methods.available()} - WITHOUT_WEIGHTS))
def test_weights_are_constants_to_autograd(name):
    expect_constants(methods.get(name))


def test_states_that_cannot_be():
    for weights in (
        torch.ones(()),
        torch.ones(0),
        torch.ones(2).to_sparse(),
        torch.ones(2).long(),
        torch.ones(2, dtype=torch.complex128),
    ):
        wanted = r"weights must be a tensor (\[..., T\]|of shape .*), got a tensor of shape \(.*\) in torch"
        with pytest.raises(ValueError, match=wanted):
            methods.get("cr_mogm").load_state_dict({"weights": weights, "method": {}})
        for name in ("modo", "sdmgrad"):
            with pytest.raises(ValueError, match=wanted):
                methods.get(name).load_state_dict({"weights": weights})
    for state in (None, torch.ones(2)):
        with pytest.raises(ValueError, match="method must be the other method's state, a dict, got"):
            methods.get("cr_mogm").load_state_dict({"weights": None, "method": state})
    # A state with one wrong part is refused as a whole: its right part is not loaded either.
    method, ones = methods.get("cr_mogm", method="pcgrad"), torch.ones(2)
    for state in (
        {"weights": ones, "method": {"seed": 0, "step": 3}},
        {"weights": ones.long(), "method": {"seed": 7, "step": torch.tensor(9)}},
    ):
        with pytest.raises(ValueError, match=r"(step|weights) must be"):
            method.load_state_dict(state)
    assert method.state_dict() == {"weights": None, "method": {"seed": 0, "step": torch.tensor(0)}}
    weights = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"initial_losses must be a tensor of shape .*, got NoneType"):
        methods.get("gradnorm").load_state_dict({"weights": weights, "initial_losses": None})
    with torch.device("meta"):
        assert methods.get("pcgrad").state_dict()["step"].device.type == "cpu"


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_weights_of_rescaled_gradients_are_constants(normalization):
    expect_constants(methods.MGDA(normalization))


def test_averages_of_weights_with_a_graph_keep_none_of_it():
    class Trained(methods.Method):
        scores = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))

        def weights(self, gram, *, losses=None):
            return self.scores.softmax(0)

    method = methods.get("cr_mogm", method=Trained())
    expect_constants(method)
    assert method.state_dict()["weights"].grad_fn is None


def expect_constants(method):
    gram = EYE.clone().requires_grad_()
    for _ in range(2):
        weights = method.weights(gram, losses=torch.tensor([1.0, 2.0, 3.0]))
        with pytest.raises(gradsurgery.NotDifferentiableError, match="weights is a constant to autograd"):
            weights.sum().backward()
    assert not any(v.requires_grad for v in method.state_dict().values() if isinstance(v, torch.Tensor))


def test_dependent_float32_gradients_have_a_direction():
    """Rounding to float32 turns zero eigenvalues of the cosines into ones far above float64's rounding errors."""
    for seed in range(5):
        basis = normal(4, 10_000, torch.float32, seed=seed)
        rows = torch.cat([basis, basis[:1] + 0.7 * basis[1:2]])
        for name in ("imtl_g", "config"):
            d = gradsurgery.aggregate(rows, name)
            assert d.norm() > 0.1 * rows.norm(dim=1).min()


@pytest.mark.parametrize("tasks", [40, 64])
def test_many_stationary_gradients(tasks):
    """Gradients for which block principal pivoting alone would cycle."""
    for seed in range(20):
        rank = tasks // 4 * (1 + seed % 3)
        rows = normal(tasks, rank, seed=seed) @ normal(rank, 200, seed=100 + seed)
        gram, mean = gradsurgery.gram(rows), rows.mean(0)
        d = methods.get("cagrad", c=1.5).weights(gram) @ rows
        assert (d - mean).norm() <= 1.5001 * mean.norm()
        assert (rows @ d >= -1e-4 * rows.norm(dim=1) * mean.norm()).all()
        u = torch.full((tasks,), 1 / tasks, dtype=torch.float64)
        v = methods.get("dualproj", reg_eps=1e-7).weights(gram)
        y = (gram / gram.trace() + 1e-7 * torch.eye(tasks)) @ v
        size = (v @ y).sqrt()
        assert (y >= -1e-8 * size).all()
        assert ((v - u) * y).abs().max() <= 1e-8 * (v - u).max() * size


def test_weights_of_16_bit_losses_are_not_rounded():
    grads = []
    for dtype in (torch.float64, torch.bfloat16):
        p = torch.nn.Parameter(torch.ones(4, dtype=torch.float64))
        optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([p], lr=0.1), "random")
        optimizer.backward([p.sum().to(dtype), (2 * p).sum().to(dtype)])
        grads.append(p.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(set(methods.available()) - WITHOUT_WEIGHTS))
def test_weights_are_float64_and_what_is_no_gram_matrix_begins_nothing(name):
    check_boundary(lambda: methods.get(name))


@pytest.mark.parametrize("normalization", ["l2", "loss", "loss+"])
def test_rescaled_gradients_have_float64_weights_too(normalization):
    check_boundary(lambda: methods.get("mgda", normalization=normalization))
    rows = normal(5, 40, seed=3)
    gram, losses = gradsurgery.gram(rows).bfloat16(), torch.linspace(0.5, 1.5, 5)
    method = methods.get("mgda", normalization=normalization)
    got, expected = (method.weights(g, losses=losses) for g in (gram, gram.double()))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize("normalization", ["loss", "loss+"])
def test_losses_that_no_gradient_can_be_divided_by(normalization):
    for loss in (torch.inf, torch.nan, -1.0):
        for combine in ("original", "normalized"):
            method = methods.get("mgda", normalization=normalization, combine=combine)
            assert method.weights(EYE, losses=torch.tensor([1.0, loss, 2.0])).isnan().all()


def check_boundary(new):
    """Check, for three tasks, that weights are float64, and that wrong arguments raise and leave the state alone."""
    losses = torch.tensor([1.0, 2.0, 3.0])
    weights = new().weights(torch.eye(3), losses=losses)
    assert (weights.dtype, weights.shape) == (torch.float64, (3,))
    method = new()
    before = str(method.state_dict())
    for bad in (torch.eye(3, dtype=torch.int64), torch.ones(2, 3), torch.ones(3), torch.ones(0, 0), [[1.0]], None):
        with pytest.raises((TypeError, ValueError), match="gram must be"):
            method.weights(bad, losses=losses)
    if method.needs_losses:
        for bad in (torch.ones(2), torch.ones(3, 1), [1.0, 2.0, 3.0], None):
            error = TypeError if isinstance(bad, list) else ValueError
            with pytest.raises(error, match="needs losses, a tensor"):
                method.weights(torch.eye(3), losses=bad)
    assert str(method.state_dict()) == before


class Averaging(methods.Method):
    """A user's own method with a state, written as the README describes."""

    needs_losses = weights_losses = True
    average = None

    def weights(self, gram, *, losses=None):
        self.average = losses.clone() if self.average is None else (self.average + losses) / 2
        return 1 / self.average

    def state_dict(self):
        return {"average": None if self.average is None else self.average.clone()}

    def load_state_dict(self, state):
        self.average = None if state["average"] is None else state["average"].clone()


def test_the_state_of_a_method_of_ones_own():
    def optimizer():
        return gradsurgery.SurgeryOptimizer(torch.optim.SGD([shared, head], lr=0.1), Averaging())

    shared, head = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    one, other = optimizer(), optimizer()
    for k in (1.0, 2.0):
        one.zero_grad()
        info = one.backward([k * shared.sum(), 5 * (shared * head).sum()])
    torch.testing.assert_close(info.weights, 1 / torch.tensor([4.5, 15.0], dtype=torch.float64))
    torch.testing.assert_close(head.grad, torch.full((3,), 5 / 15))
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.method.average, one.method.average)


@pytest.mark.parametrize("name", ["pcgrad", "mgda"])
def test_weights_of_losses_weigh_what_no_kernel_reads(name):
    shared, head = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    method = methods.get(name)
    method.weights_losses = True
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([shared, head], lr=0.1), method, shared=[shared])
    x = torch.tensor([1.0, 2.0])
    info = optimizer.backward([(shared * x).sum() + 2 * head.real.sum(), -(shared * x.flip(0)).sum()])
    torch.testing.assert_close(head.grad, 2 * info.weights[0] * torch.ones(2, dtype=torch.complex64), check_dtype=False)
