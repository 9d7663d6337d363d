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

from sst_kernels.collect import CoreBasis

from .adapters import Adapter, LowRank, check_compatible, check_fits, read_adapter
from .base import add_bias, is_quantised, load_base, load_skeleton, offloaded, replace_parameter
from .calibration import read_tasks
from .coordinates import core_basis, factor_gradients, to_core, weight_basis
from .data import TokenSequence
from .fingerprint import fingerprint, hash_cores
from .fisher import CollectionSettings, Collector, collect_statistics
from .memory import plan_memory
from .mixture import Statistics
from .packing import check_packing
from .settings import ROLES, Config, FisherParameters
from .store import STEP_NAME, FisherFolder, serves
from .tasks import Task
from .vocabulary import check_tokenizers, read_tokenizers


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


@dataclass(frozen=True)
class Place:
    """Where a later step of a merge begins.

    Attributes:
        step: How many steps were made.
        digest: Hash of where they led, and of what remains.
    """

    step: int
    digest: str


@dataclass(frozen=True)
class Live:
    """Two adapters and their base model in memory, taken instead of what the configuration's paths hold.

    Attributes:
        utility: The utility adapter.
        safety: The safety adapter.
        model: The base model; put into eval mode, and changed by what the adapters carry besides low-rank updates.
        tokenizer: The base model's, or None to load it.
    """

    utility: Adapter
    safety: Adapter
    model: nn.Module
    tokenizer: Any | None = None


