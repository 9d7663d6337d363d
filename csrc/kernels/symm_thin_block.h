// The CUDA kernels of symm_thin.h, for a block of threads: a unit, and the sum of the units' partial products.
//
// Unit        SymmThinGrid::rows rows of A, and four strips of its columns, a strip for each warp (128 columns, in
//             float64 64), times eight columns of X. Four rows at a time, a lane holds one vector of 16 bytes of each
//             row, x_j and the sums y_j of these columns in registers, and reads x_i from shared memory. Its parts of
//             y_i are added up across the warp.
// Sums        each unit leaves its y_i and y_j in the workspace; a second launch adds them in order.
// Memory      40 KiB of shared memory at most; no register is spilled. A is read once for every eight columns of X, by
//             units that follow each other, so that all but the first find it in the L2 cache.
#pragma once

#include "block.h"
#include "symm_thin.h"

namespace sst::cuda {

// How a product is cut: depends on its shapes alone.
template <class T>
struct SymmThinGrid {
  static constexpr int kWarps = 4, kThreads = kWarps * kWarp;
  static constexpr int kCols = 8, kPerLane = 16 / static_cast<int>(sizeof(T)), kStrip = kWarp * kPerLane;
  static constexpr int kBatch = 4, kBand = 128;  // rows in registers, rows in shared memory
  static constexpr int kSharedBytes = (1 + kWarps) * kBand * kCols * static_cast<int>(sizeof(T));
  static constexpr int kResident = sizeof(T) == 4 ? 3 : 2;  // blocks a multiprocessor
  static constexpr int64_t kLeastRows = 32, kMostRows = 512, kTargetWarps = 4096;

  int64_t n, rows, row_bands, strip_groups, groups;

  explicit SymmThinGrid(const SymmThin<T>& product)
      : n(product.n), rows(kMostRows), groups(ceil_div(product.m, kCols)) {
    const int64_t lower = product.members * product.matrices * groups * n * n / 2;
    while (rows > kLeastRows && lower / (rows * kStrip) < kTargetWarps) rows /= 2;
    row_bands = ceil_div(n, rows);
    strip_groups = ceil_div(n, kWarps * kStrip);
  }

  SST_HOST_DEVICE int64_t units_each() const { return row_bands * strip_groups * groups; }  // of one matrix
  // What a unit leaves, by rows of kCols: first those of its rows of A, then those of its columns.
  SST_HOST_DEVICE int64_t partial() const { return (rows + kWarps * kStrip) * kCols; }
  SST_HOST_DEVICE int64_t unit(int64_t band, int64_t strips, int64_t group) const {
    return (band * strip_groups + strips) * groups + group;
  }
};

// A lane's order of the four rows of a batch and of the eight columns: the one at place p is p ^ the lane's own bits.
// So that adding up across the warp takes no selection: what a lane sends always lies in the upper half of its places,
// and in the end lane l has the sum of row l / 8, column l % 8.
SST_DEVICE int own_row(int lane) { return lane / 8; }
SST_DEVICE int own_col(int lane) { return lane % 8 & 6; }

template <class T, class Block>
struct SymmThinUnit {
  using Grid = SymmThinGrid<T>;
  static constexpr int kCols = Grid::kCols, kPerLane = Grid::kPerLane, kBatch = Grid::kBatch, kSize = sizeof(T);

  struct Columns {
    T value[kPerLane][kCols];
  };
  struct Products {
    T value[kBatch][kCols];
  };
  struct Elements {
    T value[kBatch][kPerLane];
  };
  using Pair = Chunk<T, 2>;

  Strided<const T> x;  // of the member, from the group's first column on
  const T* a;
  int64_t a_stride;
  int n, first_row, end_row, first_strip, cols;  // cols: of X that exist
  T* partial;

  Each<Block, Columns> xj, yj;
  Each<Block, Products> yi;
  Each<Block, Elements> current, next;

  SST_DEVICE int strip(int t) const { return first_strip + t / kWarp * Grid::kStrip; }
  SST_DEVICE int col(int t) const { return strip(t) + t % kWarp * kPerLane; }
  SST_DEVICE static int place_x(int row, int c) { return (row * kCols + c) * kSize; }
  SST_DEVICE static int place_y(int warp, int row, int c) { return place_x((1 + warp) * Grid::kBand + row, c); }
  // Whether a batch of rows has elements of the warp's strip on or below the diagonal; and whether others too.
  SST_DEVICE bool takes_part(int t, int row) const { return row + kBatch > strip(t) && strip(t) < n; }
  SST_DEVICE bool masked(int t, int row) const { return row < strip(t) + Grid::kStrip || row + kBatch > n; }

  SST_DEVICE void start(Block& block) {
    block.each([&](int t) {
      SST_UNROLL
      for (int v = 0; v < kPerLane; ++v) {
        const int j = col(t) + v;
        SST_UNROLL
        for (int c = 0; c < kCols; ++c) {
          const int from = c ^ own_col(t % kWarp);
          xj[t].value[v][c] = j < n && from < cols ? x.data[j * x.row_stride + from * x.col_stride] : 0;
          yj[t].value[v][c] = 0;
        }
      }
    });
  }

