# SPDX-License-Identifier: MIT
"""What only a GPU can get wrong: synchronisation, CUDA graphs, streams, devices."""

from contextlib import contextmanager, suppress
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import gradsurgery
from conftest import needs_a_gpu, two_losses, two_task_net

needs_a_gpu()
pytestmark = [
    pytest.mark.usefixtures("no_default_device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning"),
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning"),
]

METHODS = gradsurgery.methods.available()
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": partial(torch.optim.Adam, lr=0.01, capturable=True),
}


def conflicting(tasks, columns, seed=1):
    """Gradients for which PCGrad's result depends on the visiting order."""
    generator = torch.Generator("cuda").manual_seed(seed)
    rows = torch.randn(tasks, columns, generator=generator, device="cuda")
    return rows - 2 * rows.mean(0)


def as_lists(rows):
    sizes = [1, 64, 1003, rows.shape[1] - 1068]
    return [list(row.split(sizes)) for row in rows]


FORMS = {"flat": lambda rows: rows, "list": as_lists}


def assert_same_bits(a, b):
    for x, y in zip(a, b, strict=True) if isinstance(a, list) else [(a, b)]:
        assert torch.equal(x, y)


@contextmanager
def no_sync():
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_synchronisation_is_seen():
    one = torch.ones(1, device="cuda")
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        one.item()


CALLS = {
    "task_order": lambda a: gradsurgery.task_order(9, seed=1, step=a.step),
    "pcgrad_weights": lambda a: gradsurgery.pcgrad_weights(a.gram, step=a.step),
    "pcgrad_weights, step by value": lambda a: gradsurgery.pcgrad_weights(a.gram, step=7),
    "pcgrad_weights, order": lambda a: gradsurgery.pcgrad_weights(a.gram, order=a.order),
    "min_norm_weights": lambda a: gradsurgery.min_norm_weights(a.gram),
    "min_norm_weights, batch": lambda a: gradsurgery.min_norm_weights(a.gram.expand(3, 9, 9)),
    "min_norm_weights, frank_wolfe": lambda a: gradsurgery.min_norm_weights(a.gram, solver="frank_wolfe"),
    "gradnorm_update": lambda a: gradsurgery.gradnorm_update(a.losses, a.losses, a.losses, a.losses),
    "a fresh pcgrad": lambda a: gradsurgery.methods.PCGrad().weights(a.gram),
    "a pcgrad": lambda a: a.pcgrad.weights(a.gram),
    "a gradnorm": lambda a: a.gradnorm.weights(a.gram, losses=a.losses),
    "a scaled mgda": lambda a: gradsurgery.methods.MGDA(normalization="loss+").weights(a.gram, losses=a.losses),
}
FORM_CALLS = {
    "gram": lambda a, grads: gradsurgery.gram(grads),
    "combine": lambda a, grads: gradsurgery.combine(grads, a.losses),
    **{
        name: lambda a, grads, name=name: gradsurgery.aggregate(grads, name, losses=a.losses)
        for name in ("pcgrad", "mgda", "gradnorm")
    },
}


def call_arguments():
    rows = conflicting(9, 5000)
    step = torch.tensor(3, device="cuda")
    return SimpleNamespace(
        rows=rows,
        gram=gradsurgery.gram(rows),
        step=step,
        order=gradsurgery.task_order(9, seed=0, step=step),
        losses=torch.linspace(1, 2, 9, device="cuda"),
        pcgrad=gradsurgery.methods.PCGrad(),
        gradnorm=gradsurgery.methods.GradNorm(),
    )


@pytest.mark.parametrize("name", CALLS)
def test_weights_do_not_synchronise(name):
    arguments = call_arguments()
    CALLS[name](arguments)
    with no_sync():
        CALLS[name](arguments)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FORM_CALLS)
def test_streaming_stages_do_not_synchronise(name, form):
    arguments = call_arguments()
    grads = FORMS[form](arguments.rows)
    FORM_CALLS[name](arguments, grads)
    with no_sync():
        FORM_CALLS[name](arguments, grads)


