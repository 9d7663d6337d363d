"""`fused_eigh` against a float64 solve of the same pencil: accuracy, faults, strides, what torch must know."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from sst_kernels import fused_eigh, fused_eigh_limit, reference

NAN = float("nan")
WIDE = [torch.float32, torch.float64]
Maker = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(params=WIDE, ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def pencils(device: torch.device, dtype: torch.dtype) -> Maker:
    """Maker of (A, B): A symmetric and indefinite, B with eigenvalues from 1 to 100."""

    def make(*shape: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(sum(shape))
        n = shape[-1]
        x, y = (torch.randn(*shape, n, generator=generator).double() for _ in range(2))
        q = torch.linalg.qr(y)[0]
        b = (q * torch.logspace(0, 2, n).double()) @ q.mT
        return (x + x.mT).to(device, dtype), ((b + b.mT) / 2).to(device, dtype)

    return make


def skip_beyond_limit(like: Tensor) -> None:
    """CUDA's shared memory holds no larger pencil."""
    if like.shape[-1] > fused_eigh_limit(like):
        pytest.skip(f"n = {like.shape[-1]} is beyond this device's shared memory")


def lower_only(x: Tensor) -> Tensor:
    return x.masked_fill(torch.ones_like(x).triu(1).bool(), NAN)


def check(A: Tensor, B: Tensor, values: Tensor, vectors: Tensor) -> None:
    """Backward error 4√n·eps, |VᵀBV − I| likewise times √cond(B), values as a float64 solve has them."""
    n, eps = A.shape[-1], torch.finfo(A.dtype).eps
    assert values.dtype == vectors.dtype == A.dtype and vectors.shape == A.shape
    a, b, w, v = (x.double().cpu() for x in (A, B, values, vectors))
    expected, _, _ = reference.fused_eigh(A, B)
    assert (w.diff(dim=-1) >= 0).all()
    norm_a, norm_b = (torch.linalg.matrix_norm(x, 2)[..., None] for x in (a, b))
    cond = torch.linalg.cond(b)[..., None]
    tolerance = 4 * n**0.5 * eps
    residual = torch.linalg.vector_norm(a @ v - b @ v * w[..., None, :], dim=-2)
    assert (residual <= tolerance * (norm_a + w.abs() * norm_b) * torch.linalg.vector_norm(v, dim=-2)).all()
    assert ((v.mT @ b @ v - torch.eye(n)).abs().amax(-1) <= tolerance * cond.sqrt()).all()
    size = norm_a / torch.linalg.eigvalsh(b)[..., :1]
    assert ((w - expected).abs() <= tolerance * size).all()


@pytest.mark.sanitize
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (17, 5), (2, 5, 24), (9, 33), (1, 64), (8, 61)])
def test_pairs(shape: tuple[int, ...], pencils: Maker) -> None:
    A, B = pencils(*shape)
    values, vectors, info = fused_eigh(lower_only(A), lower_only(B))
    assert info.shape == shape[:-1] and info.dtype == torch.int32 and not info.any()
    check(A, B, values, vectors)


@pytest.mark.parametrize("shape", [(2, 70), (9, 70), (3, 130), (8, 256)])
def test_larger_pairs(shape: tuple[int, int], pencils: Maker) -> None:
    A, B = pencils(*shape)
    skip_beyond_limit(A)
    values, vectors, info = fused_eigh(lower_only(A), lower_only(B))
    assert not info.any()
    check(A, B, values, vectors)


@pytest.mark.parametrize(("lanes", "n"), [(9, 12), (4, 130)])
def test_faults_stay_in_their_own_slot(lanes: int, n: int, pencils: Maker) -> None:
    A, B = pencils(lanes, n)
    skip_beyond_limit(A)
    clean = fused_eigh(A, B)
    A[0, n - 1, 0] = NAN
    B[1, 1, 1] = -1.0
    B[2, 2, 0] = torch.inf
    values, vectors, info = fused_eigh(A, B)
    assert info.tolist() == [2, 1, 2] + [0] * (lanes - 3)
    assert values[:3].isnan().all() and vectors[:3].isnan().all()
    assert torch.equal(values[3:], clean[0][3:]) and torch.equal(vectors[3:], clean[1][3:])


