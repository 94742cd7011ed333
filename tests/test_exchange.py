# SPDX-License-Identifier: MIT
"""What is sent to average gradients over processes. test_distributed.py tests the results, on two processes."""

import copy
from collections import Counter, defaultdict
from itertools import chain
from unittest import mock

import pytest
import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import gradsurgery
from conftest import on_cpu
from gradsurgery import _exchange

pytestmark = on_cpu
TASKS, PROCESSES = 3, 4


@pytest.fixture(scope="module", autouse=True)
def group():
    """Four processes that send nothing: sums are this process's own numbers, and gathered ones are arbitrary."""
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=PROCESSES)
    yield
    distributed.destroy_process_group()


@pytest.fixture
def sent(monkeypatch):
    """How many numbers of gradients operations were given, and in which groups, as if these were NCCL's."""
    found = {"elements": Counter(), "sizes": defaultdict(list), "groups": set()}

    def count(name, place):
        function = getattr(distributed, name, None)
        if function is None:
            return

        def counted(*tensors, **options):
            found["groups"].add(options["group"])
            if tensors[place].dtype == torch.float32:  # the gradients
                found["elements"][name] += tensors[place].numel()
                found["sizes"][name].append(tensors[place].numel())
            return function(*tensors, **options)

        monkeypatch.setattr(distributed, name, counted)

    for name, place in {
        "all_reduce": 0,
        "all_to_all_single": 0,
        "reduce_scatter_single": 1,
        "reduce_scatter_tensor": 1,
        "all_gather_single": 0,
        "all_gather_into_tensor": 0,
    }.items():
        count(name, place)
    monkeypatch.setattr(_exchange, "_backend", lambda device, group: "nccl")
    return found


@pytest.fixture
def pieces(monkeypatch):
    """Cut even small gradients; all processes have the same pieces as this one."""
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", 0)
    monkeypatch.setattr(_exchange, "_backend", lambda device, group: "nccl")
    monkeypatch.setattr(_exchange, "_sum_piece", lambda flat, room, group: flat.view(PROCESSES, -1)[1].clone())
    monkeypatch.setattr(_exchange, "_gather_pieces", lambda flat, piece, group: flat.view(PROCESSES, -1).copy_(piece))


def model():
    """A trunk of 3 layers with 1,024 elements in all, and a head of 64 per task; multiples of what is aligned."""
    torch.manual_seed(0)
    trunk = [nn.Parameter(torch.randn(size)) for size in (512, 448, 64)]
    heads = [nn.Parameter(torch.randn(64)) for _ in range(TASKS)]
    losses = [sum((t + p).square().sum() for p in trunk) + heads[t].sum() for t in range(TASKS)]
    sgd = torch.optim.SGD([*trunk, *heads], lr=0.1)
    return trunk, heads, losses, gradsurgery.SurgeryOptimizer(sgd, "mgda", shared=trunk)


def test_large_gradients_are_sent_once_and_the_direction_is_gathered(sent, monkeypatch):
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", 0)
    _, _, losses, optimizer = model()
    optimizer.backward(losses)
    heads = TASKS * 64
    assert sum(sent["elements"].values()) == (TASKS * 1024 + heads) + (1024 + heads)
    scattered, gathered = sorted(sent["elements"])[::-1]
    assert scattered.startswith("reduce_scatter")
    assert sent["elements"][scattered] == TASKS * 1024 + heads
    assert gathered.startswith("all_gather")
    assert sent["elements"][gathered] == 1024 + heads
    # One message per task for what has T gradients, one for all that has a single one; two for the directions.
    assert [*map(len, sent["sizes"].values())] == [TASKS + 1, 2]


def test_what_is_large_enough_for_pieces(sent, monkeypatch):
    _, _, losses, optimizer = model()
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", TASKS * (1024 + 64) * 4)
    optimizer.backward(losses, retain_graph=True)
    assert set(sent["elements"]) == {"all_reduce"}
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", TASKS * (1024 + 64) * 4 - 1)
    sent["elements"].clear()
    optimizer.backward(losses)
    assert "all_reduce" not in sent["elements"]