  // x_i of the rows from `band` on, to shared memory.
  SST_DEVICE void load_band(Block& block, int band, int rows) {
    block.each([&](int t) {
      for (int e = t; e < rows * kCols; e += Grid::kThreads) {
        const int i = band + e / kCols;
        const int c = e % kCols;
        block.store(t, e * kSize, i < n && c < cols ? x.data[i * x.row_stride + c * x.col_stride] : T(0));
      }
    });
  }

  // A lane's elements of four rows; 0 above the diagonal and outside, where nothing is read.
  template <bool whole>
  SST_DEVICE void load_batch(int t, int row) {
    if (!takes_part(t, row)) return;
    const auto load_rows = [&](auto load) {
      SST_UNROLL
      for (int s = 0; s < kBatch; ++s) {
        const int i = row + (s ^ own_row(t % kWarp));
        load(i, a + i * a_stride + col(t), next[t].value[s]);
      }
    };
    if (masked(t, row)) {
      load_rows([&](int i, const T* from, T(&to)[kPerLane]) {
        SST_UNROLL
        for (int v = 0; v < kPerLane; ++v) to[v] = i < n && col(t) + v <= i ? from[v] : 0;
      });
    } else {
      load_rows([&](int, const T* from, T(&to)[kPerLane]) {
        const auto chunk = load_chunk<whole, Chunk<T, kPerLane>>(from, 0, kPerLane);
        SST_UNROLL
        for (int v = 0; v < kPerLane; ++v) to[v] = chunk[v];
      });
    }
  }

  template <bool diagonal>
  SST_DEVICE void multiply_batch(Block& block, int t, int row, int in_band) {
    SST_UNROLL
    for (int s = 0; s < kBatch; ++s) {
      const int of_row = s ^ own_row(t % kWarp);
      SST_UNROLL
      for (int c = 0; c < kCols; c += 2) {
        const Pair xi = block.template load<Pair>(t, place_x(in_band + of_row, c ^ own_col(t % kWarp)));
        SST_UNROLL
        for (int v = 0; v < kPerLane; ++v) {
          const T element = current[t].value[s][v];
          const T mirrored = diagonal && col(t) + v == row + of_row ? 0 : element;
          SST_UNROLL
          for (int i = 0; i < 2; ++i) {
            yi[t].value[s][c + i] += element * xj[t].value[v][c + i];
            yj[t].value[v][c + i] += mirrored * xi[i];
          }
        }
      }
    }
  }

  // Adds up y_i across each warp, and leaves it in shared memory.
  SST_DEVICE void reduce_batch(Block& block, int in_band) {
    const auto halve = [&](int mask, int rows, int cols, int row_step, int col_step) {
      block.each([&](int t) {
        SST_UNROLL
        for (int s = 0; s < rows; ++s) {
          SST_UNROLL
          for (int c = 0; c < cols; ++c) {
            yi[t].value[s][c] += block.shuffle(t, mask, [&](int u) { return yi[u].value[s + row_step][c + col_step]; });
          }
        }
      });
    };
    halve(16, 2, 8, 2, 0);
    halve(8, 1, 8, 1, 0);
    halve(4, 1, 4, 0, 4);
    halve(2, 1, 2, 0, 2);
    block.each([&](int t) {
      const T other = block.shuffle(t, 1, [&](int u) { return u % 2 ? yi[u].value[0][0] : yi[u].value[0][1]; });
      const T own = t % 2 ? yi[t].value[0][1] : yi[t].value[0][0];
      block.store(t, place_y(t / kWarp, in_band + t % kWarp / kCols, t % kCols), own + other);
    });
  }

  // The sums of a band's rows over the warps, to the workspace.
  SST_DEVICE void write_band(Block& block, int band, int rows) {
    block.each([&](int t) {
      for (int e = t; e < rows * kCols; e += Grid::kThreads) {
        T sum = 0;
        SST_UNROLL
        for (int warp = 0; warp < Grid::kWarps; ++warp)
          sum += block.template load<T>(t, place_y(warp, 0, 0) + e * kSize);
        partial[(band - first_row) * kCols + e] = sum;
      }
    });
  }

  template <bool whole>
  SST_DEVICE void multiply_band(Block& block, int band, int rows) {
    block.each([&](int t) { load_batch<whole>(t, band); });
    for (int in_band = 0; in_band < rows; in_band += kBatch) {
      const int row = band + in_band;
      block.each([&](int t) {
        current[t] = next[t];
        SST_UNROLL
        for (int s = 0; s < kBatch; ++s) {
          SST_UNROLL
          for (int c = 0; c < kCols; ++c) yi[t].value[s][c] = 0;
        }
        if (in_band + kBatch < rows) load_batch<whole>(t, row + kBatch);
        if (!takes_part(t, row)) return;
        if (masked(t, row)) {
          multiply_batch<true>(block, t, row, in_band);
        } else {
          multiply_batch<false>(block, t, row, in_band);
        }
      });
      reduce_batch(block, in_band);
    }
  }

