"""Peak memory of the methods, beside what their docstrings state: of a process of its own, by its high-water mark."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import torch
from sst_kernels import Damped, Kronecker, Pencil, Sum, eigh, solve

kind, n = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)

def covariance(n):
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return (q / torch.arange(1, n + 1)) @ q.mT

def pencil(n):
    a, b = covariance(n), covariance(n)
    if kind != "kronecker":
        return Pencil(a, b + 1e-3 * torch.eye(n))
    right = covariance(8)
    return Pencil(Sum([Kronecker(a, right), Kronecker(b, right)]), Damped(Kronecker(b, right), 1e-3))

def high_water():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

def run(pencil):
    if kind == "eigh":
        eigh(pencil.A.matrix, pencil.B.matrix)
    else:
        method = "dense" if kind == "dense" else "davidson"
        assert solve(pencil, 4, method=method, verify=False).converged.all()

run(pencil(64))  # what libraries load at first
problem = pencil(n)
open("/proc/self/clear_refs", "w").write("5")  # the mark falls to what is held now
before = high_water()
run(problem)
print(high_water() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's high-water mark")
@pytest.mark.parametrize(
    ("kind", "n", "entries"),
    [
        ("dense", 1000, 9 * 1000**2),  # `dense`: nine n²
        ("eigh", 1000, 9 * 1000**2),  # `eigh`: nine n²
        ("davidson", 1500, 1500**2 / 2 + 3 * 24 * 1500),  # the float32 factor, and 3 (capacity + k) n
        ("kronecker", 1024, 10 * 1024**2 + 3 * 24 * 8192),  # the eigenbasis of B, of whose n² this is a fiftieth
    ],
)
def test_peak_memory_is_what_the_docstrings_state(kind: str, n: int, entries: float) -> None:
    command = [sys.executable, "-c", CODE, kind, str(n)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed is given back at once
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    spare = 5e6  # of allocators and libraries
    assert int(run.stdout) <= 8 * entries + spare
