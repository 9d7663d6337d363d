"""How sums are kept: averaged, on the host, in parts, shared between layers, resumed."""

from __future__ import annotations

import warnings

import pytest
import torch
from closed_form import half_square, linear, rows, square_sums, sums
from torch import Tensor, nn

from sst_kernels.accumulate import AccumulatorOptions, FactorAccumulator
from sst_kernels.collect import ForwardPass
from sst_kernels.factors import Factors
from sst_kernels.layers import partition

pytestmark = pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors")


def test_decay_is_an_exponential_moving_average_once_a_backward_pass():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.a(x), self.a(2 * x)])

    model, batches = Twice(), [rows(seed=seed) for seed in range(3)]
    with FactorAccumulator(model, fisher="empirical", options=AccumulatorOptions(decay=0.75)) as acc:
        for x in batches:
            acc.training_loss(half_square(model(x))).backward()
    weights = [0.75**2, 0.75, 1.0]
    parts = [square_sums(model.a, torch.cat([x, 2 * x])) for x in batches]
    count = 10 * sum(weights)
    a, g = acc.factors.mean("a")
    torch.testing.assert_close(a, sum(w * p[0] for w, p in zip(weights, parts, strict=True)) / count)
    torch.testing.assert_close(g, sum(w * p[1] for w, p in zip(weights, parts, strict=True)) / count)


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 3), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Conv2d(1, 2, 2)).double()


def run_deep(
    model: nn.Sequential,
    options: AccumulatorOptions | None = None,
    modules: list[str] | None = None,
    scale: float = 1.0,
) -> Factors:
    with FactorAccumulator(model, modules, fisher="empirical", options=options) as acc:
        for seed in range(3):
            ids = torch.randint(0, 7, (2, 1, 4), generator=torch.Generator().manual_seed(seed))
            (acc.training_loss(half_square(model(ids))) * scale).backward()
    return acc.factors


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("limit", [0, 400])
def test_sums_on_the_host_are_the_same(limit, decay):
    model = deep()
    here = run_deep(model, AccumulatorOptions(decay=decay))
    there = run_deep(model, AccumulatorOptions(decay=decay, memory_limit=limit), scale=8.0)
    for name in here.specs:
        for a, b in zip(sums(here, name), sums(there, name), strict=True):
            torch.testing.assert_close(a, b)


def test_partition_covers_every_layer_within_the_limit():
    model = deep()
    whole = run_deep(model)
    limit = max(spec.nbytes(torch.float64) for spec in whole.specs.values()) + 100
    parts = partition(model, limit)
    assert [name for part in parts for name in part] == list(whole.specs)
    assert 1 < len(parts) < len(whole.specs)
    for part in parts:
        factors = run_deep(model, modules=part)
        assert (
            sum(t.nbytes for layer in factors.layers.values() for t in layer.tensors().values()) - 16 * len(part)
            <= limit
        )
        for name in part:
            assert torch.equal(factors.mean(name)[1], whole.mean(name)[1])
    with pytest.raises(ValueError, match="alone take 168 bytes, over 150"):
        partition(model, 150)


