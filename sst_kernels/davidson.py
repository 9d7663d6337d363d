"""Block Jacobi–Davidson iteration (csrc/solver) for pencils too large, or too structured, to decompose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from . import _C
from .operators import Dense, Operator, as_operator
from .pencil import Pencil
from .preconditioners import factored_inverse, preconditioner
from .program import Program
from .result import Counts, Spectrum, Status
from .scaling import scale_by_power

# Most pairs that are sought at once, on the CPU and on CUDA, where the search space must fit into shared memory.
_WINDOWS = 256, 48
_NEAR_ONE = 2.0**30  # a dense matrix whose diagonal peaks within this of 1 is iterated with as it is
_GUARD = 1e-8  # backward error (or 20 tol) that the pair after the k-th must meet, for a cluster to be seen


@dataclass(frozen=True, kw_only=True)
class DavidsonOptions:
    """How method "davidson" iterates; sizes of None are chosen from k.

    Attributes:
        block: directions added to the search space in an iteration, at most.
        window: wanted pairs that are sought at once; converged ones are locked where k is more.
        keep: vectors kept in a restart, more than `window`.
        capacity: vectors that the search space holds, at least keep + 2 block.
        max_iterations: limit of all iterations together.
        inner_steps: most steps of the correction equation's solver, once a pencil proves hard.
        single_start: whether float64 pencils without `start` are first solved in float32 as far as that goes.
        start: (..., n, m) vectors near the wanted ones, in the batch shape of the pencil, of any length and number;
            those that are zero or not finite count for nothing.
        preconditioner: K⁻¹ ≈ B⁻¹, symmetric positive definite; a tensor means Dense. None means the float32
            Cholesky factor of a dense B, else what `sst_kernels.preconditioners.preconditioner` makes of B.
    """

    block: int | None = None
    window: int | None = None
    keep: int | None = None
    capacity: int | None = None
    max_iterations: int = 1000
    inner_steps: int = 8
    single_start: bool = False
    start: Tensor | None = None
    preconditioner: Operator | Tensor | None = None

    def sizes(self, k: int, most: int) -> tuple[int, int, int, int]:
        """Sizes for k wanted pairs.

        Args:
            k: wanted pairs.
            most: largest window, where none is given.

        Returns:
            Block, window, keep and capacity.

        Raises:
            TypeError: if one is no integer.
            ValueError: if they contradict each other, or a limit is negative.
        """
        for name in ("block", "window", "keep", "capacity", "max_iterations", "inner_steps"):
            value = getattr(self, name)
            chosen = value is None and name not in ("max_iterations", "inner_steps")
            if not chosen and (isinstance(value, bool) or not isinstance(value, Integral)):
                raise TypeError(f"DavidsonOptions: {name} must be an int, got {value!r}")
        window = min(k, most if self.window is None else self.window)
        block = min(max(k, 4), max(16, min(window // 4, 64))) if self.block is None else self.block
        keep = window + min(max(window, 4), 16) if self.keep is None else self.keep
        capacity = keep + 3 * block if self.capacity is None else self.capacity
        if not (window >= 1 and block >= 1 and keep > window and capacity >= keep + 2 * block):
            raise ValueError(
                "DavidsonOptions: window >= 1, block >= 1, keep > window and capacity >= keep + 2 block must hold, "
                f"got window = {window}, block = {block}, keep = {keep}, capacity = {capacity}"
            )
        if self.max_iterations < 0 or self.inner_steps < 0:
            raise ValueError(
                "DavidsonOptions: max_iterations and inner_steps must be at least 0, "
                f"got {self.max_iterations} and {self.inner_steps}"
            )
        return int(block), int(window), int(keep), int(capacity)


@torch.no_grad()
def davidson(pencil: Pencil, k: int, tol: float, seed: int, options: DavidsonOptions) -> Spectrum:
    """The k largest pairs of A v = λ B v by block Jacobi–Davidson iteration; see csrc/solver/davidson.h.

    Args:
        pencil: real; A ⪰ 0 and B ≻ 0 for the iteration to find the largest.
        k: number of pairs.
        tol: backward error at which a pair has converged.
        seed: of the random start.
        options: see `DavidsonOptions`.

    Returns:
        k + 1 values or more, k vectors, and certificates from products with those vectors. A, B and K⁻¹ are
        applied to some 4k to 20k columns. Memory beside the operators: 3 (capacity + k) n entries, for float32
        twice as many again while they are widened; for a dense B its float32 factor, n² entries a pencil (in
        float64, with as much for L⁻¹AL⁻ᵀ, where B is ill-conditioned); with `single_start` float32 copies of
        A and B; and, when half of a batch has converged, copies of the matrices of the others.

    Raises:
        TypeError: for options of other types.
        ValueError: for complex pencils, and options that contradict each other.
        BaseException: what a Python callable among the operators raises, or a signal handler.
    """
    if pencil.dtype.is_complex:
        raise ValueError(
            f"solve: method 'davidson' must have float32 or float64, got {pencil.dtype}; use method='dense'"
        )
    n, shape = pencil.n, pencil.batch_shape
    block, window, keep, capacity = options.sizes(k, _WINDOWS[pencil.device.type == "cuda"])
    (a, a_exponent), (b, b_exponent) = _near_one(pencil.A), _near_one(pencil.B)
    warm = options.start is not None
    program = Program(shape)
    codes = [program.encode(a), program.encode(b)]
    inverse, fault = _inverse(b, options.preconditioner, shape)
    codes.append([] if inverse is None else program.encode(inverse))
    rows, fresh = _random_rows(pencil, max(window + 1, block), seed)
    if warm:
        rows = _start_rows(options.start, rows, shape)
    single = options.single_start and not warm and pencil.dtype == torch.float64 and not program.calls_python
    # In float32 an error of tol·cond(B) in λ would show: there the iteration aims lower than what is accepted.
    aim = tol / 10 if pencil.dtype == torch.float32 else tol
    numbers = [k, block, keep, capacity, window, int(options.max_iterations), int(options.inner_steps)]
    flags = [int(single), int(warm)]
    theta, rows, errors, orthogonality, state, counts, history = _run(
        program, codes, rows, fresh, numbers + flags, [aim, max(20 * tol, _GUARD)]
    )
    *counts, own = (int(x) for x in counts)
    power = (a_exponent - b_exponent).expand(shape)
    theta = theta[:, :n]  # the solver returns more rows than there are pairs where k is near n
    values = scale_by_power(theta.reshape(*shape, theta.shape[-1]), power[..., None])
    vectors = rows[:, :k].mT.reshape(*shape, n, k)
    vectors = scale_by_power(vectors, -(b_exponent // 2).expand(shape)[..., None, None])
    status, guard_error = state.to(pencil.device).reshape(*shape, 2).unbind(-1)
    rounding = n * torch.finfo(pencil.dtype).eps * values.abs().amax(-1)
    return Spectrum(
        values.to(pencil.dtype),
        vectors,
        torch.maximum(rounding, scale_by_power(guard_error, power)),
        status.long() & ~int(Status.CONVERGED) | fault,
        errors[:, :k].reshape(*shape, k).to(pencil.dtype) if own else None,
        orthogonality.reshape(shape).to(pencil.dtype) if own else None,
        Counts(*counts),
        history,
    )


def _run(
    program: Program, codes: list[list[int]], rows: Tensor, fresh: Tensor, numbers: list[int], tolerances: list[float]
) -> list[Tensor]:
    """The compiled iteration; exceptions of Python code inside of it arrive as they were raised."""
    with program:
        try:
            return torch.ops.sst_kernels._davidson(program.tensors, *codes, rows, fresh, numbers, tolerances)
        except RuntimeError:
            error = program.error or _C.take_interrupt()
            if error is None:
                raise
            raise error from None


@torch.library.register_fake("sst_kernels::_davidson")
def _(
    tensors: list[Tensor],
    a: list[int],
    b: list[int],
    inverse: list[int],
    rows: Tensor,
    fresh: Tensor,
    options: list[int],
    tolerances: list[float],
) -> list[Tensor]:
    batch, _, n = rows.shape
    count = options[0] + max(options[2] - options[4], 1)  # k, and the guards that a restart keeps
    wide, host = rows.new_empty, torch.empty
    iterations = torch.library.get_ctx().new_dynamic_size()
    return [
        wide((batch, count), dtype=torch.float64),
        wide((batch, count, n)),
        wide((batch, count), dtype=torch.float64),
        wide((batch,), dtype=torch.float64),
        *(host(shape, dtype=torch.float64) for shape in ((batch, 2), (5,), (iterations, 3))),
    ]


def _near_one(op: Operator) -> tuple[Operator, Tensor]:
    """The operator itself with exponent 0 if its scale is ordinary, else `normalized`."""
    if isinstance(op, Dense):
        peak = op.diagonal().abs().amax(-1)
        if bool(((peak < _NEAR_ONE) & (peak > 1 / _NEAR_ONE)).all()):
            return op, torch.zeros(op.batch_shape, dtype=torch.int32, device=op.device)
    return op.normalized()


def _inverse(b: Operator, given: Operator | Tensor | None, batch: torch.Size) -> tuple[Operator | None, Tensor | int]:
    """K⁻¹, None where the solver factors B, and the faults of B that its structure shows."""
    if given is not None:
        given = as_operator(given, "DavidsonOptions: preconditioner")
        fits = (given.n, given.dtype, given.device) == (b.n, b.dtype, b.device)
        if not fits or not _broadcasts_to(given.batch_shape, batch):
            raise ValueError(
                f"DavidsonOptions: preconditioner must be {(*batch, b.n, b.n)} {b.dtype} on {b.device} as A and B, "
                f"or of fewer matrices, got {tuple(given.shape)} {given.dtype} on {given.device}"
            )
        return given, 0
    if isinstance(b, Dense):
        return None, 0
    found = factored_inverse(b)
    return (preconditioner(b) or b.identity(), 0) if found is None else found


def _broadcasts_to(shape: torch.Size, batch: torch.Size) -> bool:
    """Whether a batch shape can be expanded to another one."""
    pairs = zip(reversed(shape), reversed(batch), strict=False)
    return len(shape) <= len(batch) and all(own in (1, size) for own, size in pairs)


def _random_rows(pencil: Pencil, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random rows (N, count, n), the same for each pencil, and others (1, count, n), from a generator of their own."""
    generator = torch.Generator(pencil.device).manual_seed(seed)
    shape = (2, 1, count, pencil.n)
    rows, fresh = torch.randn(shape, generator=generator, dtype=pencil.dtype, device=pencil.device)
    return rows.expand(math.prod(pencil.batch_shape), -1, -1).contiguous(), fresh


