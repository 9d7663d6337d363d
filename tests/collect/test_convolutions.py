"""Gradient rows of convolutions against autograd through an explicitly updated kernel, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call

from sst_kernels.collect import CoreBasis, CoreGradients

LAYERS = {
    "line": (nn.Conv1d(5, 7, 3, padding=1), (4, 5, 11)),
    "strided line": (nn.Conv1d(5, 7, 4, stride=3, padding=2, dilation=2, bias=False), (4, 5, 13)),
    "same line": (nn.Conv1d(5, 7, 4, padding="same"), (4, 5, 9)),
    "image": (nn.Conv2d(3, 6, (2, 3), stride=(1, 2), padding=(1, 0)), (4, 3, 5, 7)),
}


class Shifted(nn.Embedding):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + 1


def orthonormal(d: int, r: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, r, dtype=torch.float64, generator=torch.Generator().manual_seed(d))).Q


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("case", LAYERS)
def test_rows_equal_autograd_one_sequence_at_a_time(case):
    layer, shape = LAYERS[case]
    torch.manual_seed(0)
    model = nn.Sequential(layer, nn.Tanh()).double()
    x, core = torch.randn(shape, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    d_out = len(layer.weight)
    basis = CoreBasis(orthonormal(d_out, 2), orthonormal(layer.weight[0].numel(), 4))

    leaf = core.clone().requires_grad_()
    weight = layer.weight + (basis.q_out @ leaf @ basis.q_in.mT).reshape(layer.weight.shape)
    expected, outputs = [], []
    for one in x:
        outputs.append(functional_call(model, {"0.weight": weight}, one[None]))
        loss = outputs[-1].square().sum()
        expected.append(torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten())

    positions = outputs[0][0, 0].numel()
    seen = {}
    with CoreGradients(model, {"0": basis}, ["0"]) as gradients:
        gradients.set_cores({"0": core})
        gradients.consume = seen.__setitem__
        gradients.layout(torch.arange(0, len(x) * positions + 1, positions), torch.ones(len(x) * positions))
        output = model(x)
        output.square().sum().backward()
    torch.testing.assert_close(output, torch.cat(outputs), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(seen["0"].rows(), torch.stack(expected), rtol=1e-10, atol=1e-10)
    patches = seen["0"].expanded  # the tokens of its Kronecker factors
    total = (patches.delta.mT @ patches.x).flatten()
    torch.testing.assert_close(total, torch.stack(expected).sum(0), rtol=1e-10, atol=1e-10)


def test_a_convolution_that_changes_the_length_is_named():
    model = nn.Sequential(nn.Conv1d(5, 7, 3)).double()
    with CoreGradients(model, {"0": CoreBasis(orthonormal(7, 2), orthonormal(15, 2))}, ["0"]) as gradients:
        gradients.consume = lambda name, rows: None
        gradients.layout(torch.tensor([0, 11]), torch.ones(11))
        loss = model(torch.randn(1, 5, 11, dtype=torch.float64)).sum()
        with pytest.raises(ValueError, match="module '0' saw 9 tokens but the batch's layout has 11"):
            loss.backward()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv1d(4, 4, 3, groups=4), "grouped convolution"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (Shifted(4, 4), "Shifted computes something else than a look-up"),
    ],
)
def test_other_layers_are_refused_by_name(layer, message):
    basis = CoreBasis(orthonormal(4, 2), orthonormal(layer.weight[0].numel(), 2))
    with pytest.raises(ValueError, match=rf"'0' is no linear map of its input's rows: {message}"):
        CoreGradients(nn.Sequential(layer), {"0": basis}, ())


def test_rows_and_bases_follow_the_devices():
    """A layer of another dtype than its bases and cores; devices as well where there is a second one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = nn.Linear(5, 7).to(device)
    basis = CoreBasis(orthonormal(7, 2), orthonormal(5, 3))
    rows = {}
    with CoreGradients(nn.Sequential(layer), {"0": basis}, ["0"]) as gradients:
        gradients.consume = lambda name, g: rows.__setitem__(name, g.rows())
        gradients.layout(torch.tensor([0, 2, 4]), torch.tensor([1, 1, 1, 0]))
        x = torch.randn(4, 5, device=device)
        layer_output = gradients.model(x)
        layer_output.sum().backward()
    delta = basis.q_out.sum(0)
    for s, tokens in enumerate(([0, 1], [2])):
        expected = torch.outer(delta, x.cpu().double()[tokens].sum(0) @ basis.q_in).flatten()
        torch.testing.assert_close(rows["0"][s].double(), expected, rtol=1e-5, atol=1e-5)
    assert rows["0"].device == basis.q_out.device and layer_output.device == layer.weight.device
