"""How the tokens of a batch divide into sequences, and which of them count."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .layer_factors import sum_dtype


def batch_shape(mask: Tensor | None, args: tuple, kwargs: dict) -> tuple[int, int] | None:
    """(B, T) of a forward pass: the mask's shape, else the first two dimensions of the first tensor that has two."""
    for tensor in tree_leaves((mask, args, kwargs)):
        if isinstance(tensor, Tensor) and tensor.dim() >= 2:
            return tensor.shape[0], tensor.shape[1]
    return None


@dataclass
class TokenLayout:
    """The tokens of one batch.

    Attributes:
        mask: (B, T) or flattened, bool or weights; None: all tokens count.
        cu_seqlens: (S+1,) offsets of packed sequences in the flattened tokens; None: rows are sequences.
        sequences: (S,) numbers of the sequences in their data set; None: not known.
        first: Number given to the first sequence, once labels were drawn.
        batch: (B, T), sequences and tokens of each, where they are known.
        samples: How many labels were drawn for each position.
        packed: The number of tokens of packed sequences.
        weights: The mask as weights of a layer's rows, by their form.
    """

    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    sequences: Tensor | None = None
    batch: tuple[int, int] | None = None
    first: int | None = None
    samples: int = 0
    packed: int | None = None
    weights: dict[tuple, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.cu_seqlens is not None:
            self.packed = int(self.cu_seqlens[-1])

    def check(self, name: str, lead: torch.Size) -> None:
        """Refuses a layer whose tokens are not those that the mask and the offsets describe.

        A layer may also see one row for each sequence, as a classifier on pooled states does.

        Args:
            name: The layer's.
            lead: The leading dimensions of its rows.

        Raises:
            ValueError: The numbers of tokens differ.
        """
        described = []
        if self.mask is not None:
            described.append(("mask", self.mask.numel(), len(self.mask) if self.mask.dim() == 2 else None))
        if self.cu_seqlens is not None:
            described.append(("cu_seqlens", self.packed, len(self.cu_seqlens) - 1))
        for what, tokens, sequences in described:
            if lead.numel() != tokens and tuple(lead) != (sequences,):
                raise ValueError(
                    f"layer {name!r} saw {lead.numel()} tokens but the batch's {what} has {tokens}: leave out layers "
                    "that see other tokens (routed experts, a vision tower) by `modules`, or do without"
                )

    def one_for_all(self, lead: torch.Size) -> bool:
        """Whether rows with these leading dimensions serve all sequences, as those of a position embedding often do."""
        if self.batch is None or self.batch[0] == 1:
            return False
        sequences, tokens = self.batch  # if they are equal, (T,) may as well be one row for each sequence
        return tuple(lead) == (1, tokens) or (tuple(lead) == (tokens,) and tokens != sequences)

    def mask_of(self, lead: torch.Size) -> Tensor | None:
        """The mask, or for one row for each sequence which of them have a token that counts."""
        if self.mask is None or self.mask.dim() != 2 or self.mask.numel() == lead.numel():
            return self.mask
        return (self.mask != 0).any(1)

    def bearing(self, mask: Tensor | None, logits: Tensor) -> Tensor:
        """The positions that bear loss, bool of logits' leading dimensions.

        Args:
            mask: Those positions; None: those that count in the batch.
            logits: (..., V).

        Returns:
            (...) on logits' device.

        Raises:
            ValueError: The mask has another number of positions.
        """
        lead = logits.shape[:-1]
        mask = self.mask_of(lead) if mask is None else mask
        if mask is None:
            return torch.ones(lead, dtype=torch.bool, device=logits.device)
        if mask.numel() != lead.numel():
            raise ValueError(
                f"mask must have the leading dimensions of logits {tuple(logits.shape)}, got {tuple(mask.shape)}: give "
                "`sampled_loss` the positions that bear loss"
            )
        return mask.to(logits.device).reshape(lead) != 0

    def weight(self, lead: torch.Size, like: Tensor) -> Tensor | None:
        """(T,) weights of the rows with these leading dimensions, on `like`'s device; None for ones."""
        mask = self.mask_of(lead)
        if mask is None:
            return None
        key = (tuple(lead), like.device, like.dtype)
        if key not in self.weights:
            self.weights[key] = mask.reshape(-1).to(like.device, sum_dtype(like.dtype))
        return self.weights[key]

    def boundaries(self, lead: torch.Size, device: torch.device) -> Tensor:
        """(S+1,) offsets of the sequences in the flattened rows with these leading dimensions."""
        if self.cu_seqlens is not None and lead.numel() == self.packed:
            return self.cu_seqlens.to(device)
        sequences = lead[0] if lead else 1
        return torch.arange(sequences + 1, device=device) * (lead.numel() // max(sequences, 1))

    def numbers(self, lead: torch.Size, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """Which sequence of the batch each row belongs to, its place there without padding, and how many there are.

        Args:
            lead: Leading dimensions of the rows: (B, T), or (N,) for rows that are sequences, or packed ones.
            device: Of the result.

        Returns:
            Two int64 tensors of shape `lead`, and the number of sequences.
        """
        offsets = self.boundaries(lead, device)
        token = torch.arange(lead.numel(), device=device)
        sequence = torch.searchsorted(offsets, token, right=True) - 1
        counted = torch.ones_like(token) if self.mask is None else (self.mask.to(device) != 0).long().reshape(-1)
        if len(counted) != len(token):  # the logits are of one position per sequence
            counted = torch.ones_like(token)
        before = counted.cumsum(0) - counted
        position = before - before[offsets[:-1].clamp(max=max(len(token) - 1, 0))][sequence]
        return sequence.reshape(lead), position.reshape(lead), len(offsets) - 1
