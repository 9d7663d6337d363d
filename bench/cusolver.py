"""NVIDIA's own eigensolvers on tensors: the cuSOLVER library that torch has loaded, through ctypes."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

_EIG_TYPE_1, _VECTORS, _RANGE_I, _LOWER, _REAL_32F = 1, 1, 1002, 0, 0


def _pointer(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


class CuSolver:
    """A handle on the current device and stream. Every call raises RuntimeError if cuSOLVER reports a failure."""

    def __init__(self) -> None:
        torch.linalg.eigh(torch.eye(2, device="cuda"))  # loads the library
        loaded = {
            line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libcusolver.so" in line
        }
        if not loaded:
            raise RuntimeError("libcusolver is not loaded by this torch")
        self.library = ctypes.CDLL(loaded.pop())
        self.handle, self.params = c_void_p(), c_void_p()
        self._call("cusolverDnCreate", byref(self.handle))
        self._call("cusolverDnCreateParams", byref(self.params))
        self._call("cusolverDnSetStream", self.handle, c_void_p(torch.cuda.current_stream().cuda_stream))

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self.library, name)(*arguments)
        if status:
            raise RuntimeError(f"{name} returned status {status}")

    def sygvdx(self, a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k largest pairs of each pencil (N, n, n), float32, one call after the other.

        Returns:
            Values (N, k), descending, and vectors (N, n, k).
        """
        n = a.shape[-1]
        a, b = a.clone(), b.clone()  # both are overwritten
        values = torch.empty(len(a), n, device=a.device)
        info = torch.empty(len(a), dtype=torch.int32, device=a.device)
        found, size = c_int(), c_int()
        wanted = (c_float(0), c_float(0), c_int(n - k + 1), c_int(n), byref(found))
        job = (self.handle, c_int(_EIG_TYPE_1), c_int(_VECTORS), c_int(_RANGE_I), c_int(_LOWER), c_int(n))

        def pencil(i: int) -> tuple[object, ...]:
            return (*job, _pointer(a[i]), c_int(n), _pointer(b[i]), c_int(n), *wanted, _pointer(values[i]))

        self._call("cusolverDnSsygvdx_bufferSize", *pencil(0), byref(size))
        work = torch.empty(max(1, size.value), device=a.device)
        for i in range(len(a)):
            self._call("cusolverDnSsygvdx", *pencil(i), _pointer(work), size, _pointer(info[i]))
        # column j of the column-major A is row j of the tensor
        return values[:, :k].flip(-1), a[:, :k].mT.flip(-1)

    def xsyev_batched(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """All pairs of symmetric C (N, n, n), float32, which is overwritten, in one call.

        Returns:
            Values (N, n), ascending, and vectors (N, n, n).
        """
        batch, n, _ = c.shape
        values = torch.empty(batch, n, device=c.device)
        info = torch.empty(batch, dtype=torch.int32, device=c.device)
        on_device, on_host, real = c_size_t(), c_size_t(), c_int(_REAL_32F)
        job = (self.handle, self.params, c_int(_VECTORS), c_int(_LOWER), c_int64(n), real, _pointer(c), c_int64(n))
        job = (*job, real, _pointer(values), real)
        self._call("cusolverDnXsyevBatched_bufferSize", *job, byref(on_device), byref(on_host), c_int64(batch))
        work = torch.empty(max(1, on_device.value), dtype=torch.uint8, device=c.device)
        host = ctypes.create_string_buffer(max(1, on_host.value))
        self._call(
            "cusolverDnXsyevBatched", *job, _pointer(work), on_device, host, on_host, _pointer(info), c_int64(batch)
        )
        return values, c.mT
