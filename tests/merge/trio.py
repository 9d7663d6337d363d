"""Three full checkpoints of one architecture with Fisher files of them, and the command that merges them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from sst_merge.cli import main


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


@dataclass
class Trio:
    """Base, utility and safety model, and a folder for the Fishers of the utility model's tensors."""

    root: Path
    base: Path
    utility: Path
    safety: Path
    fisher: Path
    config: dict = field(default_factory=dict)

    def tensors(self, owner: str) -> dict[str, Tensor]:
        """Name -> float64."""
        return {key: value.double() for key, value in tensors_of(getattr(self, owner)).items()}

    def run(self, method: str, *arguments: str, code: int = 0, out: str = "out", **parameters: object) -> Path:
        """The output of `sst-merge merge`."""
        path = self.root / "config.yaml"
        models = [{"model": str(getattr(self, role)), "role": role} for role in ("utility", "safety")]
        tree = {"base_model": str(self.base), "models": models, "merge_method": method, "parameters": parameters}
        if method in ("diagonal_sst", "sst"):
            tree["fisher_dir"] = str(self.fisher)
        path.write_text(yaml.safe_dump({**tree, **self.config}))
        assert main(["merge", str(path), "--out", str(self.root / out), *arguments]) == code
        return self.root / out

    def refusal(self, capsys, method: str = "task_arithmetic", **parameters: object) -> str:
        """What the command says that it cannot do; nothing is left."""
        before = sorted(self.root.iterdir())
        capsys.readouterr()
        self.run(method, code=2, out="refused", **parameters)
        assert sorted({*self.root.iterdir()} - {self.root / "config.yaml"}) == [
            p for p in before if p.name != "config.yaml"
        ]
        return capsys.readouterr().err

    def save_fishers(self, harm: dict[str, Tensor], benign: dict[str, Tensor], said: dict | None = None) -> None:
        self.fisher.mkdir(exist_ok=True)
        metadata = None if said is None else {"sst_merge": json.dumps(said)}
        save_file(harm, self.fisher / "harm.safetensors", metadata=metadata)
        save_file(benign, self.fisher / "benign.safetensors", metadata=metadata)


def perturbed(base: Path, folder: Path, seed: int, dtype: torch.dtype, shard: str) -> Path:
    """The base with noise on every weight."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    return folder
