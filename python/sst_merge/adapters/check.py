"""Whether adapters can be merged with each other, and fit a model."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import nn

from sst_kernels.rows import CONVOLUTIONS, convolution_fault

from .read import Adapter


def check_compatible(adapters: Sequence[Adapter]) -> None:
    """Raise unless all adapters change the same base model in ways that add up.

    A base model or revision that an adapter does not name is not compared; "main" and no revision
    are the same. Whole parameters that are equal in both are no conflict.

    Args:
        adapters: In any order.

    Raises:
        ValueError: Two adapters name different bases, have different shapes for a module, or both
            replace parameters, or one replaces what the other updates.
    """
    for first, second in combinations(adapters, 2):
        pair = f"{first.path} and {second.path}"
        if not _same_base(first, second):
            raise ValueError(
                f"adapters {pair} have different base models: {_base(first)} and {_base(second)}; "
                "if they are the same, make base_model_name_or_path and revision in both "
                "adapter_config.json agree"
            )
        for module in sorted(first.updates.keys() & second.updates.keys()):
            shapes = first.updates[module].shape, second.updates[module].shape
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"adapters {pair}: {module} is (d_out, d_in) = {shapes[0]} in one and "
                    f"{shapes[1]} in the other; their base models differ"
                )
        _check_saved(pair, first, second)


def _base(adapter: Adapter) -> str:
    """The base model and its revision, in words."""
    return f"{adapter.base_model!r} (revision {adapter.revision or 'main'!r})"


def _same_base(first: Adapter, second: Adapter) -> bool:
    """Whether both name one base model and revision, or one of them names none."""
    if first.base_model is None or second.base_model is None:
        return True
    names = [os.path.realpath(a.base_model) if os.path.isdir(a.base_model) else a.base_model for a in (first, second)]
    same_revision = (first.revision or "main") == (second.revision or "main")
    return names[0] == names[1] and same_revision


def _check_saved(pair: str, first: Adapter, second: Adapter) -> None:
    """Raise ValueError if whole parameters of the two get in each other's way."""
    replaced = []
    for adapter, other in ((first, second), (second, first)):
        # Beside a LoRA of its own module, a whole parameter is PEFT's copy of the base's.
        own = {name for name in adapter.saved if _module(name) not in adapter.updates}
        for name in sorted(own):
            if _module(name) in other.updates:
                raise ValueError(
                    f"adapters {pair}: {adapter.path} replaces {name}, which {other.path} "
                    "updates; train one of them without that module"
                )
        replaced.append(own)
    shared = first.saved.keys() & second.saved.keys()
    equal = {name for name in shared if torch.equal(first.saved[name], second.saved[name])}
    ours, theirs = (sorted(own - equal) for own in replaced)
    if ours and theirs:
        raise ValueError(
            f"adapters {pair} both replace whole parameters, which cannot be merged: {ours} and "
            f"{theirs}; train one of them without modules_to_save"
        )
    if unequal := sorted(shared - equal):
        raise ValueError(
            f"adapters {pair} hold different copies of {unequal}; their base models differ, "
            "train both on one base model"
        )


def _module(parameter: str) -> str:
    """Name of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def check_fits(adapter: Adapter, model: nn.Module) -> None:
    """Raise unless every module that the adapter changes exists in the model with its shape.

    Args:
        adapter: As `read_adapter` gives it.
        model: The base model; linear layers may be quantised.

    Raises:
        ValueError: A module or parameter is missing, of another kind or of another shape. Names it,
            what the adapter expects and what the model has.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, update in adapter.updates.items():
        if name not in modules:
            raise ValueError(f"adapter {adapter.path}: {_missing(name, modules)}")
        kind = adapter.kind(name)
        wanted = kind, (update.shape[0], *adapter.kernels.get(name, update.shape[1:]))
        found = _kind_and_shape(modules[name])
        if isinstance(modules[name], CONVOLUTIONS) and (fault := _convolution_fault(modules[name])):
            raise ValueError(
                f"adapter {adapter.path}: {name} is a convolution whose LoRA PEFT does not compute as a change of "
                f"its weight ({fault}); train without that module"
            )
        if found != wanted:
            raise ValueError(
                f"adapter {adapter.path}: {name} must be {_ARTICLE[kind]} with {_AXES[kind]} = "
                f"{wanted[1]}, the base model has {_describe(modules[name], found)}; "
                "name the base model that the adapter was trained on"
            )
    parameters = model.state_dict(keep_vars=True)
    for name, tensor in adapter.saved.items():
        if name not in parameters:
            raise ValueError(f"adapter {adapter.path}: {_missing(name, parameters)}")
        if parameters[name].shape != tensor.shape:
            raise ValueError(
                f"adapter {adapter.path}: {name} is {tuple(tensor.shape)}, the base model has "
                f"{tuple(parameters[name].shape)}; if the vocabulary was resized for training, "
                "resize the base model's embeddings, save it, and name that as the base"
            )


_ARTICLE = {"linear": "a linear layer", "embedding": "an embedding", "convolution": "a convolution"}
_AXES = {"linear": "(d_out, d_in)", "embedding": "(d_out, d_in)", "convolution": "(d_out, c_in, k…)"}


def _convolution_fault(layer: nn.Module) -> str | None:
    """What of a convolution PEFT's lora_A, made of its kernel size, stride and padding, does not repeat."""
    if any(step != 1 for step in layer.dilation):
        return f"dilation={layer.dilation}"
    return convolution_fault(layer)


def _kind_and_shape(module: nn.Module) -> tuple[str, tuple[int, ...]] | None:
    """Kind and (d_out, d_in) of a linear map, (d_out, c_in, k…) of a convolution's; None for anything else."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Embedding):
        return "embedding", (module.embedding_dim, module.num_embeddings)
    if isinstance(module, CONVOLUTIONS):
        return "convolution", tuple(module.weight.shape)
    if isinstance(module, Conv1D):
        return "linear", (module.weight.shape[1], module.weight.shape[0])
    # Quantised layers (bitsandbytes, GPTQ, AWQ, …) pack their weight but keep these two.
    shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if all(isinstance(size, int) for size in shape):
        return "linear", shape
    return None


def _describe(module: nn.Module, found: tuple[str, tuple[int, ...]] | None) -> str:
    """What the model has, in words."""
    name = type(module).__name__
    return f"a {name} with {_AXES[found[0]]} = {found[1]}" if found else f"a {name}"


def _missing(name: str, present: dict[str, object]) -> str:
    """That `name` is not in the model, with the nearest name that is."""
    near = difflib.get_close_matches(name, present, n=1, cutoff=0.8)
    hint = f" (nearest: {near[0]})" if near else ""
    return f"the base model has no {name}{hint}; name the base model that the adapter was trained on, and its class"
