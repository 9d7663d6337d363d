#include "symm_thin.h"

#include <algorithm>
#include <thread>

#include "vector.h"

namespace sst {

namespace {

// Rows of a block: a tile of A fits the L2 cache, where each group of columns after the first finds it.
constexpr int64_t kBlock = 256;
// Bytes of one operand's panel that stay in the L1 cache while rows of A pass by.
constexpr int64_t kPanelBytes = 16384;
// Members are worked on together until their panels have this many elements.
constexpr int64_t kCohortElements = 1 << 16;

// Columns [col, m) as groups, each one panel: calls visit.operator()<vector bytes, vectors, rows of A at a time>(first
// column) for each group, and returns how many columns all panels have.
template <int Bytes, int Rows, class T, class Visit>
[[gnu::always_inline]] inline int64_t for_groups(int64_t m, const Visit& visit) {
  constexpr int64_t lanes = Bytes / sizeof(T);
  int64_t col = 0;
  while (col < m) {
    if (m - col > lanes) {
      visit.template operator()<Bytes, 2, Rows / 2>(col);
      col += 2 * lanes;
    } else if (Bytes > 16 && m - col <= lanes / 2) {
      visit.template operator()<(Bytes > 16 ? Bytes / 2 : Bytes), 1, Rows>(col);
      col += lanes / 2;
    } else {
      visit.template operator()<Bytes, 1, Rows>(col);
      col += lanes;
    }
  }
  return col;
}

// Rows [first, first + Rows) of A times columns [cols): y_i += a_ij x_j and y_j += a_ij x_i. x and y point at the
// panel's row 0.
template <class T>
struct Strip {
  const T* a;
  int64_t stride;
  const T* x;
  T* y;
};

template <int Bytes, int Width, int Rows, class T>
[[gnu::always_inline]] inline void multiply_strip(const Strip<T>& strip, int64_t row, Range cols) {
  using V = Vector<Bytes, T>;
  constexpr int64_t lanes = Bytes / sizeof(T), width = Width * lanes, line = 64 / sizeof(T);
  const T* a[Rows];
  V xi[Rows][Width], yi[Rows][Width] = {};
  for (int r = 0; r < Rows; ++r) {
    a[r] = strip.a + (row + r) * strip.stride;
    for (int w = 0; w < Width; ++w) xi[r][w] = *reinterpret_cast<const V*>(strip.x + (row + r) * width + w * lanes);
  }
  const int64_t ahead = Rows * strip.stride;
  const T* x = strip.x + cols.begin * width;
  T* y = strip.y + cols.begin * width;
  for (int64_t j = cols.begin; j < cols.end;) {
    const int64_t end = std::min(j + line, cols.end);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) __builtin_prefetch(a[r] + ahead + j);
    for (; j < end; ++j, x += width, y += width) {
      V xj[Width], yj[Width];
#pragma GCC unroll 2
      for (int w = 0; w < Width; ++w) {
        xj[w] = *reinterpret_cast<const V*>(x + w * lanes);
        yj[w] = *reinterpret_cast<const V*>(y + w * lanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        const T element = a[r][j];
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) {
          yi[r][w] += element * xj[w];
          yj[w] += element * xi[r][w];
        }
      }
#pragma GCC unroll 2
      for (int w = 0; w < Width; ++w) *reinterpret_cast<V*>(y + w * lanes) = yj[w];
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) *reinterpret_cast<V*>(strip.y + (row + r) * width + w * lanes) += yi[r][w];
  }
}

// The triangle of A's rows and columns [first, first + Rows).
template <int Bytes, int Width, int Rows, class T>
[[gnu::always_inline]] inline void multiply_corner(const Strip<T>& strip, int64_t first) {
  using V = Vector<Bytes, T>;
  constexpr int64_t lanes = Bytes / sizeof(T), width = Width * lanes;
  const T* const a = strip.a + first * (strip.stride + 1);
  V x[Rows][Width], y[Rows][Width];
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) {
      x[r][w] = *reinterpret_cast<const V*>(strip.x + (first + r) * width + w * lanes);
      y[r][w] = *reinterpret_cast<const V*>(strip.y + (first + r) * width + w * lanes);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
    for (int q = 0; q <= r; ++q) {
      const T element = a[r * strip.stride + q];
#pragma GCC unroll 2
      for (int w = 0; w < Width; ++w) {
        y[r][w] += element * x[q][w];
        if (q < r) y[q][w] += element * x[r][w];
      }
    }
  }
  for (int r = 0; r < Rows; ++r) {
    for (int w = 0; w < Width; ++w) *reinterpret_cast<V*>(strip.y + (first + r) * width + w * lanes) = y[r][w];
  }
}

