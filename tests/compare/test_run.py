"""A whole comparison on the tiny models: what is written, resumed, refused."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import yaml

from sst_merge import calibration, held_out, merge
from sst_merge.cli import main
from sst_merge.compare import compare, load_compare, replicate
from sst_merge.compare.axes import values_of
from sst_merge.compare.journal import Journal
from sst_merge.compare.outcome import Outcome
from sst_merge.compare.variants import VARIANTS


@pytest.fixture
def tree(setup, tmp_path):
    """Three methods, two strengths, two seeds; the function appends a line to a file whenever it is called."""
    (tmp_path / "mine.py").write_text(
        "from pathlib import Path\n"
        "def measure(model, tokenizer):\n"
        "    with open(Path(__file__).with_name('calls'), 'a') as file:\n"
        "        file.write('x')\n"
        "    return float(model.get_parameter('model.layers.0.self_attn.v_proj.weight').norm())\n"
    )
    evaluators = {
        "refusal": {"kind": "answer_loss", "data": str(setup.harm)},
        "utility": {"kind": "answer_loss", "data": str(setup.benign)},
        "mine": {"kind": "python", "function": str(tmp_path / "mine.py") + ":measure"},
    }
    axes = {"safety": {"refusal": [10, 0]}, "utility": {"utility": "likelihood"}}
    methods = {"SST": {"merge_method": "sst"}, "TA": {"merge_method": "task_arithmetic"}, "interpolation": None}
    section = {"methods": methods, "alphas": [0.5, 1.2], "seeds": 2, "evaluators": evaluators, "axes": axes}
    return {**setup.config(), "compare": section}


def calls(tmp_path) -> int:
    return len((tmp_path / "calls").read_text())


def test_command_writes_the_comparison_and_goes_on_with_it(tree, setup, tmp_path, capsys):
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(tree))
    assert main(["compare", str(path), "--out", str(out)]) == 0
    assert "Best: " in capsys.readouterr().out
    once = calls(tmp_path)
    assert once == 2 * (4 + 2 + 2 + 1)  # four models alone, two strengths twice, one of the average
    found = json.loads((out / "compare.json").read_text())
    assert set(found["variants"]) == {"SST", "TA", "interpolation"}
    rows = {label: {r["alpha"]: r for r in v["replicates"]["seed0"]["rows"]} for label, v in found["variants"].items()}
    assert list(rows["interpolation"]) == [0.5] and list(rows["TA"]) == [0.5, 1.2]
    text = (out / "compare.md").read_text()
    assert "## Verdict" in text and all(
        (out / f"{name}.png").exists() for name in ("area", "frontier", "frontier-seed1")
    )
    assert (out / "compare.html").read_text().count("<svg") == 4

    report = merge({**setup.config("sst", alpha=[0.5, 1.2], seed=0)}).report  # the same merge, measured by itself
    for row in report["held_out"]:
        measured = rows["SST"][row["alpha"]]
        assert measured["kl"] == pytest.approx(row["measured_kl"], rel=1e-3, abs=1e-6)
        assert measured["refusal_change"] == pytest.approx(row["measured_refusal"], rel=1e-3, abs=1e-5)

    resolved = load_compare(out / "sst_config.yaml")[1]
    assert resolved == load_compare(path)[1]
    assert main(["compare", str(path), "--out", str(out)]) == 2  # not without --overwrite
    tree["compare"]["alphas"] = [0.5, 0.8, 1.2]
    summary = compare(tree, out, overwrite=True)
    assert calls(tmp_path) == once + 2 * 3  # the new strength alone
    again = json.loads((out / "compare.json").read_text())["variants"]["SST"]["replicates"]["seed1"]["rows"]
    assert [row["alpha"] for row in again] == [0.5, 0.8, 1.2] and len(summary.standings) == 3


def test_every_variant_of_the_default_table_is_merged_and_measured(tree, setup, tmp_path):
    """As `merge` measures those whose updates are factors, dense, or of all modules together."""
    methods = {label: asdict(variant) for label, variant in VARIANTS.items() if not variant.tune}
    section = {**tree["compare"], "methods": methods, "alphas": [0.9], "seeds": 1}
    compare({**tree, "compare": section}, tmp_path / "out")
    found = json.loads((tmp_path / "out/compare.json").read_text())["variants"]
    rows = {label: variant["replicates"]["seed0"]["rows"][0] for label, variant in found.items()}
    assert rows.keys() == methods.keys() and all(row["gain"] > 0 and row["cost"] > 0 for row in rows.values())
    for label in ("KnOTS-TIES", "RegMean", "diagonal SST, factors, hard, path", "SST gram"):
        method, parameters = methods[label]["merge_method"], methods[label]["parameters"]
        (alone,) = merge(setup.config(method, **parameters, alpha=0.9)).report["held_out"]
        assert rows[label]["kl"] == pytest.approx(alone["measured_kl"], rel=0.01)


def test_killed_halfway_it_goes_on_where_it_was(tree, tmp_path, monkeypatch):
    seen = []

    def stopping(problem, merged):
        seen.append(len(merged))
        if len(seen) == 6:  # four models alone, SST, then TA
            raise KeyboardInterrupt
        return held_out.measure(problem, merged)

    monkeypatch.setattr(replicate, "measure", stopping)
    tree["compare"]["seeds"] = 1
    with pytest.raises(KeyboardInterrupt):
        compare(tree, tmp_path / "out")
    assert not (tmp_path / "out").exists() and calls(tmp_path) == 4 + 2
    compare(tree, tmp_path / "out")
    assert calls(tmp_path) == 4 + 2 + 2 + 1


def test_what_changes_is_measured_again(tree, setup, tmp_path):
    tree["compare"] |= {"seeds": 1, "methods": ["task_arithmetic"], "alphas": [1.0]}
    compare(tree, tmp_path / "out")
    assert calls(tmp_path) == 5
    mine = tmp_path / "mine.py"
    mine.write_text(mine.read_text() + "# changed\n")
    compare(tree, tmp_path / "out", overwrite=True)
    assert calls(tmp_path) == 10


def test_a_seed_changes_what_it_says_and_nothing_else(tree, tmp_path):
    """Held-out sequences and sampled labels change gain and cost; deterministic merges' evaluations do not change."""
    tree["compare"] |= {"methods": ["task_arithmetic", "sst", "dare"], "alphas": [1.0]}
    summary = compare(tree, tmp_path / "out")
    rows = {s.label: [curve.rows[0] for curve in s.curves] for s in summary.standings}
    values = {label: [values_of(row["outcomes"])["refusal"] for row in both] for label, both in rows.items()}
    assert values["task_arithmetic"][0] == values["task_arithmetic"][1]
    assert values["sst"][0] != values["sst"][1] and values["dare"][0] != values["dare"][1]
    assert rows["task_arithmetic"][0]["cost"] != rows["task_arithmetic"][1]["cost"]


