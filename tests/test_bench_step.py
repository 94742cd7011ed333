# SPDX-License-Identifier: MIT
"""The benchmark of whole training steps, on a model that is small enough for a test."""

import json
import sys

import pytest
import torch

from conftest import on_cpu

pytest.importorskip("torchjd")
pytest.importorskip("pytorch_optimizer")

from bench import step, step_contenders, step_models, step_targets

pytestmark = on_cpu

TINY = {
    "rl": lambda: step_models.ReinforcementMLP(3, width=8, batch=4),
    "resnet": lambda: step_models.AttributeResNet(2, 4, 2, 32),
    "scene": lambda: step_models.SceneNet(4, 1, 16, 16),
    "transformer": lambda: step_models.DomainTransformer(2, 1, 8, 2, 11, 5, 2),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of an operator without a rule for vmap
@pytest.mark.parametrize("name", ["rl", "scene", "transformer"])
def test_every_contender_makes_steps(name):
    rows = step.measure(step_models.Workload(name, TINY[name], TINY[name]), torch.device("cpu"), 0.0)
    found = {row.contender: row for row in rows}
    assert {
        "pcgrad, sequential",
        "mgda, batched",
        step_contenders.COMMON,
        "torchjd MGDA",
        step_contenders.ONE_BY_ONE,
    } <= set(found)
    assert ("pcgrad, features, batched" in found) == (name != "transformer")
    assert (f"pcgrad, {step_contenders.REPRESENTATION}" in found) == (name == "scene")
    for row in rows:
        if row.contender == "torchjd UPGrad" and "quadprog" in row.note:
            continue  # not every machine has quadprog
        assert row.note == ""
        assert row.rounds == 5
        in_one = row.contender == step_contenders.PLAIN or row.contender.endswith(step_contenders.REPRESENTATION)
        assert (row.parts_ms["surgery"] > 0) != in_one
        assert row.peak_mb > 0
    step.print_rows(rows)


def test_contenders_that_fail_leave_the_others(monkeypatch):
    """One package is not there, and one contender fails amid the timed steps."""
    made, plain = [], step_contenders._plain

    def fails_later(model):
        run = plain(model)

        def whole(part):
            made.append(run(part))
            if len(made) == 7:
                raise RuntimeError("out of memory")

        return whole

    monkeypatch.setitem(sys.modules, "pytorch_optimizer.optimizer", None)
    monkeypatch.setattr(step_contenders, "_plain", fails_later)
    rows = step.measure(step_models.Workload("rl", TINY["rl"], TINY["rl"]), torch.device("cpu"), 0.0)
    notes = {row.contender: row.note for row in rows if "torchjd" not in row.contender}
    assert notes.pop(step_contenders.PLAIN) == "failed: out of memory"
    assert "pytorch_optimizer" in notes.pop(step_contenders.COMMON)
    assert not any(notes.values())
    step.print_rows(rows)


@pytest.mark.parametrize("name", TINY)
def test_every_model_has_losses(name):
    model = TINY[name]()
    losses = model.losses()
    assert len(losses) > 1
    gradients = torch.autograd.grad(torch.stack(losses).sum(), [*model.features, *model.parameters()])
    assert all(g.isfinite().all() for g in gradients)
    assert {id(p) for p in model.trunk()} <= {id(p) for p in model.parameters()}


def test_models_are_full_size():
    sizes = {w.name: sum(p.numel() for p in make_meta(w.full).parameters()) for w in step_models.WORKLOADS}
    assert 123e6 < sizes["transformer"] < 126e6
    assert 11.1e6 < sizes["resnet"] < 11.3e6


def make_meta(make):
    with torch.device("meta"):
        return make()


def test_targets():
    def row(workload, contender, median, surgery):
        return step.Row(workload, contender, 2, 3, median_ms=median, parts_ms={"surgery": surgery})

    rows = [
        *(row("rl", f"pcgrad, {way}", 2.0 + i, 1.0) for i, way in enumerate(step_targets.WAYS)),
        row("rl", step_contenders.COMMON, 9.0, 30.0),
        row("rl", "torchjd PCGrad", 1.0, 0.5),
        row("rl", "torchjd PCGrad, one by one", 2.0, 0.5),
    ]
    assert [(v["measured"], v["met"]) for v in step_targets.judge(rows, "cpu")] == [(30.0, True), (2.0, False)]
    verdicts = step_targets.judge(rows, "cuda")
    assert [v["met"] for v in verdicts] == [False, False, False, None, None, None]


def test_a_run_that_is_cut_off_has_stored_the_models_before(monkeypatch, tmp_path):
    def measure(workload, device, seconds):
        if workload is step.WORKLOADS[1]:
            raise KeyboardInterrupt
        return [step.Row(workload.name, step_contenders.COMMON, 3, 10, note="failed: as a test")]

    monkeypatch.setattr(step, "measure", measure)
    monkeypatch.setattr(sys, "argv", ["step", "--output", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        step.main()
    (stored,) = tmp_path.iterdir()
    assert [row["workload"] for row in json.loads(stored.read_text())["rows"]] == ["rl"]
