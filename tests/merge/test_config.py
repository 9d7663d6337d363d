"""The configuration: defaults, round trip, and an error with the remedy for everything else."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from sst_merge.config import load_config
from sst_merge.method_settings import METHOD_PARAMETERS, TiesParameters


def tree(**changes: Any) -> dict[str, Any]:
    base = {
        "base_model": "base",
        "models": [{"model": "u", "role": "utility"}, {"model": "s", "role": "safety"}],
        "calibration": {"harm": "h.jsonl", "benign": "b.jsonl"},
    }
    return {**base, **changes}


def test_roles_are_named_never_positional():
    swapped = tree(models=tree()["models"][::-1])
    assert load_config(swapped) == load_config(tree())
    assert load_config(tree()).utility.model == "u"


@pytest.mark.parametrize("method", METHOD_PARAMETERS)
def test_resolved_config_reads_back(method, tmp_path):
    config = load_config(tree(merge_method=method, parameters={"alpha": [0.25, 1]}, dtype="bfloat16"))
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert config.alphas == (0.25, 1.0)


def test_what_each_fisher_has_of_its_own_reads_back(tmp_path):
    parameters = {
        "fisher": {"harm": "exact", "benign": "ekfac"},
        "approximation": "reduce",
        "shrinkage": {"harm": "ledoit_wolf", "benign": 0.25},
        "shrinkage_target": "kronecker",
    }
    config = load_config(tree(parameters=parameters))
    path = tmp_path / "resolved.yaml"
    path.write_text(config.to_yaml())
    assert load_config(path) == config
    assert config.parameters.form("benign").representation == "ekfac_reduce"


def test_paths_are_relative_to_the_file(tmp_path):
    for name in ("u", "s", "h.jsonl"):
        (tmp_path / name).touch()
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree()))
    config = load_config(path)
    assert config.utility.model == str(tmp_path / "u")
    assert config.calibration.harm == str(tmp_path / "h.jsonl")
    assert config.base_model == "base"  # not there: a name in the cache


def test_overrides_and_numbers_that_yaml_reads_as_text():
    config = load_config(
        tree(parameters={"damping": "1e-3", "alpha": 1}, dtype="float32"),
        dtype="float64",
        device=None,
    )
    assert config.parameters.damping == 1e-3
    assert (config.dtype, config.device) == ("float64", "cpu")
    assert isinstance(load_config(tree(merge_method="ties")).parameters, TiesParameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_modle": "x"}, "unknown key 'base_modle'; did you mean 'base_model'"),
        ({"merge_method": "ssst"}, "unknown method 'ssst'; did you mean 'sst'"),
        ({"parameters": {"aplha": 1}}, "parameters: unknown key 'aplha'; did you mean 'alpha'"),
        ({"merge_method": "ties", "parameters": {"shrinkage": 0.1}}, "unknown key 'shrinkage'"),
        ({"parameters": {"alpha": -0.1}}, r"alpha: expected a number in \[0.0, 10.0\], got -0.1"),
        ({"parameters": {"alpha": []}}, "alpha: the list is empty"),
        ({"parameters": {"alpha": [1, 1.0]}}, "alpha: every strength may be given once"),
        ({"parameters": {"points": [0.25, 0.25]}}, "points: every point may be given once"),
        ({"parameters": {"points": 0.25}}, "points: expected a list"),
        ({"parameters": {"points": [1.0], "point_weights": "linear"}}, "a point below 1 is needed"),
        ({"parameters": {"seed": -1}}, "seed: expected a number"),
        ({"merge_method": ["sst"]}, "unknown method"),
        ({"models": [{"model": "u", "role": "utility", "parameters": 2}]}, "parameters must be a mapping"),
        ({"parameters": {"alpha": "much"}}, "alpha: expected float"),
        ({"parameters": {"alpha": float("nan")}}, "alpha: expected a number"),
        ({"parameters": {"shrinkage": 1.5}}, "shrinkage: expected a number in"),
        ({"parameters": {"shrinkage": "ledoit"}}, "shrinkage: expected one of ledoit_wolf.*did you mean"),
        ({"parameters": {"shrinkage": {"harm": True}}}, "shrinkage: expected float"),
        ({"parameters": {"shrinkage": [0.1]}}, "shrinkage: expected float"),
        ({"parameters": {"shrinkage": {"benign": 2}}}, "shrinkage: expected a number in"),
        ({"parameters": {"fisher": {"harm": "kfak"}}}, "fisher: expected one of.*did you mean 'kfac'"),
        ({"parameters": {"fisher": {"benigm": "kfac"}}}, "fisher: unknown key 'benigm'; did you mean 'benign'"),
        ({"parameters": {"approximation": "reduced"}}, "approximation: expected one of expand, reduce"),
        ({"parameters": {"shrinkage_target": "identity"}}, "shrinkage_target: expected one of diagonal, kronecker"),
        (
            {"parameters": {"fisher": {"benign": "kfac"}, "shrinkage": "ledoit_wolf"}},
            "ledoit_wolf is for fisher: exact or gram, and that of benign is kfac.*give a number",
        ),
        ({"parameters": {"damping": 0}}, "damping: expected a number in"),
        ({"parameters": {"k": 0}}, "k: expected an integer >= 1"),
        ({"parameters": {"k": 1.5}}, "k: expected an integer >= 1"),
        ({"merge_method": "fisher_averaging", "parameters": {"alpha": [0.5, 1.5]}}, r"fisher_averaging.*in \[0, 1\]"),
        ({"merge_method": "subspace_boosting", "parameters": {"beta": 1.5}}, "beta: expected a number in"),
        ({"merge_method": "single_fisher", "parameters": {"k": 0}}, "k: expected an integer >= 1"),
        ({"parameters": {"select": "topk"}}, "select: .*did you mean 'top_k'"),
        ({"parameters": {"samples": True}}, "samples: expected int"),
        ({"merge_method": "interpolation", "parameters": {"alpha": 1.5}}, r"alpha in \[0, 1\]"),
        ({"models": [{"model": "u", "role": "utility"}]}, "no entry has the role 'safety'"),
        ({"models": [{"model": "u", "role": "utilty"}]}, "role must be.*did you mean 'utility'"),
        (
            {"models": [{"model": "u", "role": "utility"}] * 2},
            "two entries have the role 'utility'",
        ),
        ({"models": [{"role": "utility"}]}, "lacks `model`"),
        ({"models": {"utility": "u"}}, "expected a list of entries"),
        ({"calibration": None}, "needs `calibration`"),
        ({"calibration": {"harm": "h"}}, "calibration lacks `benign`"),
        ({"calibration": {"harm": "h", "benign": 3}}, "benign: expected str"),
        (
            {"calibration": {"harm": "h", "benign": "b", "held_out": 1.0}},
            "held_out: expected a number",
        ),
        ({"dtype": "float8"}, "dtype: expected one of"),
        ({"device": "gpu"}, "device: 'gpu' is no torch device"),
        ({"output": {"rank": 0}}, "rank: expected a number"),
        ({"output": {"dtype": "auto"}}, "dtype: expected one of"),
        ({"trust_remote_code": "yes"}, "trust_remote_code: expected bool"),
    ],
)
def test_errors_name_the_key_and_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        load_config(tree(**changes))


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "absent.yaml")
    for text, message in (
        ("{", "not valid YAML"),
        ("- a", "must be a mapping"),
        ("!!python/object:os.x {}", "not valid YAML"),
    ):
        path = tmp_path / "config.yaml"
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_config(path)
    missing = tree()
    del missing["base_model"]
    with pytest.raises(ValueError, match="lacks `base_model`"):
        load_config(missing)


def test_one_adapter_in_both_roles_is_refused(setup):
    config = setup.config("task_arithmetic")
    config["models"][1]["model"] = f"{setup.utility.parent}/./{setup.utility.name}"
    with pytest.raises(ValueError, match="utility and safety must be two models"):
        load_config(config)
