"""A whole comparison on the tiny models: what is written, resumed, refused."""

from __future__ import annotations

import pytest
import yaml

from sst_merge.cli import main


@pytest.fixture
def tree(setup, tmp_path):
    """Two methods, two strengths, two seeds."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "def measure(model, tokenizer):\n"
        "    weight = model.get_parameter('model.layers.0.self_attn.v_proj.weight')\n"
        "    return {'norm': float(weight.norm())}\n"
    )
    evaluators = {
        "refusal": {"kind": "answer_loss", "data": str(setup.harm)},
        "utility": {"kind": "answer_loss", "data": str(setup.benign)},
        "mine": {"kind": "python", "function": str(tmp_path / "mine.py") + ":measure"},
    }
    axes = {"safety": {"refusal": "likelihood"}, "utility": {"utility": "likelihood"}}
    methods = {"SST": {"merge_method": "sst"}, "TA": {"merge_method": "task_arithmetic"}, "dare": None}
    section = {"methods": methods, "alphas": [0.5, 1.0], "seeds": 2, "evaluators": evaluators, "axes": axes}
    return {**setup.config(), "compare": section}


def test_command_writes_the_comparison(tree, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    assert main(["compare", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert "Best: " in capsys.readouterr().out
    assert "## Verdict" in (tmp_path / "out/compare.md").read_text()