@pytest.mark.parametrize("least", [0, 1 << 30])
def test_messages_are_cut(sent, monkeypatch, least):
    """No message is longer than asked for by more than one gradient, however many tasks there are."""
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", least)
    monkeypatch.setattr(_exchange, "_MESSAGE_BYTES", 4 * 512)
    _, _, losses, optimizer = model()
    optimizer.backward(losses)
    assert max(chain(*sent["sizes"].values())) <= 512 + 448


def test_memory_is_aligned_and_apart(pieces, monkeypatch):
    odd = [nn.Parameter(torch.ones(size)) for size in (5, 7, 70)]
    optimizer = gradsurgery.MGDA(torch.optim.SGD(odd, lr=0.1), shared=odd)
    losses = [sum((p * p).sum() for p in odd), sum(p.sum() for p in odd)]
    for least in (0, 1 << 30):
        monkeypatch.setattr(_exchange, "_PIECES_BYTES", least)
        optimizer.collect(losses, retain_graph=True)
        averages = optimizer._processes.average(optimizer._pending, whole=False, before=mock.Mock())
        assert all(entry.data_ptr() % 64 == 0 for row in averages.grads for entry in row if entry.numel())
        assert any(entry.numel() for entry in averages.grads[0])
        optimizer.zero_grad()
        optimizer.backward(losses, retain_graph=True)
        assert all(p.grad.untyped_storage().nbytes() == p.nbytes for p in odd)


def test_a_group_of_some_processes(sent, monkeypatch):
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", 0)
    trunk, heads, losses, _ = model()
    group = distributed.new_group([1, 2])
    sgd = torch.optim.SGD([*trunk, *heads], lr=0.1)
    optimizer = gradsurgery.SurgeryOptimizer(sgd, "mgda", shared=trunk, process_group=group)
    optimizer.collect(losses)
    with mock.patch("gradsurgery._operate.read", side_effect=MemoryError), pytest.raises(MemoryError):
        optimizer.combine()
    # This process, the second of all, is the first of the group.
    assert [entry.numel() for entry in optimizer._pending.grads[0][:3]] == [512, 0, 0]
    assert copy.deepcopy(optimizer._pending.pieces)._processes.group is group
    optimizer.combine()
    assert sent["groups"] == {group}


def test_each_process_keeps_an_equal_share(pieces):
    _, _, losses, optimizer = model()
    optimizer.collect(losses)
    averages = optimizer._processes.average(optimizer._pending, whole=False, before=mock.Mock())
    sizes = [sum(0 if entry is None else entry.numel() for entry in row) for row in averages.grads]
    assert sum(sizes) == TASKS * (1024 + 64) // PROCESSES


def test_parts_stay_whole(pieces):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts"))
    p = nn.Parameter(DTensor.from_local(torch.ones(2, 2), grid["parts"], [Shard(0)], run_check=False))
    sgd = torch.optim.SGD([p], lr=0.1)
    optimizer = gradsurgery.MGDA(sgd, shared=[p], process_group=grid["copies"].get_group())
    optimizer.collect([p.to_local().sum(), p.to_local().square().sum()])
    averages = optimizer._processes.average(optimizer._pending, whole=False, before=mock.Mock())
    assert averages.is_averaged
    assert averages.pieces is None


def test_contenders_of_the_benchmark_compute_the_same():
    pytest.importorskip("torchjd")
    bench = pytest.importorskip("bench.processes")
    calls = bench.contenders(2, 1000)  # two tasks have only one order
    parameters = calls[bench.OURS][1].__self__.param_groups[0]["params"]
    found = {}
    for name, (prepare, call) in calls.items():
        prepare()
        assert all(p.grad is None for p in parameters)
        call()
        found[name] = torch.cat([p.grad for p in parameters])
    torch.testing.assert_close(found[bench.OURS], found[bench.ONE_MATRIX])
    assert found[bench.SUM].shape == (1000,)


def test_small_gradients_are_one_message(sent):
    _, _, losses, optimizer = model()
    optimizer.backward(losses)
    assert sent["sizes"] == {"all_reduce": [TASKS * (1024 + 64)]}


