"""Factors from real runs of a Lightning Trainer against float64 sums over one example at a time."""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from sst_kernels.accumulate import AccumulatorOptions, FactorAccumulator
from sst_kernels.integrations.lightning import FactorCallback
from sst_kernels.labels import counter_uniform, sample_labels

pytestmark = [
    pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The `srun` command"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

CLASSES, IGNORED = 5, -100


class Classifier(pl.LightningModule):
    """Tokens (B, T, 4) -> classes (B, T); some tokens bear no loss."""

    def __init__(self, learning_rate: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x).transpose(1, 2), y, ignore_index=IGNORED)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.training_step(batch, batch_idx)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.learning_rate)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Five batches with different numbers of tokens that bear loss."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for size in (2, 3, 2, 1, 2):
        x = torch.randn(size, 4, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, CLASSES, (size, 4), generator=generator)
        y[0, :size] = IGNORED
        made.append((x, y))
    return made


def loader() -> DataLoader:
    return DataLoader(batches(), batch_size=None)


def bears_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
    return batch[1] != IGNORED


def fitted(
    acc: FactorAccumulator | None,
    module: pl.LightningModule,
    out: Path,
    ckpt_path: str | None = None,
    **changes: object,
) -> None:
    arguments = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": str(out),
    }
    callbacks = [] if acc is None else [FactorCallback(acc, bears_loss)]
    callbacks += changes.pop("callbacks", [])
    with acc or contextlib.nullcontext():
        pl.Trainer(**{**arguments, **changes}, callbacks=callbacks).fit(module, loader(), loader(), ckpt_path=ckpt_path)


