"""The block Jacobi–Davidson method as a callee: batches, seeds, callables that fail, interruption, verification."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from pencils import FAULTS, kfac, planted, with_fault
from test_davidson import N, callable_of, check, power_law
from torch import Tensor

from sst_kernels.davidson import DavidsonOptions
from sst_kernels.operators import Dense, Diagonal, Operator
from sst_kernels.pencil import Pencil
from sst_kernels.result import Status
from sst_kernels.solve import solve
from sst_kernels.structured import FunctionOperator


def stacked(pairs: list[tuple[np.ndarray, np.ndarray]]) -> Pencil:
    return Pencil(*(torch.from_numpy(np.stack(x)) for x in zip(*pairs, strict=True)))


def inverse_of(op: Operator) -> Tensor:
    """By numpy: torch's batched LU on the CPU is wrong after torch.set_num_threads (pytorch issue 142815)."""
    return torch.from_numpy(np.linalg.inv(op.to_dense().numpy()))


def easy(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return planted(2.0 ** -np.arange(N), 10, seed)[:2]


def hard(seed: int) -> tuple[np.ndarray, np.ndarray]:
    return planted(1 + np.arange(N) / N, 1e4, seed)[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_of_easy_hard_and_broken_pencils(dtype):
    pairs = [easy(0), hard(0), easy(1), kfac(N, 1.0)[:2], hard(1), easy(2), easy(3), easy(4), easy(5)]
    pairs += [with_fault(fault, *easy(6)) for fault in FAULTS]
    pairs.append((np.zeros((N, N)), easy(7)[1]))
    batch = stacked(pairs)
    batch = Pencil(*(x.matrix.to(dtype) for x in (batch.A, batch.B)))
    together = solve(batch, 4, method="davidson")
    good = torch.tensor([True] * 9 + [False] * len(FAULTS) + [True])
    assert together.status[~good].tolist() == list(FAULTS.values())
    assert all(x[~good].isnan().all() for x in (together.values, together.vectors, together.backward_errors))
    check(together, batch, where=good)
    for i in range(len(pairs)):
        pencil = Pencil(batch.A.matrix[i], batch.B.matrix[i])
        alone = solve(pencil, 4, method="davidson")
        assert alone.status == together.status[i]
        if good[i]:
            torch.testing.assert_close(alone.values, together.values[i], rtol=1e4 * pencil.tolerance, atol=1e-30)
    pencils = together.history[:, 0]
    assert pencils.max() == 15 - 4  # those that B shows to be broken never enter
    assert pencils.min() <= 3  # finished ones have left


def test_faults_do_not_harm_a_batch_of_any_order():
    """One bad pencil at each place of a batch of three, the others as they are alone."""
    for place in range(3):
        for fault in FAULTS:
            pairs = [hard(i) for i in range(3)]
            pairs[place] = with_fault(fault, *pairs[place])
            batch = stacked(pairs)
            good = torch.arange(3) != place
            result = solve(batch, 2, method="davidson", options=DavidsonOptions(single_start=place == 1))
            assert result.status[place] == FAULTS[fault]
            check(result, batch, where=good)


@pytest.mark.parametrize("shapes", [((2, 3), ()), ((), (2, 3)), ((2, 1), (3,)), ((1,), (2, 3))])
def test_batches_broadcast(shapes):
    rng = np.random.default_rng(0)
    sides = []
    for side, shape in enumerate(shapes):
        pairs = [kfac(N, 1.0, seed=int(rng.integers(99)))[side] for _ in range(int(np.prod(shape)))]
        sides.append(torch.from_numpy(np.stack(pairs).reshape(*shape, N, N)))
    pencil = Pencil(*sides)
    result = solve(pencil, 3, method="davidson")
    assert result.values.shape == (2, 3, 3)
    check(result, pencil)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seeds(dtype):
    pencil = Pencil(*(x.to(dtype) for x in power_law().dense()))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (solve(pencil, 5, method="davidson", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.values, again.values) and torch.equal(first.vectors, again.vectors)
    assert not torch.equal(first.vectors, other.vectors)
    torch.testing.assert_close(first.values, other.values, rtol=100 * pencil.tolerance, atol=0)


def test_counts_and_history():
    pencil = power_law()
    result = solve(pencil, 5, method="davidson")
    counts, history = result.counts, result.history
    assert 0 < counts.iterations < len(history) <= counts.iterations + 6
    assert 5 < counts.b_products <= 20 * counts.iterations
    assert counts.a_products >= 5 and 0 < counts.preconditioner_products <= counts.a_products
    assert history.dtype == torch.float64 and history.shape[1] == 3
    assert (history[:, 0] == 1).all() and (history[:, 1] <= 5).all() and (history[:, 1] >= 0).all()
    assert history[-1, 2] <= pencil.tolerance < history[0, 2]
    assert result.counts.a_products == solve(pencil, 5, method="davidson").counts.a_products


@pytest.mark.parametrize("inner_steps", [0, 1, 8])
@pytest.mark.parametrize("single_start", [False, True])
def test_inner_steps(inner_steps, single_start):
    pencil = stacked([hard(0)])
    options = DavidsonOptions(inner_steps=inner_steps, single_start=single_start)
    check(solve(pencil, 3, method="davidson", options=options), pencil)


@pytest.mark.parametrize("kind", ["identity", "diagonal", "exact", "callable", "of one pencil"])
def test_preconditioner_of_the_caller(kind):
    pencil = stacked([easy(0), kfac(N, 1.0)[:2]])
    inverse = inverse_of(pencil.B)
    preconditioner: Operator = {
        "identity": Diagonal(torch.ones(N, dtype=torch.float64)),
        "diagonal": Diagonal(pencil.B.diagonal().reciprocal()),
        "exact": Dense(inverse),
        "callable": FunctionOperator(lambda x: inverse @ x, inverse.shape, torch.float64),
        "of one pencil": Dense(inverse[0]),
    }[kind]
    check(solve(pencil, 3, method="davidson", options=DavidsonOptions(preconditioner=preconditioner)), pencil)


class Halt(BaseException):
    """Not an Exception, as KeyboardInterrupt."""


def failing(error: BaseException, after: int, op: Operator) -> Callable[[Tensor], Tensor]:
    calls = iter(range(10**9))

    def product(x: Tensor) -> Tensor:
        if next(calls) >= after:
            raise error
        return op @ x

    return product


@pytest.mark.parametrize("error", [ValueError("mine"), Halt("mine"), KeyboardInterrupt("mine"), RuntimeError("mine")])
@pytest.mark.parametrize("after", [0, 1, 7])
@pytest.mark.parametrize("side", ["A", "B", "preconditioner"])
def test_exceptions_of_a_callable_arrive_as_they_are(error, after, side):
    pencil, options = power_law(), DavidsonOptions()
    stored = {"A": pencil.A, "B": pencil.B, "preconditioner": Dense(inverse_of(pencil.B))}[side]
    op = FunctionOperator(failing(error, after, stored), (N, N), torch.float64)
    if side == "A":
        pencil = Pencil(op, pencil.B)
    elif side == "B":
        pencil = Pencil(pencil.A, op)
    else:
        options = DavidsonOptions(preconditioner=op)
    with pytest.raises(type(error)) as caught:
        solve(pencil, 3, method="davidson", options=options)
    assert caught.value is error
    check(solve(power_law(), 3, method="davidson"), power_law())  # nothing is left behind


@pytest.mark.parametrize(
    ("product", "error", "match"),
    [
        (lambda x: x[..., :1], ValueError, "what function returns"),
        (lambda x: x.float(), ValueError, "what function returns"),
        (lambda x: x.mT, ValueError, "what function returns"),
        (lambda x: None, TypeError, "must return a torch.Tensor"),
    ],
)
def test_callables_that_return_something_else(product, error, match):
    calls = iter(range(10**9))  # right at first, for what is done before the iteration
    op = FunctionOperator(lambda x: x if next(calls) < 3 else product(x), (N, N), torch.float64)
    with pytest.raises(error, match=match):
        solve(Pencil(op, power_law().B), 3, method="davidson")


@pytest.mark.parametrize(("value", "status"), [(-1.0, Status.NOT_POSITIVE_DEFINITE), (np.nan, Status.NON_FINITE)])
def test_callable_b_without_cholesky_factor(value, status):
    entries = torch.where(torch.arange(N) % 2 == 0, 1.0, value).double()
    op = FunctionOperator(lambda x: entries[:, None] * x, (N, N), torch.float64)
    result = solve(Pencil(power_law().A, op), 3, method="davidson")
    assert result.status == status
    assert result.values.isnan().all()


def test_callables_may_solve():
    """A callable that runs the method itself, with a callable of its own that may fail."""
    inner = power_law(60)
    pencil = power_law()
    values = []

    def product(x: Tensor) -> Tensor:
        found = solve(Pencil(callable_of(inner.A.matrix), inner.B), 2, method="davidson")
        values.append(found.values)
        with pytest.raises(Halt), contextlib.suppress(ValueError):
            op = FunctionOperator(failing(Halt(), 0, pencil.A), (N, N), torch.float64)
            solve(Pencil(op, pencil.B), 2, method="davidson")
        return pencil.A @ x

    result = solve(Pencil(FunctionOperator(product, (N, N), torch.float64), pencil.B), 3, method="davidson")
    check(result, pencil)
    assert len(values) > 3 and all(torch.equal(x, values[0]) for x in values)


def test_from_threads():
    """Each with callables of its own, one of which fails."""
    pencils = [power_law(N, seed) for seed in range(4)]
    results: dict[int, object] = {}

    def work(i: int) -> None:
        error = Halt(i)
        a = (
            FunctionOperator(failing(error, 5, pencils[i].A), (N, N), torch.float64)
            if i == 2
            else callable_of(pencils[i].A.matrix)
        )
        try:
            results[i] = solve(Pencil(a, pencils[i].B), 3, method="davidson")
        except Halt as caught:
            results[i] = caught is error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results.pop(2) is True
    for i, result in results.items():
        check(result, pencils[i])


@contextlib.contextmanager
def alarm(handler: Callable[..., None], seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def endless() -> Pencil:
    """Some ten seconds."""
    return stacked([planted(1 + np.arange(600) / 6e5, 1e4, seed)[:2] for seed in range(3)] * 4)


ENDLESS = DavidsonOptions(max_iterations=10**6)


def test_ctrl_c_ends_the_iteration():
    pencil, sent = endless(), []

    def interrupt(*_: object) -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    with alarm(interrupt, 0.3), pytest.raises(KeyboardInterrupt):
        solve(pencil, 16, method="davidson", tol=1e-300, options=ENDLESS)
    assert time.monotonic() - sent[0] < 2


def test_exceptions_of_signal_handlers_arrive_as_they_are():
    error = Halt()

    def handler(*_: object) -> None:
        raise error

    with alarm(handler, 0.3), pytest.raises(Halt) as caught:
        solve(endless(), 16, method="davidson", tol=1e-300, options=ENDLESS)
    assert caught.value is error
    check(solve(power_law(), 3, method="davidson"), power_law())


def test_signals_whose_handlers_do_not_raise_are_no_interruption():
    seen = []
    pencil = stacked([hard(i) for i in range(3)])
    with alarm(lambda *_: seen.append(1), 0.02):
        check(solve(pencil, 5, method="davidson"), pencil)
        while not seen:
            time.sleep(0.01)


@pytest.mark.parametrize("kind", ["dense", "callable"])
def test_verification_on_request(kind):
    pencil = Pencil(*(torch.from_numpy(x) for x in kfac(600, 1.0)[:2]))
    given = pencil if kind == "dense" else Pencil(callable_of(pencil.A.matrix), pencil.B)
    assert solve(given, 4, method="davidson").status == Status.CONVERGED
    assert solve(given, 4, method="davidson", verify=True).status == Status.CONVERGED | Status.VERIFIED


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("missed", [0, 2, 4])
def test_a_missed_pair_is_never_verified(dense, missed):
    """A diagonal pencil keeps a zero component zero, so no start without e_i finds it."""
    a = torch.linspace(2, 1, N, dtype=torch.float64) ** 4
    pencil = Pencil(a.diag() if dense else Diagonal(a), torch.ones(N, dtype=torch.float64).diag() if dense else None)
    kept = [i for i in range(8) if i != missed]
    start = torch.eye(N, dtype=torch.float64)[:, kept]
    options = DavidsonOptions(start=start, single_start=False, window=5, block=1)
    result = solve(pencil, 5, method="davidson", verify=True, options=options)
    assert result.values.tolist() == pytest.approx(a[kept[:5]].tolist())
    assert result.status == Status.CONVERGED
    options = DavidsonOptions(start=torch.eye(N, dtype=torch.float64)[:, :8])
    assert solve(pencil, 5, method="davidson", verify=True, options=options).status & Status.VERIFIED


def test_gradients_are_refused_not_dropped():
    pencil = power_law()
    a = pencil.A.matrix.clone().requires_grad_()
    with pytest.raises(ValueError, match="does not fit"):
        solve(Pencil(a, pencil.B), 3, method="davidson")
    with torch.no_grad():
        check(solve(Pencil(a, pencil.B), 3, method="davidson"), pencil)
    assert solve(Pencil(a, pencil.B), 3).values.requires_grad  # "auto" takes a method that has them


def test_complex_pencils_are_refused():
    with pytest.raises(ValueError, match="complex128"):
        solve(Pencil(torch.eye(20, dtype=torch.complex128)), 3, method="davidson")


def test_preconditioner_of_more_matrices_than_the_pencil():
    options = DavidsonOptions(preconditioner=Diagonal(torch.ones(3, N, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"preconditioner must be \(240, 240\) .* got \(3, 240, 240\)"):
        solve(power_law(), 3, method="davidson", options=options)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block": 2.5}, r"block must be an int, got 2\.5"),
        ({"max_iterations": "9"}, r"max_iterations must be an int, got '9'"),
        ({"max_iterations": None}, r"max_iterations must be an int, got None"),
        ({"block": True}, r"block must be an int, got True"),
        ({"start": np.zeros((N, 2))}, r"start must be a torch\.Tensor, got ndarray"),
        ({"preconditioner": np.eye(N)}, r"preconditioner must be a torch\.Tensor or an Operator, got ndarray"),
    ],
)
def test_options_of_other_types(options, match):
    with pytest.raises(TypeError, match=f"DavidsonOptions: {match}"):
        solve(power_law(), 3, method="davidson", options=DavidsonOptions(**options))


def test_sizes_of_numpy():
    options = DavidsonOptions(block=np.int64(4), max_iterations=np.int32(200), inner_steps=np.int64(2))
    check(solve(power_law(), 3, method="davidson", options=options), power_law())


def test_preconditioner_as_a_matrix():
    pencil = power_law()
    options = DavidsonOptions(preconditioner=inverse_of(pencil.B))
    check(solve(pencil, 3, method="davidson", options=options), pencil)
