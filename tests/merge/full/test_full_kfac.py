"""K-FAC SST of whole layers against dense pencils in float64, with factors of a user's loop and with our own."""

from __future__ import annotations

import json

import pytest
import scipy.linalg
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from trio import Trio, tensors_of

from sst_kernels import AccumulatorOptions, FactorAccumulator, Factors
from sst_merge import merge
from sst_merge.full.kfac import LayerPencil

DAMPING = 0.3


def factor(n: int, rows: int, seed: int) -> Tensor:
    x = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.mT @ x / rows


@pytest.fixture(params=[(5, 7, 4, 20), (6, 4, 9, 2), (1, 3, 2, 3)])
def layer(request) -> tuple[LayerPencil, Tensor, Tensor, Tensor]:
    """A pencil with its dense A and B, and a patch; some factors are singular."""
    d_out, d_in, harm, benign = request.param
    pencil = LayerPencil(
        (factor(d_out, harm, 0), factor(d_in, harm + 1, 1)), (factor(d_out, benign, 2), factor(d_in, benign, 3)), 0.05
    )
    patch = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    a, b = torch.kron(*pencil.harm), torch.kron(*pencil.benign)
    return pencil, a, b + 0.05 * torch.eye(len(b), dtype=torch.float64), patch


@pytest.mark.parametrize("mu", [1e-2, 1.0])
def test_soft_is_the_solution_of_the_dense_equation(layer, mu):
    pencil, a, b, patch = layer
    found = pencil.soft(patch, mu)
    expected = torch.linalg.solve(a + mu * b, a @ patch.flatten())
    torch.testing.assert_close(found.update.flatten(), expected, rtol=1e-6, atol=1e-7)
    assert found.converged and found.status == "CONVERGED"
    assert found.gain == pytest.approx(float(expected @ a @ expected), rel=1e-5)
    assert found.cost == pytest.approx(float(expected @ b @ expected), rel=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_top_k_is_the_projection_by_scipy_s_eigenvectors(layer, k):
    pencil, a, b, patch = layer
    values, vectors = (torch.from_numpy(x) for x in scipy.linalg.eigh(a.numpy(), b.numpy()))
    v = vectors.flip(1)[:, :k]
    expected = v @ (v.mT @ b @ patch.flatten())
    found = pencil.top(patch, k)
    torch.testing.assert_close(found.update.flatten(), expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.values, values.flip(0)[:k], rtol=1e-9, atol=1e-12)
    assert found.converged and found.gain == pytest.approx(float(expected @ a @ expected), rel=1e-8)
    assert found.cost == pytest.approx(float(expected @ b @ expected), rel=1e-8)


def test_what_does_not_converge_says_so(layer, monkeypatch):
    pencil, _, _, patch = layer
    monkeypatch.setattr("sst_merge.full.kfac.ITERATIONS", 1)
    monkeypatch.setattr(LayerPencil, "_preconditioner", lambda *_: lambda r: r)
    found = pencil.soft(patch, 1e-6)
    assert not found.converged and found.status.startswith("MAX_ITERATIONS, relative residual")


@pytest.fixture(params=["llama", "gpt2"])
def small(request, make_trio, tmp_path, base_dir) -> Trio:
    """One layer of each kind; those of GPT-2 are stored transposed."""
    sizes = {"vocab_size": 50, "num_attention_heads": 2}
    layer = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_key_value_heads": 1}
    config = {
        "llama": LlamaConfig(**sizes, **layer),
        "gpt2": GPT2Config(n_embd=8, n_layer=1, n_positions=32, bos_token_id=0, **sizes),
    }[request.param]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    for file in base_dir.glob("*token*"):
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    trio = make_trio(tmp_path / "small")
    for file in trio.fisher.iterdir():
        file.unlink()
    return trio


def user_s_factors(trio: Trio, **options: object) -> dict[str, Factors]:
    """Saved by a loop of the user's own over random tokens; of all layers, a tied head included."""
    model = AutoModelForCausalLM.from_pretrained(trio.utility).eval()
    ids = torch.randint(3, 50, (4, 9), generator=torch.Generator().manual_seed(1))
    layers = [name for name, module in model.named_modules() if type(module).__name__ in ("Linear", "Conv1D")]
    found = {}
    for kind, fisher in (("harm", "empirical"), ("benign", "true")):
        with FactorAccumulator(model, layers, fisher=fisher, options=AccumulatorOptions(seed=1), **options) as acc:
            logits = model(input_ids=ids).logits
            if kind == "harm":
                loss = torch.nn.functional.cross_entropy(
                    logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"
                )
                acc.training_loss(loss).backward()
            else:
                acc.sampled_loss(logits).backward()
        acc.factors.save(trio.fisher / f"{kind}.safetensors")
        found[kind] = acc.factors
    return found


def merged_by_hand(trio: Trio, factors: dict[str, Factors], rule) -> dict[str, Tensor]:
    """θ_u + φ of every layer, φ = rule(A, B, τ) of the dense pencil; float64."""
    base, utility, safety = (trio.tensors(owner) for owner in ("base", "utility", "safety"))
    means = {
        name: [tuple(f.double() for f in factors[kind].mean(name)) for kind in ("harm", "benign")]
        for name in factors["harm"].layers
        if f"{name}.weight" in utility
    }
    traces = sum(float(a.trace() * g.trace()) for _, (a, g) in means.values())
    gamma = DAMPING * traces / sum(len(a) * len(g) for _, (a, g) in means.values())
    merged = dict(utility)
    for name, ((a_h, g_h), (a_b, g_b)) in means.items():
        key = f"{name}.weight"
        tau = safety[key] - base[key]
        tau = tau if tau.shape == (len(g_h), len(a_h)) and "transformer" not in key else tau.mT
        a, b = torch.kron(g_h, a_h), torch.kron(g_b, a_b)
        phi = rule(a, b + gamma * torch.eye(len(b), dtype=torch.float64), tau.flatten()).reshape(tau.shape)
        merged[key] = utility[key] + (phi.mT if "transformer" in key else phi)
    return merged


def top(k: int):
    def rule(a: Tensor, b: Tensor, tau: Tensor) -> Tensor:
        vectors = torch.from_numpy(scipy.linalg.eigh(a.numpy(), b.numpy())[1])
        v = vectors[:, -k:]
        return v @ (v.mT @ (b @ tau))

    return rule


@pytest.mark.parametrize(
    ("select", "rule"),
    [
        ({"select": "top_k", "k": 3}, top(3)),
        ({"select": "soft", "mu": 0.7}, lambda a, b, tau: torch.linalg.solve(a + 0.7 * b, a @ tau)),
    ],
)
def test_layers_are_merged_by_their_pencils_and_the_rest_stays(small, select, rule):
    factors = user_s_factors(small)
    out = small.run("sst", fisher="kfac", damping=DAMPING, **select)
    expected, merged, utility = merged_by_hand(small, factors, rule), tensors_of(out), small.tensors("utility")
    assert merged.keys() == utility.keys()
    changed = {f"{name}.weight" for name in factors["harm"].layers} & utility.keys()
    for name, theta in expected.items():
        torch.testing.assert_close(merged[name].double(), theta, rtol=1e-4, atol=1e-5)
        assert torch.equal(merged[name].double(), utility[name]) is (name not in changed), name
    report = json.loads((out / "report.json").read_text())
    assert {row["module"] for row in report["modules"]} == changed
    assert all("CONVERGED" in row["solver"] for row in report["modules"]) and not report["warnings"]
    assert len(report["not_covered"]) == len(utility) - len(changed)
    assert all("left as in the utility model" in line for line in report["not_covered"])


def test_our_own_collection_gathers_the_same_factors(small, tmp_path):
    """Against a loop over single sequences; the labels of the harm data are given."""
    sequences = [[5, 6, 7, 8, 9], [10, 11, 12], [20, 4, 30, 31]]
    for kind in ("harm", "benign"):
        lines = [json.dumps({"input_ids": ids, "labels": [-100, *ids[1:]]}) for ids in sequences]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    small.config["calibration"] = {kind: str(tmp_path / f"{kind}.jsonl") for kind in ("harm", "benign")}
    small.run("sst", fisher="kfac", k=2, where="local")
    model = AutoModelForCausalLM.from_pretrained(small.utility).eval()
    got = Factors.load(small.fisher / "harm.safetensors")
    with FactorAccumulator(model, list(got.specs), fisher="empirical") as acc:
        for ids in sequences:
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")
            acc.training_loss(loss).backward()
    for name in got.layers:
        for found, expected in zip(got.mean(name), acc.factors.mean(name), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    benign = Factors.load(small.fisher / "benign.safetensors")
    assert benign.fisher == "true" and benign.layers.keys() == got.layers.keys()
    small.run("sst", fisher="kfac", k=2, where="local", out="again")
    assert "is of another run: approximation" in refused(small, where="local", approximation="reduce")
    assert "is of another run: benign.seed is 0 there and 5 here" in refused(small, where="local", seed=5)
    del small.config["calibration"]
    small.utility, small.safety = small.safety, small.utility
    assert "is of another run: models.utility" in refused(small, where="local")


def refused(trio: Trio, **parameters: object) -> str:
    models = [{"model": str(getattr(trio, role)), "role": role} for role in ("utility", "safety")]
    parameters = {"fisher": "kfac", "k": 2, **parameters}
    tree = {"base_model": str(trio.base), "models": models, "merge_method": "sst", "parameters": parameters}
    with pytest.raises(ValueError) as error:
        merge({**tree, "fisher_dir": str(trio.fisher), **trio.config}, out=trio.root / "refused")
    assert not (trio.root / "refused").exists()
    return str(error.value)


def test_what_cannot_be_done_is_refused(small):
    user_s_factors(small)
    assert "full checkpoints take kfac" in refused(small, fisher="exact")
    assert "give a count, such as 64" in refused(small, k=0.05)
    assert "soft needs mu" in refused(small, select="soft")
    assert "use top_k or soft" in refused(small, select="dof")
    assert "use scope: module" in refused(small, scope="global")
    assert "leave it at 0" in refused(small, shrinkage={"benign": 0.5})
    assert "kfac for both" in refused(small, fisher={"harm": "kfac", "benign": "diagonal"})
    assert "use uniform, or expand" in refused(small, approximation="reduce", point_weights="linear")


def test_factors_of_other_models_and_normalisations_are_refused(small):
    user_s_factors(small)
    harm = small.fisher / "harm.safetensors"
    expand = harm.read_bytes()
    user_s_factors(small, approximation="reduce")
    harm.write_bytes(expand)
    assert "harm is expand and benign reduce" in refused(small)
    factors = user_s_factors(small)["harm"]
    name = next(iter(factors.layers))
    factors.layers[name].grad_factor[0] = torch.nan
    factors.save(harm)
    assert f"the harm factors of {name} are not finite" in refused(small)
    factors = user_s_factors(small)["harm"]
    factors.specs = {f"other.{name}": spec for name, spec in factors.specs.items()}
    factors.layers = {f"other.{name}": layer for name, layer in factors.layers.items()}
    factors.shared = {f"other.{name}": f"other.{owner}" for name, owner in factors.shared.items()}
    factors.save(harm)
    assert "and the model not; gather the factors of this model" in refused(small)
    harm.write_bytes(b"nothing")
    assert "is no safetensors file" in refused(small)
    harm.unlink()
    assert "harm.safetensors does not exist; save FactorAccumulator's factors there" in refused(small)
