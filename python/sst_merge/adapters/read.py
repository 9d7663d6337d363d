"""A PEFT LoRA folder as low-rank updates of the base model, by module name."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .lowrank import LowRank
from .peft_config import CONFIG_NAME, locate, module_to_save, rank_and_scale, read_config, refusals

WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."

_PART = re.compile(r"(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB])")
_LINEAR = frozenset({"lora_A.weight", "lora_B.weight"})
_EMBEDDING = frozenset({"lora_embedding_A", "lora_embedding_B"})
# PEFT stores these whole, outside modules_to_save, when the vocabulary was resized.
_VOCABULARY = frozenset({"embed_tokens", "lm_head", "wte", "shared", "word_embeddings", "embed_in", "embed_out"})


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter as changes of the base model.

    Attributes:
        path: The folder that holds adapter_config.json.
        base_model: Name or path of the base model, None if the adapter does not say.
        revision: Revision of the base model, None if the adapter does not say.
        updates: ΔW by module name in the base model (for example
            "model.layers.0.self_attn.q_proj"), sorted.
        embeddings: The modules of `updates` that are embeddings.
        biases: lora_bias by module name, (d_out,), scale folded in: y += bias.
        saved: Whole parameters (modules_to_save, resized or wrapped embeddings) by name in the base
            model, dtype as stored.
        config: adapter_config.json as stored.
        kernels: (c_in, k…) of the modules of `updates` that are convolutions; their d_in is the product, patches in
            the order of `weight.flatten(1)`.
    """

    path: Path
    base_model: str | None
    revision: str | None
    updates: dict[str, LowRank]
    embeddings: frozenset[str]
    biases: dict[str, Tensor]
    saved: dict[str, Tensor]
    config: dict[str, Any]
    kernels: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def kind(self, module: str) -> str:
        """What `module`, one of `updates`, is in the base model: "linear", "embedding" or "convolution"."""
        if module in self.embeddings:
            return "embedding"
        return "convolution" if module in self.kernels else "linear"


