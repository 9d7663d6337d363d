"""`solve_distributed` on two processes against `solve` on one, and how it cuts operators."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from two_processes import WORLD, main, run

from sst_kernels import (
    EKFAC,
    Damped,
    DavidsonOptions,
    Diagonal,
    FunctionOperator,
    Gram,
    Kronecker,
    LowRankPlusDiagonal,
    Pencil,
    Scaled,
    Status,
    Sum,
    solve,
    solve_distributed,
)
from sst_kernels.distributed import pencils_of


def spd(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    x = torch.randn(*shape, shape[-1], dtype=dtype)
    return x @ x.mH + 0.1 * torch.eye(shape[-1])


def operators() -> dict[str, Callable[[], tuple]]:
    """A pencil of each kind, batched in different places."""
    return {
        "dense": lambda: (spd(5, 6), spd(6)),
        "broadcast": lambda: (spd(3, 1, 6), spd(2, 6)),
        "complex": lambda: (spd(5, 6, dtype=torch.complex128), spd(5, 6, dtype=torch.complex128)),
        "fewer pencils than ranks": lambda: (spd(1, 1, 6), spd(6)),
        "one pencil": lambda: (spd(6), spd(6)),
        "no pencil": lambda: (spd(2, 0, 6), spd(6)),
        "diagonal": lambda: (Diagonal(torch.rand(3, 1, 6)), Diagonal(torch.rand(4, 6) + 1)),
        "kronecker": lambda: (Kronecker(spd(3, 2), spd(3)), Kronecker(spd(2), spd(3, 3))),
        "damped": lambda: (Scaled(spd(3, 6), torch.rand(2, 1)), Damped(spd(6), torch.rand(3))),
        "sum": lambda: (Sum([spd(3, 6), Diagonal(torch.rand(6).double())]), Sum([spd(6), spd(3, 6)])),
        "ekfac": lambda: (
            spd(3, 6),
            EKFAC(torch.eye(2).double(), torch.eye(3).double(), torch.rand(3, 2, 3).double() + 1),
        ),
        "gram": lambda: (
            Gram(torch.randn(3, 4, 6), torch.tensor([4.0, 5, 6])),
            LowRankPlusDiagonal(torch.randn(6, 2), torch.rand(3, 6) + 1),
        ),
    }


@pytest.mark.parametrize("kind", operators())
def test_cut_into_pencils(kind: str) -> None:
    torch.manual_seed(0)
    pencil = Pencil(*operators()[kind]())
    whole = [x.reshape(-1, 6, 6) for x in pencil.dense()]
    total = len(whole[0])
    for start, stop in ((0, total // 2), (total // 2, total), (total, total)):
        part = pencils_of(pencil, start, stop)
        assert part.batch_shape == (stop - start,)
        assert [type(part.A), type(part.B)] == [type(pencil.A), type(pencil.B)]
        for found, expected in zip(part.dense(), whole, strict=True):
            torch.testing.assert_close(found, expected[start:stop])


def test_a_callable_cannot_be_cut() -> None:
    pencil = Pencil(FunctionOperator(lambda x: x, (3, 4, 4), torch.float64, torch.device("cpu")))
    with pytest.raises(TypeError, match="cannot cut a FunctionOperator"):
        pencils_of(pencil, 0, 1)


def same_as_one_process(rank: int, folder: Path) -> None:
    for make in operators().values():
        torch.manual_seed(0)
        pencil = Pencil(*make())
        found, expected = solve_distributed(pencil, 2), solve(pencil, 2)
        for name in ("values", "vectors", "status"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        for name in ("backward_errors", "b_orthogonality"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-6, rtol=0)
        assert (found.method, found.counts) == (expected.method, expected.counts)


def bad_pencils_stay_alone(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    a, b = spd(5, 6), spd(5, 6)
    b[3] *= -1
    found = solve_distributed(Pencil(a, b), 2, method="dense")
    assert ((found.status & Status.NOT_POSITIVE_DEFINITE) != 0).tolist() == [False] * 3 + [True, False]
    assert torch.isnan(found.values).any(-1).tolist() == [False] * 3 + [True, False]


def one_error_is_raised_by_all(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    pencil = Pencil(spd(5, 6), spd(6))
    with pytest.raises(
        RuntimeError, match=r"solve_distributed: rank 1: ValueError: solve: k must be in 1\.\.n"
    ) as raised:
        solve_distributed(pencil, 2 if rank == 0 else 7)
    assert isinstance(raised.value.__cause__, ValueError) == (rank == 1)
    assert solve_distributed(pencil, 2).converged.all()


def group_of_one(rank: int, folder: Path) -> None:
    torch.manual_seed(rank)
    groups = [dist.new_group([i]) for i in range(WORLD)]
    pencil = Pencil(spd(3, 6), spd(6))
    found = solve_distributed(pencil, 2, group=groups[rank])
    assert torch.equal(found.values, solve(pencil, 2).values)


def start_and_preconditioner_are_dealt_too(rank: int, folder: Path) -> None:
    torch.manual_seed(0)
    for batch in ((5,), ()):
        pencil = Pencil(spd(*batch, 40), spd(*batch, 40))
        for inverse in (torch.eye(40).double(), torch.linalg.inv(pencil.B.matrix)):
            exact = solve(pencil, 3).vectors  # with the guard
            options = DavidsonOptions(start=exact, preconditioner=inverse)
            found = solve_distributed(pencil, 2, method="davidson", options=options)
            assert found.converged.all() and found.counts.iterations == 0


CASES = {
    f.__name__: f
    for f in (
        same_as_one_process,
        bad_pencils_stay_alone,
        one_error_is_raised_by_all,
        group_of_one,
        start_and_preconditioner_are_dealt_too,
    )
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes(tmp_path: Path, case: str) -> None:
    run(__file__, case, tmp_path, seconds=100)


if __name__ == "__main__":
    main(CASES)
