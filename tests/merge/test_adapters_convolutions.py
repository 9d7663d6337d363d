"""LoRA of convolutions in a small causal language model, through the command line, against PEFT's own model."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from reference import harm_fishers
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sst_merge.adapters import check_fits, inspect_adapter, read_adapter
from sst_merge.cli import main
from sst_merge.config import load_config
from sst_merge.problem import Problem

MODULES = ["line", "image", "head"]


class ConvolutionalConfig(PretrainedConfig):
    model_type = "sst_test_convolutional"

    def __init__(self, vocab_size: int = 50, hidden_size: int = 16, **other: object) -> None:
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, 1
        super().__init__(**other)


class ConvolutionalLM(PreTrainedModel, GenerationMixin):
    """Two causal convolutions over the tokens: a Conv1d, and a Conv2d over an image of width 1."""

    config_class = ConvolutionalConfig

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__(config)
        d = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, d)
        self.line = nn.Conv1d(d, d, 3)
        self.image = nn.Conv2d(d, d, (2, 1), bias=False)
        self.depthwise = nn.Conv1d(d, d, 1, groups=4)
        self.head = nn.Linear(d, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, input_ids: torch.Tensor, **_: object) -> CausalLMOutput:
        x = self.embed(input_ids).mT
        x = x + self.line(F.pad(x, (2, 0))).tanh()
        x = x + self.image(F.pad(x, (1, 0)).unsqueeze(3)).squeeze(3).tanh()
        x = self.depthwise(x)
        return CausalLMOutput(logits=self.head(x.mT))


AutoConfig.register(ConvolutionalConfig.model_type, ConvolutionalConfig)
AutoModelForCausalLM.register(ConvolutionalConfig, ConvolutionalLM)


@pytest.fixture
def convolutional(setup, base_dir, make_adapter, tmp_path):
    """The setup of two adapters on the convolutional model, and their PEFT models."""
    base = tmp_path / "convolutional"
    torch.manual_seed(0)
    model = ConvolutionalLM(ConvolutionalConfig())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(base)
    for file in base_dir.glob("*token*"):
        shutil.copy(file, base)
    setup.base = base
    setup.utility, utility = make_adapter(base, seed=1, r=2, target_modules=MODULES)
    setup.safety, safety = make_adapter(base, seed=2, r=3, target_modules=MODULES, use_rslora=True)
    return setup, utility, safety


def delta(model: PeftModel, name: str) -> torch.Tensor:
    """PEFT's own ΔW, in the shape of the weight, float64."""
    return model.base_model.model.get_submodule(name).get_delta_weight("default").detach().double()


def run(setup, tmp_path: Path, method: str, **parameters: object) -> Path:
    path, out = tmp_path / f"{method}.yaml", tmp_path / method
    path.write_text(yaml.safe_dump(setup.config(method, **parameters)))
    assert main(["merge", str(path), "--out", str(out)]) == 0
    return out


def test_merged_adapter_adds_the_kernels_in_peft(convolutional, tmp_path, input_ids, load_base):
    setup, utility, safety = convolutional
    out = run(setup, tmp_path, "task_arithmetic", alpha=0.5)
    kernels = load_file(out / "adapter_model.safetensors")
    assert kernels["base_model.model.image.lora_A.weight"].shape == (5, 16, 2, 1)
    assert kernels["base_model.model.line.lora_B.weight"].shape == (16, 5, 1)
    merged = PeftModel.from_pretrained(load_base(setup.base), out)
    reference = load_base(setup.base).double()
    with torch.no_grad():
        for name in MODULES:
            reference.get_submodule(name).weight += delta(utility, name) + 0.5 * delta(safety, name)
        expected = reference(input_ids).logits
        torch.testing.assert_close(merged.double()(input_ids=input_ids).logits, expected, rtol=1e-5, atol=1e-5)
        assert (expected - load_base(setup.base).double()(input_ids).logits).abs().max() > 0.1


def test_kernels_merged_into_the_base(convolutional, tmp_path, input_ids, load_base):
    setup, utility, safety = convolutional
    path, out = tmp_path / "config.yaml", tmp_path / "whole"
    path.write_text(yaml.safe_dump(setup.config("task_arithmetic")))
    assert main(["merge", str(path), "--out", str(out), "--merge-into-base"]) == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (setup.base, out))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        name = key.removesuffix(".weight")
        change = delta(utility, name) + delta(safety, name) if name in MODULES else 0.0
        torch.testing.assert_close(after[key].double(), tensor.double() + change, rtol=0, atol=1e-5)


def test_fishers_of_convolutions_are_those_of_their_kernels(convolutional, tmp_path):
    """By autograd through each kernel, one sequence at a time."""
    setup, utility, _ = convolutional
    problem = Problem(load_config(setup.config("sst", where="local")))
    curvature = problem.curvature(problem.config.parameters)
    model = AutoModelForCausalLM.from_pretrained(setup.base).double().eval()
    for name in MODULES:
        model.get_submodule(name).weight.data += delta(utility, name)
    for name, expected in harm_fishers(model, problem).items():
        actual = curvature.statistics.harm.fisher(name)
        assert float((actual - expected).norm()) < 1e-4 * float(expected.norm()), name


def test_sst_writes_an_adapter_that_peft_loads(convolutional, tmp_path, load_base):
    setup, *_ = convolutional
    out = run(setup, tmp_path, "sst", k=0.5)
    model = PeftModel.from_pretrained(load_base(setup.base), out)
    result = model.load_adapter(out, "again")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    rows = {row["module"]: row for row in json.loads((out / "report.json").read_text())["modules"]}
    assert rows["image"]["n"] == 25 and rows["image"]["shape"] == [16, 32]
    kinds = {row["module"]: row["kind"] for row in inspect_adapter(out)["modules"]}
    assert kinds == {"line": "convolution", "image": "convolution", "head": "linear"}


def test_convolutions_that_peft_computes_otherwise_are_refused(convolutional, make_adapter, load_base):
    setup, *_ = convolutional
    with pytest.warns(UserWarning, match="groups > 1"):
        grouped, _ = make_adapter(setup.base, r=8, target_modules=["depthwise"])
    with pytest.raises(ValueError, match=r"depthwise: LoRA of a convolution of 4 groups"):
        read_adapter(grouped)
    adapter, model = read_adapter(setup.utility), load_base(setup.base)
    for attribute, value, message in (
        ("dilation", (2,), r"line is a convolution .*\(dilation=\(2,\)\)"),
        ("padding_mode", "circular", "line is a convolution .*padding_mode='circular'"),
    ):
        before = getattr(model.line, attribute)
        setattr(model.line, attribute, value)
        with pytest.raises(ValueError, match=message):
            check_fits(adapter, model)
        setattr(model.line, attribute, before)
    model.line = nn.Conv1d(16, 16, 5)
    message = "line must be a convolution with (d_out, c_in, k…) = (16, 16, 3), the base model has a Conv1d with "
    with pytest.raises(ValueError, match=re.escape(message)):
        check_fits(adapter, model)
