"""Which layers are chosen and what is named as left out; rows against the weight gradients that they make up."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sst_kernels.accumulate import FactorAccumulator
from sst_kernels.collect import CoreBasis
from sst_kernels.layer_factors import LayerSpec
from sst_kernels.layers import describe, gathered_rows, select, tied_names
from sst_kernels.layout import TokenLayout


class ScaledEmbedding(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 2 * super().forward(ids)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.zeros(2, 3, 4))


@pytest.mark.parametrize(
    ("module", "spec"),
    [
        (nn.Linear(3, 5), LayerSpec("linear", 3, 5)),
        (Conv1D(5, 3), LayerSpec("linear", 3, 5)),
        (nn.Embedding(7, 4), LayerSpec("embedding", 7, 4)),
        (nn.Conv2d(2, 5, (3, 4)), LayerSpec("conv2d", 24, 5)),
    ],
)
def test_supported_layers(module, spec):
    assert describe(module) == spec


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.LayerNorm(3), "LayerNorm is not a supported layer"),
        (nn.Conv2d(4, 4, 3, groups=2), "grouped convolution"),
        (nn.Conv2d(4, 4, 3, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv3d(1, 1, 1), "Conv3d is not a supported layer"),
        (nn.ConvTranspose2d(1, 1, 1), "ConvTranspose2d is not a supported layer"),
        (nn.Bilinear(2, 2, 2), "Bilinear is not a supported layer"),
        (nn.Embedding(3, 2, scale_grad_by_freq=True), "scale_grad_by_freq changes the gradient"),
        (ScaledEmbedding(3, 2), "ScaledEmbedding computes something else than a look-up"),
        (nn.MultiheadAttention(4, 2).out_proj, "not called as a module"),
        (nn.LazyLinear(3), "not yet initialised"),
        (Experts(), "Experts is not a supported layer"),
    ],
)
def test_other_layers_have_a_reason(module, reason):
    assert reason in describe(module)


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(3, 5), torch.randn(2, 4, 3)),
        (nn.Linear(3, 5), torch.randn(3)),
        (Conv1D(5, 3), torch.randn(2, 4, 3)),
        (nn.Embedding(7, 4), torch.randint(0, 7, (2, 9))),
        (nn.Embedding(7, 4, padding_idx=2), torch.randint(0, 7, (2, 9))),
        (nn.Conv2d(2, 5, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), torch.randn(3, 2, 6, 7)),
        (nn.Conv2d(2, 5, 4, padding="same"), torch.randn(1, 2, 6, 7)),
        (nn.Conv2d(2, 5, 2), torch.randn(2, 6, 7)),
    ],
)
def test_rows_make_up_the_weight_gradient(module, x):
    """Σ_t w_t δ_t x_tᵀ is autograd's gradient of the weight."""
    torch.manual_seed(0)
    module = module.double()
    x = x if x.dtype == torch.int64 else x.double()
    y = module(x)
    delta = torch.randn_like(y)
    y.backward(delta)
    rows = gathered_rows(module, x, delta, TokenLayout())
    one_hot = nn.functional.one_hot(rows.x, 7).double() if rows.x.dim() == 1 else rows.x
    weight = torch.ones(len(one_hot)).double() if rows.weight is None else rows.weight
    gradient = rows.delta.T @ (weight[:, None] * one_hot)
    wanted = module.weight.grad.T if isinstance(module, (nn.Embedding, Conv1D)) else module.weight.grad.flatten(1)
    torch.testing.assert_close(gradient, wanted)


def test_rows_of_sequences_make_up_means_and_sums():
    torch.manual_seed(0)
    module, x, delta = nn.Linear(2, 3).double(), torch.randn(3, 4, 2).double(), torch.randn(3, 4, 3).double()
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    x[mask == 0], delta[mask == 0] = float("nan"), float("nan")
    rows = gathered_rows(module, x, delta, TokenLayout(mask), reduce=True)
    assert rows.weight.tolist() == [1, 0, 1]
    for s in (0, 2):
        keep = mask[s].bool()
        torch.testing.assert_close(rows.x[s], x[s][keep].mean(0))
        torch.testing.assert_close(rows.delta[s], delta[s][keep].sum(0))