def dense_sums(net: nn.Module, drawn: bool = False) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Name of the layer in `net` -> (Σ x xᵀ, Σ δ δᵀ, tokens) of the summed cross-entropy, layer by layer by hand."""
    first, _, last = net
    rows: dict[str, list[tuple[Tensor, Tensor]]] = {"0": [], "2": []}
    sequences = [(x, y) for batch in batches() for x, y in zip(*batch, strict=True)]
    for i, (x, y) in enumerate(sequences):
        hidden = (x @ first.weight.T + first.bias).detach().requires_grad_()
        logits = hidden.tanh() @ last.weight.T + last.bias
        if drawn:
            position = torch.arange(len(y))
            labels = sample_labels(logits.detach(), counter_uniform(0, torch.full_like(position, i), position))
            y = labels.where(y != IGNORED, IGNORED)
        loss = F.cross_entropy(logits, y, ignore_index=IGNORED, reduction="sum")
        at_hidden, at_logits = torch.autograd.grad(loss, [hidden, logits])
        rows["0"].append((x, at_hidden))
        rows["2"].append((hidden.detach().tanh(), at_logits))
    sums = {}
    for name, parts in rows.items():
        x, delta = (torch.cat(side) for side in zip(*parts, strict=True))
        sums[name] = x.T @ x, delta.T @ delta, len(x)
    return sums


def assert_sums(acc: FactorAccumulator, expected: dict, prefix: str = "net.", rtol: float = 1e-10) -> None:
    for name, (a, g, tokens) in expected.items():
        assert acc.factors.layers[prefix + name].counts.tolist() == [tokens, tokens]
        for actual, wanted in zip(acc.factors.mean(prefix + name), (a, g), strict=True):
            torch.testing.assert_close(
                actual.double() * tokens, wanted, rtol=rtol, atol=rtol * float(wanted.abs().max())
            )


@pytest.mark.parametrize("fisher", ["empirical", "true"])
@pytest.mark.parametrize("changes", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_factors_equal_dense_sums(tmp_path, fisher, changes):
    """Five batches: the last window of gradient accumulation is not full. Validation adds nothing."""
    module = Classifier()
    acc = FactorAccumulator(module, fisher=fisher)
    fitted(acc, module, tmp_path, **changes)
    assert_sums(acc, dense_sums(module.net, fisher == "true"))
    assert acc.factors.backwards == 5


def test_a_part_of_the_module(tmp_path):
    module = Classifier()
    acc = FactorAccumulator(module.net, fisher="true")
    fitted(acc, module, tmp_path)
    assert_sums(acc, dense_sums(module.net, True), prefix="")


class ScaledLoss(MixedPrecision):
    """Loss scaling without rounding."""

    def autocast_context_manager(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_loss_scaling_is_undone(tmp_path, fisher):
    """The scale grows with every step."""
    module = Classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)
    acc = FactorAccumulator(module, fisher=fisher)
    fitted(acc, module, tmp_path, plugins=[ScaledLoss("16-mixed", "cpu", scaler)], accumulate_grad_batches=2)
    assert scaler.get_scale() > 64
    assert_sums(acc, dense_sums(module.net, fisher == "true"))


class Single(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.float())


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_autocast(tmp_path, fisher):
    module = Single().float()
    acc = FactorAccumulator(module, fisher=fisher)
    fitted(acc, module, tmp_path, precision="bf16-mixed")
    assert acc.factors.layers["net.0"].grad_factor.dtype == torch.float32
    assert_sums(acc, dense_sums(Classifier().net, fisher == "true"), rtol=2**-6)  # rounding of weights, rows and logits


class PartlySingle(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.net(x.float())


def test_the_extra_backward_pass_is_not_autocast(tmp_path):
    """It runs inside `training_step`, where autocast is on, but layers outside of it stay in float32."""
    module = PartlySingle().float()
    acc = FactorAccumulator(module, fisher="true")
    fitted(acc, module, tmp_path, precision="bf16-mixed")
    assert_sums(acc, dense_sums(Classifier().net, True), rtol=1e-5)


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_training_itself_is_not_changed(tmp_path, fisher):
    plain, watched = Classifier(0.5), Classifier(0.5)
    fitted(None, plain, tmp_path, max_epochs=2)
    fitted(FactorAccumulator(watched, fisher=fisher), watched, tmp_path, max_epochs=2)
    assert not torch.equal(plain.net[0].weight, Classifier().net[0].weight)
    for mine, theirs in zip(watched.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("fisher", ["empirical", "true"])
def test_a_resumed_run_ends_bit_identical(tmp_path, fisher):
    options = AccumulatorOptions(decay=0.9, every=2)

    def run(max_epochs: int, ckpt_path: str | None = None) -> FactorAccumulator:
        module = Classifier(0.5)
        acc = FactorAccumulator(module, fisher=fisher, options=options)
        saver = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        how = {"enable_checkpointing": True, "callbacks": [saver], "max_epochs": max_epochs}
        fitted(acc, module, tmp_path, ckpt_path, **how)
        return acc

    whole = run(3).factors
    resumed = run(3, str(tmp_path / "epoch=0.ckpt")).factors
    assert resumed.without_sums() == whole.without_sums()
    assert whole.forwards == 15
    for name, layer in whole.layers.items():
        for part, tensor in layer.tensors().items():
            assert torch.equal(resumed.layers[name].tensors()[part], tensor), (name, part)


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class HalfLoss(Classifier):
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).bfloat16()


@pytest.mark.parametrize(("kind", "message"), [(Manual, "manual optimization"), (HalfLoss, "loss must be float32")])
def test_what_is_not_covered_is_refused(tmp_path, kind, message):
    module = kind()
    with pytest.raises(ValueError, match=message):
        fitted(FactorAccumulator(module, fisher="empirical"), module, tmp_path)


def test_the_accumulator_must_be_entered_and_of_the_trained_module(tmp_path):
    module, acc = Classifier(), FactorAccumulator(Classifier().net, fisher="empirical")
    with pytest.raises(ValueError, match="no part of the module"):
        fitted(acc, module, tmp_path)
    callback = FactorCallback(acc, bears_loss)
    with pytest.raises(ValueError, match="not entered"):
        callback.on_fit_start(None, module)