@pytest.mark.parametrize("method", ["m_config", "graddrop"])
def test_methods_that_need_whole_gradients(sent, monkeypatch, method):
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", 0)
    trunk, heads, losses, _ = model()
    gradsurgery.SurgeryOptimizer(torch.optim.SGD([*trunk, *heads]), method, shared=trunk).backward(losses)
    assert set(sent["elements"]) == {"all_reduce"}


def test_gradients_that_are_looked_at_are_whole(sent, monkeypatch):
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", 0)
    trunk, heads, losses, _ = model()
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([*trunk, *heads]), "mgda")
    optimizer.backward(losses, retain_graph=True)
    assert set(sent["elements"]) == {"all_reduce"}
    sent["elements"].clear()
    optimizer.backward(losses)
    assert "all_reduce" not in sent["elements"]


def test_backends_without_the_operations_average_whole_gradients(sent, monkeypatch):
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", 0)
    monkeypatch.setattr(_exchange, "_backend", lambda device, group: "mpi")
    _, _, losses, optimizer = model()
    optimizer.backward(losses)
    assert set(sent["elements"]) == {"all_reduce"}


def test_backend_of_a_device():
    assert _exchange._backend(torch.device("cpu"), None) == "fake"
    assert _exchange._backend(torch.device("meta"), None) is None


def test_grad_is_added_to_in_place(pieces):
    trunk, heads, losses, optimizer = model()
    optimizer.backward(losses, retain_graph=True)
    before = [p.grad for p in trunk + heads]
    values = [grad.clone() for grad in before]
    optimizer.backward(losses)
    assert all(p.grad is grad for p, grad in zip(trunk + heads, before, strict=True))
    torch.testing.assert_close(before, [2 * value for value in values])


def test_grad_that_does_not_fit_changes_nothing(pieces):
    trunk, _, losses, optimizer = model()
    optimizer.collect(losses)
    trunk[1].grad_dtype = None
    trunk[1].grad = torch.zeros(448, dtype=torch.float64)
    with pytest.raises(TypeError, match="its new gradients are"):
        optimizer.combine()
    assert trunk[0].grad is None
    assert not trunk[1].grad.any()
    trunk[1].grad = None
    optimizer.combine()
    assert trunk[1].grad.shape == (448,)


@pytest.mark.parametrize("least", [0, 1 << 30])
def test_failure_after_the_exchange(pieces, monkeypatch, least):
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", least)
    _, _, losses, optimizer = model()
    optimizer.collect(losses, retain_graph=True)
    with mock.patch("gradsurgery._operate.read", side_effect=MemoryError), pytest.raises(MemoryError):
        optimizer.combine()
    for again in (optimizer.collect, optimizer.backward):
        with pytest.raises(ValueError, match="what was collected is averaged over the processes, because combine"):
            again(losses, retain_graph=True)
    info = optimizer.combine()
    optimizer.zero_grad()
    optimizer.collect(losses)
    torch.testing.assert_close(optimizer.combine().gram, info.gram)


def test_failure_amid_the_directions_changes_nothing(pieces):
    trunk, heads, losses, optimizer = model()
    optimizer.backward(losses, retain_graph=True)
    before = [p.grad.clone() for p in trunk + heads]
    broken = mock.patch.object(_exchange, "_gather_pieces", side_effect=[None, RuntimeError("connection closed")])
    with broken, pytest.raises(RuntimeError, match="connection closed"):
        optimizer.backward(losses)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(trunk + heads, before, strict=True))


@pytest.mark.parametrize("least", [0, 1 << 30])
def test_failure_amid_the_exchange_forgets_what_was_collected(pieces, monkeypatch, least):
    monkeypatch.setattr(_exchange, "_PIECES_BYTES", least)
    trunk, _, losses, optimizer = model()
    optimizer.collect(losses)
    broken = mock.patch.object(_exchange, "_fill", side_effect=RuntimeError("connection closed"))
    with broken, pytest.raises(RuntimeError, match="connection closed"):
        optimizer.combine()
    assert trunk[0].grad is None
    with pytest.raises(ValueError, match="there is nothing to combine"):
        optimizer.combine()
