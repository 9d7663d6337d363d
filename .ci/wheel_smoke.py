"""Imports the given modules in their order, then compares ops of every family with plain torch (`.ci/wheel-check`)."""

from __future__ import annotations

import importlib
import sys

for name in sys.argv[1:]:
    importlib.import_module(name)

import torch  # noqa: E402  (after the imports under test)
from torch.testing import assert_close  # noqa: E402

import sst_kernels as k  # noqa: E402

torch.manual_seed(0)
a, b = torch.randn(40, 5), torch.randn(40, 3)
cu = torch.tensor([0, 15, 40])
rows = torch.stack([(b[s:e].T @ a[s:e]).flatten() for s, e in ((0, 15), (15, 40))])
assert_close(k.khatri_rao_rows(a, b, cu), rows)

S, A, G, F = (torch.zeros(n, n) for n in (5, 5, 3, 15))
counts = torch.zeros(2, dtype=torch.float64)
k.syrk_accumulate_(S, a)
k.grouped_syrk_accumulate_([S], [a])
k.kron_accumulate_(A, G, counts, a, b)
k.khatri_rao_syrk_accumulate_(F, a, b, cu)
for matrix in (S, A, G, F):
    k.symmetrize_(matrix)
assert_close((S, A, G, F), (2 * a.T @ a, a.T @ a, b.T @ b, rows.T @ rows), rtol=1e-5, atol=1e-5)
assert counts.tolist() == [40, 40]
assert torch.equal(k.unpack_lower(k.pack_lower(S)), S)
assert_close(k.symm_thin(S, S[:, :2]), S @ S[:, :2])
assert k.top_mask(a, 20).sum() == 20
assert torch.equal(a[k.top_mask(a, 20)].sort().values, a.flatten().topk(20).values.flip(0))

x, y = (torch.randn(2, 12, 20, dtype=torch.float64) for _ in range(2))
M, N = x @ x.mT, y @ y.mT + torch.eye(12, dtype=torch.float64)
L = torch.linalg.cholesky(N)
reduced = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, M, upper=False).mT, upper=False)
exact = torch.linalg.eigvalsh(reduced)
assert_close(k.fused_eigh(M, N)[0], exact)
assert_close(k.eigh(M, N)[0], exact)
found = k.solve(k.Pencil(k.Dense(M), k.Dense(N)), k=2, method="davidson")
assert_close(found.values, exact.flip(-1)[:, :2])
cuda = k.build_info()["cuda"] or "no"
print(f"{' then '.join(sys.argv[1:])}: torch {torch.__version__}, {cuda} CUDA in the wheel: right")
