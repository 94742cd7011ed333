# SPDX-License-Identifier: MIT
"""The weighting classes for LibMTL, in a stand-in for LibMTL's trainer."""

import copy
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gradsurgery
from conftest import grads_of, on_cpu
from gradsurgery import methods
from gradsurgery.integrations.libmtl import weighting
from inputs import DEVICE

ROOT = Path(__file__).parent.parent
X = torch.linspace(-1, 1, 48).reshape(8, 6)
TASKS = ["a", "b", "c"]
TARGETS = {"a": 1.0, "b": -1.0, "c": 0.5}


class Architecture(torch.nn.Module):
    """What LibMTL's architectures offer to a weighting: attributes, and the shared parameters."""

    def __init__(self, task_name, encoder_class, decoders, rep_grad, multi_input, device, **kwargs):
        super().__init__()
        self.task_name = task_name
        self.task_num = len(task_name)
        self.rep_grad = rep_grad
        self.multi_input = multi_input
        self.device = device
        self.encoder = encoder_class()
        self.decoders = decoders
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, inputs):
        shared = self.encoder(inputs).tanh()
        return {task: self.decoders[task](shared) for task in self.task_name}

    def get_share_params(self):
        return self.encoder.parameters()

    def zero_grad_share_params(self):
        self.encoder.zero_grad()


def build(weighting_class, *, rep_grad=False, dtype=torch.float64):
    """The model that the trainer makes of an architecture and a weighting."""

    class Model(Architecture, weighting_class):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.init_param()

    torch.manual_seed(2)
    return Model(
        task_name=TASKS,
        encoder_class=lambda: torch.nn.Linear(6, 5),
        decoders=torch.nn.ModuleDict({task: torch.nn.Linear(5, 1) for task in TASKS}),
        rep_grad=rep_grad,
        multi_input=False,
        device=torch.device(DEVICE),
    ).to(DEVICE, dtype)


def losses_of(model):
    """The losses in one tensor, written task by task as the trainer does, so every loss reaches every head."""
    outputs = model(X.to(next(model.parameters()).dtype))
    losses = torch.zeros(len(TASKS)).to(DEVICE)
    for t, task in enumerate(TASKS):
        losses[t] = (t + 1) * (outputs[task] - TARGETS[task]).square().mean()
    return losses


