"""Sums that add up, are saved and loaded, and reduced over processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sst_kernels.factors import Factors
from sst_kernels.layer_factors import LayerFactors, LayerSpec, Rows

SPECS = {
    "embed": LayerSpec("embedding", 5, 2),
    "q": LayerSpec("linear", 3, 2),
    "k": LayerSpec("linear", 3, 4),
    "expert": LayerSpec("linear", 2, 2),
}


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def rows_of(name: str, seed: int) -> Rows:
    spec, tokens = SPECS[name], 6
    seed = 10 * seed + list(SPECS).index(name) - (name == "k")  # q and k share x
    x = integers(tokens, spec.d_in, seed=seed)
    if spec.kind == "embedding":
        x = x.argmax(1)
    return Rows(x, integers(tokens, spec.d_out, seed=seed + 1000), integers(tokens, seed=seed + 2000).abs())


def dense(name: str, seeds: list[int]) -> tuple[Tensor, Tensor, float]:
    """(A, G) as means and the count, over the batches `seeds`; exact up to the division."""
    a, g, n = 0, 0, 0
    for seed in seeds:
        rows = rows_of(name, seed)
        x = torch.nn.functional.one_hot(rows.x, 5).float() if rows.x.dim() == 1 else rows.x
        a = a + x.T @ (rows.weight[:, None] * x)
        g = g + rows.delta.T @ (rows.weight[:, None] * rows.delta)
        n += float(rows.weight.sum())
    return a / n, g / n, n


def factors_of(seeds: list[int], names: tuple[str, ...] = tuple(SPECS), shared: bool = False) -> Factors:
    factors = Factors(SPECS, "true", shared={"k": "q"} if shared else {}, backwards=len(seeds))
    for name in names:
        layer = LayerFactors.zeros(SPECS[name], torch.float32, "cpu", name in factors.shared)
        for seed in seeds:
            layer.accumulate_(rows_of(name, seed))
        factors.layers[name] = layer
    return factors


def assert_is(factors: Factors, seeds: dict[str, list[int]]) -> None:
    assert set(factors.layers) == set(seeds)
    for name, of in seeds.items():
        a, g, n = dense(name, of)
        a_mean, g_mean = factors.mean(name)
        assert torch.equal(a_mean.float(), a.diagonal() if a_mean.dim() == 1 else a)
        assert torch.equal(g_mean, g)
        assert float(factors.input_of(name)[1]) == float(factors.layers[name].counts[1]) == n


def every(seeds: list[int]) -> dict[str, list[int]]:
    return {name: seeds for name in SPECS}


def test_means_are_symmetric_and_those_of_the_rows():
    factors = factors_of([0, 1], shared=True)
    assert factors.layers["k"].input_factor is None
    assert_is(factors, every([0, 1]))


def test_a_layer_without_tokens_or_unknown_has_no_mean():
    factors = factors_of([0], names=("q",))
    with pytest.raises(ValueError, match="'expert' saw no counted token"):
        factors.mean("expert")
    with pytest.raises(ValueError, match="no layer 'v' among the 4"):
        factors.mean("v")


def test_bytes_of_a_layer_are_those_it_holds():
    for name, layer in factors_of([0]).layers.items():
        assert SPECS[name].nbytes() == layer.input_factor.nbytes + layer.grad_factor.nbytes


def test_a_gradient_that_is_not_finite_takes_the_whole_call_out():
    rows = rows_of("q", 0)
    rows.weight[2] = 0
    rows.delta[2] = float("nan")
    assert torch.equal(rows.finite().weight, rows.weight)  # not a row that counts
    rows.weight[2] = 1
    assert not rows.finite().weight.any()
    assert not Rows(rows.x, rows.delta).finite().weight.any()
    rows.delta[2] = torch.tensor([float("inf"), -float("inf")])
    assert not rows.finite().weight.any()
    half = torch.full((2, 4), 60000.0, dtype=torch.float16)  # finite, though the sum of a row is not in float16
    assert Rows(half, half).finite().weight.tolist() == [1, 1]


@pytest.mark.parametrize("ours_shared", [False, True])
@pytest.mark.parametrize("theirs_shared", [False, True])
def test_parts_add_up_whatever_they_share(ours_shared, theirs_shared):
    ours, theirs = factors_of([0, 1], shared=ours_shared), factors_of([2], shared=theirs_shared)
    before = {name: layer.grad_factor.clone() for name, layer in theirs.layers.items()}
    ours.add_(theirs)
    assert_is(ours, every([0, 1, 2]))
    assert ours.shared == ({"k": "q"} if ours_shared and theirs_shared else {})
    assert ours.backwards == 3
    assert all(torch.equal(theirs.layers[name].grad_factor, grad) for name, grad in before.items())


def test_layers_seen_by_one_part_only_add_up():
    ours = factors_of([0], names=("q", "embed"))
    ours.add_(factors_of([1], shared=True))
    assert_is(ours, {"q": [0, 1], "embed": [0, 1], "k": [1], "expert": [1]})
    empty = factors_of([], names=())
    empty.add_(factors_of([3], shared=True))
    assert empty.shared == {"k": "q"}
    assert_is(empty, every([3]))


def test_what_was_added_is_not_changed_later():
    ours, theirs = factors_of([], names=()), factors_of([3], shared=True)
    ours.add_(theirs)
    ours.unshare("k")
    ours.layers["k"].accumulate_(rows_of("k", 1))
    assert theirs.shared == {"k": "q"}
    assert_is(theirs, every([3]))


def test_unsharing_copies_the_sum_so_far():
    factors = factors_of([0], shared=True)
    factors.unshare("k")
    factors.layers["q"].accumulate_(rows_of("q", 1))
    factors.layers["expert"].accumulate_(rows_of("expert", 1))
    factors.layers["k"].accumulate_(rows_of("k", 2))
    assert_is(factors, {"embed": [0], "q": [0, 1], "k": [0, 2], "expert": [0, 1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fisher": "empirical"}, "fisher is 'empirical' there and 'true' here"),
        ({"approximation": "reduce"}, "approximation is 'reduce' there and 'expand' here"),
        ({"decay": 0.9}, "decay is 0.9 there and None here"),
        ({"specs": {"q": SPECS["q"]}}, "the layers differ, first in 'embed'"),
        ({"specs": SPECS | {"k": LayerSpec("linear", 3, 4, "ab12")}}, "layer 'k' is LayerSpec.*ab12.* there"),
    ],
)
def test_what_does_not_add_up_is_refused(change, message):
    other = Factors(**({"specs": SPECS, "fisher": "true"} | change))
    with pytest.raises(ValueError, match=message):
        factors_of([0]).add_(other)


def test_saved_factors_load_bit_for_bit(tmp_path):
    factors = factors_of([0, 1], names=("embed", "q", "k"), shared=True)
    factors.tied, factors.decay, factors.forwards, factors.sequences = {"k": "q"}, 0.75, 5, 12
    path = tmp_path / "factors.safetensors"
    path.write_text("what was there before")
    factors.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["factors.safetensors"]
    loaded = Factors.load(path)
    for part in ("specs", "fisher", "approximation", "decay", "tied", "shared", "backwards", "forwards", "sequences"):
        assert getattr(loaded, part) == getattr(factors, part)
    assert loaded.layers.keys() == factors.layers.keys()
    for name, layer in factors.layers.items():
        theirs = loaded.layers[name].tensors()
        assert theirs.keys() == layer.tensors().keys()
        assert all(
            torch.equal(theirs[part], t) and theirs[part].dtype == t.dtype for part, t in layer.tensors().items()
        )


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "factors.safetensors"
    path.write_text("what was there before")
    factors = factors_of([0])
    factors.tied = {"k": object()}
    with pytest.raises(TypeError):
        factors.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["factors.safetensors"]
    assert path.read_text() == "what was there before"


def rewritten(path: Path, tensors: dict[str, Tensor] | None = None, **changes: object) -> None:
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["sst_kernels.factors"]) | changes
        old = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(old | (tensors or {}), path, metadata={"sst_kernels.factors": json.dumps(metadata)})


def test_a_failed_save_leaves_nothing_behind(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(IsADirectoryError):
        factors_of([0]).save(target)
    assert list(tmp_path.iterdir()) == [target]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "factors.safetensors"
    path.write_text("no tensors")
    with pytest.raises(ValueError, match="is no safetensors file"):
        Factors.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no Kronecker factors"):
        Factors.load(path)
    factors_of([0]).save(path)
    rewritten(path, {"q/grad_factor": torch.zeros(4)})
    with pytest.raises(ValueError, match="the tensors of layer 'q' do not fit"):
        Factors.load(path)
    rewritten(path, {"q/grad_factor": torch.zeros(3)}, version=2)
    with pytest.raises(ValueError, match="another format version than 1"):
        Factors.load(path)


def test_safetensors_is_asked_for_when_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="pip install safetensors"):
        factors_of([0]).save(tmp_path / "f")


def process(rank: int, world: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    names = ("embed", "q", "k", "expert") if rank else ("embed", "q", "k")
    for shared in (True, False):  # whether rank 1 shares as rank 0 does
        factors = factors_of([rank], names, shared=rank == 0 or shared)
        factors.all_reduce()
        assert_is(factors, {"embed": [0, 1], "q": [0, 1], "k": [0, 1], "expert": [1]})
        assert (factors.shared, factors.backwards) == ({"k": "q"} if shared else {}, 2)

        factors = factors_of([rank], names, shared=rank == 0 or shared)
        factors.reduce_to_owners()
        kept = [["embed", "expert"], ["q", "k"]] if shared else [["embed", "k"], ["q", "expert"]]
        assert_is(factors, {name: [1] if name == "expert" else [0, 1] for name in kept[rank]})
    group = torch.distributed.new_group([1])
    if rank == 1:
        factors = factors_of([1])
        factors.reduce_to_owners(group)
        assert_is(factors, every([1]))
    other = Factors(SPECS, "true" if rank else "empirical")
    with pytest.raises(ValueError, match="fisher is"):
        other.all_reduce()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may outlive the group, and abort an orderly exit


def test_sums_over_processes(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    processes = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


if __name__ == "__main__":
    process(int(sys.argv[2]), 2, sys.argv[1])