@pytest.mark.parametrize("method", ["mgda", "upgrad", "cagrad", "nash_mtl", "aligned_mtl"])
def test_the_reference_solves_on_the_host(method):
    gram = gradsurgery.gram(conflicting(9, 5000))
    weights = gradsurgery.methods.get(method).weights
    got = weights(gram, backend="reference")
    assert got.is_cuda
    assert torch.equal(got.cpu(), weights(gram.cpu(), backend="reference"))


def known(*infos):
    """Compute all diagnostics that the infos have."""
    for info in infos:
        for field in ("weights", "norms", "cosines", "conflicts", "magnitude_similarity", "update_norm", "finite"):
            with suppress(ValueError):
                getattr(info, field)


@pytest.mark.parametrize(
    ("method", "granularity"), [*((m, "global") for m in METHODS), ("pcgrad", "per_tensor"), ("mgda", "per_group")]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_step_does_not_synchronise(method, granularity, scaled):
    net = two_task_net().cuda()
    optimizer = gradsurgery.SurgeryOptimizer(OPTIMIZERS["sgd"](net.parameters()), method, granularity=granularity)
    scaler = torch.amp.GradScaler("cuda") if scaled else None
    x = torch.randn(8, 6, device="cuda")

    def step():
        optimizer.zero_grad()
        info = optimizer.backward(two_losses(net, x), scaler=scaler)
        optimizer.step()
        optimizer.zero_grad()
        for _ in range(max(1, optimizer.method.num_batches - 1)):
            optimizer.collect(two_losses(net, x), scaler=scaler)
        known(info, optimizer.backward(two_losses(net, x), scaler=scaler))
        optimizer.step()

    step()
    with no_sync():
        step()


def test_a_step_of_one_loss_does_not_synchronise():
    net = two_task_net().cuda()
    optimizer = gradsurgery.MConFIG(torch.optim.SGD(net.parameters(), lr=0.1))
    x = torch.randn(8, 6, device="cuda")
    optimizer.backward(two_losses(net, x))
    with no_sync():
        for present in range(2):
            optimizer.zero_grad()
            optimizer.backward([loss if t == present else None for t, loss in enumerate(two_losses(net, x))])
            optimizer.step()


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_shared_gradients_stays_on_the_gpu(method):
    weight, other = (torch.nn.Parameter(torch.ones(2, device="cuda")) for _ in range(2))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([weight], lr=0.1), method, backend="cuda")
    optimizer.backward([weight[0], weight[1]])
    weight.requires_grad_(False)
    losses = [other[0], 2 * other[1]]
    with no_sync():
        info = optimizer.backward(losses)
    assert weight.grad.isfinite().all()
    if method in ("pcgrad", "mgda", "db_mtl"):
        assert info.gram.device == weight.device
        assert torch.equal(info.gram, torch.zeros_like(info.gram))