def test_results_that_overflow(device: torch.device, dtype: torch.dtype) -> None:
    top, n = torch.finfo(dtype).max, 4
    A = torch.eye(n, device=device, dtype=dtype).repeat(2, 1, 1)
    B = A.clone()
    A[0] *= 0.9 * top
    B[0] *= 0.1
    values, _, info = fused_eigh(A, B)
    assert info.tolist() == [2, 0] and values[0].isnan().all() and (values[1] == 1).all()


@pytest.mark.parametrize("n", [1, 6, 33, 230])
def test_special_matrices(n: int, device: torch.device, dtype: torch.dtype) -> None:
    """Zero, identity, repeated eigenvalues, rank one, diagonal and graded both ways."""
    eye = torch.eye(n, dtype=torch.float64)
    u = torch.linspace(1, 2, n).double()
    reflector = eye - 2 * torch.outer(u, u) / u.dot(u)
    two_valued = reflector @ torch.diag((torch.arange(n) % 2).double()) @ reflector
    graded = torch.logspace(-12, 12, n).double()
    rough = 1 / (1 + torch.arange(n).double()[:, None] + torch.arange(n))
    scaled = rough * torch.outer(graded.sqrt(), graded.sqrt())
    A = torch.stack([0 * eye, eye, two_valued, torch.outer(u, u), torch.diag(graded), scaled, scaled.flip(0, 1)])
    A = ((A + A.mT) / 2).to(device, dtype)
    skip_beyond_limit(A)
    B = eye.to(device, dtype).expand_as(A)
    values, vectors, info = fused_eigh(A, B)
    assert not info.any()
    check(A, B, values, vectors)
    assert (values[0] == 0).all()
    torch.testing.assert_close(
        values[4].cpu(), graded.to(dtype), rtol=4e-7 if dtype == torch.float32 else 1e-15, atol=0
    )


def test_extreme_scales(pencils: Maker, dtype: torch.dtype) -> None:
    A, B = pencils(4, 10)
    big = 1e150 if dtype == torch.float64 else 1e18
    factors = torch.tensor([[big, big], [1 / big, 1 / big], [1.0, big], [1 / big, big]], dtype=dtype, device=A.device)
    values, _, info = fused_eigh(A * factors[:, :1, None], B * factors[:, 1:, None])
    assert not info.any()
    ratio = factors[:, 0] / factors[:, 1]
    expected = fused_eigh(A, B)[0].double() * ratio.double()[:, None]
    allowed = 200 * torch.finfo(dtype).eps * expected.abs().amax(-1, keepdim=True)
    assert ((values.double() - expected).abs() <= allowed).all()


def test_ill_conditioned(device: torch.device) -> None:
    """As accurate as LAPACK's xSYGVD where B is ill-conditioned."""
    rng = np.random.default_rng(0)
    q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    B = (q * np.logspace(0, -10, 40)) @ q.T
    A = (q * np.logspace(0, -6, 40)) @ q.T + 1e-8 * (lambda x: x + x.T)(rng.standard_normal((40, 40)))
    A, B = (A + A.T) / 2, (B + B.T) / 2

    def error(w: np.ndarray, v: np.ndarray) -> float:
        scale = np.linalg.norm(A, 1) + np.abs(w).max() * np.linalg.norm(B, 1)
        return float(np.linalg.norm(A @ v - B @ v * w, 1) / (scale * np.linalg.norm(v, 1)))

    values, vectors, info = fused_eigh(*(torch.from_numpy(x).to(device).expand(9, 40, 40) for x in (A, B)))
    assert not info.any()
    ours, theirs = error(values[0].numpy(force=True), vectors[0].numpy(force=True)), error(*scipy.linalg.eigh(A, B))
    assert ours <= max(10 * theirs, 400 * np.finfo(float).eps)


