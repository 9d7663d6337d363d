"""Which passes are counted, how often, and with which labels; closed forms for layers whose δ is known."""

from __future__ import annotations

import pytest
import torch
from closed_form import assert_sums, half_square, linear, rows, sampled_sums, square_sums, sums
from torch import Tensor, nn

from sst_kernels.accumulate import AccumulatorOptions, FactorAccumulator
from sst_kernels.labels import counter_uniform, sample_labels

pytestmark = pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors")


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
    with pytest.raises(ValueError, match="precision must be 'ieee', 'tf32' or 'bf16x3', got 'fp8'"):
        AccumulatorOptions(precision="fp8")


def test_entering_twice_is_refused():
    model, x = linear(), rows()
    with FactorAccumulator(model, fisher="empirical") as acc:
        with pytest.raises(ValueError, match="enter the accumulator once"):
            acc.__enter__()
        acc.training_loss(half_square(model(x))).backward()
    with acc:
        acc.training_loss(half_square(model(x))).backward()
    assert acc.factors.layers[""].counts.tolist() == [10, 10]


def test_a_loss_that_is_no_mean_over_tokens_is_refused():
    model, x = linear(), rows()
    with FactorAccumulator(model, fisher="empirical") as acc:
        y = model(x)
        with pytest.raises(ValueError, match=r"loss must be a scalar, got shape \(5,\)"):
            acc.training_loss(y.square().sum(1))
        for tokens in (-1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="tokens must be what the sum"):
                acc.training_loss(half_square(y), tokens)
        acc.training_loss(half_square(y), 0).backward()
        assert not acc.factors.layers
        acc.training_loss(half_square(model(x))).backward()
    assert_sums(acc.factors, square_sums(model, x), 5)


@pytest.mark.parametrize("every", [1, 2])
def test_the_extra_backward_pass_is_that_of_the_loss_not_of_the_last_forward_pass(every):
    model, x = linear(), rows()
    with FactorAccumulator(model, fisher="empirical", options=AccumulatorOptions(every=every)) as acc:
        loss = acc.training_loss(half_square(model(x)))
        if every == 1:
            with torch.no_grad():
                model(x)
        else:
            model(x)
        acc.backward(loss)
    assert_sums(acc.factors, square_sums(model, x), 5)


def test_short_losses_are_declared_in_float32():
    model, x = linear().bfloat16(), rows().bfloat16()
    with FactorAccumulator(model, fisher="empirical") as acc:
        assert acc.training_loss(half_square(model(x))).dtype == torch.float32
    with FactorAccumulator(model) as acc:
        y = model(x)
        labels = sample_labels(y.detach(), counter_uniform(0, torch.arange(5), torch.tensor(0), 0))
        expected = nn.functional.cross_entropy(y.float(), labels, reduction="sum")
        torch.testing.assert_close(acc.sampled_loss(y), expected, rtol=1e-6, atol=0)
