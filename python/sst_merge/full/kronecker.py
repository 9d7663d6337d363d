"""K-FAC SST of a full checkpoint: of every linear layer the part of the patch that its pencil keeps.

Factors are files of `sst_kernels.Factors`, as a training run's `FactorAccumulator` saves them, harm.safetensors and
benign.safetensors in a folder. Their means are per token ("expand") or per sequence ("reduce"), both files alike, and
so are λ, μ and γ = ε·Σ tr G_b tr A_b / Σ d_out d_in, over all layers. What has no factors (embeddings, output
embedding, norms, biases) stays as in the utility model: no curvature says what its patch would cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from sst_kernels import Factors

from ..settings import Config
from .elementwise import Change
from .fishers import FINGERPRINT_NAME, KINDS, fisher_file, refuse_other_run
from .kfac import Filtered, LayerPencil
from .models import BASE, SAFETY, UTILITY, Models
from .tensors import Slab

_GATHERED = {"harm": "empirical", "benign": "true"}
_WHY = {"harm": "labels are given", "benign": "labels are sampled from the model itself"}


class KroneckerSst:
    """θ = θ_u + αφ with φ = P_kτ or (A + μB)⁻¹Aτ of every linear layer that both files have factors of.

    Args:
        models: What is merged.
        config: Parameters are used.
        factors: Kind -> factors of the same layers.

    Attributes:
        names: Weights that are merged.
        gamma: γ.
        not_covered: What stays as in the utility model, each with the reason.
        rows: Name -> what the report says of a layer, once `changes` came by.
        warnings: Layers whose solution is not to be trusted.

    Raises:
        ValueError: The factors are of other models or normalisations; with the remedy.
    """

    epsilon = threshold = None

    def __init__(self, models: Models, config: Config, factors: dict[str, Factors]) -> None:
        self.models, self.parameters, self.factors = models, config.parameters, factors
        check_factors(models, factors)
        common = factors["harm"].layers.keys() & factors["benign"].layers.keys()
        prefix = f"{models.skeleton.base_model_prefix}."
        weights = {f"{layer.removeprefix(prefix)}.weight": layer for layer in sorted(common & _linear(models).keys())}
        self.layers = {name: layer for name, layer in weights.items() if name in set(models.names)}
        self.names = tuple(name for name in models.names if name in self.layers)
        if not self.names:
            raise ValueError("Fisher folder: no linear layer has factors of both kinds; gather them with some")
        self.not_covered = [
            f"{name}: no Kronecker factors; left as in the utility model"
            for name in models.names
            if name not in self.layers
        ]
        self.rows: dict[str, dict[str, Any]] = {}
        self.warnings: list[str] = []
        self.gamma = self.parameters.damping * self._mean_diagonal()
        if not self.gamma > 0:
            raise ValueError("F_benign is zero: its factors bear no gradient; check the data they were gathered from")

    def _mean_diagonal(self) -> float:
        """Σ tr G_b tr A_b / Σ d_out d_in over the layers that are merged."""
        total = count = 0.0
        for layer in self.layers.values():
            a, g = self.factors["benign"].mean(layer)
            total += float(a.double().trace() * g.double().trace())
            count += len(a) * len(g)
        return total / count

    def changes(self) -> Iterator[Change]:
        """The layers' whole weights, one after another.

        Yields:
            A change of every weight in `names`.

        Raises:
            ValueError: A pencil has no solution; names the layer.
        """
        origin = UTILITY if self.parameters.patch == "interpolate" else BASE
        for name in self.names:
            slab = Slab(name, 0, self.models.of[UTILITY].places[name].numel)
            owners = self.models.needed({UTILITY, SAFETY, origin})
            x = self.models.weighted({owner: self.models.files[owner].read(slab) for owner in owners})
            patch = x[SAFETY] - x[origin]
            filtered = self._filtered(name, patch).to(patch.dtype)
            yield Change(slab, x[UTILITY], patch, filtered, float(len(patch)))

    def _filtered(self, name: str, patch: Tensor) -> Tensor:
        """Φ of a layer, flat and in the order in which its weight is stored."""
        layer, p = self.layers[name], self.parameters
        shape = self.models.of[UTILITY].places[name].shape
        is_transposed = isinstance(self.models.skeleton.get_submodule(layer), Conv1D)
        tau = patch.double().view(shape)
        tau = tau.mT if is_transposed else tau
        pencil = self._pencil(layer)
        try:
            found = pencil.top(tau, min(p.k, tau.numel())) if p.select == "top_k" else pencil.soft(tau, p.mu)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        self._note(name, pencil, tau, found)
        return (found.update.mT if is_transposed else found.update).flatten()

    def _pencil(self, layer: str) -> LayerPencil:
        """The pencil of a layer, in float64 on the merge's device."""
        device = self.models.config.device
        means = [self.factors[kind].mean(layer) for kind in KINDS]
        harm, benign = ((g.to(device, torch.float64), a.to(device, torch.float64)) for a, g in means)
        return LayerPencil(harm, benign, self.gamma)

    def _note(self, name: str, pencil: LayerPencil, patch: Tensor, found: Filtered) -> None:
        """The layer's row of the report."""
        row = {
            "kept": None if found.values is None else len(found.values),
            "gain": found.gain,
            "gain_full": pencil.gain(patch),
            "cost": found.cost,
            "cost_full": pencil.cost(patch),
            "ray": found.gain / found.cost if found.cost else None,
            "solver": found.status,
        }
        if found.values is not None:
            row |= {"largest_value": float(found.values[0]), "smallest_kept_value": float(found.values[-1])}
        self.rows[name] = row
        if not found.converged:
            self.warnings.append(f"{name}: the solver did not converge ({found.status}); raise damping, or mu")


