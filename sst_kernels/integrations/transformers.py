"""Kronecker factors from the Trainer of Hugging Face transformers.

    with FactorAccumulator(model, fisher="empirical") as acc:
        Trainer(model, args, train_dataset=data, callbacks=[FactorCallback(acc)]).train()
    A, G = acc.factors.mean("model.layers.0.mlp.up_proj")

Not covered: label smoothing, DataParallel, losses other than cross-entropy of `logits` at `labels`, packed sequences
under "reduce", an encoder and a decoder with different tokens, and trainers that call the model more than once a loss.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..accumulate import FactorAccumulator
from ..collect import uncompiled
from ..factors import Factors
from .resume import resume, summed, world

FACTORS_NAME = "factors.safetensors"
_IGNORED = -100  # label of a position without loss


class FactorCallback(TrainerCallback):
    """Declares the loss of every training step to an entered accumulator, and keeps its sums in the checkpoints.

    Empirical Fisher: the training backward pass is counted, its scaling (`num_items_in_batch`, gradient accumulation,
    number of processes, AMP) undone. True Fisher: an extra backward pass, which touches no `.grad`, of labels sampled
    where the batch's labels bear loss; without labels, wherever the attention mask is not 0. Evaluation adds nothing.

    Each checkpoint folder gets `factors.safetensors`, the sums over all processes, and a resumed run goes on from
    those of `output_dir/checkpoint-<step>`. After training the accumulator holds this process's sums:
    `accumulator.factors.all_reduce()` adds those of the others.

    Args:
        accumulator: Of the Trainer's model, entered around `train()`.
    """

    def __init__(self, accumulator: FactorAccumulator) -> None:
        self.accumulator = accumulator
        self._checked = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the run is one that is covered, and resumes.

        Args:
            args: The Trainer's.
            state: Its `global_step` is where the run begins.
            control: Not used.
            kwargs: `model` and others.

        Raises:
            ValueError: It is not covered; the message says what to change.
        """
        acc = self.accumulator
        if not acc.entered:
            raise ValueError("accumulator: it is not entered; write `with accumulator: trainer.train()`")
        if uncompiled(kwargs["model"]) is not uncompiled(acc.model):
            raise ValueError("accumulator: its model is not the Trainer's; make it with the model given to the Trainer")
        if args.label_smoothing_factor != 0:
            raise ValueError(
                f"label_smoothing_factor must be 0, got {args.label_smoothing_factor}: the gradient of a smoothed loss "
                "is not that of a log-likelihood"
            )
        if args.n_gpu > 1:
            raise ValueError(f"n_gpu must be at most 1, got {args.n_gpu}: start one process per GPU (torchrun)")
        if state.global_step > 0:
            self._resume(_checkpoint(args, state) / FACTORS_NAME)
        self._checked = False
        acc.on_output = self._declare

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Writes the sums over all processes beside the checkpoint."""
        factors = summed(self.accumulator.factors)
        if world()[0] == 0:
            factors.save(_checkpoint(args, state) / FACTORS_NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Passes after the training are not declared."""
        self.accumulator.on_output = None

    def _resume(self, path: Path) -> None:
        if not path.exists():
            warnings.warn(
                f"FactorCallback: the run resumes but there is no {path}; the factors go on from what the accumulator "
                "holds. Call `accumulator.factors.add_(Factors.load(...))` before train() if they are elsewhere",
                stacklevel=2,
            )
            return
        resume(self.accumulator, Factors.load(path))

    def _declare(self, kwargs: dict, output: Any) -> None:
        """The loss of one forward pass."""
        acc = self.accumulator
        logits, loss = (output.get(key) if isinstance(output, dict) else None for key in ("logits", "loss"))
        if logits is None:
            raise ValueError("model: it must return a ModelOutput with `logits` (return_dict=True, no fused loss)")
        packed = kwargs.get("attention_mask") is None and kwargs.get("position_ids") is not None
        if packed and acc.factors.approximation == "reduce":
            raise ValueError(
                'approximation="reduce" takes rows as sequences, but this batch packs several: use "expand"'
            )
        labels = targets(acc.model, kwargs, logits)
        mask = None if labels is None else labels != _IGNORED
        if acc.factors.fisher == "true":
            acc.backward(acc.sampled_loss(logits, mask), retain_graph=True)
            return
        if loss is None or labels is None:
            raise ValueError(
                "model: it returned no loss, as where the Trainer has a `compute_loss_func`; call "
                "`accumulator.training_loss` in that function instead, without this callback"
            )
        divisor = kwargs.get("num_items_in_batch")
        divisor = float(mask.sum() if divisor is None else divisor)
        if not self._checked and bool(mask.any()):
            check_mean(loss, logits[mask], labels[mask], divisor)
            self._checked = True
        output["loss"] = acc.training_loss(loss, divisor)


def targets(model: nn.Module, kwargs: dict, logits: Tensor) -> Tensor | None:
    """The label that each row of the logits is held against, −100 for none.

    Args:
        model: A model of transformers; it says whether its loss shifts the labels.
        kwargs: Of its forward pass.
        logits: (..., V), what it returned.

    Returns:
        (...) labels, or None if there were none.

    Raises:
        ValueError: The labels are not one class per row of the logits.
    """
    labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
    if labels is None and shifted is None:
        return None
    if shifted is not None:
        labels = shifted
    elif LOSS_MAPPING.get(getattr(model, "loss_type", None)) is ForCausalLMLoss and not model.config.is_encoder_decoder:
        labels = F.pad(labels[..., 1:], (0, 1), value=_IGNORED)
    if labels.shape != logits.shape[:-1] or labels.is_floating_point():
        raise ValueError(
            f"labels must be one class for each row of the logits {tuple(logits.shape)}, got {labels.dtype} of shape "
            f"{tuple(labels.shape)}: only losses that are cross-entropy of `logits` at `labels` are covered"
        )
    return labels.to(logits.device)


def check_mean(loss: Tensor, logits: Tensor, labels: Tensor, divisor: float) -> None:
    """Refuses a loss other than Σ_t −log softmax(logits_t)[label_t] / divisor.

    Args:
        loss: What the model returned.
        logits: (N, V).
        labels: (N,).
        divisor: Number of tokens in the mean.

    Raises:
        ValueError: It differs by more than rounding.
    """
    with torch.no_grad():
        expected = F.cross_entropy(logits.float(), labels, reduction="sum") / divisor
    rounding = 2e-2 if loss.dtype.itemsize < 4 else 1e-4
    if not torch.isclose(loss.detach().float(), expected, rtol=rounding, atol=0, equal_nan=True):
        raise ValueError(
            f"loss: the model returned {loss.item():.6g}, but cross-entropy over {divisor:g} tokens is "
            f"{expected.item():.6g}: the model's loss has other terms (a router's, a penalty) or another mean. "
            'Use fisher="true", or your own loop with `training_loss`'
        )


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
