"""Low-rank updates as a PEFT LoRA folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..atomic import replace_dir, save_tensors
from .lowrank import LowRank
from .peft_config import CONFIG_NAME, module_to_save
from .read import PREFIX, WEIGHTS_NAME, Adapter


def write_adapter(
    path: str | Path,
    updates: Mapping[str, LowRank],
    *,
    sources: Sequence[Adapter],
    biases: Mapping[str, Tensor] | None = None,
    saved: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """`write_files` into a folder that appears whole or not at all.

    Args:
        path: The folder; new or empty.
        updates: As for `write_files`.
        sources: As for `write_files`.
        biases: As for `write_files`.
        saved: As for `write_files`.
        dtype: As for `write_files`.
    """
    with replace_dir(path) as folder:
        write_files(folder, updates, sources=sources, biases=biases, saved=saved, dtype=dtype)


def write_files(
    folder: Path,
    updates: Mapping[str, LowRank],
    *,
    sources: Sequence[Adapter],
    biases: Mapping[str, Tensor] | None = None,
    saved: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors: what `peft_state` gives.

    Args:
        folder: Existing folder; files of these names are replaced.
        updates: As for `peft_state`.
        sources: As for `peft_state`.
        biases: As for `peft_state`.
        saved: As for `peft_state`.
        dtype: As for `peft_state`.
    """
    config, tensors = peft_state(updates, sources=sources, biases=biases, saved=saved, dtype=dtype)
    save_tensors(folder / WEIGHTS_NAME, tensors, {"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def peft_state(
    updates: Mapping[str, LowRank],
    *,
    sources: Sequence[Adapter],
    biases: Mapping[str, Tensor] | None = None,
    saved: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's settings and tensors of an adapter: lora_B = up, lora_A = down, scale 1.

    PEFT loads them with no key missing or unexpected. A module of rank 0 is stored as rank 1, zero.
    PEFT matches target_modules by dotted suffix, so a base in which one module's whole name ends
    another's ("head" beside "model.head") would have both wrapped.

    Args:
        updates: ΔW by module name in the base model, one at least.
        sources: The adapters that were merged, one at least: they say what the base model is, which
            modules are embeddings or convolutions, and how whole parameters are stored.
        biases: Additions to outputs by module name, (d_out,), of modules in `updates`; PEFT then
            wants one for every module, so the others get zeros.
        saved: Whole parameters by name in the base model, stored in their own dtype.
        dtype: Of the factors and biases.

    Returns:
        adapter_config.json as a mapping, and contiguous CPU copies of the tensors by PEFT's keys.

    Raises:
        ValueError: There is nothing to write, a bias has no place, or a value overflows `dtype`.
    """
    biases, saved = dict(biases or {}), dict(saved or {})
    if not updates or not sources:
        raise ValueError(
            f"peft_state: needs one update and one source at least, got {len(updates)} and "
            f"{len(sources)}; PEFT cannot load an adapter without modules"
        )
    embeddings = frozenset().union(*(source.embeddings for source in sources))
    kernels = {module: kernel for source in sources for module, kernel in source.kernels.items()}
    _check_biases(biases, updates, embeddings)
    factors = _factors(updates, biases, embeddings, kernels)
    tensors = {key: _stored(key, tensor, dtype) for key, tensor in factors.items()}
    for name, tensor in saved.items():
        module, _, leaf = name.rpartition(".")
        key = f"{module}.base_layer.{leaf}" if module in updates else name
        tensors[f"{PREFIX}{key}"] = _stored(key, tensor, tensor.dtype)
    config = _config(updates, sources, saved)
    if biases:
        config["lora_bias"] = True
    return config, tensors


def _factors(
    updates: Mapping[str, LowRank],
    biases: Mapping[str, Tensor],
    embeddings: frozenset[str],
    kernels: Mapping[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """lora_A, lora_B and, if there are biases, lora_B.bias of every module by PEFT's keys."""
    tensors = {}
    for module, update in sorted(updates.items()):
        update = _at_least_rank_one(update)
        if module in embeddings:
            parts = {"lora_embedding_A": update.down, "lora_embedding_B": update.up}
        else:
            kernel = kernels.get(module, update.down.shape[1:])  # of a convolution PEFT keeps the axes
            up = update.up.reshape(*update.up.shape, *(1 for _ in kernel[1:]))
            parts = {"lora_A.weight": update.down.reshape(update.rank, *kernel), "lora_B.weight": up}
        if biases:
            parts["lora_B.bias"] = biases.get(module, torch.zeros(update.shape[0]))
        tensors |= {f"{PREFIX}{module}.{part}": tensor for part, tensor in parts.items()}
    return tensors


def _config(updates: Mapping[str, LowRank], sources: Sequence[Adapter], saved: Mapping[str, Tensor]) -> dict[str, Any]:
    """Settings with α = r for every module; r is the largest rank, as servers reserve memory by it."""
    ranks = {module: max(update.rank, 1) for module, update in sorted(updates.items())}
    largest = max(ranks.values())
    # Anchored by ^, "layers.1" never matches "layers.11" or the end of a longer name.
    patterns = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != largest}
    wrapped = {
        module
        for name in saved
        for source in sources
        if name in source.saved and name.rpartition(".")[0] not in updates
        if (module := module_to_save(source.config, name))
    }
    first = next((source for source in sources if source.base_model), sources[0])
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": first.base_model,
        "revision": first.revision,
        "task_type": first.config.get("task_type"),
        "auto_mapping": first.config.get("auto_mapping"),
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "use_rslora": False,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "modules_to_save": sorted(wrapped) or None,
        "fan_in_fan_out": any(bool(source.config.get("fan_in_fan_out")) for source in sources),
        "bias": "none",
        "lora_dropout": 0.0,
        "init_lora_weights": True,
    }


def _at_least_rank_one(update: LowRank) -> LowRank:
    """The update, or zeros of rank 1 for one of rank 0, which PEFT cannot hold."""
    if update.rank:
        return update
    d_out, d_in = update.shape
    return LowRank(update.up.new_zeros(d_out, 1), update.down.new_zeros(1, d_in))


def _stored(key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous CPU copy in `dtype`; ValueError if a value is not finite there."""
    tensor = tensor.detach().to("cpu", dtype, copy=True).contiguous()
    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
        raise ValueError(f"{key}: holds values that are not finite as {dtype}; write in a wider dtype")
    return tensor


def _check_biases(biases: Mapping[str, Tensor], updates: Mapping[str, LowRank], embeddings: frozenset[str]) -> None:
    """Raise ValueError for a bias without its module, or beside an embedding."""
    stray = sorted(biases.keys() - updates.keys())
    if stray:
        raise ValueError(f"biases: {stray} are not among the updates; add their modules' updates")
    wrapped = sorted(embeddings & updates.keys())
    if biases and wrapped:
        raise ValueError(
            f"biases: PEFT has no lora_bias beside the LoRA of an embedding ({wrapped}); "
            "leave out the biases or the embedding"
        )
