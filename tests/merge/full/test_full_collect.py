"""Diagonal Fishers of full checkpoints against squares of gradients taken one sequence at a time, and bad files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trio import Trio, tensors_of

from sst_kernels.labels import counter_uniform
from sst_merge.cli import main

SEED = 3


@pytest.fixture
def data(tmp_path: Path) -> dict[str, list[tuple[list[int], list[int]]]]:
    """Kind -> (input_ids, labels) of a few sequences of different lengths, in files."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for kind, count in (("harm", 5), ("benign", 4)):
        found[kind] = []
        for length in range(4, 4 + count):
            ids = torch.randint(3, 50, (length,), generator=generator).tolist()
            found[kind].append((ids, [-100, -100, *ids[2:]]))
        lines = [json.dumps({"input_ids": ids, "labels": labels}) for ids, labels in found[kind]]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    return found


def collect(trio: Trio, tmp_path: Path, code: int = 0, harm: object = None, **parameters: object) -> None:
    trio.config["calibration"] = {kind: str(tmp_path / f"{kind}.jsonl") for kind in ("harm", "benign")}
    if harm is not None:
        trio.config["calibration"]["harm"] = harm
    models = [{"model": str(getattr(trio, role)), "role": role} for role in ("utility", "safety")]
    tree = {"base_model": str(trio.base), "models": models, "merge_method": "diagonal_sst", "parameters": parameters}
    (trio.root / "fisher.yaml").write_text(yaml.safe_dump({**tree, **trio.config}))
    assert main(["fisher", str(trio.root / "fisher.yaml"), "--out", str(trio.fisher)]) == code


def labels_of(logits: torch.Tensor, kind: str, given: list[int], index: int) -> torch.Tensor:
    """Those given, or drawn by the inverse of the cumulative distribution; one for each position but the first."""
    if kind == "harm":
        return torch.tensor(given[1:])
    uniform = counter_uniform(SEED, torch.full((len(given) - 1,), index), torch.arange(1, len(given)), 0)
    cumulative = logits[:-1].double().softmax(-1).cumsum(-1)
    return (cumulative < uniform.double()[:, None]).sum(-1)


def by_hand(load: Callable[[], torch.nn.Module], sequences: list, kind: str) -> dict[str, torch.Tensor]:
    """Mean over sequences of squared gradients, in float64."""
    model = load().double()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for index, (ids, given) in enumerate(sequences):
        model.zero_grad()
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        labels = labels_of(logits.float(), kind, given, index)
        likelihood = logits[:-1].log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        likelihood[torch.tensor(given[1:]) >= 0].sum().backward()
        for name, p in model.named_parameters():
            sums[name] += p.grad.square() / len(sequences)
    return sums


def at(trio: Trio, t: float, patch: str) -> Callable[[], torch.nn.Module]:
    """A loader of the model at θ_u + tτ."""

    def load() -> torch.nn.Module:
        model = AutoModelForCausalLM.from_pretrained(trio.utility).eval()
        origin, safety = trio.tensors("base" if patch == "additive" else "utility"), trio.tensors("safety")
        with torch.no_grad():
            for name, p in model.named_parameters():
                p += (t * (safety[name] - origin[name])).float()
        return model

    return load


@pytest.mark.parametrize(
    ("parameters", "points"),
    [
        ({"where": "local"}, {0.0: 1.0}),
        ({"points": [0.25, 0.5], "point_weights": "linear", "patch": "interpolate"}, {0.25: 0.6, 0.5: 0.4}),
    ],
)
def test_collected_diagonals_are_those_of_single_sequences(trio, data, tmp_path, parameters, points):
    for file in trio.fisher.iterdir():
        file.unlink()
    collect(trio, tmp_path, seed=SEED, **parameters)
    for kind in ("harm", "benign"):
        got = load_file(trio.fisher / f"{kind}.safetensors")
        parts = [
            (w, by_hand(at(trio, t, parameters.get("patch", "additive")), data[kind], kind)) for t, w in points.items()
        ]
        assert got.keys() == parts[0][1].keys()
        for name, values in got.items():
            expected = sum(w * sums[name] for w, sums in parts)
            torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_tasks_and_examples_have_weights(trio, data, tmp_path):
    """F = Σ_t w_t Σ_i ω_i g_i g_iᵀ / Σ_i ω_i."""
    for file in trio.fisher.iterdir():
        file.unlink()
    examples = {"one": [(data["harm"][0], 1.0), (data["harm"][1], 3.0)], "two": [(data["harm"][2], 1.0)]}
    for name, given in examples.items():
        lines = [json.dumps({"input_ids": ids, "labels": labels, "weight": w}) for (ids, labels), w in given]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    tasks = [{"data": str(tmp_path / f"{name}.jsonl"), "weight": w} for name, w in (("one", 0.3), ("two", 0.7))]
    collect(trio, tmp_path, where="local", harm=tasks)
    shares = [0.3 / 4, 0.3 * 3 / 4, 0.7]
    parts = [by_hand(at(trio, 0.0, "additive"), [sequence], "harm") for sequence in data["harm"][:3]]
    for name, values in load_file(trio.fisher / "harm.safetensors").items():
        expected = sum(share * part[name] for share, part in zip(shares, parts, strict=True))
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.max()))