// Rows of one tile, the columns of a chunk; on the diagonal only those below it.
template <int Bytes, int Width, int Rows, class T>
[[gnu::always_inline]] inline void multiply_rows(const Strip<T>& strip, int64_t row, Range cols, bool diagonal) {
  const Range below{cols.begin, diagonal ? std::min(cols.end, row) : cols.end};
  if (below.begin < below.end) multiply_strip<Bytes, Width, Rows>(strip, row, below);
  if (diagonal && cols.begin <= row && row < cols.end) multiply_corner<Bytes, Width, Rows>(strip, row);
}

template <int Bytes, int Width, int Rows, class T>
[[gnu::always_inline]] inline void multiply_tile(const Strip<T>& strip, Range rows, Range cols, bool diagonal) {
  constexpr int64_t chunk = kPanelBytes / (Width * Bytes);  // a multiple of Rows
  for (int64_t j = cols.begin; j < cols.end; j += chunk) {
    const Range part{j, std::min(j + chunk, cols.end)};
    int64_t i = diagonal ? j : rows.begin;
    for (; i + Rows <= rows.end; i += Rows) multiply_rows<Bytes, Width, Rows>(strip, i, part, diagonal);
    for (; i < rows.end; ++i) multiply_rows<Bytes, Width, 1>(strip, i, part, diagonal);
  }
}

// Calls visit(first column, columns) for the panels of m columns, and returns how many columns all panels have.
template <class T, class Visit>
int64_t for_panels(int set, int64_t m, const Visit& visit) {
  int64_t padded = 0;
  by_set(set, [&]<int Bytes, int Rows>() {
    padded = for_groups<Bytes, Rows, T>(m, [&]<int GroupBytes, int Width, int>(int64_t col) {
      visit(col, Width * GroupBytes / static_cast<int64_t>(sizeof(T)));
    });
  });
  return padded;
}

template <class T>
struct View {
  T* data;
  int64_t row_stride, col_stride;
};

// In bands of rows, lest each of many far-apart columns cost a cache line an element.
template <class T>
void copy_columns(Range rows, int64_t cols, const View<const T>& from, const View<T>& to) {
  constexpr int64_t band = 16;
  for (int64_t first = rows.begin; first < rows.end; first += band) {
    const int64_t end = std::min(first + band, rows.end);
    for (int64_t c = 0; c < cols; ++c) {
      const T* const source = from.data + c * from.col_stride;
      T* const target = to.data + c * to.col_stride;
      for (int64_t i = first; i < end; ++i) target[i * to.row_stride] = source[i * from.row_stride];
    }
  }
}

int64_t block_rows(int64_t n) { return clamp(ceil_div(ceil_div(n, 4), 32) * 32, 64, kBlock); }

}  // namespace

BlockIndex Pairing::pair(int64_t round, int64_t index) const {
  if (round == 0) return {index, index};
  // The circle method: the last of an even number of players stays, the others move on by one each round.
  const int64_t circle = 2 * pairs() - 1;
  const int64_t one = (round + index) % circle, other = index == 0 ? circle : (round + circle - index) % circle;
  return {std::max(one, other), std::min(one, other)};
}

template <class T>
SymmThinCpu<T>::SymmThinCpu(const SymmThin<T>& product, int64_t threads, int set)
    : product_(product), set_(set), block_(block_rows(product.n)), pairing_{ceil_div(product.n, block_)} {
  padded_ = for_panels<T>(set, product.m, [](int64_t, int64_t) {});
  member_size_ = product.n * padded_ * (1 + product.matrices);
  const int64_t busy = ceil_div(2 * threads, std::max<int64_t>(pairing_.pairs(), 1));
  members_ = std::min(product.members, std::max(busy, kCohortElements / std::max<int64_t>(member_size_, 1)));
  rounds_done_ = std::make_unique<std::atomic<int64_t>[]>(members_ * pairing_.blocks);
}

template <class T>
struct SymmThinCpu<T>::Unit {
  int64_t member, round;
  BlockIndex tile;
};