def test_tuned_variants_sweep_and_name_their_strength(tree, tmp_path, monkeypatch):
    methods = {"tuned": {"merge_method": "sst", "tune": True}}
    tree["compare"] |= {"seeds": 1, "methods": methods, "alphas": [0.5, 1.0]}
    curve = compare(tree, tmp_path / "out").standings[0].curves[0]
    assert curve.rows[0]["tuned"]["alpha"] in (0.5, 1.0)
    assert curve.alphas[curve.tuned] == curve.rows[0]["tuned"]["alpha"] and curve.tuned_score is not None


def test_a_command_is_given_the_merged_adapter(tree, setup, tmp_path):
    script = tmp_path / "score.py"
    script.write_text(
        "import json, sys\nfrom safetensors.torch import load_file\n"
        "tensors = load_file(sys.argv[1] + '/adapter_model.safetensors')\nprint(json.dumps(len(tensors)))\n"
    )
    tree["compare"] |= {"seeds": 1, "methods": ["task_arithmetic"], "alphas": [1.0]}
    tree["compare"]["evaluators"] = {**tree["compare"]["evaluators"], "size": {
        "kind": "command", "command": f"python {script} {{model}}", "timeout": 120}}  # fmt: skip
    summary = compare(tree, tmp_path / "out")
    # q, v and down_proj of two layers, A and B each
    assert summary.standings[0].curves[0].rows[0]["outcomes"]["size"].value == 12


def test_errors_say_where(tree, tmp_path):
    (tmp_path / "mine.py").write_text("def measure(model, tokenizer):\n    return None\n")
    with pytest.raises(ValueError, match="seed0, base alone: evaluator mine: expected a finite number"):
        compare(tree, tmp_path / "out")


def test_a_journal_drops_half_a_line(tmp_path):
    journal = Journal(tmp_path, {"a": 1})
    for alpha in (0.5, 1.0):
        journal.add({"alpha": alpha, "outcomes": {"x": Outcome.over_prompts([1.0, 0.0], [2, 3])}})
    journal.path.write_text(journal.path.read_text()[:-5])
    again = Journal(tmp_path, {"a": 1})
    assert list(again.rows) == [0.5] and again.rows[0.5]["outcomes"]["x"] == Outcome(0.2, (1.0, 0.0), (2.0, 3.0))
    again.add({"alpha": 2.0, "outcomes": {}})
    assert list(Journal(tmp_path, {"a": 1}).rows) == [0.5, 2.0]
    assert Journal(tmp_path, {"a": 2}).rows == {}


def test_answers_are_generated_once(tree, setup, tmp_path, monkeypatch):
    bare = [{"prompt": json.loads(line)["prompt"]} for line in setup.benign.read_text().splitlines()]
    (tmp_path / "bare.jsonl").write_text("\n".join(map(json.dumps, bare)))
    tree["calibration"] |= {"benign": str(tmp_path / "bare.jsonl"), "max_new_tokens": 4}
    tree["compare"] |= {"seeds": 1, "methods": ["task_arithmetic"], "alphas": [1.0]}
    generate, counted = calibration.generate_answers, []
    monkeypatch.setattr(calibration, "generate_answers", lambda *args: counted.append(1) or generate(*args))
    first = compare(tree, tmp_path / "out")
    again = compare(tree, tmp_path / "out", overwrite=True)
    assert len(counted) == 1 and again.standings[0].area == first.standings[0].area