class Heads(nn.Module):
    """Layers a, b, c, of which b's input is a's in some passes only; c's is always a temporary of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()
        self.apart = self.only_a = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.c(x * 1.0)
        return y if self.only_a else y + 2 * self.b(x + 1 if self.apart else x)


@pytest.mark.parametrize("how", ["apart", "only_a"])
@pytest.mark.parametrize("pending", [0, 1, 2, 3])
def test_a_shared_input_factor_is_copied_when_inputs_diverge(how, pending):
    """Also if the diverging forward pass comes before the backward pass of one that shared."""

    def gathered(share: bool) -> FactorAccumulator:
        model = Heads()
        with FactorAccumulator(model, fisher="empirical", options=AccumulatorOptions(share_inputs=share)) as acc:
            waiting = []
            for seed, diverging in enumerate([False, False, True, False]):
                setattr(model, how, diverging)
                waiting.append(acc.training_loss(half_square(model(rows(seed=seed)))))
                assert acc.factors.shared == ({"b": "a"} if share and seed < 2 else {})
                if len(waiting) > pending:
                    waiting.pop(0).backward()
            for loss in waiting:
                loss.backward()
        assert not acc.factors.shared
        return acc

    shared, alone = gathered(True).factors, gathered(False).factors
    for name in "abc":
        for ours, theirs in zip(sums(shared, name), sums(alone, name), strict=True):
            assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def test_resumed_layers_that_have_parted_stay_apart():
    def run(acc: FactorAccumulator, apart: bool) -> None:
        acc.model.apart = apart
        with acc:
            acc.training_loss(half_square(acc.model(rows()))).backward()

    first, second = (FactorAccumulator(Heads(), fisher="empirical") for _ in range(2))
    run(first, apart=True)
    second.factors.add_(first.factors)
    run(second, apart=False)
    x = rows()
    for name, total in (("a", 2 * x.T @ x), ("b", x.T @ x + (x + 1).T @ (x + 1))):
        torch.testing.assert_close(sums(second.factors, name)[0], total)


def test_only_linear_layers_share_an_input():
    """Convolutions of one image have patches of their own, as embeddings of the same indices have vectors."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(1, 2, 2), nn.Conv2d(1, 2, 2, stride=3)
            self.all, self.padded = nn.Embedding(9, 2), nn.Embedding(9, 2, padding_idx=0)

        def forward(self, image: Tensor, ids: Tensor) -> Tensor:
            vectors = self.all(ids) * self.padded(ids)
            return self.fine(image).sum() + self.coarse(image).square().sum() + vectors.sum()

    with FactorAccumulator(Pairs(), fisher="empirical") as acc:
        acc.training_loss(acc.model(torch.randn(1, 1, 5, 5), torch.tensor([0, 3, 3]))).backward()
    assert not acc.factors.shared
    counts = {name: float(acc.factors.input_of(name)[1]) for name in acc.factors.layers}
    assert counts == {"fine": 16, "coarse": 4, "all": 3, "padded": 2}


def test_a_tensor_that_is_gone_is_no_shared_input():
    """Temporaries may get each other's id; their numbers must differ all the same."""
    passing = ForwardPass(True)
    for i in range(50):
        passing.record(f"layer {i}", torch.empty(3))
    numbers = [number for (number,) in passing.calls.values()]
    assert len(set(numbers)) == 50


def test_gradients_that_reach_one_of_two_sharers_are_an_error_with_a_remedy():
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = linear(), linear()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model = Unused()
    with pytest.raises(RuntimeError, match="share_inputs=False"), FactorAccumulator(model, fisher="empirical") as acc:
        acc.training_loss(half_square(model(rows())[1])).backward()
    with FactorAccumulator(model, fisher="empirical", options=AccumulatorOptions(share_inputs=False)) as acc:
        acc.training_loss(half_square(model(rows())[1])).backward()
    torch.testing.assert_close(sums(acc.factors, "b")[1], square_sums(model.b, rows())[1])


def test_resuming_equals_going_on(tmp_path):
    model, batches = linear(), [rows(seed=seed) for seed in range(4)]
    options = AccumulatorOptions(decay=0.5, every=2)

    def run(acc: FactorAccumulator, part: list[Tensor]) -> None:
        with acc:
            for x in part:
                acc.backward(acc.sampled_loss(model(x)))

    whole = FactorAccumulator(model, options=options)
    run(whole, batches)
    first, second = FactorAccumulator(model, options=options), FactorAccumulator(model, options=options)
    run(first, batches[:3])
    first.factors.save(tmp_path / "state.safetensors")
    second.factors.add_(Factors.load(tmp_path / "state.safetensors"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rest holds no tapped pass
        run(second, batches[3:])
    ours, theirs = whole.factors.layers[""], second.factors.layers[""]
    assert all(torch.equal(ours.tensors()[part], tensor) for part, tensor in theirs.tensors().items())
    assert second.factors.forwards == 4
    assert whole.factors.sequences == second.factors.sequences
