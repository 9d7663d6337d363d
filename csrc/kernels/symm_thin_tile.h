// A tile of A times panels of X on the CPU: what symm_thin is made of there. A panel holds some columns of X or Y,
// either by rows, a row being one or two vectors, or by columns, where there are only one or two.
#pragma once

#include <algorithm>

#include "schedule.h"
#include "vector.h"

namespace sst {

// A matrix with its panels, all from row 0 on.
template <class T>
struct Strip {
  const T* a;
  int64_t a_stride;
  const T* x;
  T* y;
  int64_t stride;  // of a panel by columns: from one to the next
};

// Panels by rows: kRows rows of A at a time, an element of A times a row of a panel.
template <int Bytes, int Width, int Rows, class T>
struct ByRows {
  using V = Vector<Bytes, T>;
  static constexpr int64_t kLanes = Bytes / sizeof(T), kCols = Width * kLanes, kLine = 64 / sizeof(T);
  static constexpr int64_t kRows = Rows;
  static constexpr bool kByColumns = false;
  using OneRow = ByRows<Bytes, Width, 1, T>;

  // Rows [row, row + Rows) of A, columns `cols`: y_i += a_ij x_j and y_j += a_ij x_i.
  [[gnu::always_inline]] static void multiply(const Strip<T>& strip, int64_t row, Range cols) {
    const T* a[Rows];
    V xi[Rows][Width], yi[Rows][Width] = {};
    for (int r = 0; r < Rows; ++r) {
      a[r] = strip.a + (row + r) * strip.a_stride;
      for (int w = 0; w < Width; ++w) xi[r][w] = at(strip.x + (row + r) * kCols, w);
    }
    const int64_t ahead = Rows * strip.a_stride;
    const T* x = strip.x + cols.begin * kCols;
    T* y = strip.y + cols.begin * kCols;
    for (int64_t j = cols.begin; j < cols.end;) {
      const int64_t end = std::min(j + kLine, cols.end);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) __builtin_prefetch(a[r] + ahead + j);
      for (; j < end; ++j, x += kCols, y += kCols) {
        V xj[Width], yj[Width];
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) {
          xj[w] = at(x, w);
          yj[w] = at(y, w);
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
        for (int w = 0; w < Width; ++w) at(y, w) = yj[w];
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int w = 0; w < Width; ++w) at(strip.y + (row + r) * kCols, w) += yi[r][w];
    }
  }

