"""Batches of token sequences: a row for each, or several packed in a row, which attention must not cross."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .data import TokenSequence


@dataclass(frozen=True)
class Batch:
    """Rows of tokens, padded on the right.

    Attributes:
        sequence_index: (R, T), int64, index in its data of the sequence that a token is of; 0 for padding.
        position_ids: (R, T), int64, position of a token in its sequence; 0 for padding.
        input_ids: (R, T), int64.
        attention_mask: (R, T), int64, 1 for tokens, 0 for padding.
        is_target: (R, T), bool.
        cu_seqlens: (S+1,), int64. Sequence s holds the flattened tokens cu_seqlens[s] to cu_seqlens[s+1]; the last of
            a row holds its padding too.
        is_packed: Whether a row may hold several sequences.
        weight: (S,), float64, on the CPU: ω of each sequence.
    """

    sequence_index: Tensor
    position_ids: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    is_target: Tensor
    cu_seqlens: Tensor
    is_packed: bool
    weight: Tensor

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments of a forward pass.

        Without an attention mask, the models of transformers take positions that begin again as the edges of
        sequences; `check_packing` sees that a model does.
        """
        if self.is_packed:
            return {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def index(self) -> Tensor:
        """(S,), int64, of each sequence in its data."""
        return self.sequence_index.flatten()[self.cu_seqlens[:-1]]


def batches(
    sequences: Sequence[TokenSequence], batch_size: int, device: torch.device | str, row_length: int | None = None
) -> Iterator[Batch]:
    """Batches of rows of like length, longest first (so that memory runs out at once or never).

    Args:
        sequences: From `tokenize`.
        batch_size: Rows a batch; the last may have fewer.
        device: Where the tensors go.
        row_length: Pack several sequences in a row, up to this many tokens; None gives each its own row.

    Yields:
        Batches that hold every sequence once.
    """
    rows = make_rows(sequences, row_length)
    for start in range(0, len(rows), batch_size):
        yield _batch(rows[start : start + batch_size], device, row_length is not None)


def count_batches(sequences: Sequence[TokenSequence], batch_size: int, row_length: int | None = None) -> int:
    """How many batches `batches` yields."""
    return -(-len(make_rows(sequences, row_length)) // batch_size)


def make_rows(sequences: Sequence[TokenSequence], row_length: int | None) -> list[list[TokenSequence]]:
    """Rows of sequences by first-fit decreasing (Johnson 1973: at most 11/9 of the fewest, and one), longest first.

    Args:
        sequences: None longer than a row.
        row_length: Tokens of a row; None gives each sequence its own.

    Returns:
        The rows; every sequence is in one of them.
    """
    ordered = sorted(sequences, key=lambda s: (-len(s.input_ids), s.index))
    if row_length is None:
        return [[sequence] for sequence in ordered]
    rows: list[list[TokenSequence]] = []
    room: list[int] = []
    for sequence in ordered:
        length = len(sequence.input_ids)
        fits = next((i for i, left in enumerate(room) if length <= left), None)
        if fits is None:
            rows.append([])
            room.append(row_length)
            fits = len(rows) - 1
        rows[fits].append(sequence)
        room[fits] -= length
    return [row for _, row in sorted(zip(room, rows, strict=True), key=lambda pair: pair[0])]


def _batch(rows: Sequence[Sequence[TokenSequence]], device: torch.device | str, is_packed: bool) -> Batch:
    """The batch of some rows."""
    shape = len(rows), max(sum(len(s.input_ids) for s in row) for row in rows)
    index, position, ids, mask, target = (torch.zeros(shape, dtype=torch.int64) for _ in range(5))
    starts = []
    for r, row in enumerate(rows):
        end = 0
        for s in row:
            at = r, slice(end, end + len(s.input_ids))
            starts.append(r * shape[1] + end)
            index[at], mask[at] = s.index, 1
            position[at] = torch.arange(len(s.input_ids))
            ids[at], target[at] = torch.tensor(s.input_ids), torch.tensor(s.is_target, dtype=torch.int64)
            end += len(s.input_ids)
    offsets = torch.tensor([*starts, shape[0] * shape[1]])
    tensors = (t.to(device) for t in (index, position, ids, mask, target.bool(), offsets))
    weight = torch.tensor([s.weight for row in rows for s in row], dtype=torch.float64)
    return Batch(*tensors, is_packed, weight)


@torch.no_grad()
def check_packing(model: nn.Module, vocabulary: int, length: int = 8) -> None:
    """Raise unless sequences packed in a row do not see each other, in this model as it is.

    Told by trying: the logits of a sequence x must be the same wherever it is packed, in [x, y] and in [y, x]. The
    measure is how much they change where x does follow y, in one sequence.

    Args:
        model: A causal language model.
        vocabulary: Its number of tokens.
        length: Of x and y.

    Raises:
        ValueError: They differ by more than rounding: the model is recurrent, or does not mind restarted positions.

    Cost: two forward passes of 4·length tokens.
    """
    device = model.get_input_embeddings().weight.device
    tokens = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(0))
    ids = torch.stack([tokens.flatten(), tokens.flip(0).flatten()]).to(device)
    positions = torch.arange(length, device=device).repeat(2, 2)

    def change(**inputs: Any) -> tuple[float, float]:
        logits = model(input_ids=ids, use_cache=False, **inputs).logits
        first, second = logits[0, :length].float(), logits[1, length:].float()
        return float((first - second).abs().max()), float(first.abs().max())

    joined, size = change()
    try:
        packed, _ = change(position_ids=positions)
    except TypeError:  # takes no positions
        packed = joined
    eps = torch.finfo(model.dtype).eps
    if packed > max(eps**0.5 * joined, 4 * eps * size):
        raise ValueError(
            f"calibration.packing: sequences that share a row change each other in {type(model).__name__} (logits by "
            f"{packed:.3g}, by {joined:.3g} if they were one text): it is recurrent, or its attention does not follow "
            "position_ids that begin again; use packing: false"
        )
