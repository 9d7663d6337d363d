"""Which tokens and sequences of a batch are counted."""

from __future__ import annotations

import pytest
import torch
from closed_form import assert_sums, half_square, linear, rows, sampled_sums, square_sums, sums
from torch import Tensor, nn

from sst_kernels.accumulate import FactorAccumulator

pytestmark = pytest.mark.filterwarnings("ignore:FactorAccumulator has no factors")


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


@pytest.mark.parametrize("lead", [(1, 4), (4,)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_position_embedding_of_a_whole_batch_is_left_out_and_named(lead, masked):
    """Its δ is a sum over the sequences: G would depend on how the data are cut into batches."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.head = nn.Embedding(8, 3).double(), linear()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head(x + self.position(torch.arange(4).view(lead)))

    model, x = Positions(), rows(12).view(3, 4, 3)
    mask = {"attention_mask": torch.ones(3, 4)} if masked else {}

    def step(part: slice) -> None:
        acc.training_loss(half_square(model(x[part], **{key: value[part] for key, value in mask.items()}))).backward()

    with FactorAccumulator(model, fisher="empirical") as acc:
        step(slice(0, 1))  # one sequence: nothing is summed
        assert acc.factors.layers["position"].counts.tolist() == [4, 4]
        with pytest.warns(UserWarning, match="shared by all sequences of a batch: position.weight"):
            step(slice(0, 3))
        step(slice(2, 3))  # the rest of a data set
    assert set(acc.factors.layers) == {"head"}
    assert acc.factors.layers["head"].counts.tolist() == [20, 20]
    assert [name for name, _ in acc.uncovered] == ["position.weight"]


def test_an_embedding_of_one_class_for_each_sequence_is_kept():
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kind, self.head = nn.Embedding(8, 3).double(), linear()

        def forward(self, x: Tensor, kind: Tensor) -> Tensor:
            return self.head(x + self.kind(kind).unsqueeze(1))

    model = Conditional()
    with FactorAccumulator(model, fisher="empirical") as acc:
        for tokens in (4, 3):
            acc.training_loss(half_square(model(rows(3 * tokens).view(3, tokens, 3), torch.arange(3)))).backward()
    assert acc.factors.layers["kind"].counts.tolist() == [6, 6]


def test_logits_of_one_row_for_each_sequence_bear_loss_where_a_token_counts():
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = linear()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.head((x * attention_mask.unsqueeze(-1)).sum(1))

    model, x = Pooled(), rows(12).view(3, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    with FactorAccumulator(model) as acc:
        acc.sampled_loss(model(x, attention_mask=mask)).backward()
        logits = model(x, attention_mask=mask)
        with pytest.raises(ValueError, match=r"mask must have the leading dimensions of logits \(3, 4\), got \(5,\)"):
            acc.sampled_loss(logits, torch.ones(5))
    pooled = (x * mask.unsqueeze(-1)).sum(1)[[0, 2]]
    expected = sampled_sums(model.head, pooled, torch.tensor([0, 2]), torch.tensor(0))
    torch.testing.assert_close(sums(acc.factors, "head")[1], expected)
    assert acc.factors.layers["head"].counts.tolist() == [2, 2]
