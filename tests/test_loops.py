# SPDX-License-Identifier: MIT
"""Training loops of other packages do what a plain loop does."""

import copy
import warnings

import pytest
import torch

import gradsurgery
from conftest import on_cpu, two_losses, two_task_net
from inputs import normal

pytestmark = [on_cpu, pytest.mark.filterwarnings("ignore")]
DATA = normal(32, 6, torch.float32)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = two_task_net()

    def forward(self, x):
        return two_losses(self.parts, x)


def loader():
    return torch.utils.data.DataLoader(DATA, batch_size=8)


def make(net):
    optimizer = gradsurgery.GradVac(torch.optim.AdamW(net.parameters(), lr=1e-2))
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2)


@pytest.fixture
def plain():
    """The parameters and the method's state after a plain loop."""
    net = Net()
    optimizer, scheduler = make(net)
    for x in loader():
        optimizer.zero_grad()
        optimizer.backward(net(x))
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    return net.state_dict(), optimizer.method.state_dict()


def check(net, optimizer, plain):
    torch.testing.assert_close((net.state_dict(), optimizer.method.state_dict()), plain, rtol=0, atol=0)


def test_accelerate(plain, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    net = Net()
    model, optimizer, scheduler, batches = accelerator.prepare(net, *make(net), loader())
    for x in batches:
        optimizer.zero_grad()
        optimizer.optimizer.backward(model(x), scaler=accelerator.scaler)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
    check(net, optimizer.optimizer, plain)
    accelerator.save_state(tmp_path)
    before = copy.deepcopy(net.state_dict())
    optimizer.optimizer.backward(model(DATA))
    optimizer.step()
    accelerator.load_state(tmp_path)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    check(net, optimizer.optimizer, plain)


def test_accelerate_in_micro_batches():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain, net = Net(), Net()
    expected, (optimizer, _) = make(plain)[0], make(net)
    for first, second in zip(*[iter(loader())] * 2, strict=False):
        expected.zero_grad()
        for x in (first, second):
            expected.collect([loss / 2 for loss in plain(x)])
        expected.combine()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        expected.step()
    model, optimizer, batches = accelerator.prepare(net, optimizer, loader())
    for x in batches:
        with accelerator.accumulate(model):  # as in docs/training.md
            each = [loss / accelerator.gradient_accumulation_steps for loss in model(x)]
            optimizer.optimizer.collect(each, scaler=accelerator.scaler)
            if accelerator.sync_gradients:
                optimizer.optimizer.combine()
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)


def scaler_of(trainer):
    """Return the trainer's gradient scaler, or None, as in docs/training.md."""
    return getattr(trainer.precision_plugin, "scaler", None)


def test_lightning_with_a_scaler(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    precision = lightning.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))

    class Module(lightning.LightningModule):
        automatic_optimization = False

        def __init__(self, surgery):
            super().__init__()
            self.net, self.surgery = Net(), surgery

        def configure_optimizers(self):
            sgd = torch.optim.SGD(self.net.parameters(), lr=0.1)
            return gradsurgery.SurgeryOptimizer(sgd, "sum") if self.surgery else sgd

        def training_step(self, batch):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            if self.surgery:
                optimizer.optimizer.backward(self.net(batch), scaler=scaler_of(self.trainer))
            else:
                self.manual_backward(sum(self.net(batch)))
            optimizer.step()

    found = []
    for surgery in (True, False):
        module = Module(surgery)
        options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            plugins=[precision],
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            **options,
        )
        trainer.fit(module, loader())
        found.append(module.net.state_dict())
    assert scaler_of(trainer) is precision.scaler
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)  # both pass through float16


def test_fabric_in_mixed_precision():
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fabric.launch()
    net, alone = Net(), Net()
    alone.load_state_dict(net.state_dict())
    model, optimizer = fabric.setup(net, gradsurgery.MGDA(torch.optim.SGD(net.parameters(), lr=0.1)))
    batch = next(iter(loader()))
    with pytest.raises(RuntimeError, match=r"fabric.backward"):
        optimizer.optimizer.backward(model(batch))
    with fabric.autocast():
        losses = net(batch)
    optimizer.optimizer.backward(losses)
    with torch.autocast("cpu", torch.bfloat16):
        expected = alone(batch)
    gradsurgery.MGDA(torch.optim.SGD(alone.parameters(), lr=0.1)).backward(expected)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), alone.parameters(), strict=True))


def test_lightning(plain, tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()
            self.automatic_optimization = False

        def configure_optimizers(self):
            return tuple([part] for part in make(self.net))

        def training_step(self, batch):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            optimizer.optimizer.backward(self.net(batch), scaler=scaler_of(self.trainer))
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
            optimizer.step()
            self.lr_schedulers().step()

    module = Module()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
    trainer.fit(module, loader())
    check(module.net, trainer.optimizers[0], plain)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    resumed = Module()
    lightning.Trainer(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path, **quiet).fit(
        resumed, loader(), ckpt_path=tmp_path / "last.ckpt"
    )
    check(resumed.net, resumed.optimizers().optimizer, plain)


class WithModes(torch.optim.SGD):
    """An optimizer with a training mode, like schedule-free optimizers."""

    mode = "none"
    _private = True

    def train(self):
        self.mode = "train"


def test_what_else_an_optimizer_has():
    optimizer = gradsurgery.PCGrad(WithModes([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    optimizer.train()
    assert optimizer.mode == optimizer.optimizer.mode == "train"
    copied = copy.deepcopy(optimizer)
    copied.train()
    assert copied.optimizer.mode == "train"
    assert not hasattr(optimizer, "eval")
    # GradScaler looks for a private attribute, and would then set others on the wrapper, not on the wrapped optimizer.
    assert not hasattr(optimizer, "_private")


def test_warns_of_steps_without_surgery():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([parameter], lr=0.1))
    with pytest.raises(ValueError, match="mode must be one of"):
        optimizer.backward([parameter.sum(), parameter.norm()], mode="both")
    optimizer.collect([parameter.sum(), parameter.norm()])
    optimizer.zero_grad()
    parameter.sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="two steps without surgery"):
        optimizer.step()
    optimizer.step()  # warns only once
    other = gradsurgery.PCGrad(torch.optim.SGD([parameter], lr=0.1))
    other.step(lambda: parameter.sum().backward())
    with pytest.warns(UserWarning, match="two steps without surgery"):
        other.step(lambda: parameter.sum().backward())
    optimizer.zero_grad()
    optimizer.backward([parameter.sum(), parameter.norm()])
    optimizer.step()
    optimizer.zero_grad()
    parameter.sum().backward()
    optimizer.step()
    optimizer.collect([parameter.sum(), parameter.norm()])
    with pytest.warns(UserWarning, match="collected task gradients are not in .grad"):
        optimizer.step()


@pytest.mark.parametrize("method", ["pcgrad", "uw"])
def test_does_not_warn_of_steps_with_surgery(method):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = gradsurgery.SurgeryOptimizer(torch.optim.SGD([parameter], lr=0.1), method)

    def closure():
        optimizer.zero_grad()
        optimizer.backward([parameter.sum(), parameter.norm()])

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        for _ in range(3):
            optimizer.step(closure)
        for _ in range(3):
            closure()
            optimizer.step()
            optimizer.step()
