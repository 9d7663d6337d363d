"""Kronecker factors of a full checkpoint's linear layers, by `sst_kernels.FactorAccumulator`."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from sst_kernels import AccumulatorOptions, FactorAccumulator, Factors

from ..atomic import write_text
from ..base import input_device
from ..data import TokenSequence
from ..fisher import log_likelihood
from ..packing import Batch, batches
from .collect import data_fingerprint, load_utility, move_to, parameters_of, read_sequences, refuse_foreign
from .fingerprint import fingerprint
from .fishers import FINGERPRINT_NAME, KINDS, fisher_file
from .kronecker import check_run
from .models import Models


def collect_factors(models: Models, folder: str | Path) -> list[str]:
    """Write harm.safetensors and benign.safetensors, each when it is complete; one that is there is kept.

    The factors of a path are sums over its points, and those of several tasks over them, weighed by token: A and G are
    means over points and tokens. The output embedding is left out: over a large vocabulary its factor is larger than
    the model.

    Args:
        models: The three checkpoints; the configuration's calibration, method and dtype are used.
        folder: Made if need be.

    Returns:
        What was measured, in words.

    Raises:
        ValueError: Data or model do not allow it, or the folder holds another run's factors or other things.

    Cost: for every kind and point, forward and backward passes over the sequences (activation gradients only).
    """
    parameters, folder = models.config.parameters, Path(folder)
    refuse_foreign(folder, FINGERPRINT_NAME)
    sequences = {kind: read_sequences(models, kind) for kind in KINDS}
    said = {"approximation": parameters.approximation} | fingerprint(models, parameters)
    said |= {kind: data_fingerprint(models, parameters, sequences[kind]) for kind in KINDS}
    check_run(folder, said)
    todo = [kind for kind in KINDS if not fisher_file(folder, kind).is_file()]
    if todo:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FINGERPRINT_NAME, json.dumps(said, indent=1) + "\n")
        model = load_utility(models, 0)
    for kind in todo:
        _gather(models, model, kind, sequences[kind]).save(fisher_file(folder, kind))
    return [f"Kronecker factors from {len(sequences[kind])} {kind} sequences" for kind in KINDS]


def _gather(models: Models, model: nn.Module, kind: str, sequences: list[TokenSequence]) -> Factors:
    """The factors of one kind."""
    p, config = models.config.parameters, models.config
    if p.approximation == "reduce" and len({s.weight for s in sequences}) > 1:
        raise ValueError(f"calibration.{kind}: weights are of tokens, and reduce has none; use approximation: expand")
    weights, head = parameters_of(models, model), model.get_output_embeddings()
    layers = [
        name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    rows = list(batches(sequences, config.calibration.batch_size, input_device(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what has no factors: the report names it
        accumulator = FactorAccumulator(
            model,
            layers,
            fisher="empirical" if kind == "harm" else "true",
            approximation=p.approximation,
            options=AccumulatorOptions(seed=p.seed),
        )
    with accumulator, tqdm(total=len(rows) * len(p.weighted_points[0]), desc=kind, unit="batch", leave=False) as bar:
        for t, weight in zip(*p.weighted_points, strict=True):
            move_to(models, weights, t)
            for batch in rows:
                mask = batch.attention_mask
                if p.approximation == "expand":
                    mask = mask * (weight * len(sequences) * batch.weight[:, None].float()).to(mask.device)
                accumulator.batch(mask=mask, sequences=batch.index)
                _one_batch(accumulator, model, batch, 1 if kind == "harm" else p.samples)
                bar.update()
    return accumulator.factors


def _one_batch(accumulator: FactorAccumulator, model: nn.Module, batch: Batch, samples: int) -> None:
    """Forward and backward passes of declared losses."""
    if accumulator.factors.fisher == "empirical":
        likelihood, _ = log_likelihood(model, batch, None)
        return accumulator.backward(accumulator.training_loss(-likelihood))
    logits = model(**batch.model_inputs, use_cache=False).logits
    bearing = torch.zeros_like(batch.is_target)
    bearing[:, :-1] = batch.is_target[:, 1:]  # logits at a position predict the token after it
    for sample in range(samples):
        accumulator.backward(accumulator.sampled_loss(logits, bearing), retain_graph=sample + 1 < samples)
    return None
