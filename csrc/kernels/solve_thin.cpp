#include "solve_thin.h"

#include <algorithm>
#include <cmath>

#include "vector.h"
#include "wait.h"

namespace sst {

namespace {

constexpr int64_t kTile = kSolveTile, kTileSize = kTile * kTile;

template <class T>
const T* tile_at(const T* packed, int64_t row, int64_t col) {
  return packed + (triangle_count(row) + col) * kTileSize;
}

// Columns of X in registers: Width vectors, Rows rows at a time.
template <int Bytes, int Width, int Rows, class T>
struct Columns {
  using V = Vector<Bytes, T>;
  static constexpr int64_t kLanes = Bytes / sizeof(T), kCols = Width * kLanes;

  // y += tile · x, or its transpose · x, for kTile rows of each; `ahead` is the tile to come.
  template <bool Transposed>
  [[gnu::always_inline]] static void multiply_add(const T* tile, const T* x, T* y, const T* ahead) {
    for (int64_t i = 0; i < kTile; i += Rows) {
      V sum[Rows][Width];
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) sum[r][w] = at(y + (i + r) * kCols, w);
      }
      for (int64_t line = 0; line < Rows * kTile; line += 64 / sizeof(T)) __builtin_prefetch(ahead + i * kTile + line);
      for (int64_t p = 0; p < kTile; ++p) {
        V xp[Width];
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) xp[w] = at(x + p * kCols, w);
#pragma GCC unroll 16
        for (int r = 0; r < Rows; ++r) {
          const T element = Transposed ? tile[p * kTile + i + r] : tile[(i + r) * kTile + p];
#pragma GCC unroll 2
          for (int w = 0; w < Width; ++w) sum[r][w] += element * xp[w];
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) at(y + (i + r) * kCols, w) = sum[r][w];
      }
    }
  }

  // y ← tile · y, or its transpose · y.
  template <bool Transposed>
  [[gnu::always_inline]] static void multiply(const T* tile, T* y) {
    T old[kTile * kCols];
    std::copy(y, y + kTile * kCols, old);
    std::fill(y, y + kTile * kCols, T(0));
    multiply_add<Transposed>(tile, old, y, tile);
  }

 private:
  [[gnu::always_inline]] static V& at(T* row, int w) { return *reinterpret_cast<V*>(row + w * kLanes); }
  [[gnu::always_inline]] static const V& at(const T* row, int w) {
    return *reinterpret_cast<const V*>(row + w * kLanes);
  }
};

// Calls visit.operator()<Columns>(first column) for the groups of m columns, and returns how many columns they have.
template <int Bytes, int Rows, class T, class Visit>
[[gnu::always_inline]] inline int64_t for_column_groups(int64_t m, const Visit& visit) {
  constexpr int64_t lanes = Bytes / sizeof(T);
  int64_t col = 0;
  for (; m - col > lanes; col += 2 * lanes) visit.template operator()<Columns<Bytes, 2, Rows, T>>(col);
  if (m > col) {
    visit.template operator()<Columns<Bytes, 1, 2 * Rows, T>>(col);
    col += lanes;
  }
  return col;
}

// Rows [first, first + kTile) of a group of columns, from and to vectors of n elements; rows beyond n are 0.
template <class T>
void load(const T* x, int64_t n, int64_t cols, int64_t first, T* panel, int64_t width) {
  std::fill(panel, panel + kTile * width, T(0));
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t i = first; i < std::min(first + kTile, n); ++i) panel[(i - first) * width + c] = x[c * n + i];
  }
}
template <class T>
void store(const T* panel, int64_t width, int64_t n, int64_t cols, int64_t first, T* y) {
  for (int64_t c = 0; c < cols; ++c) {
    for (int64_t i = first; i < std::min(first + kTile, n); ++i) y[c * n + i] = panel[(i - first) * width + c];
  }
}

}  // namespace

template <class T>
void pack_factor(const T* factor, int64_t stride, int64_t n, int64_t row, T* packed) {
  const int64_t first = row * kTile, rows = std::min(kTile, n - first);
  T* tile = packed + triangle_count(row) * kTileSize;
  for (int64_t col = 0; col < row; ++col, tile += kTileSize) {
    std::fill(tile + rows * kTile, tile + kTileSize, T(0));
    for (int64_t i = 0; i < rows; ++i) {
      const T* const from = factor + (first + i) * stride + col * kTile;
      for (int64_t j = 0; j < kTile; ++j) tile[i * kTile + j] = -from[j];
    }
  }
  // Row by row: (L⁻¹)_i = (e_i − Σ_{j<i} L_ij (L⁻¹)_j) / L_ii.
  std::fill(tile, tile + kTileSize, T(0));
  for (int64_t i = 0; i < kTile; ++i) {
    T* const inverse = tile + i * kTile;
    inverse[i] = 1;
    if (i >= rows) continue;
    const T* const from = factor + (first + i) * stride + first;
    for (int64_t j = 0; j < i; ++j) {
      for (int64_t c = 0; c <= j; ++c) inverse[c] -= from[j] * tile[j * kTile + c];
    }
    for (int64_t c = 0; c <= i; ++c) inverse[c] /= from[i];
  }
}

