"""Random pencils with Hypothesis: sound ones converge and match scipy, broken ones name their fault.

SST_EXAMPLES=5000 draws thousands of batches instead of hundreds. In float32 the exponents of cond(B) are halved: 1e4
and 1e6 in place of 1e8 and 1e12.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pencils import FAULTS, METHODS, SPECTRA, planted, with_fault

from sst_kernels.pencil import Pencil
from sst_kernels.result import EigenResult, Status
from sst_kernels.solve import solve

EXAMPLES = settings(
    max_examples=int(os.environ.get("SST_EXAMPLES", "300")),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
OUTCOMES = Status.CONVERGED | Status.STAGNATED | Status.MAX_ITERATIONS


@dataclass(frozen=True)
class Member:
    """One pencil of a batch; `aligned`: λ have the sizes of the spectrum, else A has, and λ₁ ≈ ‖A‖‖B⁻¹‖."""

    spectrum: str
    aligned: bool
    exponent: float
    fault: str | None
    seed: int

    def matrices(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        values = SPECTRA[self.spectrum](n, np.random.default_rng(self.seed))
        a, b, _ = planted(values, 10**self.exponent, self.seed)
        if not self.aligned:
            a = planted(values, 1, self.seed + 1).a
        return with_fault(self.fault, a, b) if self.fault else (a, b)


@dataclass(frozen=True)
class Batch:
    dtype: type
    n: int
    k: int
    members: list[Member]


@st.composite
def batches(draw: st.DrawFn, exponents: tuple[float, float], share: int) -> Batch:
    """Batches of 1 to 5 pencils of order 1 to 80 with cond(B) between 10^exponents, and k up to n / share."""
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    n = draw(st.integers(1, 80))
    halved = 2 if dtype == np.float32 else 1
    member = st.builds(
        Member,
        spectrum=st.sampled_from(sorted(SPECTRA)),
        aligned=st.booleans(),
        exponent=st.floats(exponents[0] / halved, exponents[1] / halved),
        fault=st.none() | st.none() | st.sampled_from(sorted(FAULTS)),
        seed=st.integers(0, 2**31),
    )
    return Batch(
        dtype,
        n,
        draw(st.integers(1, max(1, n // share))),
        draw(st.lists(member, min_size=1, max_size=5)),
    )


def check(batch: Batch, method: str, device: torch.device) -> list[bool]:
    """Solve the batch and check what must hold always; whether each sound pencil converged."""
    pairs = [[x.astype(batch.dtype) for x in member.matrices(batch.n)] for member in batch.members]
    a, b = (torch.from_numpy(np.stack(x)).to(device) for x in zip(*pairs, strict=True))
    result = solve(Pencil(a, b), batch.k, method=method)
    converged = []
    for i, (member, pair) in enumerate(zip(batch.members, pairs, strict=True)):
        status = Status(result.status[i].item())
        if member.fault:
            assert status == FAULTS[member.fault]
            assert all(torch.isnan(x[i]).all() for x in (result.values, result.vectors, result.backward_errors))
            continue
        assert status & OUTCOMES and not status & (Status.NOT_POSITIVE_DEFINITE | Status.NON_FINITE)
        if status & Status.CONVERGED:
            check_pairs(*pair, result, i)
        converged.append(bool(status & Status.CONVERGED))
    return converged


def check_pairs(a: np.ndarray, b: np.ndarray, result: EigenResult, i: int) -> None:
    """Backward errors, B-orthogonality, and the k largest λ, each to 10√n·eps times its condition.

    Of λ this is ‖A‖‖B⁻¹‖ + cond(B)|λ|, the bound for LAPACK's own (Anderson et al. 1999, sec. 4.10);
    of vᵀBv it is ‖B‖‖v‖². λ_k and λ_(k+1) may be called a cluster only if they are as close.
    """
    n, unit = len(a), 10 * len(a) ** 0.5 * np.finfo(a.dtype).eps
    a, b = a.astype(float), b.astype(float)
    w, v = (x[i].numpy(force=True).astype(float) for x in (result.values, result.vectors))
    k = len(w)
    a_norm, b_norm = (np.linalg.norm(x, 2) for x in (a, b))
    length = np.linalg.norm(v, axis=0)
    backward = np.linalg.norm(a @ v - b @ v * w, axis=0) / ((a_norm + np.abs(w) * b_norm) * length)
    assert backward.max() <= 5 * unit  # solve accepts ten times its tolerance 4√n·eps
    assert np.abs(v.T @ b @ v - np.eye(k)).max() <= unit * b_norm * length.max() ** 2
    expected = scipy.linalg.eigvalsh(a, b)[::-1]
    inverse_norm = 1 / np.linalg.eigvalsh(b)[0]
    bar = unit * (a_norm + b_norm * np.abs(expected)) * inverse_norm
    assert (np.abs(w - expected[:k]) <= bar[:k]).all()
    if result.status[i].item() & Status.CLUSTER_AT_K:
        assert k < n and expected[k - 1] - expected[k] <= 2 * bar[0] + n * unit * np.abs(expected[0])


@pytest.mark.parametrize("method", METHODS)
@EXAMPLES
@given(batch=batches((0, 8), 4))
def test_the_largest_pairs_converge(method, device, batch):
    assert all(check(batch, method, device))


@pytest.mark.parametrize("method", METHODS)
def test_99_percent_converge_near_singularity(method, device):
    converged: list[bool] = []

    @EXAMPLES
    @given(batch=batches((8, 12), 4))
    def draw(batch: Batch) -> None:
        converged.extend(check(batch, method, device))

    draw()
    assert np.mean(converged) >= 0.99


@pytest.mark.parametrize("method", METHODS)
@EXAMPLES
@given(batch=batches((0, 12), 1))
def test_any_number_of_pairs_is_called_what_it_is(method, device, batch):
    """Small λ beside λ₁ ≈ ‖A‖‖B⁻¹‖ may stagnate, and must then say so."""
    check(batch, method, device)
