r"""Sums of Kronecker factors: what `FactorAccumulator` fills, and what is saved, added and reduced.

A layer y_t = W x_t has the Fisher block F ≈ G ⊗ A of vec(W), row-major, with A = E[x xᵀ] and G = E[δ δᵀ]. Kept are
the sums S_A = Σ_t w_t x_t x_tᵀ and S_G = Σ_t w_t δ_t δ_tᵀ and the counts n = Σ_t w_t of both, so that parts from
batches, processes and restarts add up; `Factors.mean` divides.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .layer_factors import LayerFactors, LayerSpec
from .ops import unpack_lower

_VERSION = 1
_METADATA_KEY = "sst_kernels.factors"


@dataclass(frozen=True)
class AccumulatorOptions:
    """How sums are kept.

    Attributes:
        decay: ρ of S ← ρ S + new, once for each counted backward pass that reaches a layer; counts likewise, so means
            need no correction. None: plain sums.
        every: Tap each `every`-th forward pass with gradients on, the first one included.
        memory_limit: Bytes of sums on the layers' devices; in the model's order, layers beyond it are summed on the
            host, through one layer's scratch on the device and a copy per batch. None: no limit.
        seed: Of the labels that `sampled_loss` draws.
        share_inputs: Whether layers that always get the same tensor keep one input factor.
        precision: The least precise arithmetic that will do for float32 rows (`kron_accumulate_`).
    """

    decay: float | None = None
    every: int = 1
    memory_limit: int | None = None
    seed: int = 0
    share_inputs: bool = True
    precision: str = "ieee"

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, or be None for plain sums, got {self.decay}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")
        if self.precision not in ("ieee", "tf32", "bf16x3"):
            raise ValueError(f"precision must be 'ieee', 'tf32' or 'bf16x3', got {self.precision!r}")


@dataclass
class Factors:
    """The sums of all layers, and how they came about.

    Attributes:
        specs: Name -> what the factors of each layer are of, including layers that saw no token yet.
        fisher: "true" (labels sampled from the model) or "empirical" (labels given).
        approximation: "expand" (rows are tokens) or "reduce" (rows are sequences).
        decay: ρ of the exponential moving average S ← ρ S + new, or None for plain sums.
        tied: Layer -> the first layer with the same weight. Each use has factors of its own.
        shared: Layer -> the layer that holds its input factor, because they always had the same input.
        backwards: Backward passes that were counted.
        forwards: Forward passes of the model with gradients on, counted or not.
        sequences: Sequences for which labels were drawn: the next one's number.
        layers: Name -> sums, of the layers that saw a token.
    """

    specs: dict[str, LayerSpec]
    fisher: str
    approximation: str = "expand"
    decay: float | None = None
    tied: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    backwards: int = 0
    forwards: int = 0
    sequences: int = 0
    layers: dict[str, LayerFactors] = field(default_factory=dict)

    def input_of(self, name: str) -> tuple[Tensor, Tensor]:
        """S_A of a layer and its count, from the layer that holds it."""
        holder = self.layers[self.shared.get(name, name)]
        return holder.input_factor, holder.counts[0]

    def mean(self, name: str) -> tuple[Tensor, Tensor]:
        """(A, G) = (S_A / n_A, S_G / n_G), symmetric.

        Args:
            name: A layer that saw a token.

        Returns:
            (d_in, d_in) and (d_out, d_out); for one-hot rows A is its diagonal, (d_in,).

        Raises:
            ValueError: The layer is unknown or saw no token.
        """
        if name not in self.specs:
            raise ValueError(f"name: no layer {name!r} among the {len(self.specs)} whose factors are gathered")
        if name not in self.layers or float(self.input_of(name)[1]) == 0 or float(self.layers[name].counts[1]) == 0:
            raise ValueError(f"name: layer {name!r} saw no counted token; run a declared backward pass first")
        spec, layer = self.specs[name], self.layers[name]
        input_sum, n_in = self.input_of(name)
        a = input_sum / n_in
        if not spec.diagonal_input:
            a = unpack_lower(a)
        return a, unpack_lower(layer.grad_factor / layer.counts[1])

    def unshare(self, name: str) -> None:
        """Gives `name` an input factor of its own, a copy of the shared sum so far."""
        owner = self.shared.pop(name)
        if name in self.layers:
            mine, theirs = self.layers[name], self.layers[owner]
            mine.input_factor = theirs.input_factor.to(mine.grad_factor.device, copy=True)
            mine.counts[0] = theirs.counts[0]

    def add_(self, other: Factors) -> None:
        """Self ← self + other, sums, counts and step numbers; into an empty self this resumes `other`.

        Args:
            other: Factors of the same layers, gathered in the same way; on any device. Not changed.

        Raises:
            ValueError: They differ in what they are factors of; the message names the difference.
        """
        self.check_same(other)
        if not self.layers:
            self.shared = dict(other.shared)
        for name in [name for name, owner in self.shared.items() if other.shared.get(name) != owner]:
            self.unshare(name)
        for name, theirs in other.layers.items():
            if name in self.layers:
                mine = self.layers[name]
            else:
                device, dtype = theirs.counts.device, theirs.grad_factor.dtype
                mine = LayerFactors.zeros(self.specs[name], dtype, device, name in self.shared)
                self.layers[name] = mine
            input_sum, n_in = (None, theirs.counts[0]) if name in self.shared else other.input_of(name)
            counts = torch.stack([n_in, theirs.counts[1]])
            mine.add_(LayerFactors(input_sum, theirs.grad_factor, counts))
        self.backwards += other.backwards
        self.forwards += other.forwards
        self.sequences += other.sequences

    def without_sums(self) -> Factors:
        """The description alone."""
        return replace(self, layers={})

    def check_same(self, other: Factors) -> None:
        """Refuses factors that do not add up with these.

        Args:
            other: Any factors.

        Raises:
            ValueError: The message names the first difference.
        """
        for what in ("fisher", "approximation", "decay"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                raise ValueError(f"other: {what} is {theirs!r} there and {mine!r} here; such sums do not add up")
        if self.specs.keys() != other.specs.keys():
            differing = sorted(self.specs.keys() ^ other.specs.keys())
            raise ValueError(f"other: the layers differ, first in {differing[0]!r}; gather both with the same modules")
        for name, spec in self.specs.items():
            if spec != other.specs[name]:
                raise ValueError(f"other: layer {name!r} is {other.specs[name]} there and {spec} here")

    def nbytes(self) -> int:
        """Bytes of all sums held."""
        return sum(t.nbytes for layer in self.layers.values() for t in layer.tensors().values())

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, beside `path` and then moved there whole.

        Args:
            path: The file; an existing one is replaced.
        """
        save_file = _safetensors().torch.save_file
        state, path = self.state_dict(), Path(path)
        handle, fresh = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        try:
            save_file(state["tensors"], fresh, metadata={_METADATA_KEY: state["metadata"]})
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise

    def state_dict(self) -> dict:
        """{"metadata": JSON text, "tensors": "layer/part" -> the sum on the host}; see `from_state_dict`."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("specs", "layers")}
        specs = {name: asdict(spec) for name, spec in self.specs.items()}
        tensors = {
            f"{name}/{part}": tensor.detach().cpu().contiguous()
            for name, layer in self.layers.items()
            for part, tensor in layer.tensors().items()
        }
        return {"metadata": json.dumps({"version": _VERSION, **plain, "specs": specs}), "tensors": tensors}

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Factors:
        """Reads what `save` wrote.

        Args:
            path: The file.
            device: Where the sums go.

        Returns:
            The factors, equal bit for bit to those saved.

        Raises:
            ValueError: The file is none of ours, of another version, or its tensors do not fit its description.
        """
        tensors, metadata = read_tensors(path, device)
        text = metadata.get(_METADATA_KEY)
        if text is None:
            raise ValueError(f"path: {path} holds no Kronecker factors (no metadata {_METADATA_KEY!r})")
        try:
            return cls.from_state_dict({"metadata": text, "tensors": tensors})
        except ValueError as error:
            raise ValueError(f"path: {path}: {error}") from error

    @classmethod
    def from_state_dict(cls, state: Mapping) -> Factors:
        """What `state_dict` took down; the tensors are taken over.

        Args:
            state: {"metadata": JSON text, "tensors": "layer/part" -> sum}.

        Returns:
            The factors.

        Raises:
            ValueError: The format has another version, or the tensors do not fit their description.
        """
        metadata = json.loads(state["metadata"])
        if metadata.pop("version") != _VERSION:
            raise ValueError(f"state: Kronecker factors of another format version than {_VERSION}")
        specs = {name: LayerSpec(**spec) for name, spec in metadata.pop("specs").items()}
        factors = cls(specs=specs, **metadata)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state["tensors"].items():
            name, _, part = key.rpartition("/")
            parts.setdefault(name, {})[part] = tensor
        for name, spec in specs.items():
            if name in parts:
                factors.layers[name] = _checked(name, spec, parts[name], name in factors.shared)
        return factors

    def all_reduce(self, group: object = None) -> None:
        """Every rank's sums ← the sums over all ranks; call it once, after the last batch.

        Args:
            group: A process group, or None for all. Sums on the host travel through the device the group needs.

        Raises:
            ValueError: The ranks' factors differ in what they are of.
        """
        from .reduction import all_reduce

        all_reduce(self, group)

    def reduce_to_owners(self, group: object = None) -> None:
        """As `all_reduce`, but each layer's sums end on one rank only: rank i mod world for the i-th input factor.

        Layers that share an input factor go to the same rank; `layers` loses those that other ranks keep.

        Args:
            group: A process group, or None for all.

        Raises:
            ValueError: The ranks' factors differ in what they are of.
        """
        from .reduction import reduce_to_owners

        reduce_to_owners(self, group)


def _checked(name: str, spec: LayerSpec, parts: Mapping[str, Tensor], shared: bool) -> LayerFactors:
    """ValueError unless the parts are those of a layer of this spec."""
    expected = LayerFactors.zeros(spec, torch.float32, "meta", shared).tensors()
    if {part: t.shape for part, t in parts.items()} != {part: t.shape for part, t in expected.items()}:
        raise ValueError(f"state: the tensors of layer {name!r} do not fit {spec}")
    return LayerFactors(parts.get("input_factor"), parts["grad_factor"], parts["counts"])


def read_tensors(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of a safetensors file by name, and its metadata.

    Args:
        path: The file.
        device: Where the tensors go.

    Returns:
        Tensors, and metadata, which may be empty.

    Raises:
        ValueError: It is no safetensors file.
    """
    package = _safetensors()
    try:
        with package.safe_open(path, framework="pt", device=str(device)) as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118  (no mapping)
    except package.SafetensorError as error:
        raise ValueError(f"path: {path} is no safetensors file: {error}") from error


def _safetensors() -> ModuleType:
    """The package, imported when it is needed: importing sst_kernels needs torch and numpy only."""
    try:
        import safetensors
        import safetensors.torch  # noqa: F401  (safetensors.torch.save_file)
    except ImportError as missing:
        raise ImportError("Factors.save and .load need the package safetensors: pip install safetensors") from missing
    return safetensors