def _start_rows(start: Tensor, rows: Tensor, batch_shape: torch.Size) -> Tensor:
    """The caller's vectors as rows, with random ones behind them if they are too few.

    Returns:
        Rows (N, max(m, count), n) of length 1 or 0.

    Raises:
        TypeError: if `start` is no tensor.
        ValueError: if their shape, dtype or device do not fit the pencil.
    """
    if not isinstance(start, Tensor):
        raise TypeError(f"DavidsonOptions: start must be a torch.Tensor, got {type(start).__name__}")
    n = rows.shape[-1]
    fits = start.dim() >= 2 and start.shape[-2] == n and start.dtype == rows.dtype and start.device == rows.device
    if not fits or start.shape[:-2] != batch_shape:
        raise ValueError(
            f"DavidsonOptions: start must be (..., n, m) = {(*batch_shape, n, 'm')} {rows.dtype} on {rows.device}, "
            f"got {tuple(start.shape)} {start.dtype} on {start.device}"
        )
    given = start.reshape(rows.shape[0], n, start.shape[-1]).mT
    for order in (torch.inf, 2):
        given = (given / torch.linalg.vector_norm(given, order, dim=-1, keepdim=True)).nan_to_num(0, 0, 0)
    return torch.cat([given, rows[:, given.shape[1] :]], 1).contiguous()