@pytest.mark.sanitize
def test_strides_and_expanded_matrices(pencils: Maker) -> None:
    A, B = pencils(2, 5, 7)
    expected = fused_eigh(A, B[:1, :1].expand_as(B).contiguous())
    frame = torch.full((5, 2, 7, 21), NAN, device=A.device, dtype=A.dtype)
    frame[..., 1::3] = A.transpose(0, 1)
    found = fused_eigh(frame[..., 1::3].transpose(0, 1), B[:1, :1].mT.expand_as(B))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_batch_does_not_change_a_pencil(pencils: Maker) -> None:
    A, B = pencils(19, 30)
    together = fused_eigh(A, B)
    parts = [fused_eigh(A[i : i + 9], B[i : i + 9]) for i in (0, 9)]
    for x, y in zip(together, zip(*parts, strict=True), strict=True):
        assert torch.equal(x[:18], torch.cat(y))


@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4, 4), (2, 0, 0), (0, 0)])
def test_empty(shape: tuple[int, ...], device: torch.device) -> None:
    values, vectors, info = fused_eigh(*(torch.zeros(shape, device=device) for _ in range(2)))
    assert values.shape == shape[:-1] and vectors.shape == shape and info.shape == shape[:-2]
    assert not info.any()


@pytest.mark.parametrize(
    ("A", "B", "message"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 4), r"A must be \(…, n, n\), got \(3, 4\)"),
        (torch.zeros(3), torch.zeros(3, 3), r"A must be \(…, n, n\), got \(3,\)"),
        (torch.zeros(3, 3), torch.zeros(2, 3, 3), r"one shape, got \(3, 3\) and \(2, 3, 3\); .*expand"),
        (torch.zeros(3, 3).half(), torch.zeros(3, 3).half(), r"A must be float32 or float64, got float16"),
        (torch.zeros(3, 3), torch.zeros(3, 3).double(), r"B must be float32 as A, got float64"),
    ],
)
def test_refusals(A: Tensor, B: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^fused_eigh: .*{message}"):
        fused_eigh(A, B)


def test_gradients_are_refused_with_advice() -> None:
    A = torch.eye(3, requires_grad=True)
    with pytest.raises(ValueError, match=r"fused_eigh: A requires a gradient.*sst_kernels\.eigh or sst_kernels\.solve"):
        fused_eigh(A, torch.eye(3))
    with torch.no_grad():
        assert not fused_eigh(A, torch.eye(3))[0].requires_grad
        assert not fused_eigh(torch.eye(70).requires_grad_(), torch.eye(70))[1].requires_grad


@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 4, 4), (2, 70, 70)])
def test_opcheck(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> None:
    eye = torch.eye(shape[-1], device=device, dtype=dtype).expand(shape)
    torch.library.opcheck(torch.ops.sst_kernels.fused_eigh.default, (eye * 2, eye))


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 2), (3, None), (None, 0)])
def test_vmap(in_dims: tuple[int | None, int | None], pencils: Maker) -> None:
    A, B = pencils(4, 2, 5)
    expected = fused_eigh(
        A if in_dims[0] is not None else A[:1].expand_as(A), B if in_dims[1] is not None else B[:1].expand_as(B)
    )
    moved = [x[0] if dim is None else x.movedim(0, dim) for x, dim in zip((A, B), in_dims, strict=True)]
    found = torch.vmap(fused_eigh, in_dims=in_dims)(*moved)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_limit(device: torch.device, dtype: torch.dtype) -> None:
    """At least 128 and 96 where blocks have 227 KiB of shared memory, 128 and 64 where they have 163."""
    limit = fused_eigh_limit(torch.empty(0, device=device, dtype=dtype))
    assert limit >= (128 if dtype == torch.float32 else 64)
    if device.type == "cuda":
        with pytest.raises(ValueError, match=rf"n must be at most {limit} .* got {limit + 1}; use sst_kernels\.eigh"):
            fused_eigh(*(torch.eye(limit + 1, device=device, dtype=dtype) for _ in range(2)))