def test_tied_embeddings_have_one_fisher_of_both_uses(make_trio, gpt2_dir, base_dir, data, tmp_path):
    trio = make_trio(gpt2_dir)
    for folder in (trio.base, trio.utility, trio.safety):
        for file in base_dir.glob("*token*"):
            shutil.copy(file, folder)
    shutil.rmtree(trio.fisher)
    collect(trio, tmp_path, where="local")
    got = load_file(trio.fisher / "harm.safetensors")
    expected = by_hand(at(trio, 0.0, "additive"), data["harm"], "harm")
    assert got.keys() == expected.keys() and "lm_head.weight" not in got
    name = "transformer.wte.weight"
    torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=1e-5 * float(expected[name].max()))


def test_a_merge_collects_once_and_the_next_one_finds_it(trio, data, tmp_path, monkeypatch):
    for file in trio.fisher.iterdir():
        file.unlink()
    collect(trio, tmp_path)
    first = tensors_of(trio.run("diagonal_sst", out="first"))
    monkeypatch.setattr("sst_merge.full.collect.load_utility", lambda *_: pytest.fail("collected again"))
    out = trio.run("diagonal_sst", out="second")
    second = tensors_of(out)
    assert all(torch.equal(first[name], second[name]) for name in trio.tensors("utility"))
    report = json.loads((out / "report.json").read_text())
    assert report["sequences"]["harm"]["found"] == 5 and report["sequences"]["benign"]["found"] == 4
    total = sum(float(t.double().sum()) for t in load_file(trio.fisher / "benign.safetensors").values())
    assert report["fisher_trace"]["benign"] == pytest.approx(total, rel=1e-5)
    assert any("diagonal Fishers from 5 harm sequences at θ_u + tτ" in line for line in report["remarks"])


def test_fishers_of_another_run_are_refused(trio, data, tmp_path, capsys):
    for file in trio.fisher.iterdir():
        file.unlink()
    collect(trio, tmp_path)
    assert "points is" in trio.refusal(capsys, "diagonal_sst", where="local")
    trio.utility, trio.safety = trio.safety, trio.utility
    said = trio.refusal(capsys, "diagonal_sst")
    assert "harm.safetensors is of another run: models.safety is" in said and "collect them again" in said


def change(trio: Trio, kind: str, said: dict | None = None, **entries: object) -> None:
    """A file with a tensor changed; None removes it."""
    tensors = {k: load_file(trio.fisher / f"{k}.safetensors") for k in ("harm", "benign")}
    for name, value in entries.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[kind][name]
        elif isinstance(value, torch.Tensor):
            tensors[kind][name] = value
        else:
            tensors[kind][name].view(-1)[5] = value
    trio.save_fishers(tensors["harm"], tensors["benign"], said)


NORM = "model__norm__weight"


@pytest.mark.parametrize(
    ("kind", "said", "entries", "expected"),
    [
        ("harm", None, {NORM: None}, "lacks 1 of 21 tensors, first 'norm.weight'"),
        ("benign", None, {NORM: torch.ones(31)}, "has norm.weight as F32 (31,), the model's is (32,)"),
        ("harm", None, {NORM: -1e-9}, "harm of norm.weight holds entries that are negative, infinite or NaN"),
        ("benign", None, {NORM: float("nan")}, "benign of norm.weight holds entries that are negative"),
        ("benign", None, {NORM: float("inf")}, "benign of norm.weight holds entries that are negative"),
        ("harm", {"count": 0}, {}, "is a mean over 0 sequences"),
        ("harm", {"normalisation": "token"}, {}, "is a mean per token, and both must be per sequence"),
        ("harm", {"fingerprint": {"models": {"utility": "0"}}}, {}, 'models.utility is "0" there'),
    ],
)
def test_fisher_files_made_elsewhere_are_checked(trio, capsys, kind, said, entries, expected):
    change(trio, kind, said, **entries)
    message = trio.refusal(capsys, "diagonal_sst")
    assert expected in message and "collect them again" in message


def test_files_that_say_nothing_are_remarked_on_and_zeros_refused(trio, capsys):
    out = trio.run("diagonal_sst")
    assert "benign.safetensors does not say what it is of" in (out / "report.md").read_text()
    zero = {name: torch.zeros(t.shape) for name, t in trio.tensors("utility").items()}
    trio.save_fishers(zero, zero)
    assert "F_benign is zero" in trio.refusal(capsys, "diagonal_sst")
    (trio.fisher / "harm.safetensors").unlink()
    assert "harm.safetensors does not exist" in trio.refusal(capsys, "diagonal_sst")


def test_data_without_answers_are_refused(trio, data, tmp_path, capsys):
    for file in trio.fisher.iterdir():
        file.unlink()
    (tmp_path / "harm.jsonl").write_text(json.dumps({"prompt": "w1 w2"}) + "\n")
    collect(trio, tmp_path, code=2)
    assert "none are generated; give answers" in capsys.readouterr().err and not list(trio.fisher.iterdir())
