"""Labels sampled from a model's own distribution, reproducibly: the true Fisher's ŷ ~ p(·|x).

Each label is the inverse CDF at a uniform number that depends on nothing but (seed, sequence, position, sample), a
counter-based generator in the manner of Salmon et al. (2011). Neither the batch a sequence travels in nor the order
of batches changes a label; a resumed run draws the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_ROWS_AT_ONCE = 256  # bounds the float64 CDF to 256 rows of the vocabulary


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64 bit patterns (torch's >> is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014), a bijection of 64-bit integers; wraps around."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def counter_uniform(seed: int, sequence: Tensor, position: Tensor, sample: int = 0) -> Tensor:
    """u(seed, sequence, position, sample), uniform on [0, 1).

    Args:
        seed: The run's seed.
        sequence: Index of the sequence in its data set, int64, any shape.
        position: Index of the token in its sequence, int64, broadcast against `sequence`.
        sample: Which of several samples.

    Returns:
        float64, the broadcast shape: 53 random bits each. The same on every device.
    """
    state = _mix(torch.as_tensor(seed, dtype=torch.int64, device=sequence.device) + _GOLDEN)
    for counter in (
        sequence.long(),
        position.long(),
        torch.as_tensor(sample, device=sequence.device),
    ):
        state = _mix((state ^ counter) + _GOLDEN)
    return _shift_right(state, 11).double() * 2.0**-53


def sample_labels(logits: Tensor, uniform: Tensor) -> Tensor:
    """ŷ = min{j : Σ_{i≤j} softmax(logits)_i > u}, row by row; a token of probability zero is never drawn.

    Args:
        logits: (T, V), any floating dtype; the softmax is taken in float32, the CDF in float64.
        uniform: (T,), float64 in [0, 1).

    Returns:
        (T,), int64.
    """
    labels = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        cdf = logits[rows].float().softmax(-1).double().cumsum(-1)
        target = (uniform[rows].to(cdf.device) * cdf[:, -1]).unsqueeze(-1)
        labels[rows] = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    return labels.clamp_(max=logits.shape[-1] - 1)