  template <bool whole>
  SST_DEVICE void run(Block& block, int64_t rows) {
    start(block);
    for (int band = first_row; band < end_row; band += Grid::kBand) {
      const int here = static_cast<int>(least(ceil_div(end_row - band, kBatch) * kBatch, Grid::kBand));
      load_band(block, band, here);
      block.barrier();
      multiply_band<whole>(block, band, here);
      block.barrier();
      write_band(block, band, here);
      block.barrier();
    }
    T* const columns = partial + rows * kCols;
    block.each([&](int t) {
      SST_UNROLL
      for (int v = 0; v < kPerLane; ++v) {
        SST_UNROLL
        for (int c = 0; c < kCols; ++c) {
          columns[(t * kPerLane + v) * kCols + (c ^ own_col(t % kWarp))] = yj[t].value[v][c];
        }
      }
    });
  }
};

// Whether a matrix's rows may be read by vectors.
template <class T>
bool holds_vectors(const SymmThin<T>& product, int64_t k) {
  const auto& a = product.a[k];
  const auto strides = static_cast<uint64_t>(a.row_stride | a.batch_stride) * sizeof(T);
  return (reinterpret_cast<uintptr_t>(a.data) | strides) % 16 == 0;
}

// Unit `index` of matrix k, counted through the members.
template <bool whole, class T, class Block>
SST_DEVICE void symm_thin_unit(Block& block, const SymmThin<T>& product, const SymmThinGrid<T>& grid, T* workspace,
                               int k, int64_t index) {
  using Grid = SymmThinGrid<T>;
  const int64_t member = index / grid.units_each(), local = index % grid.units_each();
  const int64_t group = local % grid.groups, strips = local / grid.groups % grid.strip_groups;
  const int64_t band = local / grid.groups / grid.strip_groups;
  SymmThinUnit<T, Block> unit;
  unit.first_row = static_cast<int>(band * grid.rows);
  unit.end_row = static_cast<int>(least(unit.first_row + grid.rows, grid.n));
  unit.first_strip = static_cast<int>(strips) * Grid::kWarps * Grid::kStrip;
  if (unit.first_strip >= unit.end_row) return;  // above the diagonal
  unit.n = static_cast<int>(grid.n);
  unit.x = product.x;
  unit.x.data = product.x.at(member, group * Grid::kCols);
  unit.cols = static_cast<int>(least(product.m - group * Grid::kCols, Grid::kCols));
  unit.a = product.a[k].at(member, 0);
  unit.a_stride = product.a[k].row_stride;
  unit.partial = workspace + ((k * product.members + member) * grid.units_each() + local) * grid.partial();
  unit.template run<whole>(block, grid.rows);
}

// Sums: a block of threads takes kRows rows of one product, eight columns of it.
template <class T>
struct SymmThinSums {
  static constexpr int kThreads = 256, kRows = kThreads / SymmThinGrid<T>::kCols;

  SST_HOST_DEVICE static int64_t blocks_each(const SymmThinGrid<T>& grid) {
    return ceil_div(grid.n, kRows) * grid.groups;
  }
};

template <class T, class Block>
SST_DEVICE void symm_thin_sum(Block& block, const SymmThin<T>& product, const SymmThinGrid<T>& grid, const T* workspace,
                              int64_t index) {
  using Grid = SymmThinGrid<T>;
  using Sums = SymmThinSums<T>;
  const int64_t each = Sums::blocks_each(grid), of = index / each, local = index % each;
  const int64_t k = of / product.members, member = of % product.members, group = local % grid.groups;
  const T* const partials = workspace + of * grid.units_each() * grid.partial();
  block.each([&](int t) {
    const int c = t % Grid::kCols;
    const int64_t i = local / grid.groups * Sums::kRows + t / Grid::kCols, col = group * Grid::kCols + c;
    if (i >= grid.n || col >= product.m) return;
    constexpr int64_t width = Grid::kWarps * Grid::kStrip;
    const auto part = [&](int64_t band, int64_t strips, int64_t row) {
      return partials[grid.unit(band, strips, group) * grid.partial() + row * Grid::kCols + c];
    };
    T sum = 0;
    const int64_t band = i / grid.rows, end = least((band + 1) * grid.rows, grid.n);
    for (int64_t strips = 0; strips * width < end; ++strips) sum += part(band, strips, i - band * grid.rows);
    const int64_t strips = i / width, in_strips = i - strips * width;
    for (int64_t b = strips * width / grid.rows; b < grid.row_bands; ++b) {
      sum += part(b, strips, grid.rows + in_strips);
    }
    product.y[k].at(member, col)[i * product.y[k].row_stride] = sum;
  });
}

}  // namespace sst::cuda
