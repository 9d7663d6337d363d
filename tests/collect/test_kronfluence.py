"""Folders of factors as kronfluence 1.0.1 writes them, against sums over tokens in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from sst_kernels.factors import Factors
from sst_kernels.integrations.kronfluence import read_kronfluence

FILES = [
    f"{n}{kind}_covariance{p}" for n, p in (("", ""), ("num_", "_processed")) for kind in ("activation", "gradient")
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        self.down = nn.Linear(4, 2, bias=False)
        self.patch = nn.Conv2d(2, 3, 2)
        self.norm = nn.LayerNorm(3)


def rows(d: int, seed: int) -> Tensor:
    return torch.randint(-4, 5, (6, d), generator=torch.Generator().manual_seed(seed)).float()


# Name, x and δ; the width of x for the convolution is that of its patches, channels first.
ROWS = {"up": (rows(3, 0), rows(4, 1)), "down": (rows(4, 2), rows(2, 3)), "patch": (rows(8, 4), rows(3, 5))}


def write(folder: Path, metadata: bool = True, dtype: torch.dtype = torch.float32) -> None:
    """Sums over tokens, x with a 1 appended where the layer has a bias; counts as int64 of one element."""
    files: dict[str, dict[str, Tensor]] = {name: {} for name in FILES}
    for name, (x, delta) in ROWS.items():
        if name != "down":
            x = F.pad(x, (0, 1), value=1.0)
        for file, value in zip(FILES, (x.T @ x, delta.T @ delta, len(x), len(x)), strict=True):
            files[file][name] = value.to(dtype) if isinstance(value, Tensor) else torch.tensor([value])
    arguments = {"strategy": "ekfac", "use_empirical_fisher": True, "amp_dtype": None}
    for file, tensors in files.items():
        texts = {key: str(value) for key, value in arguments.items()}
        save_file(tensors, folder / f"{file}.safetensors", metadata=texts if metadata else None)
    (folder / "factor_arguments.json").write_text(json.dumps(arguments))


def change(folder: Path, file: str, name: str, value: Tensor | None) -> None:
    path = folder / f"{file}.safetensors"
    tensors = load_file(path)
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, path, metadata={"use_empirical_fisher": "True"})


@pytest.mark.parametrize("metadata", [True, False])  # aggregated parts have none
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_means_are_those_of_the_rows(metadata: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path, metadata, dtype)
    with torch.device("meta"):
        model = Model()
    factors = read_kronfluence(tmp_path, model)
    assert (factors.fisher, factors.approximation) == ("empirical", "expand")
    assert list(factors.specs) == list(ROWS)  # the model's order
    assert {name: spec.kind for name, spec in factors.specs.items()} == {
        n: "conv2d" if n == "patch" else "linear" for n in ROWS
    }
    for name, (x, delta) in ROWS.items():
        for mean, y in zip(factors.mean(name), (x.double(), delta.double()), strict=True):
            assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(
                mean.double(), y.T @ y / 6, rtol=1e-6 if dtype != torch.bfloat16 else 2**-8, atol=0
            )


def test_factors_are_added_and_saved_like_others(tmp_path: Path) -> None:
    write(tmp_path)
    factors = read_kronfluence(tmp_path, Model())
    factors.add_(read_kronfluence(tmp_path, Model()))
    assert factors.layers["up"].counts.tolist() == [12, 12]
    factors.save(tmp_path / "ours.safetensors")
    mean = Factors.load(tmp_path / "ours.safetensors").mean("up")
    x, delta = ROWS["up"]
    torch.testing.assert_close(mean, (x.T @ x / 6, delta.T @ delta / 6))


def test_the_fisher_is_true_by_default_of_kronfluence(tmp_path: Path) -> None:
    write(tmp_path, metadata=False)
    (tmp_path / "factor_arguments.json").write_text('{"use_empirical_fisher": false}')
    assert read_kronfluence(tmp_path, Model()).fisher == "true"
    (tmp_path / "factor_arguments.json").unlink()
    with pytest.raises(ValueError, match=r"folder: neither .*factor_arguments.json says use_empirical_fisher"):
        read_kronfluence(tmp_path, Model())


@pytest.mark.parametrize(
    ("file", "value", "message"),
    [
        (
            0,
            torch.ones(3, 3),
            r"'up' has sums \(3, 3\) and \(4, 4\), but the model's layer needs \(4, 4\) and \(4, 4\)",
        ),
        (1, torch.ones(2, 4), r"'up' has sums \(4, 4\) and \(2, 4\)"),
        (1, torch.full((4, 4), float("nan")), "'up' holds NaN or infinity"),
        (3, torch.tensor([0]), "'up' counts no tokens"),
        (2, None, r"num_activation_covariance_processed.safetensors has no module 'up', which others have"),
    ],
)
def test_bad_sums_are_refused(file: int, value: Tensor | None, message: str, tmp_path: Path) -> None:
    write(tmp_path)
    change(tmp_path, FILES[file], "up", value)
    with pytest.raises(ValueError, match=rf"^folder: .*{message}"):
        read_kronfluence(tmp_path, Model())


def test_files_and_modules_that_are_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"folder: no file .*activation_covariance.safetensors: pass the folder factors_NAM"
    ):
        read_kronfluence(tmp_path, Model())
    part = tmp_path / "activation_covariance_data_partition0_module_partition0.safetensors"
    part.touch()
    with pytest.raises(ValueError, match="aggregate_covariance_matrices first"):
        read_kronfluence(tmp_path, Model())
    write(tmp_path)
    with pytest.raises(ValueError, match="model: no module 'down'"):
        read_kronfluence(tmp_path, nn.Linear(3, 4))
    model = Model()
    model.up = nn.LayerNorm(3)
    with pytest.raises(ValueError, match="model: module 'up' can have no factors: LayerNorm is not a supported layer"):
        read_kronfluence(tmp_path, model)
    (tmp_path / "gradient_covariance.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"gradient_covariance.safetensors is no safetensors file"):
        read_kronfluence(tmp_path, Model())
