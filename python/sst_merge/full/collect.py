"""Diagonal Fishers of a full checkpoint, diag F = E[g²], g the gradient of one sequence's log-likelihood.

F_harm has the refusals as labels, F_benign labels sampled from the model at the point; both at θ_u (local) or averaged
over points θ_u + tτ (path), and both means per sequence. A gradient is squared as soon as it is complete and dropped:
in memory are the model, one sum of its size in float32 and the gradient of one tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..atomic import replace_file
from ..base import input_device, load_base, model_bytes
from ..data import TokenSequence, read_examples, tokenize
from ..fisher import log_likelihood
from ..memory import available_memory
from ..packing import batches
from ..settings import Config, FisherParameters
from .fingerprint import fingerprint, hash_sequences
from .fishers import KINDS, METADATA_KEY, NORMALISATION, check_fishers, fisher_file
from .models import BASE, SAFETY, UTILITY, Models
from .tensors import Place, slabs
from .writer import Entry, ShardWriter


def collect_diagonals(models: Models, folder: str | Path) -> list[str]:
    """Write harm.safetensors and benign.safetensors, each when it is complete; one that is there is kept.

    Args:
        models: The three checkpoints; the configuration's calibration, method and dtype are used.
        folder: Made if need be.

    Returns:
        What was measured, in words.

    Raises:
        ValueError: Data, memory or model do not allow it, or the folder holds another run's Fishers or other things.

    Cost: for every kind, point and sequence one forward and one backward pass of a batch of one, and reading the models
    once for every kind and point.
    """
    parameters, folder = models.config.parameters, Path(folder)
    refuse_foreign(folder)
    sequences = {kind: read_sequences(models, kind) for kind in KINDS}
    said = {
        kind: {**fingerprint(models, parameters), **data_fingerprint(models, parameters, sequences[kind])}
        for kind in KINDS
    }
    for kind in KINDS:
        if fisher_file(folder, kind).is_file():
            check_fishers(models, fisher_file(folder, kind), said[kind])
    todo = [kind for kind in KINDS if not fisher_file(folder, kind).is_file()]
    if todo:
        model = load_utility(models, 4)
        folder.mkdir(parents=True, exist_ok=True)
    for kind in todo:
        sums = _sums(models, model, kind, sequences[kind])
        _save(models, fisher_file(folder, kind), sums, len(sequences[kind]), said[kind])
    where = "θ_u" if parameters.where == "local" else f"θ_u + tτ, t = {', '.join(map(str, parameters.points))}"
    return [f"diagonal Fishers from {len(sequences[kind])} {kind} sequences at {where}" for kind in KINDS]


def read_sequences(models: Models, kind: str) -> list[TokenSequence]:
    """The calibration sequences of a kind, all of them: none is held out.

    Args:
        models: Tokenizers and configuration are used.
        kind: "harm" or "benign".

    Returns:
        At least one sequence of every task; the weight of one is its share of F = Σ_t w_t Σ_i ω_i g_i g_iᵀ / Σ_i ω_i.

    Raises:
        ValueError: The data do not do; names the file.
    """
    calibration = models.config.calibration
    if calibration.tokenizer not in models.tokenizers:
        raise ValueError(f"calibration.tokenizer: {calibration.tokenizer!r} has none; save one into its folder")
    sequences = []
    for task in calibration.tasks(kind):
        try:
            found = _read_task(models, task.data)
        except ValueError as error:
            raise ValueError(f"calibration.{kind} ({task.data}): {error}") from None
        total = sum(s.weight for s in found)
        sequences += [replace(s, weight=task.weight * s.weight / total) for s in found]
    return sequences


def _read_task(models: Models, path: str) -> list[TokenSequence]:
    """The sequences of one file."""
    calibration, vocabulary = models.config.calibration, models.skeleton.config.get_text_config().vocab_size
    examples = [e for e in read_examples(path) if e.weight]
    if unanswered := [e.origin for e in examples if not e.is_answered]:
        raise ValueError(
            f"{len(unanswered)} prompts have no answer (first: {unanswered[0]}), and for full checkpoints none are "
            "generated; give answers"
        )
    sequences = tokenize(examples, models.tokenizers[calibration.tokenizer], calibration.max_length)
    if not sequences:
        raise ValueError(
            f"no token bears loss within max_length={calibration.max_length}: give answers, or raise max_length"
        )
    largest = max(max(s.input_ids) for s in sequences)
    if largest >= vocabulary:
        raise ValueError(f"the data hold token {largest}, the model's vocabulary has {vocabulary}")
    return sequences


def data_fingerprint(
    models: Models, parameters: FisherParameters, sequences: Sequence[TokenSequence]
) -> dict[str, Any]:
    """The part of the fingerprint that says with which data, labels and arithmetic, as JSON values."""
    return {
        "data": hash_sequences(sequences),
        "dtype": models.config.dtype,
        "samples": parameters.samples,
        "seed": parameters.seed,
    }


def load_utility(models: Models, bytes_an_entry: int) -> nn.Module:
    """The utility model in eval mode; embeddings that the merge unties are untied.

    Args:
        models: The three checkpoints.
        bytes_an_entry: What the collection needs besides, of every weight.

    Returns:
        The model.

    Raises:
        ValueError: It does not fit, or cannot be loaded.
    """
    config = models.config
    of_utility: Config = replace(config, base_model=str(models.of[UTILITY].folder))
    dtype = next(models.skeleton.parameters()).dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    entries = sum(models.of[UTILITY].places[name].numel for name in models.names)
    needed, available = (
        model_bytes(of_utility, models.skeleton, dtype) + bytes_an_entry * entries,
        available_memory(config.device),
    )
    if needed > available:
        raise ValueError(
            f"memory: {needed / 2**30:.1f} GiB are needed for model and sums, and of {config.device} "
            f"{available / 2**30:.1f} GiB are free; load the model in a smaller dtype (--dtype "
            "bfloat16), or use a larger device"
        )
    model = load_base(of_utility, models.skeleton, dtype).eval()
    if models.unties:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach().clone())
    return model


def parameters_of(models: Models, model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter, for all that is merged.

    Args:
        models: What is merged.
        model: The utility model.

    Returns:
        In the order of `models.names`.

    Raises:
        ValueError: The class renames or fuses what it loads.
    """
    prefix = f"{model.base_model_prefix}."
    found = {name.removeprefix(prefix): parameter for name, parameter in model.named_parameters()}
    if missing := [name for name in models.names if name not in found]:
        raise ValueError(
            f"{type(model).__name__} has no parameters named {missing[:3]}: it renames or fuses what it loads, so "
            "gradients do not belong to the files' tensors; use a method without Fishers, or give Fisher files"
        )
    return {name: found[name] for name in models.names}


