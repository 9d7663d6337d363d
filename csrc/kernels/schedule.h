// Which part of the work an index means. Shared by the CPU and the CUDA kernels, and bound to
// Python, so that what runs on a GPU is tested on the host.
#pragma once

#include <cmath>
#include <cstdint>

#include "scalar.h"

namespace sst {

struct Range {
  int64_t begin, end;
};

// Row-major rows of a matrix: element (t, j) at data[t * stride + j], 0 <= j < cols.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, cols;

  // Columns [col, col + width), as far as they exist.
  SST_HOST_DEVICE Rows columns(int64_t col, int64_t width) const {
    return {data + col, stride, cols - col < width ? cols - col : width};
  }
};

// Sequence boundaries as given by the caller: int32 or int64, any values.
struct Offsets {
  const void* data;
  bool is_int64;

  SST_HOST_DEVICE int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

SST_HOST_DEVICE inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
SST_HOST_DEVICE inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
SST_HOST_DEVICE inline int64_t clamp(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// Tokens of sequence s, clamped into [0, tokens); a decreasing pair of offsets is an empty
// sequence.
SST_HOST_DEVICE inline Range sequence_range(const Offsets& offsets, int64_t s, int64_t tokens) {
  const int64_t begin = clamp(offsets[s], 0, tokens);
  return {begin, clamp(offsets[s + 1], begin, tokens)};
}

// Blocks of a lower triangle of n × n blocks, counted row by row: (0,0), (1,0), (1,1), (2,0), …
struct BlockIndex {
  int64_t row, col;
};
SST_HOST_DEVICE inline int64_t triangle_count(int64_t n) { return n * (n + 1) / 2; }
SST_HOST_DEVICE inline BlockIndex triangle_block(int64_t index) {
  // row is the largest r with r (r + 1) / 2 <= index; the root may be off by one in rounding.
  int64_t row = static_cast<int64_t>((sqrt(8.0 * static_cast<double>(index) + 1.0) - 1.0) / 2.0);
  while (triangle_count(row) > index) --row;
  while (triangle_count(row + 1) <= index) ++row;
  return {row, index - triangle_count(row)};
}

}  // namespace sst
