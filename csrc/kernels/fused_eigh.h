// Generalized eigenproblems of many small symmetric pencils at once, all pairs of each:
//     A v = λ B v,  λ ascending,  Vᵀ B V = I
// by B = L Lᵀ, C = L⁻¹ A L⁻ᵀ = Y Λ Yᵀ, V = L⁻ᵀ Y.
// Layout      A, B (batch, n, n), only the lower triangles are read, any strides; values (batch, n), vectors
//             (batch, n, n), dense, vector j of a member in its row j; info (batch). No overlap; the caller owns all.
// Faults      info, see FusedInfo: such a member's values and vectors are NaN, and no other member is touched.
// CPU         a thread owns groups of as many members as a vector register has float64 lanes, one member to a lane:
//             Cholesky, congruence, Householder tridiagonalisation, implicit QL with vectors (Martin & Wilkinson
//             1968), back substitution. All lanes take the same steps; a rotation is the identity in those that do
//             not need it. float32 members are solved in float64. About 10 n³ flops a member, workspace
//             3 n² vectors a thread, for n up to kFusedLanesLimit.
// CUDA        a block of threads owns a member in its shared memory: cyclic two-sided Jacobi (fused_eigh_block.h).
// Deterministic: a member's bits depend on its own data and the instruction set alone.
// Reference   sst_kernels/reference.py, fused_eigh.
#pragma once

#include <atomic>
#include <cstdint>

namespace sst {

enum FusedInfo : int32_t { kFusedOk = 0, kFusedIndefinite = 1, kFusedNotFinite = 2, kFusedNotConverged = 3 };

// Element (i, j) of member m at data[m · batch + i · row + j · col].
template <class T>
struct Matrices {
  const T* data;
  int64_t batch, row, col;
};

template <class T>
struct FusedEigh {
  Matrices<T> a, b;
  T *values, *vectors;
  int32_t* info;
  int64_t batch, n;
};

// Up to here, and it has not been tried beyond, full groups of eight beat LAPACK twice (float64, EPYC of Zen 5 class).
constexpr int64_t kFusedLanesLimit = 256;

// One thread's share, by an instruction set of panel.h: it takes groups of fused_eigh_lanes(set) members from `next`
// until none is left. n >= 1.
int64_t fused_eigh_lanes(int set);
template <class T>
void fused_eigh_cpu(int set, const FusedEigh<T>& args, std::atomic<int64_t>& next);

// On the current device: the largest n, and the launch; throw std::runtime_error if CUDA does. `stream` is a
// cudaStream_t.
template <class T>
int64_t fused_eigh_cuda_limit();
template <class T>
void fused_eigh_cuda(const FusedEigh<T>& args, void* stream);

}  // namespace sst
