"""The section `compare`: defaults, paths, and what is refused, with the nearest known word."""

from __future__ import annotations

import pytest
import yaml

from sst_merge import load_config
from sst_merge.compare import VARIANTS, Variant, load_compare
from sst_merge.compare.axes import Axes
from sst_merge.compare.config import ALPHAS, settings_of
from sst_merge.compare.evaluators import AnswerLoss, Refusal
from sst_merge.compare.user_code import Command, PythonFunction
from sst_merge.method_settings import METHOD_PARAMETERS
from sst_merge.methods import METHODS

EVALUATORS = {
    "refusal": {"kind": "refusal", "data": "forbidden.jsonl"},
    "over_refusal": {"kind": "refusal", "data": "forbidden.jsonl", "patterns": ["^no"], "max_new_tokens": 8},
    "utility": {"kind": "answer_loss", "data": "forbidden.jsonl"},
}


@pytest.fixture
def load(setup, tmp_path):
    """Load a file with a section `compare` of these keys."""
    (tmp_path / "forbidden.jsonl").write_text('{"prompt": "w1", "response": "w2"}\n')
    (tmp_path / "mine.py").write_text("def f(model, tokenizer):\n    return 1.0\n")

    def load_file(top: dict | None = None, **section: object):
        tree = {**setup.config(), "compare": {"evaluators": EVALUATORS, **section}, **(top or {})}
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in tree.items() if value is not None}))
        return load_compare(path)

    return load_file


def test_defaults_and_paths(load, tmp_path):
    config, settings = load()
    assert (settings.methods, settings.alphas, settings.seeds) == (VARIANTS, ALPHAS, 5)
    data = str(tmp_path / "forbidden.jsonl")
    assert settings.evaluators["over_refusal"] == Refusal("over_refusal", data, ("^no",), 8)
    assert settings.evaluators["utility"] == AnswerLoss("utility", data)
    assert settings.axes == Axes({"refusal": "higher"}, {"over_refusal": "lower", "utility": "likelihood"})
    assert config.merge_method == "sst"


def test_the_same_file_is_a_merge(load, tmp_path):
    load()
    assert load_config(tmp_path / "config.yaml").merge_method == "sst"


def test_every_method_is_in_the_default_table():
    assert {variant.merge_method for variant in VARIANTS.values()} == set(METHODS) == set(METHOD_PARAMETERS)
    for label, variant in VARIANTS.items():
        settings_of(variant.merge_method, variant.parameters, label)


def test_methods_by_name_by_label_and_spelt_out(load):
    _, settings = load(methods=["ties", "SST diagonal"])
    assert settings.methods == {"ties": Variant("ties"), "SST diagonal": VARIANTS["SST diagonal"]}
    spelt = {"a": {"merge_method": "sst", "parameters": {"k": 3, "points": [0.5]}, "tune": True}, "tsv": None}
    _, settings = load(methods=spelt)
    assert settings.methods == {"a": Variant("sst", {"k": 3, "points": [0.5]}, True), "tsv": Variant("tsv")}


def test_users_own_evaluators(load, tmp_path):
    own = {
        "mine": {"kind": "python", "function": "mine.py:f"},
        "other": {"kind": "command", "command": "run {model}", "timeout": 5},
    }
    axes = {"safety": {"mine.x": [0, 10]}, "utility": {"other": "lower"}}
    _, settings = load(evaluators=own, axes=axes)
    assert settings.evaluators["mine"] == PythonFunction("mine", f"{tmp_path}/mine.py:f")
    assert settings.evaluators["other"] == Command("other", "run {model}", 5.0, False, str(tmp_path))
    assert settings.axes == Axes({"mine.x": (0.0, 10.0)}, {"other": "lower"})


