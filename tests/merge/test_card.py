"""The model card beside a merged adapter: what PEFT writes and reads, and what a reader needs to know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM

from sst_merge.card import render_card
from sst_merge.cli import main
from sst_merge.config import load_config


def merge(setup, tmp_path: Path, method: str = "sst", **parameters: object) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(setup.config(method, **parameters)))
    assert main(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    return tmp_path / "out"


def test_the_front_matter_is_what_peft_writes(setup, tmp_path):
    out = merge(setup, tmp_path)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(setup.base), out)
    ours = ModelCard.load(out / "README.md").data.to_dict()
    model.save_pretrained(tmp_path / "peft")
    theirs = ModelCard.load(tmp_path / "peft" / "README.md").data.to_dict()
    assert set(theirs["tags"]) <= set(ours["tags"]) and ours["tags"] == sorted(ours["tags"])
    assert {**ours, "tags": None} == {**theirs, "tags": None}


def test_peft_saving_over_the_folder_keeps_the_card(setup, tmp_path):
    out = merge(setup, tmp_path)
    before = ModelCard.load(out / "README.md").text
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(setup.base), out)
    model.save_pretrained(out)
    assert ModelCard.load(out / "README.md").text.splitlines() == before.splitlines()


def test_every_strength_has_a_card_whose_snippet_loads_it(setup, tmp_path, input_ids):
    out = merge(setup, tmp_path, alpha=[0.5, 2.0], k=0.3)
    assert not (out / "README.md").exists()
    for alpha, home in ((0.5, out / "alpha-0.5"), (2.0, out / "alpha-2.0")):
        text = (home / "README.md").read_text()
        settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
        assert settings["parameters"]["alpha"] == alpha and settings["parameters"]["k"] == 0.3
        snippet = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
        scope: dict[str, object] = {}
        exec(snippet.replace("path/to/this/folder", str(home)), scope)
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(setup.base), home)
        with torch.no_grad():
            assert torch.equal(scope["model"](input_ids).logits, expected(input_ids).logits)


def test_what_the_card_tells(setup, tmp_path):
    text = (merge(setup, tmp_path) / "README.md").read_text()
    assert "9 harm sequences (3 more held out) and 8 benign sequences (2 more held out)" in text
    assert f"utility: `{setup.utility.name}`" in text and f"safety: `{setup.safety.name}`" in text
    assert str(setup.utility) not in text and str(setup.harm) not in text  # where they lie is nobody's business


def test_other_methods_say_what_they_used(setup, tmp_path):
    text = (merge(setup, tmp_path, "diagonal_sst") / "README.md").read_text()
    assert "9 harm sequences" in text and "was kept" not in text  # that is said of sst alone
    (tmp_path / "out").rename(tmp_path / "earlier")
    text = (merge(setup, tmp_path, "task_arithmetic") / "README.md").read_text()
    assert "No data were used" in text and "Fisher" not in text and "quadratic" not in text


@pytest.mark.parametrize("base", ['a "quoted" base', "ünï: code # no comment", "plain/name"])
def test_measurements_warnings_and_odd_names(setup, base):
    row = {"alpha": 0.5, "measured_kl": 0.25, "measured_refusal": None}
    report = {
        "base_model": base,
        "utility": "u",
        "safety": "s",
        "merge_method": "sst",
        "strengths": [{"alpha": 0.5, "adapter": "."}],
        "held_out": [row, {**row, "alpha": 1.0, "measured_kl": 0.75}],
        "warnings": ["the kept directions do not survive"],
        "not_covered": ["lm_head.weight: copied"],
        "versions": {"peft": "1.2"},
    }
    card = render_card(base, report["strengths"][0], report, load_config(setup.config()))
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == base
    assert ast.literal_eval(re.search(r'from_pretrained\((".*")\)', card)[1]) == base
    assert "| measured_kl | 0.25 |" in card and "| measured_refusal | – |" in card and "0.75" not in card
    assert "was not measured." not in card
    assert "- the kept directions do not survive\n- Not covered by curvature: lm_head.weight: copied.\n" in card
    assert "- PEFT 1.2" in card