def read_adapter(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Adapter:
    """Read a PEFT LoRA folder: ΔW = scale · lora_B · lora_A for each module.

    fan_in_fan_out needs no care: lora_B · lora_A acts on x however the base stores its weight.

    Args:
        path: Folder with adapter_config.json and adapter_model.safetensors, or its parent when that
            holds one adapter only.
        device: Where the tensors go.
        dtype: Floating dtype of the updates and biases.

    Returns:
        The adapter, all tensors finite.

    Raises:
        ValueError: A file is missing, damaged or a pickle; a setting or a tensor makes the adapter
            something else than a change of linear maps; a tensor is misshapen or not finite. Names
            the file, the key and the remedy.
    """
    folder = locate(path)
    config = read_config(folder)
    if reasons := refusals(config):
        raise ValueError(f"{folder / CONFIG_NAME}: " + "; ".join(reasons))
    file = folder / WEIGHTS_NAME
    return assemble(folder, file, config, _load(file, str(device)), dtype)


def assemble(
    path: Path, where: Path | str, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> Adapter:
    """The adapter of PEFT's settings and tensors: ΔW = scale · lora_B · lora_A for each module.

    Args:
        path: What `Adapter.path` becomes.
        where: What errors call the origin of the tensors.
        config: As `read_config` gives it, without `refusals`.
        tensors: By PEFT's keys in a file.
        dtype: As for `read_adapter`.

    Returns:
        The adapter.

    Raises:
        ValueError: A tensor is misshapen, missing, not finite, or has no place in an adapter that is linear in ΔW.
    """
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
            raise ValueError(f"{where}: {key} holds NaN or infinity; save the adapter again")
    factors, saved = _sort_keys(where, tensors, config)
    updates, embeddings, biases, kernels = {}, set(), {}, {}
    for module in sorted(factors):
        parts = factors[module]
        rank, scale = rank_and_scale(config, module)
        _check_parts(f"{where}: {module}", parts, rank, bool(config.get("lora_bias")))
        names = _LINEAR if parts.keys() >= _LINEAR else _EMBEDDING
        down, up = (parts[name].to(dtype) for name in sorted(names))
        if down.ndim > 2:
            kernels[module] = tuple(down.shape[1:])
        updates[module] = LowRank(up.flatten(1) * scale, down.flatten(1))
        if names is _EMBEDDING:
            embeddings.add(module)
        if "lora_B.bias" in parts:
            biases[module] = parts["lora_B.bias"].to(dtype) * scale
    return Adapter(
        path=path,
        base_model=config.get("base_model_name_or_path") or None,
        revision=config.get("revision"),
        updates=updates,
        embeddings=frozenset(embeddings),
        biases=biases,
        saved=saved,
        config=config,
        kernels=kernels,
    )


def _load(file: Path, device: str) -> dict[str, Tensor]:
    """All tensors of a safetensors file; ValueError for a missing, damaged or pickled one."""
    pickled = file.with_name("adapter_model.bin")
    if not file.is_file() and pickled.is_file():
        raise ValueError(
            f"{pickled}: a pickle, which can run code when it is read, and is refused; load it in "
            "PEFT if you trust it, and save_pretrained(…, safe_serialization=True)"
        )
    if not file.is_file():
        raise ValueError(f"{file}: missing; name the folder that PEFT's save_pretrained wrote")
    try:
        with safe_open(file, framework="pt", device=device) as tensors:
            return {key: tensors.get_tensor(key) for key in tensors.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: damaged or not a safetensors file ({error}); copy or save it again") from None


def _sort_keys(
    where: Path | str, tensors: dict[str, Tensor], config: dict[str, Any]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Factors (module → part → tensor) and whole parameters; ValueError for other keys, or without factors."""
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    rest = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if name != key and (match := _PART.fullmatch(name)):
            factors[match[1]][match[2]] = tensor
        else:
            rest[key] = tensor
    saved = {}
    for key, tensor in rest.items():
        module, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        wrapped = module.removesuffix(".base_layer")
        vocabulary = leaf == "weight" and module.rpartition(".")[2] in _VOCABULARY
        if module != wrapped and wrapped in factors:  # PEFT's copy of a wrapped embedding
            saved[f"{wrapped}.{leaf}"] = tensor
        elif (
            key.startswith(PREFIX) and "lora_" not in key and (vocabulary or module_to_save(config, f"{module}.{leaf}"))
        ):
            saved[f"{module}.{leaf}"] = tensor
        else:
            raise ValueError(f"{where}: {key} {_why_unknown(key)}")
    if not factors:
        raise ValueError(f"{where}: holds no LoRA weights; there is nothing to merge")
    return factors, saved


def _why_unknown(key: str) -> str:
    """What an unreadable key means, and what to do about it."""
    if "lora_magnitude_vector" in key:
        return "belongs to DoRA, which is not linear in ΔW; train without use_dora"
    return (
        "is neither a LoRA factor of a module nor a parameter that modules_to_save names; "
        "it may come from a LoRA variant that cannot be merged: train or save as plain LoRA"
    )


def _check_parts(where: str, parts: dict[str, Tensor], rank: int, with_bias: bool) -> None:
    """Raise ValueError unless the tensors of one module are whole and chain with rank `rank`."""
    names = parts.keys() - {"lora_B.bias"}
    if names != _LINEAR and names != _EMBEDDING:
        raise ValueError(
            f"{where}: expected lora_A and lora_B (or lora_embedding_A and lora_embedding_B), "
            f"got {sorted(parts)}; the file is incomplete, save the adapter again"
        )
    down, up = (parts[name] for name in sorted(names))
    shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
    if down.ndim == up.ndim == 5:
        raise ValueError(f"{where}: LoRA of a Conv3d, {shapes}, cannot be merged; train without that module")
    if down.ndim in (3, 4) and down.shape[0] == rank and up.shape[1] in range(1, rank) and rank % up.shape[1] == 0:
        groups = rank // up.shape[1]
        raise ValueError(
            f"{where}: LoRA of a convolution of {groups} groups, {shapes}, cannot be merged; train without that module"
        )
    convolution = names == _LINEAR and down.ndim in (3, 4) and up.shape[2:] == (1,) * (down.ndim - 2)
    chained = down.ndim == up.ndim and down.shape[0] == rank and up.shape[1:2] == (rank,)
    if not chained or not (down.ndim == 2 or convolution):
        raise ValueError(
            f"{where}: lora_A and lora_B must be ({rank}, d_in) and (d_out, {rank}), as r and "
            f"rank_pattern say, or a convolution's ({rank}, c_in, k…) and (d_out, {rank}, 1…), got {shapes}; "
            "restore the file or its adapter_config.json"
        )
    if not (down.is_floating_point() and up.is_floating_point()):
        raise ValueError(f"{where}: expected floating point, got {down.dtype} and {up.dtype}")
    bias = parts.get("lora_B.bias")
    if (bias is not None) != (with_bias and names == _LINEAR):
        raise ValueError(
            f"{where}: lora_B.bias is {'missing' if bias is None else 'stored'} although lora_bias "
            f"is {with_bias}; restore the file or its adapter_config.json"
        )
    if bias is not None and bias.shape != up.shape[:1]:
        raise ValueError(
            f"{where}: lora_B.bias must be ({up.shape[0]},), got {tuple(bias.shape)}; save the adapter again"
        )