@torch.no_grad()
def move_to(models: Models, parameters: Mapping[str, nn.Parameter], t: float) -> None:
    """θ ← θ_u + tτ, read from the files slab by slab.

    Args:
        models: The three checkpoints; the configuration says what τ is.
        parameters: From `parameters_of`; changed in place.
        t: Of the point.
    """
    origin = UTILITY if models.config.parameters.patch == "interpolate" else BASE
    owners = models.needed({UTILITY, SAFETY, origin} if t else {UTILITY})
    for slab in slabs(models.names, models.of[UTILITY].places):
        x = models.weighted({owner: models.files[owner].read(slab) for owner in owners})
        value = x[UTILITY] + t * (x[SAFETY] - x[origin]) if t else x[UTILITY]
        parameters[slab.name].view(-1)[slab.start : slab.stop].copy_(value)


@contextmanager
def _squares(parameters: Mapping[str, nn.Parameter], sums: Mapping[str, Tensor]) -> Iterator[list[float]]:
    """While entered, sums ← sums + w g² for every gradient g that a backward pass completes; gives [w], to be set."""
    weight = [0.0]

    def add(name: str, parameter: nn.Parameter) -> None:
        sums[name].addcmul_(g := parameter.grad.float(), g, value=weight[0])
        parameter.grad = None

    with ExitStack() as stack:
        for name, parameter in parameters.items():
            handle = parameter.register_post_accumulate_grad_hook(lambda p, name=name: add(name, p))
            stack.callback(handle.remove)
        yield weight


def _sums(models: Models, model: nn.Module, kind: str, sequences: Sequence[TokenSequence]) -> dict[str, Tensor]:
    """Name -> Σ w g² over the sequences and points: the mean, as the weights have it."""
    p = models.config.parameters
    parameters = parameters_of(models, model)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    seed, samples = (None, 1) if kind == "harm" else (p.seed, p.samples)
    rows = list(batches(sequences, 1, input_device(model)))
    with (
        _squares(parameters, sums) as weight,
        tqdm(total=len(rows) * len(p.weighted_points[0]), desc=kind, unit="sequence", leave=False) as bar,
    ):
        for t, w in zip(*p.weighted_points, strict=True):
            move_to(models, parameters, t)
            for batch in rows:
                weight[0] = float(batch.weight) * w / samples
                logits = None
                for sample in range(samples):
                    loss, logits = log_likelihood(model, batch, seed, sample, logits)
                    loss.backward(retain_graph=sample + 1 < samples)
                bar.update()
    return sums


def _save(models: Models, file: Path, sums: Mapping[str, Tensor], count: int, said: Mapping[str, Any]) -> None:
    """The means as a safetensors file, tensors named as the utility model's; ValueError if it is not finite."""
    total = 0.0
    for name, values in sums.items():
        total += float(values.double().sum())
        if not torch.isfinite(values).all():
            raise ValueError(
                f"the gradients of {name} are not finite: the model has NaN weights or overflows in its dtype; try "
                "--dtype float32 or bfloat16"
            )
    if not total:
        raise ValueError(f"{file.stem}: every gradient is zero; check calibration.{file.stem}")
    metadata = {"normalisation": NORMALISATION, "count": count, "sum": total, "fingerprint": said}
    places: dict[str, Place] = models.of[UTILITY].places
    entries = [Entry(places[name].key, "F32", places[name].shape, 4 * places[name].numel) for name in sums]
    with replace_file(file) as fresh, ShardWriter(fresh, entries, {METADATA_KEY: json.dumps(metadata)}) as writer:
        for name, values in sums.items():
            for slab in slabs([name], places):
                writer.write(places[name].key, slab.start, values.view(-1)[slab.start : slab.stop].cpu())


def refuse_foreign(folder: Path, *others: str) -> None:
    """ValueError if a folder exists and holds anything but Fishers."""
    ours = {*others, *(fisher_file(folder, kind).name for kind in KINDS)}
    if folder.exists() and (
        not folder.is_dir() or any(f.name not in ours and not f.match(".*.new") for f in folder.iterdir())
    ):
        raise ValueError(f"Fisher folder: {folder} exists and holds other things; name a new or empty folder")
