"""Kronecker factors from a Lightning Trainer.

    with FactorAccumulator(module.model, fisher="empirical") as acc:
        callback = FactorCallback(acc, mask=lambda batch: batch["labels"] != -100)
        Trainer(callbacks=[callback]).fit(module, data)
    A, G = acc.factors.mean("layers.0.mlp.up_proj")

Not covered: manual optimization and losses that are no mean over tokens (there, let `training_step` return
`acc.training_loss(loss, tokens)` and do without this callback); DeepSpeed's own loss scaling was not tried.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer

from ..accumulate import FactorAccumulator
from ..factors import Factors
from .resume import resume, summed


class FactorCallback(Callback):
    """Declares the loss of every training step to an entered accumulator, and keeps its sums in the checkpoints.

    Empirical Fisher: the training backward pass is counted, its scaling (`accumulate_grad_batches`, AMP) undone. True
    Fisher: at each call of the accumulator's model, an extra backward pass, which touches no `.grad`, of labels sampled
    from the logits: its output, or that output's `logits`. Evaluation adds nothing.

    A checkpoint holds the sums over all processes, and a resumed run goes on from them. After training the accumulator
    holds this process's sums: `accumulator.factors.all_reduce()` adds those of the others.

    Args:
        accumulator: Of the module, or of a part of it, that `training_step` calls; entered around `fit()`.
        mask: Batch -> bool, the logits' leading dimensions: the positions that bear loss. The loss of `training_step`
            must be the mean over them.
    """

    def __init__(self, accumulator: FactorAccumulator, mask: Callable[[Any], Tensor]) -> None:
        self.accumulator, self.mask = accumulator, mask
        self._batch: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the run is one that is covered.

        Args:
            trainer: The Trainer.
            pl_module: The module.

        Raises:
            ValueError: It is not covered; the message says what to change.
        """
        acc = self.accumulator
        if not acc.entered:
            raise ValueError("accumulator: it is not entered; write `with accumulator: trainer.fit(module)`")
        if all(acc.model is not part for part in pl_module.modules()):
            raise ValueError("accumulator: its model is no part of the module that is trained")
        if not pl_module.automatic_optimization:
            raise ValueError(
                "pl_module: with manual optimization, give `accumulator.training_loss(loss, tokens)` to "
                "manual_backward, and do without this callback"
            )
        if acc.factors.fisher == "true":
            acc.on_output = self._sample

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keeps the batch for its mask."""
        self._batch = batch

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Empirical Fisher: `loss` is s/k times the mean, s the loss scale and k = `accumulate_grad_batches`."""
        if self.accumulator.factors.fisher == "empirical" and self.accumulator.tapped:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            scale = 1.0 if scaler is None else scaler.get_scale()
            tokens = float(self.mask(self._batch).sum())
            self.accumulator.training_loss(loss, tokens * trainer.accumulate_grad_batches / scale, in_place=True)

    def on_train_batch_end(self, *args: Any) -> None:
        """Lets the batch go."""
        self._batch = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Passes after the training are not declared."""
        self.accumulator.on_output = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """As at the end."""
        self.accumulator.on_output = None

    def state_dict(self) -> dict[str, Any]:
        """The sums over all processes; Lightning calls this on every one."""
        return summed(self.accumulator.factors).state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from the sums of a checkpoint."""
        resume(self.accumulator, Factors.from_state_dict(state_dict))

    def _sample(self, kwargs: dict, output: Any) -> None:
        """True Fisher: the extra backward pass of one forward pass."""
        if self._batch is not None:
            acc, logits = self.accumulator, getattr(output, "logits", output)
            acc.backward(acc.sampled_loss(logits, self.mask(self._batch)), retain_graph=True)