  // The triangle of rows and columns [first, first + Rows).
  [[gnu::always_inline]] static void multiply_corner(const Strip<T>& strip, int64_t first) {
    const T* const a = strip.a + first * (strip.a_stride + 1);
    V x[Rows][Width], y[Rows][Width];
    for (int r = 0; r < Rows; ++r) {
      for (int w = 0; w < Width; ++w) {
        x[r][w] = at(strip.x + (first + r) * kCols, w);
        y[r][w] = at(strip.y + (first + r) * kCols, w);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 8
      for (int q = 0; q <= r; ++q) {
        const T element = a[r * strip.a_stride + q];
#pragma GCC unroll 2
        for (int w = 0; w < Width; ++w) {
          y[r][w] += element * x[q][w];
          if (q < r) y[q][w] += element * x[r][w];
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int w = 0; w < Width; ++w) at(strip.y + (first + r) * kCols, w) = y[r][w];
    }
  }

 private:
  [[gnu::always_inline]] static V& at(T* row, int w) { return *reinterpret_cast<V*>(row + w * kLanes); }
  [[gnu::always_inline]] static const V& at(const T* row, int w) {
    return *reinterpret_cast<const V*>(row + w * kLanes);
  }
};

// Panels by columns: a vector of a row of A times as much of each column.
template <int Bytes, int Cols, int Rows, class T>
struct ByColumns {
  using V = Vector<Bytes, T>;
  static constexpr int64_t kLanes = Bytes / sizeof(T), kCols = Cols, kRows = Rows;
  static constexpr bool kByColumns = true;
  using OneRow = ByColumns<Bytes, Cols, 1, T>;

  // As of ByRows.
  [[gnu::always_inline]] static void multiply(const Strip<T>& strip, int64_t row, Range cols) {
    const T* a[Rows];
    T xi[Rows][Cols], rest[Rows][Cols] = {};
    V yi[Rows][Cols] = {};
    for (int r = 0; r < Rows; ++r) {
      a[r] = strip.a + (row + r) * strip.a_stride;
      for (int c = 0; c < Cols; ++c) xi[r][c] = strip.x[c * strip.stride + row + r];
    }
    const int64_t ahead = Rows * strip.a_stride;
    int64_t j = cols.begin;
    for (; j + kLanes <= cols.end; j += kLanes) {
      V element[Rows];
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) {
        element[r] = *reinterpret_cast<const V*>(a[r] + j);
        __builtin_prefetch(a[r] + ahead + j);
      }
#pragma GCC unroll 4
      for (int c = 0; c < Cols; ++c) {
        const V xj = *reinterpret_cast<const V*>(strip.x + c * strip.stride + j);
        V* const y = reinterpret_cast<V*>(strip.y + c * strip.stride + j);
        V yj = *y;
#pragma GCC unroll 8
        for (int r = 0; r < Rows; ++r) {
          yi[r][c] += element[r] * xj;
          yj += element[r] * xi[r][c];
        }
        *y = yj;
      }
    }
    for (; j < cols.end; ++j) {
      for (int c = 0; c < Cols; ++c) {
        T& y = strip.y[c * strip.stride + j];
        for (int r = 0; r < Rows; ++r) {
          rest[r][c] += a[r][j] * strip.x[c * strip.stride + j];
          y += a[r][j] * xi[r][c];
        }
      }
    }
    for (int c = 0; c < Cols; ++c) {
      for (int r = 0; r < Rows; ++r) strip.y[c * strip.stride + row + r] += rest[r][c] + sum<Bytes>(yi[r][c]);
    }
  }

  [[gnu::always_inline]] static void multiply_corner(const Strip<T>& strip, int64_t first) {
    for (int c = 0; c < Cols; ++c) {
      const T* const x = strip.x + c * strip.stride;
      T* const y = strip.y + c * strip.stride;
      for (int64_t i = first; i < first + Rows; ++i) {
        const T* const a = strip.a + i * strip.a_stride;
        T total = a[i] * x[i];
        for (int64_t j = first; j < i; ++j) {
          total += a[j] * x[j];
          y[j] += a[j] * x[i];
        }
        y[i] += total;
      }
    }
  }

 private:
  // Of a vector's elements, half added to half.
  template <int N>
  [[gnu::always_inline]] static T sum(const Vector<N, T>& v) {
    if constexpr (N == sizeof(T)) {
      return v[0];
    } else {
      Vector<N / 2, T> half[2];
      __builtin_memcpy(half, &v, N);
      half[0] += half[1];
      return sum<N / 2>(half[0]);
    }
  }
};

// m columns as groups, each one panel: calls visit.operator()<ByRows or ByColumns>(first column) for each, and returns
// how many columns the panels have.
template <int Bytes, int Rows, class T, class Visit>
[[gnu::always_inline]] inline int64_t for_groups(int64_t m, const Visit& visit) {
  constexpr int64_t lanes = Bytes / sizeof(T);
  int64_t col = 0;
  const auto group = [&]<class Group>() __attribute__((always_inline)) {
    visit.template operator()<Group>(col);
    col += Group::kCols;
  };
  while (m - col > lanes) group.template operator()<ByRows<Bytes, 2, Rows / 2, T>>();
  if (m - col > lanes / 2) group.template operator()<ByRows<Bytes, 1, Rows, T>>();
  if constexpr (Bytes > 16) {
    if (m - col > 2) group.template operator()<ByRows<Bytes / 2, 1, Rows, T>>();
  }
  if (m - col == 2) group.template operator()<ByColumns<Bytes, 2, Rows / 2, T>>();
  if (m - col == 1) group.template operator()<ByColumns<Bytes, 1, Rows, T>>();
  return col;
}

// Rows of one tile, the columns of a chunk; on the diagonal only those below it.
template <class Group, class T>
[[gnu::always_inline]] inline void multiply_rows(const Strip<T>& strip, int64_t row, Range cols, bool diagonal) {
  const Range below{cols.begin, diagonal ? std::min(cols.end, row) : cols.end};
  if (below.begin < below.end) Group::multiply(strip, row, below);
  if (diagonal && cols.begin <= row && row < cols.end) Group::multiply_corner(strip, row);
}

// A tile of A: rows and columns of two blocks, or of one, on the diagonal.
template <class Group, class T>
[[gnu::always_inline]] inline void multiply_tile(const Strip<T>& strip, Range rows, Range cols, bool diagonal) {
  // Columns of A whose rows of both panels stay in the L1 cache while rows of A pass by; a multiple of kRows.
  constexpr int64_t chunk = 16384 / (Group::kCols * sizeof(T));
  for (int64_t j = cols.begin; j < cols.end; j += chunk) {
    const Range part{j, std::min(j + chunk, cols.end)};
    int64_t i = diagonal ? j : rows.begin;
    for (; i + Group::kRows <= rows.end; i += Group::kRows) multiply_rows<Group>(strip, i, part, diagonal);
    for (; i < rows.end; ++i) multiply_rows<typename Group::OneRow>(strip, i, part, diagonal);
  }
}

}  // namespace sst