def train(model, steps, optimizer=None):
    """The weights and losses of each step of the trainer's loop."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    weights, history = np.zeros([len(TASKS), steps]), []
    for step in range(steps):
        losses = losses_of(model)
        history.append(losses.tolist())
        optimizer.zero_grad(set_to_none=False)
        weights[:, step] = model.backward(losses)
        optimizer.step()
    return weights, history


@pytest.mark.parametrize("method", methods.available())
def test_every_method_gives_what_our_optimizer_gives(method):
    model, twin = build(weighting(method)), build(weighting(method))
    optimizer = gradsurgery.SurgeryOptimizer(
        torch.optim.SGD(twin.parameters(), lr=0.05), method, shared=twin.get_share_params()
    )
    trainer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        trainer.zero_grad(set_to_none=False)
        weights = model.backward(losses_of(model))
        optimizer.zero_grad()
        info = optimizer.backward(losses_of(twin))
        if isinstance(methods.get(method), methods.CoordinateMethod):
            assert weights is None
        else:
            assert isinstance(weights, np.ndarray)
            assert weights.dtype == np.float64
            assert weights.tolist() == info.weights.tolist()
        assert grads_of(model.unused) == [None, None]
        torch.testing.assert_close(grads_of(model), grads_of(twin), rtol=0, atol=0)
        trainer.step()
        optimizer.step()


@pytest.mark.parametrize("method", ["mgda", "constant"])
def test_heads_are_weighted_only_by_weights_of_losses(method):
    options = {"task_weights": [0.5, 2.0, 0.0]} if method == "constant" else {}
    model = build(weighting(method, **options))
    weights = torch.from_numpy(model.backward(losses_of(model))).to(DEVICE)
    twin, plain = build(weighting("sum")), build(weighting("sum"))
    losses_of(twin).backward(weights.float())
    losses_of(plain).sum().backward()
    heads = twin.decoders if method == "constant" else plain.decoders
    torch.testing.assert_close(grads_of(model.encoder), grads_of(twin.encoder), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grads_of(model.decoders), grads_of(heads))


def test_training_in_the_trainers_loop():
    weights, history = train(build(weighting("mgda"), dtype=torch.float32), 40)
    assert all(last < first for first, last in zip(history[0], history[-1], strict=True))
    np.testing.assert_allclose(weights.sum(0), 1)
    # The initial parameters on a GPU are others; with them the first task may never get a weight.
    found = weights[:1] if DEVICE == "cpu" else weights
    assert max(len(np.unique(of_task)) for of_task in found) > 30


def test_each_model_has_a_state_of_its_own_and_a_method_object_one():
    pcgrad = weighting("pcgrad", seed=5)
    one, other = build(pcgrad), build(pcgrad)
    train(one, 2)
    assert one.surgery_method.state_dict()["step"] == 2
    assert other.surgery_method.state_dict() == {"seed": 5, "step": 0}
    given = methods.get("pcgrad", seed=5)
    train(build(weighting(given)), 2)
    assert given.state_dict()["step"] == 2
    averaged = build(weighting("cr_mogm", method="mgda"))  # an option with the same name as the first argument
    train(averaged, 1)
    assert averaged.surgery_method.method.name == "mgda"


def test_checkpoints_and_copies_go_on_with_the_methods_state():
    model = build(weighting("gradnorm"))
    train(model, 3)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    twin = copy.deepcopy(model)
    weights, history = train(model, 3)
    file.seek(0)
    resumed = build(weighting("gradnorm"))
    resumed.load_state_dict(torch.load(file, weights_only=True), strict=False)
    for other in (twin, resumed):
        same = train(other, 3)
        assert same[0].tolist() == weights.tolist()
        assert same[1] == history
    plain = {name: value for name, value in model.state_dict().items() if name != "_extra_state"}
    assert not build(weighting("mgda")).load_state_dict(plain, strict=False).unexpected_keys


def test_nan_reaches_the_gradients_and_the_weights():
    model = build(weighting("pcgrad"))
    losses = losses_of(model)
    assert np.isnan(model.backward(losses * torch.tensor([1.0, torch.nan, 1.0]))).all()
    assert all(grad.isnan().all() for grad in grads_of(model.encoder))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.skipif(DEVICE == "cpu", reason="about copies from the GPU")
def test_only_the_weights_go_to_the_host(monkeypatch):
    model = build(weighting("pcgrad"))
    model.backward(losses_of(model))
    losses, copies, cpu = losses_of(model), [], torch.Tensor.cpu

    def counted(tensor):
        copies.append(tensor.shape)
        torch.cuda.set_sync_debug_mode("default")
        return cpu(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counted)
    try:
        torch.cuda.set_sync_debug_mode("error")
        model.backward(losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # Under a default device torch looks the method up again, which counts the copy twice.
    assert copies in ([(3,)], [(3,), (3,)])


def test_errors():
    with pytest.raises(ValueError, match="method must be one of"):
        weighting("nothing")
    with pytest.raises(ValueError, match="reduction must be one of sum, mean"):
        weighting("pcgrad", reduction="max")
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'gpu'"):
        weighting("pcgrad", backend="gpu")
    with pytest.raises(ValueError, match="rep_grad must be False, got True"):
        build(weighting("mgda"), rep_grad=True)
    model = build(weighting("mgda"))
    with pytest.raises(ValueError, match=r"weight_args must be empty.* got \['calpha', 'rescale'\]"):
        model.backward(losses_of(model), calpha=0.5, rescale=1)
    with pytest.raises(ValueError, match="has no graph"):
        model.backward(torch.ones(3))
    assert all(grad is None for grad in grads_of(model))


@on_cpu
def test_nothing_of_libmtl_is_imported():
    code = """
import sys
sys.modules["LibMTL"] = None
import gradsurgery
assert "gradsurgery.integrations" not in sys.modules
from gradsurgery.integrations import libmtl
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
