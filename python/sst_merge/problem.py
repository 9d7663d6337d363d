"""What is to be merged: two adapters on one base, and the statistics that a method asks for, collected once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from sst_kernels.collect import CoreBasis

from .adapters import Adapter, LowRank, check_compatible, check_fits, read_adapter
from .base import add_bias, is_quantised, load_base, load_skeleton, offloaded, replace_parameter
from .coordinates import core_basis, to_core, weight_basis
from .data import TokenSequence, read_examples, split_held_out, tokenize
from .fisher import CollectionSettings, Collector, Statistics, collect_statistics
from .memory import check_memory
from .settings import Config, FisherParameters


@dataclass(frozen=True)
class Curvature:
    """Statistics, and the coordinates they are in.

    Attributes:
        origin: Module name -> core of Δ_utility.
        patch: Module name -> core of τ; modules whose patch is zero are absent.
        statistics: Fishers in these coordinates.
    """

    origin: Mapping[str, Tensor]
    patch: Mapping[str, Tensor]
    statistics: Statistics


class Problem:
    """Two adapters on one base model.

    Args:
        config: The checked configuration.

    Attributes:
        skeleton: The base model on the meta device: its modules and shapes.
        remarks: What the user should know; printed in the report.

    Raises:
        ValueError: An adapter cannot be read, the two do not fit each other, or one does not fit the base.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.utility = _read(config.utility.model, config.utility.weight, config.device)
        self.safety = _read(config.safety.model, config.safety.weight, config.device)
        check_compatible([self.utility, self.safety])
        self.skeleton = load_skeleton(config)
        for adapter in (self.utility, self.safety):
            check_fits(adapter, self.skeleton)
        self.model_config = self.skeleton.config.get_text_config()
        self.dtype_name = (
            str(self.model_config.dtype or "float32").removeprefix("torch.") if config.dtype == "auto" else config.dtype
        )
        self.names = tuple(sorted({*self.utility.updates, *self.safety.updates}))
        self.remarks = [
            f"the {role} adapter names the base {adapter.base_model!r}; merged on {config.base_model!r}"
            for role, adapter in (("utility", self.utility), ("safety", self.safety))
            if adapter.base_model and os.path.abspath(adapter.base_model) != os.path.abspath(config.base_model)
        ]
        if config.quantization or is_quantised(self.skeleton):
            self.remarks.append("the base is quantised: its Fishers are those of the quantised model")
        self._curvature: dict[tuple, Curvature] = {}

    def updates(self, name: str) -> tuple[LowRank, LowRank]:
        """(Δ_u, Δ_s) of a module; one of rank 0 where an adapter does not have the module."""
        given = self.utility.updates.get(name), self.safety.updates.get(name)
        d_out, d_in = next(u for u in given if u is not None).shape
        device = self.config.device
        zero = LowRank(torch.zeros(d_out, 0, device=device), torch.zeros(0, d_in, device=device))
        return tuple(zero if u is None else u for u in given)

    @cached_property
    def bases(self) -> dict[str, CoreBasis]:
        """Module name -> core basis of its two updates."""
        return {name: core_basis(self.updates(name)) for name in self.names}

    def cores(self, name: str) -> tuple[Tensor, Tensor]:
        """(C_u, C_s) of a module in its core basis, float64."""
        return tuple(to_core(self.bases[name], update) for update in self.updates(name))

    @cached_property
    def tokenizer(self) -> Any:
        """The base model's tokenizer."""
        c = self.config
        options = {"trust_remote_code": c.trust_remote_code, "local_files_only": not c.download}
        try:
            return AutoTokenizer.from_pretrained(c.base_model, **options)
        except (OSError, ValueError) as error:
            hint = "save the model's tokenizer into its folder"
            raise ValueError(f"base_model: no tokenizer in {c.base_model!r} ({hint}): {error}") from None

    @cached_property
    def model(self) -> nn.Module:
        """The base model θ_0 in eval mode, with what the adapters carry besides low-rank updates put in place."""
        model = load_base(self.config, self.skeleton, getattr(torch, self.dtype_name))
        if names := offloaded(model):
            self.remarks.append(
                f"device_map: {len(names)} parameters are offloaded; a backward pass needs their weights on the device "
                "all the same, so this saves little memory"
            )
        for name, value in self.saved.items():
            replace_parameter(model, name, value)
        for name, bias in self.utility.biases.items():
            add_bias(model, name, bias)
        return model.eval()

    @property
    def saved(self) -> dict[str, Tensor]:
        """Whole parameters that one of the adapters carries (modules_to_save)."""
        return {**self.utility.saved, **self.safety.saved}

    @cached_property
    def calibration(self) -> dict[str, tuple[list[TokenSequence], list[TokenSequence]]]:
        """Keys "harm" and "benign" -> (found, held-out) sequences."""
        c, tokenizer = self.config.calibration, self.tokenizer
        parts = {}
        for kind, path in (("harm", c.harm), ("benign", c.benign)):
            try:
                examples = read_examples(path)
                sequences = tokenize(examples, tokenizer, c.max_length)
                self._check_tokens(sequences)
                if len(sequences) < len(examples):
                    left_out = f"{len(examples) - len(sequences)} of {len(examples)} examples left out"
                    self.remarks.append(f"calibration.{kind}: {left_out}, no loss-bearing token within max_length")
                parts[kind] = split_held_out(sequences, c.held_out, self.config.parameters.seed)
            except ValueError as error:
                raise ValueError(f"calibration.{kind} ({path}): {error}") from None
        return parts

    def _check_tokens(self, sequences: list[TokenSequence]) -> None:
        """The base can embed every token at every position."""
        positions = getattr(self.model_config, "max_position_embeddings", None)
        longest = max(len(s.input_ids) for s in sequences)
        if positions is not None and longest > positions:
            raise ValueError(f"a sequence has {longest} tokens, the base takes {positions}; lower max_length")
        largest, vocabulary = max(max(s.input_ids) for s in sequences), self.model_config.vocab_size
        if largest >= vocabulary:
            raise ValueError(
                f"the tokenizer gives token {largest}, the base's vocabulary has {vocabulary}: they do not fit"
            )

    def curvature(
        self, parameters: FisherParameters, *, coordinates: str = "core", diagonal: bool = False
    ) -> Curvature:
        """Fishers of every module that the patch changes; collected at the first call, remembered after.

        Args:
            parameters: Patch, points, samples and seed are used.
            coordinates: "core" or "weight".
            diagonal: Diagonals are enough (exact Fishers may be returned if they are there).

        Returns:
            The statistics in these coordinates.

        Raises:
            ValueError: Data or memory do not allow it.
        """
        key = (coordinates, *_collection_key(parameters))
        for known in ((key, False), (key, diagonal)):
            if known in self._curvature:
                return self._curvature[known]
        curvature = self._collect(parameters, coordinates, diagonal)
        self._curvature[key, diagonal] = curvature
        return curvature

    def _collect(self, parameters: FisherParameters, coordinates: str, diagonal: bool) -> Curvature:
        """Bases, cores of the patch, and statistics."""
        bases, origin, patch = {}, {}, {}
        for name in self.names:
            utility, safety = self.updates(name)
            basis = self.bases[name] if coordinates == "core" else weight_basis(utility)
            cores = to_core(basis, utility), to_core(basis, safety)
            tau = cores[1] if parameters.patch == "additive" else cores[1] - cores[0]
            bases[name], origin[name], patch[name] = basis, cores[0], tau
        changed = {name: tau for name, tau in patch.items() if tau.any()}
        if not changed:
            raise ValueError("the patch is zero: the safety adapter changes nothing, or both adapters are the same")
        check_memory(self, {name: bases[name] for name in changed}, diagonal, coordinates)
        settings = _collection_settings(parameters, self.config, diagonal)
        with Collector(self.model, bases, origin, changed, settings) as collector:
            statistics = collect_statistics(collector, self.calibration["harm"], self.calibration["benign"])
        return Curvature(origin, changed, statistics)


def _read(path: str, weight: float, device: str) -> Adapter:
    """The adapter, its updates and biases multiplied by `weight`."""
    adapter = read_adapter(Path(path), device=device)
    if weight == 1.0:
        return adapter
    return replace(
        adapter,
        updates={name: update.scaled(weight) for name, update in adapter.updates.items()},
        biases={name: weight * bias for name, bias in adapter.biases.items()},
    )


def _points(parameters: FisherParameters) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """T of the points where Fishers are taken, and their normalised weights."""
    if parameters.where == "local":
        return (0.0,), (1.0,)
    points = parameters.points
    weights = [1.0 if parameters.point_weights == "uniform" else 1.0 - t for t in points]
    return points, tuple(w / sum(weights) for w in weights)


def _collection_key(parameters: FisherParameters) -> tuple:
    """What distinguishes one collection from another."""
    return (parameters.patch, *_points(parameters), parameters.samples, parameters.seed)


def _collection_settings(parameters: FisherParameters, config: Config, diagonal: bool) -> CollectionSettings:
    """Settings of a collection."""
    points, weights = _points(parameters)
    return CollectionSettings(
        points,
        weights,
        diagonal,
        config.calibration.batch_size,
        parameters.samples,
        parameters.seed,
    )
