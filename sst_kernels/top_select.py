"""The largest values of a stream of tensors, exactly and without sorting: radix selection by histograms.

The count-th largest value is found 16 bits at a time (Knuth, The Art of Computer Programming 3, 5.2.2; on GPUs,
Alabi et al. 2012): a pass over all values counts how many have each digit after the digits found so far; the digit
where the count, from the largest down, is reached is the next one. Two passes for float32, bfloat16 and float16, four
for float64, however many values there are; they need not be in memory together.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from .ops import _library, _refuse_gradients, _require_one_device, _require_tensors

_DIGIT = 16  # bits


def digit_histogram_(counts: Tensor, values: Tensor, prefix: int = 0, digit: int = 0) -> None:
    """counts[j] += #{i : the key of values_i has the digits `prefix`, then the digit j}, in place.

    A key is the float's bits as an unsigned integer in the order of the values (32 bits, 64 of float64; half types are
    widened), cut into digits of 16 bits, the most significant first. -0 has the key of 0. NaN has the largest, all
    ones, and nothing else has a first digit of ones only: after digit 0, counts[65535] is how many values are NaN.
    What `TopSelect` is made of.

    Args:
        counts: (65536,) int64 on the device of values, apart from them.
        values: float32, float64, bfloat16 or float16; any shape, contiguous.
        prefix: The first `digit` digits, as one number; values with others are not counted.
        digit: Which digit is counted: 0 or 1, to 3 for float64.

    Raises:
        TypeError: An argument is not a tensor.

    What does not fit raises ValueError naming the argument, before anything is written. Cost: reads values once.
    """
    _require_tensors("digit_histogram_", counts=counts, values=values)
    torch.ops.sst_kernels.digit_histogram_.default(counts, values, prefix, digit)


def threshold_mask_(ties: Tensor, values: Tensor, threshold: float) -> Tensor:
    """mask_i = x_i > τ, or x_i = τ and fewer than `ties` values before it equal τ; ties is lowered by those kept.

    Args:
        ties: (1,) int64 on the device of values: how many values equal to the threshold are still to be kept.
        values: float32, float64, bfloat16 or float16; any shape, contiguous; "before" is in row-major order.
        threshold: τ, a number of values' dtype, or of float32 for half types; may be infinite.

    Returns:
        bool, the shape of values; NaN is not kept.

    Raises:
        TypeError: An argument is not a tensor.

    What does not fit raises ValueError naming the argument, before anything is written. Cost: reads values once, and
    again where ties are kept; writes a byte for each.
    """
    _require_tensors("threshold_mask_", ties=ties, values=values)
    return torch.ops.sst_kernels.threshold_mask_.default(ties, values, threshold)


class TopSelect:
    """M_i = 1 for the `count` largest of `total` values, ties by position in the stream, earlier first; else 0.

    Every pass shows the same values in the same order, and so does the last reading, which asks for the masks. -0
    equals 0; infinities are values like others; NaN is refused. Integer counts: the same masks on every device, with
    any number of threads, and however the values are cut into tensors.

    Args:
        total: How many values a pass shows.
        count: How many are kept, from 1 to total.

    Raises:
        ValueError: count is not from 1 to total.

    Memory: 512 KiB of counts, on the device of the values; on the CPU 512 KiB more for every thread.

    Example:
        >>> tensors = {"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([[2.0, 5.0]])}
        >>> top = TopSelect(total=5, count=3)
        >>> while not top.done:
        ...     for name, values in tensors.items():
        ...         top.observe(values, name)
        ...     top.next_pass()
        >>> top.threshold, top.ties
        (2.0, 1)
        >>> [top.mask(values).tolist() for values in tensors.values()]
        [[True, False, True], [[False, True]]]
    """

    def __init__(self, total: int, count: int):
        if not 1 <= count <= total:
            raise ValueError(f"TopSelect: count must be from 1 to total = {total}, got {count}")
        self._total, self._count = total, count
        self._bits = 0  # of a key; 0 until a tensor is seen
        self._digit, self._prefix = 0, 0
        self._wanted = count  # of the values that have the prefix
        self._seen = self._equal = 0
        self._counts: Tensor | None = None
        self._left: Tensor | None = None

    @property
    def done(self) -> bool:
        """Whether the threshold is known and masks can be asked for."""
        return self._bits > 0 and self._digit == self._bits // _DIGIT

    @property
    def threshold(self) -> float:
        """The count-th largest value. ValueError before `done`."""
        self._require_done("threshold")
        sign = 1 << (self._bits - 1)
        code = self._prefix - sign if self._prefix >= sign else 2 * sign - 1 - self._prefix
        return struct.unpack(
            *((">f", code.to_bytes(4, "big")) if self._bits == 32 else (">d", code.to_bytes(8, "big")))
        )[0]

    @property
    def ties(self) -> int:
        """How many of the values equal to the threshold are kept, in the whole stream. ValueError before `done`."""
        self._require_done("ties")
        return self._wanted

    def observe(self, values: Tensor, name: str = "values") -> None:
        """Counts one tensor of the pass.

        Args:
            values: float32, bfloat16 or float16, which may be mixed, or float64; any shape and device.
            name: What messages call it.

        Raises:
            ValueError: It holds NaN (which ends the selection), the pass shows more values than `total`, float64 is
                mixed with other dtypes, or the threshold is already known.
        """
        if self.done:
            raise ValueError("TopSelect.observe: the threshold is known after the last pass; ask for masks")
        self._check_dtype("observe", values, name)
        self._seen += values.numel()
        if self._seen > self._total:
            raise ValueError(
                f"TopSelect.observe: with {name!r} this pass shows {self._seen} values, more than total = "
                f"{self._total}; call next_pass() between passes"
            )
        if self._counts is None:
            self._counts = torch.zeros(2**_DIGIT, dtype=torch.int64, device=values.device)
        self._counts = self._counts.to(values.device)
        digit_histogram_(self._counts, values.detach().contiguous(), self._prefix, self._digit)
        if self._digit == 0 and self._counts[-1] > 0:
            raise ValueError(
                f"TopSelect.observe: {name!r} holds {int(self._counts[-1])} NaN among its {values.numel()} values, "
                "which have no place in an order; find where they arise, or replace them with torch.nan_to_num"
            )

    def next_pass(self) -> None:
        """Ends a pass: one more digit of the threshold is known.

        Raises:
            ValueError: The pass did not show `total` values, or not those of the first pass.
        """
        if self.done or self._seen != self._total or self._counts is None:
            raise ValueError(
                f"TopSelect.next_pass: a pass must show total = {self._total} values, got {self._seen}"
                + ("; the threshold is known already" if self.done else "")
            )
        at_least = self._counts.flip(0).cumsum(0)  # how many have one of the j + 1 largest digits
        above = int(torch.searchsorted(at_least, self._wanted))
        digit = 2**_DIGIT - 1 - above
        if digit < 0 or (self._digit > 0 and at_least[-1] != self._equal):
            raise ValueError("TopSelect.next_pass: this pass showed other values than the one before; show the same")
        self._equal = int(self._counts[digit])
        self._wanted -= int(at_least[above]) - self._equal
        self._prefix = self._prefix << _DIGIT | digit
        self._digit += 1
        self._seen = 0
        self._counts = None
        if self.done:
            self._left = torch.tensor([self._wanted])

    def mask(self, values: Tensor) -> Tensor:
        """The mask of the next tensor of the stream, read once more in the order of the passes.

        Args:
            values: As it was observed.

        Returns:
            bool, the shape and device of values.

        Raises:
            ValueError: The threshold is not known yet, or values are of another dtype than those observed.
        """
        self._require_done("mask")
        self._check_dtype("mask", values, "values")
        self._left = self._left.to(values.device)
        return threshold_mask_(self._left, values.detach().contiguous(), self.threshold)

    def _check_dtype(self, method: str, values: Tensor, name: str) -> None:
        bits = 64 if values.dtype == torch.float64 else 32
        if self._bits not in (0, bits):
            raise ValueError(
                f"TopSelect.{method}: {name!r} is {values.dtype}, others were of {self._bits} bits; convert all to "
                "float32, or all to float64"
            )
        self._bits = bits

    def _require_done(self, what: str) -> None:
        if not self.done:
            raise ValueError(
                f"TopSelect.{what}: the threshold is not known yet; observe all values and call next_pass()"
            )


def top_mask(values: Tensor, count: int) -> Tensor:
    """M_i = 1 for the `count` largest values of one tensor, ties by position, earlier first; else 0.

    Args:
        values: float32, float64, bfloat16 or float16; any shape.
        count: How many are kept, from 1 to their number.

    Returns:
        bool, the shape of values.

    NaN, and a count out of range, raise ValueError. Cost: `values` is read three times, of float64 five.

    Example:
        >>> top_mask(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist()
        [True, True, False, False]
    """
    top = TopSelect(values.numel(), count)
    while not top.done:
        top.observe(values)
        top.next_pass()
    return top.mask(values)


@torch.library.register_fake("sst_kernels::threshold_mask_", lib=_library)
def _(ties: Tensor, values: Tensor, threshold: float) -> Tensor:
    _require_one_device(ties, values)
    return values.new_empty(values.shape, dtype=torch.bool)


torch.library.register_fake("sst_kernels::digit_histogram_", _require_one_device, lib=_library)
for _name in ("digit_histogram_", "threshold_mask_"):
    _refuse_gradients(_name)