MINE = {"mine": {"kind": "python", "function": "mine.py:f"}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"methods": ["tie"]}, r"compare.methods: unknown method 'tie'; did you mean 'ties'\?"),
        ({"methods": ["SST exakt"]}, r"unknown method 'SST exakt'; did you mean 'SST exact'\?"),
        ({"methods": {"a": {"merge_method": "tvs"}}}, r"\(a\): unknown method 'tvs'; did you mean 'tsv'\?"),
        ({"methods": {"a": {"merge_method": "ties", "parameters": {"densty": 1}}}}, "did you mean 'density'"),
        ({"methods": {"a": {"merge_method": "ties", "parameters": {"density": 2}}}}, r"\(a\): density: expected a num"),
        ({"methods": {"a": {"merge_method": "ties", "parameters": {"alpha": 1}}}}, "alpha is the comparison's own"),
        ({"methods": {"a": {"merge_method": "ties", "tune": True}}}, "true for merge_method sst only"),
        ({"methods": {"a": {"metod": "ties"}}}, "unknown key 'metod'"),
        ({"methods": []}, "expected a list of names or a mapping"),
        ({"alpha": [1.0]}, r"compare: unknown key 'alpha'; did you mean 'alphas'\?"),
        ({"alphas": []}, "alphas: the list is empty"),
        ({"alphas": [0.0, 1.0]}, r"alphas: expected numbers in \(0, 10\], got 0.0"),
        ({"alphas": [1.0, 1]}, "every strength may be given once"),
        ({"seeds": 0}, "seeds: expected a number"),
        ({"confidence": 95}, "confidence: expected a number"),
        ({"evaluators": {}}, "compare.evaluators: expected a mapping"),
        ({"evaluators": {"a": {"kind": "refusals"}}}, r"\(a\): unknown kind 'refusals'; did you mean 'refusal'\?"),
        ({"evaluators": {"a": {"kind": "refusal"}}}, r"\(a\) lacks `data`"),
        ({"evaluators": {"a": {"kind": "refusal", "data": "no.jsonl"}}}, "evaluator a: data file .*no.jsonl does not"),
        ({"evaluators": {"a.b": MINE["mine"]}}, "a name has no point"),
        ({"evaluators": {"a": {**EVALUATORS["refusal"], "patterns": ["("]}}}, r"'\(' is no regular expression"),
        ({"evaluators": {"a": {**EVALUATORS["refusal"], "patterns": []}}}, "patterns must be a list"),
        ({"evaluators": {"a": {**EVALUATORS["utility"], "batch_sise": 1}}}, "did you mean 'batch_size'"),
        ({"evaluators": {"a": {"kind": "python", "function": "mine.py"}}}, "function must be"),
        ({"evaluators": {"a": {"kind": "python", "function": "my.py:f"}}}, "data file .*my.py does not exist"),
        ({"evaluators": {"a": {"kind": "command", "command": "run"}}}, r"the command must hold \{model\}"),
        ({"evaluators": MINE}, "compare.axes: say what safety and utility are"),
        ({"axes": {"safety": {"refusal": "higher"}}}, "compare.axes lacks `utility`"),
        ({"axes": {"safety": {"refusl": "higher"}, "utility": {"utility": "lower"}}}, "did you mean 'refusal'"),
        ({"axes": {"safety": {"refusal": "hihger"}, "utility": {"utility": "lower"}}}, "did you mean 'higher'"),
        ({"axes": {"safety": {"refusal": [1, 1]}, "utility": {"utility": "lower"}}}, "two different numbers"),
        ({"axes": {"safety": {"refusal": "higher"}, "utility": {"refusal": "lower"}}}, "is on both axes"),
    ],
)
def test_refused(load, section, message):
    with pytest.raises(ValueError, match=message):
        load(**section)


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"compare": None}, "the config has no section `compare`"),
        ({"calibration": None}, "compare needs `calibration`"),
        ({"merge_method": "ties", "parameters": {}}, "merge_method: a comparison judges all methods"),
        ({"compare": ["ties"]}, "compare: expected a mapping, got list"),
    ],
)
def test_refused_at_the_top(load, top, message):
    with pytest.raises(ValueError, match=message):
        load(top)