class Problem:
    """Two adapters on one base model.

    Args:
        config: The checked configuration.
        live: Adapters and base in memory; None reads them from where the configuration says.

    Attributes:
        skeleton: The base model on the meta device (or the live one): its modules and shapes.
        remarks: What the user should know; printed in the report.
        generated: "harm" or "benign", with "-" and the task's name if it has one -> sequences whose answers were
            generated, once `tasks` was asked for.
        replaced: The base's own values of whole parameters that only the safety adapter carries, once it is loaded.

    Raises:
        ValueError: An adapter cannot be read, the two do not fit each other, or one does not fit the base.
    """

    def __init__(self, config: Config, live: Live | None = None) -> None:
        self.config, self.live = config, live
        self.utility = live.utility if live else _read(config.utility.model, config.utility.weight, config.device)
        self.safety = live.safety if live else _read(config.safety.model, config.safety.weight, config.device)
        check_compatible([self.utility, self.safety])
        self.skeleton = live.model if live else load_skeleton(config)
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
        self.generated: dict[str, list[TokenSequence]] = {}
        self.replaced: dict[str, Tensor] = {}
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
        """The tokenizer that `calibration.tokenizer` names; ValueError if those of base and adapters disagree."""
        if self.live and self.live.tokenizer is not None:
            return self.live.tokenizer
        c = self.config
        chosen = "base" if c.calibration is None else c.calibration.tokenizer
        folders = {role: getattr(c, role).model for role in ROLES}
        options = {"trust_remote_code": c.trust_remote_code, "local_files_only": not c.download}
        tokenizers, remarks = read_tokenizers(c.base_model, folders, **options)
        if chosen not in tokenizers:
            hint = "save a tokenizer into its folder, or name another with `tokenizer`"
            raise ValueError("; ".join([f"calibration.tokenizer: {chosen!r} has none ({hint})", *remarks]))
        self.remarks += remarks + check_tokenizers(tokenizers, chosen)
        return tokenizers[chosen]

    @cached_property
    def model(self) -> nn.Module:
        """The base model θ_0 in eval mode, with what the adapters carry besides low-rank updates put in place."""
        model = self.live.model if self.live else load_base(self.config, self.skeleton, getattr(torch, self.dtype_name))
        if names := offloaded(model):
            self.remarks.append(
                f"device_map: {len(names)} parameters are offloaded; a backward pass needs their weights on the device "
                "all the same, so this saves little memory"
            )
        for name, value in self.saved.items():
            if name not in self.utility.saved:
                owner, _, leaf = name.rpartition(".")
                self.replaced[name] = getattr(model.get_submodule(owner), leaf)
            replace_parameter(model, name, value)
        for name, bias in self.utility.biases.items():
            add_bias(model, name, bias)
        model.eval()
        for module in model.modules():
            # In eval mode bitsandbytes repacks 4-bit weights where the CPU has AVX512-BF16; they then pass no gradient.
            if type(module).__name__ == "Linear4bit":
                module.train()
        return model

    @property
    def saved(self) -> dict[str, Tensor]:
        """Whole parameters that one of the adapters carries (modules_to_save)."""
        return {**self.utility.saved, **self.safety.saved}

    @cached_property
    def tasks(self) -> dict[str, tuple[Task, ...]]:
        """Keys "harm" and "benign" -> their tasks."""
        return {kind: read_tasks(self, kind) for kind in ("harm", "benign")}

    @property
    def calibration(self) -> dict[str, tuple[list[TokenSequence], list[TokenSequence]]]:
        """Keys "harm" and "benign" -> (found, held-out) sequences of all their tasks."""
        return {
            kind: ([s for task in tasks for s in task.found], [s for task in tasks for s in task.held])
            for kind, tasks in self.tasks.items()
        }

    @property
    def weights(self) -> dict[str, dict[str, float]] | None:
        """Keys "harm" and "benign" -> task's name -> w_t; None without data."""
        calibration = self.config.calibration
        if calibration is None:
            return None
        return {kind: {task.name: task.weight for task in calibration.tasks(kind)} for kind in ("harm", "benign")}

    def curvature(self, parameters: FisherParameters) -> Curvature:
        """Fishers of every module that the patch changes: remembered, else from `fisher_dir`, else collected.

        Args:
            parameters: Patch, points, samples, seed, and which Fishers in which coordinates.

        Returns:
            The statistics; in a representation that holds more than was asked for, if it is there.

        Raises:
            ValueError: Data, memory, or what is in `fisher_dir`, do not allow it.
        """
        coordinates, wanted = parameters.collected
        collection = coordinates, parameters.patch, *parameters.weighted_points, parameters.samples, parameters.seed
        for (known, kept), curvature in self._curvature.items():
            if known == collection and serves(kept, wanted):
                return curvature
        curvature = self._collect(parameters)
        self._curvature[collection, wanted] = curvature
        return curvature

    def curvature_at(
        self, parameters: FisherParameters, step: int, origin: Mapping[str, Tensor], patch: Mapping[str, Tensor]
    ) -> Curvature:
        """Fishers where a later step of a merge begins, in core coordinates: from `fisher_dir`, else collected.

        Args:
            parameters: As for `curvature`.
            step: How many steps were made.
            origin: Module name -> core of θ_j − θ_0, of every module.
            patch: Module name -> core of the remaining patch τ_j.

        Returns:
            The statistics, with origin and patch as given; not remembered.

        Raises:
            ValueError: As for `curvature`.
        """
        place = Place(step, hash_cores(origin, patch))
        return Curvature(origin, patch, self._statistics(parameters, self.bases, origin, patch, place))

    def _collect(self, parameters: FisherParameters) -> Curvature:
        """Bases, cores of the patch, and statistics."""
        coordinates, _ = parameters.collected
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
        return Curvature(origin, changed, self._statistics(parameters, bases, origin, changed))

    def _statistics(
        self,
        parameters: FisherParameters,
        bases: Mapping[str, CoreBasis],
        origin: Mapping[str, Tensor],
        patch: Mapping[str, Tensor],
        place: Place | None = None,
    ) -> Statistics:
        """Fishers at and near θ_0 + origin, from where they are kept, or collected."""
        coordinates, representations = parameters.collected
        folder = self._fisher_folder(parameters, patch if coordinates == "core" else {}, place)
        if folder is not None and folder.complete:
            return folder.statistics(self.weights)
        groups = plan_memory(self, {name: bases[name] for name in patch}, representations, coordinates)
        if self.config.calibration.packing:
            check_packing(self.model, self.model_config.vocab_size)
        settings = replace(_collection_settings(parameters, self.config), groups=groups)
        title = "" if place is None else f"step {place.step + 1}, "
        pullback = self._to_factors if coordinates == "factor" else None
        with Collector(self.model, bases, origin, patch, settings, pullback) as collector:
            return collect_statistics(collector, self.tasks["harm"], self.tasks["benign"], folder, title)

    def _to_factors(self, name: str, rows: Tensor) -> Tensor:
        """Gradients by ΔW of a module as gradients by the safety adapter's factors."""
        return factor_gradients(rows, self.updates(name)[1])

    def _fisher_folder(
        self, parameters: FisherParameters, patch: Mapping[str, Tensor], place: Place | None
    ) -> FisherFolder | None:
        """Where the statistics are kept, if anywhere; the patch shows whether they are in the same coordinates."""
        if self.config.fisher_dir is None:
            return None
        known = fingerprint(self, parameters)
        path = Path(self.config.fisher_dir)
        if place is not None:
            path, known = path / STEP_NAME.format(step=place.step, digest=place.digest), known | {"place": place.digest}
        folder = FisherFolder(path, known, self.config.device, patch)
        if self.config.calibration is None and not folder.complete:
            raise ValueError(f"Fisher folder: {path} is not complete, and there is no `calibration` to go on with")
        return folder


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


def _collection_settings(parameters: FisherParameters, config: Config) -> CollectionSettings:
    """Settings of a collection."""
    return CollectionSettings(
        *parameters.weighted_points,
        parameters.collected[1],
        config.calibration.batch_size,
        parameters.samples,
        parameters.seed,
        config.calibration.max_length if config.calibration.packing else None,
    )