template <class T>
SolveThinCpu<T>::SolveThinCpu(const SolveThin<T>& problem, int set)
    : problem_(problem), set_(set), blocks_(ceil_div(problem.n, kTile)), padded_(0), member_size_(0) {
  by_set(set, [&]<int Bytes, int Rows>() __attribute__((always_inline)) {
    padded_ = for_column_groups<Bytes, Rows, T>(problem_.m, []<class Group>(int64_t) {});
  });
  member_size_ = blocks_ * kTile * padded_;
  steps_done_ = std::make_unique<std::atomic<int>[]>(units());
}

template <class T>
void SolveThinCpu<T>::run(bool upwards, T* workspace, std::atomic<int64_t>& next) {
  for (int64_t index = next++; index < units(); index = next++) {
    const int64_t member = index % problem_.members, i = index / problem_.members;
    upwards ? up(member, blocks_ - 1 - i, workspace) : down(member, i, workspace);
  }
}

template <class T>
void SolveThinCpu<T>::wait_for(int64_t member, int64_t block, int steps) const {
  wait_until([&] { return steps_done_[member * blocks_ + block].load(std::memory_order_acquire) >= steps; });
}

template <class T>
void SolveThinCpu<T>::down(int64_t member, int64_t i, T* workspace) {
  const int64_t n = problem_.n, rows = blocks_ * kTile;
  const T* const tiles = problem_.factor + member * packed_factor_size(n);
  T* const panels = workspace + member * member_size_;
  by_set(set_, [&]<int Bytes, int Rows>() __attribute__((always_inline)) {
    const auto for_groups = [&](const auto& f)
                                __attribute__((always_inline)) { for_column_groups<Bytes, Rows, T>(problem_.m, f); };
    for_groups([&]<class Group>(int64_t col) __attribute__((always_inline)) {
      load(problem_.x + (member * problem_.m + col) * n, n, std::min(Group::kCols, problem_.m - col), i * kTile,
           panels + col * rows + i * kTile * Group::kCols, Group::kCols);
    });
    for (int64_t j = 0; j < i; ++j) {
      wait_for(member, j, 1);
      for_groups([&]<class Group>(int64_t col) __attribute__((always_inline)) {
        T* const panel = panels + col * rows;
        Group::template multiply_add<false>(tile_at(tiles, i, j), panel + j * kTile * Group::kCols,
                                            panel + i * kTile * Group::kCols, tile_at(tiles, i, j + 1));
      });
    }
    for_groups([&]<class Group>(int64_t col) __attribute__((always_inline)) {
      Group::template multiply<false>(tile_at(tiles, i, i), panels + col * rows + i * kTile * Group::kCols);
    });
  });
  steps_done_[member * blocks_ + i].store(1, std::memory_order_release);
}

template <class T>
void SolveThinCpu<T>::up(int64_t member, int64_t i, T* workspace) {
  const int64_t n = problem_.n, rows = blocks_ * kTile;
  const T* const tiles = problem_.factor + member * packed_factor_size(n);
  T* const panels = workspace + member * member_size_;
  by_set(set_, [&]<int Bytes, int Rows>() __attribute__((always_inline)) {
    const auto for_groups = [&](const auto& f)
                                __attribute__((always_inline)) { for_column_groups<Bytes, Rows, T>(problem_.m, f); };
    for (int64_t j = blocks_ - 1; j > i; --j) {
      wait_for(member, j, 2);
      for_groups([&]<class Group>(int64_t col) __attribute__((always_inline)) {
        T* const panel = panels + col * rows;
        Group::template multiply_add<true>(tile_at(tiles, j, i), panel + j * kTile * Group::kCols,
                                           panel + i * kTile * Group::kCols, tile_at(tiles, j - 1, i));
      });
    }
    for_groups([&]<class Group>(int64_t col) __attribute__((always_inline)) {
      T* const block = panels + col * rows + i * kTile * Group::kCols;
      Group::template multiply<true>(tile_at(tiles, i, i), block);
      store(block, Group::kCols, n, std::min(Group::kCols, problem_.m - col), i * kTile,
            problem_.y + (member * problem_.m + col) * n);
    });
  });
  steps_done_[member * blocks_ + i].store(2, std::memory_order_release);
}

template void pack_factor(const float*, int64_t, int64_t, int64_t, float*);
template void pack_factor(const double*, int64_t, int64_t, int64_t, double*);
template class SolveThinCpu<float>;
template class SolveThinCpu<double>;

}  // namespace sst
