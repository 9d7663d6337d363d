"""Which passes are counted, how often, and with which labels; closed forms for layers whose δ is known."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

from sst_kernels.accumulate import AccumulatorOptions, FactorAccumulator
from sst_kernels.collect import ForwardPass
from sst_kernels.factors import Factors
from sst_kernels.labels import counter_uniform, sample_labels
from sst_kernels.layers import partition

pytestmark = pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors")


def linear(d_in: int = 3, d_out: int = 4) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(d_in, d_out, bias=False).double()


def rows(count: int = 5, d: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed)).double()


def square_sums(model: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Σ x xᵀ and Σ δ δᵀ of the loss ½ Σ y², whose δ is y."""
    y = x @ model.weight.detach().T
    return x.T @ x, y.T @ y


def half_square(y: Tensor) -> Tensor:
    return y.square().sum() / 2


def sums(factors: Factors, name: str = "") -> tuple[Tensor, Tensor, list[float]]:
    a, g = factors.mean(name)
    counts = factors.layers[name].counts
    return a * counts[0], g * counts[1], counts.tolist()


def assert_sums(factors: Factors, expected: tuple[Tensor, Tensor], count: float) -> None:
    a, g, counts = sums(factors)
    torch.testing.assert_close(a, expected[0])
    torch.testing.assert_close(g, expected[1])
    assert counts == [count, count]


def sampled_sums(
    model: nn.Linear, x: Tensor, sequence: Tensor, position: Tensor, sample: int = 0, seed: int = 0
) -> Tensor:
    """Σ δ δᵀ with δ = softmax(y) − onehot(ŷ)."""
    y = x @ model.weight.detach().T
    labels = sample_labels(y, counter_uniform(seed, sequence, position, sample))
    delta = y.softmax(-1) - nn.functional.one_hot(labels, y.shape[-1])
    return delta.T @ delta


def test_sampled_loss_draws_each_position_of_the_mask():
    model, x = linear(), rows(12).view(3, 4, 3)
    mask = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [0, 1, 1, 1]]).bool()
    with FactorAccumulator(model, options=AccumulatorOptions(seed=7)) as acc:
        acc.sampled_loss(model(x), mask).backward()
        acc.sampled_loss(model(x), mask).backward()
    sequence = torch.arange(3).unsqueeze(1).expand(3, 4)[mask]
    position = torch.arange(4).expand(3, 4)[mask]
    expected = sum(sampled_sums(model, x[mask], sequence + first, position, seed=7) for first in (0, 3))
    a, g, counts = sums(acc.factors)
    torch.testing.assert_close(g, expected)
    torch.testing.assert_close(a, 2 * x.flatten(0, 1).T @ x.flatten(0, 1))  # all tokens: the mask is that of the loss
    assert counts == [24, 24]
    assert acc.factors.sequences == 6


def test_each_call_for_one_forward_pass_draws_another_sample():
    model, x = linear(), rows(6)
    with FactorAccumulator(model) as acc:
        y = model(x)
        for _ in range(3):
            acc.backward(acc.sampled_loss(y), retain_graph=True)
    expected = sum(sampled_sums(model, x, torch.arange(6), torch.tensor(0), sample) for sample in range(3))
    torch.testing.assert_close(sums(acc.factors)[1], expected)


def test_labels_depend_neither_on_batches_nor_on_padding():
    model, x = linear(), rows(8).view(2, 4, 3)

    def gathered(batches: list[tuple[Tensor, Tensor | None, Tensor]]) -> Tensor:
        with FactorAccumulator(model) as acc:
            for batch, mask, numbers in batches:
                acc.batch(mask, sequences=numbers)
                acc.sampled_loss(model(batch)).backward()
        return sums(acc.factors)[1]

    whole = gathered([(x, None, torch.tensor([11, 5]))])
    parts = gathered([(x[1:], None, torch.tensor([5])), (x[:1], None, torch.tensor([11]))])
    nan = torch.full((2, 2, 3), float("nan")).double()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]] * 2)
    left_padded = gathered([(torch.cat([nan, x], 1), mask, torch.tensor([11, 5]))])
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(left_padded, whole)


def test_packed_sequences_are_numbered_one_by_one():
    model, x = linear(), rows(6)
    with FactorAccumulator(model) as acc:
        acc.batch(cu_seqlens=torch.tensor([0, 2, 2, 6]))
        acc.sampled_loss(model(x)).backward()
    sequence, position = torch.tensor([0, 0, 2, 2, 2, 2]), torch.tensor([0, 1, 0, 1, 2, 3])
    torch.testing.assert_close(sums(acc.factors)[1], sampled_sums(model, x, sequence, position))
    assert acc.factors.sequences == 3


