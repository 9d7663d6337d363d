// _residual: for every row (vector) of a batch of blocks of vectors, in one pass,
//     r = Ax − θ Bx   and   ‖r‖², ‖Ax‖², ‖Bx‖², ‖x‖².
//
// Layout      AX, BX, X (batch, rows, n): elements of a row adjacent, rows and members any distance apart; θ (batch,
//             rows) float64, any strides. R (batch, rows, n) and norms (batch, rows, 4) float64, dense, apart from all
//             that is read. The caller owns all memory.
// CPU         a thread owns a row. CUDA: a block of threads owns a row.
// Precision   all arithmetic in float64; R is rounded to its type, and ‖r‖² is that of the R written.
// Determinism sums in an order that depends on n and the instruction set alone: bit-identical between runs.
// Cost        reads 3 n, writes n elements a row; 9 n flops.
// Reference   sst_kernels/reference.py, residual.
#pragma once

#include <atomic>
#include <cstdint>

#include "panel.h"

namespace sst {

// Rows of adjacent elements.
template <class T>
struct Vectors {
  const T* data;
  int64_t batch_stride, row_stride;

  SST_HOST_DEVICE const T* at(int64_t member, int64_t row) const {
    return data + member * batch_stride + row * row_stride;
  }
};

template <class T>
struct Residual {
  Vectors<T> ax, bx, x;
  Vectors<double> theta;  // of one element a row
  T* r;
  double* norms;
  int64_t batch, rows, n;
};
constexpr int kResidualNorms = 4;

// One thread's share: it takes rows from `next` until none is left.
template <class T>
void residual_cpu(const Residual<T>& args, std::atomic<int64_t>& next, int set = instruction_set_in_use());

// Throws std::runtime_error if the launch fails. `stream` is a cudaStream_t.
template <class T>
void residual_cuda(const Residual<T>& args, void* stream);

}  // namespace sst
