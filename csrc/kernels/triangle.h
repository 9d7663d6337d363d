// Lower triangles of square matrices: mirrored, packed, unpacked. Packed means rows one after another without the
// upper triangle: element (i, j), j <= i, at i (i + 1) / 2 + j.
//     symmetrize   S[j, i] ← S[i, j], j < i: the upper triangle is overwritten unread
//     pack         P[i (i + 1) / 2 + j] ← S[i, j]
//     unpack       S[i, j], S[j, i] ← P[i (i + 1) / 2 + j]
// Layout      S (batch, d, d), rows of adjacent elements any distance apart; P (batch, d (d + 1) / 2), members any
//             distance apart, elements adjacent. S and P do not overlap; the caller owns both.
// CPU         a thread owns bands of kTriangleBand rows.
// CUDA        a block of threads owns a 32 × 32 tile, transposed in shared memory.
// Cost        reads and writes d (d + 1) / 2 elements (unpack writes d²) a member. Exact copies: deterministic.
// Reference   sst_kernels/reference.py, symmetrize_, pack_lower, unpack_lower.
#pragma once

#include <atomic>

#include "schedule.h"

namespace sst {

constexpr int64_t kTriangleBand = 32;

template <class A>
struct Triangle {
  A* square;
  int64_t square_batch_stride, square_row_stride;
  A* packed;  // null for symmetrize
  int64_t packed_batch_stride;
  int64_t batch, d;
};

enum class TriangleCopy { symmetrize, pack, unpack };

// One thread's share: it takes bands from `next` until none is left.
inline int64_t triangle_bands(int64_t batch, int64_t d) { return batch * ceil_div(d, kTriangleBand); }
template <class A>
void copy_triangle_cpu(const Triangle<A>& args, TriangleCopy what, std::atomic<int64_t>& next);

// Throws std::runtime_error if the launch fails. `stream` is a cudaStream_t.
template <class A>
void copy_triangle_cuda(const Triangle<A>& args, TriangleCopy what, void* stream);

}  // namespace sst
