# SPDX-License-Identifier: MIT
"""Two processes with one batch each do what one process with both batches does, and get the same bits as each other."""

import subprocess
import sys

import torch

import processes
from conftest import AVAILABLE
from process_cases import SPREAD, WHOLE
from process_errors import ERRORS
from process_nets import BATCHES, WORLD, Net, gradients, wrap
from process_pieces import PIECES

CASES = WHOLE | SPREAD | PIECES

MESSAGES = dict(
    [
        ("of another group", ["ValueError: process_group must be a group of this process"] * 2),
        (
            "other tasks",
            [
                "ValueError: every process must have the same tasks, parameters and seed, got others than 2 "
                "unscaled gradients of 12 parameters by ['0', '1'] with seed 0 on process 0",
                "3 unscaled gradients of 12 parameters by ['0', '1', '2'] with seed 0 on process 1",
            ],
        ),
        *(
            (f"other tasks later{how}", ["ValueError: every process must have the same tasks, parameters and seed"] * 2)
            for how in ("", ", one pass", ", representation")
        ),
        ("other tasks of an update", ["ValueError: every process must have the same tasks, parameters and seed"] * 2),
        ("no tasks", ["ValueError: losses must hold at least one loss, got none"] * 2),
        (
            "no losses anywhere",
            ["ValueError: a step of method 'm_config' needs one loss, got none of ['0', '1', '2']"] * 2,
        ),
        ("other seeds", ["'2'] with seed 0 on process 0", "'2'] with seed 1 on process 1"]),
        ("other seeds within", ["'2'] with seed 0 on process 0", "'2'] with seed 1 on process 1"]),
        ("other losses", ["got others than losses of ['0', '1'] on process 0", "losses of ['0', '1', '2'] on"]),
        ("other shapes", ["ValueError: parameters must have the same shapes, dtypes and memory layouts"] * 2),
        (
            "sparse",
            [
                "TypeError: gradients that are averaged over processes must be dense and real, got others on another",
                "dense and real, got torch.sparse_coo torch.float32 for parameter 0 of shape (5, 3)",
            ],
        ),
        (
            "absent everywhere",
            ["ValueError: a step of method 'pcgrad' needs a loss of every task, got none of ['2']"] * 2,
        ),
        ("fewer parameters", ["gradients of 12 parameters", "gradients of 11 parameters"]),
        ("sharded graddrop", ["ValueError: method 'graddrop' numbers all coordinates, which needs whole"] * 2),
        ("graddrop sharded later", ["ValueError: method 'graddrop' numbers all coordinates, which needs whole"] * 2),
        ("shared sharded later", ["ValueError: shared holds 2 tensors that are not parameters of the wrapped"] * 2),
        ("sharded in a group", ["ValueError: process_group must hold processes with the same parts, got (0, 1)"] * 2),
        (
            "whole among shards",
            ["TypeError: all parameters must be spread over processes or none, got one of shape (3,)"] * 2,
        ),
        (
            "whole among shards later",
            ["TypeError: all parameters must be spread over processes or none, got one of shape (3,)"] * 2,
        ),
        ("whole beside parts", ["TypeError: all parameters must be spread over processes or none, got one of"] * 2),
        (
            "shard among whole",
            ["TypeError: all parameters must be spread over processes or none when"] * 2,
        ),
        ("shard among copies", ["ValueError: process_group must hold processes with the same parts, got (0, 1)"] * 2),
        ("absent losses of shards", ["than losses of ['1', '2'] on process 0", "than losses of ['0', '1', '2'] on"]),
        ("seeds of shards", ["'2'] with seed 0 on process 0", "'2'] with seed 1 on process 1"]),
        (
            "tasks of shards",
            [
                "got others than losses of ['a', 'b'] with seed 0 on process 0",
                "losses of ['b', 'a'] with seed 0 on process 1",
            ],
        ),
        ("losses of shards", ["than losses of ['a', 'b', 'c'] on process 0", "losses of ['a', 'b'] on process 1"]),
        ("shards held back", ["RuntimeError: loss 0 left no gradient in the sharded parameters: it must depend"] * 2),
        ("flat shards", ["TypeError: parameters must not be those of FullyShardedDataParallel"] * 2),
        ("flat shards later", ["TypeError: parameters must not be those of FullyShardedDataParallel"] * 2),
        ("products of shards", ["TypeError: grads[0][0] is a DTensor, spread over processes: give its to_local()"] * 2),
        ("spread loss", ["TypeError: loss '1' must not be a DTensor: give its full_tensor()"] * 2),
        ("sharded batched", ["ValueError: sharded parameters take one backward pass per loss"] * 2),
        ("sharded representation", ["ValueError: sharded parameters take one backward pass per loss"] * 2),
    ]
)


def run(folder):
    """Return what each of the processes returned, by case."""
    commands = [
        [sys.executable, processes.__file__, str(rank), f"{folder}/store", f"{folder}/{rank}"] for rank in range(WORLD)
    ]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    try:
        errors = [process.communicate(timeout=200)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert all(process.returncode == 0 for process in running), errors
    return [torch.load(folder / str(rank)) for rank in range(WORLD)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(a, b, strict=True))


def check_case(found, name):
    first, second = (results[name] for results in found)
    assert same(first, second)
    alone = CASES[name]()
    assert len(first) == len(alone)
    for ours, theirs in zip(first, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def check_groups(found, name):
    for rank, results in enumerate(found):
        net = Net()
        wrap(net).backward(net(BATCHES[0][rank]))
        torch.testing.assert_close(results["of one process"], gradients(net))
        # The bits of PyTorch's own products depend on where the tensors lie.
        assert same(results["of one process"], gradients(net)) or "cpu" not in AVAILABLE
    assert not same(found[0]["of one process"], found[1]["of one process"])
    assert same(found[0]["of a named group"], found[0]["of the default group"])


def check_error(found, name):
    for results, message in zip(found, MESSAGES[name], strict=True):
        assert message in results[name]


# A single test, as the processes are started only once.
def test_two_processes(tmp_path):
    found, wrong = run(tmp_path), {}
    checks = [*((check_case, name) for name in CASES), (check_groups, "groups"), *((check_error, e) for e in ERRORS)]
    for check, name in checks:
        try:
            check(found, name)
        except AssertionError as error:
            wrong[name] = str(error)
    assert not wrong
