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

// How one product of a group, Σ_t w_t x_t x_tᵀ for each of `members` members, is cut into units of work: the
// lower triangle of d columns into square tiles of side `tile`, the tokens into `splits` ranges whose partial tiles are
// added afterwards in order. Depends on the group's shapes alone, never on threads or multiprocessors.
struct TriangleSchedule {
  int64_t members = 0, d = 0, tokens = 0, tile = 0;  // given
  int64_t splits = 1, split_tokens = 0;              // set by schedule_group, like all below
  int64_t first_unit = 0, first_sum = 0;             // its units and its tiles, counted through the group
  int64_t first_partial = 0;  // its partial tiles in the workspace, in elements; only if splits > 1

  struct Unit {
    int64_t member, split;
    BlockIndex tile;
    Range tokens;
  };

  SST_HOST_DEVICE int64_t tiles() const { return triangle_count(ceil_div(d, tile)); }
  SST_HOST_DEVICE int64_t sums() const { return members * tiles(); }
  SST_HOST_DEVICE int64_t units() const { return sums() * splits; }
  // Tiles of one split follow each other, so that units running together read the same tokens.
  SST_HOST_DEVICE Unit unit(int64_t index) const {
    const int64_t tile_index = index % tiles(), rest = index / tiles(), split = rest % splits;
    const int64_t begin = split * split_tokens;
    return {rest / splits, split, triangle_block(tile_index), {begin, least(begin + split_tokens, tokens)}};
  }
  // The tile summed by `sum` (0 <= sum < sums()): its member and place.
  SST_HOST_DEVICE Unit sum(int64_t index) const {
    return {index / tiles(), 0, triangle_block(index % tiles()), {0, tokens}};
  }
  // Where the partial tile (tile × tile, row-major) of one split of one member's tile lies in the workspace.
  SST_HOST_DEVICE int64_t partial(int64_t member, BlockIndex block, int64_t split) const {
    const int64_t tile_index = triangle_count(block.row) + block.col;
    return first_partial + ((member * tiles() + tile_index) * splits + split) * tile * tile;
  }
};

// Totals of a group.
struct GroupTotals {
  int64_t units, sums, workspace;  // units of work, tiles, elements
};

// Fills the schedules of a group so that it has about `target_units` units where the tokens allow, a unit having at
// least `least_tokens` tokens (a multiple of which a split is) unless its product has fewer.
inline GroupTotals schedule_group(TriangleSchedule* parts, int64_t count, int64_t target_units, int64_t least_tokens) {
  int64_t work = 0;  // tokens times tiles
  for (int64_t i = 0; i < count; ++i) work += parts[i].sums() * parts[i].tokens;
  const int64_t steps = ceil_div(work, target_units * least_tokens);
  GroupTotals totals{0, 0, 0};
  for (int64_t i = 0; i < count; ++i) {
    TriangleSchedule& part = parts[i];
    part.splits = part.tokens > 0 ? ceil_div(part.tokens, least_tokens * (steps > 1 ? steps : 1)) : 1;
    part.split_tokens = least_tokens * ceil_div(ceil_div(part.tokens, least_tokens), part.splits);  // of one length
    part.splits = part.tokens > 0 ? ceil_div(part.tokens, part.split_tokens) : 1;
    part.first_unit = totals.units;
    part.first_sum = totals.sums;
    part.first_partial = totals.workspace;
    totals.units += part.units();
    totals.sums += part.sums();
    if (part.splits > 1) totals.workspace += part.units() * part.tile * part.tile;
  }
  return totals;
}

// The last schedule whose `first` (first_unit or first_sum, ascending) is at most `index`.
SST_HOST_DEVICE inline int64_t find_schedule(const TriangleSchedule* parts, int64_t count,
                                             int64_t TriangleSchedule::* first, int64_t index) {
  int64_t low = 0, high = count;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (parts[middle].*first <= index ? low : high) = middle;
  }
  return low;
}

}  // namespace sst