def load_factors(folder: str | Path) -> dict[str, Factors]:
    """Kind -> factors, from harm.safetensors and benign.safetensors.

    Args:
        folder: With both files, as `Factors.save` writes them.

    Returns:
        Both factors.

    Raises:
        ValueError: One is missing, damaged, or something else.
    """
    found = {}
    for kind in KINDS:
        file = fisher_file(folder, kind)
        if not file.is_file():
            raise ValueError(
                f"Fisher folder: {file} does not exist; save FactorAccumulator's factors there, or give `calibration`"
            )
        try:
            found[kind] = Factors.load(file)
        except ValueError as error:
            raise ValueError(f"Fisher folder: {error}") from None
    return found


def check_run(folder: str | Path, fingerprint: Mapping[str, Any]) -> None:
    """ValueError if the folder says that its factors are of another run.

    Args:
        folder: With `FINGERPRINT_NAME`, if we gathered the factors.
        fingerprint: What they are to be of.

    Raises:
        ValueError: Names the differences.
    """
    known = Path(folder, FINGERPRINT_NAME)
    if known.is_file():
        said = json.loads(known.read_text(encoding="utf-8"))
        refuse_other_run(known, said, json.loads(json.dumps(fingerprint)))


def check_factors(models: Models, factors: dict[str, Factors]) -> None:
    """ValueError unless both factors are of this model's layers and of one normalisation; remarks on the rest.

    Args:
        models: What is merged; its remarks are added to.
        factors: Kind -> factors.

    Raises:
        ValueError: Names the difference, and the remedy.
    """
    harm, benign = factors["harm"], factors["benign"]
    if harm.approximation != benign.approximation:
        raise ValueError(
            f"Fisher folder: harm is {harm.approximation} and benign {benign.approximation}: means per token and per "
            "sequence do not compare; gather both alike"
        )
    shapes = _linear(models)
    for kind, given in factors.items():
        for layer, spec in given.specs.items():
            if spec.kind != "linear":
                continue
            if spec.basis:
                raise ValueError(f"Fisher folder: {kind} has {layer} in a basis; gather it at full width")
            if shapes.get(layer) != (spec.d_out, spec.d_in):
                raise ValueError(
                    f"Fisher folder: {kind} has a layer {layer!r} of {spec.d_out} × {spec.d_in}, and the model not; "
                    "gather the factors of this model, under its own names"
                )
        for layer, sums in given.layers.items():
            if not all(torch.isfinite(t).all() for t in sums.tensors().values()):
                raise ValueError(f"Fisher folder: the {kind} factors of {layer} are not finite; gather them again")
        if given.fisher != _GATHERED[kind]:
            models.remarks.append(
                f"the {kind} factors are of the {given.fisher} Fisher; F_{kind} is the {_GATHERED[kind]} one, whose "
                f"{_WHY[kind]}"
            )


def _linear(models: Models) -> dict[str, tuple[int, int]]:
    """Linear layer of the model's class -> (d_out, d_in)."""
    modules = [(n, m) for n, m in models.skeleton.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    return {n: tuple(m.weight.mT.shape if isinstance(m, Conv1D) else m.weight.shape) for n, m in modules}