def test_mean_of_sampled_factors_tends_to_the_exact_fisher_of_the_logits():
    model, x = linear(), rows(1).expand(4000, 3)
    with FactorAccumulator(model) as acc:
        acc.sampled_loss(model(x)).backward()
    p = (x[0] @ model.weight.detach().T).softmax(-1)
    torch.testing.assert_close(acc.factors.mean("")[1], p.diag() - torch.outer(p, p), rtol=0, atol=0.02)


def test_one_fisher_is_never_taken_for_the_other():
    model, x = linear(), rows()
    with FactorAccumulator(model, fisher="true") as acc:
        y = model(x)
        with pytest.raises(ValueError, match="training_loss: this accumulator gathers the true Fisher"):
            acc.training_loss(half_square(y))
        acc.sampled_loss(y).backward()
    with FactorAccumulator(model, fisher="empirical") as acc:
        y = model(x)
        with pytest.raises(ValueError, match="sampled_loss: this accumulator gathers the empirical Fisher"):
            acc.sampled_loss(y)
        acc.training_loss(half_square(y)).backward()


def test_undeclared_backward_passes_add_nothing_and_a_run_of_them_warns():
    model, x = linear(), rows()
    with (
        pytest.warns(UserWarning, match=r"2 forward passes and counted no backward pass.*sampled_loss"),
        FactorAccumulator(model) as acc,
    ):
        half_square(model(x)).backward()
        half_square(model(x)).backward()
    assert not acc.factors.layers
    with FactorAccumulator(model, fisher="empirical") as acc:
        half_square(model(x)).backward()
        acc.training_loss(half_square(model(x))).backward()
        half_square(model(x)).backward()
    assert_sums(acc.factors, square_sums(model, x), 5)
    assert (acc.factors.backwards, acc.factors.forwards) == (1, 3)


def test_passes_without_gradients_or_backward_add_nothing():
    model, x = linear(), rows()
    with FactorAccumulator(model, fisher="empirical") as acc:
        with torch.no_grad():
            model(x)
        model(x)
        acc.training_loss(half_square(model(x))).backward()
    assert_sums(acc.factors, square_sums(model, x), 5)


def test_two_losses_of_one_forward_pass_are_refused_in_one_backward_pass():
    model, x = linear(), rows()
    with FactorAccumulator(model) as acc:
        y = model(x)
        with pytest.raises(ValueError, match="two declared losses of one forward pass"):
            (acc.sampled_loss(y) + acc.sampled_loss(y)).backward()
        acc.sampled_loss(model(x)).backward()
    assert acc.factors.layers[""].counts.tolist() == [5, 5]


def test_a_loss_declared_for_another_forward_pass_is_refused():
    model, x = linear(), rows()
    with FactorAccumulator(model) as acc:
        first = model(x)
        model(x)
        with pytest.raises(RuntimeError, match="right after its forward pass"):
            acc.sampled_loss(first).backward()
        with pytest.raises(ValueError, match="does not depend on the tapped forward pass"):
            acc.sampled_loss(first.detach())
    with pytest.raises(ValueError, match="no forward pass"), FactorAccumulator(model) as acc:
        acc.sampled_loss(first)


def test_a_failed_backward_pass_leaves_nothing_behind():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, delta: Tensor) -> Tensor:
            raise RuntimeError("out of memory")

    model, x = linear(), rows()
    with FactorAccumulator(model, fisher="empirical", options=AccumulatorOptions(decay=0.5)) as acc:
        y = model(x)
        with pytest.raises(RuntimeError, match="out of memory"):
            acc.training_loss(half_square(Fails.apply(y))).backward()
        half_square(model(x)).backward()
        half_square(y).backward()
        acc.training_loss(half_square(model(x))).backward()
    assert_sums(acc.factors, square_sums(model, x), 5)


def test_every_and_enabled_choose_forward_passes():
    model, batches = linear(), [rows(seed=seed) for seed in range(7)]
    with FactorAccumulator(model, fisher="empirical", options=AccumulatorOptions(every=3)) as acc:
        tapped = []
        for i, x in enumerate(batches):
            acc.enabled = i != 3
            y = model(x)
            tapped.append(acc.tapped)
            acc.backward(acc.training_loss(half_square(y)))
    assert tapped == [True, False, False, False, False, False, True]
    expected = [square_sums(model, batches[i]) for i in (0, 6)]
    assert_sums(acc.factors, tuple(map(sum, zip(*expected, strict=True))), 10)