// Round by round, and in a round member by member.
template <class T>
typename SymmThinCpu<T>::Unit SymmThinCpu<T>::unit(int64_t index, int64_t members) const {
  const int64_t diagonal = members * pairing_.blocks;
  if (index < diagonal) {
    return {index / pairing_.blocks, 0, pairing_.pair(0, index % pairing_.blocks)};
  }
  const int64_t pairs = pairing_.pairs(), rest = (index - diagonal) / pairs, round = 1 + rest / members;
  return {rest % members, round, pairing_.pair(round, (index - diagonal) % pairs)};
}

template <class T>
void SymmThinCpu<T>::pack(int64_t first, T* workspace, std::atomic<int64_t>& next) {
  const int64_t members = count(first), n = product_.n;
  for (int64_t index = next++; index < members * pairing_.blocks; index = next++) {
    const int64_t member = index / pairing_.blocks;
    const Range rows = this->rows(index % pairing_.blocks);
    T* const panels = workspace + member * member_size_;
    for_panels<T>(set_, product_.m, [&](int64_t col, int64_t width) {
      const int64_t present = std::min(width, product_.m - col);
      T* const x = panels + col * n;
      copy_columns<T>(rows, present, {product_.x.at(first + member, col), product_.x.row_stride, product_.x.col_stride},
                      {x, width, 1});
      for (int64_t i = rows.begin; i < rows.end; ++i) std::fill(x + i * width + present, x + (i + 1) * width, T(0));
      for (int64_t k = 1; k <= product_.matrices; ++k) {
        T* const y = panels + (k * padded_ + col) * n;
        std::fill(y + rows.begin * width, y + rows.end * width, T(0));
      }
    });
    rounds_done_[index].store(0, std::memory_order_relaxed);
  }
}

template <class T>
void SymmThinCpu<T>::multiply(int64_t first, T* workspace, std::atomic<int64_t>& next) {
  const int64_t members = count(first);
  for (int64_t index = next++; index < members * pairing_.units(); index = next++) {
    const Unit unit = this->unit(index, members);
    std::atomic<int64_t>* const done = rounds_done_.get() + unit.member * pairing_.blocks;
    T* const panels = workspace + unit.member * member_size_;
    for_blocks(unit.tile, [&](int64_t block) {
      while (done[block].load(std::memory_order_acquire) != unit.round) std::this_thread::yield();
    });
    if (unit.tile.row < pairing_.blocks) multiply_unit(first + unit.member, unit.tile, panels);
    for_blocks(unit.tile, [&](int64_t block) {
      if (unit.round + 1 == pairing_.rounds()) unpack(first + unit.member, block, panels);
      done[block].store(unit.round + 1, std::memory_order_release);
    });
  }
}

template <class T>
void SymmThinCpu<T>::multiply_unit(int64_t member, BlockIndex tile, T* panels) const {
  const Range rows = this->rows(tile.row), cols = this->rows(tile.col);
  by_set(set_, [&]<int Bytes, int Rows>() __attribute__((always_inline)) {
    for (int64_t k = 0; k < product_.matrices; ++k) {
      T* const y = panels + (1 + k) * padded_ * product_.n;
      for_groups<Bytes, Rows, T>(
          product_.m, [&]<int GroupBytes, int Width, int GroupRows>(int64_t col) __attribute__((always_inline)) {
            const Strip<T> strip{product_.a[k].at(member, 0), product_.a[k].row_stride, panels + col * product_.n,
                                 y + col * product_.n};
            multiply_tile<GroupBytes, Width, GroupRows>(strip, rows, cols, tile.row == tile.col);
          });
    }
  });
}

// Calls f(block) for the blocks that meet in a tile.
template <class T>
template <class F>
void SymmThinCpu<T>::for_blocks(BlockIndex tile, F f) const {
  f(tile.col);
  if (tile.row != tile.col && tile.row < pairing_.blocks) f(tile.row);
}

// Writes a block of the Ys.
template <class T>
void SymmThinCpu<T>::unpack(int64_t member, int64_t block, const T* panels) const {
  const Range rows = this->rows(block);
  for_panels<T>(set_, product_.m, [&](int64_t col, int64_t width) {
    const int64_t present = std::min(width, product_.m - col);
    for (int64_t k = 0; k < product_.matrices; ++k) {
      const Strided<T>& y = product_.y[k];
      const T* const from = panels + ((1 + k) * padded_ + col) * product_.n;
      copy_columns<T>(rows, present, {from, width, 1}, {y.at(member, col), y.row_stride, y.col_stride});
    }
  });
}

template class SymmThinCpu<float>;
template class SymmThinCpu<double>;

}  // namespace sst
