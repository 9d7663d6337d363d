"""A merge written into the base: θ_0 + ΔW as a full checkpoint, in the base's own files, shards and dtypes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from .atomic import save_tensors
from .base import BESIDE_WEIGHTS, INDEX_NAME, is_quantised, local_folder, weight_map
from .problem import Problem

_LEFT_OUT = {"config.json", INDEX_NAME, "report.json", "adapter_config.json"}  # written anew, or not the model's
_WIDER = {torch.float64: torch.float64, **dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), torch.float32)}


class Checkpoint:
    """The base model's files, and where in them each parameter lies that a merge of a problem changes.

    A parameter is found by its own name, or by that without the class's prefix, as transformers finds it (the `gpt2`
    of the Hub has no "transformer."). Where input and output embeddings are tied and a merge changes one of them, both
    are stored and `tie_word_embeddings` becomes false: an adapter changes the one only.

    Args:
        problem: What will be merged.

    Raises:
        ValueError: The base is quantised, its files are no safetensors, a parameter is not in them, or a bias has no
            place in the base.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.model = problem, problem.skeleton
        _refuse_quantised(problem)
        self.folder = local_folder(problem.config)
        self.shards = weight_map(self.folder)
        biased = {*problem.utility.biases, *problem.safety.biases}
        if without := sorted(name for name in biased if self.model.get_submodule(name).bias is None):
            raise ValueError(f"merge_into_base: the base has no bias where the adapters add one: {without}; {_ADAPTER}")
        changed = {*problem.saved, *(f"{name}.weight" for name in problem.names), *(f"{name}.bias" for name in biased)}
        self.groups = _tied_groups(self.model)
        tied = self._tied_with(changed)
        self.untied = bool(tied)
        if self.untied:
            problem.remarks.append(
                f"checkpoint: {sorted(tied)} are stored each for itself, and tie_word_embeddings is false now: an "
                "adapter changes tied weights one by one"
            )
        # Parameter -> (the key to store it at, the key of its base value).
        self.places = self._places(sorted(changed | tied))

    def _tied_with(self, changed: set[str]) -> set[str]:
        """Every parameter of each tied group of which a member is changed."""
        tied = {member for name in changed for member in self.groups.get(name, ())}
        ends = (self.model.get_input_embeddings(), self.model.get_output_embeddings())
        names = {f"{name}.weight" for name, module in self.model.named_modules() if any(module is end for end in ends)}
        if other := sorted(tied - names):
            raise ValueError(f"merge_into_base: {other} are tied to a changed parameter; {_ADAPTER}")
        return tied

    def _places(self, names: list[str]) -> dict[str, tuple[str, str]]:
        """Where the parameters lie in the files."""
        prefix, places = f"{self.model.base_model_prefix}.", {}
        for name in names:
            for member in (name, *self.groups.get(name, ())):
                stored = [key for key in (member, member.removeprefix(prefix)) if key in self.shards]
                if stored and name not in places:
                    places[name] = (stored[0] if member == name else name, stored[0])
        if missing := sorted(set(names) - places.keys()):
            raise ValueError(
                f"merge_into_base: {self.folder} stores no tensors named {missing}: this class renames or fuses what "
                f"it loads; {_ADAPTER}"
            )
        return places

    def write(self, folder: Path, delta: Callable[[str], Tensor], biases: Mapping[str, Tensor]) -> float:
        """The checkpoint: the base's files, with the changed parameters in their places.

        Args:
            folder: Existing; files are added.
            delta: Module name -> ΔW, (d_out, d_in), floating point.
            biases: Module name -> addition to the bias.

        Returns:
            The largest ‖round(W + ΔW) − (W + ΔW)‖_F / ‖ΔW‖_F of any module: what the base's dtype loses of ΔW.

        Raises:
            ValueError: A tensor has another shape or dtype than the model says, or overflows.

        Cost: reads and writes every file once; one shard and one changed tensor in memory.
        """
        copy_beside(self.folder, folder)
        write_model_config(self.folder, folder, untied=self.untied)
        worst, added = 0.0, 0
        for shard in tqdm(sorted(set(self.shards.values())), desc="checkpoint", unit="file", leave=False):
            here = {name: place for name, place in self.places.items() if self.shards[place[1]] == shard}
            if not here:
                shutil.copyfile(self.folder / shard, folder / shard)
                continue
            with safe_open(self.folder / shard, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                for name, (target, source) in here.items():
                    tensors[target], error = self._merged(name, file.get_tensor(source), delta, biases)
                    worst = max(worst, error)
                    added += 0 if target in self.shards else tensors[target].nbytes
                save_tensors(folder / shard, tensors, file.metadata() or {"format": "pt"})
        self._write_index(folder, added)
        return worst

    def _merged(
        self, name: str, stored: Tensor, delta: Callable[[str], Tensor], biases: Mapping[str, Tensor]
    ) -> tuple[Tensor, float]:
        """One parameter of θ_0 + ΔW, and the relative rounding error of its change: added wide, rounded once."""
        owner, _, leaf = name.rpartition(".")
        problem, module = self.problem, self.model.get_submodule(owner)
        given = self.model.get_parameter(name) if name not in problem.saved else problem.saved[name]
        if stored.dtype not in _WIDER or stored.shape != given.shape:
            raise ValueError(
                f"merge_into_base: {name} is stored as {stored.dtype} {tuple(stored.shape)}; expected floating point, "
                f"16 bits at least, of shape {tuple(given.shape)}"
            )
        exact = problem.saved.get(name, stored).to("cpu", stored.dtype).to(_WIDER[stored.dtype])
        change = None
        if leaf == "weight" and owner in problem.names:
            change = as_stored(module, delta(owner)).reshape(stored.shape)
        elif leaf == "bias" and owner in biases:
            change = biases[owner]
        if change is None:
            return exact.to(stored.dtype), 0.0
        exact = exact + change.to(exact)
        rounded = exact.to(stored.dtype)
        if not torch.isfinite(rounded).all():
            raise ValueError(f"merge_into_base: {name} overflows {stored.dtype}; lower alpha, or use a wider base")
        size = float(torch.linalg.vector_norm(change.double()))
        error = float(torch.linalg.vector_norm((rounded.to(exact) - exact).double()))
        return rounded, error / size if size else 0.0

    def _write_index(self, folder: Path, added: int) -> None:
        """The index of the shards, if the base has one, with the tensors that untying added."""
        if not (self.folder / INDEX_NAME).is_file():
            return
        index = json.loads((self.folder / INDEX_NAME).read_text(encoding="utf-8"))
        index["weight_map"] |= {target: self.shards[source] for target, source in self.places.values()}
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += added
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


_ADAPTER = "write an adapter instead"


def _refuse_quantised(problem: Problem) -> None:
    """ValueError for a base whose weights are not numbers to which something can be added."""
    own = is_quantised(problem.skeleton)
    if own or problem.config.quantization:
        raise ValueError(
            f"merge_into_base: the base is quantised ({'by its config.json' if own else 'as `quantization` says'}); "
            "write the adapter, then merge it into the base of the original precision"
        )


def _tied_groups(model: nn.Module) -> dict[str, list[str]]:
    """Name -> the names of one and the same parameter, for those that have several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def copy_beside(source: Path, folder: Path) -> None:
    """Everything beside weights and config.json that loading a model or its tokenizer can ask for.

    Args:
        source: A checkpoint's folder.
        folder: Existing; files are added or replaced.
    """
    for pattern in BESIDE_WEIGHTS:
        for file in source.glob(pattern):
            if file.is_file() and file.name not in _LEFT_OUT:
                shutil.copyfile(file, folder / file.name)
    if (templates := source / "additional_chat_templates").is_dir():
        shutil.copytree(templates, folder / templates.name)


def write_model_config(source: Path, folder: Path, *, untied: bool) -> None:
    """A checkpoint's config.json.

    Args:
        source: The folder whose config.json it is.
        folder: Where to write.
        untied: Whether input and output embeddings are stored each for itself from now on.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if untied:
        config["tie_word_embeddings"] = False
        if "tie_word_embeddings" in config.get("text_config", {}):
            config["text_config"]["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def as_stored(module: nn.Module, delta: Tensor) -> Tensor:
    """ΔW, (d_out, d_in), as the module stores its weight; a convolution's is still to be reshaped."""
    return delta.mT if isinstance(module, (nn.Embedding, Conv1D)) else delta
