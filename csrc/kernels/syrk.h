// syrk_accumulate_ and its group: for every product of a group, and every member of its batch, the lower triangle of
//     S[i, j] ← β S[i, j] + α Σ_t w_t x[t, i] x[t, j],   j <= i.
//
// Layout      x (batch, tokens, d): rows and batch members any distance apart, elements of a row adjacent. weight
//             (batch, tokens), tokens adjacent, or null for ones; a token of weight 0 is not read. S: the lower
//             triangle of (batch, d, d), rows of adjacent elements any distance apart, or packed rows: element
//             (i, j) at i (i + 1) / 2 + j. No two elements of any S at one address, apart from every x and weight.
//             The caller owns all memory, the workspace included.
// Written     the lower triangle, diagonal included; never a byte of the upper. β = 0 overwrites without reading.
// Schedule    TriangleSchedule: a unit is one tile of one member for one range of tokens. With one split it writes S;
//             with several it writes its partial tile to the workspace, and the tiles are then summed in order.
// CPU         a thread owns a unit (then a tile), in panels of panel.h; scratch about 1 MiB a thread. Wide products go
//             by slabs (below); their workspace is about 16 MiB, 32 MiB with weights.
// CUDA        a block of threads owns a unit (then some rows of a tile); see syrk_block.h.
// Precision   half, bfloat16: products exact, sums in float32. float32: fused multiply-add in float32, or on CUDA what
//             `precision` allows. float64: float64.
// Determinism every element is summed in an order that depends on the group's shapes and the instruction set alone:
//             bit-identical between runs, whatever the number of threads.
// Cost        tokens · d · (d + 1) flops a member, half a tile more on the diagonal; reads x once a tile row and
//             column, S once, writes S once.
// Reference   sst_kernels/reference.py, syrk_accumulate_.
#pragma once

#include <atomic>
#include <vector>

#include "schedule.h"

namespace sst {

// The lower triangles of a batch of matrices.
template <class A>
struct LowerTriangle {
  A* data;
  int64_t batch_stride, row_stride;  // row_stride 0: packed

  SST_HOST_DEVICE A* row(int64_t member, int64_t i) const {
    return data + member * batch_stride + (row_stride ? i * row_stride : triangle_count(i));
  }
};

// What float32 elements may be rounded to before they are multiplied (a permission: the CPU kernel ignores it).
enum class Precision { ieee, tf32, bf16x3 };

template <class T>
struct Syrk {
  LowerTriangle<Accumulator<T>> s;
  Rows<T> x;  // of the first member; x.cols is d
  int64_t x_batch_stride;
  const Accumulator<T>* weight;
  int64_t weight_batch_stride;
  Accumulator<T> alpha, beta;
};

// Columns up to which a product is one tile of the CPU kernel.
constexpr int64_t kSyrkNarrow = 256;

// A group with its schedules, one for each product, and a workspace of GroupTotals::workspace elements.
template <class T>
struct SyrkGroup {
  const Syrk<T>* products;
  const TriangleSchedule* schedules;
  int64_t count;
  Accumulator<T>* workspace;
  GroupTotals totals;
};

// Sets the tiles of a group's schedules for the kernel below, and cuts them; members, d and tokens are given.
GroupTotals schedule_syrk_cpu(TriangleSchedule* schedules, int64_t count);
template <class T>
GroupTotals schedule_syrk_cuda(TriangleSchedule* schedules, int64_t count);

// CPU, products of at most kSyrkNarrow columns, one tile each. One thread's share: it takes units (then tiles) from
// `next` until none is left. `syrk_sum_cpu` starts when all units are done, and only if there is a workspace.
template <class T>
void syrk_units_cpu(const SyrkGroup<T>& group, std::atomic<int64_t>& next);
template <class T>
void syrk_sum_cpu(const SyrkGroup<T>& group, std::atomic<int64_t>& next);

// CPU, wider products, whose columns take part in many tiles: a slab holds all columns of one member for some tokens,
// packed once by all threads and read by all tiles. Slabs form cohorts that share the workspace and are worked on
// together, step after step through their tokens: for each step, pack, then multiply, then the next.
template <class T>
struct SyrkSlab {
  const Syrk<T>* product = nullptr;
  int64_t member = 0, tokens = 0, tile = 0;
  int64_t blocks = 0, packed = 0;          // blocks of tokens in a step; where it lies in the workspace
  int64_t first_pack = 0, first_tile = 0;  // its units of packing and of multiplying, counted through the cohort
};
template <class T>
struct SyrkCohort {
  std::vector<SyrkSlab<T>> slabs;
  int64_t steps = 0, pack_units = 0, tile_units = 0, workspace = 0;  // the last in elements
};
// `products` and `schedules` as in SyrkGroup; of the schedules only members, d and tokens are read.
template <class T>
std::vector<SyrkCohort<T>> syrk_cohorts_cpu(const Syrk<T>* products, const TriangleSchedule* schedules, int64_t count);
// One thread's share of a step. `workspace` is 64-byte aligned.
template <class T>
void syrk_pack_cpu(const SyrkCohort<T>& cohort, int64_t step, Accumulator<T>* workspace, std::atomic<int64_t>& next);
template <class T>
void syrk_multiply_cpu(const SyrkCohort<T>& cohort, int64_t step, const Accumulator<T>* workspace,
                       std::atomic<int64_t>& next);

// All of it, in stream order. Throws std::runtime_error if a launch fails. `stream` is a cudaStream_t.
template <class T>
void syrk_accumulate_cuda(const SyrkGroup<T>& group, Precision precision, void* stream);

}  // namespace sst
