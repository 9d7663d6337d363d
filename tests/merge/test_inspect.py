"""The inspection of an adapter: its numbers against PEFT's dense ΔW, its refusals as reasons."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sst_merge.adapters import (
    LowRank,
    inspect_adapter,
    read_adapter,
    render_inspection,
    write_adapter,
)


def test_numbers_of_each_module(make_adapter, gpt2_dir):
    folder, model = make_adapter(
        gpt2_dir,
        target_modules=["c_attn", "mlp.c_proj", "wte"],
        modules_to_save=["ln_f"],
        rank_pattern={"c_attn": 6},
        use_rslora=True,
        fan_in_fan_out=True,
    )
    report = inspect_adapter(folder)
    json.dumps(report)
    assert report["refusals"] == [] and report["base_model"] == str(gpt2_dir)
    assert len(report["modules"]) == 5
    for row in report["modules"]:
        layer = model.base_model.model.get_submodule(row["module"])
        delta = layer.get_delta_weight("default").detach().double().numpy()
        assert tuple(row["shape"]) == delta.T.shape  # Conv1D and Embedding store it transposed
        assert row["norm"] == pytest.approx(np.linalg.norm(delta), rel=1e-5)
        assert row["rank"] == row["numerical_rank"] == layer.r["default"]
        assert row["scale"] == pytest.approx(12 / layer.r["default"] ** 0.5)
        assert row["kind"] == ("embedding" if row["module"].endswith("wte") else "linear")
    assert report["saved"] == ["transformer.ln_f.bias", "transformer.ln_f.weight"]


def test_numerical_rank_sees_through_redundant_factors(make_adapter, llama_dir, tmp_path):
    adapter = read_adapter(make_adapter(llama_dir, target_modules=["q_proj"])[0])
    first, second = adapter.updates
    update = adapter.updates[first]
    twice = LowRank(torch.cat([update.up] * 2, 1), torch.cat([update.down] * 2))
    updates = {first: twice, second: adapter.updates[second].scaled(0.0)}
    write_adapter(tmp_path / "out", updates, sources=[adapter])
    rows = {row["module"]: row for row in inspect_adapter(tmp_path / "out")["modules"]}
    assert (rows[first]["rank"], rows[first]["numerical_rank"]) == (8, 4)
    assert (rows[second]["numerical_rank"], rows[second]["norm"]) == (0, 0.0)


def test_text(make_adapter, gpt2_dir):
    folder, _ = make_adapter(gpt2_dir, target_modules=["c_attn"], modules_to_save=["ln_f"], lora_bias=True)
    report = inspect_adapter(folder)
    text = render_inspection(report)
    for row in report["modules"]:
        line = next(line for line in text.splitlines() if line.startswith(row["module"]))
        assert line.split()[1:7] == ["96", "×", "32", "4", "(4)", "3"]
    assert str(gpt2_dir) in text
    assert "a merge covers  2 modules by curvature" in text
    assert "carried over    transformer.ln_f.weight (whole parameter, no curvature)" in text
    assert "added           transformer.h.1.attn.c_attn (lora_bias, no curvature)" in text


def test_refusals_are_reasons_not_exceptions(make_adapter, llama_dir, tmp_path):
    folder, _ = make_adapter(llama_dir, target_modules=["q_proj"], use_dora=True)
    report = inspect_adapter(folder)
    assert report["modules"] == []
    assert len(report["refusals"]) == 1 and "use_dora is set" in report["refusals"][0]
    text = render_inspection(report)
    assert "cannot be merged:" in text and "use_dora" in text and str(llama_dir) in text
    with pytest.raises(ValueError, match="no such folder"):
        inspect_adapter(tmp_path / "nowhere")