def capture(call):
    """Run the call once, then capture it; return the CUDA graph, and what the captured call returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = call()
    return graph, result


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_replays_equal_eager_calls(method, form):
    captured, eager = (gradsurgery.methods.get(method) for _ in range(2))
    rows, losses = conflicting(9, 5000), torch.linspace(1, 2, 9, device="cuda")
    grads = FORMS[form](rows)
    gradsurgery.aggregate(grads, eager, losses=losses)
    graph, direction = capture(lambda: gradsurgery.aggregate(grads, captured, losses=losses))
    for seed in (2, 3, 4):
        rows.copy_(conflicting(9, 5000, seed))
        losses.copy_(0.9 * losses.roll(1))
        graph.replay()
        assert_same_bits(direction, gradsurgery.aggregate(grads, eager, losses=losses))
    torch.testing.assert_close(captured.state_dict(), eager.state_dict(), atol=0, rtol=0)


def test_replays_draw_new_orders():
    rows, method = conflicting(17, 5000), gradsurgery.methods.PCGrad(seed=5)
    products = gradsurgery.gram(rows)
    graph, direction = capture(lambda: gradsurgery.aggregate(rows, method))
    seen = []
    for step in (1, 2, 3):
        graph.replay()
        order = gradsurgery.task_order(17, seed=5, step=step, device="cuda")
        weights = gradsurgery.pcgrad_weights(products, order=order)
        torch.testing.assert_close(direction, gradsurgery.combine(rows, weights))
        assert method.state_dict()["step"] == step + 1
        assert all(not torch.equal(direction, other) for other in seen)
        seen.append(direction.clone())


def test_a_replay_goes_on_from_a_loaded_state():
    rows, method = conflicting(17, 5000), gradsurgery.methods.PCGrad(seed=5)
    products = gradsurgery.gram(rows)
    graph, direction = capture(lambda: gradsurgery.aggregate(rows, method))
    method.load_state_dict({"seed": 5, "step": torch.tensor(40)})
    graph.replay()
    weights = gradsurgery.pcgrad_weights(products, seed=5, step=40)
    torch.testing.assert_close(direction, gradsurgery.combine(rows, weights))


@pytest.mark.parametrize("method", ["pcgrad", "gradnorm"])
def test_a_first_step_is_not_captured(method):
    rows, losses = conflicting(9, 5000), torch.linspace(1, 2, 9, device="cuda")
    fresh = gradsurgery.methods.get(method)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        rows.mul_(1)  # torch warns of empty graphs
        with pytest.raises(RuntimeError, match="must run once"):
            gradsurgery.aggregate(rows, fresh, losses=losses)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_a_captured_training_step_equals_eager_training(method, kind):
    def make():
        torch.manual_seed(0)
        net = two_task_net(torch.float64).cuda()
        return net, gradsurgery.SurgeryOptimizer(OPTIMIZERS[kind](net.parameters()), method)

    def step(net, optimizer):
        optimizer.zero_grad()
        optimizer.backward(two_losses(net, x))
        optimizer.step()

    batches = torch.randn(5, 8, 6, dtype=torch.float64).cuda()
    x = batches[0].clone()
    (net, optimizer), (twin, plain) = make(), make()
    step(twin, plain)
    graph, _ = capture(lambda: step(net, optimizer))
    for batch in batches[1:]:
        x.copy_(batch)
        graph.replay()
        step(twin, plain)
        torch.testing.assert_close(list(net.parameters()), list(twin.parameters()))
    torch.testing.assert_close(optimizer.state_dict(), plain.state_dict())


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")
def test_graphed_callables_are_an_error_instead_of_wrong_gradients():
    x = torch.randn(8, 6, device="cuda")
    net = torch.nn.Linear(6, 2).cuda()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), "pcgrad")
    outputs = torch.cuda.make_graphed_callables(net, (x,))(x)
    with pytest.raises(RuntimeError, match="make_graphed_callables"):
        optimizer.backward(list(outputs.square().mean(0)))


@pytest.mark.parametrize("form", FORMS)
def test_work_is_ordered_on_the_current_stream(form):
    fresh = conflicting(9, 1_000_003)
    rows = torch.zeros_like(fresh)
    expected = gradsurgery.aggregate(FORMS[form](fresh), "mgda")
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Sleep so long that work on another stream would still read the zeros.
        torch.cuda._sleep(100_000_000)
        rows.copy_(fresh)
        got = gradsurgery.aggregate(FORMS[form](rows), "mgda")
    stream.synchronize()
    assert_same_bits(got, expected)


@pytest.mark.parametrize("tasks", [8, 33])
def test_streams_at_once_do_not_disturb_each_other(tasks):
    data = [conflicting(tasks, 500_001, seed) for seed in (1, 2)]
    expected = [(gradsurgery.gram(rows), gradsurgery.aggregate(rows)) for rows in data]
    streams = [torch.cuda.Stream() for _ in data]
    torch.cuda.synchronize()
    results = [[], []]
    for _ in range(20):
        for rows, stream, seen in zip(data, streams, results, strict=True):
            with torch.cuda.stream(stream):
                seen.append((gradsurgery.gram(rows), gradsurgery.aggregate(rows)))
    torch.cuda.synchronize()
    for wanted, seen in zip(expected, results, strict=True):
        for got in seen:
            assert_same_bits(list(got), list(wanted))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("method", METHODS)
def test_tensors_on_a_device_that_is_not_current(method):
    rows, losses = conflicting(9, 5000), torch.ones(9, device="cuda")
    there = rows.to("cuda:1"), losses.to("cuda:1")
    with torch.cuda.device(0):
        for form in FORMS.values():
            got = gradsurgery.aggregate(form(there[0]), method, losses=there[1])
            expected = gradsurgery.aggregate(form(rows), method, losses=losses)
            got, expected = ((d if isinstance(d, list) else [d]) for d in (got, expected))
            assert all(part.device == there[0].device for part in got)
            assert_same_bits([part.cpu() for part in got], [part.cpu() for part in expected])


def test_devices_are_named_in_errors():
    here, host = conflicting(3, 50), torch.randn(3, 50)
    out = torch.ones(50, device="cuda")
    for error, message, call in [
        (ValueError, "one device, got cpu and cuda:0", lambda: gradsurgery.gram([[host[0]], [here[0]]])),
        (ValueError, "one device, got cuda:0 and cpu", lambda: gradsurgery.aggregate([[here[0]], [host[0]]])),
        (RuntimeError, "'cpu' cannot .* on cuda:0", lambda: gradsurgery.aggregate(here, out=out, backend="cpu")),
        (RuntimeError, "'cuda' cannot .* on cpu", lambda: gradsurgery.gram(host, backend="cuda")),
        (ValueError, "cuda:0, got cpu", lambda: gradsurgery.combine(here, torch.ones(3), out=out)),
        (ValueError, "out must be on cuda:0", lambda: gradsurgery.combine(here, here[:, 0], out=torch.ones(50))),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert torch.equal(out, torch.ones_like(out))


def test_direct_calls_with_tensors_of_two_devices_are_safe():
    ops = torch.ops.gradsurgery
    rows, step = conflicting(3, 50), torch.tensor(0, device="cuda")
    products, weights = gradsurgery.gram(rows)[None], torch.ones(1, 3, dtype=torch.float64, device="cuda")
    out, host = torch.ones(50, device="cuda"), torch.ones(50)
    for call in [
        lambda: ops.gram(rows, [], products.cpu()),
        lambda: ops.gram(rows.cpu(), [], products),
        lambda: ops.gram([rows[0], rows[1].cpu()], 2, [], products[:, :2, :2].contiguous()),
        lambda: ops.combine(rows, weights.cpu(), [], False, out),
        lambda: ops.combine(rows, weights, [], False, host),
        lambda: ops.combine([rows[0], rows[1]], weights[:, :2].contiguous(), [], False, [host]),
        lambda: ops.pcgrad(products, None, 0, step.cpu(), True, False, weights),
        lambda: ops.pcgrad(products, torch.zeros(3, 3, dtype=torch.int64), 0, step, True, False, weights),
        lambda: ops.min_norm(products, True, 250, 1e-6, weights.cpu()),
        lambda: ops.task_order(3, 0, step, torch.zeros(3, 3, dtype=torch.int64)),
        lambda: ops.gradnorm(weights, weights, weights.cpu(), weights, 1.5, 0.025, weights.clone()),
    ]:
        with pytest.raises((ValueError, RuntimeError), match=r"(?i)cpu|cuda"):
            call()
    assert torch.equal(weights, torch.ones_like(weights))
    assert torch.equal(out, torch.ones_like(out))
    assert torch.equal(host, torch.ones(50))
    assert step == 0