class Spoil(torch.autograd.Function):
    """The identity, whose gradient's first entry overflows."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, delta: Tensor) -> Tensor:
        delta = delta.clone()
        delta[0, 0] = float("inf")
        return delta


def test_overflow_in_a_layer_adds_nothing_to_that_layer():
    torch.manual_seed(0)
    first, last, x = nn.Linear(3, 4).double(), nn.Linear(4, 2).double(), rows()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.spoil = first, last, False

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.last(Spoil.apply(h) if self.spoil else h)

    model = Net()
    with FactorAccumulator(model, fisher="empirical") as acc:
        acc.training_loss(half_square(model(x))).backward()
        before = sums(acc.factors, "first")
        model.spoil = True
        acc.training_loss(half_square(model(x))).backward()
    for a, b in zip(before, sums(acc.factors, "first"), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert acc.factors.layers["last"].counts.tolist() == [10, 10]


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 0.0])
def test_overflow_of_the_loss_adds_nothing(scale):
    model, x = linear(), rows()
    with FactorAccumulator(model, fisher="empirical") as acc:
        (acc.training_loss(half_square(model(x))) * scale).backward()
        assert not acc.factors.layers
        acc.training_loss(half_square(model(x))).backward()
    assert_sums(acc.factors, square_sums(model, x), 5)
    assert acc.factors.backwards == 1


def test_a_batch_is_described_for_one_forward_pass_or_by_its_attention_mask():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = linear()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.layer(x)

    model, x, mask = Masked(), rows(6).view(2, 3, 3), torch.tensor([[1, 1, 0], [1, 0, 0]])

    def counted(**kwargs: Tensor) -> float:
        before = float(acc.factors.layers["layer"].counts[0]) if acc.factors.layers else 0.0
        acc.training_loss(half_square(model(x, **kwargs))).backward()
        return float(acc.factors.layers["layer"].counts[0]) - before

    with FactorAccumulator(model, fisher="empirical") as acc:
        assert counted(attention_mask=mask) == 3
        assert counted() == 6
        acc.batch(mask=torch.tensor([[0, 1, 0], [0, 0, 0]]))
        assert counted(attention_mask=mask) == 1
        assert counted(attention_mask=mask) == 3
        acc.batch(sequences=torch.tensor([3, 4]))
        assert counted(attention_mask=mask) == 3
        acc.batch(mask=None)
        assert counted(attention_mask=mask) == 6
        assert counted(attention_mask=torch.ones(2, 1, 3, 3)) == 6


def test_padding_may_hold_nan():
    model, x = linear(), rows()
    spoiled = torch.cat([x, torch.full((3, 3), float("nan")).double()])
    keep = torch.arange(8) < 5
    with FactorAccumulator(model, fisher="empirical") as acc:
        acc.batch(keep)
        acc.training_loss(half_square(model(spoiled))).backward()
    assert_sums(acc.factors, square_sums(model, x), 5)


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
    model: nn.Sequential, options: AccumulatorOptions | None = None, modules: list[str] | None = None
) -> Factors:
    with FactorAccumulator(model, modules, fisher="empirical", options=options) as acc:
        for seed in range(3):
            ids = torch.randint(0, 7, (2, 1, 4), generator=torch.Generator().manual_seed(seed))
            acc.training_loss(half_square(model(ids))).backward()
    return acc.factors


@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("limit", [0, 400])
def test_sums_on_the_host_are_the_same(limit, decay):
    model = deep()
    here = run_deep(model, AccumulatorOptions(decay=decay))
    there = run_deep(model, AccumulatorOptions(decay=decay, memory_limit=limit))
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


def test_a_layer_that_sees_other_tokens_than_the_mask_is_an_error_with_a_remedy():
    model = nn.Sequential(linear(), nn.Flatten(0, 1), linear(4, 4)).double()
    wrong = pytest.raises(ValueError, match=r"layer '0' saw 10 tokens but the batch's mask has 8.*modules")
    with wrong, FactorAccumulator(model) as acc:
        acc.batch(torch.ones(2, 4))
        model(rows(10).view(2, 5, 3))


def test_a_layer_with_one_row_for_each_sequence_follows_the_sequences():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = linear(), linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).nan_to_num().sum(1))

    model, x = Pooled(), rows(12).view(3, 4, 3)
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]])
    with FactorAccumulator(model, fisher="empirical") as acc:
        acc.batch(mask)
        acc.training_loss(half_square(model(x))).backward()
    pooled = (x @ model.body.weight.detach().T).sum(1)[:2]
    torch.testing.assert_close(sums(acc.factors, "head")[0], pooled.T @ pooled)
    assert acc.factors.layers["body"].counts.tolist() == [5, 5]
    assert acc.factors.layers["head"].counts.tolist() == [2, 2]


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


def test_bad_arguments_are_refused():
    model = linear()
    with pytest.raises(ValueError, match='fisher must be "true" or "empirical"'):
        FactorAccumulator(model, fisher="exact")
    with pytest.raises(ValueError, match='approximation must be "expand" or "reduce"'):
        FactorAccumulator(model, approximation="sum")
    with pytest.raises(ValueError, match="decay must lie between 0 and 1"):
        AccumulatorOptions(decay=1.0)
    with pytest.raises(ValueError, match="every must be at least 1"):
        AccumulatorOptions(every=0)