def net() -> nn.Module:
    return nn.ModuleDict(
        {
            "embed": nn.Embedding(9, 4),
            "block": nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4), "norm": nn.LayerNorm(4)}),
            "experts": Experts(),
            "conv": nn.Conv2d(4, 4, 3, groups=2, bias=False),
            "head": nn.Linear(4, 9, bias=False),
        }
    )


def chosen(modules: object, model: nn.Module | None = None) -> list[str]:
    return list(select(model or net(), modules, "expand", {})[0])


def test_ways_to_choose():
    assert chosen(None) == ["embed", "block.up", "block.down", "head"]
    assert chosen(["head", "block.up"]) == ["block.up", "head"]  # the model's order
    assert chosen(r"block\.(up|norm)") == ["block.up"]
    assert chosen(lambda name, module: isinstance(module, nn.Linear) and "." in name) == ["block.up", "block.down"]
    with pytest.raises(ValueError, match="no module named 'block.left'"):
        chosen(["block.left"])
    with pytest.raises(ValueError, match="'block.norm' has no Kronecker factors: LayerNorm"):
        chosen(["block.norm"])
    with pytest.raises(ValueError, match="no supported layer of ModuleDict was chosen by 'up'"):
        chosen("up")


def test_every_parameter_without_factors_is_named_in_one_warning():
    uncovered = [
        ("block.up.bias", "bias"),
        ("block.down.bias", "bias"),
        ("block.norm.weight", "LayerNorm is not a supported layer"),
        ("block.norm.bias", "LayerNorm is not a supported layer"),
        ("experts.gate_up", "Experts is not a supported layer"),
        ("conv.weight", "grouped convolution"),
    ]
    with pytest.warns(UserWarning) as caught:
        accumulator = FactorAccumulator(net())
    assert accumulator.uncovered == uncovered
    (warning,) = caught
    for _, reason in uncovered:
        assert str(warning.message).count(f"{reason}: ") == 1
    with pytest.warns(UserWarning) as caught:
        accumulator = FactorAccumulator(net(), ["head", "block.up"])
    assert ("embed.weight", "not chosen") in accumulator.uncovered
    assert "embed" not in str(caught[0].message)


def test_nothing_is_warned_of_when_everything_is_covered(recwarn):
    assert FactorAccumulator(nn.Linear(2, 2, bias=False)).uncovered == []
    assert not recwarn.list


def test_layers_inside_a_chosen_adapter_are_not_chosen_again():
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]))
    prefix = "base_model.model"
    assert chosen(None, model) == [f"{prefix}.0", f"{prefix}.1"]
    assert chosen(".*", model) == [f"{prefix}.0", f"{prefix}.1"]
    inner = [f"{prefix}.0.lora_A.default", f"{prefix}.0.lora_B.default"]
    assert chosen(inner, model) == inner
    _, uncovered = select(model, None, "expand", {})
    assert uncovered == [(f"{prefix}.0.base_layer.bias", "bias"), (f"{prefix}.1.bias", "bias")]


def test_tied_weights_are_named():
    model = net()
    model["head"].weight = model["embed"].weight
    specs, _ = select(model, None, "expand", {})
    assert tied_names(model, specs) == {"head": "embed"}


def test_embeddings_need_a_basis_when_sequences_are_rows():
    specs, uncovered = select(net(), None, "reduce", {})
    assert "embed" not in specs
    assert ("embed.weight", "the mean of one-hot rows has no diagonal factor: give a basis, or use expand") in uncovered
    basis = CoreBasis(torch.eye(4)[:, :2], torch.eye(9)[:, :3])
    specs, _ = select(net(), None, "reduce", {"embed": basis})
    assert (specs["embed"].d_in, specs["embed"].d_out) == (3, 2)


def test_bases_must_fit():
    with pytest.raises(ValueError, match=r"bases\['head'\] must have q_in of 4 rows and q_out of 9, got 9 and 4"):
        FactorAccumulator(net(), bases={"head": CoreBasis(torch.eye(4), torch.eye(9))})
    basis = CoreBasis(torch.eye(9), torch.eye(4))
    with pytest.raises(ValueError, match="'head' is not among the chosen layers"):
        FactorAccumulator(net(), ["block.up"], bases={"head": basis})
    with pytest.raises(ValueError, match="no module named 'nowhere'"):
        FactorAccumulator(net(), bases={"nowhere": basis})
