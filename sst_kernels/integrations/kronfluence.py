"""Kronecker factors that kronfluence (Grosse et al. 2023) has gathered, as `Factors`.

A folder of its factors (`factors_NAME`) holds four safetensors files, each a tensor for every module by its name:

| file | tensor | |
|---|---|---|
| `activation_covariance` | Σ_t x̄_t x̄_tᵀ, x̄ = (x, 1) where the layer has a bias | (d_in or d_in + 1, twice) |
| `gradient_covariance` | Σ_t δ_t δ_tᵀ | (d_out, d_out) |
| `num_activation_covariance_processed` | Σ_t 1 | (1,) int64 |
| `num_gradient_covariance_processed` | the same of δ | (1,) int64 |

These are sums over tokens, as ours are. The coordinate of the bias is left out: biases have no factor here. Rows are
tokens (`approximation="expand"`); masked ones are neither summed nor counted. δ is the gradient of the task's training
loss, whatever it was: a mean over tokens, which kronfluence warns against, scales G and cannot be seen in the files.
Eigenvectors and the EK-FAC eigenvalues of its other files are not read. kronfluence itself is not needed.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ..factors import Factors, read_tensors
from ..layer_factors import LayerFactors, LayerSpec
from ..layers import describe
from ..ops import pack_lower

_SUMS = ("activation_covariance", "gradient_covariance")
_COUNTS = tuple(f"num_{name}_processed" for name in _SUMS)


def read_kronfluence(folder: str | Path, model: nn.Module) -> Factors:
    """S_A, S_G and their counts from a folder of kronfluence's factors (1.0).

    Args:
        folder: Where `fit_covariance_matrices` put its four files: `…/factors_NAME`.
        model: The model they were gathered on, before `prepare_model`; its modules say which layers have a bias. It may
            be on the meta device: only shapes are read.

    Returns:
        Factors on the host of all modules in the folder, float32, or float64 where both sums are; `fisher` as its
        arguments say. Backward passes were not counted.

    Raises:
        ValueError: A file is missing or no safetensors file, a module is not in the model or has other sizes, a count
            is zero, sums are not finite, or the kind of Fisher is not written down; the message names it.
    """
    folder = Path(folder)
    files, metadata = {}, {}
    for name in _SUMS + _COUNTS:
        files[name], metadata = _read(folder, name)
    modules = dict(model.named_modules())
    factors = Factors(specs={}, fisher=_fisher(folder, metadata))
    names = {name for tensors in files.values() for name in tensors}
    if unknown := sorted(names - modules.keys()):
        raise ValueError(
            f"model: no module {unknown[0]!r}, whose factors are in {folder}; pass the model as it was there"
        )
    for name in (name for name in modules if name in names):  # in the model's order
        if lacking := [file for file, tensors in files.items() if name not in tensors]:
            raise ValueError(f"folder: {folder / lacking[0]}.safetensors has no module {name!r}, which others have")
        spec = describe(modules[name])
        if isinstance(spec, str):
            raise ValueError(f"model: module {name!r} can have no factors: {spec}")
        biased = getattr(modules[name], "bias", None) is not None
        factors.specs[name] = spec
        factors.layers[name] = _layer(f"{folder}: {name!r}", spec, biased, [files[f][name] for f in _SUMS + _COUNTS])
    return factors


def _read(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one of the files."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        parts = sorted(folder.glob(f"{name}_data_partition*"))
        remedy = (
            "it is in parts; call kronfluence's aggregate_covariance_matrices first"
            if parts
            else "pass the folder factors_NAME that kronfluence's fit_covariance_matrices wrote"
        )
        raise ValueError(f"folder: no file {path}: {remedy}")
    return read_tensors(path)


def _fisher(folder: Path, metadata: dict[str, str]) -> str:
    """Which Fisher, from a file's metadata, or, where parts were aggregated, from the arguments beside it."""
    path = folder / "factor_arguments.json"
    if "use_empirical_fisher" not in metadata and path.is_file():
        metadata = json.loads(path.read_text())
    kinds = {"True": "empirical", "False": "true"}
    kind = str(metadata.get("use_empirical_fisher"))
    if kind not in kinds:
        raise ValueError(f"folder: neither the files' metadata nor {path} says use_empirical_fisher: of which Fisher?")
    return kinds[kind]


def _layer(where: str, spec: LayerSpec, biased: bool, tensors: list[Tensor]) -> LayerFactors:
    """One layer's sums, without the bias's coordinate, checked."""
    a, g, *counts = tensors
    d_in, d_out = spec.d_in + biased, spec.d_out
    if a.shape != (d_in, d_in) or g.shape != (d_out, d_out):
        raise ValueError(
            f"folder: {where} has sums {tuple(a.shape)} and {tuple(g.shape)}, but the model's layer needs "
            f"{(d_in, d_in)} and {(d_out, d_out)}; pass the model that they were gathered on"
        )
    if min(int(n) for n in counts) < 1:
        raise ValueError(f"folder: {where} counts no tokens; gather its factors again")
    if not (a.isfinite().all() and g.isfinite().all()):
        raise ValueError(f"folder: {where} holds NaN or infinity; gather its factors again")
    dtype = torch.float64 if a.dtype == g.dtype == torch.float64 else torch.float32
    sums = [pack_lower(s.to(dtype)) for s in (a[: spec.d_in, : spec.d_in], g)]
    return LayerFactors(*sums, torch.tensor([float(n) for n in counts], dtype=torch.float64))
